"""Which tile is best for each product of a few rows: the table of kernels/impl/triton_gemv.py comes from here.

    python bench/gemv_sweep.py [--rows 1,2,4,5,8,16] [--models llama8b,qwen06b] [--pdl yes|no]

For each weight shape and number of rows: the three fastest tiles in microseconds and TB/s of weights read, and the library's
product for the same shape, without the operations that ours does besides. Every launch reads weights of its own, more than the
cache holds. A tile whose product is wrong is left out and said. Ends with the sums per step of each model, whether kernels that
start before the ones in front have ended give the same bits, and the table. Tiles are compiled beforehand by as many processes
as there are cores.
"""

import argparse
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu_timing import capture, cold_copies, launch_us, need_gpu
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
    times: int  # in a step

    @property
    def num_bytes(self) -> int:
        """Of the weight, in bfloat16."""
        return 2 * self.rows * self.columns


MODELS = {
    "llama8b": (
        Product("qkv", "norm_linear", 6144, 4096, 32),
        Product("o", "linear_add", 4096, 4096, 32),
        Product("gate_up", "norm_gate_up", 2 * 14336, 4096, 32),
        Product("down", "linear_add", 4096, 14336, 32),
        Product("head", "norm_logits", 128256, 4096, 1),
    ),
    "qwen06b": (
        Product("qkv", "norm_linear", 4096, 1024, 28),
        Product("o", "linear_add", 1024, 2048, 28),
        Product("gate_up", "norm_gate_up", 2 * 3072, 1024, 28),
        Product("down", "linear_add", 1024, 3072, 28),
        Product("head", "norm_logits", 151936, 1024, 1),
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
# Per warp 64 or 128 columns of 16 rows, once or twice ahead: what was best so far on an H200, and its neighbours.
_DOTS = [
    Tile(block_w, 32 * chunks * warps, warps, ahead=ahead, dot=True)
    for block_w, chunks, warps, ahead in [
        (16, 2, 4, 1),
        (16, 2, 4, 2),
        (16, 2, 8, 1),
        (16, 2, 8, 2),
        (16, 2, 16, 1),
        (16, 4, 2, 1),
        (16, 4, 2, 2),
        (16, 4, 4, 1),
        (16, 4, 4, 2),
        (16, 4, 8, 1),
        (32, 1, 8, 2),
        (32, 2, 4, 1),
        (32, 2, 8, 1),
        (32, 4, 2, 1),
    ]
]


def candidates(product: Product, rows: int) -> list[Tile]:
    """Tiles worth trying; a gated product has two weight rows per output, so at least two per tile."""
    if rows == 1:
        tiles = _WIDE if product.columns > 3072 or product.op == "norm_logits" else _SMALL
    else:
        tiles = {2: _PAIRS, 4: _FOURS}.get(rows, [])
    least = 2 if product.op == "norm_gate_up" else 1
    sums = [tile for tile in tiles if tile.block_w >= least and tile.block_k < 2 * product.columns]
    return sums + [tile for tile in _DOTS if tile.block_k <= product.columns]


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a product reads and adds to besides its weight."""

    x: Tensor
    norm: Tensor
    residual: Tensor

    @staticmethod
    def of(product: Product, rows: int, device: torch.device) -> "Inputs":
        options = {"device": device, "dtype": torch.bfloat16}
        x: Tensor = torch.randn(rows, product.columns, **options)  # type: ignore[call-overload]
        norm: Tensor = torch.rand(product.columns, **options) + 0.5  # type: ignore[call-overload]
        return Inputs(x, norm, torch.randn(rows, product.rows, **options))  # type: ignore[call-overload]


def launcher(product: Product, w: Tensor, inputs: Inputs, tile: Tile | None, pdl: bool) -> Callable[[], Tensor]:
    """A call of the product. Where it adds to the residual, returns that."""
    x, norm, residual = inputs.x, inputs.norm, inputs.residual
    if product.op == "norm_linear":
        return lambda: gemv.norm_linear(x, norm, w, None, EPS, pdl=pdl, tile=tile)
    if product.op == "norm_gate_up":
        return lambda: gemv.norm_gate_up(x, norm, w, EPS, pdl=pdl, tile=tile)
    if product.op == "norm_logits":
        return lambda: gemv.norm_logits(x, norm, w, EPS, pdl=pdl, tile=tile)

    def add() -> Tensor:
        gemv.linear_add(x, w, residual, pdl=pdl, tile=tile)
        return residual

    return add


def expected(product: Product, w: Tensor, inputs: Inputs) -> Tensor:
    """By torch, in float32, from the same 16-bit weights."""
    x = inputs.x.float()
    if product.op == "linear_add":
        return inputs.residual.float() + x @ w.float().T
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * inputs.norm.float()
    products = x @ w.float().T
    if product.op != "norm_gate_up":
        return products
    gate, up = products.chunk(2, dim=-1)
    return F.silu(gate) * up


Job = tuple[Product, int, Tile | None, bool]


def _compile(job: Job) -> str | None:
    """In a process of its own. Returns what went wrong."""
    product, rows, tile, pdl = job
    try:
        w = torch.empty(product.rows, product.columns, device="cuda", dtype=torch.bfloat16)
        launcher(product, w, Inputs.of(product, rows, w.device), tile, pdl)()
        torch.cuda.synchronize()
        del w
        torch.cuda.empty_cache()
    except Exception as error:  # whatever the compiler or the card has against this tile
        return f"{product.name} {product.rows}x{product.columns}, {rows} rows, {tile}: {type(error).__name__}: {error}"
    return None


def jobs(cases: Iterable[tuple[Product, int]], pdl: bool) -> list[Job]:
    """What is to be compiled, each thing once: on tensor cores five rows are the same program as eight."""
    unique: dict[tuple[Product, int, Tile], Job] = {}
    for product, rows in cases:
        for tile in candidates(product, rows):
            unique.setdefault((product, max(8, bucket(rows)) if tile.dot else bucket(rows), tile), (product, rows, tile, pdl))
    return list(unique.values())


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


@dataclass(frozen=True, slots=True)
class Swept:
    """Microseconds of every right tile, fastest first, and of the library's product."""

    product: Product
    rows: int
    found: list[tuple[float, Tile]]
    library_us: float


def sweep(product: Product, rows: int, pdl: bool) -> Swept:
    """Prints the best three beside the library's product."""
    copies = cold_copies(product.num_bytes)
    w = torch.randn(copies, product.rows, product.columns, device="cuda", dtype=torch.bfloat16) / product.columns**0.5
    parts = [w[i % copies] for i in range(max(copies, 6))]  # the start of a graph costs microseconds of its own
    inputs = Inputs.of(product, rows, w.device)
    right = expected(product, w[0], inputs)
    found = []
    for tile in candidates(product, rows):
        try:
            fresh = Inputs(inputs.x, inputs.norm, inputs.residual.clone())
            error = float((launcher(product, w[0], fresh, tile, pdl)().float() - right).norm() / right.norm())
            if not error < 1e-2:
                print(f"wrong: {product.name} {rows} rows {tile}: error {error:.2e}", flush=True)
                continue
            found.append((launch_us([launcher(product, part, fresh, tile, pdl) for part in parts], rounds=3), tile))
        except Exception as failure:  # as in _compile, where it was printed
            print(f"left out: {tile} {type(failure).__name__}", flush=True)
    found.sort(key=lambda item: item[0])
    library_us = launch_us([lambda part=part: F.linear(inputs.x, part) for part in parts], rounds=3)  # type: ignore[misc]
    shown = "  ".join(f"{time_us:.1f} {product.num_bytes / time_us / 1e6:.2f} {short(tile)}" for time_us, tile in found[:3])
    print(
        f"{product.name:8}{product.rows:>7} x {product.columns:<6} rows {rows}: library {library_us:.1f} "
        f"{product.num_bytes / library_us / 1e6:.2f} | {shown}",
        flush=True,
    )
    return Swept(product, rows, found, library_us)


def same_bits(products: tuple[Product, ...], rows: int, tiles: dict[tuple[int, int, int], Tile]) -> bool:
    """Whether three layers in a row, replayed in a graph, say the same when kernels start before the ones in front have ended as
    when they wait. No attention: the first columns of q stand in for it."""
    qkv, o, gate_up, down = (
        torch.randn(product.rows, product.columns, device="cuda", dtype=torch.bfloat16) / product.columns**0.5
        for product in products[:4]
    )
    start = torch.randn(rows, products[0].columns, device="cuda", dtype=torch.bfloat16)
    norm = torch.rand(products[0].columns, device="cuda", dtype=torch.bfloat16) + 0.5
    best = [tiles.get((product.rows, product.columns, bucket(rows))) for product in products]

    def layers(pdl: bool) -> Tensor:
        x = start.clone()
        for _ in range(3):
            attended = gemv.norm_linear(x, norm, qkv, None, EPS, pdl=pdl, tile=best[0])[:, : products[1].columns].contiguous()
            gemv.linear_add(attended, o, x, pdl=pdl, tile=best[1])
            inner = gemv.norm_gate_up(x, norm, gate_up, EPS, pdl=pdl, tile=best[2])
            gemv.linear_add(inner, down, x, pdl=pdl, tile=best[3])
        return x

    expected_TE = layers(False)
    outputs: list[Tensor] = []
    graph = capture(lambda: outputs.append(layers(True)))
    for _ in range(20):
        outputs[-1].zero_()
        graph.replay()
        if not torch.equal(outputs[-1], expected_TE):
            return False
    return bool(expected_TE.isfinite().all())


def bucket(rows: int) -> int:
    """Rows as the table knows them: the next power of two."""
    return 1 << (rows - 1).bit_length()


def best_tiles(results: list[Swept]) -> dict[tuple[int, int, int], Tile]:
    """Of each shape and bucket of rows the tile that is best over all numbers of rows measured for it."""
    losses: dict[tuple[int, int, int], dict[Tile, list[float]]] = defaultdict(lambda: defaultdict(list))
    for result in results:
        for time_us, tile in result.found:
            key = (result.product.rows, result.product.columns, bucket(result.rows))
            losses[key][tile].append(time_us / result.found[0][0])
    best = {}
    for key, of_tile in losses.items():
        most = max(map(len, of_tile.values()))
        best[key] = min((sum(lost), i, tile) for i, (tile, lost) in enumerate(of_tile.items()) if len(lost) == most)[2]
    return best


def short(tile: Tile) -> str:
    """(block_w, block_k, num_warps, ahead), with a d for tensor cores."""
    return f"({tile.block_w},{tile.block_k},{tile.num_warps},{tile.ahead}{'d' if tile.dot else ''})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,2,4,5,8,16")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--pdl", choices=("yes", "no"), default="yes")
    args = parser.parse_args()
    started = time.perf_counter()
    models = {name: MODELS[name] for name in args.models.split(",")}
    cases = [(product, int(rows)) for rows in args.rows.split(",") for products in models.values() for product in products]
    pdl = args.pdl == "yes"
    compilers = Compilers()
    compilers.run(jobs(cases, pdl))
    compilers.close()
    print(f"{torch.cuda.get_device_name()}, compiled after {time.perf_counter() - started:.0f} s; us, TB/s of weights, tile")
    results = [sweep(product, rows, pdl) for product, rows in cases]
    table = best_tiles(results)
    print(*(f"{key}: {tile}," for key, tile in table.items()), sep="\n")
    print("ms of weight products per step: ours, with the table's tiles | library")
    for name, products in models.items():
        for rows in dict.fromkeys(rows for _, rows in cases):
            own = [result for result in results if result.product in products and result.rows == rows]
            ours = sum(
                next(
                    time_us
                    for time_us, tile in result.found
                    if tile == table[result.product.rows, result.product.columns, bucket(rows)]
                )
                * result.product.times
                for result in own
            )
            library = sum(result.library_us * result.product.times for result in own)
            verdict = "same bits" if not pdl or same_bits(products, rows, table) else "DIFFERENT BITS when started early"
            print(f"{name} rows {rows}: {ours / 1e3:.3f} | {library / 1e3:.3f}  {verdict}", flush=True)
    print(f"{time.perf_counter() - started:.0f} s in all")


if __name__ == "__main__":
    main()
