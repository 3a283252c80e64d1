"""Tree, pages, chunked prompts, preemption and a step in flight, driven at random: everything stays exact together."""

from random import Random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.cache.driver import Driver, Running


def test_10000_random_operations_lose_no_page_and_own_none_twice() -> None:
    driver, random = Driver(num_pages=40, page_size=4), Random(3)
    for _ in range(10_000):
        driver.random_operation(random, vocab_size=3, max_len=64)
    assert driver.num_found > 10_000 and driver.num_copies > 500 and driver.num_refused > 100, "the run has met too little"
    assert driver.num_pinned > 20 and driver.num_pins_refused > 20 and driver.num_node_evictions > 10
    driver.finish()


@pytest.mark.parametrize(("num_pages", "page_size"), [(60, 1), (30, 3), (12, 16), (400, 4), (3, 8), (1, 4)])
def test_contents_stay_exact_at_any_page_size_and_scarcity(num_pages: int, page_size: int) -> None:
    driver, random = Driver(num_pages, page_size), Random(num_pages)
    for _ in range(600):
        driver.random_operation(random, vocab_size=2, max_len=48)
    driver.finish()


def test_everything_committed_is_found_while_pages_are_plenty() -> None:
    driver, random = Driver(num_pages=1000, page_size=4), Random(5)
    for _ in range(400):
        driver.random_operation(random, vocab_size=2, max_len=40)
        driver.check_everything_is_found()
    assert driver.num_refused == 0
    driver.finish()


def test_nothing_is_found_or_kept_without_reuse() -> None:
    driver, random = Driver(30, 4, reuse=False), Random(1)
    for _ in range(400):
        driver.random_operation(random, vocab_size=2, max_len=40)
        assert driver.cache.num_evictable_pages == 0
    assert driver.num_found == 0
    driver.finish()


class Requests(RuleBasedStateMachine):
    """The same operations, chosen and shrunk by hypothesis."""

    @initialize(num_pages=st.integers(1, 24), page_size=st.integers(1, 6))
    def start(self, num_pages: int, page_size: int) -> None:
        self.driver = Driver(num_pages, page_size)

    def pick(self, index: int) -> Running:
        return self.driver.running[index % len(self.driver.running)]

    def has_running(self) -> bool:
        return bool(self.driver.running)

    @rule(
        salt=st.sampled_from(("", "other")),
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=30),
        short=st.integers(-1, 2),
    )
    def open(self, salt: str, tokens: list[int], short: int) -> None:
        self.driver.open(salt, tokens, len(tokens) - short)

    @precondition(has_running)
    @rule(index=st.integers(0, 7), cut=st.integers(0, 40), tail=st.lists(st.integers(0, 1), min_size=1, max_size=9))
    def open_like_another(self, index: int, cut: int, tail: list[int]) -> None:
        other = self.pick(index)
        self.driver.open(other.salt, other.tokens[:cut] + tail)

    @precondition(has_running)
    @rule(index=st.integers(0, 7), token=st.integers(0, 1))
    def sample(self, index: int, token: int) -> None:
        running = self.pick(index)
        if running.planned == len(running.tokens):
            self.driver.sample(running, token)

    @rule(chunks=st.lists(st.tuples(st.integers(0, 7), st.integers(1, 12)), max_size=6), committing=st.sets(st.integers(0, 7)))
    def step(self, chunks: list[tuple[int, int]], committing: set[int]) -> None:
        running = self.driver.running
        rows = {running[index]: num_tokens for index, num_tokens in chunks if index < len(running)}
        self.driver.step(rows, {running[index] for index in committing if index < len(running)})

    @precondition(has_running)
    @rule(index=st.integers(0, 7))
    def commit(self, index: int) -> None:
        self.driver.commit(self.pick(index))

    @precondition(has_running)
    @rule(index=st.integers(0, 7), keep=st.booleans())
    def close(self, index: int, keep: bool) -> None:
        self.driver.close(self.pick(index), keep=keep)

    @rule()
    def flush(self) -> None:
        self.driver.flush()

    @rule(seed=st.integers(0, 999))
    def pin(self, seed: int) -> None:
        self.driver.pin(Random(seed))

    @rule(seed=st.integers(0, 999))
    def unpin(self, seed: int) -> None:
        self.driver.unpin(Random(seed))

    @rule(seed=st.integers(0, 999))
    def evict(self, seed: int) -> None:
        self.driver.evict(Random(seed))

    @rule(seed=st.integers(0, 999))
    def look(self, seed: int) -> None:
        self.driver.look(Random(seed))

    @invariant()
    def books_agree(self) -> None:
        self.driver.cache.check()

    def teardown(self) -> None:
        if hasattr(self, "driver"):
            self.driver.finish()


Requests.TestCase.settings = settings(
    max_examples=80,
    stateful_step_count=40,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
test_requests_chosen_by_hypothesis_stay_exact = Requests.TestCase
