"""Greedy answers of the default model, token by token against transformers, however the engine came to them.

transformers reads each prompt with the engine's own answer behind it, once: by induction its greedy tokens are the
engine's as long as its best token at every place is the engine's next one. Where they first differ, its two best logits
must lie within 1e-3 (a tie that float32 sums in another order may turn round).

STREAMSERVE_QUESTIONS=50 runs the full acceptance set; the everyday run takes the first few.
"""

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from streamserve.build import Built, build
from streamserve.config import CacheConfig, Config, ModelConfig, SchedulerConfig
from streamserve.default_model import find_default_model
from streamserve.engine.client import collect
from streamserve.errors import CheckpointError
from streamserve.messages import Delta, GenerateRequest, SamplingParams

try:
    MODEL = find_default_model()
except CheckpointError as error:
    pytest.skip(str(error), allow_module_level=True)

QUESTIONS = Path(__file__).parents[2].parent / "shared/data/mt_bench_questions.jsonl"
COUNT = int(os.environ.get("STREAMSERVE_QUESTIONS", "4"))
NEW_TOKENS = 64
TIE = 1e-3

pytestmark = [
    pytest.mark.timeout(3000),
    pytest.mark.skipif(not QUESTIONS.exists(), reason="the question file is not on this machine"),
]


def questions() -> list[str]:
    with QUESTIONS.open(encoding="utf-8") as lines:
        return [json.loads(line)["turns"][0] for line in list(lines)[:COUNT]] if COUNT else []


class Runs:
    """Answers of one engine to all questions, in one of the ways below."""

    def __init__(self, dtype: str, *, chunk: int | None = None, max_total_tokens: int = 40_000) -> None:
        self.built: Built = build(
            Config(
                model=ModelConfig(model_path=str(MODEL), dtype=dtype, context_length=384),
                cache=CacheConfig(max_total_tokens=max_total_tokens),
                scheduler=SchedulerConfig(chunked_prefill_size=chunk, max_running_requests=16),
            )
        )
        self.prompts = [tuple(self.built.text.encode_chat([{"role": "user", "content": text}])) for text in questions()]

    async def _ask(self, index: int, prompt: tuple[int, ...]) -> Delta:
        params = SamplingParams(max_new_tokens=NEW_TOKENS, temperature=0.0)
        return await collect(await self.built.engine.submit(GenerateRequest(f"q{index}", prompt, params)))

    async def _run(self, *, at_once: bool, rounds: int) -> list[list[Delta]]:
        engine = asyncio.create_task(self.built.engine.run())
        try:
            answers = []
            for _ in range(rounds):
                if at_once:
                    answers.append(list(await asyncio.gather(*(self._ask(i, p) for i, p in enumerate(self.prompts)))))
                else:
                    answers.append([await self._ask(i, p) for i, p in enumerate(self.prompts)])
            return answers
        finally:
            engine.cancel()
            await asyncio.gather(engine, return_exceptions=True)

    def answers(self, *, at_once: bool, rounds: int = 1) -> list[list[Delta]]:
        try:
            return asyncio.run(self._run(at_once=at_once, rounds=rounds))
        finally:
            self.built.close()


class Reference:
    """transformers on the same dequantised weights, float32. Remembers what it has already checked."""

    def __init__(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.torch = torch
        self.model: Any = AutoModelForCausalLM.from_pretrained(str(MODEL.parent), gguf_file=MODEL.name, dtype=torch.float32)
        self.checked: set[tuple[int, ...]] = set()

    def check(self, prompt: tuple[int, ...], answer: tuple[int, ...]) -> None:
        if (whole := prompt + answer) in self.checked:
            return
        with self.torch.inference_mode():
            logits = self.model(self.torch.tensor([whole[:-1]])).logits[0, len(prompt) - 1 :]
        for place, (row, token) in enumerate(zip(logits, answer, strict=True)):
            if int(row.argmax()) != token:
                two = self.torch.topk(row, 2).values
                assert float(two[0] - two[1]) < TIE and float(two[0] - row[token]) < TIE, f"token {place} of the answer differs"
                break  # from here on transformers would have gone another way
        self.checked.add(whole)


@pytest.fixture(scope="module")
def reference() -> Iterator[Reference]:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield Reference()


WAYS = {
    "one by one": {"at_once": False},
    "all at once, then again with a warm cache": {"at_once": True, "rounds": 2},
    "pages so scarce that requests are preempted": {"at_once": True, "max_total_tokens": 1280},
    "chunks of 16 tokens": {"at_once": True, "chunk": 16},
}


@pytest.mark.parametrize("way", WAYS)
def test_float32_answers_are_transformers(way: str, reference: Reference) -> None:
    options: dict[str, Any] = dict(WAYS[way])
    at_once, rounds = options.pop("at_once"), options.pop("rounds", 1)
    if "max_total_tokens" in options:
        options["max_total_tokens"] = scarce(COUNT)
    runs = Runs("float32", **options)
    for number, answers in enumerate(runs.answers(at_once=at_once, rounds=rounds)):
        for prompt, answer in zip(runs.prompts, answers, strict=True):
            reference.check(prompt, answer.token_ids)
            if number:
                assert answer.num_cached_tokens == len(prompt) - 1
    if "max_total_tokens" in options:
        assert runs.built.engine.num_preemptions > 0, "the test must make pages scarce enough"


def scarce(count: int) -> int:
    """Tokens that hold the longest question with its answer, but not what is asked at once."""
    return 1280 if count > 8 else 400


def test_packed_answers_do_not_depend_on_how_they_were_computed() -> None:
    """Packed kernels promise the same bits whatever the batch, the chunks and the cache."""
    results = []
    for options in WAYS.values():
        given: dict[str, Any] = dict(options)
        at_once, rounds = given.pop("at_once"), given.pop("rounds", 1)
        if "max_total_tokens" in given:
            given["max_total_tokens"] = scarce(COUNT)
        runs = Runs("auto", **given)
        for answers in runs.answers(at_once=at_once, rounds=rounds):
            results.append([answer.token_ids for answer in answers])
    assert all(result == results[0] for result in results)
