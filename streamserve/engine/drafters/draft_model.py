"""A smaller model of the same vocabulary as the drafter of a runner (Leviathan et al., arXiv 2211.17192).

It reads the target's tokens, one for one. While nobody wants guesses of an answer, it does not follow it; it catches up when they
are wanted again. Owns which tokens it has yet to read; its network is like any other.
"""

from collections.abc import Sequence

from torch import Tensor

from streamserve.engine.drafters.passes import Guesser, Passes, Span
from streamserve.engine.plan import Plan, Row, RowResult
from streamserve.kernels.ops import Batch, Network

MAX_CATCH_UP = 256  # tokens of a row in one step: more would hold up everybody else


class _Reading:
    """What a slot has that the drafter has not read: these tokens, from this position on."""

    __slots__ = ("start", "token_ids")

    def __init__(self, start: int) -> None:
        self.start = start
        self.token_ids: list[int] = []


class DraftModel:
    """Implements RunnerDrafter. `num_tokens`: how many tokens it knows; others, which no tokenizer gives, are read as token 0."""

    def __init__(
        self, network: Network, passes: Passes, target: Network, *, num_tokens: int, num_target_tokens: int, max_drafts: int
    ) -> None:
        self._network = network
        self._passes = passes
        self._target = target
        self._num_tokens = num_tokens
        self._num_guessable = min(num_tokens, num_target_tokens)
        self._max_drafts = max_drafts
        self._guesser = Guesser()
        self._unread: dict[int, _Reading] = {}
        self._step: Batch | None = None

    def forward(self, plan: Plan, batch: Batch) -> Tensor:
        """See RunnerDrafter."""
        for admission in plan.admissions:
            self._guesser.admit(admission)
            self._unread.pop(admission.slot, None)
        self._passes.begin(plan, batch)
        self._step = batch
        return self._target.forward(batch)

    def follow(self, plan: Plan, results: Sequence[RowResult]) -> list[tuple[int, ...]]:
        """See RunnerDrafter. The newest token is read along with those before it, and read again the next time: its page may not
        be there yet, and one more token costs a pass nothing."""
        assert self._step is not None
        spans: list[Span] = []
        wanted: list[int] = []  # indexes into spans
        for i, (row, result) in enumerate(zip(plan.rows, results, strict=True)):
            unread = self._take_in(row, self._certain(i, row, result))
            num_wanted = row.num_wanted if result.token_ids else 0
            if not num_wanted and row.num_tokens - row.num_drafts == 1:
                continue
            tokens = unread.token_ids[:MAX_CATCH_UP]
            del unread.token_ids[: len(tokens)]
            if num_wanted and not unread.token_ids:
                wanted.append(len(spans))
                spans.append(Span(i, unread.start, [*tokens, self._known(result.token_ids[-1])]))
            else:
                spans.append(Span(i, unread.start, tokens))
            unread.start += len(tokens)
        guesses: list[list[int]] = [[] for _ in plan.rows]
        while spans:
            logits_RV = self._network.forward(self._passes.batch(spans, wanted))[:, : self._num_guessable]
            going_on = [spans[i] for i in wanted]
            slots = [plan.rows[span.row].slot for span in going_on]
            ends = [span.start + len(span.token_ids) for span in going_on]
            spans = []
            for span, end, token in zip(going_on, ends, self._guesser.choose(logits_RV, slots, ends), strict=True):
                guesses[span.row].append(token)
                if len(guesses[span.row]) < min(plan.rows[span.row].num_wanted, self._max_drafts):
                    spans.append(Span(span.row, end, (token,)))
            wanted = list(range(len(spans)))
        return [tuple(row) for row in guesses]

    def _certain(self, index: int, row: Row, result: RowResult) -> list[int]:
        """The row's tokens that stay."""
        assert self._step is not None
        first = self._step.row_start[index]
        count = num_certain(row, result)
        return [self._known(token) for token in self._step.token_ids_T[first : first + count].tolist()]

    def _take_in(self, row: Row, token_ids: list[int]) -> _Reading:
        unread = self._unread.get(row.slot)
        if unread is None or unread.start + len(unread.token_ids) != row.start:
            unread = self._unread[row.slot] = _Reading(row.start)  # what lies before came out of the tree, with its memory
        unread.token_ids += token_ids
        return unread

    def _known(self, token_id: int) -> int:
        return token_id if token_id < self._num_tokens else 0


def num_certain(row: Row, result: RowResult) -> int:
    """How many of a row's tokens stay: all but the guesses that were wrong."""
    return max(1, len(result.token_ids)) if row.num_drafts else row.num_tokens
