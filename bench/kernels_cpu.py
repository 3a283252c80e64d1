"""How long one forward pass of a network takes on a CPU, without the engine around it.

    python bench/kernels_cpu.py [MODEL.gguf] [--threads 2] [--rounds 10] [--network packed]

Prints the best and the median of `rounds` calls, in milliseconds: decode steps of 1, 8 and 16 rows with 128 to 256 tokens in
KV each, and prompts of 128 and 1,024 tokens (in chunks of 512, as the scheduler cuts them). Say the machine's load with it.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from itertools import accumulate

import numpy as np
import torch

from streamserve.cache.pool import KVPool
from streamserve.default_model import find_default_model
from streamserve.kernels.ops import Batch, Network
from streamserve.models.checkpoint import open_checkpoint
from streamserve.models.network import build_network, choose_kernels

CHUNK = 512


def make_batch(pool: KVPool, rows: list[tuple[int, int]]) -> Batch:
    """rows: (first position, tokens). Pages of a row follow one another; every row yields logits for its last token."""
    rng = np.random.default_rng(0)
    ends = list(accumulate(count for _, count in rows))
    per_row = [-(-(start + count) // pool.page_size) for start, count in rows]
    width = max(per_row)
    return Batch(
        token_ids_T=torch.from_numpy(rng.integers(0, 40000, ends[-1])),
        positions_T=torch.cat([torch.arange(start, start + count) for start, count in rows]),
        row_start=[0, *ends],
        kv_len=[start + count for start, count in rows],
        page_table_BP=torch.arange(len(rows) * width, dtype=torch.int32).view(len(rows), width),
        logit_rows_R=torch.tensor(ends) - 1,
        pool=pool,
    )


def timed(run: Callable[[], object], rounds: int) -> tuple[float, float]:
    """Best and median, in milliseconds."""
    run()
    times = []
    for _ in range(rounds):
        started = time.perf_counter()
        run()
        times.append((time.perf_counter() - started) * 1e3)
    return min(times), statistics.median(times)


def prefill(network: Network, pool: KVPool, length: int) -> None:
    for start in range(0, length, CHUNK):
        network.forward(make_batch(pool, [(start, min(CHUNK, length - start))]))


def report(name: str, best: float, median: float, tokens: int) -> None:
    print(f"{name:14} best {best:8.2f} ms   median {median:8.2f} ms   {tokens / best * 1e3:7.1f} tok/s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--network", help="force an implementation: packed or torch")
    parser.add_argument("--kv-dtype", choices=("float32", "float16"), default="float32")
    args = parser.parse_args()

    started = time.perf_counter()
    checkpoint = open_checkpoint(args.model or find_default_model())
    kv_dtype = getattr(torch, args.kv_dtype)
    pool = KVPool(checkpoint.spec, num_pages=16 * 16 + 64, dtype=kv_dtype)
    overrides = {"network": args.network} if args.network else None
    choices = choose_kernels(checkpoint, kv_dtype=kv_dtype, overrides=overrides)
    network = build_network(checkpoint, pool=pool, threads=args.threads, choices=choices)
    load = os.getloadavg()[0]
    print(f"{choices['network'].name}, {args.threads} threads, load {load:.2f}, ready in {time.perf_counter() - started:.2f} s")
    for rows in (1, 8, 16):
        batch = make_batch(pool, [(128 + 8 * i, 1) for i in range(rows)])
        best, median = timed(lambda: network.forward(batch), 2 * args.rounds)  # noqa: B023
        print(
            f"decode {rows:2} rows   best {best:8.2f} ms   median {median:8.2f} ms   {rows / best * 1e3:7.1f} tok/s", flush=True
        )
    for length in (128, 1024):
        best, median = timed(lambda: prefill(network, pool, length), args.rounds // 2 or 1)  # noqa: B023
        print(
            f"prompt {length:4}      best {best:8.2f} ms   median {median:8.2f} ms   {length / best * 1e3:7.1f} tok/s", flush=True
        )


if __name__ == "__main__":
    main()
