"""How long decode rows wait for a burst of prompts. Torch-free.

Owns the pause that is on. Knows neither requests nor plans.

Prompts ride along with decode rows, so many of their tokens in each step that it takes about twice as long: reading the weights
for both costs no more than for one, and requests that came together are not through together, nor are those that come in their
places. Where more prompts wait than ride along in a while, decode rows wait for them, so that a large batch gathers soon: one
pause instead of many slow steps. It ends when what is left of the burst may ride, or when it has lasted `max_pause_s`; then
decode rows have `run_s` for themselves.
"""

from collections.abc import Callable
from dataclasses import dataclass

RIDE_PER_ROW = 3  # prompt tokens


@dataclass(frozen=True, slots=True)
class BurstLimits:
    """`tokens` that prompts bring make a burst. `step_tokens`: of one step of prompts alone (None: the most a step may hold), so
    that the first prompts need not wait for the last. `ride_tokens`: that ride along with decode rows in any other step, and
    `RIDE_PER_ROW` for each of these if that is more (None: as many as it may hold); `media_tokens`: where prompts with media do.
    Those make no burst, so many such steps follow each other.
    `max_pause_s` 0: there are no pauses. `gather_rows` answers or more wait for every prompt that rides along, so these gather
    for `gather_s`: they may become a burst, or ride together."""

    max_pause_s: float = 0.0
    run_s: float = 0.1
    tokens: int = 1024
    step_tokens: int | None = None
    ride_tokens: int | None = None
    media_tokens: int | None = None
    gather_rows: int = 16
    gather_s: float = 0.0

    def riding(self, num_rows: int, most: int) -> int:
        """Prompt tokens of a step that has so many decode rows, and room for `most`."""
        return most if self.ride_tokens is None else min(most, max(self.ride_tokens, RIDE_PER_ROW * num_rows))


class Pause:
    """Whether decode rows wait."""

    def __init__(self, limits: BurstLimits, now: Callable[[], float]) -> None:
        self._limits = limits
        self._now = now
        self._since: float | None = None  # since when decode rows have been left out
        self._runs_until = 0.0

    def allows(self, has_tokens: Callable[[int], bool]) -> bool:
        """Whether the next step may leave decode rows out. `has_tokens(n)`: whether prompts that could run now bring n tokens."""
        limits, now = self._limits, self._now()
        if limits.max_pause_s <= 0 or now < self._runs_until or not has_tokens(limits.tokens):
            return False
        if self._since is not None and now - self._since >= limits.max_pause_s:
            self._runs_until = now + limits.run_s
            return False
        return True

    @property
    def is_cut(self) -> bool:
        """Whether decode rows have the device for themselves, because a burst was cut."""
        return self._now() < self._runs_until

    def goes_on(self, *, is_felt: bool) -> None:
        """A step of a burst was planned. `is_felt`: decode rows were left out."""
        if self._since is None and is_felt:
            self._since = self._now()

    def ends(self) -> None:
        """Decode rows are in the step that was planned."""
        self._since = None
