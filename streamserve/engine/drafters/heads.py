"""A head on the target's stream as the drafter of a runner: EAGLE-3 heads, and layers that predict several tokens.

It follows every token, wanted or not: it is one layer, and what it reads is there only once. A prefix that came out of the tree
brings its memory with it; the pair of its last position may have been made with another token than the one that follows here.
Owns the last position of slots whose next token is not known yet: a sample that nobody wanted, in whose place others come.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from streamserve.engine.drafters.draft_model import num_certain
from streamserve.engine.drafters.passes import Guesser, Passes, Span
from streamserve.engine.plan import Plan, RowResult
from streamserve.kernels.ops import Batch
from streamserve.messages import MEDIA_BASE
from streamserve.models.heads import FeatureNetwork, Head


class HeadDrafter:
    """Implements RunnerDrafter."""

    def __init__(self, head: Head, passes: Passes, target: FeatureNetwork, *, max_drafts: int) -> None:
        self._head = head
        self._passes = passes
        self._target = target
        self._max_drafts = max_drafts
        self._guesser = Guesser()
        self._histories: dict[int, tuple[int, ...]] = {}  # by slot, as all that follows: what was known at admission
        self._waiting: dict[int, tuple[int, Tensor]] = {}  # position and feature
        self._step: tuple[Batch, Tensor] | None = None

    def forward(self, plan: Plan, batch: Batch) -> Tensor:
        """See RunnerDrafter."""
        for admission in plan.admissions:
            self._guesser.admit(admission)
            self._histories[admission.slot] = admission.history
            self._waiting.pop(admission.slot, None)
        self._passes.begin(plan, batch)
        logits_RV, shown_TX = self._target.forward_with_features(batch, self._head.layers)
        self._step = batch, self._head.features(shown_TX)
        return logits_RV

    def follow(self, plan: Plan, results: Sequence[RowResult]) -> list[tuple[int, ...]]:
        """See RunnerDrafter."""
        assert self._step is not None
        batch, features_TE = self._step
        spans: list[Span] = []
        read: list[Tensor] = []
        wanted: list[int] = []  # indexes into spans
        for i, (row, result) in enumerate(zip(plan.rows, results, strict=True)):
            first = batch.row_start[i]
            count = num_certain(row, result)
            tokens = batch.token_ids_T[first : first + count].tolist()
            start, features_CE = row.start, features_TE[first : first + count]
            position, waiting_E = self._waiting.pop(row.slot, (-1, None))
            if waiting_E is not None and position == start - 1:
                start, features_CE = position, torch.cat((waiting_E.unsqueeze(0), features_CE))
            else:
                del tokens[0]
            end, history = row.start + count, self._histories[row.slot]
            if result.token_ids:
                tokens.append(result.token_ids[-1])
            elif end < len(history):
                tokens.append(history[end] if history[end] < MEDIA_BASE else 0)  # as the batch has places of pictures
            else:
                self._waiting[row.slot] = end - 1, features_CE[-1].clone()
            if tokens:
                if result.token_ids and row.num_wanted:
                    wanted.append(len(spans))
                spans.append(Span(i, start, tokens))
                read.append(features_CE[: len(tokens)])
        guesses: list[list[int]] = [[] for _ in plan.rows]
        while spans:
            states_RE = self._states(torch.cat(read), self._passes.batch(spans, wanted))
            going_on = [spans[i] for i in wanted]
            if not going_on:
                break
            slots = [plan.rows[span.row].slot for span in going_on]
            ends = [span.start + len(span.token_ids) for span in going_on]
            chosen = self._choose(states_RE, slots, [end + 1 for end in ends])
            spans, read = [], []
            for span, end, token, state_E in zip(going_on, ends, chosen, states_RE, strict=True):
                guesses[span.row].append(token)
                if len(guesses[span.row]) < min(plan.rows[span.row].num_wanted, self._max_drafts):
                    spans.append(Span(span.row, end, (token,)))
                    read.append(state_E.unsqueeze(0))
            wanted = list(range(len(spans)))
        return [tuple(row) for row in guesses]

    def _states(self, features_TE: Tensor, batch: Batch) -> Tensor:
        states_TE = self._head.forward(features_TE, batch.token_ids_T, batch.positions_T, self._head.prepare(batch))
        return states_TE[batch.logit_rows_R]

    def _choose(self, states_RE: Tensor, slots: Sequence[int], positions: Sequence[int]) -> list[int]:
        tokens = self._guesser.choose(self._head.logits(states_RE), slots, positions)
        of_target = self._head.token_ids_V
        return tokens if of_target is None else of_target[tokens].tolist()
