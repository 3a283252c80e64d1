"""The ways to run a program, and what they leave behind: threads, requests, errors."""

import asyncio
import gc
import pickle
import signal
import threading
import time
import weakref
from contextvars import ContextVar
from typing import Any

import pytest

from streamserve.errors import InvalidRequest, ProgramEnded
from streamserve.lang import ProgramState, function, gen, set_default_backend
from streamserve.lang.backend import Prompt, Sampling
from streamserve.lang.function import AT_ONCE
from streamserve.lang.settings import backend_of, global_config
from tests.lang.scripted import Scripted


@function
def twice(s: ProgramState, word: str, more: str = "!") -> str:
    s += word + gen("first")
    s += more + str(len(s["first"])) + gen("second", max_tokens=5)
    return str(s["second"])


@function
async def twice_async(s: ProgramState, word: str, more: str = "!") -> str:
    s += word
    first = await s.gen("first")
    s += more + str(len(first)) + gen("second", max_tokens=5)
    return str(await s.get("second"))


def _until(condition: Any) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_every_way_to_run_comes_to_the_same() -> None:
    backend = Scripted()
    told = twice.run("a", backend=backend)
    texts = {
        twice.run(word="a", backend=backend).text(),
        twice("a", backend=backend).text(),
        twice.bind(word="a").run(backend=backend).text(),
        twice.run_batch([("a",)], backend=backend)[0].text(),
        twice.run_batch([{"word": "a"}] * 2, num_threads=2, backend=backend)[1].text(),
        next(twice.run_batch([("a", "!")], generator_style=True, backend=backend)).text(),
        twice.run("a", stream=True, backend=backend).text(),
        twice.run("a", stream=True, use_thread=True, backend=backend).text(),
        asyncio.run(twice.async_run("a", backend=backend)).text(),
        asyncio.run(twice.async_run_batch([("a",)], backend=backend))[0].text(),
        twice_async.run("a", backend=backend).text(),
        twice_async.run("a", stream=True, backend=backend).text(),
        twice_async.run_batch([("a",)] * 2, backend=backend)[0].text(),
        asyncio.run(twice_async.async_run("a", backend=backend)).text(),
        asyncio.run(twice_async.async_run_batch([("a",)], backend=backend))[0].text(),
    }
    assert texts == {told.text()} == {"a<1>!3<6>"}
    assert told.ret_value == "<6>"


def test_a_program_runs_inside_a_running_loop() -> None:
    async def main() -> str:
        return twice.run("a", backend=Scripted()).text() + twice.run_batch([("a",)], backend=Scripted())[0].text()

    assert asyncio.run(main()) == "a<1>!3<6>" * 2


def test_a_thousand_programs_take_one_thread() -> None:
    backend, seen = Scripted(is_held=True), threading.active_count()
    counts: list[int] = []

    @function
    def program(s: ProgramState, number: int) -> None:
        s += f"{number}:" + gen("answer")
        s["answer"]
        counts.append(threading.active_count())

    def release() -> None:
        _until(lambda: len(backend.prompts) == AT_ONCE)
        backend.release()

    threading.Thread(target=release).start()
    states = program.run_batch([{"number": i} for i in range(1000)], backend=backend)
    assert [state.text().split(":")[0] for state in states] == [str(i) for i in range(1000)]
    assert max(counts) - seen <= 4
    assert backend.most_at_once == AT_ONCE


def test_a_thousand_forks_take_no_thread_and_share_one_prefix() -> None:
    backend, before = Scripted(), threading.active_count()

    @function
    def program(s: ProgramState) -> int:
        s += "a prefix that all share "
        forks = s.fork(1000)
        forks += lambda i: f"{i}" + gen("answer")
        forks.join()
        return len(s["answer"])

    assert program.run(backend=backend).ret_value == 1000
    assert threading.active_count() - before <= 3
    assert backend.prefixes == ["a prefix that all share "]


def test_a_batch_computes_what_it_shares_once_and_calls_no_program_for_it() -> None:
    backend, called = Scripted(), []

    @function
    def program(s: ProgramState, number: int) -> None:
        called.append(number)
        s += "examples " * 10 + str(number) + gen()

    program.run_batch([{"number": i} for i in range(20)], backend=backend)
    assert len(backend.prefixes) == 1
    assert sorted(called) == list(range(20))


def test_a_state_that_nobody_holds_is_freed_with_all_it_held() -> None:
    @function
    def program(s: ProgramState) -> None:
        forks = s.fork(2)
        forks += gen("a")
        forks.join()
        s["a"]

    gc.collect()
    gc.disable()
    try:
        for more in ({}, {"num_threads": 2}):
            states = program.run_batch([{}] * 3, backend=Scripted(), **more)
            held = [weakref.ref(state.executor) for state in states]
            states.clear()
            _until(lambda held=held: not any(each() for each in held))
    finally:
        gc.enable()


def test_one_failing_item_harms_no_other() -> None:
    def answer(prompt: Prompt, sampling: Sampling) -> str:
        if prompt.text.startswith("bad"):
            raise InvalidRequest("bad")
        return "fine"

    @function
    def program(s: ProgramState, word: str) -> None:
        if word == "broken":
            raise OSError("no such tool")
        s += word + gen("answer")
        s += s["answer"]

    words = ["a", "bad", "b", "broken", "c"]
    states = program.run_batch([(word,) for word in words], backend=Scripted(answer))
    assert [type(state.error()) for state in states] == [type(None), InvalidRequest, type(None), OSError, type(None)]
    assert states[4].text() == "cfinefine"
    with pytest.raises(InvalidRequest):
        states[1].text()
    with pytest.raises(OSError, match="no such tool"):
        states[3]["answer"]


def test_an_error_of_the_function_is_raised_by_run_and_one_of_an_answer_is_kept() -> None:
    def answer(prompt: Prompt, sampling: Sampling) -> str:
        raise InvalidRequest("refused")

    @function
    def reads_nothing(s: ProgramState) -> None:
        s += gen("answer")

    state = reads_nothing.run(backend=Scripted(answer))
    assert isinstance(state.error(), InvalidRequest)
    with pytest.raises(InvalidRequest):
        state["answer"]
    with pytest.raises(InvalidRequest):
        twice.run("a", backend=Scripted(answer))


def test_an_interrupted_batch_ends_the_rest() -> None:
    backend, seen = Scripted(is_held=True), []

    @function
    def program(s: ProgramState) -> None:
        s += gen("answer")
        try:
            s["answer"]
        except BaseException as error:
            seen.append(type(error))
            raise

    def interrupt() -> None:
        _until(lambda: len(backend.prompts) == 10)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        program.run_batch([{}] * 10, backend=backend)
    _until(lambda: backend.num_aborted == 10)
    _until(lambda: len(seen) == 10)


def test_a_cancelled_program_aborts_its_request_and_its_forks() -> None:
    for program in (_forking, _forking_async):
        backend = Scripted(is_held=True)

        async def main(program: Any = program, backend: Scripted = backend) -> None:
            task = asyncio.create_task(program.async_run(backend=backend))
            await asyncio.to_thread(_until, lambda: len(backend.prompts) == 3)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        asyncio.run(main())
        _until(lambda backend=backend: backend.num_aborted == 3)


@function
def _forking(s: ProgramState) -> None:
    forks = s.fork(2)
    forks += gen("inner")
    s += gen("outer")
    s["outer"]


@function
async def _forking_async(s: ProgramState) -> None:
    forks = s.fork(2)
    forks += gen("inner")
    await s.gen("outer")


def test_an_ended_program_aborts_its_request_and_keeps_what_is_done() -> None:
    backend = Scripted(lambda prompt, _: f"<{len(prompt.text)}>")

    @function
    def program(s: ProgramState) -> None:
        s += "a" + gen("first")
        s["first"]
        backend._is_held = True
        s += gen("second")
        s["second"]

    state = program.run(stream=True, backend=backend)
    _until(lambda: len(backend.prompts) == 2)
    state.end()
    _until(lambda: backend.num_aborted == 1)
    assert state["first"] == "<1>"
    with pytest.raises(ProgramEnded):
        state["second"]
    with pytest.raises(ProgramEnded):
        state += "more"


def test_asyncio_run_inside_a_program_of_a_batch_is_as_anywhere() -> None:
    backend = Scripted()

    @function
    def program(s: ProgramState, word: str) -> None:
        async def tool() -> str:
            await asyncio.sleep(0)
            inner = await twice.async_run(word, backend=backend)
            return inner.text() + s["early"]

        s += gen("early")
        s["tool"] = asyncio.run(tool())
        s += s["tool"] + gen("late")
        s["late"]

    states = program.run_batch([("a",), ("b",), ("c",)], backend=backend)
    assert [state["tool"] for state in states] == ["a<1>!3<6><0>", "b<1>!3<6><0>", "c<1>!3<6><0>"]
    assert all(state["late"] for state in states)


def test_programs_call_programs() -> None:
    backend = Scripted()

    @function
    def outer(s: ProgramState, number: int) -> None:
        inner = twice.run_batch([("x",), ("y",)], backend=backend)
        s += "".join(state.text() for state in inner) + twice(str(number), backend=backend)["second"]
        twice(s, "-")  # goes on in this state

    (first, second) = outer.run_batch([(1,), (2,)], backend=backend)
    assert first.text() == second.text() == "x<1>!3<6>y<1>!3<6><6>-<22>!4<28>"


def test_a_batch_of_async_programs_called_from_an_async_program_says_to_await() -> None:
    @function
    async def outer(s: ProgramState) -> None:
        twice_async.run("a", backend=Scripted())

    with pytest.raises(RuntimeError, match=r"await twice_async\.async_run"):
        outer.run(backend=Scripted())


def test_sampling_names_are_defaults_and_own_parameters_are_the_programs() -> None:
    backend = Scripted()

    @function
    def program(s: ProgramState, temperature: str) -> None:
        s += temperature + gen("a") + gen("b", max_tokens=3, stop="x")

    program.run(temperature="warm", top_p=0.5, max_new_tokens=7, stop=["."], stop_token_ids=[2], backend=backend).sync()
    first, second = backend.samplings
    assert (first.max_tokens, first.top_p, first.stop, first.stop_token_ids, first.temperature) == (7, 0.5, (".",), (2,), None)
    assert (second.max_tokens, second.stop) == (3, ("x",))


def test_context_of_the_caller_is_seen_by_its_programs() -> None:
    user: ContextVar[str] = ContextVar("user", default="nobody")

    @function
    def program(s: ProgramState) -> str:
        seen = user.get()
        s += gen("a")
        s["a"]
        user.set("program")
        return seen + user.get()

    user.set("somebody")
    for more in ({}, {"num_threads": 3}):
        states = program.run_batch([{}] * (AT_ONCE + 50), backend=Scripted(), **more)
        assert {state.ret_value for state in states} == {"somebodyprogram"}
    state = program.run(stream=True, use_thread=True, backend=Scripted())
    state.sync()
    assert state.ret_value == "somebodyprogram"
    assert user.get() == "somebody"


def test_a_generator_starts_programs_only_so_far_ahead_and_leaving_it_ends_them() -> None:
    backend = Scripted()
    started: list[int] = []

    @function
    def program(s: ProgramState, number: int) -> None:
        started.append(number)
        s += gen("a")

    states = program.run_batch([(i,) for i in range(1000)], generator_style=True, backend=backend)
    assert next(states).ret_value is None
    assert next(states)["a"] == "<0>"
    states.close()
    assert len(started) <= 202


def test_leaving_a_batch_cancels_async_programs_that_wait_for_something_else() -> None:
    started, cancelled = asyncio.Event(), threading.Event()

    @function
    async def program(s: ProgramState, sleeps: bool) -> None:
        if not sleeps:
            await started.wait()
            return
        started.set()
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    states = program.run_batch([(False,), (True,)], generator_style=True, backend=Scripted())
    next(states)
    states.close()
    assert cancelled.wait(20)


@pytest.mark.parametrize("more", [{}, {"num_threads": 2}, {"generator_style": True}])
def test_a_bar_counts_programs(more: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert len(list(twice.run_batch([("a",)] * 3, progress_bar=True, backend=Scripted(), **more))) == 3
    assert "3/3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: function(lambda: None), "first parameter of a program must be 's'"),
        (lambda: function(lambda state, x: None), "has 'state'"),
        (lambda: twice.bind(wrd="a"), "no parameter 'wrd'"),
        (lambda: twice.run_batch(["a"], backend=Scripted()), "each item is a dict or a tuple"),
        (lambda: twice.run_batch([("a", "b", "c")], backend=Scripted()), "takes 2 arguments"),
        (lambda: twice.run_batch([("a",)], num_threads=0, backend=Scripted()), "num_threads is 0"),
        (lambda: twice.run_batch([("a",)], word="b", backend=Scripted()), "belong into the items"),
        (lambda: twice.run(wrd="a", backend=Scripted()), "no parameter 'wrd'"),
        (lambda: twice.run(wrd="a", backend=Scripted(), stream=True), "no parameter 'wrd'"),
        (lambda: twice.run(backend=Scripted()), "twice: missing .* 'word'"),
        (lambda: twice.run_batch([("a",), {}], backend=Scripted()), "item 1 of the batch: twice: missing .* 'word'"),
        (lambda: twice.run_batch([{"word": "a", "mre": 1}], backend=Scripted()), "item 0 .* no parameter 'mre'"),
        (lambda: twice.run_batch({"word": "a"}, backend=Scripted()), "a batch is {'word': 'a'}"),  # type: ignore[arg-type]
        (lambda: twice.run(word="a", backend="http://host"), "backend is 'http://host'"),
        (lambda: set_default_backend(Scripted), "backend is <class"),
        (lambda: function(num_api_spec_tokens=0)(lambda s: None), "num_api_spec_tokens is 0"),
        (lambda: asyncio.run(twice.async_run_batch([("a",)], at_once=0, backend=Scripted())), "at_once is 0"),
    ],
)
def test_what_is_wrong_is_said_by_name(call: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_programs_are_pickled_by_name() -> None:
    assert pickle.loads(pickle.dumps(twice)) is twice
    with pytest.raises(pickle.PicklingError, match="twice"):
        pickle.dumps(twice.bind(word="a"))


def test_programs_take_any_arguments_that_their_functions_do() -> None:
    @function
    def many(s: ProgramState, first: str, *rest: str, **named: str) -> list[Any]:
        return [first, rest, named]

    assert many.run("a", "b", c="d", backend=Scripted()).ret_value == ["a", ("b",), {"c": "d"}]
    assert many.bind(c="d").run("a", backend=Scripted()).ret_value == ["a", (), {"c": "d"}]
    assert many.trace().parts == []


def test_without_a_back_end_it_says_how_to_name_one() -> None:
    before = global_config.default_backend
    try:
        set_default_backend(None)
        with pytest.raises(RuntimeError, match="set_default_backend"):
            twice.run("a")
        backend = Scripted()

        class Holder:
            endpoint = backend

        set_default_backend(Holder())
        assert backend_of() is backend
    finally:
        set_default_backend(before)
