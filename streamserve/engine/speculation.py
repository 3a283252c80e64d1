"""How many guesses a step verifies, and for whom. Torch-free; decides, computes nothing.

Owns the measured costs of steps. A guess costs what its token adds to the step's time and brings a token with some chance:
guesses join a step, the likeliest first, while they raise the step's expected tokens per second, and none do where a plain step has more.
A step with guesses cannot be planned over (nobody knows how long its answers will be), so the device waits for the host after
it: what that costs is in the times that were measured of such steps.
"""

from collections.abc import Sequence

from streamserve.engine.drafters.drafter import Drafter, Drafts


class StepCosts:
    """Seconds of a step without prompts by its tokens, learnt while serving: of plain steps, and of those with guesses."""

    def __init__(self, token_cost: float) -> None:
        """`token_cost`: by what part of a step of one token each further one is believed to lengthen it, until it was measured."""

    def observe(self, num_tokens: int, seconds: float, *, is_drafted: bool) -> None:
        """A step without prompts took so long."""


class Speculation:
    """One engine's."""

    def __init__(self, drafter: Drafter, costs: StepCosts) -> None:
        self.drafter = drafter
        self.costs = costs

    def choose(self, offers: Sequence[tuple[Drafts, int]], num_rows: int) -> list[Sequence[int]]:
        """Guesses for each offer: an answer, and how many guesses it may have (0 or more). The step has `num_rows` rows of one
        known token, those of the offers among them. All empty: a plain step is faster."""
        raise NotImplementedError

    def is_worth_waiting(self, offers: Sequence[tuple[Drafts, int]], num_rows: int) -> bool:
        """Whether guesses are likely to pay for these answers as soon as their newest tokens, now being computed, are known. The
        drafts know the tokens before those."""
        raise NotImplementedError
