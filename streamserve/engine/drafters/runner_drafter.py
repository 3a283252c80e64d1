"""The seam between a runner and a drafter that computes: one that guesses with a network of its own, behind every step.

It stands between the runner and the network. What a guess is worth, and how many are verified, is not known here. Wrong or
missing memory of a drafter makes its guesses worse, never the answer wrong: so nothing here is rolled back or repaired.

A drafter's keys and values lie in a pool of its own, under the page numbers of the target's: whoever shares, copies or frees a
page does so for both. Behind the last page that a row has, the drafter has a few pages of its own for what it guesses.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from streamserve.engine.plan import Plan, RowResult
from streamserve.kernels.ops import Batch


class RunnerDrafter(Protocol):
    """Called in the step's thread, for every plan in order: `forward`, then `follow`."""

    def forward(self, plan: Plan, batch: Batch) -> Tensor:
        """Compute the plan's rows on the target, as Network.forward does, and keep what guessing needs of them. The plan's
        admissions and page copies are taken over."""
        ...

    def follow(self, plan: Plan, results: Sequence[RowResult]) -> list[tuple[int, ...]]:
        """The plan's tokens are chosen: take in what is certain now, and guess. Of each row at most `num_wanted` tokens that may
        follow its last token; none where it got none."""
        ...
