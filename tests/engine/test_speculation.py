"""How many guesses a step verifies: the costs of steps as they are learnt, and the choice by them."""

from collections.abc import Callable, Sequence
from itertools import pairwise, product
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamserve.engine.drafters.drafter import Drafts, Guess
from streamserve.engine.drafters.runner_drafts import OfferedDrafter
from streamserve.engine.speculation import (
    FIRST,
    LIKELY,
    MARGIN,
    MAX_PATIENCE,
    MAX_REST,
    NUM_WITHOUT,
    PATIENCE,
    REST,
    Offer,
    Speculation,
)
from streamserve.engine.step_costs import LATELY, SIZES, StepCosts
from streamserve.messages import GenerateRequest

# ---- costs -----------------------------------------------------------------------------------------------------------------


def _observe(costs: StepCosts, seconds: dict[int, float], *, is_drafted: bool, times: int = 8) -> None:
    for _ in range(times):
        for num_tokens, took in seconds.items():
            costs.observe(num_tokens, took, is_drafted=is_drafted)


def _cost(costs: StepCosts, *, is_drafted: bool) -> Callable[[int], float]:
    return costs.drafted if is_drafted else costs.plain


KINDS = pytest.mark.parametrize("is_drafted", [False, True])


def test_before_any_step_costs_go_as_is_believed() -> None:
    costs = StepCosts(0.25)
    assert [costs.plain(n) / costs.plain(1) for n in (1, 2, 5, 100)] == [1.0, 1.25, 2.0, 25.75]
    assert costs.drafted(4) > costs.plain(4), "a device that waits for the host is believed to cost something"


@KINDS
def test_costs_between_measured_ones_are_interpolated_and_those_beyond_go_as_believed(is_drafted: bool) -> None:
    costs = StepCosts(0.5)
    _observe(costs, {2: 4.0, 6: 10.0, 10: 30.0}, is_drafted=is_drafted)
    cost = _cost(costs, is_drafted=is_drafted)
    assert [cost(n) for n in (2, 3, 6, 8, 10)] == pytest.approx([4.0, 5.5, 10.0, 20.0, 30.0])
    assert cost(1) == pytest.approx(4.0 / 1.5)
    assert cost(40) == pytest.approx(30.0 * (1 + 0.5 * 39) / (1 + 0.5 * 9))


def test_steps_with_guesses_cost_as_plain_ones_go_until_they_are_measured_and_the_other_way_round() -> None:
    costs = StepCosts(0.0)
    _observe(costs, {1: 2.0, 8: 9.0, 64: 50.0}, is_drafted=False)
    assert costs.drafted(8) / costs.drafted(1) == pytest.approx(4.5)
    _observe(costs, {8: 18.0}, is_drafted=True)
    assert costs.drafted(64) == pytest.approx(100.0)
    other = StepCosts(0.0)
    _observe(other, {3: 5.0}, is_drafted=True)
    assert 0.8 * 5.0 < other.plain(3) < 5.0


@KINDS
def test_more_tokens_never_cost_less(is_drafted: bool) -> None:
    costs = StepCosts(0.1)
    _observe(costs, {1: 1.0, 4: 5.0, 8: 3.0, 9: 8.0}, is_drafted=is_drafted)
    cost = _cost(costs, is_drafted=is_drafted)
    assert cost(4) == pytest.approx(cost(8)) and 3.0 < cost(4) < 5.0
    assert (cost(1), cost(9)) == pytest.approx((1.0, 8.0))


@given(
    seen=st.lists(st.tuples(st.integers(1, 300), st.floats(1e-4, 1e2), st.booleans()), max_size=60),
    token_cost=st.floats(0.0, 2.0),
)
def test_costs_grow_with_the_tokens_whatever_was_seen(seen: list[tuple[int, float, bool]], token_cost: float) -> None:
    costs = StepCosts(token_cost)
    for num_tokens, seconds, is_drafted in seen:
        costs.observe(num_tokens, seconds, is_drafted=is_drafted)
    for cost in (costs.plain, costs.drafted):
        times = [cost(n) for n in (*range(1, 40), 64, 200, 301, 5000)]
        assert all(0 < a <= b * (1 + 1e-9) for a, b in pairwise(times))


def test_the_first_steps_of_a_size_may_compile_something() -> None:
    costs = StepCosts(0.1)
    for seconds in (50.0, 1.0, 1.1):
        costs.observe(1, seconds, is_drafted=False)
    assert costs.plain(1) <= 1.1


@pytest.mark.parametrize("is_drafted", [False, True])
def test_steps_that_took_no_time_by_a_coarse_clock_are_got_over(is_drafted: bool) -> None:
    costs = StepCosts(0.1)
    _observe(costs, {1: 0.0}, is_drafted=is_drafted, times=3)
    speculation = Speculation(_Drafter(), costs)
    for _ in range(8):
        speculation.choose(_offers(_Guesser(0.9)), 1, ROOM)
    _observe(costs, {1: 1.0}, is_drafted=is_drafted, times=120)
    assert _cost(costs, is_drafted=is_drafted)(1) == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize("outlier", [100.0, 0.0])
def test_an_outlier_counts_little(outlier: float) -> None:
    costs = StepCosts(0.1)
    _observe(costs, {1: 1.0}, is_drafted=False, times=20)
    costs.observe(1, outlier, is_drafted=False)
    assert 0.7 < costs.plain(1) < 1.3 and costs.plain(1) != 1.0


@KINDS
@pytest.mark.parametrize("factor", [2.5, 0.4])
def test_costs_that_change_are_followed(factor: float, is_drafted: bool) -> None:
    costs = StepCosts(0.1)
    _observe(costs, {1: 1.0}, is_drafted=is_drafted, times=50)
    _observe(costs, {1: factor}, is_drafted=is_drafted, times=40)
    assert _cost(costs, is_drafted=is_drafted)(1) == pytest.approx(factor, rel=0.05)


def test_a_size_that_is_not_seen_any_more_is_forgotten() -> None:
    costs = StepCosts(0.1)
    _observe(costs, {4: 1.0, 8: 3.0, 6: 2.9}, is_drafted=True)
    assert costs.drafted(6) == pytest.approx(2.9)
    _observe(costs, {4: 1.0, 8: 3.0}, is_drafted=True, times=60)
    assert 2.0 < costs.drafted(6) < 2.9 + 1e-9
    _observe(costs, {4: 1.0, 8: 3.0}, is_drafted=True, times=60)
    assert costs.drafted(6) == pytest.approx(2.0)


def test_flat_costs_are_hoped_to_go_on_for_as_many_tokens_again() -> None:
    costs = StepCosts(1.0)
    _observe(costs, {2: 1.0, 5: 1.0}, is_drafted=True)
    assert costs.drafted(10) == pytest.approx(1.0)
    assert costs.drafted(20) == pytest.approx(4.0)


def test_large_steps_share_sizes() -> None:
    costs = StepCosts(0.1)
    _observe(costs, {33: 1.0, 39: 1.6, 100_000: 7.0, 200_000: 7.0}, is_drafted=False)
    assert 1.0 < costs.plain(36) < 1.6
    assert costs.plain(SIZES[-1]) < 7.0
    mixed = StepCosts(0.1)
    _observe(mixed, {33: 3.3, 39: 3.9}, is_drafted=False, times=20)
    assert mixed.plain(36) == pytest.approx(3.6, rel=0.02)
    assert costs.plain(200_000) == pytest.approx(7.0, rel=0.5)


# ---- the choice --------------------------------------------------------------------------------------------------------------


class _Guesser:
    """Drafts that always make the same guess."""

    def __init__(self, chance: float, length: int = 100) -> None:
        self.chance, self.length = chance, length
        self.num_asked = 0

    def grew(self, token_ids: Sequence[int]) -> None: ...

    def offered(self, token_ids: Sequence[int]) -> None: ...

    def guess(self, most: int) -> Guess:
        assert most > 0
        self.num_asked += 1
        return Guess(range(min(most, self.length)), self.chance)

    def observe(self, num_drafted: int, num_accepted: int) -> None: ...

    def close(self) -> None: ...


class _Drafter:
    def __init__(self, max_drafts: int = 12, num_wanted: int = 0) -> None:
        self.max_drafts, self.num_wanted = max_drafts, num_wanted

    def open(self, request: GenerateRequest, token_ids: Sequence[int]) -> Drafts:
        raise AssertionError


def _costs(plain: Callable[[int], float], drafted: Callable[[int], float], sizes: Sequence[int]) -> StepCosts:
    costs = StepCosts(0.1)
    _observe(costs, {n: plain(n) for n in sizes}, is_drafted=False, times=4)
    _observe(costs, {n: drafted(n) for n in sizes}, is_drafted=True, times=4)
    return costs


ROOM = 100_000
SOME_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)


def on_a_cpu() -> StepCosts:
    """SmolLM2-135M on two cores: milliseconds."""
    return _costs(lambda n: 8.0 + 1.9 * n, lambda n: 8.2 + 1.9 * n, SOME_SIZES)


def on_a_gpu() -> StepCosts:
    """8B on an H200: the weights are read once for all rows, until arithmetic takes longer than that."""
    return _costs(lambda n: max(4.1 + 0.03 * n, 0.05 * n), lambda n: max(4.7 + 0.03 * n, 0.05 * n), SOME_SIZES)


def _trusting(speculation: Speculation) -> Speculation:
    """Guesses have turned out right for long."""
    for _ in range(10):
        speculation.turned_out(1e9)
    return speculation


def _offers(*guessers: _Guesser, room: int = 1000) -> list[Offer]:
    return [Offer(guesser, room) for guesser in guessers]


@pytest.mark.parametrize(
    ("costs", "num_rows", "chances", "least", "most"),
    [
        (on_a_cpu, 1, [0.97], 11, 12),  # a copied text
        (on_a_cpu, 1, [0.8], 4, 8),
        (on_a_cpu, 1, [0.5], 1, 3),
        (on_a_cpu, 1, [0.15], 0, 0),  # chat
        (on_a_cpu, 4, [0.9], 1, 8),  # one of four rows
        (on_a_cpu, 16, [0.8] * 16, 0, 0),  # arithmetic bounds the step: a token costs nearly what it brings
        (on_a_cpu, 16, [0.98] * 16, 16, 192),
        (on_a_gpu, 1, [0.3], 2, 12),
        (on_a_gpu, 1, [0.8], 10, 12),
        (on_a_gpu, 1, [0.05], 0, 0),
        (on_a_gpu, 16, [0.8] * 16, 60, 192),
        (on_a_gpu, 64, [0.2] * 64, 0, 0),
        (on_a_gpu, 64, [0.9] + [0.0] * 63, 0, 0),  # one answer's guesses do not make up for the wait of 64
    ],
)
def test_as_many_guesses_are_verified_as_pay(
    costs: Callable[[], StepCosts], num_rows: int, chances: list[float], least: int, most: int
) -> None:
    speculation = _trusting(Speculation(_Drafter(), costs()))
    chosen = speculation.choose(_offers(*map(_Guesser, chances)), num_rows, ROOM)
    assert least <= sum(map(len, chosen)) <= most
    assert all(list(guess) == list(range(len(guess))) for guess in chosen), "guesses from the first one on"


@given(
    hopes=st.lists(st.tuples(st.floats(0.0, 1.0), st.integers(0, 4)), min_size=1, max_size=3),
    others=st.integers(0, 3),
    times=st.lists(st.floats(0.5, 2.0), min_size=20, max_size=20),
    overhead=st.floats(1.0, 1.3),
)
def test_no_other_lengths_promise_more(hopes: list[tuple[float, int]], others: int, times: list[float], overhead: float) -> None:
    times = sorted(times)
    num_rows = len(hopes) + others
    costs = _costs(lambda n: times[n], lambda n: overhead * times[n], range(1, 19))
    chosen = Speculation(_Drafter(), costs).choose(_offers(*(_Guesser(c, length) for c, length in hopes)), num_rows, ROOM)

    def rate(lengths: Sequence[int]) -> float:
        if not any(lengths):
            return MARGIN * num_rows / times[num_rows]
        brought = sum(chance**j for (chance, _), length in zip(hopes, lengths, strict=True) for j in range(1, length + 1))
        return (num_rows + brought) / (overhead * times[num_rows + sum(lengths)])

    best = max(rate(lengths) for lengths in product(*(range(length + 1) for _, length in hopes)))
    assert rate([len(guess) for guess in chosen]) >= 0.98 * best  # the least likely guesses are not looked at


def test_a_token_counts_less_the_more_its_answer_has_had() -> None:
    speculation = Speculation(_Drafter(), on_a_cpu())
    behind, ahead = Offer(_Guesser(0.8), 100, 1.0), Offer(_Guesser(0.8), 100, 6.0)
    to_one, to_other = speculation.choose([behind, ahead], 2, ROOM)
    assert len(to_one) > len(to_other)
    assert len(speculation.choose([behind], 1, ROOM)[0]) == len(speculation.choose([ahead], 1, ROOM)[0]), "alone it is as ever"


@pytest.mark.parametrize(("num_others", "slowest", "fastest"), [(1, 2.0, 1.5), (3, 1.5, 1.5), (7, 1.2, 1.2)])
def test_one_answer_with_guesses_does_not_slow_the_others_down_for_long(num_others: int, slowest: float, fastest: float) -> None:
    """Copying on a CPU, where a step with 12 guesses takes 2.5 times as long as one of two plain rows."""
    speculation, num_rows = Speculation(_Drafter(), on_a_cpu()), 1 + num_others
    rng, seconds, num_tokens, num_steps = Random(1), 0.0, 0, 400
    for step in range(num_steps):
        pace = num_tokens / step if step else 1.0
        offers = [Offer(_Guesser(0.95), 1000, pace), *_offers(*[_Guesser(0.0, 0)] * num_others)]
        length = len(speculation.choose(offers, num_rows, ROOM)[0])
        seconds += (8.2 if length else 8.0) + 1.9 * (num_rows + length)
        num_tokens += next(n for n in range(length + 1) if n == length or rng.random() > 0.95) + 1
    plain = num_steps * (8.0 + 1.9 * num_rows)
    assert seconds < slowest * plain, "what each of the others has waited for its tokens"
    assert num_tokens / seconds > fastest * num_steps / plain, "and it is worth it"


def test_a_large_batch_verifies_few_guesses_until_they_turn_out_right() -> None:
    speculation, offers = Speculation(_Drafter(), on_a_gpu()), _offers(*[_Guesser(0.9)] * 32)

    def num_chosen() -> int:
        return sum(map(len, speculation.choose(offers, 32, ROOM)))

    assert num_chosen() == FIRST
    speculation.turned_out(0.9 * FIRST)
    assert num_chosen() == 2 * FIRST
    speculation.turned_out(0.1 * 2 * FIRST)
    assert num_chosen() == FIRST
    assert num_chosen() == FIRST, "as long as nothing is known of the last ones"


def test_few_guesses_that_were_only_to_show_something_are_not_repeated_soon() -> None:
    speculation, offers = Speculation(_Drafter(), on_a_gpu()), _offers(*[_Guesser(0.9)] * 32)

    def steps_to_guesses() -> int:
        for num in range(1000):
            if speculation.may_pay(32, ROOM) and any(speculation.choose(offers, 32, ROOM)):
                return num
        raise AssertionError("never")

    assert steps_to_guesses() == 0
    waits = []
    for _ in range(6):
        speculation.turned_out(0)
        waits.append(steps_to_guesses())
    assert waits[0] == REST and waits[1] == 2 * REST and waits[-1] == MAX_REST
    speculation.turned_out(FIRST)
    assert steps_to_guesses() == 0
    one = _offers(_Guesser(0.9))
    assert any(speculation.choose(one, 1, ROOM))
    speculation.turned_out(0)
    assert speculation.may_pay(1, ROOM), "these were as many as would pay"


def test_no_more_guesses_are_asked_for_than_have_room() -> None:
    speculation = Speculation(_Drafter(max_drafts=5), on_a_cpu())
    none, two, any_number = _Guesser(0.99), _Guesser(0.99), _Guesser(0.99)
    offers = [Offer(none, 0), Offer(none, -1), Offer(two, 2), Offer(any_number, 1000)]
    for costs in (on_a_gpu(), StepCosts.free()):
        speculation.costs = costs
        assert [len(guess) for guess in speculation.choose(offers, 4, ROOM)] == [0, 0, 2, 5]
    assert not none.num_asked


@pytest.mark.parametrize("costs", [on_a_gpu, StepCosts.free])
def test_where_there_is_no_room_nobody_waits_or_is_asked(costs: Callable[[], StepCosts]) -> None:
    speculation, guesser = Speculation(_Drafter(), costs()), _Guesser(0.99)
    offers = _offers(*[guesser] * 4)
    for room in (0, -3):
        assert not speculation.may_pay(4, room) and not speculation.is_worth_waiting(offers, 4, room)
        assert not any(speculation.choose(offers, 4, room))
    assert not guesser.num_asked
    assert sum(map(len, speculation.choose(offers, 4, 3))) == 3


def test_what_has_no_room_does_not_pay_for_a_wait() -> None:
    """64 answers with 12 guesses each would make a step worth waiting for; one guess alone does not."""
    speculation, offers = Speculation(_Drafter(), on_a_gpu()), _offers(*[_Guesser(0.9)] * 64)
    assert speculation.may_pay(64, ROOM) and speculation.is_worth_waiting(offers, 64, ROOM)
    other = Speculation(_Drafter(), on_a_gpu())
    assert not other.may_pay(64, 1) and not other.is_worth_waiting(offers, 64, 1) and not any(other.choose(offers, 64, 1))


def test_free_steps_verify_whatever_is_guessed() -> None:
    speculation = Speculation(_Drafter(max_drafts=3), StepCosts.free())
    for _ in range(3):
        assert speculation.may_pay(500, ROOM)
        assert speculation.is_worth_waiting([Offer(_Guesser(0.0), 1)], 500, ROOM) and not speculation.is_worth_waiting(
            [Offer(_Guesser(0.9), 0)], 500, ROOM
        )
        assert [len(guess) for guess in speculation.choose(_offers(_Guesser(0.0), _Guesser(0.5)), 500, ROOM)] == [3, 3]
        speculation.costs.observe(3, 100.0, is_drafted=True)


@pytest.mark.parametrize(
    ("costs", "num_rows", "may_pay"),
    [(on_a_cpu, 1, True), (on_a_cpu, 64, False), (on_a_gpu, 1, True), (on_a_gpu, 32, True), (on_a_gpu, 512, False)],
)
def test_nobody_is_asked_where_the_best_guesses_would_not_pay(
    costs: Callable[[], StepCosts], num_rows: int, may_pay: bool
) -> None:
    speculation = Speculation(_Drafter(), costs())
    assert [speculation.may_pay(num_rows, ROOM) for _ in range(5)] == [may_pay] * 5


@pytest.mark.parametrize("token_cost", [0.0, 1.0, 3.0])
def test_whether_guesses_may_pay_can_be_asked_before_there_is_an_answer(token_cost: float) -> None:
    speculation = Speculation(_Drafter(), StepCosts(token_cost))
    assert speculation.may_pay(0, ROOM) is (token_cost == 0.0)
    _observe(speculation.costs, {1: 1.0}, is_drafted=False)
    assert speculation.may_pay(0, ROOM) is (token_cost == 0.0)


def test_that_guesses_may_pay_is_seen_when_costs_change() -> None:
    costs = on_a_cpu()
    speculation = Speculation(_Drafter(), costs)
    assert not speculation.may_pay(64, ROOM)
    _observe(costs, {n: 50.0 for n in (64, 128, 256, 512, 1024)}, is_drafted=False, times=50)
    _observe(costs, {n: 51.0 for n in (64, 128, 256, 512, 1024)}, is_drafted=True, times=50)
    assert speculation.may_pay(64, ROOM)


@pytest.mark.parametrize(
    ("costs", "num_rows", "chance", "length", "waits"),
    [
        (on_a_cpu, 1, 0.9, 12, True),
        (on_a_cpu, 1, 0.9, 1, False),  # the newest token is all that is guessed
        (on_a_cpu, 1, 0.42, 12, False),  # though 0.42 would be verified if the token were known
        (on_a_gpu, 64, 0.1, 12, False),
        (on_a_gpu, 8, 0.9, 12, True),
    ],
)
def test_a_step_waits_for_tokens_behind_which_guesses_are_likely_to_pay(
    costs: Callable[[], StepCosts], num_rows: int, chance: float, length: int, waits: bool
) -> None:
    speculation = Speculation(_Drafter(), costs())
    guessers = [_Guesser(chance, length) for _ in range(num_rows)]
    assert speculation.is_worth_waiting(_offers(*guessers), num_rows, ROOM) is waits
    if not waits and length > 1 and num_rows == 1:
        assert any(speculation.choose(_offers(*guessers), num_rows, ROOM))


def _steps(speculation: Speculation, *runs: int, wait: float) -> None:
    """So many steps with guesses, again and again, each time followed by plain ones of one row on a GPU."""
    for length in runs:
        for _ in range(length):
            speculation.step_took(5, 4.85, is_drafted=True, is_alone=True)
        speculation.step_took(1, 4.13 + wait, is_drafted=False, is_alone=True)
        for _ in range(5):
            speculation.step_took(1, 4.13, is_drafted=False, is_alone=False)


@pytest.mark.parametrize(("runs", "wait", "waits"), [((1,) * 30, 4.0, False), ((30,) * 30, 4.0, True), ((1,) * 30, 0.1, True)])
def test_guesses_pay_for_the_wait_of_the_device_behind_them(runs: tuple[int, ...], wait: float, waits: bool) -> None:
    speculation = Speculation(_Drafter(), on_a_gpu())
    _steps(speculation, *runs, wait=wait)
    offers = _offers(_Guesser(0.6))
    assert speculation.is_worth_waiting(offers, 1, ROOM) is waits
    assert any(speculation.choose(offers, 1, ROOM)), "where the device has waited already they pay"


def test_waits_behind_which_there_were_no_guesses_speak_against_further_ones() -> None:
    speculation, offers = Speculation(_Drafter(), on_a_gpu()), _offers(_Guesser(0.6))
    _steps(speculation, *[4] * 10, wait=2.0)
    waited = 0
    while speculation.is_worth_waiting(offers, 1, ROOM):
        waited += 1
        _steps(speculation, 0, wait=2.0)
        assert waited < 40
    assert waited >= 2, "one in vain is nothing yet"


def test_a_step_waits_for_guesses_that_come_with_the_tokens() -> None:
    speculation = Speculation(_Drafter(max_drafts=4, num_wanted=4), on_a_gpu())
    assert speculation.is_worth_waiting(_offers(_Guesser(0.7, length=0)), 1, ROOM)
    assert not speculation.is_worth_waiting(_offers(_Guesser(0.02, length=0)), 1, ROOM)
    assert not speculation.is_worth_waiting(_offers(_Guesser(0.7, length=0), room=0), 1, ROOM)


# ---- tries -------------------------------------------------------------------------------------------------------------------


def _bad_moment() -> StepCosts:
    """Steps with guesses seemed to take ten times as long as they do."""
    return _costs(lambda n: 8.0 + 1.9 * n, lambda n: 80.0 + 19.0 * n, (1, 2, 4, 8, 16))


def _steps_to_a_try(speculation: Speculation, *guessers: _Guesser) -> tuple[int, list[int]]:
    """After how many refusals guesses were verified, and how many of whose."""
    for num in range(2 * MAX_PATIENCE):
        if speculation.may_pay(len(guessers), ROOM):
            lengths = [len(guess) for guess in speculation.choose(_offers(*guessers), len(guessers), ROOM)]
            if any(lengths):
                return num, lengths
    raise AssertionError("never")


def test_what_costs_speak_against_for_long_is_tried_with_one_answer_and_less_and_less_often() -> None:
    speculation = Speculation(_Drafter(), _bad_moment())
    guessers = _Guesser(0.6), _Guesser(0.9), _Guesser(0.1)
    waits = []
    for _ in range(9):
        num, lengths = _steps_to_a_try(speculation, *guessers)
        assert lengths == [0, 12, 0]
        speculation.costs.observe(15, 365.0, is_drafted=True)
        waits.append(num)
    assert 0.4 * PATIENCE < waits[0] <= PATIENCE + NUM_WITHOUT
    assert all(later >= 1.7 * earlier for earlier, later in pairwise(waits[:7]))
    assert waits[-1] <= MAX_PATIENCE


def test_a_step_waits_for_the_tokens_of_a_try() -> None:
    speculation = Speculation(_Drafter(), _bad_moment())
    offers = _offers(_Guesser(0.9))
    waited = next(
        n for n in range(MAX_PATIENCE) if speculation.may_pay(1, ROOM) and speculation.is_worth_waiting(offers, 1, ROOM)
    )
    assert waited > 0.2 * PATIENCE
    assert speculation.may_pay(1, ROOM) and any(speculation.choose(offers, 1, ROOM)), "and is made when they are known"
    assert not (speculation.may_pay(1, ROOM) and speculation.is_worth_waiting(offers, 1, ROOM)), "once"


@pytest.mark.parametrize("waits", [False, True])
def test_unlikely_guesses_are_not_tried_and_seldom_asked_for(waits: bool) -> None:
    speculation = Speculation(_Drafter(), _bad_moment())
    guesser = _Guesser(LIKELY - 0.01)
    for _ in range(1000):
        if speculation.may_pay(1, ROOM):
            if waits:
                assert not speculation.is_worth_waiting(_offers(guesser), 1, ROOM)
            else:
                assert not any(speculation.choose(_offers(guesser), 1, ROOM))
    assert 0 < guesser.num_asked <= 1000 / PATIENCE + 1


@pytest.mark.parametrize(("num_rows", "least", "most"), [(1, 45, 60), (4, 22, 35)])
def test_where_there_are_no_good_guesses_they_are_not_looked_for_in_every_step(num_rows: int, least: int, most: int) -> None:
    costs = _costs(lambda n: 7e-4 + 1e-5 * n, lambda n: 8e-4 + 1e-5 * n, SOME_SIZES)  # a small model on a GPU
    speculation, guesser = Speculation(_Drafter(), costs), _Guesser(0.02)
    offers, looked = _offers(*[guesser] * num_rows), []
    for _ in range(100):
        looked.append(speculation.may_pay(num_rows, ROOM))
        assert not (looked[-1] and speculation.is_worth_waiting(offers, num_rows, ROOM))
    assert least <= sum(looked) <= most
    guesser.chance = 0.9
    waited = [speculation.may_pay(num_rows, ROOM) and speculation.is_worth_waiting(offers, num_rows, ROOM) for _ in range(20)]
    assert all(waited[4:]), "good ones are found soon, and then looked for in every step"


def test_looking_in_every_step_is_nothing_beside_long_steps() -> None:
    costs = _costs(lambda n: 8e-3 + 2e-3 * n, lambda n: 8e-3 + 2e-3 * n, SOME_SIZES)
    speculation = Speculation(_Drafter(), costs)
    for _ in range(30):
        assert speculation.may_pay(1, ROOM) and not speculation.is_worth_waiting(_offers(_Guesser(0.02)), 1, ROOM)


def test_refusals_are_counted_since_guesses_last_paid() -> None:
    speculation = Speculation(_Drafter(), StepCosts(0.0))
    offers = _offers(_Guesser(0.9))

    def num_chosen(costs: StepCosts, times: int) -> int:
        speculation.costs = costs
        return sum(any(speculation.choose(offers, 1, ROOM)) for _ in range(times))

    assert num_chosen(_bad_moment(), PATIENCE) == 0
    assert num_chosen(on_a_cpu(), 1) == 1
    assert num_chosen(_bad_moment(), PATIENCE) == 0
    assert num_chosen(_bad_moment(), 1) == 1
    assert num_chosen(_bad_moment(), 2 * PATIENCE) == 0, "patience has grown"
    assert num_chosen(on_a_cpu(), PATIENCE) == PATIENCE
    assert num_chosen(_bad_moment(), PATIENCE + 1) == 1, "and is back, now that guesses have paid for long"


def test_plain_steps_are_measured_first_and_now_and_then() -> None:
    speculation = Speculation(_Drafter(), StepCosts(0.1))
    offers, drafted = _offers(_Guesser(0.9)), []
    for _ in range(3 * LATELY):
        drafted.append(speculation.may_pay(1, ROOM) and any(speculation.choose(offers, 1, ROOM)))
        if drafted[-1]:
            speculation.costs.observe(4, 1.2, is_drafted=True)
    without = [i for i, is_drafted in enumerate(drafted) if not is_drafted]
    begins = [nth * (LATELY + NUM_WITHOUT) for nth in range(3)]
    assert without == [i for begin in begins for i in range(begin, begin + NUM_WITHOUT)]


@pytest.mark.parametrize(("num_rows", "is_known"), [(10, False), (12, True), (16, True), (20, True), (22, False)])
def test_a_plain_step_tells_of_those_about_as_large(num_rows: int, is_known: bool) -> None:
    costs = StepCosts(0.1)
    costs.observe(num_rows, 1.0, is_drafted=False)
    assert costs.is_plain_known(16) is is_known
    for _ in range(LATELY + 1):
        costs.observe(num_rows, 1.0, is_drafted=True)
    assert not costs.is_plain_known(16)


def _serve(
    speculation: Speculation,
    plain: Callable[[int], float],
    drafted: Callable[[int], float],
    num_rows: int,
    chance: float,
    steps: int,
) -> list[int]:
    """Guesses in each of so many steps."""
    guessers, seen = [_Guesser(chance) for _ in range(num_rows)], []
    for _ in range(steps):
        chosen = speculation.choose(_offers(*guessers), num_rows, ROOM) if speculation.may_pay(num_rows, ROOM) else []
        num_drafts = sum(map(len, chosen))
        if num_drafts:
            speculation.turned_out(sum(chance ** (1 + j) for guess in chosen for j in range(len(guess))))
        cost = drafted if num_drafts else plain
        speculation.costs.observe(num_rows + num_drafts, cost(num_rows + num_drafts), is_drafted=num_drafts > 0)
        seen.append(num_drafts)
    return seen


def test_costs_learnt_in_a_bad_moment_are_got_over() -> None:
    speculation = Speculation(_Drafter(), _bad_moment())
    seen = _serve(speculation, lambda n: 8.0 + 1.9 * n, lambda n: 8.2 + 1.9 * n, 1, 0.9, 3000)
    assert not any(seen[: PATIENCE // 2])
    assert sum(seen[-100:]) >= 700, "as good as without the bad moment"


def test_a_wrong_belief_about_tokens_is_got_over() -> None:
    for token_cost in (0.0, 3.0):
        speculation = Speculation(_Drafter(), StepCosts(token_cost))
        seen = _serve(speculation, lambda n: 8.0 + 1.9 * n, lambda n: 8.2 + 1.9 * n, 1, 0.9, 1000)
        assert 700 <= sum(seen[-100:]) <= 1200


def test_where_guesses_do_not_pay_hardly_any_step_has_some() -> None:
    speculation = Speculation(_Drafter(), StepCosts(0.0))
    seen = _serve(speculation, lambda n: 8.0 + 1.9 * n, lambda n: 8.2 + 1.9 * n, 16, 0.8, 2000)
    assert 0 < sum(num > 0 for num in seen) < 20


# ---- guesses from the runner -------------------------------------------------------------------------------------------------


def _offered(*token_ids: int) -> Drafts:
    drafts = OfferedDrafter(4).open(GenerateRequest("a", (1,)), [1])
    drafts.offered(token_ids)
    return drafts


def test_offered_guesses_stay_while_the_answer_grows_by_them() -> None:
    drafts = _offered(5, 6, 7, 8)
    assert list(drafts.guess(2).token_ids) == [5, 6] and list(drafts.guess(9).token_ids) == [5, 6, 7, 8]
    drafts.grew([5])
    assert list(drafts.guess(9).token_ids) == [6, 7, 8]
    drafts.grew([6, 7])
    assert list(drafts.guess(9).token_ids) == [8]
    drafts.grew([8, 9])
    assert list(drafts.guess(9).token_ids) == []


def test_offered_guesses_go_when_another_token_comes() -> None:
    drafts = _offered(5, 6, 7)
    drafts.grew([5, 7])
    assert list(drafts.guess(9).token_ids) == []
    drafts.offered([3])
    assert list(drafts.guess(9).token_ids) == [3], "and new ones take their place"


def test_what_comes_tells_how_likely_offered_guesses_are_right() -> None:
    drafter = OfferedDrafter(4)
    assert (drafter.max_drafts, drafter.num_wanted) == (4, 4)
    request = GenerateRequest("a", (1,))
    good, bad = drafter.open(request, [1]), drafter.open(request, [1])
    believed = good.guess(1).chance
    assert 0 < believed < 1
    for _ in range(10):
        good.offered([5, 6, 7])
        good.grew([5, 6, 7, 1])
    assert good.guess(1).chance > max(0.9, believed)
    heard = bad.guess(1).chance
    assert heard > believed, "from another answer"
    bad.offered([5, 6, 7])
    bad.grew([0, 6, 7])  # one guess was judged, and wrong: those behind it were not
    once = bad.guess(1).chance
    for _ in range(20):
        bad.offered([5])
        bad.grew([0])
    assert bad.guess(1).chance < 0.3 < once < heard
