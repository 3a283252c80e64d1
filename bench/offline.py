"""Speed without a server: workload b through the code of `streamserve generate`, in this process.

    python bench/offline.py MODEL [--load-format dummy] [--rounds 3] [--json OUT] [-- FLAGS]

256 requests, all at once: prompts of 100 to 1,024 random tokens, answers of 100 to 1,024 tokens (uniform; end of sequence
ignored), greedy, whole answers as text. Once with seed 0, once with seed 1: a round's figure is the mean of both. Prefixes
are forgotten between runs. MODEL `fake` and FLAGS as in bench/serve.py.
"""

import argparse
import asyncio
import gc
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.load import Figures, completion, random_tokens
from bench.machine import machine, shown
from bench.report import Result, table
from bench.server import config_of, random_range, split_arguments
from streamserve import log, process
from streamserve.build import Built, build
from streamserve.config import Config
from streamserve.offline import Answer, Desk

REQUESTS, SHORTEST, LONGEST = 256, 100, 1024
SEEDS = (0, 1)


def bodies(model: str, seed: int, tokens: range, count: int = REQUESTS) -> list[dict[str, Any]]:
    """The workload's requests."""
    rng = Random(seed)
    lens = [(rng.randint(SHORTEST, LONGEST), rng.randint(SHORTEST, LONGEST)) for _ in range(count)]
    return [completion(model, random_tokens(rng, num_prompt, tokens), num_output) for num_prompt, num_output in lens]


async def answer_all(config: Config, built: Built, batch: list[dict[str, Any]]) -> Figures:
    """Figures of one run. Raises SystemExit when a request failed."""
    answers: list[Answer] = []

    async def lines() -> AsyncIterator[str | dict[str, Any]]:
        for body in batch:
            yield dict(body)

    started = time.perf_counter()
    await Desk(config, built, {}, is_raw=True).answer_all(lines(), answers.append)
    seconds = time.perf_counter() - started
    if failed := [answer.error for answer in answers if answer.error is not None]:
        raise SystemExit(f"{len(failed)} of {len(batch)} requests failed; the first: {failed[0]}")
    usages = [answer.response["usage"] for answer in answers if answer.response is not None]
    num_output = sum(usage["completion_tokens"] for usage in usages)
    assert num_output == sum(body["max_tokens"] for body in batch), "every answer has its full length"
    return {
        "out_tok_s": num_output / seconds,
        "total_tok_s": (num_output + sum(usage["prompt_tokens"] for usage in usages)) / seconds,
        "seconds": seconds,
    }


async def one_round(config: Config, built: Built, tokens: range) -> Figures:
    """Both seeds on an engine that knows no prefix."""
    found: Figures = {}
    for seed in SEEDS:
        built.cache.flush()
        gc.collect()
        run = await answer_all(config, built, bodies(built.model_name, seed, tokens))
        found |= {f"{name}_seed{seed}": value for name, value in run.items()}
    return {"out_tok_s": sum(found[f"out_tok_s_seed{seed}"] for seed in SEEDS) / len(SEEDS), **found}


async def measure(config: Config, built: Built, tokens: range, rounds: int, result: Result) -> None:
    """All rounds, after a few requests that do not count."""
    engine = asyncio.create_task(built.engine.run())
    try:
        await answer_all(config, built, bodies(built.model_name, 2, tokens, count=8))
        for _ in range(rounds):
            result.add("b", await one_round(config, built, tokens))
            print("  b     " + "  ".join(f"{name} {value:.5g}" for name, value in result.rounds["b"][-1].items()), flush=True)
    finally:
        engine.cancel()
        await asyncio.gather(engine, return_exceptions=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--load-format", choices=("auto", "dummy"), default="auto")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="where to write all figures")
    own, flags = split_arguments(sys.argv[1:])
    args = parser.parse_args(own)
    flags += ["--load-format", args.load_format] if args.load_format != "auto" else []

    log.configure("warning", "console")
    found = machine()
    print(shown(found))
    result = Result(Path(args.model).name, found, notes={"flags": flags, "command": sys.argv})
    config, tokens = config_of(args.model, flags), random_range(args.model)
    started = time.perf_counter()
    built = build(config)
    process.settle()
    print(f"ready after {time.perf_counter() - started:.1f} s", flush=True)
    try:
        asyncio.run(measure(config, built, tokens, args.rounds, result))
    finally:
        built.close()
        result.save(args.json)
    print(f"\n{table(result)}")


if __name__ == "__main__":
    main()
