"""Attention over KV pages on AVX2: queries of one key/value head against its pages, 128 keys at a time.

Layout of a page (cache/pool.py): keys [D, S], values [S, D], float32 or float16. The G query heads of a key/value head, times
the tokens of a run, are the rows of two small matrix products, scores = q K and out = p V; both read K or V once per tile of
rows, 16 columns wide, without a horizontal sum.

Numerics: every query takes its keys in chunks that begin at multiples of 128; a chunk has its own maximum and is merged into
the result so far. What a query computes depends on its position alone, not on the other rows of the tile, nor on whether
it comes in a prompt or alone. Knows no threads and no weights.

rows: index = token of the run * G + head of the group.
"""

# mypy: disable-error-code="import-untyped,untyped-decorator"

from typing import Any

import numpy as np
from numba import types

from streamserve.kernels.impl.numba_ir import (
    F16,
    F32,
    I32,
    LANES,
    Emit,
    Value,
    constant,
    load_f32,
    load_i32,
    native,
    prefetch_bytes,
    store_f32,
    vec,
    vector_code,
)
from streamserve.kernels.impl.numba_rows import MASKED, clear, scale_to, softmax_chunk

CHUNK = 128  # keys that share one maximum; a multiple of every page size we accept
COLUMNS = 16  # of a tile
_ONE, _REPLACE = constant(1), constant(0)
RUN_TOKENS = 16  # tokens of one request that go through K and V together


def _make_tile(num_rows: int, element: Any) -> Any:
    """rows [num_rows, n] times a strip of n lines of 16 columns that runs over pages.

    `merge` 0: out = product. Else it is the address of a pair (a, b) per row: out = a * out + b * product.
    """
    width = 4 if element == F32 else 2

    @vector_code(*[types.int64] * 12)
    def tile(
        e: Emit,
        rows: Value,
        row_bytes: Value,
        pages: Value,  # address of int32 page numbers
        num_pages: Value,
        strip: Value,  # address of the first line, were it in page 0
        page_bytes: Value,
        line_bytes: Value,
        lines: Value,  # of the strip, per page
        last_lines: Value,  # in the last page
        out: Value,
        out_bytes: Value,
        merge: Value,
    ) -> None:
        b = e.builder
        rows_at = [e.add(rows, e.mul(row_bytes, r)) for r in range(num_rows)]

        def page(p: Value, total: list[Value]) -> list[Value]:
            number = b.sext(e.load(I32, e.add(pages, e.mul(p, 4)), align=4), p.type)
            first = e.add(strip, e.mul(number, page_bytes))
            here = [e.add(at, e.mul(e.mul(p, lines), 4)) for at in rows_at]
            is_last = b.icmp_signed("==", e.add(p, 1), num_pages)

            def line(i: Value, total: list[Value]) -> list[Value]:
                at = e.add(first, e.mul(i, line_bytes))
                halves = [e.load(vec(element), at, n * LANES * width) for n in range(2)]
                if element == F16:
                    halves = [b.fpext(half, vec(F32)) for half in halves]
                result = []
                for r, row in enumerate(here):
                    x = e.splat(e.load(F32, e.add(row, e.mul(i, 4)), align=4))
                    result += [e.fma(x, half, total[2 * r + n]) for n, half in enumerate(halves)]
                return result

            return e.loop(b.select(is_last, last_lines, lines), line, total)

        total = e.loop(num_pages, page, [e.all(F32, 0.0)] * (2 * num_rows))
        with b.if_else(b.icmp_signed("==", merge, e.i64(0))) as (replaces, merges):
            with replaces:
                for r in range(num_rows):
                    for n in range(2):
                        e.store(total[2 * r + n], e.add(out, e.mul(out_bytes, r)), 32 * n)
            with merges:
                for r in range(num_rows):
                    old, new = (e.splat(e.load(F32, merge, 8 * r + at)) for at in (0, 4))
                    for n in range(2):
                        at = e.add(out, e.mul(out_bytes, r))
                        before = b.fmul(e.load(vec(F32), at, 32 * n), old)
                        e.store(e.fma(total[2 * r + n], new, before), at, 32 * n)

    return tile


_f32x1, _f32x2, _f32x3, _f32x6 = (_make_tile(num_rows, F32) for num_rows in (1, 2, 3, 6))
_f16x1, _f16x2, _f16x3, _f16x6 = (_make_tile(num_rows, F16) for num_rows in (1, 2, 3, 6))


@native
def _product(
    is_half: bool,
    num_rows: int,
    rows: int,
    row_bytes: int,
    pages: int,
    num_pages: int,
    strip: int,
    page_bytes: int,
    line_bytes: int,
    lines: int,
    last_lines: int,
    out: int,
    out_bytes: int,
    merge: int,
) -> None:
    """See _make_tile; any number of rows."""
    r = 0
    while r < num_rows:
        x, y, m = rows + r * row_bytes, out + r * out_bytes, merge + 8 * r if merge else 0
        left = num_rows - r
        if is_half:
            if left >= 6:
                _f16x6(x, row_bytes, pages, num_pages, strip, page_bytes, line_bytes, lines, last_lines, y, out_bytes, m)
                r += 6
            elif left >= 3:
                _f16x3(x, row_bytes, pages, num_pages, strip, page_bytes, line_bytes, lines, last_lines, y, out_bytes, m)
                r += 3
            elif left == 2:
                _f16x2(x, row_bytes, pages, num_pages, strip, page_bytes, line_bytes, lines, last_lines, y, out_bytes, m)
                r += 2
            else:
                _f16x1(x, row_bytes, pages, num_pages, strip, page_bytes, line_bytes, lines, last_lines, y, out_bytes, m)
                r += 1
        elif left >= 6:
            _f32x6(x, row_bytes, pages, num_pages, strip, page_bytes, line_bytes, lines, last_lines, y, out_bytes, m)
            r += 6
        elif left >= 3:
            _f32x3(x, row_bytes, pages, num_pages, strip, page_bytes, line_bytes, lines, last_lines, y, out_bytes, m)
            r += 3
        elif left == 2:
            _f32x2(x, row_bytes, pages, num_pages, strip, page_bytes, line_bytes, lines, last_lines, y, out_bytes, m)
            r += 2
        else:
            _f32x1(x, row_bytes, pages, num_pages, strip, page_bytes, line_bytes, lines, last_lines, y, out_bytes, m)
            r += 1


def scratch_floats(group: int, dim: int) -> int:
    """float32 numbers that attend_run needs for itself, one set per thread."""
    return RUN_TOKENS * group * (2 * dim + CHUNK + 4)


@native
def attend_run(
    q: int,  # address of the first token's G heads, one after the other
    token_bytes: int,
    num_tokens: int,  # at most RUN_TOKENS, of one request, at consecutive positions
    group: int,
    dim: int,
    first_position: int,
    is_half: bool,
    page_size: int,
    pages: int,  # address of the request's page numbers
    k: int,  # address of the head's keys in page 0
    v: int,
    page_bytes: int,
    scratch: int,
) -> int:
    """Returns the address of the result, [num_tokens * group, dim] in the scratch memory."""
    num_rows, element = num_tokens * group, 2 if is_half else 4
    row_bytes = dim * 4
    queries = scratch
    out = queries + num_rows * row_bytes
    scores = out + num_rows * row_bytes
    state = scores + num_rows * CHUNK * 4
    merge = state + num_rows * 8
    for t in range(num_tokens):
        scale_to(q + t * token_bytes, queries + t * group * row_bytes, group * dim // LANES, np.float32(1.0 / np.sqrt(dim)))
    clear(out, num_rows * dim // LANES)
    for r in range(num_rows):
        store_f32(state, 2 * r, np.float32(MASKED))
        store_f32(state, 2 * r + 1, np.float32(0.0))
    end = first_position + num_tokens
    for first in range(0, end, CHUNK):
        num_keys = min(CHUNK, end - first)
        num_pages = (num_keys + page_size - 1) // page_size
        chunk_pages = pages + first // page_size * 4
        for p in range(num_pages):
            # Decode reads every page once, from memory: keys two pages ahead, values while their scores are made.
            ahead = first // page_size + p + 2
            if ahead * page_size < end:
                prefetch_bytes(k + load_i32(pages, ahead) * page_bytes, page_size * dim * element)
            prefetch_bytes(v + load_i32(chunk_pages, p) * page_bytes, page_size * dim * element)
            for column in range(0, page_size, COLUMNS):
                at = scores + (p * page_size + column) * 4
                page, keys = chunk_pages + p * 4, k + column * element
                _product(
                    is_half,
                    num_rows,
                    queries,
                    row_bytes,
                    page,
                    _ONE,
                    keys,
                    page_bytes,
                    page_size * element,
                    dim,
                    dim,
                    at,
                    CHUNK * 4,
                    _REPLACE,
                )
        vectors = (num_keys + LANES - 1) // LANES
        for r in range(num_rows):
            visible = min(CHUNK, max(0, first_position + r // group + 1 - first))
            softmax_chunk(scores + r * CHUNK * 4, visible, vectors, state + r * 8, merge + r * 8)
        last_lines = num_keys - (num_pages - 1) * page_size
        for column in range(0, dim, COLUMNS):
            values, at = v + column * element, out + column * 4
            _product(
                is_half,
                num_rows,
                scores,
                CHUNK * 4,
                chunk_pages,
                num_pages,
                values,
                page_bytes,
                dim * element,
                page_size,
                last_lines,
                at,
                row_bytes,
                merge,
            )
    for r in range(num_rows):
        scale_to(out + r * row_bytes, out + r * row_bytes, dim // LANES, np.float32(1.0) / load_f32(state, 2 * r + 1))
    return out
