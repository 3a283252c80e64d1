"""What a network computes: the batch of one step, the protocols around it, and a plain-torch reference of every op.

Owns the signatures that faster kernels implement. Knows no model family, no file format and no scheduling.

Shape letters: T tokens of the step, B rows, R rows of logits, H query heads, K key/value heads, G query heads per
key/value head, D head size, E hidden size, F feed-forward size, V vocabulary, P pages per row, S tokens per page,
N tokens of a row in KV.

| op             | signature                                        | what it does                                      |
|----------------|--------------------------------------------------|---------------------------------------------------|
| norm.rms       | (x_TE, weight_E, eps) -> TE                      | x / rms(x) * weight                               |
| rope.apply     | (x_THD, cos_TD, sin_TD) -> THD                   | rotates the two halves of every head              |
| mlp.silu_mul   | (x_T2F) -> TF                                    | silu(first half) * second half                    |
| attention.paged| (shape: NetworkShape) -> PagedAttention          | writes K/V of new tokens, attends over the pages  |
| network        | (parts: NetworkParts) -> Network                 | the whole forward pass                            |
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from streamserve.kernels.registry import implements


class NetworkShape(Protocol):
    """The numbers of a network that kernels need; models.spec.ModelSpec has them."""

    @property
    def num_layers(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def rms_norm_eps(self) -> float: ...
    @property
    def tie_embeddings(self) -> bool: ...
    @property
    def qkv_bias(self) -> bool: ...
    @property
    def o_bias(self) -> bool: ...
    @property
    def mlp_bias(self) -> bool: ...
    @property
    def qk_norm(self) -> bool: ...
    @property
    def sliding_window(self) -> int | None: ...
    @property
    def window_layers(self) -> frozenset[int] | None:
        """Layers that the sliding window holds for; None: all."""
        ...

    @property
    def only_torch(self) -> str | None:
        """What of the layers only the family's own torch network computes; None: nothing."""
        ...

    @property
    def has_rotary_sections(self) -> bool: ...
    def inv_freq(self) -> tuple[tuple[float, ...], float]:
        """RoPE: one angular frequency per pair of dimensions, and the factor on cos and sin."""
        ...

    def rope_axes(self) -> tuple[int, ...]:
        """M-RoPE: which line of Batch.rope_3T each frequency turns with. Empty: all turn with the position."""
        ...


class Packed(NamedTuple):
    """A matrix as a GGUF file holds it: rows of quantised groups, rows independent of each other."""

    kind: str  # ggml's name: Q4_1, Q8_0, ...
    rows: "np.ndarray[Any, np.dtype[np.uint8]]"  # [shape[0], bytes per row]; often a view of the file's mmap: read only
    shape: tuple[int, int]  # out features, in features


class Weights(Protocol):
    """Where a network takes its weights from, by Hugging Face name."""

    def tensor(self, name: str) -> Tensor:
        """The weight as a float tensor, dequantised if need be. Raises CheckpointError."""
        ...

    def packed(self, name: str) -> Packed | None:
        """The weight still quantised, or None when the checkpoint does not hold it so."""
        ...

    def load(self, name: str, out: Tensor) -> None:
        """Fill `out` (any float type, any device, may be a slice of a joined weight) with the weight. Raises CheckpointError."""
        ...


class KVPages(Protocol):
    """KV memory as ops see it; cache.pool.KVPool has it. A layout is known to its pool and its own kernels only."""

    @property
    def page_size(self) -> int: ...
    @property
    def num_pages(self) -> int: ...
    @property
    def k(self) -> Tensor: ...
    @property
    def v(self) -> Tensor: ...
    def write(self, layer: int, k_TKD: Tensor, v_TKD: Tensor, pages_T: Tensor, offsets_T: Tensor) -> None:
        """Store one key and value per token at `offsets_T` inside `pages_T`."""
        ...

    def reader(self, page_table_BP: Tensor) -> "KVReader":
        """Reads these pages, layer after layer."""
        ...


class KVReader(Protocol):
    """Whole pages of a table, one layer at a time."""

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys [B, P, K, D, S] and values [B, P, K, S, D], good until the next read."""
        ...


@dataclass(frozen=True, slots=True)
class Embedded:
    """Tokens of a step that take embeddings instead of their own: M of them, by their index in T, ascending.

    `embeds_MX` is as wide as the stream, or 1 + n times: then parts 1 .. n are added to the stream behind the first n layers
    (DeepStack, arXiv 2406.04334). `see_until_M`: where places of a picture look at each other in both directions, the position
    that each may see up to, itself included; None: as all tokens, up to themselves.
    """

    tokens_M: Tensor  # int64
    embeds_MX: Tensor
    see_until_M: Tensor | None = None  # int64


@dataclass(slots=True)
class Batch:
    """One step as a network sees it. Row b holds tokens row_start[b] .. row_start[b + 1] - 1.

    `kv_len[b]` counts the row's tokens in KV after the step (last position + 1). `page_table_BP` is padded with 0. `rope_3T`: a
    model with M-RoPE turns heads by these instead of by `positions_T` (which place K and V): frame, row and column.
    """

    token_ids_T: Tensor  # int64
    positions_T: Tensor  # int64
    row_start: list[int]  # B + 1 entries
    kv_len: list[int]  # B entries
    page_table_BP: Tensor  # int32
    logit_rows_R: Tensor  # int64: which of the T tokens yield logits
    pool: KVPages
    embedded: Embedded | None = None
    rope_3T: Tensor | None = None  # int64 [3, T]


@dataclass(frozen=True, slots=True)
class PromptRow:
    """Where the tokens of one prompt row lie in a step, as the host knows it: tokens first .. first + num_tokens - 1, the
    first of them at position `start` of its request."""

    slot: int
    first: int
    num_tokens: int
    start: int


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One step as a network on a GPU sees it: tensors in device memory, filled in stream order before the forward pass.

    Tokens 0 .. num_decode - 1 are rows of one token each; behind them lie the tokens of the prompt rows, row after row. A
    captured graph has a fixed `num_decode` and a fixed number of tokens and of prompt rows: surplus rows and tokens have slot
    -1, token 0 and position 0, read no page, write no page, and what comes out of them is never looked at; surplus prompt rows
    have no tokens. While a graph is captured, `prompts` only says how much room the rows may take.

    In a drafted step (`is_drafted`) decode rows may follow one another: of one slot, at consecutive positions, each the guess of
    what comes behind the one before. Those behind the first see K and V of the ones before them in this step.

    `parts_PR` names decode rows that share their first pages, so that attention reads those once. Every line is one part of the
    work on one group of up to R rows: the rows, -1 behind the last (in a surplus line: all); how many of their first tokens
    are shared, a multiple of the attention's tile, in whole pages, at most the position of any of them; which part this is, and
    of how many. A group's parts follow one another; every decode row with a slot is in exactly one group, if need be its own.
    """

    num_decode: int
    prompts: tuple[PromptRow, ...]
    tokens_T: Tensor  # int32
    positions_T: Tensor  # int32: place of the token in its request; KV and the step itself hold exactly the tokens before it
    slots_T: Tensor  # int32: line of page_table_SP; -1: surplus
    prompt_starts: Tensor  # int32 [len(prompts) + 1]: index in T of each prompt row's first token, then the end of the last
    page_table_SP: Tensor  # int32
    logit_rows_R: Tensor  # int32: which of the T tokens yield logits: every decode row in order, then prompts' last tokens
    logit_slots_R: Tensor  # int32: their slots; -1: surplus
    k: Tensor  # [L, pages, K, S, D]
    v: Tensor  # [L, pages, K, S, D]
    parts_PR: Tensor | None = None  # int32 [P, R + 3]; None: no row is known to share anything
    is_drafted: bool = False
    # Of a model that takes media: line t is what token t takes instead of its embedding, if it is MEDIA_BASE; as wide as
    # Embedded.embeds_MX. None of another model.
    media_TX: Tensor | None = None
    rope_3T: Tensor | None = None  # int32 [3, T]: see Batch; for models with M-RoPE, in every step
    shown: "Shown | None" = None


class Shown(NamedTuple):
    """Where a network leaves its stream for another one to read: as it was before each of these layers (their number: behind the
    last one, before the last norm), side by side: [T, len(layers) * E], or longer. `layers` ascend."""

    layers: tuple[int, ...]
    streams_TX: Tensor


class Grouping(NamedTuple):
    """How attention takes decode rows that share a prefix: so many `rows` in a group at most, shared tokens in multiples of
    `tile_len`, and about so many parts (`programs`) of all its work fill the card."""

    rows: int
    tile_len: int
    programs: int


class DeviceNetwork(Protocol):
    """A forward pass on a GPU. Every call only launches: nothing waits for the device, so that it can be captured."""

    @property
    def grouping(self) -> Grouping | None:
        """What StepInputs.parts_PR is made for; None: it must be None."""
        ...

    def forward(self, inputs: StepInputs) -> Tensor:
        """Write K/V of the step's tokens; return the stream [R, E] before the last norm, of the tokens that yield logits."""
        ...

    def forward_all(self, inputs: StepInputs) -> Tensor:
        """`forward` for every token: [T, E]."""
        ...

    def logits(self, hidden_RE: Tensor, out_RV: Tensor) -> None:
        """Last norm and head, into `out_RV` (float32)."""
        ...

    @property
    def long_chunk(self) -> int | None:
        """Long chunks of a prompt are computed best if they begin and end at multiples of so many tokens."""
        ...

    def may_capture(self, prompts: tuple[PromptRow, ...]) -> bool:
        """Whether a graph captured for as many tokens and rows can do these. False where what is launched depends on them."""
        ...

    def warm_up(self, k: Tensor, v: Tensor, max_len: int, max_chunk: int) -> None:
        """Compile and plan what requests of up to `max_len` tokens, in steps of up to `max_chunk`, may need and a plain step does
        not. `k` and `v`: a pool as in StepInputs; page 0 is read. Waits for the device."""
        ...


class Network(Protocol):
    """A forward pass bound to its weights."""

    def forward(self, batch: Batch) -> Tensor:
        """Run the step: writes K/V of its tokens into the pool, returns float32 logits [R, V]. Runs in the step thread."""
        ...


@dataclass(frozen=True, slots=True)
class NetworkParts:
    """All that a `network` implementation may build from. `ops` maps the other ops to their chosen implementations."""

    shape: NetworkShape
    weights: Weights
    dtype: torch.dtype
    device: torch.device
    ops: Mapping[str, Any]
    threads: int = 1  # on CPUs
    max_len: int = 0  # most tokens a request may hold: the length of RoPE tables; on GPUs
    max_rows: int = 0  # most rows of a step that yield logits, surplus ones included: the size of scratch memory; on GPUs
    deterministic: bool = False  # a row's result must not depend, bit for bit, on the rows beside it


class PagedAttention(Protocol):
    """Attention over pages, in two calls, so that what depends on the batch alone is worked out once per step."""

    def prepare(self, batch: Batch) -> Any:
        """Index work of the step, shared by all layers."""
        ...

    def attend(self, prepared: Any, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        """Write K and V into the pool, then attend, causal by position. Returns [T, H, D]."""
        ...


@implements("norm.rms")
def rms_norm(x_TE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x_TE, (x_TE.shape[-1],), weight_E, eps)


@implements("rope.apply")
def apply_rope(x_THD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    half = x_THD.shape[-1] // 2
    turned = torch.cat((-x_THD[..., half:], x_THD[..., :half]), dim=-1)
    return x_THD * cos_TD.unsqueeze(1) + turned * sin_TD.unsqueeze(1)


@implements("mlp.silu_mul")
def silu_mul(x_T2F: Tensor) -> Tensor:
    gate, up = x_T2F.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


@dataclass(frozen=True, slots=True)
class _DecodeRows:
    """Rows with one new token and about as many pages: attended in one call, padded to the longest."""

    tokens: Tensor | slice  # which of the T tokens
    pages: KVReader
    bias_B11N: Mapping[int | None, Tensor]  # by window: 0 where attended, -inf elsewhere


@dataclass(frozen=True, slots=True)
class _PromptRow:
    """One row with several new tokens, and perhaps a cached prefix before them."""

    tokens: slice
    pages: KVReader
    kv_len: int
    mask_TN: Mapping[int | None, Tensor | None]  # by window; None: plain causal, no prefix


@dataclass(frozen=True, slots=True)
class _Prepared:
    pool: KVPages
    pages_T: Tensor
    offsets_T: Tensor
    decode: list[_DecodeRows]
    prompts: list[_PromptRow]


@implements("attention.paged")
class ReferenceAttention:
    """Gathers the pages of a row and hands them to torch's attention."""

    def __init__(self, shape: NetworkShape) -> None:
        self._window = shape.sliding_window
        self._window_layers = shape.window_layers
        # How layers of this network look back, each once.
        self._windows = {shape.sliding_window} if shape.window_layers is None else {None, shape.sliding_window}
        self._kv_heads = shape.num_kv_heads
        self._group = shape.num_heads // shape.num_kv_heads
        self._scale = shape.head_dim**-0.5

    def prepare(self, batch: Batch) -> _Prepared:
        starts, size = batch.row_start, batch.pool.page_size
        lens = [end - start for start, end in pairwise(starts)]
        row_of_T = torch.repeat_interleave(torch.tensor(lens, device=batch.positions_T.device))
        pages_T = batch.page_table_BP[row_of_T, batch.positions_T // size].long()
        decode: dict[int, list[int]] = {}  # by binary digits of the page count: a short row pads to twice its length at most
        for b, length in enumerate(lens):
            if length == 1:
                decode.setdefault((-(-batch.kv_len[b] // size)).bit_length(), []).append(b)
        prompts = [b for b, length in enumerate(lens) if length > 1]
        see_until_T = _see_until(batch)
        return _Prepared(
            pool=batch.pool,
            pages_T=pages_T,
            offsets_T=batch.positions_T % size,
            decode=[self._decode_rows(batch, rows) for rows in decode.values()],
            prompts=[self._prompt_row(batch, b, see_until_T) for b in prompts],
        )

    def _decode_rows(self, batch: Batch, rows: list[int]) -> _DecodeRows:
        size, device = batch.pool.page_size, batch.positions_T.device
        is_whole_batch = len(rows) == len(batch.kv_len)
        kv_len = [batch.kv_len[b] for b in rows]
        num_pages = -(-max(kv_len) // size)
        table = batch.page_table_BP if is_whole_batch else batch.page_table_BP[rows]
        len_B1 = torch.tensor(kv_len, device=device).unsqueeze(1)
        bias_B11N = {}
        for window in self._windows:
            is_hidden_BN = ~_visible(len_B1 - 1, len_B1 - 1, num_pages * size, window)
            bias_BN = torch.zeros(is_hidden_BN.shape, device=device).masked_fill_(is_hidden_BN, float("-inf"))
            bias_B11N[window] = bias_BN[:, None, None, :]
        return _DecodeRows(
            tokens=slice(None) if is_whole_batch else torch.tensor([batch.row_start[b] for b in rows], device=device),
            pages=batch.pool.reader(table[:, :num_pages]),
            bias_B11N=bias_B11N,
        )

    def _prompt_row(self, batch: Batch, b: int, see_until_T: Tensor | None) -> _PromptRow:
        tokens, kv_len = slice(batch.row_start[b], batch.row_start[b + 1]), batch.kv_len[b]
        num_pages = -(-kv_len // batch.pool.page_size)
        positions_T1 = batch.positions_T[tokens].unsqueeze(1)
        until_T1 = positions_T1 if see_until_T is None else see_until_T[tokens].unsqueeze(1)
        is_whole = len(positions_T1) == kv_len and bool(until_T1.equal(positions_T1))
        masks: dict[int | None, Tensor | None] = {}
        for window in self._windows:
            is_plain = is_whole and (window is None or kv_len <= window)
            masks[window] = None if is_plain else _visible(positions_T1, until_T1, kv_len, window)
        return _PromptRow(
            tokens=tokens,
            pages=batch.pool.reader(batch.page_table_BP[b : b + 1, :num_pages]),
            kv_len=kv_len,
            mask_TN=masks,
        )

    def attend(self, prepared: _Prepared, layer: int, q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        prepared.pool.write(layer, k_TKD, v_TKD, prepared.pages_T, prepared.offsets_T)
        out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        window = self._window if self._window_layers is None or layer in self._window_layers else None
        for rows in prepared.decode:
            out_THD[rows.tokens] = self._attend_decode(rows, layer, window, q_THD[rows.tokens])
        for row in prepared.prompts:
            out_THD[row.tokens] = self._attend_prompt(row, layer, window, q_THD[row.tokens])
        return out_THD

    def _attend_decode(self, rows: _DecodeRows, layer: int, window: int | None, q_BHD: Tensor) -> Tensor:
        """Page by page: [G, D] x [D, S], softmax over all pages of the row, [G, S] x [S, D], sum over pages.

        The G query heads of one key/value head are the rows of one product, so no K or V is repeated, and no page is
        rearranged (at 16 rows of 900 tokens: 7 ms per layer; rearranging for torch's own attention: 35 ms)."""
        k_BPKDS, v_BPKSD = (x.float() for x in rows.pages.read(layer))
        q_BKGD = q_BHD.float().reshape(len(q_BHD), self._kv_heads, self._group, -1) * self._scale
        scores_BPKGS = q_BKGD.unsqueeze(1) @ k_BPKDS
        scores_BKGN = scores_BPKGS.permute(0, 2, 3, 1, 4).flatten(3) + rows.bias_B11N[window]
        weights_BKGPS = scores_BKGN.softmax(dim=-1).view(*scores_BKGN.shape[:3], -1, k_BPKDS.shape[-1])
        out_BKGD: Tensor = (weights_BKGPS.permute(0, 3, 1, 2, 4) @ v_BPKSD).sum(dim=1)
        return out_BKGD.reshape(q_BHD.shape).to(q_BHD.dtype)

    def _attend_prompt(self, row: _PromptRow, layer: int, window: int | None, q_THD: Tensor) -> Tensor:
        mask_TN = row.mask_TN[window]
        k_1PKDS, v_1PKSD = row.pages.read(layer)
        k_1KND = k_1PKDS.permute(0, 2, 1, 4, 3).flatten(2, 3)[:, :, : row.kv_len].to(q_THD.dtype)
        v_1KND = v_1PKSD.permute(0, 2, 1, 3, 4).flatten(2, 3)[:, :, : row.kv_len].to(q_THD.dtype)
        out_1HTD: Tensor = F.scaled_dot_product_attention(
            q_THD.transpose(0, 1).unsqueeze(0),
            k_1KND,
            v_1KND,
            attn_mask=mask_TN,
            is_causal=mask_TN is None,
            enable_gqa=self._group > 1,
        )
        return out_1HTD.squeeze(0).transpose(0, 1)


def _see_until(batch: Batch) -> Tensor | None:
    """The last position that each token may see; None: its own, of all."""
    if batch.embedded is None or batch.embedded.see_until_M is None:
        return None
    return batch.positions_T.index_copy(0, batch.embedded.tokens_M, batch.embedded.see_until_M)


def _visible(positions_T1: Tensor, until_T1: Tensor, num_keys: int, window: int | None) -> Tensor:
    """Which keys each query position may see: none behind `until_T1`, none further back than the window."""
    keys_1N = torch.arange(num_keys, device=positions_T1.device).unsqueeze(0)
    mask_TN = keys_1N <= until_T1
    return mask_TN if window is None else mask_TN & (keys_1N > positions_T1 - window)


def rope_angles(
    positions_T: Tensor,
    inv_freq: Sequence[float] | Tensor,
    factor: float,
    dtype: torch.dtype,
    axes_d: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """cos and sin for the step's positions, each [T, D], computed in float32; shared by all layers. For M-RoPE positions are
    [3, T], and `axes_d` says which of the three each frequency turns with."""
    freq_d = torch.as_tensor(inv_freq, dtype=torch.float32, device=positions_T.device)
    of_frequency = positions_T.unsqueeze(1) if positions_T.dim() == 1 else positions_T[axes_d].T
    angles_TD = (of_frequency.float() * freq_d).repeat(1, 2)
    return (angles_TD.cos() * factor).to(dtype), (angles_TD.sin() * factor).to(dtype)
