"""CPU speed against llama.cpp and transformers on one model, in one run.

    python bench/cpu.py [MODEL.gguf] [--threads 2] [--rounds 3] [--json out.json] [--skip transformers]

Each engine gets the same token ids: prompts of 128 tokens and 128 new ones at 1, 8 and 16 at once, greedy, end of
sequence ignored, and one prompt of 1,024. The engines take turns within a round, so that a drifting machine hits all
alike; figures are medians over rounds, ratios are medians of the rounds' own ratios.

  total   all new tokens / time from the start to the last token
  decode  new tokens after the last stream's first / time from there to the end
  prefill time to the first token of a 1,024-token prompt
  shared  32 requests that share 1,024 tokens and have 16 of their own, 8 at once, 16 new tokens: ours, cache on and off

llama.cpp is measured through llama-cpp-python's low-level interface (its batch API), when importable.
"""

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.machine import processor

PROMPT_LEN, NEW_TOKENS, LONG_PROMPT = 128, 128, 1024
BATCHES = (1, 8, 16)
Figures = dict[str, float]


def prompts(count: int, length: int, seed: int) -> list[list[int]]:
    rng = Random(seed)
    return [[rng.randrange(1000, 48000) for _ in range(length)] for _ in range(count)]


@dataclass
class Timing:
    """When a batch was started, and when tokens came: per stream (time, number of tokens)."""

    started: float
    arrivals: list[list[tuple[float, int]]]

    @property
    def last(self) -> float:
        return max(stream[-1][0] for stream in self.arrivals)

    def figures(self) -> Figures:
        batch = len(self.arrivals)
        all_first = max(stream[0][0] for stream in self.arrivals)
        late = sum(count for stream in self.arrivals for at, count in stream if at > all_first)
        return {
            f"total@{batch}": sum(count for stream in self.arrivals for _, count in stream) / (self.last - self.started),
            f"decode@{batch}": late / (self.last - all_first),
            f"ttft@{batch}": statistics.median(stream[0][0] - self.started for stream in self.arrivals),
        }


class Ours:
    """StreamServe's engine in this process, without HTTP."""

    name = "streamserve"

    def __init__(self, model: str, threads: int, *, reuse: bool = True) -> None:
        from streamserve import process
        from streamserve.build import build
        from streamserve.config import CacheConfig, Config, DeviceConfig, ModelConfig, SchedulerConfig

        config = Config(
            model=ModelConfig(model_path=model),
            device=DeviceConfig(device="cpu", threads=threads),
            cache=CacheConfig(disable_radix_cache=not reuse),
            scheduler=SchedulerConfig(max_running_requests=32),
        )
        self.built = build(config)
        process.settle()
        self.count = 0
        self.runner = asyncio.Runner()
        self.loop_task = self.runner.run(self._start())

    async def _start(self) -> "asyncio.Task[None]":
        return asyncio.create_task(self.built.engine.run())

    def generate(self, batch: list[list[int]], num_new: int, at_once: int | None = None) -> Timing:
        return self.runner.run(self._generate(batch, num_new, at_once or len(batch)))

    async def _generate(self, batch: list[list[int]], num_new: int, at_once: int) -> Timing:
        from streamserve.messages import GenerateRequest, SamplingParams

        gate = asyncio.Semaphore(at_once)
        params = SamplingParams(max_new_tokens=num_new, temperature=0.0, ignore_eos=True)

        async def one(prompt: list[int]) -> list[tuple[float, int]]:
            self.count += 1
            request = GenerateRequest(f"bench{self.count}", tuple(prompt), params)
            async with gate:
                box = await self.built.engine.submit(request)
                arrivals = []
                finish = None
                while finish is None:
                    delta = await box.get()
                    finish = delta.finish_reason
                    arrivals.append((time.perf_counter(), len(delta.token_ids)))
                assert sum(count for _, count in arrivals) == num_new, (arrivals, delta)
                return arrivals

        started = time.perf_counter()
        return Timing(started, await asyncio.gather(*(one(p) for p in batch)))

    def close(self) -> None:
        self.loop_task.cancel()
        self.runner.close()
        self.built.close()


class Transformers:
    """transformers' generate on the dequantised weights, float32."""

    name = "transformers"

    def __init__(self, model: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        path = Path(model)
        self.torch = torch
        self.model = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
        self.model.train(False)

    def generate(self, batch: list[list[int]], num_new: int) -> Timing:
        """generate() tells nobody when a token of a batch comes: a run of one token says when the first would have come."""
        first_s, whole_s = self._seconds(batch, 1), self._seconds(batch, num_new)
        started = time.perf_counter() - whole_s
        return Timing(started, [[(started + first_s, 1), (started + whole_s, num_new - 1)] for _ in batch])

    def _seconds(self, batch: list[list[int]], num_new: int) -> float:
        ids = self.torch.tensor(batch)
        mask = self.torch.ones_like(ids)
        started = time.perf_counter()
        with self.torch.inference_mode():
            self.model.generate(
                ids, attention_mask=mask, max_new_tokens=num_new, min_new_tokens=num_new, do_sample=False, pad_token_id=0
            )
        return time.perf_counter() - started

    def close(self) -> None:
        pass


class LlamaCpp:
    """llama.cpp through its C interface: one sequence per stream, one llama_decode per step, greedy on the host."""

    name = "llama.cpp"

    def __init__(self, model: str, threads: int) -> None:
        import llama_cpp
        import numpy as np

        self.c, self.np = llama_cpp, np
        llama_cpp.llama_backend_init()
        self.quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self.quiet, None)
        self.model = llama_cpp.llama_model_load_from_file(model.encode(), llama_cpp.llama_model_default_params())
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = 16 * 1280, 2048, 512
        params.n_seq_max, params.n_threads, params.n_threads_batch = 16, threads, threads
        params.kv_unified = False  # True lets every token scan all sequences' cells: slower
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(2048, 0, 1)

    def _decode(self, rows: list[tuple[int, int, int, bool]]) -> list[int]:
        """rows: (token, position, sequence, wants logits). Returns the best token of each row that wants logits."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wants) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
            batch.seq_id[i][0], batch.logits[i] = sequence, wants
        assert self.c.llama_decode(self.context, batch) == 0
        best = []
        for i, row in enumerate(rows):
            if row[3]:
                logits = self.c.llama_get_logits_ith(self.context, i)
                best.append(int(self.np.argmax(self.np.ctypeslib.as_array(logits, shape=(self.vocab,)))))
        return best

    def generate(self, batch: list[list[int]], num_new: int) -> Timing:
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)
        started = time.perf_counter()
        tokens = [0] * len(batch)
        arrivals: list[list[tuple[float, int]]] = []
        for sequence, prompt in enumerate(batch):
            rows = [(t, i, sequence, i == len(prompt) - 1) for i, t in enumerate(prompt)]
            tokens[sequence] = self._decode(rows)[0]
            arrivals.append([(time.perf_counter(), 1)])
        for step in range(num_new - 1):
            tokens = self._decode([(t, len(batch[s]) + step, s, True) for s, t in enumerate(tokens)])
            for stream in arrivals:
                stream.append((time.perf_counter(), 1))
        return Timing(started, arrivals)

    def close(self) -> None:
        self.c.llama_batch_free(self.batch)
        self.c.llama_free(self.context)
        self.c.llama_model_free(self.model)


def measure(engine: "Ours | Transformers | LlamaCpp", seed: int) -> Figures:
    figures: Figures = {}
    for batch in BATCHES:
        figures |= engine.generate(prompts(batch, PROMPT_LEN, seed * 100 + batch), NEW_TOKENS).figures()
    timing = engine.generate(prompts(1, LONG_PROMPT, seed * 100 + 99), 2)
    figures["prefill_s"] = timing.arrivals[0][0][0] - timing.started
    return figures


def shared_prefix(engine: Ours, seed: int) -> float:
    """Requests per second of 32 requests with 1,024 common and 16 own tokens, 8 at once, 16 new tokens each."""
    common = prompts(1, LONG_PROMPT, seed)[0]
    batch = [common + own for own in prompts(32, 16, seed + 1)]
    timing = engine.generate(batch, 16, at_once=8)
    return 32 / (timing.last - timing.started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--skip", action="append", default=[])
    parser.add_argument("--json")
    args = parser.parse_args()
    if args.model is None:
        from streamserve.default_model import find_default_model

        args.model = str(find_default_model())

    print(f"{processor()}, {args.threads} of {os.cpu_count()} threads, load {os.getloadavg()[0]:.2f}, {Path(args.model).name}")
    makers: list[Callable[[str, int], Ours | Transformers | LlamaCpp]] = [Ours, LlamaCpp, Transformers]
    engines = []
    for make in makers:
        if make.name in args.skip:  # type: ignore[attr-defined]
            continue
        try:
            engines.append(make(args.model, args.threads))
        except ImportError as error:
            print(f"{make.name}: left out, {error}")  # type: ignore[attr-defined]
    for engine in engines:
        engine.generate(prompts(2, 32, 0), 4)  # warm-up
    rounds: dict[str, list[Figures]] = {engine.name: [] for engine in engines}
    for number in range(args.rounds):
        for engine in engines:
            if engine.name == "transformers" and number and "transformers-once" in args.skip:
                continue
            rounds[engine.name].append(measure(engine, number + 1))
            print(f"  round {number + 1} {engine.name}: " + _line(rounds[engine.name][-1]), flush=True)
    ours = engines[0]
    assert isinstance(ours, Ours)
    no_cache = Ours(args.model, args.threads, reuse=False)
    shared = {"on": [], "off": []}  # type: dict[str, list[float]]
    for number in range(args.rounds):
        shared["on"].append(shared_prefix(ours, 1000 + number))
        shared["off"].append(shared_prefix(no_cache, 1000 + number))
    report(rounds, shared)
    if args.json:
        Path(args.json).write_text(
            json.dumps({"processor": processor(), "threads": args.threads, "rounds": rounds, "shared": shared})
        )
    for engine in [*engines, no_cache]:
        engine.close()


def _line(figures: Figures) -> str:
    return "  ".join(f"{key} {value:.4g}" for key, value in figures.items())


def report(rounds: dict[str, list[Figures]], shared: dict[str, list[float]]) -> None:
    names = list(rounds)
    keys = [
        key for key in rounds[names[0]][0] if not key.startswith("ttft") and rounds[names[0]][0][key] == rounds[names[0]][0][key]
    ]
    print(f"\n{'':14}" + "".join(f"{name:>24}" for name in names) + "   ours / peer")
    for key in keys:
        cells, ratios = "", []
        for name in names:
            values = sorted(figures[key] for figures in rounds[name])
            cells += f"{statistics.median(values):12.4g} ({values[0]:.3g}-{values[-1]:.3g})".rjust(24)
            if name != names[0]:
                pairs = zip(rounds[names[0]], rounds[name], strict=False)
                each = [b[key] / a[key] if key.endswith("_s") else a[key] / b[key] for a, b in pairs]
                ratios.append(f"{name} {statistics.median(each):.2f}x")
        print(f"{key:14}{cells}   {', '.join(ratios)}")
    on, off = statistics.median(shared["on"]), statistics.median(shared["off"])
    print(f"shared prefix: cache on {on:.2f} requests/s, off {off:.2f}: {on / off:.2f}x")


if __name__ == "__main__":
    main()
