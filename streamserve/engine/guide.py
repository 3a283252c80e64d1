"""What is known of one answer before it is sampled: forced tokens, masks, where its thought ends and its grammar is fulfilled.

Owns the guidance state of one request: told of every token of the answer, it says which tokens must follow. Knows no step, no
batch and no tensor; a grammar is a matcher that takes tokens (engine/grammar.py makes them).

    BEFORE --thought.begin--> THOUGHT --thought.end, or its tokens are spent--> ANSWER: the grammar holds, if there is one
       '--anything else, or no thought is expected--------------------------------^

With a grammar nothing is left to chance: a thought that the prompt did not open is opened by force, and while it lasts the
answer cannot end, for then it would end without what was asked for.

Guesses of what comes next (engine/plan.py, Row) are tried on a scout, a copy of the matcher that goes ahead and comes back. The
matcher itself takes tokens of the answer only, so a wrong guess that a grammar's limits end does not end the answer. What the
lexer keeps is shared by all copies, though: there guesses spend of what the grammar's answers have together.
"""

from collections import deque
from collections.abc import Callable, Sequence
from copy import copy
from enum import Enum, auto
from time import perf_counter
from typing import Protocol

from streamserve.engine.plan import Masks
from streamserve.messages import Guidance, ThoughtLimits


class Matcher(Protocol):
    """A grammar and how far an answer has got in it: llguidance's LLMatcher. Nothing here raises for a bad token or a spent
    limit: the matcher is in error then, for good. Only `try_consume_tokens` says no without being in error."""

    def consume_token(self, sampled_token: int, /) -> bool: ...
    def consume_tokens(self, sampled_tokens: list[int], /) -> bool: ...
    def try_consume_tokens(self, tokens: list[int], /) -> int: ...
    def rollback(self, num_tokens: int, /) -> bool: ...
    def deep_copy(self) -> "Matcher": ...
    def unsafe_compute_mask_ptr(self, trg_pointer: int, trg_byte_size: int, /) -> None: ...
    def compute_ff_tokens(self) -> list[int]: ...
    def is_stopped(self) -> bool: ...
    def is_error(self) -> bool: ...
    def get_error(self) -> str: ...


# What a grammar may cost on average beyond a first second, in processor time. Ordinary ones cost 0.01 ms on the loop and 0.05 ms
# for a mask; one whose strings have a greatest length, over 150,000 tokens, 1 to 3 ms.
_FREE_S = 1.0
_TOKEN_S = 10e-3
_NOTED_S = 1e-4

# What guesses may cost on average beyond that: with masks that take longer, they are not worth it.
_FREE_GUESSES_S = 0.1
_GUESSES_S = 1e-3


class _Phase(Enum):
    BEFORE = auto()
    THOUGHT = auto()
    ANSWER = auto()


class Guide:
    """Guidance of one request. `begin` first, then `took` for every token that was sampled, in order.

    Tokens that must follow are returned to be appended (jump-forward), or where `jumps` is False demanded one by one by masks.
    `end_ids` end an answer; none may come inside a thought that a grammar follows, nor before `min_new_tokens`, if the grammar
    leaves another choice. `begin_ids` are the tokens of the thought's `begin`.
    """

    __slots__ = (
        "_begin_ids",
        "_blind_at",
        "_blind_why",
        "_can_scout",
        "_end_ids",
        "_forced",
        "_guesses_s",
        "_is_ending",
        "_jumps",
        "_matcher",
        "_min_new_tokens",
        "_num_taken",
        "_on_failure",
        "_phase",
        "_scout",
        "_scout_lacks",
        "_spent_s",
        "_tail",
        "_tail_lens",
        "_thought",
        "_token_bytes",
        "_wants_end",
        "error",
        "is_over",
        "lane",
        "num_thought",
        "plain",
    )

    def __init__(
        self,
        guidance: Guidance,
        *,
        matcher: Matcher | None = None,
        lane: int = 0,
        on_failure: Callable[[], None] = lambda: None,
        token_bytes: Callable[[int], bytes],
        begin_ids: Sequence[int] = (),
        end_ids: frozenset[int] = frozenset(),
        min_new_tokens: int = 0,
        jumps: bool = True,
    ) -> None:
        self._thought = guidance.thought
        self._matcher = matcher
        self._on_failure = on_failure  # the matcher is in error
        self.lane = lane  # of the matcher: those of one lane are asked for masks one after another
        self._token_bytes = token_bytes
        self._begin_ids = begin_ids
        self._end_ids = sorted(end_ids)
        self._min_new_tokens = min_new_tokens
        self._jumps = jumps
        self._phase = _Phase.BEFORE
        self._forced: deque[int] = deque()  # tokens that must come next
        self._num_taken = 0
        self._spent_s = 0.0  # by the matcher
        self._guesses_s = 0.0  # by the scout
        self._can_scout = True
        self._scout: Matcher | None = None  # goes ahead of the matcher, and comes back
        self._scout_lacks: list[int] = []  # tokens that the matcher has taken and the scout has not
        self._blind_at: int | None = None  # place of the answer that is being sampled without its mask,
        self._blind_why = ""  # since the limits were spent on that
        self._tail = b""  # of the text, as far as a marker may begin in it
        self._tail_lens: list[int] = []  # bytes of each token that reaches into the tail
        self._wants_end = False  # somebody asked for the end of the thought
        self._is_ending = False  # the tokens that end it are under way
        # The matcher, where the next token's mask is as it fills it, and no more is to be heeded when that token comes: so nearly
        # every token of a grammar's is masked and taken. Kept right between `begin` and the last token of each step.
        self.plain: Matcher | None = None
        self.num_thought = 0  # tokens of the thought, markers not counted
        self.is_over = False  # the grammar is fulfilled and allows nothing more
        self.error: str | None = None  # the answer cannot go on

    # ---- what the scheduler asks -------------------------------------------------------------------------------

    def begin(self) -> list[int]:
        """Tokens that the answer begins with, whatever the model says."""
        if self._thought is None:
            self._begin_answer()
        elif self._thought.is_open:
            self._begin_thought()
        elif self._matcher is not None:
            self._forced.extend(self._begin_ids)
        appended = self._jump()
        self._settle()
        return appended

    def admit(self, token_ids: Sequence[int]) -> int:
        """How many of these guesses of what comes next may be sampled at once: those the grammar allows, up to the first behind
        which something must follow or has ended. Changes nothing."""
        if self._forced or self.is_over or self.error is not None:
            return 0
        most = next((n for n, token_id in enumerate(token_ids) if token_id in self._end_ids), len(token_ids))
        if self._phase is not _Phase.ANSWER:
            return self._admit_thought(token_ids[:most])
        return most if self._matcher is None or not most else self._admit_answer(token_ids[:most])

    def took(self, token_id: int, *, is_last: bool = True) -> list[int]:
        """A token was sampled. Returns tokens that follow it, whatever the model says. `is_last`: no other token was sampled
        behind it in the same step. The others are guesses that were admitted: nothing follows them."""
        if self.error is not None:
            return []
        if self.plain is not None:
            self._num_taken += 1
            self._take_answer(token_id)
        elif self._num_taken == self._blind_at:
            self._fail(self._blind_why)
            return []
        elif self._forced and token_id != self._forced.popleft():  # demanded by a mask
            self._forced.clear()
            self.error = f"token {token_id} came where another was demanded"
            return []
        else:
            self._take(token_id, is_last)
        if not is_last:
            assert self.error is not None or not (self._forced or self.is_over), "a guess was admitted that something follows"
            return []
        appended = self._jump() if self._forced else []
        if self.plain is None:
            self._blind_at = None
            self._settle()
        return appended

    def end_thought(self) -> bool:
        """The thought is to end after the next token. False when there is none, or it is ending already."""
        if self._phase is not _Phase.THOUGHT or self._is_ending or self._wants_end:
            return False
        self._wants_end = True
        return True

    @property
    def may_append(self) -> bool:
        """Whether `took` may return tokens at any time now: the grammar holds, and jumps."""
        return self._jumps and self._matcher is not None and self._phase is _Phase.ANSWER

    # ---- masks -------------------------------------------------------------------------------------------------

    @property
    def needs_mask(self) -> bool:
        """Whether the next token is not the model's free choice."""
        return self._matcher is not None or bool(self._forced)

    @property
    def masking(self) -> Matcher | None:
        """The matcher that fills the next mask; None: `edit_mask` fills it alone."""
        return self._matcher if self._phase is _Phase.ANSWER and not self._forced else None

    def scout(self) -> Matcher | None:
        """A matcher that is where `masking` is, to fill masks of admitted guesses; it is rolled back. None: there is none."""
        matcher = self._matcher
        if matcher is None or not self._can_scout:
            return None
        if self._scout is None:
            self._scout = matcher.deep_copy()
        elif self._scout_lacks and not self._scout.consume_tokens(self._scout_lacks):
            self.dismiss_scout()
            return None
        self._scout_lacks.clear()
        return self._scout

    def dismiss_scout(self) -> None:
        """The scout has spent the grammar's limits, or cannot come back. The answer goes on without guesses."""
        self._can_scout = False
        self._scout = None
        self._scout_lacks.clear()

    def cannot_mask(self, num_ahead: int, why: str) -> None:
        """The matcher's limits were spent on the mask behind so many admitted guesses. The answer fails if it gets there."""
        self._blind_at, self._blind_why = self._num_taken + num_ahead, why
        self.plain = None

    def edit_mask(self, words_W: Masks, num_ahead: int = 0) -> None:
        """Finish the mask of the next token, or of the one behind so many admitted guesses, which `masking` has filled."""
        place = self._num_taken + num_ahead
        if self._forced:
            words_W.fill(0)
            _set_bit(words_W, self._forced[0])
        elif self._phase is not _Phase.ANSWER or (self._blind_at is not None and place >= self._blind_at):
            words_W.fill(-1)
            _clear_bits(words_W, self._end_ids)
        elif place < self._min_new_tokens:
            before = words_W.copy()
            _clear_bits(words_W, self._end_ids)
            if not words_W.any():  # the grammar allows nothing but the end
                words_W[:] = before

    def check_mask(self) -> str | None:
        """After a mask was filled, on which the matcher may have spent its limits. Returns `error`."""
        if self._matcher is not None and self._matcher.is_error():
            self._fail(self._matcher.get_error())
        return self.error

    def spend(self, seconds: float) -> None:
        """The matcher took processor time that other answers waited for. A grammar that goes on taking too much ends its own."""
        self._spent_s += seconds
        is_too_much = self._spent_s > _FREE_S + _TOKEN_S * self._num_taken
        if is_too_much and self.error is None and not self.is_over:
            self._forced.clear()
            ms = 1e3 * self._spent_s / max(1, self._num_taken)
            self.error = f"the grammar is too ambiguous: it has taken {ms:.0f} ms for each of {self._num_taken} tokens"

    def spend_on_guesses(self, seconds: float) -> None:
        """The scout took processor time that other answers waited for. The answer goes without guesses for as long as it takes
        until that is little for each token."""
        self._guesses_s += seconds

    # ---- inside ------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """See `plain`."""
        is_answer = self._phase is _Phase.ANSWER and not self._forced
        is_plain = is_answer and self._num_taken >= self._min_new_tokens and self._blind_at is None
        self.plain = self._matcher if is_plain else None

    def _jump(self) -> list[int]:
        appended: list[int] = []
        while self._jumps and self._forced:
            token_id = self._forced.popleft()
            appended.append(token_id)
            self._take(token_id)
        return appended

    def _admit_answer(self, token_ids: Sequence[int]) -> int:
        if self._guesses_s > _FREE_GUESSES_S + _GUESSES_S * self._num_taken:
            return 0
        began_s = perf_counter()
        num_admitted = self._scout_ahead(token_ids)
        took_s = perf_counter() - began_s
        if took_s > _NOTED_S:
            self.spend_on_guesses(took_s)
        return num_admitted

    def _scout_ahead(self, token_ids: Sequence[int]) -> int:
        scout = self.scout()
        if scout is None:
            return 0
        num_admitted = num_consumed = 0
        for token_id in token_ids:
            if not scout.try_consume_tokens([token_id]):
                break
            num_consumed += 1
            if scout.is_stopped() or (self._jumps and scout.compute_ff_tokens()):
                break
            num_admitted += 1
        if scout.is_error() or not scout.rollback(num_consumed):  # grammars with stop=… or max_tokens=… know no way back
            self.dismiss_scout()
            return 0
        return num_admitted

    def _admit_thought(self, token_ids: Sequence[int]) -> int:
        """A copy of this guide goes ahead. If there is a grammar, it does not go beyond the thought: other masks hold there."""
        ahead = copy(self)
        ahead._matcher = None
        ahead._forced, ahead._tail_lens = deque(), self._tail_lens.copy()
        for num_admitted, token_id in enumerate(token_ids):
            ahead._take(token_id)
            if ahead._forced or (self._matcher is not None and ahead._phase is not self._phase):
                return num_admitted
        return len(token_ids)

    def _take(self, token_id: int, is_last: bool = True) -> None:
        """A token of the answer, sampled or forced."""
        self._num_taken += 1
        if self._phase is _Phase.ANSWER:
            self._take_answer(token_id)
        elif self._phase is _Phase.THOUGHT:
            self._take_thought(token_id, is_last)
        else:
            self._take_before(token_id, is_last)

    def _take_before(self, token_id: int, is_last: bool) -> None:
        """Does a thought begin? White space may stand in front of it."""
        assert self._thought is not None
        self._tail = (self._tail + self._token_bytes(token_id)).lstrip()
        begin = self._thought.begin
        if self._tail.startswith(begin):
            rest, self._tail = self._tail[len(begin) :], b""
            self._begin_thought(is_last)
            if not self._is_ending:
                self._grow_thought(self._thought, rest)
        elif not begin.startswith(self._tail) and not self._forced:
            self._begin_answer()

    def _begin_thought(self, is_last: bool = True) -> None:
        assert self._thought is not None
        self._phase = _Phase.THOUGHT
        self._end_if_due(self._thought, is_last)

    def _take_thought(self, token_id: int, is_last: bool) -> None:
        assert self._thought is not None
        if self._is_ending:
            if not self._forced:
                self._begin_answer()
            return
        self.num_thought += 1
        self._grow_thought(self._thought, self._token_bytes(token_id))
        if self._phase is _Phase.THOUGHT:
            self._end_if_due(self._thought, is_last)

    def _grow_thought(self, thought: ThoughtLimits, text: bytes) -> None:
        """More text of the thought: from one token, of which `num_thought` counts those that reach beyond a marker."""
        self._tail += text
        self._tail_lens.append(len(text))
        at = self._tail.find(thought.end)
        if at < 0:
            keep = len(thought.end) - 1
            self._tail = self._tail[max(0, len(self._tail) - keep) :]
            while sum(self._tail_lens[1:]) >= keep and len(self._tail_lens) > 1:
                del self._tail_lens[0]
            return
        start = len(self._tail)
        for length in reversed(self._tail_lens):
            start -= length
            if start < at or self.num_thought == 0:
                break
            self.num_thought -= 1
        rest = self._tail[at + len(thought.end) :]
        if self._matcher is not None and rest.strip():
            more = rest.decode("utf-8", "replace")
            self.error = f"the token that ended the thought goes on with {more!r}, which the grammar has not seen"
            return
        self._begin_answer()

    def _end_if_due(self, thought: ThoughtLimits, is_last: bool) -> None:
        is_spent = thought.max_tokens is not None and self.num_thought >= thought.max_tokens
        if not self._is_ending and (is_spent or (self._wants_end and is_last)):
            self._is_ending = True
            self._forced.extend(thought.end_ids)
            if not self._forced:
                self._begin_answer()

    def _begin_answer(self) -> None:
        self._phase = _Phase.ANSWER
        self._look_ahead()

    def _take_answer(self, token_id: int) -> None:
        matcher = self._matcher
        if matcher is None:
            return
        began_s = perf_counter()
        if self._scout is not None:
            self._scout_lacks.append(token_id)
        if not matcher.consume_token(token_id):
            self._fail(matcher.get_error())
        elif matcher.is_stopped():
            self.is_over = True
        elif self._jumps and not self._forced:
            self._look_ahead()
        took_s = perf_counter() - began_s
        if took_s > _NOTED_S:  # an interrupted thread looks slow too, but seldom
            self.spend(took_s)

    def _look_ahead(self) -> None:
        """Ask the grammar for tokens that it leaves no choice about. Masks would find them too, one by one."""
        if self._matcher is not None and self._jumps:
            self._forced.extend(self._matcher.compute_ff_tokens())
            if self._matcher.is_error():
                self._fail(self._matcher.get_error())

    def _fail(self, why: str) -> None:
        self._on_failure()
        self._forced.clear()
        self.error = f"the grammar cannot go on: {why.splitlines()[0]}"


def _set_bit(words_W: Masks, token_id: int) -> None:
    words_W.view("uint32")[token_id // 32] |= 1 << token_id % 32


def _clear_bits(words_W: Masks, token_ids: Sequence[int]) -> None:
    words = words_W.view("uint32")
    for token_id in token_ids:
        words[token_id // 32] &= ~(1 << token_id % 32) & 0xFFFFFFFF
