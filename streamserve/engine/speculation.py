"""How many guesses a step verifies, and for whom. Torch-free; decides, computes nothing.

Owns the measured costs of steps. A guess costs what its token adds to the step's time and brings a token with some chance:
guesses join a step, the likeliest first, while they raise the step's expected tokens per second, and none do where a plain step
has more. A step with guesses cannot be planned over (nobody knows how long its answers will be), so the device waits for the
host after it: what that costs is in the times that were measured of such steps.

Costs that were measured in a bad moment must not rule guesses out for ever: when costs have spoken against likely guesses for
many steps, one step verifies those of one answer nevertheless, and is measured.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence

from streamserve.engine.drafters.drafter import Drafter, Drafts, Guess

# Numbers of tokens that are told apart; others count as the next larger one, as with the graphs of a GPU.
SIZES = (*range(1, 17), *(step * 2**octave for octave in range(2, 12) for step in (5, 6, 7, 8)))
MAX_STEPS = 8  # that a size remembers, about
FORGETS = 0.98  # what is left of a size's weight after each step of another one
LEAST_WEIGHT = 0.1  # sizes with less are forgotten
OUTLIER = 3.0  # times of steps are cut to so many times what was expected, either way
DRAFTED = 1.1  # what a step with guesses costs of one without, as is believed before any was measured

MARGIN = 1.03  # how much faster a step with guesses must promise to be
BEST_CHANCE = 0.95  # chance of guesses that are as good as can be hoped for, where none were asked for yet
LIKELY = 0.5  # chance of a guess that is worth a try
LEAST_CHANCE = 0.02  # what a guess must have, all those before it included
PATIENCE = 64  # times that costs speak against likely guesses, before a try; twice as many after each in vain
MAX_PATIENCE = 4096
REMEMBERED = 16  # steps for which it is remembered that no guesses could pay


class _Table:
    """Seconds of steps of one kind, by size. Weighs every size by how many steps of it were seen, and how long ago."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[float, float]] = {}  # size: seconds, weight
        self._points: list[tuple[int, float]] | None = []  # by size, never falling; None: to be made

    @property
    def is_empty(self) -> bool:
        return not self._seen

    def observe(self, size: int, seconds: float, expected: float) -> None:
        """A step took so long, where so long was expected."""
        before, weight = self._seen.get(size, (expected, 0.0))
        seconds = min(max(seconds, before / OUTLIER), before * OUTLIER)
        if weight < 3.0:  # the first ones may have compiled something
            now = min(before, seconds) if weight else seconds
        else:
            now = before + (seconds - before) / (min(weight, MAX_STEPS - 1) + 1.0)
        faded = {other: (s, w * FORGETS) for other, (s, w) in self._seen.items() if w * FORGETS >= LEAST_WEIGHT}
        faded[size] = (now, min(weight + 1.0, MAX_STEPS))
        self._seen = faded
        self._points = None

    def at(self, num_tokens: int, believed: Callable[[int], float]) -> float:
        """Seconds of a step of so many tokens: between sizes that were measured, or beyond them as `believed` goes."""
        points = self._points
        if points is None:
            points = self._points = self._never_falling()
        at = bisect_left(points, (num_tokens,))
        if at == len(points):
            size, seconds = points[-1]
            beyond = seconds * believed(num_tokens) / believed(size)
            if len(points) > 1 and num_tokens <= 2 * size:  # what was measured is hoped to go on, so that it is found out
                first, least = points[0]
                beyond = min(beyond, seconds + (seconds - least) / (size - first) * (num_tokens - size))
            return beyond
        size, seconds = points[at]
        if size == num_tokens:
            return seconds
        if at == 0:
            return seconds * believed(num_tokens) / believed(size)
        below, least = points[at - 1]
        return least + (seconds - least) * (num_tokens - below) / (size - below)

    def _never_falling(self) -> list[tuple[int, float]]:
        """Sizes and seconds; where a larger size seemed cheaper, both cost their mean (isotonic regression)."""
        pools: list[tuple[float, float, list[int]]] = []  # seconds, weight, sizes
        for size in sorted(self._seen):
            seconds, weight, sizes = *self._seen[size], [size]
            while pools and pools[-1][0] >= seconds:
                other, its_weight, its_sizes = pools.pop()
                seconds = (seconds * weight + other * its_weight) / (weight + its_weight)
                weight, sizes = weight + its_weight, its_sizes + sizes
            pools.append((seconds, weight, sizes))
        return [(size, seconds) for seconds, _, sizes in pools for size in sizes]


class StepCosts:
    """Seconds of a step without prompts by its tokens, learnt while serving: of plain steps, and of those with guesses. Both grow
    with the tokens. `num_observed`: how many steps were."""

    def __init__(self, token_cost: float) -> None:
        """`token_cost`: by what part of a step of one token each further one lengthens it, until that was measured."""
        self.are_free = False
        self.num_observed = 0
        self._token_cost = token_cost
        self._plain, self._drafted = _Table(), _Table()

    @staticmethod
    def free() -> "StepCosts":
        """Of a device to which all steps are the same, so that every guess is verified."""
        costs = StepCosts(0.0)
        costs.are_free = True
        return costs

    def observe(self, num_tokens: int, seconds: float, *, is_drafted: bool) -> None:
        """A step without prompts took so long."""
        self.num_observed += 1
        size = SIZES[min(bisect_left(SIZES, num_tokens), len(SIZES) - 1)]
        table, estimate = (self._drafted, self.drafted) if is_drafted else (self._plain, self.plain)
        table.observe(size, seconds, seconds if table.is_empty else estimate(size))

    def plain(self, num_tokens: int) -> float:
        """Seconds of a step without guesses. Before any was measured only ratios mean something."""
        if self._plain.is_empty and not self._drafted.is_empty:
            return self._drafted.at(num_tokens, self._believed) / DRAFTED
        return self._believed(num_tokens) if self._plain.is_empty else self._plain.at(num_tokens, self._believed)

    def drafted(self, num_tokens: int) -> float:
        """Seconds of a step with guesses, which are among the tokens. Where none were measured, as plain ones go."""
        return DRAFTED * self.plain(num_tokens) if self._drafted.is_empty else self._drafted.at(num_tokens, self.plain)

    def _believed(self, num_tokens: int) -> float:
        return 1.0 + self._token_cost * (num_tokens - 1)


class Speculation:
    """One engine's."""

    def __init__(self, drafter: Drafter, costs: StepCosts) -> None:
        self.drafter = drafter
        self.costs = costs
        self._num_refused = 0  # times in a row that costs spoke against guesses
        self._patience = PATIENCE
        self._hopeless: dict[int, int] = {}  # rows for which no guesses could pay: as of so many observed steps

    def may_pay(self, num_rows: int) -> bool:
        """Whether it is worth looking for guesses at all, in a step of so many rows of one token."""
        if self.costs.are_free:
            return True
        seen, since = self.costs.num_observed, self._hopeless.get(num_rows)
        if since is None or seen - since >= REMEMBERED:
            if self._could_pay(num_rows):
                self._hopeless.pop(num_rows, None)
                return True
            self._hopeless[num_rows] = seen
        return self._may_try()

    def choose(self, offers: Sequence[tuple[Drafts, int]], num_rows: int) -> list[Sequence[int]]:
        """Guesses for each offer: an answer, and how many guesses it may have (0 or more). The step has `num_rows` rows of one
        known token, those of the offers among them. All empty: a plain step is faster."""
        most = self.drafter.max_drafts
        guesses = [drafts.guess(min(most, room)) if room > 0 else Guess() for drafts, room in offers]
        if self.costs.are_free:
            return [guess.token_ids for guess in guesses]
        lengths = self._lengths([(guess.chance, len(guess.token_ids), guess.chance) for guess in guesses], num_rows)
        if lengths is not None:
            self._num_refused, self._patience = 0, PATIENCE
            return [guess.token_ids[:length] for guess, length in zip(guesses, lengths, strict=True)]
        likeliest = max(guesses, key=_chance_of_first, default=Guess())
        if _chance_of_first(likeliest) >= LIKELY and self._may_try():
            self._num_refused, self._patience = 0, min(2 * self._patience, MAX_PATIENCE)
            return [guess.token_ids if guess is likeliest else () for guess in guesses]
        self._gives_up_trying(_chance_of_first(likeliest))
        return [()] * len(offers)

    def is_worth_waiting(self, offers: Sequence[tuple[Drafts, int]], num_rows: int) -> bool:
        """Whether guesses are likely to pay for these answers as soon as their newest tokens, now being computed, are known. The
        drafts know the tokens before those."""
        most, num_wanted = self.drafter.max_drafts, self.drafter.num_wanted
        if self.costs.are_free:
            return any(room > 0 for _, room in offers)
        hopes = []
        for drafts, room in offers:
            if room <= 0:
                continue
            guess = drafts.guess(min(most, room) + (0 if num_wanted else 1))
            if num_wanted:  # will come with the newest token, whichever that is
                hopes.append((guess.chance, min(most, room, num_wanted), guess.chance))
            elif len(guess.token_ids) > 1:  # the newest token is expected to be the first of these
                hopes.append((guess.chance * guess.chance, len(guess.token_ids) - 1, guess.chance))
        if self._lengths(hopes, num_rows) is not None:
            return True
        likeliest = max((first for first, _, _ in hopes), default=0.0)
        if likeliest >= LIKELY and self._may_try():
            return True
        self._gives_up_trying(likeliest)
        return False

    def _may_try(self) -> bool:
        self._num_refused += 1
        return self._num_refused > self._patience

    def _gives_up_trying(self, chance: float) -> None:
        """There was a step to try guesses in, and no likely guess."""
        if self._num_refused > self._patience and chance < LIKELY:
            self._num_refused = 0

    def _could_pay(self, num_rows: int) -> bool:
        """Whether guesses for all rows would pay if they were as good as can be hoped for."""
        depth = self.drafter.max_drafts
        brought = [0.0]  # by a row's guesses, by how many they are
        for _ in range(depth):
            brought.append(BEST_CHANCE * (1.0 + brought[-1]))
        least = self._least_rate(num_rows)
        if self._rate(num_rows, 1, BEST_CHANCE) > least:
            return True
        return any(self._rate(num_rows, num_rows * each, num_rows * brought[each]) > least for each in _thinned(depth))

    def _least_rate(self, num_rows: int) -> float:
        """Tokens per second that a step with guesses must promise."""
        return MARGIN * num_rows / self.costs.plain(num_rows)

    def _rate(self, num_rows: int, num_drafts: int, brought: float) -> float:
        """Tokens per second of a step with guesses that bring so many."""
        return (num_rows + brought) / self.costs.drafted(num_rows + num_drafts)

    def _lengths(self, hopes: Sequence[tuple[float, int, float]], num_rows: int) -> list[int] | None:
        """How many guesses of each answer to verify, if any should be. Of each is given: the chance of its first one, how many
        there are, and the chance of each further one if those before it are right."""
        ranked: list[tuple[float, int]] = []
        for i, (chance, length, further) in enumerate(hopes):
            for _ in range(length):
                if chance < LEAST_CHANCE:
                    break
                ranked.append((-chance, i))
                chance *= further
        ranked.sort()
        best, best_rate = 0, self._least_rate(num_rows)
        brought, done = 0.0, 0
        for num_drafts in _thinned(len(ranked)):
            brought -= sum(chance for chance, _ in ranked[done:num_drafts])
            done = num_drafts
            rate = self._rate(num_rows, num_drafts, brought)
            if rate > best_rate:
                best, best_rate = num_drafts, rate
        if not best:
            return None
        lengths = [0] * len(hopes)
        for _, i in ranked[:best]:
            lengths[i] += 1
        return lengths


def _chance_of_first(guess: Guess) -> float:
    return guess.chance if guess.token_ids else 0.0


def _thinned(most: int) -> list[int]:
    """1 to `most`: all small numbers, and of others those about a fifth apart."""
    numbers, number = [], 1
    while number < most:
        numbers.append(number)
        number += max(1, number // 5)
    return [*numbers, most] if most else []
