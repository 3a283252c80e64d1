"""How many guesses a step verifies, and for whom. Torch-free; decides, computes nothing.

Owns what was seen of guesses; what steps cost is measured in step_costs.py. A guess costs what its token adds to the step's time
and brings a token with some chance: guesses join a step, the likeliest first, while they raise the step's expected tokens per
second, and none do where a plain step has more. But the time of a step is that of every answer in it, and its guesses bring
tokens to some. So that nobody is slowed down for long for the sake of others, tokens count less of answers that have had many
more in each step so far than others (proportional fairness, Kelly, Maulloo, Tan 1998, with a tolerance).

A step with guesses cannot be planned over (nobody knows how long its answers will be), so the device waits for the host after
it. What that costs before a step with guesses is in the times that were measured of such steps; what it costs before the plain
step that ends a run of them is measured as well, and shared by the run.

What guesses are hoped to bring may be wrong, above all of answers that have just begun, and in a large batch that is dear. So a
step verifies few until as many as were hoped for turned out right, then twice as many at a time (slow start, Jacobson 1988). Few
do not pay for themselves where more would, so when they turned out wrong it takes a while to the next ones.

Costs that were measured in a bad moment must not decide for ever. When costs have spoken against likely guesses for many steps,
what was learnt of steps with guesses is forgotten, and one step verifies the guesses of one answer. Where no plain step was
measured for long, a few go without guesses.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from streamserve.engine.drafters.drafter import NO_GUESS, Drafter, Drafts, Guess
from streamserve.engine.step_costs import LATELY, MAX_STEPS, SIZES, StepCosts

SLOW = 2.0  # times as fast as the slowest answer one may be, before its tokens count less
MARGIN = 1.03  # how much faster a step with guesses must promise to be
BEST_CHANCE = 0.95  # chance of guesses that are as good as can be hoped for, where none were asked for yet
LIKELY = 0.5  # chance of a guess that is worth a try
LEAST_CHANCE = 0.02  # what a guess must have, all those before it included
FIRST = 16  # guesses of a step, before any turned out right
KEPT = 0.6  # of what was hoped for must turn out right, for more in the next step
REST = 16  # steps without guesses after few that were to show that more would pay, and did not; twice as many the next time
MAX_REST = 128
PATIENCE = 64  # times that costs speak against likely guesses, before a try; twice as many after each in vain
MAX_PATIENCE = 4096
NUM_WITHOUT = 3  # plans: the second plain step in a row is the first to be measured
MAX_VAIN = 8  # looks for guesses in vain, before some are left out
LOOK_S = 35e-6  # seconds of a look for an answer, its new tokens taken in, on an ordinary host
LOOK_SHARE = 0.02  # of all steps' time, which looks in vain may take
UNSEEN = 32  # steps for which a network's guesses are not looked at where they do not pay
MEAN_RUN = 4.0  # steps with guesses that are expected to follow each other, before any did
LEAST_RUN = 0.25  # and at least, whatever was seen
REMEMBERED = 16  # steps for which it is remembered that no guesses could pay

_NOBODY = np.empty(0, np.intp)


class Offer(NamedTuple):
    """An answer whose guesses may be verified, and how many (0 or more). `pace`: tokens that it has had in each step so far."""

    drafts: Drafts
    most: int
    pace: float = 1.0


class Hope(NamedTuple):
    """What may be expected of an offer: the chance of the first guess, how many there are, the chance of each further one if
    those before it are right, and what a token counts."""

    first: float
    length: int
    further: float
    weight: float


class Speculation:
    """One engine's."""

    def __init__(self, drafter: Drafter, costs: StepCosts) -> None:
        self.drafter = drafter
        self.costs = costs
        self._patience = PATIENCE
        self._most = FIRST  # guesses of a step, at first
        self._hoped = 0.0  # how many of those in the last step were to be right
        self._were_few = False  # more would have paid
        self._rest = REST  # after the next ones that are few and wrong
        self._num_resting = 0  # steps still to come without guesses
        self._num_refused = 0  # times that costs spoke against guesses since they last spoke for some
        self._num_agreed = 0  # times that they spoke for some since the last try
        self._num_without = 0  # times to go without guesses, so that plain steps are measured
        self._went_without: dict[int, int] = {}  # rows: the step when that was begun last
        self._hopeless: dict[int, int] = {}  # rows for which no guesses could pay: as of so many observed steps
        self._num_vain = 0  # looks for guesses in a row that found none that pay
        self._are_refused = False  # there were likely ones the last time
        self._num_left_out = 0  # times that nobody looked since
        self._num_unseen = 0  # times that the runner's drafter was not asked, since it last was
        self._has_waited = False  # a step was waited for, and none was observed since
        self._run = 0  # steps with guesses, one after another, up to now
        self._mean_run = MEAN_RUN  # of such steps, behind each wait

    def step_took(self, num_tokens: int, seconds: float, *, is_drafted: bool, is_alone: bool) -> None:
        """A step without prompts took so long. `is_alone`: the device had waited for it. What a plain step costs then says
        nothing about those that follow each other at once; it is what the end of a run of steps with guesses costs."""
        if is_drafted:
            self._run += 1
        elif is_alone and (self._run or self._has_waited):
            self._mean_run = max(LEAST_RUN, self._mean_run + (self._run - self._mean_run) / MAX_STEPS)
            self._run = 0
        self._has_waited = False
        if is_drafted is is_alone:
            self.costs.observe(num_tokens, seconds, is_drafted=is_drafted)
        elif is_alone:
            self.costs.observe_alone(num_tokens, seconds)

    def turned_out(self, num_right: float) -> None:
        """So many guesses of the last step that had some were right."""
        if num_right >= KEPT * self._hoped:
            self._most, self._rest = min(2 * self._most, SIZES[-1]), REST
            return
        self._most = max(FIRST, self._most // 2)
        if self._were_few:
            self._num_resting, self._rest = self._rest, min(2 * self._rest, MAX_REST)

    def may_pay(self, num_rows: int, room: int) -> bool:
        """Whether it is worth looking for guesses at all in a step of so many rows of one token with room for so many guesses."""
        if room <= 0:
            return False
        if self.costs.are_free:
            return True
        if self._num_resting:
            self._num_resting -= 1
            return False
        if num_rows and self._is_to_be_measured(num_rows):
            return False
        num_rows = max(1, num_rows)  # nobody: the next one will have a row
        seen, since = self.costs.num_observed, self._hopeless.get(num_rows)
        if since is None or seen - since >= REMEMBERED:
            if self._could_pay(num_rows, room):
                self._hopeless.pop(num_rows, None)
                return not self._is_left_out(num_rows)
            self._hopeless[num_rows] = seen
        return self._may_try()

    def choose(self, offers: Sequence[Offer], num_rows: int, room: int) -> list[Sequence[int]]:
        """Guesses for each offer. The step has `num_rows` rows of one known token, those of the offers among them, and room for
        `room` guesses. All empty: a plain step is faster."""
        most = min(self.drafter.max_drafts, room)
        if most <= 0:
            return [()] * len(offers)
        guesses = [offer.drafts.guess(min(most, offer.most)) if offer.most > 0 else NO_GUESS for offer in offers]
        if self.costs.are_free:
            return _fitting([guess.token_ids for guess in guesses], room)
        slow = SLOW * min([offer.pace for offer in offers], default=1.0)
        hopes = [
            Hope(guess.chance, len(guess.token_ids), guess.chance, min(1.0, slow / offer.pace))
            for guess, offer in zip(guesses, offers, strict=True)
        ]
        lengths = self._lengths(hopes, num_rows, room, most=self._most)
        if lengths is not None:
            self._agrees()
            return [guess.token_ids[:length] for guess, length in zip(guesses, lengths, strict=True)]
        likeliest = max(guesses, key=_chance_of_first, default=NO_GUESS)
        self._looked_in_vain(_chance_of_first(likeliest))
        if _chance_of_first(likeliest) >= LIKELY and self._may_try():
            self._tries()
            return [guess.token_ids if guess is likeliest else () for guess in guesses]
        self._gives_up_trying(_chance_of_first(likeliest))
        return [()] * len(offers)

    def wants_guesses(self, offers: Sequence[Offer], num_rows: int, room: int) -> bool:
        """Whether the runner's drafter is to guess what follows the tokens of the next step: if those guesses are likely to be
        verified, and now and then only to see whether they are right."""
        if self.costs.are_free:
            return True
        hopes = self._hopes(offers, room)
        if self._lengths(hopes, num_rows, room) is None and not self._may_try():
            self._num_unseen += 1
            if self._num_unseen < UNSEEN:
                return False
        self._num_unseen = 0
        return bool(hopes)

    def is_worth_waiting(self, offers: Sequence[Offer], num_rows: int, room: int) -> bool:
        """Whether guesses are likely to pay for these answers as soon as their newest tokens, now being computed, are known. The
        drafts know the tokens before those."""
        if room <= 0:
            return False
        if self.costs.are_free:
            return any(offer.most > 0 for offer in offers)
        hopes = self._hopes(offers, room)
        # Once the guesses are over, the device waits for a plain step: each step of the run pays a part of that.
        wait = self.costs.wait(num_rows) / self._mean_run
        if self._lengths(hopes, num_rows, room, wait) is not None:
            self._has_waited = True
            self._num_vain = 0
            return True
        likeliest = max((hope.first for hope in hopes), default=0.0)
        self._looked_in_vain(likeliest)
        if likeliest >= LIKELY and self._may_try():
            return True
        self._gives_up_trying(likeliest)
        return False

    def _hopes(self, offers: Sequence[Offer], room: int) -> list[Hope]:
        """What may be expected of guesses behind the tokens that are being computed."""
        most, num_wanted = min(self.drafter.max_drafts, room), self.drafter.num_wanted
        hopes: list[Hope] = []
        slow = SLOW * min([offer.pace for offer in offers], default=1.0)
        for drafts, its_most, pace in offers:
            weight = min(1.0, slow / pace)
            if min(most, its_most) <= 0:
                continue
            guess = drafts.guess(min(most, its_most) + (0 if num_wanted else 1))
            if num_wanted:  # will come with the newest token, whichever that is
                hopes.append(Hope(guess.chance, min(most, its_most, num_wanted), guess.chance, weight))
            elif len(guess.token_ids) > 1:  # the newest token is expected to be the first of these
                hopes.append(Hope(guess.chance * guess.chance, len(guess.token_ids) - 1, guess.chance, weight))
        return hopes

    def _is_to_be_measured(self, num_rows: int) -> bool:
        """Whether to go without guesses because nobody knows lately what a plain step costs. Not for long: where each step waits
        for the one before it, plain ones are never measured."""
        if not self._num_without:
            now = self.costs.num_observed
            if self.costs.is_plain_known(num_rows) or now - self._went_without.get(num_rows, -LATELY) < LATELY:
                return False
            self._went_without[num_rows] = now
            self._num_without = NUM_WITHOUT
        self._num_without -= 1
        return True

    def _looked_in_vain(self, chance: float) -> None:
        """No guesses were found that pay, the likeliest of this chance."""
        self._num_vain += 1
        self._are_refused = chance >= LIKELY

    def _is_left_out(self, num_rows: int) -> bool:
        """Whether nobody looks for guesses this time, where looking takes a good part of a step. Good ones are good for many
        tokens, so those that are found a little later are most of them."""
        if self._num_vain < MAX_VAIN or self.drafter.num_wanted or self._num_refused > self._patience:
            return False
        every = int(LOOK_S * num_rows / (LOOK_SHARE * self.costs.plain(num_rows)))
        if every <= 1:
            return False
        self._num_left_out = (self._num_left_out + 1) % min(every, 1 + num_rows)
        self._num_refused += self._are_refused and self._num_left_out > 0
        return self._num_left_out > 0

    def _agrees(self) -> None:
        """Costs spoke for guesses."""
        self._num_refused = self._num_vain = 0
        self._num_agreed += 1
        if self._num_agreed == PATIENCE:
            self._patience = PATIENCE

    def _tries(self) -> None:
        """Guesses are verified although costs spoke against them."""
        self.costs.forget_drafted()
        self._patience = min(2 * self._patience, MAX_PATIENCE)
        self._num_refused = self._num_agreed = 0

    def _may_try(self) -> bool:
        self._num_refused += 1
        return self._num_refused > self._patience

    def _gives_up_trying(self, chance: float) -> None:
        """There was a step to try guesses in, and no likely guess."""
        if self._num_refused > self._patience and chance < LIKELY:
            self._num_refused = 0

    def _could_pay(self, num_rows: int, room: int) -> bool:
        """Whether guesses for all rows, or as many as there is room for, would pay if they were as good as can be hoped for."""
        least, few = self._least_rate(num_rows), min(num_rows, room)
        if self._rate(num_rows, 1, BEST_CHANCE) > least or self._rate(num_rows, few, few * BEST_CHANCE) > least:
            return True
        depth = min(self.drafter.max_drafts, room // max(1, num_rows))
        brought = [0.0]  # by a row's guesses, by how many they are
        for _ in range(depth):
            brought.append(BEST_CHANCE * (1.0 + brought[-1]))
        return any(self._rate(num_rows, num_rows * each, num_rows * brought[each]) > least for each in _thinned(depth))

    def _least_rate(self, num_rows: int) -> float:
        """Tokens per second that a step with guesses must promise."""
        return MARGIN * num_rows / self.costs.plain(num_rows)

    def _rate(self, num_rows: int, num_drafts: int, brought: float) -> float:
        """Tokens per second of a step with guesses that bring so many."""
        return (num_rows + brought) / self.costs.drafted(num_rows + num_drafts)

    def _lengths(
        self, hopes: Sequence[Hope], num_rows: int, room: int, more: float = 0.0, *, most: int | None = None
    ) -> list[int] | None:
        """How many guesses of each answer to verify, if any should be: at most so many in all. A step with guesses takes `more`
        seconds than is known of such steps."""
        brought, owners = _ranked(hopes)
        without = num_rows + sum([hope.weight - 1.0 for hope in hopes])  # what a plain step brings
        best, best_rate = 0, MARGIN * without / self.costs.plain(num_rows)
        for num_drafts in _thinned(min(len(brought), room)):
            rate = (without + brought[num_drafts - 1]) / (self.costs.drafted(num_rows + num_drafts) + more)
            if rate > best_rate:
                best, best_rate = num_drafts, rate
        if not best:
            return None
        if most is not None:
            self._were_few = best > most
            best = min(best, most)
            self._hoped = brought[best - 1]
        return [best] if len(hopes) == 1 else np.bincount(owners[:best], minlength=len(hopes)).tolist()


def _ranked(hopes: Sequence[Hope]) -> tuple[list[float], NDArray[np.intp]]:
    """All guesses, those first whose tokens count most: what they bring with those before them, and whose they are."""
    if len(hopes) == 1:  # as the step of a single stream: in 2 us instead of 20
        chance, length, further, weight = hopes[0]
        brought, total = [], 0.0
        for _ in range(length):
            if chance < LEAST_CHANCE:
                break
            total += chance * weight
            brought.append(total)
            chance *= further
        return brought, _NOBODY
    depths = np.arange(max((hope.length for hope in hopes), default=0))
    first, lengths, further_ones, weights = np.array(hopes, np.float64).reshape(-1, 4).T[:, :, None]
    chances = first * further_ones**depths
    rows, columns = np.nonzero((depths < lengths) & (chances >= LEAST_CHANCE))
    tokens = (chances * weights)[rows, columns]
    order = np.argsort(-tokens, kind="stable")  # of one answer the first guesses first
    return np.cumsum(tokens[order]).tolist(), rows[order]


def _fitting(guesses: Sequence[Sequence[int]], room: int) -> list[Sequence[int]]:
    """As many of the guesses as there is room for, the first first."""
    fitting = []
    for token_ids in guesses:
        fitting.append(token_ids[: max(0, room)])
        room -= len(fitting[-1])
    return fitting


def _chance_of_first(guess: Guess) -> float:
    return guess.chance if guess.token_ids else 0.0


def _thinned(most: int) -> list[int]:
    """1 to `most`: all small numbers, and of others those about a fifth apart."""
    numbers, number = [], 1
    while number < most:
        numbers.append(number)
        number += max(1, number // 5)
    return [*numbers, most] if most else []
