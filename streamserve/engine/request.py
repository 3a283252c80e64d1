"""One sampled sequence inside the engine: its tokens, its place in the cache, its life cycle. Torch-free.

Written only by the scheduler; policies and budgets read it.

Positions of a request, in the middle of an answer:

    tokens      0 ............ num_prompt ...... len(tokens)
    computed    |-- KV is there and committed --|
    planned     |-- KV is there or in a step that is running --|

The next row begins at `planned`. While a row with guesses is under way nobody knows where that is: nothing can be planned for the
request.
"""

from enum import Enum, auto

from streamserve.cache.keys import Packed, pack
from streamserve.cache.kv_cache import Lease
from streamserve.engine.client import Mailbox, Turns
from streamserve.engine.drafters.drafter import Drafts
from streamserve.engine.guide import Guide
from streamserve.engine.rotary import rotary_lead
from streamserve.messages import GenerateRequest, SamplingParams, TokenLogprobs


class State(Enum):
    """Where a request stands in its life."""

    QUEUED = auto()
    RUNNING = auto()
    FINISHED = auto()


_MOVES = {
    State.QUEUED: {State.RUNNING, State.FINISHED},
    State.RUNNING: {State.QUEUED, State.FINISHED},  # back to the queue when preempted
    State.FINISHED: set[State](),
}


class Seat:
    """One stay of a request among those that run. Empty when that has ended: results of steps that were under way by then are
    nobody's, even where the request runs again."""

    __slots__ = ("request",)

    def __init__(self, request: "Request") -> None:
        self.request: Request | None = request


class Request:
    """State of one live request."""

    __slots__ = (
        "_packed",
        "appended",
        "computed",
        "drafts",
        "end",
        "first_scored",
        "given",
        "guide",
        "has_begun",
        "jumped",
        "lease",
        "mailbox",
        "max_len",
        "num_accepted",
        "num_cached",
        "num_drafted",
        "num_jumped",
        "num_jumped_sent",
        "num_prompt",
        "num_told",
        "offered",
        "planned",
        "prompt_logprobs",
        "queued_s",
        "room",
        "sampling",
        "seat",
        "seed",
        "slot",
        "state",
        "stop_ids",
        "submitted_s",
        "tokens",
        "waits_for",
    )

    def __init__(
        self,
        given: GenerateRequest,
        *,
        seed: int,
        context_len: int,
        submitted_s: float,
        turns: Turns | None = None,
        guide: Guide | None = None,
        sampling: SamplingParams | None = None,
    ) -> None:
        """`sampling`: the runner's, where it is not the one given."""
        self.given = given
        self.guide = guide
        self.sampling = sampling or given.sampling
        self.seed = seed
        self.submitted_s = submitted_s
        self.queued_s: float | None = None  # how long it waited before its prompt was begun for the first time
        self.tokens = list(given.token_ids)
        self._packed: Packed | None = None
        self.num_prompt = len(given.token_ids)
        room = context_len - rotary_lead(given.media) - self.num_prompt
        wanted = given.sampling.max_new_tokens
        self.max_len = self.num_prompt + (room if wanted is None else min(wanted, room))
        self.end = self.max_len - 1  # the last token has no row
        self.mailbox = Mailbox(given.id, turns)
        self.state = State.QUEUED
        self.stop_ids: frozenset[int] = frozenset()  # end the answer, once it has min_new_tokens
        self.slot = -1
        self.seat: Seat | None = None
        self.lease: Lease | None = None
        self.room = 0  # positions that the runner has pages for
        self.computed = 0
        self.planned = 0
        self.num_cached = 0
        self.has_begun = False  # the first tokens of the answer are in the mailbox
        self.num_jumped = 0  # tokens of the answer that were appended, not sampled
        self.num_jumped_sent = 0  # those in the mailbox
        self.jumped: list[int] = []  # where the others stand in `tokens`
        self.appended: list[int] = []  # those the runner has not been told of
        self.num_drafted = 0  # guesses that were computed
        self.num_accepted = 0  # tokens of the answer that had been guessed
        self.drafts: Drafts | None = None  # whoever guesses knows
        self.num_told = 0  # so many tokens
        self.offered: tuple[int, ...] = ()  # what the runner's drafter guesses behind the newest token
        self.waits_for: tuple[Seat, int] | None = None  # who computes a prefix of ours, and how many tokens that has
        # Of prompt tokens whose log-probabilities are wanted the first is told by the logits one place before it.
        self.first_scored = max(0, min(given.sampling.prompt_logprobs_start, self.num_prompt) - 1)
        self.prompt_logprobs: list[TokenLogprobs | None] = [None] * (self.first_scored + 1)

    @property
    def id(self) -> str:
        return self.given.id

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def packed(self) -> Packed:
        """The tokens as the cache compares them fastest, kept as long as there are no more: a request that waits is looked
        up in many plans. Not to be changed."""
        if self._packed is None or len(self._packed) != len(self.tokens):
            self._packed = pack(self.tokens)
        return self._packed

    @property
    def is_in_prompt(self) -> bool:
        """Tokens of the prompt are not computed yet."""
        return self.computed < self.num_prompt

    @property
    def can_answer(self) -> bool:
        """The answer may still grow, and the next row is past the prompt: a token that the device has sampled or is sampling, or
        tokens that were appended."""
        return self.num_prompt <= self.planned < self.end

    def move(self, to: State) -> None:
        """Change the state; a wrong move is a bug of the scheduler."""
        assert to in _MOVES[self.state], f"{self.id}: {self.state.name} -> {to.name}"
        self.state = to
