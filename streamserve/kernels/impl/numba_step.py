"""One step of the packed decoder as native code: every thread of the team runs `member`, layer after layer.

Within a layer the work goes in phases (numba_threads.py), each of which reads what earlier ones wrote:

    norm     RMS norm of x, quantised                              items: 4 tokens
    qkv      fused product                                         items: 32 channels
    keys     bias, norms and RoPE of q and k; k and v into pages   items: run of tokens x key/value head
    attend   attention, quantised                                  items: run of tokens x key/value head
    out      product, added to x                                   items: 32 channels
    norm     RMS norm of x, quantised                              items: 4 tokens
    mlp      gate and up products, silu(gate) * up, quantised      items: 32 channels of each
    down     product, added to x                                   items: 32 channels

Where the caller asks for it, the first norm of a layer copies the x that it reads (SHOWN), and behind the last layer a phase of
its own does.

A step of decode rows alone skips `keys`: no token needs another one's key, so `attend` writes its own. Knows nothing of
torch; all memory is given by the caller (Net: fixed weights, Work: memory of the step, `now`: numbers of the step).

A run is up to 16 tokens of one row of the batch: runs[i] = (first token, tokens, row).
"""

# mypy: disable-error-code="import-untyped,untyped-decorator"

import math
from typing import Any, NamedTuple

import numpy as np
from numba import njit

from streamserve.kernels.impl.numba_attention import attend_run
from streamserve.kernels.impl.numba_ir import LANES, constant, load_f32, load_i32, load_i64, native, store_f32
from streamserve.kernels.impl.numba_rows import (
    add_to,
    embed_row,
    gate_group,
    norm_head,
    norm_row,
    quantise_row,
    rope_head,
    store_head,
)
from streamserve.kernels.impl.numba_threads import SEMAPHORE_BYTES, close_gate, enter, leave, open_gate, put, take, wait
from streamserve.kernels.impl.numba_tiles import BLOCK, ROW_BYTES, block_bytes, block_product

GROUP = 32
ITEM_BLOCKS = 2  # blocks of 16 channels in an item
NORM_TOKENS = 4
_REPLACE, _ADD, _EIGHT, _FIRST_PHASE, _NOWHERE = (constant(value) for value in (0, 1, 8, 0, 0))
GATED_ROWS = 8
PHASES_PER_LAYER, PHASES_BESIDE = 8, 4

# words of `now`
TOKENS, RUNS, LOGITS, IS_DECODE, PAGE_SIZE, IS_HALF, KEYS, VALUES, LAYER_BYTES, PAGE_BYTES, TABLE, TABLE_BYTES, OUT = range(13)
# int64 [layers + 1]: where to copy x as it is before each layer, and behind the last, 0: nowhere; bytes from row to row there
SHOWN, SHOWN_BYTES = 13, 14
THREADS = 15  # of this step
NOW_WORDS = 16

# columns of Net.layers: address and bits of each matrix
QKV, ATTENTION_OUT, GATE_UP, DOWN = 0, 2, 4, 6
LAYER_WORDS = 8


class Matrix(NamedTuple):
    """A packed matrix (layout: numba_tiles.py)."""

    address: int
    bits: int
    groups: int  # of inputs
    channels: int


class Rows(NamedTuple):
    """Rows of a buffer."""

    address: int
    stride: int  # bytes from row to row


class Net(NamedTuple):
    """Addresses and numbers of the network. Matrices: see LAYER_WORDS; the rest is float32, a row per layer."""

    layers: int  # int64 [layers, LAYER_WORDS]
    attention_norm: int
    mlp_norm: int
    bias: int  # of q, k and v; 0 when there is none
    q_norm: int  # 0 when there is none
    k_norm: int
    last_norm: int
    freq: int  # of RoPE
    rope_factor: float
    eps: float
    num_layers: int
    hidden: int
    heads: int
    kv_heads: int
    dim: int
    inner: int
    vocab: int  # rounded up to whole blocks
    embedding: int  # 8 bit
    head: int  # 8 bit


class Work(NamedTuple):
    """Addresses of the memory of a step; [tokens, ...] unless said otherwise. The caller keeps it alive."""

    now: int  # int64 [NOW_WORDS]
    token_ids: int  # int64
    embeds: int  # int64: where a token has what stands in the place of its embedding, float32 [hidden]; 0: it has its own
    positions: int  # int64
    logit_tokens: int  # int64 [logits]: which of the tokens
    runs: int  # int64 [runs, 3]
    x: int  # float32 [., hidden]
    qkv: int  # float32 [., (heads + 2 * kv_heads) * dim]
    cos: int  # float32 [., dim / 2]
    sin: int
    rows: Rows  # what goes into a product: quantised rows of up to max(hidden, heads * dim) numbers
    inner_rows: Rows  # the same, of `inner` numbers
    scratch: int  # [threads, scratch_bytes]
    scratch_bytes: int
    counters: int  # int64 [phases, COUNTER_WORDS]
    gate: int
    semaphores: int  # [helpers, SEMAPHORE_BYTES]


@native
def _embed(net: Net, work: Work, phase: int) -> None:
    """Token embeddings, and the angles of RoPE."""
    num_tokens = load_i64(work.now, TOKENS)
    items = (num_tokens + NORM_TOKENS - 1) // NORM_TOKENS
    half = net.dim // 2
    item = take(work.counters, phase, items)
    while item >= 0:
        for t in range(item * NORM_TOKENS, min(num_tokens, (item + 1) * NORM_TOKENS)):
            embeds, x = load_i64(work.embeds, t), work.x + t * net.hidden * 4
            if embeds:
                for i in range(net.hidden):
                    store_f32(x, i, load_f32(embeds, i))
            else:
                embed_row(net.embedding, net.hidden // GROUP, load_i64(work.token_ids, t), x)
            position = np.float32(load_i64(work.positions, t))
            for i in range(half):
                angle = np.float64(position * load_f32(net.freq, i))  # rounded to float32 first, as other engines do
                store_f32(work.cos, t * half + i, np.float32(math.cos(angle) * net.rope_factor))
                store_f32(work.sin, t * half + i, np.float32(math.sin(angle) * net.rope_factor))
        put(work.counters, phase)
        item = take(work.counters, phase, items)
    wait(work.counters, phase, items)


@native
def _shown(work: Work, layer: int) -> int:
    """Where x before this layer is to be copied; 0: nowhere."""
    table = load_i64(work.now, SHOWN)
    return load_i64(table, layer) if table else 0


@native
def _copy_row(net: Net, work: Work, t: int, to: int) -> None:
    x, at = work.x + t * net.hidden * 4, to + t * load_i64(work.now, SHOWN_BYTES)
    for i in range(net.hidden):
        store_f32(at, i, load_f32(x, i))


@native
def _show(net: Net, work: Work, phase: int, to: int) -> None:
    """x, copied."""
    num_tokens = load_i64(work.now, TOKENS)
    items = (num_tokens + NORM_TOKENS - 1) // NORM_TOKENS
    item = take(work.counters, phase, items)
    while item >= 0:
        for t in range(item * NORM_TOKENS, min(num_tokens, (item + 1) * NORM_TOKENS)):
            _copy_row(net, work, t, to)
        put(work.counters, phase)
        item = take(work.counters, phase, items)
    wait(work.counters, phase, items)


@native
def _norm(net: Net, work: Work, phase: int, weight: int, bits: int, shown: int) -> None:
    """`shown`: where x goes as well; 0: nowhere."""
    num_tokens = load_i64(work.now, TOKENS)
    items = (num_tokens + NORM_TOKENS - 1) // NORM_TOKENS
    item = take(work.counters, phase, items)
    while item >= 0:
        for t in range(item * NORM_TOKENS, min(num_tokens, (item + 1) * NORM_TOKENS)):
            norm_row(
                bits, work.x + t * net.hidden * 4, weight, net.hidden // GROUP, net.eps, work.rows.address + t * work.rows.stride
            )
            if shown:
                _copy_row(net, work, t, shown)
        put(work.counters, phase)
        item = take(work.counters, phase, items)
    wait(work.counters, phase, items)


@native
def _last_norm(net: Net, work: Work, phase: int) -> None:
    """Of the tokens whose logits are wanted."""
    items = load_i64(work.now, LOGITS)
    item = take(work.counters, phase, items)
    while item >= 0:
        x = work.x + load_i64(work.logit_tokens, item) * net.hidden * 4
        norm_row(_EIGHT, x, net.last_norm, net.hidden // GROUP, net.eps, work.rows.address + item * work.rows.stride)
        put(work.counters, phase)
        item = take(work.counters, phase, items)
    wait(work.counters, phase, items)


@native
def _others_blocks(work: Work, item_blocks: int) -> int:
    """How many blocks of a matrix lie between a thread's item and its next one, while all threads are as fast."""
    others: int = load_i64(work.now, THREADS) - 1
    return others * item_blocks


@native
def _product(work: Work, phase: int, matrix: Matrix, rows: Rows, num_rows: int, out: Rows, adds: int) -> None:
    """out = rows times matrix, or out += it."""
    blocks = matrix.channels // BLOCK
    items = (blocks + ITEM_BLOCKS - 1) // ITEM_BLOCKS
    size = block_bytes(matrix.bits, matrix.groups)
    item = take(work.counters, phase, items)
    while item >= 0:
        end = min(blocks, (item + 1) * ITEM_BLOCKS)
        for n in range(item * ITEM_BLOCKS, end):
            weights, to = matrix.address + n * size, out.address + n * BLOCK * 4
            following = weights + size + (_others_blocks(work, ITEM_BLOCKS) * size if n + 1 == end else 0)
            block_product(
                matrix.bits, weights, matrix.groups, rows.address, rows.stride, num_rows, to, out.stride, adds, following
            )
        put(work.counters, phase)
        item = take(work.counters, phase, items)
    wait(work.counters, phase, items)


@native
def _gated_product(work: Work, thread: int, phase: int, matrix: Matrix, num_rows: int, out_bits: int) -> None:
    """32 gates and their 32 ups for a few rows at a time, then the gate: what leaves is one quantised group per row."""
    both = work.scratch + thread * work.scratch_bytes  # float32 [GATED_ROWS, 64]
    both_bytes = 2 * GROUP * 4
    items = matrix.channels // (2 * GROUP)
    size = block_bytes(matrix.bits, matrix.groups)
    item = take(work.counters, phase, items)
    while item >= 0:
        for t in range(0, num_rows, GATED_ROWS):
            count, rows = min(GATED_ROWS, num_rows - t), work.rows.address + t * work.rows.stride
            for n in range(2 * ITEM_BLOCKS):
                weights, to = matrix.address + (item * 2 * ITEM_BLOCKS + n) * size, both + n * BLOCK * 4
                following = weights + size + (_others_blocks(work, 2 * ITEM_BLOCKS) * size if n + 1 == 2 * ITEM_BLOCKS else 0)
                block_product(
                    matrix.bits, weights, matrix.groups, rows, work.rows.stride, count, to, both_bytes, _REPLACE, following
                )
            for r in range(count):
                at = work.inner_rows.address + (t + r) * work.inner_rows.stride + item * ROW_BYTES
                gate_group(out_bits, both + r * both_bytes, at)
        put(work.counters, phase)
        item = take(work.counters, phase, items)
    wait(work.counters, phase, items)


@native
def _keys_of_run(net: Net, work: Work, layer: int, run: int, kv_head: int) -> None:
    """Bias, norms and RoPE of the heads of one group, in place; its keys and values go to their pages."""
    now, dim, group = work.now, net.dim, net.heads // net.kv_heads
    is_half, page_size = load_i64(now, IS_HALF) != 0, load_i64(now, PAGE_SIZE)
    element, half_vectors = 2 if is_half else 4, dim // 2 // LANES
    width = (net.heads + 2 * net.kv_heads) * dim * 4
    q_at, k_at = kv_head * group * dim * 4, (net.heads + kv_head) * dim * 4
    v_at = k_at + net.kv_heads * dim * 4
    into_layer = layer * load_i64(now, LAYER_BYTES) + kv_head * dim * page_size * element
    keys, values = load_i64(now, KEYS) + into_layer, load_i64(now, VALUES) + into_layer
    table = load_i64(now, TABLE) + load_i64(work.runs, 3 * run + 2) * load_i64(now, TABLE_BYTES)
    first = load_i64(work.runs, 3 * run)
    for t in range(first, first + load_i64(work.runs, 3 * run + 1)):
        qkv = work.qkv + t * width
        if net.bias:
            bias = net.bias + layer * width
            add_to(qkv + q_at, bias + q_at, group * dim // LANES)
            add_to(qkv + k_at, bias + k_at, dim // LANES)
            add_to(qkv + v_at, bias + v_at, dim // LANES)
        cos, sin = work.cos + t * dim * 2, work.sin + t * dim * 2
        for g in range(group):
            q = qkv + q_at + g * dim * 4
            if net.q_norm:
                norm_head(q, net.q_norm + layer * dim * 4, dim // LANES, net.eps)
            rope_head(q, cos, sin, half_vectors)
        if net.k_norm:
            norm_head(qkv + k_at, net.k_norm + layer * dim * 4, dim // LANES, net.eps)
        rope_head(qkv + k_at, cos, sin, half_vectors)
        position = load_i64(work.positions, t)
        page, slot = load_i32(table, position // page_size) * load_i64(now, PAGE_BYTES), position % page_size
        store_head(is_half, qkv + k_at, keys + page + slot * element, dim, page_size)
        store_head(is_half, qkv + v_at, values + page + slot * dim * element, dim, 1)


@native
def _keys(net: Net, work: Work, phase: int, layer: int) -> None:
    items = load_i64(work.now, RUNS) * net.kv_heads
    item = take(work.counters, phase, items)
    while item >= 0:
        _keys_of_run(net, work, layer, item // net.kv_heads, item % net.kv_heads)
        put(work.counters, phase)
        item = take(work.counters, phase, items)
    wait(work.counters, phase, items)


@native
def _attend(net: Net, work: Work, thread: int, phase: int, layer: int, out_bits: int) -> None:
    now, dim, group = work.now, net.dim, net.heads // net.kv_heads
    is_half, page_size = load_i64(now, IS_HALF) != 0, load_i64(now, PAGE_SIZE)
    width = (net.heads + 2 * net.kv_heads) * dim * 4
    head_bytes = dim // GROUP * ROW_BYTES
    scratch = work.scratch + thread * work.scratch_bytes
    items = load_i64(now, RUNS) * net.kv_heads
    item = take(work.counters, phase, items)
    while item >= 0:
        run, kv_head = item // net.kv_heads, item % net.kv_heads
        if load_i64(now, IS_DECODE):
            _keys_of_run(net, work, layer, run, kv_head)
        first, count, row = load_i64(work.runs, 3 * run), load_i64(work.runs, 3 * run + 1), load_i64(work.runs, 3 * run + 2)
        into_layer = layer * load_i64(now, LAYER_BYTES) + kv_head * dim * page_size * (2 if is_half else 4)
        result = attend_run(
            work.qkv + first * width + kv_head * group * dim * 4,
            width,
            count,
            group,
            dim,
            load_i64(work.positions, first),
            is_half,
            page_size,
            load_i64(now, TABLE) + row * load_i64(now, TABLE_BYTES),
            load_i64(now, KEYS) + into_layer,
            load_i64(now, VALUES) + into_layer,
            load_i64(now, PAGE_BYTES),
            scratch,
        )
        for r in range(count * group):
            at = work.rows.address + (first + r // group) * work.rows.stride + (kv_head * group + r % group) * head_bytes
            quantise_row(out_bits, result + r * dim * 4, dim // GROUP, at)
        put(work.counters, phase)
        item = take(work.counters, phase, items)
    wait(work.counters, phase, items)


@native
def _matrix(net: Net, layer: int, column: int, inputs: int, channels: int) -> Matrix:
    at = net.layers + layer * LAYER_WORDS * 8
    return Matrix(load_i64(at, column), load_i64(at, column + 1), inputs // GROUP, channels)


@njit(inline="always")
def _layer(net: Net, work: Work, thread: int, layer: int) -> None:
    num_tokens, phase = load_i64(work.now, TOKENS), 1 + layer * PHASES_PER_LAYER
    heads_width = (net.heads + 2 * net.kv_heads) * net.dim
    x = Rows(work.x, net.hidden * 4)
    qkv = _matrix(net, layer, QKV, net.hidden, heads_width)
    attention_out = _matrix(net, layer, ATTENTION_OUT, net.heads * net.dim, net.hidden)
    gate_up = _matrix(net, layer, GATE_UP, net.hidden, 2 * net.inner)
    down = _matrix(net, layer, DOWN, net.inner, net.hidden)
    _norm(net, work, phase, net.attention_norm + layer * net.hidden * 4, qkv.bits, _shown(work, layer))
    _product(work, phase + 1, qkv, work.rows, num_tokens, Rows(work.qkv, heads_width * 4), _REPLACE)
    if not load_i64(work.now, IS_DECODE):
        _keys(net, work, phase + 2, layer)
    _attend(net, work, thread, phase + 3, layer, attention_out.bits)
    _product(work, phase + 4, attention_out, work.rows, num_tokens, x, _ADD)
    _norm(net, work, phase + 5, net.mlp_norm + layer * net.hidden * 4, gate_up.bits, _NOWHERE)
    _gated_product(work, thread, phase + 6, gate_up, num_tokens, down.bits)
    _product(work, phase + 7, down, work.inner_rows, num_tokens, x, _ADD)


@njit(inline="always")
def _step(net: Net, work: Work, thread: int) -> None:
    _embed(net, work, _FIRST_PHASE)
    for layer in range(net.num_layers):
        _layer(net, work, thread, layer)
    num_logits, phase = load_i64(work.now, LOGITS), 1 + net.num_layers * PHASES_PER_LAYER
    shown = _shown(work, net.num_layers)
    if shown:
        _show(net, work, phase + 2, shown)
    if num_logits:
        _last_norm(net, work, phase)
        head = Matrix(net.head, _EIGHT, net.hidden // GROUP, net.vocab)
        _product(work, phase + 1, head, work.rows, num_logits, Rows(load_i64(work.now, OUT), net.vocab * 4), _REPLACE)


def compile_member(sources: str) -> Any:
    """What every thread of the team runs: member(net, work, thread, num_threads).

    Thread 0 leads: it runs one step with whoever comes and returns. Others are helpers and return when told to stop.
    The result is kept in numba's cache folder. numba looks at the bytecode and closure of this one function to know whether
    what it kept still holds; `sources`, a digest of all files that end up in it, makes it notice changes elsewhere.
    """

    def member(net: Net, work: Work, thread: int, num_threads: int) -> None:
        if not sources:
            return
        if thread == 0:
            open_gate(work.gate, work.semaphores, num_threads - 1)
            _step(net, work, thread)
            close_gate(work.gate)
            return
        order = enter(work.gate, work.semaphores + (thread - 1) * SEMAPHORE_BYTES)
        while order >= 0:
            if order > 0:
                _step(net, work, thread)
                leave(work.gate)
            order = enter(work.gate, work.semaphores + (thread - 1) * SEMAPHORE_BYTES)

    try:
        return njit(nogil=True, error_model="numpy", cache=True)(member)
    except RuntimeError:  # neither the package's folder nor the user's cache folder can be written
        return njit(nogil=True, error_model="numpy")(member)
