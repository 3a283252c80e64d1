"""What one step does (Plan) and what came out of it (StepResult): plain data, made by the scheduler, read by runners.

A Plan holds only integers and frozen values, so that the same object drives a device, the fake runner, a test or a
remote rank. Torch-free.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from msgspec import Struct

from streamserve.messages import Media, SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class Admission:
    """A request enters the running set: the runner resets the device state of `slot`.

    `history` is what penalties count: the prompt and, after a preemption, the tokens generated before it
    (`num_prompt` tells them apart). `num_generated` is len(history) - num_prompt. Ids of media's places (from MEDIA_BASE on)
    stand in `history`, and in rows' `token_ids`, as they stand in the prompt: they are no words, and nothing counts them.
    """

    slot: int
    sampling: SamplingParams
    history: tuple[int, ...]
    num_prompt: int
    seed: int  # always set: the request's own, or one drawn at submit
    media: tuple[Media, ...] = ()  # whose places in `history` take embeddings


@dataclass(frozen=True, slots=True)
class Append:
    """Tokens that joined a slot's answer without being sampled; rows of this plan on compute them.

    `num_generated`: the answer's tokens with these. No step that samples for the slot is under way.
    """

    slot: int
    token_ids: tuple[int, ...]
    num_generated: int


@dataclass(frozen=True, slots=True)
class PageCopy:
    """Copy page `src` to page `dst` in every layer before the step runs (copy on write of a partly matched page)."""

    src: int
    dst: int


@dataclass(frozen=True, slots=True, eq=False)
class Encode:
    """Compute the embeddings of a media, `num_tokens` of them, and keep them under its key. `inputs` as in messages.Media."""

    key: bytes
    num_tokens: int
    inputs: Mapping[str, Any]


class Row(Struct, frozen=True, gc=False):
    """One request's part of a step: `num_tokens` tokens at positions start, start+1, …

    `token_ids` None means one token: the one most recently sampled for this slot, which only the device may know yet.
    `new_pages` are appended to the slot's page table before the step. `samples`: the last position yields a token.
    `wants_all_logits`: log-probabilities of the row's tokens are wanted (prompt_logprobs).

    A drafted row is one known token and, behind it, `num_drafts` guesses of what follows. Each of its positions is sampled as
    if the guesses before it were right, with the random number of that place of the answer, and what is sampled counts up to
    and including the first token that is not the guess: the same tokens as one by one, whoever guessed (speculative decoding,
    Leviathan et al., arXiv 2211.17192, for guesses without a distribution; the randomness is shared as in Daliri et al.,
    arXiv 2408.07978). Behind the row the slot stands as if those tokens had been sampled one by one. No other step of that slot
    is under way.

    `num_wanted`: guesses that the runner's own drafter, if it has one, is to make of what follows the row's last token.

    Made in every step for every stream, so it is a Struct: a NamedTuple takes three times as long to make.
    """

    slot: int
    start: int
    num_tokens: int
    token_ids: tuple[int, ...] | None
    new_pages: tuple[int, ...] = ()
    samples: bool = True
    wants_all_logits: bool = False
    num_drafts: int = 0
    num_wanted: int = 0


@dataclass(frozen=True, slots=True)
class Plan:
    """One step. Admissions, then appends, copies, forgets, encodes and rows, in this order. A slot appears in at most one row.
    `forgets`: keys of embeddings that are not kept any longer. Those of all places that rows compute are there by then."""

    step: int
    admissions: tuple[Admission, ...]
    copies: tuple[PageCopy, ...]
    rows: tuple[Row, ...]
    appends: tuple[Append, ...] = ()
    encodes: tuple[Encode, ...] = ()
    forgets: tuple[bytes, ...] = ()

    @property
    def num_tokens(self) -> int:
        return sum(row.num_tokens for row in self.rows)


Masks = np.ndarray[Any, np.dtype[np.int32]]


class Place(NamedTuple):
    """A sampled position: row `row` of the plan, behind `num_drafts` of its guesses (0: behind its last known token)."""

    row: int
    num_drafts: int = 0


@dataclass(frozen=True, slots=True)
class Edits:
    """What is known of a plan's samples only after its rows were started. Rows are named by their index in the plan.

    `unwanted`: rows whose sample nobody wants; none is drawn and nothing is counted for them. `masks` has one line per place in
    `masked`: bit t % 32 of word t // 32 says whether token t may come. Of a row either no place is masked or all are.
    """

    unwanted: frozenset[int] = frozenset()
    masked: tuple[Place, ...] = ()
    masks: Masks = field(default_factory=lambda: np.empty((0, 0), np.int32))


NO_EDITS = Edits()


class RowResult(Struct, frozen=True, gc=False):
    """Output of one row, parallel to Plan.rows. `token_ids` is empty for a row that does not sample, or in vain; of a drafted row
    it holds the guesses that were right and one more token. `drafts`: what the runner's drafter guesses will follow.

    `logprobs` is parallel to `token_ids` when the request asked for it. `prompt_logprobs` has, for a row with
    `wants_all_logits`, one entry per token of the row: the log-probability of the *following* prompt token given this
    position (the last prompt position has none and is left out by the scheduler).
    """

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    drafts: tuple[int, ...] = ()

    def with_drafts(self, drafts: tuple[int, ...]) -> "RowResult":
        """The same, and these."""
        return RowResult(self.token_ids, self.logprobs, self.prompt_logprobs, drafts)


@dataclass(frozen=True, slots=True)
class StepResult:
    """Output of a step: one RowResult per row of its plan. `failed`: of encodes of this plan or an earlier one, keys of those
    that raised, and what was raised: what the rows of their requests computed is void."""

    rows: Sequence[RowResult]
    failed: Mapping[bytes, str] = field(default_factory=dict)


class Step(Protocol):
    """A step that is running: its rows are being computed, and after `sample` its tokens are chosen."""

    def sample(self, edits: Edits = NO_EDITS) -> None:
        """Choose the tokens, once, when the rows are computed; before the next step is started. Never waits."""
        ...

    def is_done(self) -> bool:
        """Whether `done` would not wait. Asked between slices of streams: a helper thread that waits for a device gets the GIL
        late while the loop is busy."""
        ...

    async def done(self) -> StepResult:
        """Wait for the step, samples and all. Raises what the step raised."""
        ...


class Runner(Protocol):
    """Executes plans in the order given, one after another."""

    def forward(self, plan: Plan) -> Step:
        """Start computing a step's rows behind the steps already started. Never waits."""
        ...
