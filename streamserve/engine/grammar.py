"""Grammars of answers: compiled off the loop within limits, kept while they are used, and asked for masks.

Owns llguidance, its view of the vocabulary, the cache of compiled grammars, a thread that compiles, one at a time, and those that
fill masks. Knows no request and no step; engine/guide.py follows one answer through its grammar.

The masks of a step are one call of llguidance, which divides them among threads of its own. The loop waits for it, since the
device does too; a call that would take long is made in another thread.

A grammar that asks for too much (of branches, of symbols, of the lexer) is refused by llguidance's own limits, which bound the
time of a compilation too: about two seconds in the worst case known. llguidance works with the GIL released.
"""

import os
import sys
from asyncio import Future, gather, get_running_loop, shield, wait_for
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future as ThreadFuture
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter, thread_time
from typing import TYPE_CHECKING, Protocol

import numpy as np

from streamserve.engine.guide import Guide, Matcher
from streamserve.engine.plan import Masks
from streamserve.errors import InvalidRequest, QueueFull

if TYPE_CHECKING:  # loaded by the thread that compiles: a server that is never asked for a grammar does without
    from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer


@dataclass(frozen=True, slots=True)
class GrammarLimits:
    """What a grammar may cost. `max_bytes` of its text; `compile_s` that a request waits for it; `max_compiling` that wait at
    once; `max_cached` compiled ones that are kept, with `max_cached_bytes` of text; llguidance's own limits behind them: symbols
    of the grammar, work of the lexer at first and per token, its states (of about 2 kB), and work of the parser per token.

    Every schema in JSONSchemaBench that compiles at all does so within a tenth of these.
    """

    max_bytes: int = 2 << 20
    compile_s: float = 20.0
    max_compiling: int = 256
    max_cached: int = 128
    max_cached_bytes: int = 64 << 20
    max_symbols: int = 32_000
    lexer_fuel: int = 1_000_000
    lexer_fuel_per_token: int = 200_000
    max_lexer_states: int = 20_000
    max_items_per_token: int = 8_000


class Vocabulary(Protocol):
    """What grammars need of a tokenizer: the text layer's Tokenizer."""

    @property
    def vocab_size(self) -> int: ...
    def encode(self, text: str, *, add_special_tokens: bool = True, allow_special: bool = True) -> list[int]: ...
    def token_bytes(self, id: int) -> bytes: ...
    def is_special(self, id: int) -> bool: ...
    def to_json(self) -> str | None: ...


# If the last masks took less than this, the loop waits for the next: to come back to a busy loop from a thread takes as long.
_INLINE_S = 0.5e-3
_FEW = 4  # so many masks are filled sooner than another thread wakes up
_COPIES = 8  # of one compiled grammar, before it is compiled once more
# What copies share only grows, up to the limit on the lexer's states that ends an answer: after so many it begins anew.
_MAX_COPIES = 1024
_TIMED = 16  # one in so many fills that take longer is timed matcher by matcher

Asked = tuple[Guide, Sequence[int]]  # whose masks are wanted: of its next token, and behind each of these admitted guesses


class _Compiled:
    """A grammar in the cache. Copies of a matcher share what llguidance has worked out for it, and the lock on that. So where
    many answers follow one grammar there are several originals, each in a lane of its own: masks of different lanes are filled
    side by side, and of one lane one after another."""

    __slots__ = ("first", "growth", "num_copies", "originals")

    def __init__(self, first: "ThreadFuture[LLMatcher | str]") -> None:
        self.first = first  # str: why it does not compile
        self.originals: list[tuple[LLMatcher, int]] = []  # with their lanes
        self.growth: ThreadFuture[LLMatcher | str] | None = None  # the next original, while it is compiled
        self.num_copies = 0


class Grammars:
    """Grammars over one model's vocabulary. Methods are called on the event loop."""

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        vocab_size: int,
        eos_token_ids: Iterable[int],
        limits: GrammarLimits | None = None,
        num_lanes: int | None = None,
    ) -> None:
        """`vocab_size`: tokens that have a logit. `eos_token_ids` end an answer that its grammar allows to end. So many masks as
        `num_lanes` are filled at once."""
        self._vocabulary = vocabulary
        self._vocab_size = vocab_size
        self._eos = sorted(id for id in eos_token_ids if id < vocab_size)
        self._limits = limits or GrammarLimits()
        self._num_lanes = num_lanes or max(1, min(8, (os.cpu_count() or 1) // 2))
        self._compiling = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar-compile", initializer=_yield_to_others)
        self._filling = ThreadPoolExecutor(max_workers=self._num_lanes, thread_name_prefix="grammar-mask")
        self._tokenizer: LLTokenizer | None = None  # made and used by the thread that compiles
        self._executor: LLExecutor  # there with the tokenizer
        self._next_lane = 0
        self._cache: OrderedDict[str, _Compiled] = OrderedDict()
        self._cached_bytes = 0
        self._num_compiling = 0
        self._last_fill_s = 0.0
        self._num_fills = 0
        self._masks: list[Masks] = [np.empty((0, -(-vocab_size // 32)), np.int32)] * 2  # the newest and those of the step before
        self._memory: Callable[[int, int], Masks] = lambda num_lines, num_words: np.empty((num_lines, num_words), np.int32)
        self.token_bytes = vocabulary.token_bytes

    def use_memory(self, memory: Callable[[int, int], Masks]) -> None:
        """Where to fill masks: so many lines of so many words, not cleared. A device copies from some memory sooner."""
        self._memory = memory

    def prepare(self) -> None:
        """Begin to read the vocabulary, in a thread, so that the first grammar need not wait for it."""
        self._compiling.submit(self._load)

    def close(self) -> None:
        """End the threads."""
        self._compiling.shutdown(wait=True, cancel_futures=True)
        self._filling.shutdown(wait=True)

    async def matcher(self, grammar: str, param: str) -> "tuple[LLMatcher, int]":
        """A matcher at the beginning of the grammar, and its lane. InvalidRequest, naming `param`, if the grammar does not
        compile within its limits."""
        found = self._find(grammar, self._size(grammar, param))
        compiled = await self._made(found.first, param)
        if not found.originals:
            self._add(found, compiled)
        while found.num_copies >= _COPIES * len(found.originals) and self._may_grow(found):
            await self._grow(found, grammar)
        found.num_copies += 1
        if found.num_copies == _MAX_COPIES and self._cache.get(grammar) is found:
            self.forget(grammar)
        original, lane = found.originals[found.num_copies % len(found.originals)]
        return original.deep_copy(), lane

    async def check(self, grammar: str, param: str) -> None:
        """Raise what `matcher` would. The grammar is not kept: somebody is still writing it."""
        self._size(grammar, param)
        found = self._cache.get(grammar)
        await self._made(self._begun(grammar) if found is None else found.first, param)

    def _size(self, grammar: str, param: str) -> int:
        try:
            size = len(grammar.encode())
        except UnicodeEncodeError as error:
            raise InvalidRequest(f"the grammar is not valid Unicode: {error.reason}", param=param) from None
        if size > self._limits.max_bytes:
            raise InvalidRequest(f"the grammar has {size} bytes; at most {self._limits.max_bytes} are allowed", param=param)
        return size

    async def _made(self, first: "ThreadFuture[LLMatcher | str]", param: str) -> "LLMatcher":
        """What is being compiled, once it is."""
        limit_s = self._limits.compile_s
        try:
            compiled = await wait_for(shield(_awaitable(first)), limit_s)
        except TimeoutError:
            if not first.running() and not first.done():
                raise QueueFull("other grammars are still being compiled", retry_after_s=limit_s) from None
            raise InvalidRequest(f"the grammar was not compiled within {limit_s:g} seconds", param=param) from None
        if isinstance(compiled, str):
            raise InvalidRequest(f"the grammar cannot be used: {compiled}", param=param)
        return compiled

    def _may_grow(self, found: _Compiled) -> bool:
        """Another original is worth its while, and nobody else's grammar has to be compiled before it."""
        return len(found.originals) < self._num_lanes and self._num_compiling == 0

    async def _grow(self, found: _Compiled, grammar: str) -> None:
        """Wait for one more original. Everybody who waits at the same time waits for the same."""
        if found.growth is None:
            found.growth = self._compiling.submit(self._compile, grammar)
        growth = found.growth
        compiled = await shield(_awaitable(growth))
        if found.growth is growth:
            found.growth = None
            assert not isinstance(compiled, str), "it has compiled before"
            self._add(found, compiled)

    def _add(self, found: _Compiled, original: "LLMatcher") -> None:
        found.originals.append((original, self._next_lane))
        self._next_lane = (self._next_lane + 1) % self._num_lanes

    def forget(self, grammar: str) -> None:
        """An answer has spent the grammar's limits. What its copies share is spent with it: the next one is compiled afresh."""
        if self._cache.pop(grammar, None) is not None:
            self._cached_bytes -= len(grammar.encode())

    async def encode(self, text: bytes) -> list[int]:
        """Tokens of a marker, a control token where it is one."""
        return self._vocabulary.encode(text.decode(), add_special_tokens=False)

    async def fill(self, asked: Sequence[Asked]) -> Masks:
        """The masks of the guides' next tokens: a line each, and one more behind each of their guesses. A guide whose matcher
        failed has lines without meaning. They hold until the call after the next."""
        masks_GW = self._lines(sum([1 + len(guesses) for _, guesses in asked]))
        if self._last_fill_s < _INLINE_S:
            self._last_fill_s = self._fill(asked, masks_GW)
            return masks_GW
        self._num_fills += 1
        loop = get_running_loop()
        if self._num_fills % _TIMED:
            self._last_fill_s = await loop.run_in_executor(self._filling, self._fill, asked, masks_GW)
            return masks_GW
        lanes: dict[int, list[tuple[int, Asked]]] = {}
        first = 0
        for guide, guesses in asked:
            lanes.setdefault(guide.lane, []).append((first, (guide, guesses)))
            first += 1 + len(guesses)
        fills = [loop.run_in_executor(self._filling, _fill_timed, some, masks_GW) for some in lanes.values()]
        self._last_fill_s = max(await gather(*fills))
        return masks_GW

    # ---- masks, on the loop or in threads ------------------------------------------------------------------------

    def _fill(self, asked: Sequence[Asked], masks_GW: Masks) -> float:
        """All masks, in one go. Returns the seconds that it took."""
        began_s = perf_counter()
        lanes: list[list[tuple[Matcher, int]]] = [[] for _ in range(self._num_lanes)]
        guessing: list[tuple[int, Asked]] = []
        edited: list[tuple[int, Asked]] = []
        first = 0
        for guide, guesses in asked:
            matcher = guide.plain
            if matcher is not None and not guesses:
                lanes[guide.lane].append((matcher, first))
                first += 1
                continue
            edited.append((first, (guide, guesses)))
            matcher = guide.masking
            if matcher is not None and guesses:
                guessing.append((first, (guide, guesses)))
            elif matcher is not None:
                lanes[guide.lane].append((matcher, first))
            first += 1 + len(guesses)
        # Side by side stand those that share a lock: llguidance gives each of its threads some neighbours.
        self._compute([one for lane in lanes for one in lane], masks_GW)
        if guessing:
            self._scout(guessing, masks_GW)
        _edit(edited, masks_GW)
        return perf_counter() - began_s

    def _compute(self, plain: "list[tuple[Matcher, int]]", masks_GW: Masks) -> None:
        """Masks of matchers, into these lines."""
        address, (num_lines, num_words) = masks_GW.ctypes.data, masks_GW.shape
        if len(plain) > _FEW and self._num_lanes > 1:
            self._executor.unsafe_compute_mask_ptr(plain, address, 4 * num_words, num_lines)  # type: ignore[arg-type]
            return
        for matcher, line in plain:
            matcher.unsafe_compute_mask_ptr(address + 4 * num_words * line, 4 * num_words)

    def _scout(self, guessing: Sequence[tuple[int, Asked]], masks_GW: Masks) -> None:
        """Masks of guides that have guesses: their scouts go ahead."""
        scouts: list[tuple[Matcher, int, list[int]]] = []
        scouting: list[tuple[int, Asked]] = []
        alone: list[tuple[int, Asked]] = []
        for first, (guide, guesses) in guessing:
            scout = guide.scout()
            if scout is None:
                alone.append((first, (guide, guesses)))
            else:
                scouts.append((scout, first, list(guesses)))
                scouting.append((first, (guide, guesses)))
        if scouts:
            fill, (num_lines, num_words) = self._executor.unsafe_compute_mask_ptr_with_draft_token, masks_GW.shape
            fill(scouts, masks_GW.ctypes.data, 4 * num_words, num_lines)  # type: ignore[arg-type]
        for (scout, _, _), one in zip(scouts, scouting, strict=True):
            if scout.is_error():  # somewhere between the first mask and the last
                one[1][0].dismiss_scout()
                alone.append(one)
        for first, (guide, guesses) in alone:
            assert guide.masking is not None
            _fill_one_by_one(guide.masking, guide, guesses, masks_GW[first:])

    def _lines(self, num_lines: int) -> Masks:
        """Memory for so many masks. The same again and again: the system would have to clear new memory, page by page."""
        masks_GW, newest_GW = self._masks
        if len(masks_GW) < num_lines:
            masks_GW = self._memory(1 << (num_lines - 1).bit_length(), masks_GW.shape[1])
        self._masks = [newest_GW, masks_GW]
        return masks_GW[:num_lines]

    # ---- the cache -----------------------------------------------------------------------------------------------

    def _find(self, grammar: str, size: int) -> _Compiled:
        """The compiled grammar, or the one to be. Whoever asks for the same waits for the same."""
        found = self._cache.get(grammar)
        if found is not None:
            self._cache.move_to_end(grammar)
            return found
        found = self._cache[grammar] = _Compiled(self._begun(grammar))
        self._cached_bytes += size
        self._shrink()
        return found

    def _begun(self, grammar: str) -> "ThreadFuture[LLMatcher | str]":
        """Have it compiled, in its turn."""
        if self._num_compiling >= self._limits.max_compiling:
            raise QueueFull(
                f"{self._num_compiling} grammars are waiting to be compiled already; at most {self._limits.max_compiling} may",
                retry_after_s=self._limits.compile_s,
            )
        loop = get_running_loop()
        self._num_compiling += 1
        first = self._compiling.submit(self._compile, grammar)
        first.add_done_callback(lambda _: loop.call_soon_threadsafe(self._compiled))
        return first

    def _compiled(self) -> None:
        self._num_compiling -= 1

    def _shrink(self) -> None:
        """Forget what was not asked for longest. What is being compiled stays: somebody waits for it."""
        for grammar, found in list(self._cache.items()):
            if len(self._cache) <= self._limits.max_cached and self._cached_bytes <= self._limits.max_cached_bytes:
                return
            if found.first.done():
                del self._cache[grammar]
                self._cached_bytes -= len(grammar.encode())

    # ---- in the thread that compiles -----------------------------------------------------------------------------

    def _load(self) -> "LLTokenizer":
        from llguidance import LLExecutor

        if self._tokenizer is None:
            self._executor = LLExecutor(self._num_lanes)
            self._tokenizer = _tokenizer(self._vocabulary, self._vocab_size, self._eos)
        return self._tokenizer

    def _compile(self, grammar: str) -> "LLMatcher | str":
        """The matcher, or why there is none. Its first mask is made here: what the grammar cannot even begin with is an error of
        the request, and what llguidance works out for it is there for every copy."""
        from llguidance import LLMatcher

        matcher = LLMatcher(self._load(), grammar, log_level=0, limits=_parser_limits(self._limits))
        if not matcher.is_error():
            matcher.compute_ff_tokens()
            matcher.compute_bitmask()
        return _reason(matcher.get_error()) if matcher.is_error() else matcher


def _fill_timed(asked: Sequence[tuple[int, Asked]], masks_GW: Masks) -> float:
    """Masks of guides of one lane, with their first lines: one after another, so that its processor time is charged to whose it
    is, and to so many fills. Returns the seconds that it took."""
    began_s = perf_counter()
    for first, (guide, guesses) in asked:
        if guide.masking is not None:
            first_s, others_s = _fill_one_by_one(guide.masking, guide, guesses, masks_GW[first:])
            guide.spend(_TIMED * first_s)
            guide.spend_on_guesses(_TIMED * others_s)
    _edit(asked, masks_GW)
    return perf_counter() - began_s


def _fill_one_by_one(matcher: Matcher, guide: Guide, guesses: Sequence[int], masks_KW: Masks) -> tuple[float, float]:
    """The masks of one guide: the first by its own matcher, which may fail, the others by a copy, which may not get to the last.
    Returns the processor time of the first, and of the others."""
    began_s = thread_time()
    ahead = matcher.deep_copy() if guesses else matcher
    matcher.unsafe_compute_mask_ptr(masks_KW[0].ctypes.data, masks_KW[0].nbytes)
    first_s = thread_time() - began_s
    if not matcher.is_error():
        for num_ahead, token_id in enumerate(guesses, 1):
            words_W = masks_KW[num_ahead]
            if ahead.consume_token(token_id):
                ahead.unsafe_compute_mask_ptr(words_W.ctypes.data, words_W.nbytes)
            if ahead.is_error():
                guide.cannot_mask(num_ahead, ahead.get_error())
                guide.dismiss_scout()
                break
    return first_s, thread_time() - began_s - first_s


def _edit(asked: Sequence[tuple[int, Asked]], masks_GW: Masks) -> None:
    for first, (guide, guesses) in asked:
        for num_ahead in range(1 + len(guesses)):
            guide.edit_mask(masks_GW[first + num_ahead], num_ahead)


def _yield_to_others() -> None:
    """Let this thread have what the steps leave of the processor. Linux knows niceness of threads; elsewhere all would yield."""
    if sys.platform == "linux":
        os.nice(10)


def _awaitable(found: "ThreadFuture[LLMatcher | str]") -> "Future[LLMatcher | str]":
    from asyncio import wrap_future

    return wrap_future(found)


def _parser_limits(limits: GrammarLimits) -> "LLParserLimits":
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=limits.lexer_fuel,
        step_lexer_fuel=limits.lexer_fuel_per_token,
        step_max_items=limits.max_items_per_token,
        max_items_in_row=limits.max_items_per_token,
        max_lexer_states=limits.max_lexer_states,
        max_grammar_size=limits.max_symbols,
        verbose_errors=False,  # else the parser's whole state and the grammar are in the text
    )


def _reason(error: str) -> str:
    """llguidance's message without its closing remark; position and excerpt of a grammar stay."""
    return error.removesuffix("<non-verbose/>").strip()


def _tokenizer(vocabulary: Vocabulary, vocab_size: int, eos: list[int]) -> "LLTokenizer":
    """llguidance's view of the vocabulary. From a tokenizer's JSON it encodes forced text by itself, without the GIL."""
    from llguidance import LLTokenizer

    serialised = vocabulary.to_json()
    if serialised is not None:
        tokenizer = LLTokenizer(serialised, n_vocab=vocab_size, eos_token=eos)
        if tokenizer.vocab_size == vocab_size:
            return tokenizer
    return LLTokenizer(_Wrapped(vocabulary, vocab_size, eos), n_vocab=vocab_size, eos_token=eos)  # type: ignore[arg-type]


class _Wrapped:
    """A tokenizer without JSON, or with tokens that have no logit, as llguidance wants it: these names are its protocol."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary, vocab_size: int, eos: list[int]) -> None:
        ids = range(vocab_size)
        self.eos_token_id = eos[0]
        self.tokens = [vocabulary.token_bytes(id) for id in ids]
        self.special_token_ids = [id for id in ids if vocabulary.is_special(id)]
        self._vocabulary = vocabulary

    def __call__(self, text: str | bytes) -> list[int]:
        text = text if isinstance(text, str) else text.decode()
        return self._vocabulary.encode(text, add_special_tokens=False, allow_special=False)
