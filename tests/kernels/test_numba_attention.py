"""Attention over pages against numpy, in float64."""

import numpy as np
import pytest

pytest.importorskip("numba")

from numba import njit

from streamserve.kernels.impl.numba_attention import CHUNK, RUN_TOKENS, attend_run, scratch_floats
from streamserve.kernels.impl.numba_decoder import processor_refusal

pytestmark = pytest.mark.skipif(processor_refusal() is not None, reason=str(processor_refusal()))

_PAGES = 40


@njit(nogil=True)
def run(
    q: int,
    token_bytes: int,
    tokens: int,
    group: int,
    dim: int,
    first: int,
    half: bool,
    size: int,
    pages: int,
    k: int,
    v: int,
    scratch: int,
) -> int:
    return attend_run(
        q, token_bytes, tokens, group, dim, first, half, size, pages, k, v, group_page_bytes(dim, size, half), scratch
    )


@njit(nogil=True)
def group_page_bytes(dim: int, size: int, half: bool) -> int:
    return dim * size * (2 if half else 4)


@pytest.mark.parametrize(("group", "dim"), [(1, 32), (3, 64), (4, 96), (7, 128)])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize(("first", "tokens"), [(0, 1), (0, RUN_TOKENS), (5, 2), (127, 1), (CHUNK - 3, 7), (300, 5)])
def test_attention_is_the_softmax_over_earlier_keys(group: int, dim: int, half: bool, first: int, tokens: int) -> None:
    for size in (16, 64):
        _check(group, dim, half, first, tokens, size)


def _check(group: int, dim: int, half: bool, first: int, tokens: int, size: int) -> None:
    rng = np.random.default_rng(first + tokens)
    kind, keys = (np.float16 if half else np.float32), first + tokens
    table = rng.permutation(_PAGES)[: -(-keys // size)].astype(np.int32)
    k = np.full((_PAGES, dim, size), np.nan, kind)  # what nobody wrote must not be looked at
    v = np.full((_PAGES, size, dim), np.nan, kind)
    flat_k, flat_v = (rng.standard_normal((keys, dim)).astype(kind) for _ in range(2))
    for i in range(keys):
        k[table[i // size], :, i % size] = flat_k[i]
        v[table[i // size], i % size] = flat_v[i]
    q = (rng.standard_normal((tokens, group + 2, dim)) * 2).astype(np.float32)  # with something between the tokens
    scratch = np.full(scratch_floats(group, dim), np.nan, np.float32)
    at = run(
        q.ctypes.data,
        q.strides[0],
        tokens,
        group,
        dim,
        first,
        half,
        size,
        table.ctypes.data,
        k.ctypes.data,
        v.ctypes.data,
        scratch.ctypes.data,
    )
    start = (at - scratch.ctypes.data) // 4
    out = scratch[start : start + tokens * group * dim].reshape(tokens, group, dim)
    scores = np.einsum("tgd,nd->tgn", q[:, :group].astype(np.float64), flat_k.astype(np.float64)) / np.sqrt(dim)
    visible = np.arange(keys)[None] <= first + np.arange(tokens)[:, None]
    weights = np.where(visible[:, None], np.exp(scores - scores.max(-1, keepdims=True)), 0)
    expected = np.einsum("tgn,nd->tgd", weights / weights.sum(-1, keepdims=True), flat_v.astype(np.float64))
    np.testing.assert_allclose(out, expected, atol=3e-6)
