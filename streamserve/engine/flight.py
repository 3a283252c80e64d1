"""A plan on its way: in the making (Draft), handed to the runner (Flight), about to be sampled (Samples). Torch-free.

Beside what a runner is told (engine/plan.py) it holds whose the rows are. Plain data, made and read by the scheduler.
"""

from dataclasses import dataclass, field

from streamserve.engine.plan import Admission, Append, Encode, PageCopy, Plan, Row
from streamserve.engine.request import Request, Seat


@dataclass(slots=True)
class Draft:
    """A plan in the making."""

    admissions: list[Admission] = field(default_factory=list)
    appends: list[Append] = field(default_factory=list)
    copies: list[PageCopy] = field(default_factory=list)
    encodes: list[Encode] = field(default_factory=list)
    rows: list[Row] = field(default_factory=list)
    seats: list[Seat] = field(default_factory=list)  # of the rows
    num_more: int = 0  # tokens beyond one in each row
    is_guided: bool = False  # somebody's next token may depend on the one before
    num_drafts: int = 0  # guesses in its rows
    prompt_rows: int = 0
    prompt_tokens: int = 0
    has_chunks: bool = False  # rows that are neither one token nor that and guesses

    @property
    def num_tokens(self) -> int:
        return len(self.rows) + self.num_more


@dataclass(frozen=True, slots=True)
class Flight:
    """A plan that was handed to the runner, and whose rows it holds. `awaits_commit`: what may be sampled depends on the tokens
    of the step before it. `num_drafts`: guesses in it. `is_decode`: there is nothing in it but answers' rows.
    `wants_guesses`: the runner makes some behind it. `prompt_rows` of its rows compute `prompt_tokens` of prompts."""

    plan: Plan
    seats: tuple[Seat, ...]  # of its rows
    num_tokens: int
    awaits_commit: bool = False
    num_drafts: int = 0
    is_decode: bool = False
    wants_guesses: bool = False
    prompt_rows: int = 0
    prompt_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Samples:
    """What is to be sampled of a flight whose turn has come: rows by index. `unwanted` rows are not sampled, `guided` ones get a
    mask."""

    unwanted: frozenset[int]
    guided: tuple[tuple[int, Request], ...]
