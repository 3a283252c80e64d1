"""The seam between a GPU's runner and a network that guesses: launched behind every step, without waiting for what it brought.

What a guess is worth, and how many are verified, is not known here. Guesses come to the host with the step's tokens, and go into
the next plan as known tokens. Wrong or missing memory of a drafter makes its guesses worse, never the answer wrong.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from streamserve.engine.device_state import Loaded, StepSize
from streamserve.engine.plan import Plan


class Guesses(NamedTuple):
    """On their way to the host: guess k of row r of a plan is `tokens_KR[k, lines[r]]`, once the step's event has come."""

    tokens_KR: Tensor
    lines: dict[int, int]


class DeviceDrafter(Protocol):
    """`follow` only launches, on the current stream and in the order of plans. The rest comes before any plan."""

    def follow(self, plan: Plan, loaded: Loaded, unwanted: frozenset[int]) -> Guesses | None:
        """A plan's tokens were chosen, but for its rows in `unwanted`, and stand in the slots' state: take in what is certain
        now, and guess what follows the last token of rows that want it. `loaded` is what the target computed."""
        ...

    def warm_up(self) -> None:
        """Run every kind of pass, so that kernels are compiled and memory grows to what passes take."""
        ...

    def warm_up_long(self, max_len: int, max_chunk: int) -> None:
        """See DeviceNetwork.warm_up."""
        ...

    def capture(self, sizes: Sequence[StepSize], progress: Callable[[int, int], None]) -> None:
        """Capture the graphs of passes. `sizes`: of the target's captured steps."""
        ...
