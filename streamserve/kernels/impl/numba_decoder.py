"""The packed decoder: a Llama-like network over 4-bit and 8-bit weights as a GGUF file holds them, on x86-64 with AVX2.

Needs no compiler: numba compiles the step (numba_step.py) at the first start and keeps it in its cache. Owns the packed
weights, the memory of a step and the helper threads. Where the processor has VNNI, products use it, for the same bits
(numba_tiles.py). A row's logits do not depend, bit for bit, on the rows beside it, on how its prompt was cut, or on the number
of threads. Knows no file format beyond ggml's groups (numba_pack.py).

Accuracy: activations are rounded per group of 32, to 15 bits before a product with 4-bit weights and to 16 before one with
8-bit weights; everything else is float32 (KV memory may be float16). The default model's mean KL divergence from float32 is
6e-7 (2e-6 with float16 KV); with int8 activations, as llama.cpp has them, it is 4e-3.
"""

# mypy: disable-error-code="import-untyped,attr-defined"

import platform
from collections.abc import Iterator, Sequence
from functools import partial
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from llvmlite import binding
from numba.core import config as numba_config
from numpy.typing import NDArray
from torch import Tensor

from streamserve.errors import ConfigError
from streamserve.kernels.impl import numba_step as step
from streamserve.kernels.impl.numba_attention import CHUNK, COLUMNS, RUN_TOKENS, scratch_floats
from streamserve.kernels.impl.numba_pack import (
    BITS,
    GROUP,
    Arena,
    Matrix,
    aligned_bytes,
    interleave,
    matrix_bytes,
    pack_rows,
    quantise_q8_0,
    unpack_q8_0,
)
from streamserve.kernels.impl.numba_team import Helpers, Pace
from streamserve.kernels.impl.numba_threads import COUNTER_WORDS
from streamserve.kernels.impl.numba_tiles import BLOCK, INSTRUCTIONS, ROW_BYTES
from streamserve.kernels.ops import Batch, KVPages, Network, NetworkParts, NetworkShape, Weights
from streamserve.kernels.registry import Facts, implements

MAX_TOKENS = 256  # of a native step; a longer batch is cut, which changes no bit of the result
_FEATURES = ("avx2", "fma", "f16c")
_QUANTISED = frozenset(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K"))


def refusal(facts: Facts) -> str | None:
    """Why the packed decoder cannot run this model here; None when it can."""
    shape: NetworkShape = facts.shape
    if shape.only_torch:
        return f"only torch's network computes {shape.only_torch}"
    if facts.dtype != "auto":
        return f"dtype is {facts.dtype}; packed weights need auto"
    if not facts.weight_kinds & _QUANTISED:
        return f"weights are held as {', '.join(sorted(facts.weight_kinds))}, not quantised"
    if shape.has_rotary_sections:
        return "M-RoPE is not supported"
    if shape.o_bias or shape.mlp_bias:
        return "biases are supported on q, k and v only"
    if shape.sliding_window is not None:
        return f"a sliding window ({shape.sliding_window}) is not supported"
    for name, size in (
        ("hidden size", shape.hidden_size),
        ("intermediate size", shape.intermediate_size),
        ("head size", shape.head_dim),
    ):
        if size % GROUP:
            return f"{name} {size} is not a multiple of {GROUP}"
    if facts.page_size % COLUMNS or CHUNK % facts.page_size:
        return f"page size is {facts.page_size}; supported are 16, 32, 64 and 128"
    if facts.kv_dtype not in ("float32", "float16"):
        return f"KV is held as {facts.kv_dtype}; supported are float32 and float16"
    return processor_refusal()


def processor_refusal() -> str | None:
    """Why no packed network can run on this machine; None when it can."""
    if platform.machine() not in ("x86_64", "AMD64") or platform.system() != "Linux":
        return f"needs Linux on x86-64; this is {platform.system()} on {platform.machine()}"
    if numba_config.DISABLE_JIT or numba_config.CPU_NAME or numba_config.CPU_FEATURES is not None:
        return "numba is told by NUMBA_* variables not to compile for this processor"
    found = binding.get_host_cpu_features()
    missing = [name for name in _FEATURES if not found.get(name)]
    return f"the processor lacks {', '.join(missing)}" if missing else None


def _accepts(facts: Facts) -> bool | str:
    return refusal(facts) or True


@implements("network", name="packed", device="cpu", priority=10, when=_accepts)
def packed_network(parts: NetworkParts) -> Network:
    """See PackedDecoder."""
    return PackedDecoder(parts.shape, parts.weights, threads=parts.threads)


class PackedDecoder:
    """A network over packed weights. Implements kernels.ops.Network, and what models.heads.FeatureNetwork adds. Not for two
    threads at once."""

    def __init__(self, shape: NetworkShape, weights: Weights, *, threads: int = 1) -> None:
        self._shape = shape
        self._pace, self._helpers = Pace(threads), Helpers(threads)
        self._threads = threads
        self._kept: list[Any] = []  # memory that addresses point to
        self._vocab = -(-shape.vocab_size // BLOCK) * BLOCK
        self._net = self._load(weights)
        self._make_work_memory()
        self._member = step.compile_member(_digest())
        self._member(self._net, self._work, 0, 1)  # an empty step: compiles, or loads what was compiled before
        self._helpers.start(partial(_serve, self._member, self._net, self._work), self._kept)

    # --- weights

    def _load(self, weights: Weights) -> step.Net:
        shape = self._shape
        arena = Arena(self._most_bytes())
        embedding = self._place(arena, [_packed(weights, "model.embed_tokens.weight", kind="Q8_0")])
        head = embedding if shape.tie_embeddings else self._place(arena, [_packed(weights, "lm_head.weight", kind="Q8_0")])
        self._embedding = arena.view(embedding)
        table = np.zeros((shape.num_layers, step.LAYER_WORDS), np.int64)
        for i in range(shape.num_layers):
            at = f"model.layers.{i}."
            qkv = _alike(weights, [f"{at}self_attn.{part}_proj.weight" for part in "qkv"])
            gate_up = _alike(weights, [f"{at}mlp.{part}_proj.weight" for part in ("gate", "up")])
            bits, groups, (gate, up) = gate_up[0][0], gate_up[0][2], (part[1] for part in gate_up)
            for column, parts in (
                (step.QKV, qkv),
                (step.ATTENTION_OUT, [_packed(weights, f"{at}self_attn.o_proj.weight")]),
                (step.GATE_UP, [(bits, interleave((gate, up), step.ITEM_BLOCKS), groups)]),
                (step.DOWN, [_packed(weights, f"{at}mlp.down_proj.weight")]),
            ):
                matrix = self._place(arena, parts)
                table[i, column : column + 2] = matrix.address, matrix.bits
        self._kept += [arena.memory, table]
        freq, factor = shape.inv_freq()
        return step.Net(
            layers=table.ctypes.data,
            attention_norm=self._per_layer(weights, "input_layernorm.weight"),
            mlp_norm=self._per_layer(weights, "post_attention_layernorm.weight"),
            bias=self._per_layer(weights, *(f"self_attn.{part}_proj.bias" for part in "qkv")) if shape.qkv_bias else 0,
            q_norm=self._per_layer(weights, "self_attn.q_norm.weight") if shape.qk_norm else 0,
            k_norm=self._per_layer(weights, "self_attn.k_norm.weight") if shape.qk_norm else 0,
            last_norm=self._floats(weights.tensor("model.norm.weight").float().numpy()),
            freq=self._floats(np.array(freq, np.float32)),
            rope_factor=float(factor),
            eps=float(shape.rms_norm_eps),
            num_layers=shape.num_layers,
            hidden=shape.hidden_size,
            heads=shape.num_heads,
            kv_heads=shape.num_kv_heads,
            dim=shape.head_dim,
            inner=shape.intermediate_size,
            vocab=self._vocab,
            embedding=embedding.address,
            head=head.address,
        )

    def _most_bytes(self) -> int:
        """Memory of all matrices, were they all of 8 bit. What is not filled is never touched."""
        shape, width = self._shape, self._shape.num_heads * self._shape.head_dim
        qkv = width + 2 * shape.num_kv_heads * shape.head_dim
        per_layer = sum(
            matrix_bytes(8, channels, inputs // GROUP)
            for channels, inputs in (
                (qkv, shape.hidden_size),
                (shape.hidden_size, width),
                (2 * shape.intermediate_size, shape.hidden_size),
                (shape.hidden_size, shape.intermediate_size),
            )
        )
        tables = (1 if shape.tie_embeddings else 2) * matrix_bytes(8, self._vocab, shape.hidden_size // GROUP)
        return shape.num_layers * per_layer + tables

    def _place(self, arena: Arena, parts: "list[tuple[int, NDArray[np.uint16], int]]") -> Matrix:
        bits, _, groups = parts[0]
        blocks = parts[0][1] if len(parts) == 1 else np.concatenate([part[1] for part in parts])
        return arena.place(blocks, bits, len(blocks) * BLOCK, groups)

    def _per_layer(self, weights: Weights, *names: str) -> int:
        """Vectors of all layers as float32 [layers, n]; several names are joined."""
        rows = [
            torch.cat([weights.tensor(f"model.layers.{i}.{name}").float() for name in names])
            for i in range(self._shape.num_layers)
        ]
        return self._floats(torch.stack(rows).numpy())

    def _floats(self, array: "NDArray[np.float32]") -> int:
        kept = np.ascontiguousarray(array, np.float32)
        self._kept.append(kept)
        return kept.ctypes.data

    # --- memory of a step

    def _make_work_memory(self) -> None:
        shape, count = self._shape, MAX_TOKENS
        width = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim
        row_bytes = _row_bytes(max(shape.hidden_size, shape.num_heads * shape.head_dim))
        inner_bytes = _row_bytes(shape.intermediate_size)
        own = scratch_floats(shape.num_heads // shape.num_kv_heads, shape.head_dim)
        scratch_bytes = -(-4 * max(own, step.GATED_ROWS * 2 * GROUP) // 64) * 64
        phases = shape.num_layers * step.PHASES_PER_LAYER + step.PHASES_BESIDE
        self._now = self._zeros((step.NOW_WORDS,), np.int64)
        self._shown = self._zeros((shape.num_layers + 1,), np.int64)
        self._token_ids = self._zeros((count,), np.int64)
        self._embeds = self._zeros((count,), np.int64)
        self._positions = self._zeros((count,), np.int64)
        self._logit_tokens = self._zeros((count,), np.int64)
        self._runs = self._zeros((count, 3), np.int64)
        self._counters = self._zeros((phases, COUNTER_WORDS), np.int64)
        self._work = step.Work(
            now=self._now.ctypes.data,
            token_ids=self._token_ids.ctypes.data,
            embeds=self._embeds.ctypes.data,
            positions=self._positions.ctypes.data,
            logit_tokens=self._logit_tokens.ctypes.data,
            runs=self._runs.ctypes.data,
            x=self._zeros((count, shape.hidden_size), np.float32).ctypes.data,
            qkv=self._zeros((count, width), np.float32).ctypes.data,
            cos=self._zeros((count, shape.head_dim // 2), np.float32).ctypes.data,
            sin=self._zeros((count, shape.head_dim // 2), np.float32).ctypes.data,
            rows=step.Rows(self._zeros((count, row_bytes), np.uint8).ctypes.data, row_bytes),
            inner_rows=step.Rows(self._zeros((count, inner_bytes), np.uint8).ctypes.data, inner_bytes),
            scratch=self._zeros((self._threads, scratch_bytes), np.uint8).ctypes.data,
            scratch_bytes=scratch_bytes,
            counters=self._counters.ctypes.data,
            gate=self._helpers.gate,
            semaphores=self._helpers.semaphores,
        )

    def _zeros(self, shape: tuple[int, ...], dtype: Any) -> "NDArray[Any]":
        num_bytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        array: NDArray[Any] = aligned_bytes(num_bytes).view(dtype).reshape(shape)
        self._kept.append(array)
        return array

    # --- a step

    def forward(self, batch: Batch) -> Tensor:
        """See Network."""
        wanted = batch.logit_rows_R
        if len(wanted) > 1 and bool((wanted[1:] < wanted[:-1]).any()):
            ascending, order = wanted.sort()
            logits_RV = torch.empty(len(wanted), self._vocab)
            logits_RV[order] = self._run(batch, ascending.numpy())
        else:
            logits_RV = self._run(batch, wanted.numpy())
        return logits_RV if self._vocab == self._shape.vocab_size else logits_RV[:, : self._shape.vocab_size]

    def forward_with_features(self, batch: Batch, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """`forward`, and the stream as it was before each of these layers (their number: behind the last one), side by side:
        float32 [T, len(layers) * E]."""
        row_bytes = self._shape.hidden_size * 4
        shown_TX = torch.empty(len(batch.token_ids_T), len(layers) * self._shape.hidden_size)
        self._shown[:] = 0
        self._shown[list(layers)] = shown_TX.data_ptr() + np.arange(len(layers)) * row_bytes
        self._now[step.SHOWN], self._now[step.SHOWN_BYTES] = self._shown.ctypes.data, len(layers) * row_bytes
        try:
            return self.forward(batch), shown_TX
        finally:
            self._now[step.SHOWN] = 0

    def embed(self, token_ids_T: Tensor) -> Tensor:
        """The stream before the first layer: float32 [T, E]."""
        return torch.from_numpy(unpack_q8_0(self._embedding, self._shape.hidden_size // GROUP, token_ids_T.numpy()))

    def _run(self, batch: Batch, wanted_R: "NDArray[np.int64]") -> Tensor:
        """`wanted_R` ascends."""
        token_ids_T, positions_T = batch.token_ids_T.numpy(), batch.positions_T.numpy()
        assert token_ids_T.min() >= 0 and token_ids_T.max() < self._shape.vocab_size, "token id out of range"
        table_BP = np.ascontiguousarray(batch.page_table_BP.numpy(), np.int32)
        logits_RV = torch.empty(len(wanted_R), self._vocab)
        self._describe(batch.pool, table_BP)
        _held, embeds_T = self._embedded(batch)  # the second are addresses in the first
        done = 0
        for start, end, runs in _pieces(batch.row_start):
            count, until = end - start, int(np.searchsorted(wanted_R, end))
            self._token_ids[:count] = token_ids_T[start:end]
            self._embeds[:count] = 0 if embeds_T is None else embeds_T[start:end]
            self._positions[:count] = positions_T[start:end]
            self._runs[: len(runs)] = runs
            self._logit_tokens[: until - done] = wanted_R[done:until] - start
            self._counters[:] = 0
            self._now[[step.TOKENS, step.RUNS, step.LOGITS, step.IS_DECODE]] = count, len(runs), until - done, count == len(runs)
            self._now[step.OUT] = logits_RV.data_ptr() + done * self._vocab * 4
            threads, started = self._pace.choose(count), perf_counter()
            self._now[step.THREADS] = threads
            self._member(self._net, self._work, 0, threads)
            self._pace.took(count, threads, perf_counter() - started)
            if self._now[step.SHOWN]:
                self._shown[self._shown != 0] += count * self._now[step.SHOWN_BYTES]
            done = until
        return logits_RV

    def _embedded(self, batch: Batch) -> "tuple[Tensor | None, NDArray[np.int64] | None]":
        """What stands in the place of tokens' embeddings, and for each token where."""
        embedded = batch.embedded
        if embedded is None:
            return None, None
        hidden = self._shape.hidden_size
        assert embedded.see_until_M is None and embedded.embeds_MX.shape[1] == hidden, "refusal() says so before"
        embeds_ME = embedded.embeds_MX.to(torch.float32).contiguous()
        at_T = np.zeros(len(batch.token_ids_T), np.int64)
        at_T[embedded.tokens_M.numpy()] = embeds_ME.data_ptr() + np.arange(len(embeds_ME)) * hidden * 4
        return embeds_ME, at_T

    def _describe(self, pool: KVPages, table_BP: "NDArray[np.int32]") -> None:
        shape, element = self._shape, pool.k.element_size()
        if pool.k.dtype not in (torch.float32, torch.float16):
            raise ConfigError(f"KV memory is {pool.k.dtype}; the packed decoder reads float32 and float16")
        page_bytes = shape.num_kv_heads * shape.head_dim * pool.page_size * element
        self._now[step.PAGE_SIZE] = pool.page_size
        self._now[step.IS_HALF] = pool.k.dtype == torch.float16
        self._now[step.KEYS], self._now[step.VALUES] = pool.k.data_ptr(), pool.v.data_ptr()
        self._now[step.LAYER_BYTES], self._now[step.PAGE_BYTES] = pool.num_pages * page_bytes, page_bytes
        self._now[step.TABLE], self._now[step.TABLE_BYTES] = table_BP.ctypes.data, table_BP.shape[1] * 4


def _pieces(row_start: list[int]) -> Iterator[tuple[int, int, list[tuple[int, int, int]]]]:
    """Cut a batch into pieces of at most MAX_TOKENS tokens: (first token, end, runs within the piece)."""
    start, at = 0, 0
    runs: list[tuple[int, int, int]] = []
    for row, (first, end) in enumerate(pairwise(row_start)):
        at = first
        while at < end:
            count = min(RUN_TOKENS, end - at, start + MAX_TOKENS - at)
            runs.append((at - start, count, row))
            at += count
            if at - start == MAX_TOKENS:
                yield start, at, runs
                start, runs = at, []
    if runs:
        yield start, at, runs


def _row_bytes(count: int) -> int:
    """Of one quantised row, whole cache lines."""
    return -(-(count // GROUP * ROW_BYTES) // 64) * 64


def _packed(weights: Weights, name: str, kind: str | None = None) -> "tuple[int, NDArray[np.uint16], int]":
    """(bits, blocks, groups) of a matrix, brought to `kind` when it is of another."""
    packed = weights.packed(name)
    if packed is not None and packed.kind in BITS and kind in (None, packed.kind):
        return BITS[packed.kind], pack_rows(packed.kind, packed.rows), packed.shape[1] // GROUP
    dense = weights.tensor(name).float().numpy()
    return 8, pack_rows("Q8_0", quantise_q8_0(dense)), dense.shape[1] // GROUP


def _alike(weights: Weights, names: list[str]) -> "list[tuple[int, NDArray[np.uint16], int]]":
    """Matrices that become one: all of 8 bit when one of them is."""
    parts = [_packed(weights, name) for name in names]
    if len({bits for bits, _, _ in parts}) > 1:
        parts = [_packed(weights, name, kind="Q8_0") for name in names]
    return parts


def _digest() -> str:
    """Of everything that is compiled into the step, and what it was compiled for."""
    files = sorted(Path(__file__).parent.glob("numba_*.py"))
    return f"{INSTRUCTIONS.name} {sha256(b''.join(path.read_bytes() for path in files)).hexdigest()}"


def _serve(member: Any, net: step.Net, work: step.Work, helper: int) -> None:
    """What a helper thread runs until it is told to stop."""
    member(net, work, helper, 0)
