"""A program's state: what may be appended, what is read while it grows, turns, scopes, pictures."""

import asyncio
import base64
import io
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from streamserve.errors import InvalidRequest
from streamserve.lang import (
    ProgramState,
    assistant,
    assistant_begin,
    assistant_end,
    function,
    gen,
    gen_int,
    gen_string,
    image,
    select,
    separate_reasoning,
    system,
    user,
    video,
)
from streamserve.lang.arguments import SAMPLING_NAMES
from streamserve.lang.backend import Piece, Prompt, Sampling
from tests.lang.scripted import Scripted

PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")


def run(body: Any, backend: Scripted | None = None, **options: Any) -> ProgramState:
    @function
    def program(s: ProgramState) -> Any:
        return body(s)

    return program.run(backend=backend or Scripted(), **options)


def test_turns_are_calls_or_blocks_and_become_messages() -> None:
    def body(s: ProgramState) -> None:
        s += system("rules")
        s.user("one")
        with s.assistant():
            s += "so: " + gen("a")
        s += user("two" + gen()) + assistant_begin() + "known" + assistant_end()

    state = run(body)
    assert state.text() == "0system:rules;01user:one;12assistant:so: <41>;23user:two<56>;34assistant:known;4"
    contents = ["rules", "one", "so: <41>", "two<56>", "known"]
    assert [message["content"] for message in state.messages()] == contents
    assert [message["role"] for message in state.messages()] == ["system", "user", "assistant", "user", "assistant"]


def test_a_back_end_is_told_the_open_turn() -> None:
    backend = Scripted()
    run(lambda s: s.__iadd__(user("u") + assistant("so " + gen("a"))), backend).sync()
    (prompt,) = backend.prompts
    assert (prompt.role, prompt.opened) == ("assistant", "so ")
    assert prompt.messages == ({"role": "user", "content": "u"},)


def test_turns_inside_turns_and_ends_of_none_are_errors() -> None:
    assert "inside a turn of 'user'" in str(run(lambda s: s.__iadd__(user("a" + user("b")))).error())
    assert "none is open" in str(run(lambda s: s.__iadd__(assistant_end())).error())


def test_pictures_stand_in_text_and_messages_in_their_places(tmp_path: Path) -> None:
    path = tmp_path / "dot.png"
    path.write_bytes(PNG)
    url = f"data:image/png;base64,{base64.b64encode(PNG).decode()}"

    class Open:
        def save(self, file: io.BytesIO, format: str) -> None:
            file.write(PNG)

    backend = Scripted()

    def body(s: ProgramState) -> None:
        s += user(image(str(path)) + "between" + image(PNG) + image(Open()) + image("http://host/a.png"))
        s += assistant(gen("a"))

    state = run(body, backend)
    assert state.text().startswith("0user:[img]between[img][img][img];0")
    assert state.messages()[0]["content"] == [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": "between"},
        *({"type": "image_url", "image_url": {"url": each}} for each in (url, url, "http://host/a.png")),
    ]
    assert backend.prompts[0].images == (url, url, url, "http://host/a.png")
    assert isinstance(run(lambda s: s.__iadd__(image(str(tmp_path / "none.png")))).error(), FileNotFoundError)
    with pytest.raises(TypeError, match="a picture is int"):
        image(7)
    assert isinstance(run(lambda s: s.__iadd__(video("a.mp4", 4))).error(), InvalidRequest)


def test_scopes_meta_info_and_several_answers() -> None:
    def body(s: ProgramState) -> None:
        s += "ab"
        with s.var_scope("whole"):
            s += "c" + gen("a") + "d"
        with s.var_scope("same"):
            s += "e"
            with s.var_scope("same"):
                s += "f"
            assert s["same"] == "f"
        s += gen("many", n=3)

    state = run(body)
    assert state["whole"] == "c<3>d"
    assert state.get_meta_info("a") == {"prompt": 3}
    assert state.get_meta_info("a", timeout=1) == {"prompt": 3}
    assert state.get_meta_info("whole") is None
    assert (state["same"], state["many"]) == ("ef", ["<9>", "<9>1", "<9>2"])
    assert len(state.get_meta_info("many")) == 3
    assert state.text() == "abc<3>def<9>"
    assert "a" in state
    assert "b" not in state


def test_a_variable_that_nothing_sets_is_a_key_error_inside_and_outside() -> None:
    def body(s: ProgramState) -> None:
        s += gen("a")
        with pytest.raises(KeyError, match=r"'b'.*'a'"):
            s["b"]

    state = run(body)
    with pytest.raises(KeyError, match="'b'"):
        state["b"]
    with pytest.raises(KeyError, match="'c'"):
        list(run(body, stream=True).text_iter("c"))


def test_a_thread_of_a_program_that_reads_what_nothing_sets_is_told_so() -> None:
    def body(s: ProgramState) -> None:
        s += gen("a")
        with ThreadPoolExecutor(1) as pool, pytest.raises(KeyError, match="'b'"):
            pool.submit(lambda: s["b"]).result()

    assert run(body).error() is None


def test_forks_gather_new_variables_only_and_in_order() -> None:
    def body(s: ProgramState) -> None:
        s["kept"] = "mine"
        forks = s.fork(3)
        forks += ["a", "bb", "ccc"]
        for i, fork in enumerate(forks):
            fork["kept"] = "theirs"
            if i != 1:
                fork += gen("new")
        forks[0] += "later"
        forks.join()
        assert [fork["kept"] for fork in forks] == ["theirs"] * 3
        assert forks[0].text() == "a<1>later"
        with s.copy() as aside:
            aside += "aside" + gen("once")

    state = run(body)
    assert (state["kept"], state["new"], state["once"]) == ("mine", ["<1>", "<3>"], ["<5>"])
    assert state.text() == ""


def test_a_failed_fork_fails_its_parent_at_the_join() -> None:
    def answer(prompt: Prompt, sampling: Sampling) -> str:
        raise InvalidRequest(f"no {prompt.text}")

    def body(s: ProgramState) -> None:
        forks = s.fork(2)
        forks[1] += "two" + gen("a")
        s += "before"
        s.sync()
        assert s.error() is None
        forks.join()
        s += "after"

    assert str(run(body, Scripted(answer)).error()) == "no two"


def test_wrong_uses_say_what_is_right() -> None:
    def body(s: ProgramState) -> None:
        with pytest.raises(TypeError, match=r"str\(\) makes text"):
            s += 5  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="NoneType"):
            s += None  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="inside an f-string"):
            s += f"{gen('a')}"
        with pytest.raises(ValueError, match="fork"):
            s.fork(-1)
        forks = s.fork(2)
        with pytest.raises(ValueError, match="3 parts are appended to 2 forks"):
            forks += ["a", "b", "c"]
        with pytest.raises(ValueError, match="join mode"):
            forks.join("together")

    run(body)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("name", 5),
        *((name, "1") for name in ("max_tokens", "min_tokens", "n", "top_k", "logprob_start_len", "top_logprobs_num")),
        *((name, "1") for name in ("temperature", "top_p", "min_p", "frequency_penalty", "presence_penalty")),
        *((name, 1) for name in ("ignore_eos", "return_logprob", "return_text_in_logprobs", "stop", "stop_regex", "regex")),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", float("nan")),
        ("stop", ["a", 1]),
        ("stop_token_ids", "ab"),
        ("dtype", "complex"),
        ("regex", "("),
        ("json_schema", "{"),
        ("json_schema", {"const": b""}),
        ("json_schema", "[]"),
        ("choices", []),
        ("choices", ["a", ""]),
        ("choices", "ab"),
        ("choices", 5),
        ("choices", [1, 2]),
    ],
)
def test_a_wrong_argument_is_named_before_anything_runs(name: str, wrong: Any) -> None:
    with pytest.raises((TypeError, ValueError, InvalidRequest), match=rf"\b{name}\b"):
        gen(**{name: wrong})
    if name in SAMPLING_NAMES:
        backend = Scripted()
        with pytest.raises((TypeError, ValueError), match=rf"\b{name}\b"):
            run(lambda s: s.__iadd__(gen("a")), backend, **{name: wrong})
        assert not backend.prompts


def test_what_cannot_go_together_or_is_not_known_is_refused_at_once() -> None:
    assert gen("a", regex=r"\p{L}+[\pN]")
    with pytest.raises(ValueError, match="dtype and regex"):
        gen("a", regex="a", dtype=int)
    with pytest.raises(InvalidRequest, match="temperature"):
        select("a", ["x"], temperature=0.5)
    with pytest.raises(TypeError, match="choices_method"):
        select("a", ["x"], choices_method="greedy")  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="deepseek-r9"):
        separate_reasoning(gen("a"), "deepseek-r9")


def test_a_nodes_form_stands_above_the_runs() -> None:
    backend = Scripted()
    run(lambda s: s.__iadd__(gen("a", dtype=int) + gen("b")), backend, json_schema={"type": "null"}, stop=("x",), dtype=None)
    forms = [(each.dtype, each.json_schema) for each in backend.samplings]
    assert forms == [("int", None), (None, '{"type": "null"}')]


def test_a_caught_exception_leaves_turns_and_scopes_closed() -> None:
    def body(s: ProgramState) -> None:
        with pytest.raises(OSError), s.var_scope("scope"), s.user():
            s += "a"
            raise OSError
        s += user("b")

    state = run(body)
    assert (state.text(), state["scope"]) == ("0user:a;01user:b;1", "0user:a;0")


def test_typed_answers_and_choices_ask_for_what_they_are() -> None:
    backend = Scripted()
    nodes = gen_int("a", stop="x") + gen_string("b") + gen("c", choices=["p", "q"]) + gen("d", json_schema={"type": "null"})
    state = run(lambda s: s.__iadd__(nodes + select("e", ["r"])), backend)
    first, second, third = backend.samplings
    assert (first.dtype, first.stop) == ("int", ("x", " ", "\n"))
    assert (second.dtype, second.stop) == ("str", ())
    assert third.json_schema == '{"type": "null"}'
    assert (state["c"], state["e"]) == ("p", "r")


def test_thoughts_are_split_from_answers_and_leave_the_text() -> None:
    backend = Scripted(lambda prompt, _: "<think>hm</think>yes" if "why" in prompt.text else "plain")

    def body(s: ProgramState) -> None:
        s += separate_reasoning("plainly " + gen("b") + " why? " + gen("a") + "!" + gen(), "qwen3")

    state = run(lambda s: s.__iadd__(user("why?") + separate_reasoning(assistant(gen("a")), "qwen3")), backend)
    assert state.messages()[1] == {"role": "assistant", "content": "yes"}
    state = run(body, backend)
    assert state.text() == "plainly plain why? yes!<think>hm</think>yes"
    assert (state["a"], state["a_reasoning_content"], state["b"], state["b_reasoning_content"]) == ("yes", "hm", "plain", "")


class Slow(Scripted):
    """Streams "abc": one letter each time it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: asyncio.Queue[None] = asyncio.Queue()

    def step(self) -> None:
        from streamserve.lang.loops import background

        background().call(self.steps.put_nowait, None)

    async def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncIterator[Piece]:  # type: ignore[override]
        for i, letter in enumerate("abc"):
            await self.steps.get()
            yield Piece(letter, {"completion_tokens": i + 1})


def test_text_is_read_while_the_program_runs() -> None:
    backend = Slow()
    state = run_stream(backend)
    texts = state.text_iter()
    assert next(texts) == "go: "
    for letter in "ab":
        backend.step()
        assert next(texts) == letter
    backend.step()
    assert "".join(texts) == "c."
    assert list(state.text_iter()) == ["go: abc."]
    assert list(state.text_iter("answer")) == ["abc"]


def test_one_variable_is_read_from_a_loop_with_its_meta_info() -> None:
    backend = Slow()

    async def main() -> list[Any]:
        state, found = run_stream(backend), []
        async for text, meta in state.text_async_iter("answer", return_meta_data=True):
            found.append((text, meta["completion_tokens"]))
            backend.step()
        assert [text async for text in state.text_async_iter()] == ["go: abc."]
        with pytest.raises(ValueError, match="say which"):
            await anext(state.text_async_iter(None, return_meta_data=True))
        return found

    backend.step()
    assert asyncio.run(main()) == [("a", 1), ("b", 2), ("c", 3)]


def test_leaving_an_iterator_early_stops_no_program() -> None:
    backend = Slow()
    state = run_stream(backend)
    for _ in state.text_iter():
        break
    for _ in "abc":
        backend.step()
    assert state["answer"] == "abc"
    state.sync()
    assert state.ret_value == "done"


def run_stream(backend: Scripted) -> ProgramState:
    @function
    def program(s: ProgramState) -> str:
        s += "go: " + gen("answer") + "."
        s["answer"]
        return "done"

    return program.run(stream=True, backend=backend)


def test_a_stream_of_a_failing_program_gives_its_text_and_then_the_error() -> None:
    def answer(prompt: Prompt, sampling: Sampling) -> str:
        raise InvalidRequest("no")

    state = run(lambda s: s.__iadd__("go" + gen("a")), Scripted(answer), stream=True)
    seen = []
    with pytest.raises(InvalidRequest):
        for text in state.text_iter():
            seen.append(text)
    assert seen == ["go"]
    with pytest.raises(InvalidRequest):
        list(state.text_iter("a"))


def test_a_programs_own_text_iter_ends_with_what_it_appended() -> None:
    def body(s: ProgramState) -> str:
        s += "x" + gen("a")
        return "".join(s.text_iter()) + "|" + "".join(s.text_iter("a"))

    state = run(body, stream=True)
    state.sync()
    assert state.ret_value == "x<1>|<1>"


def test_async_programs_are_told_to_await() -> None:
    backend = Scripted(is_held=True)

    @function
    async def program(s: ProgramState) -> Any:
        forks = s.fork(2)
        forks += gen("f")
        s += gen("a")
        for call in (lambda: s["a"], s.text, s.sync, lambda: s.get_meta_info("a"), lambda: list(s.text_iter()), forks[0].text):
            with pytest.raises(RuntimeError, match=r"await|async for"):
                call()
        backend.release()
        forks.join()
        values = (await s.get("a"), await s.get("f"), await s.async_meta_info("a"), await s.select(choices=["p"]), await s.gen())
        return values, s["a"], await s.async_text(), s.text()

    state = asyncio.run(program.async_run(backend=backend))
    values = ("<0>", ["<0>", "<0>"], {"prompt": 0}, "p", "<4>")
    assert state.ret_value == (values, "<0>", "<0>p<4>", "<0>p<4>")
    assert not any(name.startswith("\0") for name in state.executor.transcript.variables)


def test_a_state_is_read_from_many_threads() -> None:
    backend = Scripted(is_held=True)
    state = run_threaded(backend)
    found: list[Any] = []
    readers = [threading.Thread(target=lambda: found.append(state["a"])) for _ in range(8)]
    for reader in readers:
        reader.start()
    backend.release()
    for reader in readers:
        reader.join()
    assert found == ["<0>"] * 8


def run_threaded(backend: Scripted) -> ProgramState:
    @function
    def program(s: ProgramState) -> None:
        s += gen("a")

    return program.run(stream=True, backend=backend)
