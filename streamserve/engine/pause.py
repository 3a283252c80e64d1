"""How long decode rows wait for a burst of prompts. Torch-free.

Owns the pause that is on, and what was computed in it. Knows neither requests nor plans.

On a fast device a burst of prompts is computed without the decode rows, chunk after chunk: one pause instead of many slow
steps, and the requests that came together go on together. A pause ends with the burst; when it has lasted `max_pause_s`; or,
after `min_pause_s`, when half of the burst is done: then the second half follows a little later, so that the two halves finish
at different times, and those that come in their places find a short queue. What is left of a burst is not halved again: every
pause is one more stall of every answer. After a pause that was cut short, decode rows have `run_s` for themselves.
"""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BurstLimits:
    """`tokens` that prompts bring make a burst. `step_tokens`: of one step of it (None: the most a step may hold), so that the
    first prompts need not wait for the last. `ride_tokens`: that ride along with decode rows in any other step (None: as many as
    it may hold); `media_tokens`: where prompts with media do. Those make no burst, so many such steps follow each other.
    `max_pause_s` 0: there are no pauses. `gather_rows` answers or more wait for every prompt that rides along, so these gather
    for `gather_s`: they may become a burst, or ride together."""

    max_pause_s: float = 0.0
    min_pause_s: float = 0.3
    run_s: float = 0.1
    tokens: int = 1024
    step_tokens: int | None = None
    ride_tokens: int | None = None
    media_tokens: int | None = None
    gather_rows: int = 16
    gather_s: float = 0.0


class Pause:
    """Whether decode rows wait."""

    def __init__(self, limits: BurstLimits, now: Callable[[], float]) -> None:
        self._limits = limits
        self._now = now
        self._since: float | None = None  # since when decode rows have been left out
        self._tokens = 0  # computed in this burst
        self._runs_until = 0.0
        self._is_rest = False  # of a burst that was cut

    def allows(self, has_tokens: Callable[[int], bool]) -> bool:
        """Whether the next step may leave decode rows out. `has_tokens(n)`: whether prompts that could run now bring n tokens."""
        limits, now = self._limits, self._now()
        if limits.max_pause_s <= 0 or now < self._runs_until:
            return False
        if not has_tokens(limits.tokens):
            self._is_rest = False
            return False
        if self._since is not None:
            lasted_s = now - self._since
            may_halve = lasted_s >= limits.min_pause_s and not self._is_rest
            if lasted_s >= limits.max_pause_s or (may_halve and self._is_halfway(has_tokens)):
                self._runs_until = now + limits.run_s
                self._is_rest = True
                return False
        return True

    def _is_halfway(self, has_tokens: Callable[[int], bool]) -> bool:
        """Whether half of the burst is done, and enough is left to be worth another pause."""
        return not has_tokens(self._tokens + 1) and has_tokens(self._tokens // 2)

    @property
    def is_cut(self) -> bool:
        """Whether decode rows have the device for themselves, because a burst was cut."""
        return self._now() < self._runs_until

    def goes_on(self, num_tokens: int, *, is_felt: bool) -> None:
        """A step of a burst was planned. `is_felt`: decode rows were left out."""
        self._tokens += num_tokens
        if self._since is None and is_felt:
            self._since = self._now()

    def ends(self) -> None:
        """Decode rows are in the step that was planned."""
        self._since = None
        self._tokens = 0
