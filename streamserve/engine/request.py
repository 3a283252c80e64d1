"""One sampled sequence inside the engine: its tokens, its place in the cache, its life cycle. Torch-free.

Written only by the scheduler; policies and budgets read it.

Positions of a request, in the middle of an answer:

    tokens      0 ............ num_prompt ...... len(tokens)
    computed    |-- KV is there and committed --|
    planned     |-- KV is there or in a step that is running --|
    expected    len(tokens) + tokens that running steps will yield
"""

from enum import Enum, auto

from streamserve.cache.kv_cache import Lease
from streamserve.engine.client import Mailbox, Turns
from streamserve.messages import GenerateRequest, TokenLogprobs


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


class Request:
    """State of one live request. `epoch` rises with each preemption, so that late results of a lost slot are told apart."""

    __slots__ = (
        "computed",
        "epoch",
        "expected",
        "given",
        "lease",
        "mailbox",
        "max_len",
        "num_cached",
        "num_prompt",
        "pages_sent",
        "planned",
        "prompt_logprobs",
        "seed",
        "slot",
        "state",
        "stop_ids",
        "submitted_s",
        "tokens",
        "waits_for",
    )

    def __init__(
        self, given: GenerateRequest, *, seed: int, context_len: int, submitted_s: float, turns: Turns | None = None
    ) -> None:
        self.given = given
        self.seed = seed
        self.submitted_s = submitted_s
        self.tokens = list(given.token_ids)
        self.num_prompt = len(given.token_ids)
        room = context_len - self.num_prompt
        wanted = given.sampling.max_new_tokens
        self.max_len = self.num_prompt + (room if wanted is None else min(wanted, room))
        self.mailbox = Mailbox(given.id, turns)
        self.state = State.QUEUED
        self.epoch = 0
        self.stop_ids: frozenset[int] = frozenset()  # end the answer, once it has min_new_tokens
        self.slot = -1
        self.lease: Lease | None = None
        self.pages_sent = 0  # how much of the lease's page table the runner has
        self.computed = 0
        self.planned = 0
        self.expected = self.num_prompt
        self.num_cached = 0
        self.waits_for: tuple[Request, int, int] | None = None  # (request, its epoch, tokens) computing our prefix
        self.prompt_logprobs: list[TokenLogprobs | None] = [None]

    @property
    def id(self) -> str:
        return self.given.id

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def is_prefilling(self) -> bool:
        """Tokens that are already known still have no KV planned."""
        return self.planned < len(self.tokens)

    @property
    def can_decode(self) -> bool:
        """The next row is one token that the device has sampled or is sampling, and the answer may still grow."""
        return self.planned == self.expected - 1 and self.planned >= self.num_prompt and self.expected < self.max_len

    def move(self, to: State) -> None:
        """Change the state; a wrong move is a bug of the scheduler."""
        assert to in _MOVES[self.state], f"{self.id}: {self.state.name} -> {to.name}"
        self.state = to
