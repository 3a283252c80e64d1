"""Which tile is best for each product of a few rows: the table of kernels/impl/triton_gemv.py comes from here.

    python bench/gemv_sweep.py [--rows 1,2,4,8] [--models llama8b,qwen06b] [--pdl yes|no]

For each weight shape and number of rows: the three fastest tiles in microseconds and TB/s of weights read, and the library's
product for the same shape, without the operations that ours does besides. Every launch reads weights of its own, more than the
cache holds. Ends with the table. Tiles are compiled beforehand by as many processes as there are cores.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu_timing import cold_copies, launch_us, need_gpu
from streamserve.kernels.impl import triton_gemv as gemv
from streamserve.kernels.impl.triton_gemv import Tile

EPS = 1e-5


@dataclass(frozen=True, slots=True)
class Product:
    """One product of a model: `op` is the function of triton_gemv that computes it."""

    name: str
    op: str
    rows: int  # of the weight
    columns: int

    @property
    def num_bytes(self) -> int:
        """Of the weight, in bfloat16."""
        return 2 * self.rows * self.columns


MODELS = {
    "llama8b": (
        Product("qkv", "norm_linear", 6144, 4096),
        Product("o", "linear_add", 4096, 4096),
        Product("gate_up", "norm_gate_up", 2 * 14336, 4096),
        Product("down", "linear_add", 4096, 14336),
        Product("head", "norm_logits", 128256, 4096),
    ),
    "qwen06b": (
        Product("qkv", "norm_linear", 4096, 1024),
        Product("o", "linear_add", 1024, 2048),
        Product("gate_up", "norm_gate_up", 2 * 3072, 1024),
        Product("down", "linear_add", 1024, 3072),
        Product("head", "norm_logits", 151936, 1024),
    ),
}

# Columns are 256 per warp in most: then a thread's weights, inputs and sums stay where they are.
_WIDE = [
    Tile(8, 256, 2),
    Tile(16, 256, 4),
    Tile(8, 256, 1),
    Tile(4, 256, 1),
    Tile(4, 256, 1, ahead=2),
    Tile(8, 512, 2),
    Tile(4, 512, 2),
    Tile(4, 512, 2, ahead=2),
    Tile(2, 512, 2),
    Tile(2, 512, 2, ahead=2),
    Tile(4, 1024, 4),
    Tile(4, 1024, 4, ahead=2),
    Tile(2, 1024, 4),
    Tile(2, 1024, 4, ahead=2),
    Tile(1, 1024, 4, ahead=2),
    Tile(1, 512, 4),
    Tile(2, 2048, 8),
    Tile(4, 2048, 8),
]
_SMALL = [
    Tile(16, 512, 8),
    Tile(8, 512, 8),
    Tile(8, 512, 2),
    Tile(4, 512, 2),
    Tile(2, 512, 2),
    Tile(2, 512, 2, ahead=2),
    Tile(1, 512, 2, ahead=2),
    Tile(8, 256, 1),
    Tile(4, 256, 1),
    Tile(4, 256, 1, ahead=2),
    Tile(8, 1024, 4),
    Tile(4, 1024, 4),
    Tile(2, 1024, 4),
    Tile(1, 1024, 4),
    Tile(1, 1024, 4, ahead=2),
    Tile(1, 2048, 4),
    Tile(1, 2048, 8),
]
_PAIRS = [Tile(4, 256, 1), Tile(4, 512, 2), Tile(2, 512, 2), Tile(2, 512, 2, ahead=2), Tile(4, 1024, 4), Tile(1, 1024, 4)]
_FOURS = [Tile(4, 256, 1), Tile(4, 512, 2), Tile(2, 512, 2), Tile(2, 1024, 4)]
_DOTS = [
    Tile(16, 256, 2, ahead=3, dot=True),
    Tile(16, 512, 4, ahead=3, dot=True),
    Tile(16, 256, 1, ahead=4, dot=True),
    Tile(32, 256, 4, ahead=3, dot=True),
    Tile(64, 128, 4, ahead=4, dot=True),
]


def candidates(product: Product, rows: int) -> list[Tile]:
    """Tiles worth trying; a gated product has two weight rows per output, so at least two per tile."""
    if rows == 1:
        tiles = _WIDE if product.columns > 3072 or product.op == "norm_logits" else _SMALL
    else:
        tiles = {2: _PAIRS, 4: _FOURS + _DOTS[:3], 8: _DOTS}[rows]
    least = 2 if product.op == "norm_gate_up" else 1
    return [tile for tile in tiles if tile.block_w >= least and (tile.dot or tile.block_k < 2 * product.columns)]


def launcher(product: Product, w: Tensor, rows: int, tile: Tile | None, pdl: bool) -> Callable[[], object]:
    """A call of the product with inputs of its own."""
    x = torch.randn(rows, product.columns, device=w.device, dtype=w.dtype)
    norm = torch.ones(product.columns, device=w.device, dtype=w.dtype)
    if product.op == "norm_linear":
        return lambda: gemv.norm_linear(x, norm, w, None, EPS, pdl=pdl, tile=tile)
    if product.op == "norm_gate_up":
        return lambda: gemv.norm_gate_up(x, norm, w, EPS, pdl=pdl, tile=tile)
    if product.op == "norm_logits":
        return lambda: gemv.norm_logits(x, norm, w, EPS, pdl=pdl, tile=tile)
    residual = torch.zeros(rows, product.rows, device=w.device, dtype=w.dtype)
    return lambda: gemv.linear_add(x, w, residual, pdl=pdl, tile=tile)


Job = tuple[Product, int, Tile | None, bool]


def _compile(job: Job) -> str | None:
    """In a process of its own. Returns what went wrong."""
    product, rows, tile, pdl = job
    try:
        w = torch.empty(product.rows, product.columns, device="cuda", dtype=torch.bfloat16)
        launcher(product, w, rows, tile, pdl)()
        torch.cuda.synchronize()
        del w
        torch.cuda.empty_cache()
    except Exception as error:  # whatever the compiler or the card has against this tile
        return f"{product.name} {product.rows}x{product.columns}, {rows} rows, {tile}: {type(error).__name__}: {error}"
    return None


class Compilers:
    """Processes that fill Triton's cache. Make it before this process touches the GPU: they are forked, imports and all."""

    def __init__(self) -> None:
        workers = min(16, len(os.sched_getaffinity(0)))
        self._pool = ProcessPoolExecutor(workers, mp_context=get_context("fork"))
        if not self._pool.submit(torch.cuda.is_available).result():
            need_gpu()

    def run(self, jobs: Iterable[Job]) -> None:
        """Returns when all are compiled; prints failures."""
        for failure in self._pool.map(_compile, jobs):
            if failure is not None:
                print(f"failed: {failure}"[:400], flush=True)

    def close(self) -> None:
        self._pool.shutdown()


def sweep(product: Product, rows: int, pdl: bool) -> list[tuple[float, Tile]]:
    """Microseconds and tile, fastest first. Prints the best three beside the library's product."""
    copies = cold_copies(product.num_bytes)
    w = torch.randn(copies, product.rows, product.columns, device="cuda", dtype=torch.bfloat16)
    parts = [w[i % copies] for i in range(max(copies, 6))]  # the start of a graph costs microseconds of its own
    found = []
    for tile in candidates(product, rows):
        try:
            found.append((launch_us([launcher(product, part, rows, tile, pdl) for part in parts], rounds=5), tile))
        except Exception as error:  # as in _compile, where it was printed
            print(f"left out: {tile} {type(error).__name__}", flush=True)
    found.sort(key=lambda item: item[0])
    x = torch.randn(rows, product.columns, device="cuda", dtype=torch.bfloat16)
    library_us = launch_us([lambda part=part: F.linear(x, part) for part in parts], rounds=5)  # type: ignore[misc]
    shown = "  ".join(f"{time_us:.1f} {product.num_bytes / time_us / 1e6:.2f} {short(tile)}" for time_us, tile in found[:3])
    print(
        f"{product.name:8}{product.rows:>7} x {product.columns:<6} rows {rows}: library {library_us:.1f} "
        f"{product.num_bytes / library_us / 1e6:.2f} | {shown}",
        flush=True,
    )
    return found


def short(tile: Tile) -> str:
    """(block_w, block_k, num_warps, ahead), with a d for tensor cores."""
    return f"({tile.block_w},{tile.block_k},{tile.num_warps},{tile.ahead}{'d' if tile.dot else ''})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,2,4,8")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--pdl", choices=("yes", "no"), default="yes")
    args = parser.parse_args()
    started = time.perf_counter()
    products = [product for name in args.models.split(",") for product in MODELS[name]]
    cases = [(product, int(rows)) for rows in args.rows.split(",") for product in products]
    pdl = args.pdl == "yes"
    compilers = Compilers()
    compilers.run((product, rows, tile, pdl) for product, rows in cases for tile in candidates(product, rows))
    compilers.close()
    print(f"{torch.cuda.get_device_name()}, compiled after {time.perf_counter() - started:.0f} s; us, TB/s of weights, tile")
    best = {(product.rows, product.columns, rows): sweep(product, rows, pdl)[0][1] for product, rows in cases}
    print(*(f"{key}: {tile}," for key, tile in best.items()), sep="\n")


if __name__ == "__main__":
    main()
