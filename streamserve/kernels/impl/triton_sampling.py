"""Logits to tokens on a GPU: penalties, masks, the sets that top-k, top-p and min-p leave, and the choice itself.

Owns the layout of a slot's sampling words, and scratch memory. Knows no request and no step: every kernel finds what a row
asks for through its slot, and leaves rows of slot -1 (surplus rows of a graph) alone. Nothing here waits for the device.

The choice is by Gumbel-max: the token with the largest logit / temperature + noise is distributed as the softmax. The noise
is Philox (Salmon et al., SC'11; triton.language has it) of the request's seed, the token's place in the answer, and the token
id, so a seed gives the same text whatever else runs. One kernel takes the best of each part of the vocabulary, a second the
best of those.

Sets are found without sorting, as in FlashInfer's sampling (arXiv 2501.01005) and Qrita (arXiv 2602.01518): all three
parameters leave the tokens at or above some logit, and that logit is searched. `_survey` takes maximum, spread and mass of the
row, `_gather` collects the few logits far above the mean, and `_search` narrows a bracket with three pivots per pass, over
those few where they suffice and over the whole row where not. The result is exact, whatever the spread was: a search ends
when its bracket holds a single value. Tokens with exactly the limiting logit all stay (a sort would keep some of them).

Rows of logits may belong to one slot together: those of a known token and of guesses behind it (engine/plan.py, a drafted row).
Each is chosen from as if the guesses before it were right, and `accept` finds how many were.

Shape letters: R rows of logits, V vocabulary, S slots, P sampling words, L lines of token counts.
"""

import struct
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from streamserve.messages import SamplingParams

# Sampling words of a slot. LINE_AND_FILTER: bit 0 says that top-k, top-p or min-p is used; above it the line of token counts
# plus one, 0 for none.
NUM_WORDS = 8
_WORDS = tl.constexpr(NUM_WORDS)
_TEMPERATURE = tl.constexpr(0)  # float32; 0 is greedy
_TOP_K = tl.constexpr(1)
_TOP_P = tl.constexpr(2)  # float32
_MIN_P = tl.constexpr(3)  # float32
_SEED = tl.constexpr(4)  # low half, high half
_NUM_GENERATED = tl.constexpr(6)  # counted up by the device
_LINE_AND_FILTER = tl.constexpr(7)

_LANES = tl.constexpr(512)  # a part of the vocabulary is four runs of so many tokens: Philox yields four numbers
_PART = 4 * 512
_BLOCK = 4096
_LISTED = 128  # logits that _gather may collect from a block
_FAR = tl.constexpr(2.25)  # standard deviations above the mean from where it collects: 1.2 % of a normal distribution
_BY_VALUE = tl.constexpr(6)  # passes that divide a bracket evenly by value; later ones by float representation
_MAX_PASSES = tl.constexpr(40)  # _BY_VALUE + 16 are enough; not-a-numbers must not hang
_INF = tl.constexpr(float("inf"))
MAX_DRAFTS = 63  # guesses of a row that `accept` can look at
_MOST_ROWS = tl.constexpr(MAX_DRAFTS + 1)


class Drafted(NamedTuple):
    """Rows of logits of which some stand behind guesses. `offsets_R`: how many guesses a row stands behind; 0 in the first row of
    a slot, behind which its others follow in order. `fed_R`: the tokens whose logits the rows are: from offset 1 on, guesses.
    Both int32; the second may be shorter than R, as no row with an offset lies behind its end."""

    offsets_R: Tensor
    fed_R: Tensor


def words(sampling: SamplingParams, seed: int, num_generated: int, vocab_size: int, line: int | None = None) -> tuple[int, ...]:
    """The NUM_WORDS int32 words of a slot. `line`: its line of token counts, for penalties."""
    top_k = sampling.top_k if sampling.top_k < vocab_size else 0
    temperature = 0.0 if sampling.is_greedy else sampling.temperature
    mark = 2 * (0 if line is None else line + 1) + is_filtered(sampling, vocab_size)
    low, high = seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF
    fields = (temperature, top_k, sampling.top_p, sampling.min_p, low, high, num_generated, mark)
    return struct.unpack("<8i", struct.pack("<fiffIIii", *fields))


def is_filtered(sampling: SamplingParams, vocab_size: int) -> bool:
    """Whether a threshold must be found for the request's rows."""
    is_used = 0 < sampling.top_k < vocab_size or sampling.top_p < 1.0 or sampling.min_p > 0.0
    return is_used and not sampling.is_greedy


@triton.jit
def _float(words, index: tl.constexpr):
    return tl.load(words + index).to(tl.float32, bitcast=True)


@triton.jit
def _gumbel(bits):
    """32 random bits to -log(-log(u)). Works on v = 1 - u, whose small values, the large results, float32 resolves."""
    v = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    series = v * (1.0 + v * (0.5 + v * 0.33333334))
    return -tl.log(tl.where(v < 0.015625, series, -tl.log(1.0 - v)))


@triton.jit
def _better(value, token, other_value, other_token):
    """Lane by lane the larger value; the first where equal."""
    is_other = other_value > value
    return tl.where(is_other, other_value, value), tl.where(is_other, other_token, token)


@triton.jit
def _score(logits, token, bits, scale, threshold, IS_RANDOM: tl.constexpr, V: tl.constexpr):
    x = tl.load(logits + token, mask=token < V, other=-_INF).to(tl.float32)
    score = x
    if IS_RANDOM:
        score = x * scale + _gumbel(bits)
    return tl.where(x >= threshold, score, -_INF)  # not-a-numbers fail too


@triton.jit
def _best_of_part(logits, part, r0, r1, r2, r3, scale, threshold, IS_RANDOM: tl.constexpr, V: tl.constexpr):
    t0 = part * (4 * _LANES) + tl.arange(0, _LANES)
    t1, t2, t3 = t0 + _LANES, t0 + 2 * _LANES, t0 + 3 * _LANES
    s0 = _score(logits, t0, r0, scale, threshold, IS_RANDOM, V)
    s1 = _score(logits, t1, r1, scale, threshold, IS_RANDOM, V)
    s2 = _score(logits, t2, r2, scale, threshold, IS_RANDOM, V)
    s3 = _score(logits, t3, r3, scale, threshold, IS_RANDOM, V)
    value, token = _better(s0, t0, s1, t1)
    value, token = _better(value, token, s2, t2)
    value, token = _better(value, token, s3, t3)
    best = tl.max(value, 0)
    return best, tl.min(tl.where(value == best, token, V), 0)


@triton.jit(do_not_specialize_on_alignment=["slots_R", "offsets_R"])
def choose_parts(
    logits,
    slots_R,
    params_SP,
    thresholds_R,
    offsets_R,
    best_values,
    best_tokens,
    V: tl.constexpr,
    PARTS: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per row and part of the vocabulary: the best score there, and its token."""
    row = tl.program_id(0)
    part = tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    slot = tl.load(slots_R + row)
    if slot >= 0:
        line = logits + row.to(tl.int64) * V
        threshold = tl.load(thresholds_R + row)
        words = params_SP + slot * _WORDS
        temperature = _float(words, _TEMPERATURE)
        if temperature > 0.0:
            counter = (part * _LANES + tl.arange(0, _LANES)).to(tl.uint32)
            num_before = tl.load(words + _NUM_GENERATED)
            if offsets_R is not None:
                num_before += tl.load(offsets_R + row)
            place = counter * 0 + num_before.to(tl.uint32)
            low = counter * 0 + tl.load(words + _SEED).to(tl.uint32, bitcast=True)
            high = counter * 0 + tl.load(words + _SEED + 1).to(tl.uint32, bitcast=True)
            r0, r1, r2, r3 = tl.philox_impl(counter, place, counter * 0, counter * 0, low, high)
            value, token = _best_of_part(line, part, r0, r1, r2, r3, 1.0 / temperature, threshold, True, V)
        else:
            value, token = _best_of_part(line, part, 0, 0, 0, 0, 1.0, threshold, False, V)
        tl.store(best_values + row * PARTS + part, value)
        tl.store(best_tokens + row * PARTS + part, token)


@triton.jit(do_not_specialize_on_alignment=["slots_R", "out_tokens_R"])
def choose_best(
    best_values,
    best_tokens,
    slots_R,
    params_SP,
    out_tokens_R,
    last_token_S,
    PARTS: tl.constexpr,
    PARTS_UP: tl.constexpr,
    V: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per row: the best of its parts becomes the row's token, and the slot's if there is `last_token_S`."""
    row = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_wait()
    slot = tl.load(slots_R + row)
    if slot >= 0:
        part = tl.arange(0, PARTS_UP)
        values = tl.load(best_values + row * PARTS + part, mask=part < PARTS, other=-_INF)
        tokens = tl.load(best_tokens + row * PARTS + part, mask=part < PARTS, other=V)
        token = tl.min(tl.where(values == tl.max(values, 0), tokens, V), 0)
        token = tl.minimum(token, V - 1)  # of a row without any number a token, too, is looked up next
        tl.store(out_tokens_R + row, token)
        if last_token_S is not None:
            tl.store(last_token_S + slot, token)
            count = params_SP + slot * _WORDS + _NUM_GENERATED
            tl.store(count, tl.load(count) + 1)


@triton.jit(do_not_specialize_on_alignment=["slots_R", "offsets_R", "fed_R", "out_tokens_R"])
def accept(out_tokens_R, slots_R, offsets_R, fed_R, params_SP, last_token_S, lines_LV, V: tl.constexpr):
    """One program per row; the first of a slot does it for all of them. Tokens were chosen: those count up to the first that is
    not the guess behind it. The last of them becomes the slot's token, and its count of tokens, and its line if there are
    lines, grow."""
    first = tl.program_id(0)
    slot = tl.load(slots_R + first)
    if slot >= 0:
        if tl.load(offsets_R + first) == 0:
            i = tl.arange(0, _MOST_ROWS)
            row = first + i
            num_rows = tl.num_programs(0)
            # Behind the rows of this slot come those of others, whose offsets begin at 0 anew: none of them is at its distance.
            is_own = tl.load(offsets_R + row, mask=row < num_rows, other=-1) == i
            has_next = tl.load(offsets_R + row + 1, mask=row + 1 < num_rows, other=-1) == i + 1
            token = tl.load(out_tokens_R + row, mask=is_own, other=-1)
            guess = tl.load(fed_R + row + 1, mask=has_next, other=-2)
            num_right = tl.min(tl.where(has_next & (token == guess), _MOST_ROWS, i), 0)
            words = params_SP + slot * _WORDS
            tl.store(last_token_S + slot, tl.load(out_tokens_R + first + num_right))
            tl.store(words + _NUM_GENERATED, tl.load(words + _NUM_GENERATED) + num_right + 1)
            if lines_LV is not None:
                line = tl.load(words + _LINE_AND_FILTER) // 2 - 1
                if line >= 0:
                    # Atomic: a token may come twice.
                    tl.atomic_add(lines_LV + line.to(tl.int64) * V + token, 2, mask=i <= num_right, sem="relaxed")


@triton.jit
def _up(value):
    """The next larger float32."""
    bits = value.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits) + 1
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def _between(low, high, quarters: tl.constexpr, is_by_value):
    """A pivot: so many quarters of the way, by value or by order of all float32 numbers."""
    a = low.to(tl.int32, bitcast=True)
    b = high.to(tl.int32, bitcast=True)
    a = tl.where(a < 0, a ^ 0x7FFFFFFF, a).to(tl.int64)
    b = tl.where(b < 0, b ^ 0x7FFFFFFF, b).to(tl.int64)
    key = (a + (((b - a) * quarters) >> 2)).to(tl.int32)
    by_order = tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)
    return tl.where(is_by_value, low + (high - low) * (quarters * 0.25), by_order)


@triton.jit
def _mass(source, length, low, best, scale, BLOCK: tl.constexpr):
    """Sum of exp((x - best) * scale) over x >= low."""
    i = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for at in range(0, length, BLOCK):
        x = tl.load(source + at + i, mask=at + i < length, other=-_INF).to(tl.float32)
        sums += tl.where(x >= low, tl.exp((x - best) * scale), 0.0)
    return tl.sum(sums, 0)


@triton.jit
def _search(source, length, low, high, target, best, scale, BY_COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The largest value v among low <= v < high for which the elements >= v reach `target`, in number or in mass.

    They must reach it from `low`, and must not from `high`; if they never reach it, the answer is the smallest value.
    """
    i = tl.arange(0, BLOCK)
    is_done = low >= high
    passes = 0
    while (passes < _MAX_PASSES) & (is_done == 0):
        is_by_value = passes < _BY_VALUE
        p1 = _between(low, high, 1, is_by_value)
        p2 = _between(low, high, 2, is_by_value)
        p3 = _between(low, high, 3, is_by_value)
        sums1 = tl.zeros([BLOCK], tl.float32)
        sums2 = tl.zeros([BLOCK], tl.float32)
        sums3 = tl.zeros([BLOCK], tl.float32)
        least = tl.full([BLOCK], _INF, tl.float32)
        most = tl.full([BLOCK], -_INF, tl.float32)
        for at in range(0, length, BLOCK):
            x = tl.load(source + at + i, mask=at + i < length, other=-_INF).to(tl.float32)
            if BY_COUNT:
                weight = tl.full([BLOCK], 1.0, tl.float32)
            else:
                weight = tl.exp((x - best) * scale)
            sums1 += tl.where(x >= p1, weight, 0.0)
            sums2 += tl.where(x >= p2, weight, 0.0)
            sums3 += tl.where(x >= p3, weight, 0.0)
            is_inside = (x >= low) & (x < high)
            least = tl.minimum(least, tl.where(is_inside, x, _INF))
            most = tl.maximum(most, tl.where(is_inside, x, -_INF))
        first = tl.min(least, 0)
        last = tl.max(most, 0)
        reached1 = tl.sum(sums1, 0)
        reached2 = tl.sum(sums2, 0)
        reached3 = tl.sum(sums3, 0)
        if first >= last:  # one value is left in the bracket; or none at all
            low = tl.where(first == last, first, low)
            is_done = first >= last
        else:
            high = tl.minimum(high, _up(last))
            high = tl.minimum(high, tl.where(reached1 < target, p1, _INF))
            high = tl.minimum(high, tl.where(reached2 < target, p2, _INF))
            high = tl.minimum(high, tl.where(reached3 < target, p3, _INF))
            low = tl.maximum(low, first)
            low = tl.maximum(low, tl.where(reached1 >= target, p1, -_INF))
            low = tl.maximum(low, tl.where(reached2 >= target, p2, -_INF))
            low = tl.maximum(low, tl.where(reached3 >= target, p3, -_INF))
            if BY_COUNT:  # just as many as wanted: any value between them and the next will do
                is_done = (reached1 == target) | (reached2 == target) | (reached3 == target)
        passes += 1
    return low


@triton.jit(do_not_specialize_on_alignment=["slots_R"])
def survey(logits, slots_R, params_SP, stats, V: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row and block: what `stats` [R, 6, BLOCKS] holds of finite logits: maximum, minimum, number, sum, sum of
    squares, and the mass relative to the maximum at the row's temperature."""
    row = tl.program_id(0)
    block = tl.program_id(1)
    slot = tl.load(slots_R + row)
    if slot >= 0:
        words = params_SP + slot * _WORDS
        if tl.load(words + _LINE_AND_FILTER) % 2 == 1:
            i = block * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(logits + row.to(tl.int64) * V + i, mask=i < V, other=-_INF).to(tl.float32)
            is_finite = tl.abs(x) < _INF
            best = tl.max(tl.where(is_finite, x, -_INF), 0)
            number = tl.where(is_finite, x, 0.0)
            below = tl.where(is_finite, x - tl.where(best > -_INF, best, 0.0), 0.0)
            weights = tl.where(is_finite, tl.exp(below / _float(words, _TEMPERATURE)), 0.0)
            out = stats + row * (6 * BLOCKS) + block
            tl.store(out, best)
            tl.store(out + BLOCKS, tl.min(tl.where(is_finite, x, _INF), 0))
            tl.store(out + 2 * BLOCKS, tl.sum(is_finite.to(tl.float32), 0))
            tl.store(out + 3 * BLOCKS, tl.sum(number, 0))
            tl.store(out + 4 * BLOCKS, tl.sum(number * number, 0))
            tl.store(out + 5 * BLOCKS, tl.sum(weights, 0))


@triton.jit
def _stat(stats, row, which: tl.constexpr, other, BLOCKS: tl.constexpr, BLOCKS_UP: tl.constexpr):
    b = tl.arange(0, BLOCKS_UP)
    return tl.load(stats + row * (6 * BLOCKS) + which * BLOCKS + b, mask=b < BLOCKS, other=other)


@triton.jit
def _min_p_limit(words, best):
    """The lowest logit that min-p leaves; -inf without min-p."""
    min_p = _float(words, _MIN_P)
    return tl.where(min_p > 0.0, best + _float(words, _TEMPERATURE) * tl.log(tl.maximum(min_p, 1e-30)), -_INF)


@triton.jit(do_not_specialize_on_alignment=["slots_R"])
def gather(
    logits,
    slots_R,
    params_SP,
    stats,
    floors_R,
    counts,
    listed,
    V: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_UP: tl.constexpr,
    BLOCK: tl.constexpr,
    LISTED: tl.constexpr,
):
    """One program per row and block: its logits >= the row's floor, up to LISTED of them, and how many there are.

    A block is spread over the vocabulary in runs of 32 tokens, because frequent tokens tend to have neighbouring ids.
    """
    row = tl.program_id(0)
    block = tl.program_id(1)
    slot = tl.load(slots_R + row)
    if slot >= 0:
        words = params_SP + slot * _WORDS
        if tl.load(words + _LINE_AND_FILTER) % 2 == 1:
            best = tl.max(_stat(stats, row, 0, -_INF, BLOCKS, BLOCKS_UP), 0)
            number = tl.maximum(tl.sum(_stat(stats, row, 2, 0.0, BLOCKS, BLOCKS_UP), 0), 1.0)
            mean = tl.sum(_stat(stats, row, 3, 0.0, BLOCKS, BLOCKS_UP), 0) / number
            variance = tl.sum(_stat(stats, row, 4, 0.0, BLOCKS, BLOCKS_UP), 0) / number - mean * mean
            floor = tl.minimum(mean + _FAR * tl.sqrt(tl.maximum(variance, 0.0)), best)
            limit = _min_p_limit(words, best)
            # Without top-k, the mass of all that min-p leaves is needed: then that is what is listed.
            is_limit = (limit > floor) | ((limit > -_INF) & (tl.load(words + _TOP_K) == 0))
            floor = tl.where(is_limit, limit, floor)
            i = tl.arange(0, BLOCK)
            token = ((i // 32) * BLOCKS + block) * 32 + i % 32
            x = tl.load(logits + row.to(tl.int64) * V + token, mask=token < V, other=-_INF)
            is_listed = (x.to(tl.float32) >= floor) & (token < V)
            place = tl.cumsum(is_listed.to(tl.int32), 0) - 1
            count = tl.sum(is_listed.to(tl.int32), 0)
            out = listed + (row * BLOCKS + block).to(tl.int64) * LISTED
            tl.store(out + place, x, mask=is_listed & (place < LISTED))
            rest = tl.arange(0, LISTED)
            tl.store(out + rest, (rest * 0 - _INF).to(x.dtype), mask=rest >= count)
            tl.store(counts + row * BLOCKS + block, count)
            if block == 0:
                tl.store(floors_R + row, floor)


@triton.jit
def _threshold(
    logits,
    row,
    words,
    best,
    stats,
    floors_R,
    counts,
    listed,
    V: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_UP: tl.constexpr,
    BLOCK: tl.constexpr,
    LISTED: tl.constexpr,
):
    scale = 1.0 / _float(words, _TEMPERATURE)
    top_k = tl.load(words + _TOP_K)
    top_p = _float(words, _TOP_P)
    limit = _min_p_limit(words, best)
    # Does the list hold all that can be left?
    b = tl.arange(0, BLOCKS_UP)
    found = tl.load(counts + row * BLOCKS + b, mask=b < BLOCKS, other=0)
    num_found = tl.sum(found, 0)
    low = tl.load(floors_R + row)
    source = listed + (row * BLOCKS).to(tl.int64) * LISTED
    length = BLOCKS * LISTED
    mass = 0.0
    is_enough = (low <= limit) | ((top_k > 0) & (num_found >= top_k))
    if (top_k == 0) & (is_enough == 0):
        bests = _stat(stats, row, 0, -_INF, BLOCKS, BLOCKS_UP)
        mass = tl.sum(_stat(stats, row, 5, 0.0, BLOCKS, BLOCKS_UP) * tl.exp((bests - best) * scale), 0)
        is_enough = _mass(source, length, low, best, scale, BLOCK) >= top_p * mass
    if (is_enough == 0) | (tl.max(found, 0) > LISTED):
        low = tl.min(_stat(stats, row, 1, _INF, BLOCKS, BLOCKS_UP), 0)
        source = logits + row.to(tl.int64) * V
        length = V
        num_found = V
    high = _up(best)
    threshold = limit
    if (top_k > 0) & (top_k <= num_found):
        threshold = tl.maximum(_search(source, length, low, high, top_k.to(tl.float32), best, scale, True, BLOCK), limit)
    if top_p < 1.0:
        low = tl.maximum(low, threshold)
        if mass == 0.0:
            mass = _mass(source, length, low, best, scale, BLOCK)
        threshold = _search(source, length, low, high, top_p * mass, best, scale, False, BLOCK)
    return tl.minimum(threshold, best)


@triton.jit(do_not_specialize_on_alignment=["slots_R"])
def find_thresholds(
    logits,
    slots_R,
    params_SP,
    stats,
    floors_R,
    counts,
    listed,
    thresholds_R,
    V: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_UP: tl.constexpr,
    BLOCK: tl.constexpr,
    LISTED: tl.constexpr,
):
    """One program per row: the lowest logit that top-k and min-p, then top-p, leave; -inf where nothing is asked."""
    row = tl.program_id(0)
    slot = tl.load(slots_R + row)
    if slot >= 0:
        words = params_SP + slot * _WORDS
        threshold = -_INF
        if tl.load(words + _LINE_AND_FILTER) % 2 == 1:
            best = tl.max(_stat(stats, row, 0, -_INF, BLOCKS, BLOCKS_UP), 0)
            if best > -_INF:
                threshold = _threshold(
                    logits, row, words, best, stats, floors_R, counts, listed, V, BLOCKS, BLOCKS_UP, BLOCK, LISTED
                )
        tl.store(thresholds_R + row, threshold)


@triton.jit(do_not_specialize_on_alignment=["slots_R", "offsets_R", "fed_R"])
def add_penalties(logits, slots_R, params_SP, lines_LV, penalties_L4, offsets_R, fed_R, V: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row and block. A line counts 2 for each time a token was generated, and 1 if the prompt has it; the guesses
    that a row stands behind count as generated."""
    row = tl.program_id(0)
    slot = tl.load(slots_R + row)
    if slot >= 0:
        line = tl.load(params_SP + slot * _WORDS + _LINE_AND_FILTER) // 2 - 1
        if line >= 0:
            repetition = tl.load(penalties_L4 + line * 4)
            frequency = tl.load(penalties_L4 + line * 4 + 1)
            presence = tl.load(penalties_L4 + line * 4 + 2)
            i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
            seen = tl.load(lines_LV + line.to(tl.int64) * V + i, mask=i < V, other=0)
            if offsets_R is not None:
                for back in range(0, tl.load(offsets_R + row)):
                    seen += tl.where(i == tl.load(fed_R + row - back), 2, 0)
            place = logits + row.to(tl.int64) * V + i
            x = tl.load(place, mask=(i < V) & (seen > 0), other=0.0).to(tl.float32)
            x = tl.where(x > 0, x / repetition, x * repetition)
            x -= frequency * (seen // 2).to(tl.float32)
            x -= tl.where(seen > 1, presence, 0.0)
            tl.store(place, x.to(logits.dtype.element_ty), mask=(i < V) & (seen > 0))


@triton.jit(do_not_specialize_on_alignment=["slots_R", "out_tokens_R"])
def count_tokens(out_tokens_R, slots_R, params_SP, lines_LV, V: tl.constexpr):
    """One program per row: its new token goes into its line."""
    row = tl.program_id(0)
    slot = tl.load(slots_R + row)
    if slot >= 0:
        line = tl.load(params_SP + slot * _WORDS + _LINE_AND_FILTER) // 2 - 1
        if line >= 0:
            place = lines_LV + line.to(tl.int64) * V + tl.load(out_tokens_R + row)
            tl.store(place, tl.load(place) + 2)


@triton.jit(do_not_specialize_on_alignment=["rows_G", "masks_GW"])
def apply_masks(logits, rows_G, masks_GW, V: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr):
    """One program per mask and block. A mask has a bit for every token that may come."""
    row = tl.load(rows_G + tl.program_id(0))
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(masks_GW + tl.program_id(0).to(tl.int64) * WORDS + i // 32, mask=i < V, other=-1)
    place = logits + row.to(tl.int64) * V + i
    tl.store(place, (i * 0 - _INF).to(logits.dtype.element_ty), mask=(i < V) & ((word >> (i % 32)) & 1 == 0))


class SamplingKernels:
    """Launches the kernels for logits [R, V] of one vocabulary (contiguous, float32 or bfloat16), R up to `max_rows`.

    Throughout: slots_R int32, -1 for a row to leave alone; params_SP int32 [slots, NUM_WORDS], see `words`.
    """

    def __init__(self, vocab_size: int, max_rows: int, device: torch.device, *, pdl: bool = False) -> None:
        self._vocab_size = vocab_size
        self._pdl = pdl
        self._pdl_option = {"launch_pdl": True} if pdl else {}
        self._parts = triton.cdiv(vocab_size, _PART)
        self._blocks = triton.cdiv(vocab_size, _BLOCK)
        self._best_values = torch.empty((max_rows, self._parts), device=device)
        self._best_tokens = torch.empty((max_rows, self._parts), dtype=torch.int32, device=device)
        self._no_thresholds_R = torch.full((max_rows,), float("-inf"), device=device)
        self._thresholds_R = torch.empty(max_rows, device=device)
        self._stats = torch.empty((max_rows, 6, self._blocks), device=device)
        self._floors_R = torch.empty(max_rows, device=device)
        self._counts = torch.empty((max_rows, self._blocks), dtype=torch.int32, device=device)
        self._listed = torch.empty(max_rows * self._blocks * _LISTED, device=device)  # seen as the logits' type

    def choose(
        self,
        logits_RV: Tensor,
        slots_R: Tensor,
        params_SP: Tensor,
        out_tokens_R: Tensor,
        last_token_S: Tensor | None,
        thresholds_R: Tensor | None = None,
        drafted: Drafted | None = None,
    ) -> None:
        """One token per row, into out_tokens_R and into its slot's place in last_token_S (both int32); counts it in params_SP.

        Only tokens with a logit >= the row's threshold may come. Two launches; can be captured in a graph. Of `drafted` rows the
        tokens are chosen, and no more than that: last_token_S is None then, and `accept` must follow."""
        assert (last_token_S is None) == (drafted is not None)
        rows = self._num_rows(logits_RV)
        parts: Any = choose_parts
        best: Any = choose_best
        parts[(rows, self._parts)](
            logits_RV,
            slots_R,
            params_SP,
            self._no_thresholds_R if thresholds_R is None else thresholds_R,
            None if drafted is None else drafted.offsets_R,
            self._best_values,
            self._best_tokens,
            V=self._vocab_size,
            PARTS=self._parts,
            PDL=self._pdl,
            num_warps=4,
            **self._pdl_option,
        )
        best[(rows,)](
            self._best_values,
            self._best_tokens,
            slots_R,
            params_SP,
            out_tokens_R,
            last_token_S,
            PARTS=self._parts,
            PARTS_UP=triton.next_power_of_2(self._parts),
            V=self._vocab_size,
            PDL=self._pdl,
            num_warps=1,
            **self._pdl_option,
        )

    def accept(
        self,
        out_tokens_R: Tensor,
        slots_R: Tensor,
        params_SP: Tensor,
        last_token_S: Tensor,
        drafted: Drafted,
        lines_LV: Tensor | None,
    ) -> None:
        """Of the tokens just chosen, take those that count: into last_token_S, params_SP and, if given, their lines."""
        kernel: Any = accept
        kernel[(len(out_tokens_R),)](
            out_tokens_R, slots_R, *drafted, params_SP, last_token_S, lines_LV, V=self._vocab_size, num_warps=1
        )

    def thresholds(self, logits_RV: Tensor, slots_R: Tensor, params_SP: Tensor) -> Tensor:
        """Per row the lowest logit that its top-k, top-p and min-p leave. Good until the next call."""
        rows = self._num_rows(logits_RV)
        surveying: Any = survey
        gathering: Any = gather
        finding: Any = find_thresholds
        surveying[(rows, self._blocks)](
            logits_RV, slots_R, params_SP, self._stats, V=self._vocab_size, BLOCKS=self._blocks, BLOCK=_BLOCK, num_warps=8
        )
        listed = self._listed.view(logits_RV.dtype)
        state = (self._stats, self._floors_R, self._counts, listed)
        sizes = {
            "V": self._vocab_size,
            "BLOCKS": self._blocks,
            "BLOCKS_UP": triton.next_power_of_2(self._blocks),
            "BLOCK": _BLOCK,
            "LISTED": _LISTED,
        }
        gathering[(rows, self._blocks)](logits_RV, slots_R, params_SP, *state, **sizes, num_warps=8)
        finding[(rows,)](logits_RV, slots_R, params_SP, *state, self._thresholds_R, **sizes, num_warps=16)
        return self._thresholds_R

    def penalise(
        self,
        logits_RV: Tensor,
        slots_R: Tensor,
        params_SP: Tensor,
        lines_LV: Tensor,
        penalties_L4: Tensor,
        drafted: Drafted | None = None,
    ) -> None:
        """Repetition, frequency and presence penalties (penalties_L4, float32, in this order) in place, for rows with a line
        in lines_LV (int32: 2 for each time the token was generated, 1 if the prompt has it)."""
        rows = self._num_rows(logits_RV)
        kernel: Any = add_penalties
        kernel[(rows, self._blocks)](
            logits_RV,
            slots_R,
            params_SP,
            lines_LV,
            penalties_L4,
            *(drafted or (None, None)),
            V=self._vocab_size,
            BLOCK=_BLOCK,
            num_warps=8,
        )

    def count(self, out_tokens_R: Tensor, slots_R: Tensor, params_SP: Tensor, lines_LV: Tensor) -> None:
        """Count the tokens just chosen in their lines."""
        kernel: Any = count_tokens
        kernel[(len(out_tokens_R),)](out_tokens_R, slots_R, params_SP, lines_LV, V=self._vocab_size, num_warps=1)

    def mask(self, logits_RV: Tensor, rows_G: Tensor, masks_GW: Tensor) -> None:
        """Forbid tokens of these rows in place. Both int32; a mask has, from bit 0 of its first word on, a bit for each token
        that may come."""
        self._num_rows(logits_RV)
        num_masks, words = masks_GW.shape
        assert len(rows_G) == num_masks and words == triton.cdiv(self._vocab_size, 32) and masks_GW.is_contiguous()
        kernel: Any = apply_masks
        grid = (num_masks, self._blocks)
        kernel[grid](logits_RV, rows_G, masks_GW, V=self._vocab_size, WORDS=words, BLOCK=_BLOCK, num_warps=8)

    def _num_rows(self, logits_RV: Tensor) -> int:
        rows, columns = logits_RV.shape
        assert columns == self._vocab_size and rows <= len(self._best_values) and logits_RV.is_contiguous()
        return rows
