"""What steps cost, learnt while serving: seconds by tokens, of plain steps and of those with guesses. Torch-free.

Owns the measurements. Costs that were measured in a bad moment fade; who decides by them is speculation.py.
"""

from bisect import bisect_left
from collections.abc import Callable

# Numbers of tokens that are told apart; others count as the next larger one.
SIZES = (*range(1, 17), *(step * 2**octave for octave in range(2, 12) for step in (5, 6, 7, 8)))
MAX_STEPS = 8  # that a size remembers, about
FORGETS = 0.98  # what is left of a size's weight after each step of another one
LEAST_WEIGHT = 0.1  # sizes with less are forgotten
SURE = 3.0  # weight up to which a size has its least time: of the first steps one may have compiled something
OUTLIER = 3.0  # further times are cut to so many times what was expected, either way
DRAFTED = 1.1  # what a step with guesses costs of one without, as is believed before any was measured
LEAST_S = 1e-7  # of a step, whatever a coarse clock says
LATELY = 512  # among so many steps a plain one must have been measured


class _Size:
    """Steps of about a size: their mean tokens and seconds, and how much they count: by how many they were, and how long ago."""

    __slots__ = ("seconds", "seen_at", "tokens", "weight")

    def __init__(self, num_tokens: int, seconds: float) -> None:
        self.tokens = float(num_tokens)
        self.seconds = seconds
        self.weight = 1.0
        self.seen_at = 0

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Another step."""
        if self.weight < SURE:
            if seconds <= self.seconds:
                self.tokens, self.seconds = float(num_tokens), seconds
        else:
            share = 1.0 / (min(self.weight, MAX_STEPS - 1) + 1.0)
            self.tokens += (num_tokens - self.tokens) * share
            self.seconds += (min(max(seconds, self.seconds / OUTLIER), self.seconds * OUTLIER) - self.seconds) * share
        self.weight = min(self.weight + 1.0, MAX_STEPS)


class _Table:
    """Seconds of steps of one kind, by size."""

    def __init__(self) -> None:
        self._sizes: dict[int, _Size] = {}
        self._points: list[tuple[float, float]] | None = []  # tokens and seconds, neither ever falling; None: to be made

    @property
    def is_empty(self) -> bool:
        return not self._sizes

    def observe(self, num_tokens: int, seconds: float, now: int) -> None:
        """A step took so long; the `now`th of all."""
        for size, other in list(self._sizes.items()):
            other.weight *= FORGETS
            if other.weight < LEAST_WEIGHT:
                del self._sizes[size]
        size = SIZES[min(bisect_left(SIZES, num_tokens), len(SIZES) - 1)]
        if size in self._sizes:
            self._sizes[size].observe(num_tokens, seconds)
        else:
            self._sizes[size] = _Size(num_tokens, seconds)
        self._sizes[size].seen_at = now
        self._points = None

    def has_seen(self, num_tokens: int, since: int) -> bool:
        """Whether there was a step of about so many tokens since."""
        return any(s.seen_at >= since and 3 * num_tokens <= 4 * s.tokens <= 5 * num_tokens for s in self._sizes.values())

    def at(self, num_tokens: float, believed: Callable[[float], float]) -> float:
        """Seconds of a step of so many tokens: between sizes that were measured, or beyond them as `believed` goes."""
        points = self._points
        if points is None:
            points = self._points = self._never_falling()
        at = bisect_left(points, (num_tokens,))
        if at == len(points):
            largest, seconds = points[-1]
            beyond = seconds * believed(num_tokens) / believed(largest)
            if len(points) > 1 and num_tokens <= 2 * largest:  # what was measured is hoped to go on, so that it is found out
                smallest, least = points[0]
                beyond = min(beyond, seconds + (seconds - least) / (largest - smallest) * (num_tokens - largest))
            return beyond
        above, seconds = points[at]
        if above == num_tokens:
            return seconds
        if at == 0:
            return seconds * believed(num_tokens) / believed(above)
        below, least = points[at - 1]
        return least + (seconds - least) * (num_tokens - below) / (above - below)

    def _never_falling(self) -> list[tuple[float, float]]:
        """Tokens and seconds of each size; where a larger one seemed cheaper, both cost their mean (isotonic regression)."""
        pools: list[tuple[float, float, list[float]]] = []  # seconds, weight, tokens of the sizes
        for _, size in sorted(self._sizes.items()):
            seconds, weight, tokens = size.seconds, size.weight, [size.tokens]
            while pools and pools[-1][0] >= seconds:
                other, its_weight, its_tokens = pools.pop()
                seconds = (seconds * weight + other * its_weight) / (weight + its_weight)
                weight, tokens = weight + its_weight, its_tokens + tokens
            pools.append((seconds, weight, tokens))
        return [(num_tokens, seconds) for seconds, _, tokens in pools for num_tokens in tokens]


class StepCosts:
    """Seconds of a step without prompts by its tokens, learnt while serving: of plain steps, and of those with guesses. Both grow
    with the tokens. `num_observed`: how many steps were."""

    def __init__(self, token_cost: float) -> None:
        """`token_cost`: by what part of a step of one token each further one lengthens it, until that was measured."""
        self.are_free = False
        self.num_observed = 0
        self._token_cost = token_cost
        self._plain, self._drafted = _Table(), _Table()
        self._wait: float | None = None  # seconds

    @staticmethod
    def free() -> "StepCosts":
        """Of a device to which all steps are the same, so that every guess is verified."""
        costs = StepCosts(0.0)
        costs.are_free = True
        return costs

    def observe(self, num_tokens: int, seconds: float, *, is_drafted: bool) -> None:
        """A step without prompts took so long."""
        self.num_observed += 1
        seconds = max(seconds, LEAST_S)
        (self._drafted if is_drafted else self._plain).observe(num_tokens, seconds, self.num_observed)

    def observe_alone(self, num_tokens: int, seconds: float) -> None:
        """A plain step for which the device had waited took so long. What that adds depends on the host, not on the tokens."""
        if not self._plain.is_empty:
            plain = self.plain(num_tokens)
            wait = min(max(seconds - plain, 0.0), OUTLIER * plain)
            self._wait = wait if self._wait is None else self._wait + (wait - self._wait) / MAX_STEPS

    def wait(self, num_tokens: float) -> float:
        """Seconds that a plain step takes longer if the device has waited for it."""
        return (DRAFTED - 1.0) * self.plain(num_tokens) if self._wait is None else self._wait

    def is_plain_known(self, num_tokens: int) -> bool:
        """Whether a plain step of about so many tokens was measured lately."""
        return self._plain.has_seen(num_tokens, self.num_observed - LATELY)

    def forget_drafted(self) -> None:
        """Of steps with guesses nothing is known any more."""
        self._drafted = _Table()

    def plain(self, num_tokens: float) -> float:
        """Seconds of a step without guesses. Before any was measured only ratios mean something."""
        if self._plain.is_empty and not self._drafted.is_empty:
            return self._drafted.at(num_tokens, self._believed) / DRAFTED
        return self._believed(num_tokens) if self._plain.is_empty else self._plain.at(num_tokens, self._believed)

    def drafted(self, num_tokens: float) -> float:
        """Seconds of a step with guesses, which are among the tokens. Where none were measured, as plain ones go."""
        return DRAFTED * self.plain(num_tokens) if self._drafted.is_empty else self._drafted.at(num_tokens, self.plain)

    def _believed(self, num_tokens: float) -> float:
        return 1.0 + self._token_cost * (num_tokens - 1)
