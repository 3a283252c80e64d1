"""Prompt attention against float64: chunks of several rows, cached prefixes, and long chunks given to a library."""

import numpy as np
import pytest
import torch
from torch import Tensor

from streamserve.kernels.impl import triton_prompt_attention
from streamserve.kernels.impl.triton_prompt_attention import PromptAttention, merge
from streamserve.kernels.ops import StepInputs
from tests.kernels.paged import Paged, Shape, tolerance

LAYER = 1
DECODE_ROWS = 2  # of the step, before its prompt rows


class Case:
    """Chunks (start, num_tokens), one per slot, after decode rows that are no business of this kernel."""

    def __init__(self, shape: Shape, chunks: list[tuple[int, int]], device: str, dtype: torch.dtype, page_size: int = 16) -> None:
        torch.manual_seed(sum(start + 3 * num for start, num in chunks))
        self.shape, self.chunks, self.device, self.dtype = shape, chunks, device, dtype
        room = max(num for _, num in chunks)
        self.paged = Paged(shape, [start for start, _ in chunks], room=room, device=device, dtype=dtype, page_size=page_size)
        self.num_tokens = DECODE_ROWS + sum(num for _, num in chunks)
        self.qkv = torch.randn(self.num_tokens, shape.qkv_size, device=device).to(dtype)
        self.inputs = self.step(chunks)
        _, k_TKD, v_TKD = shape.split(self.qkv)
        for row in self.inputs.prompts:
            tokens = slice(row.first, row.first + row.num_tokens)
            self.paged.write(LAYER, row.slot, row.start, k_TKD[tokens], v_TKD[tokens])

    def step(self, chunks: list[tuple[int, int]]) -> StepInputs:
        return self.paged.inputs([(0, 0)] * DECODE_ROWS, [(slot, *chunk) for slot, chunk in enumerate(chunks)])

    def nan(self, num_tokens: int) -> Tensor:
        return torch.full((num_tokens, self.shape.num_heads * self.shape.head_dim), float("nan")).to(self.device, self.dtype)

    def run(self, attention: PromptAttention) -> Tensor:
        return attention.attend(self.qkv, self.inputs, LAYER, self.nan(self.num_tokens))

    def check(self, out: Tensor, every: int = 1) -> None:
        assert out[:DECODE_ROWS].isnan().all()
        q_THD, _, _ = self.shape.split(self.qkv)
        for row in self.inputs.prompts:
            looked_at = [*range(0, row.num_tokens - 1, every), row.num_tokens - 1]
            tokens = [row.first + i for i in looked_at]
            expected = [self.paged.attention(LAYER, row.slot, row.start + i, q_THD[row.first + i]) for i in looked_at]
            torch.testing.assert_close(out[tokens].double(), torch.stack(expected), **tolerance(self.dtype))


@pytest.mark.parametrize("block_m", [16, 64, 128])
@pytest.mark.parametrize("shape", [Shape(num_heads=3, num_kv_heads=1), Shape(num_heads=2, num_kv_heads=2, head_dim=64)])
def test_chunks_with_and_without_a_prefix(shape: Shape, block_m: int, device: str, dtype: torch.dtype) -> None:
    chunks = [(0, 1), (0, 33), (63, 2), (64, 40), (37, 20), (16, 1), (0, 16)]
    case = Case(shape, chunks, device, dtype)
    case.check(case.run(PromptAttention(shape, device=device, block_m=block_m)))


@pytest.mark.parametrize("page_size", [1, 8, 32, 128])
@pytest.mark.parametrize("window", [None, 40])
def test_pages_smaller_and_larger_than_a_tile_of_keys(
    page_size: int, window: int | None, device: str, dtype: torch.dtype
) -> None:
    shape = Shape(num_heads=2, num_kv_heads=1, sliding_window=window)
    case = Case(shape, [(0, 33), (150, 20), (63, 2)], device, dtype, page_size)
    case.check(case.run(PromptAttention(shape, device=device, block_m=16, block_n=32)), every=5)


def test_one_row(device: str, dtype: torch.dtype) -> None:
    case = Case(Shape(num_heads=1, num_kv_heads=1), [(70, 131)], device, dtype)
    case.check(case.run(PromptAttention(case.shape, device=device, block_m=64)))


@pytest.mark.parametrize("window", [1, 5, 64, 100])
def test_sliding_window(window: int, device: str, dtype: torch.dtype) -> None:
    shape = Shape(num_heads=2, num_kv_heads=1, sliding_window=window)
    case = Case(shape, [(0, 90), (130, 70), (63, 1)], device, dtype)
    case.check(case.run(PromptAttention(shape, device=device, block_m=64)))


@pytest.mark.parametrize("cuts", [[1, 2, 63, 64], [50, 128], [129]])
def test_a_prompt_gives_the_same_bits_however_it_is_cut(
    cuts: list[int], device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if device == "cpu":  # the interpreter's own products depend, in the last bit, on where in its tile a row lies
        monkeypatch.setattr(np, "matmul", lambda a, b, dtype: np.einsum("mk,kn->mn", a, b, dtype=dtype))
    shape = Shape(num_heads=2, num_kv_heads=1)
    case = Case(shape, [(0, 140)], device, dtype)
    attention = PromptAttention(shape, device=device, deterministic=True)
    whole = case.run(attention)[DECODE_ROWS:]
    for start, end in zip([0, *cuts], [*cuts, 140], strict=True):
        num = end - start
        qkv = torch.cat((case.qkv[:DECODE_ROWS], case.qkv[DECODE_ROWS + start : DECODE_ROWS + end]))
        out = case.nan(DECODE_ROWS + num)
        attention.attend(qkv, case.step([(start, num)]), LAYER, out)
        assert torch.equal(out[DECODE_ROWS:], whole[start:end])


def plain_library(q_1HND: Tensor, k_1KND: Tensor, v_1KND: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
    """What torch's libraries compute, with the log-sum-exp laid out as cuDNN does at times."""
    group = q_1HND.shape[1] // k_1KND.shape[1]
    k_HND, v_HND = (x[0].double().repeat_interleave(group, dim=0) for x in (k_1KND, v_1KND))
    scores_HNN = q_1HND[0].double() @ k_HND.transpose(1, 2) * q_1HND.shape[-1] ** -0.5
    if is_causal:
        scores_HNN = scores_HNN.masked_fill(torch.ones_like(scores_HNN[0], dtype=torch.bool).triu(1), float("-inf"))
    out_HND = (scores_HNN.softmax(-1) @ v_HND).to(q_1HND.dtype)
    return out_HND.transpose(0, 1), scores_HNN.logsumexp(-1).float().t().contiguous().t()


def test_long_chunks_go_to_the_library_and_the_rest_does_not(device: str, dtype: torch.dtype) -> None:
    calls = []

    def library(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
        calls.append((q.shape[2], k.shape[2], is_causal))
        return plain_library(q, k, v, is_causal)

    shape = Shape(num_heads=4, num_kv_heads=2)
    # Long: with no, one, and three blocks before it. Not long: one token short, or at an odd place.
    case = Case(shape, [(0, 32), (0, 31), (32, 32), (96, 32), (16, 32), (32, 5)], device, dtype)
    out = case.run(PromptAttention(shape, device=device, long_prompts=library, long_len=32, block_m=16))
    own = (32, 32, True)
    assert calls == [own, own, (32, 32, False), own, (32, 96, False)]
    case.check(out)


def test_a_chunk_of_several_lengths_goes_there_whole_if_it_is_a_first_one(device: str, dtype: torch.dtype) -> None:
    calls = []

    def library(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
        calls.append((q.shape[2], k.shape[2], is_causal))
        return plain_library(q, k, v, is_causal)

    shape = Shape(num_heads=2, num_kv_heads=1, head_dim=16)
    case = Case(shape, [(0, 64), (16, 32), (0, 80), (5, 16)], device, dtype)
    case.check(case.run(PromptAttention(shape, device=device, long_prompts=library, long_len=16, block_m=16)))
    own = (16, 16, True)
    second = [own, (16, 16, False), own, (16, 32, False)]
    third = [own, own, (16, 16, False), own, (16, 32, False), own, (16, 48, False), own, (16, 48, False), (16, 16, False)]
    assert calls == [(64, 64, True), *second, *third]


@pytest.mark.parametrize(("blocks", "parts"), [(2, [2]), (4, [3, 1]), (6, [3, 3]), (8, [3, 3, 2])])
def test_what_lies_before_a_long_chunk_is_attended_in_as_few_calls_as_can_be(
    blocks: int, parts: list[int], device: str, dtype: torch.dtype
) -> None:
    calls = []

    def library(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
        calls.append(k.shape[2])
        return plain_library(q, k, v, is_causal)

    shape = Shape(num_heads=2, num_kv_heads=1, head_dim=16)
    case = Case(shape, [(blocks * 16, 16)], device, dtype)
    case.check(case.run(PromptAttention(shape, device=device, long_prompts=library, long_len=16)))
    assert calls == [16, *(part * 16 for part in parts)]


@pytest.mark.parametrize(
    ("max_len", "asked"),
    [
        (31, []),
        (70, [[0], [0, 1]]),
        (159, [[0], [0, 1], [0, 2], [0, 3]]),
        (160, [[0], [0, 1], [0, 2], [0, 3], [0, 3, 1]]),
        (1000, [[0], [0, 1], [0, 2], [0, 3], [0, 3, 1], [0, 3, 3, 1]]),
    ],
)
def test_warming_asks_the_library_for_all_it_may_be_asked_for(
    max_len: int, asked: list[list[int]], device: str, dtype: torch.dtype
) -> None:
    calls = []

    def library(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
        calls.append(0 if is_causal else k.shape[2] // 32)
        return plain_library(q, k, v, is_causal)

    shape = Shape(num_heads=4, num_kv_heads=2, head_dim=16)
    case = Case(shape, [(0, 1)], device, dtype)
    attention = PromptAttention(shape, device=device, long_prompts=library, long_len=32, block_m=16)
    attention.warm(case.paged.k.nan_to_num(0.0), case.paged.v.nan_to_num(0.0), dtype, max_len, 32)
    assert calls == [blocks for chunk in asked for blocks in chunk]


def test_warming_asks_for_the_longest_first_chunk_and_all_below(device: str, dtype: torch.dtype) -> None:
    calls = []

    def library(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
        calls.append(q.shape[2] if is_causal else 0)
        return plain_library(q, k, v, is_causal)

    shape = Shape(num_heads=2, num_kv_heads=1, head_dim=16)
    case = Case(shape, [(0, 1)], device, dtype)
    attention = PromptAttention(shape, device=device, long_prompts=library, long_len=16)
    attention.warm(case.paged.k.nan_to_num(0.0), case.paged.v.nan_to_num(0.0), dtype, 60, 50)
    assert set(calls) - {0} == {16, 32, 48}


def test_a_step_that_is_one_chunk_gets_the_librarys_own_memory(device: str, dtype: torch.dtype) -> None:
    made = []

    def library(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
        out_NHD, lse = plain_library(q, k, v, is_causal)
        made.append(out_NHD.contiguous())
        return made[-1], lse

    shape = Shape(num_heads=2, num_kv_heads=2)
    case = Case(shape, [(0, 32)], device, dtype)
    attention = PromptAttention(shape, device=device, long_prompts=library, long_len=32)
    inputs = case.paged.inputs([], [(0, 0, 32)])
    found = attention.attend(case.qkv[DECODE_ROWS:], inputs, LAYER, case.nan(32))
    assert found.data_ptr() == made[-1].data_ptr()
    torch.testing.assert_close(found, case.run(attention)[DECODE_ROWS:])


def test_only_long_chunks(device: str, dtype: torch.dtype) -> None:
    shape = Shape(num_heads=2, num_kv_heads=2)
    case = Case(shape, [(64, 32)], device, dtype)
    case.check(case.run(PromptAttention(shape, device=device, long_prompts=plain_library, long_len=32)))


@pytest.mark.parametrize("limits", [{"deterministic": True}, {}])
def test_no_library_where_bits_must_not_depend_on_chunks_or_with_a_window(
    limits: dict[str, bool], device: str, dtype: torch.dtype
) -> None:
    def never(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
        raise AssertionError

    shape = Shape(num_heads=2, num_kv_heads=2, sliding_window=None if limits else 8)
    case = Case(shape, [(32, 32)], device, dtype)
    case.check(case.run(PromptAttention(shape, device=device, long_prompts=never, long_len=32, block_m=16, **limits)))


@pytest.mark.parametrize("shift", [0.0, 30.0, -200.0])
def test_merge_is_attention_over_both_sets_of_keys(shift: float, device: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    q, k, v = torch.randn(3, 19, 32), torch.randn(3, 40, 32), torch.randn(3, 40, 32)
    scores = q.double() @ k.double().transpose(1, 2)
    scores[..., 15:] += shift  # one side may outweigh the other by far
    expected = (scores.softmax(-1) @ v.double()).transpose(0, 1)
    sides = []
    for keys in (slice(0, 15), slice(15, 40)):
        out_NHD = (scores[..., keys].softmax(-1) @ v[:, keys].double()).transpose(0, 1)
        sides += [out_NHD.to(device, dtype), scores[..., keys].logsumexp(-1).float().to(device)]
    out = torch.full((19, 3, 32), float("nan"), device=device)
    lse = torch.full((3, 19), float("nan"), device=device)
    merge(*sides, out, lse)
    torch.testing.assert_close(out.cpu().double(), expected, **tolerance(dtype))
    torch.testing.assert_close(lse.cpu().double(), scores.logsumexp(-1), atol=1e-4, rtol=1e-5)
    merge(out, lse, sides[2], sides[3], out, lse)  # in place, one side counted twice
    doubled = torch.cat((scores, scores[..., 15:]), -1)
    expected = (doubled.softmax(-1) @ torch.cat((v, v[:, 15:]), 1).double()).transpose(0, 1)
    torch.testing.assert_close(out.cpu().double(), expected, **tolerance(dtype))


def test_a_library_that_fails_or_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = triton_prompt_attention._tried
    arguments = ("cudnn", 4, 2, [(64, 0), (64, 64), (64, 128), (128, 0)], 16, torch.float32, torch.device("cpu"))
    library, reason = tried(*arguments)  # this build of torch has no such operation for CPUs
    assert library is None and "NotImplementedError" in reason

    monkeypatch.setattr(triton_prompt_attention, "_library", lambda *_: plain_library)
    assert tried(*arguments) == (plain_library, "")

    def without_causal(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
        return plain_library(q, k, v, False)

    monkeypatch.setattr(triton_prompt_attention, "_library", lambda *_: without_causal)
    library, reason = tried(*arguments)
    assert library is None and "wrong by" in reason

    def short(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
        return plain_library(q, k[:, :, :64], v[:, :, :64], is_causal)

    monkeypatch.setattr(triton_prompt_attention, "_library", lambda *_: short)
    assert tried("cudnn", 4, 2, [(64, 0), (64, 64)], *arguments[4:]) == (short, "")
    library, reason = tried(*arguments)
    assert library is None and "wrong by" in reason

    def only_repeated(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor]:
        if k.shape[1] != q.shape[1]:
            raise RuntimeError("heads")
        return plain_library(q, k, v, is_causal)

    def repeating(name: str, repeat: int, scale: float) -> triton_prompt_attention.Library:
        return lambda q, k, v, causal: only_repeated(q, *(x.repeat_interleave(repeat, 1) for x in (k, v)), causal)

    monkeypatch.setattr(triton_prompt_attention, "_library", repeating)
    library, reason = tried(*arguments)
    assert library is not None and reason == ""
