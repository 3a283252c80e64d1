"""The two threads, and waiting for what runs there."""

import asyncio
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from streamserve.lang import ProgramState, function, gen
from streamserve.lang.greenlets import spawn
from streamserve.lang.loops import arun, background, programs, run, wait
from tests.lang.scripted import Scripted

PROGRAM = """
import os
from streamserve.lang import function, gen
from tests.lang.scripted import Scripted

@function
def program(s):
    s += "a" + gen("x")
    return s["x"]

print(program.run_batch([{}, {}], backend=Scripted())[1].ret_value, flush=True)
child = os.fork()
print(program.run_batch([{}, {}], backend=Scripted())[0].ret_value, flush=True)
if child:
    assert os.waitpid(child, 0)[1] == 0
"""


async def _here() -> int:
    await asyncio.sleep(0)
    return threading.get_ident()


def test_work_runs_on_the_background_loop_whoever_waits() -> None:
    async def main() -> int:
        return await arun(_here())

    assert run(_here()) == asyncio.run(main()) == background().thread.ident != threading.get_ident()
    assert run(arun(_here())) == background().thread.ident


def test_who_would_wait_for_himself_is_told() -> None:
    async def blocking() -> None:
        run(_here())

    with pytest.raises(RuntimeError, match="await it instead"):
        run(blocking())


def test_greenlets_run_while_others_wait_and_see_no_loop() -> None:
    first_waits, seen = background().submit(asyncio.sleep(0.02)), []

    def first() -> str:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        wait(first_waits)
        seen.append("first")
        return "one"

    def second() -> str:
        seen.append("second")
        return "two"

    ends = [spawn(function)[0] for function in (first, second)]
    assert [wait(end) for end in ends] == ["one", "two"]
    assert seen == ["second", "first"]


def test_a_stopped_greenlet_lets_go_of_what_it_waits_for() -> None:
    waits = background().submit(asyncio.sleep(1000))
    end, stop = spawn(lambda: wait(waits))
    run(asyncio.sleep(0.01))
    stop()
    with pytest.raises(asyncio.CancelledError):
        wait(end)
    assert waits.cancelled()
    assert programs().thread.is_alive()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_programs_run_in_a_forked_child() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", PROGRAM], capture_output=True, text=True, timeout=60
    )
    assert done.stderr == ""
    assert sorted(done.stdout.replace("\n", "")) == sorted("<1>" * 3)  # two processes may write at once


def test_a_script_that_leaves_a_program_running_ends() -> None:
    script = (
        "from streamserve.lang import function, gen\nfrom tests.lang.scripted import Scripted\n"
        "@function\ndef f(s):\n    s += gen('x')\n    s['x']\n"
        "states = [f.run(stream=True, backend=Scripted(is_held=True)) for _ in range(3)]\n"
        "print(next(f.run_batch([{}], generator_style=True, backend=Scripted()))['x'])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("<0>\n", "")


def test_a_program_may_wait_for_a_thread_that_runs_programs() -> None:
    backend = Scripted()

    @function
    def inner(s: ProgramState, way: str) -> None:
        s += way + gen("x")
        s += gen("y")

    @function
    def outer(s: ProgramState) -> None:
        s += gen("first")
        assert s["first"]
        with ThreadPoolExecutor(1) as pool:
            s["batch"] = pool.submit(
                lambda: [state["y"] for state in inner.run_batch([{"way": "b"}] * 3, backend=backend)]
            ).result()
            s["stream"] = pool.submit(lambda: "".join(inner.run(way="s", stream=True, backend=backend).text_iter())).result()

    for state in outer.run_batch([{}] * 2, backend=backend):
        assert (state["batch"], state["stream"]) == (["<4>"] * 3, "s<1><4>")


def test_a_thread_that_has_ended_leaves_its_loop_to_the_next() -> None:
    seen = []
    for _ in range(3):
        thread = threading.Thread(target=lambda: seen.append(programs()))
        thread.start()
        thread.join()
    assert seen[0] is seen[1] is seen[2] is not programs()
