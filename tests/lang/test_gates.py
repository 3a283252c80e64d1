"""Calls to one back end: how many at once, and what becomes of those that find its queue full."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from streamserve.errors import InvalidRequest, QueueFull
from streamserve.lang import ProgramState, function, gen
from streamserve.lang.backend import Piece, Prompt, Sampling
from streamserve.lang.gates import MAX_CALLS, MAX_TRIES, Gate
from tests.lang.scripted import Scripted


class Full:
    """Refuses the first calls."""

    def __init__(self, times: int) -> None:
        self.left = times
        self.tries = 0

    def __call__(self, prompt: Prompt, sampling: Sampling) -> str:
        self.tries += 1
        if self.left:
            self.left -= 1
            raise QueueFull("full", retry_after_s=0.0)
        return "fine"


@function
def one(s: ProgramState) -> None:
    s += gen("a")


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_queue_is_asked_again(stream: bool) -> None:
    answer = Full(3)
    assert one.run(backend=Scripted(answer), stream=stream)["a"] == "fine"
    assert answer.tries == 4


def test_it_is_not_asked_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamserve.lang.gates.random.uniform", lambda low, high: 0.0)
    answer = Full(1000)
    assert isinstance(one.run(backend=Scripted(answer)).error(), QueueFull)
    assert answer.tries == MAX_TRIES


def test_an_answer_that_has_begun_is_not_begun_again() -> None:
    class Breaking(Scripted):
        async def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncIterator[Piece]:  # type: ignore[override]
            self.prompts.append(prompt)
            yield Piece("half")
            raise QueueFull("full", retry_after_s=0.0)

    backend = Breaking()
    state = one.run(backend=backend, stream=True)
    assert isinstance(state.error(), QueueFull)
    assert len(backend.prompts) == 1


def test_a_prefix_that_cannot_be_computed_ahead_stops_nobody() -> None:
    class Cold(Scripted):
        async def cache_prefix(self, prompt: Prompt) -> None:
            raise InvalidRequest("not here")

    @function
    def forking(s: ProgramState) -> None:
        s += "words " * 20
        forks = s.fork(2)
        forks += gen("a")
        forks.join()

    states = forking.run_batch([{}, {}], backend=Cold())
    assert [len(state["a"]) for state in states] == [2, 2]


def test_so_many_calls_are_under_way_and_no_more() -> None:
    backend = Scripted()

    @function
    def many(s: ProgramState) -> None:
        forks = s.fork(3 * MAX_CALLS)
        forks += gen("a")
        forks.join()

    assert len(many.run(backend=backend)["a"]) == 3 * MAX_CALLS
    assert backend.most_at_once == MAX_CALLS


def test_a_stream_that_is_left_gives_its_place_back() -> None:
    async def main() -> bool:
        gate, closed = Gate(), False

        async def pieces() -> AsyncIterator[Piece]:
            nonlocal closed
            try:
                yield Piece("a")
                yield Piece("b")
            finally:
                closed = True

        for _ in range(MAX_CALLS + 1):
            stream = gate.stream(pieces)
            assert (await anext(stream)).text == "a"
            await stream.aclose()
            assert closed
            closed = False
        return True

    assert asyncio.run(main())
