"""The seam between the scheduler and whoever guesses. Torch-free.

A guess is never trusted: the step that computes it samples every position of it (engine/plan.py, Row), so a drafter
changes when tokens come, never which. Two kinds of drafter share the seam: one that guesses on the host, when the plan is made
(ngram.py), and one that is part of the runner and guesses on the device behind a step; its guesses come back with the step's
tokens (runner_drafts.py).
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from streamserve.messages import GenerateRequest


class Guess(NamedTuple):
    """What may come next. `chance`: how likely each token is right, given that those before it are; 0 to 1."""

    token_ids: Sequence[int] = ()
    chance: float = 0.0


NO_GUESS = Guess()


class Drafts(Protocol):
    """What a drafter knows of one answer. Told of every token of the answer, in order."""

    def grew(self, token_ids: Sequence[int]) -> None:
        """The answer has these tokens more: sampled, or appended."""
        ...

    def offered(self, token_ids: Sequence[int]) -> None:
        """The runner's drafter guesses that these follow the answer's newest token."""
        ...

    def guess(self, most: int) -> Guess:
        """At most so many tokens (at least 1). Changes nothing: it may be asked again before the answer grows."""
        ...

    def observe(self, num_drafted: int, num_accepted: int) -> None:
        """So many of the guessed tokens (at least 1) were computed, so many of them were right. Who remembers what it guessed is
        told as much by `grew`."""
        ...

    def close(self) -> None:
        """The answer is over."""
        ...


class Drafter(Protocol):
    """Opens Drafts. `max_drafts`: most guesses in a row of a step. `num_wanted`: how many the runner's own drafter should make
    behind every token; 0 of a drafter on the host."""

    max_drafts: int
    num_wanted: int

    def open(self, request: GenerateRequest, token_ids: Sequence[int]) -> Drafts:
        """For a request whose answer begins behind `token_ids` (its prompt, and what was forced behind it)."""
        ...
