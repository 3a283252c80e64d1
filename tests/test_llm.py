"""`Engine` and `LLM` on the fake engine: SGLang's and vLLM's shapes, batches, streams, loops, shutdown; a little with a model."""

import asyncio
import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import numpy as np
import pytest
import structlog
from PIL import Image

import streamserve
from streamserve import LLM, Engine, SamplingParams
from streamserve.api.generate_schema import NativeSampling
from streamserve.api.schema import Sampled
from streamserve.errors import EngineStopped, InvalidRequest, StepFailed
from streamserve.lang import loops
from streamserve.llm.batches import all_of
from streamserve.llm.sampling import chat_fields, native_fields

FEW = {"max_new_tokens": 4}
CHAT = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module", autouse=True)
def own_logging() -> Iterator[None]:
    """As in a process that has not configured structlog: what other tests capture leaves it configured."""
    structlog.reset_defaults()
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(fake=True, fake_step_ms=0) as engine:
        yield engine


def _threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if not thread.name.startswith("AnyIO")}


# ---- shapes ------------------------------------------------------------------------------------------------------------


def test_one_prompt_gives_a_dictionary_and_a_list_gives_a_list(engine: Engine) -> None:
    one = engine.generate("a", FEW)
    assert set(one) == {"text", "output_ids", "meta_info"} and len(one["output_ids"]) == 4
    many = engine.generate(["a", "b"], [FEW, {"max_new_tokens": 2}], rid="job")
    assert [answer["meta_info"]["completion_tokens"] for answer in many] == [4, 2]
    assert [answer["meta_info"]["id"] for answer in many] == ["job_0", "job_1"]
    assert many[0]["text"] == one["text"]
    assert engine.generate([], FEW) == []


def test_token_ids_are_prompts_too(engine: Engine) -> None:
    text = engine.generate("ab", FEW)["text"]
    assert engine.generate(input_ids=[97, 98], sampling_params=FEW)["text"] == text
    assert [answer["text"] for answer in engine.generate(input_ids=[[97, 98]], sampling_params=FEW)] == [text]


def test_choices_of_a_batch_follow_each_other(engine: Engine) -> None:
    answers = engine.generate(["a", "b"], {"n": 2, **FEW})
    assert [answer["meta_info"]["prompt_tokens"] for answer in answers] == [1, 1, 1, 1] and len(answers) == 4


def test_both_spellings_of_sampling_mean_the_same(engine: Engine) -> None:
    theirs: Any = {"max_new_tokens": 6, "min_new_tokens": 6, "sampling_seed": 3, "stop": ["x"], "no_stop_trim": True}
    ours = SamplingParams(max_tokens=6, min_tokens=6, seed=3, stop=("x",), include_stop_str_in_output=True)
    expected = engine.generate("a", ours)["output_ids"]
    assert engine.generate("a", theirs)["output_ids"] == engine.generate("a", SamplingParams(**theirs))["output_ids"] == expected
    assert engine.generate("a", {"max_tokens": 2})["meta_info"]["completion_tokens"] == 2
    assert engine.chat(CHAT, SamplingParams(max_new_tokens=2))["usage"]["completion_tokens"] == 2
    with pytest.raises(InvalidRequest, match="max_new_tokens is the same"):
        engine.generate("a", {"max_new_tokens": 2, "max_tokens": 2})
    with pytest.raises(InvalidRequest, match="max_new_tokens is the same"):
        SamplingParams(max_tokens=2, max_new_tokens=2)
    with pytest.raises(InvalidRequest, match="max_tokens is given twice"):
        engine.chat(CHAT, {"max_tokens": 2}, max_tokens=3)


def test_every_way_to_sample_is_a_field_of_both_routes() -> None:
    names = {entry.name for entry in fields(SamplingParams)} - {"logprobs", "prompt_logprobs"}
    native = {field for name in names for field in native_fields({name: "given"})["sampling_params"]}
    assert native == set(NativeSampling.__struct_fields__) - {"structural_tag"}  # which a chat has in its response_format
    assert {field for name in names for field in chat_fields({name: "given"})} <= set(Sampled.__struct_fields__)


def test_arrays_columns_and_generators_are_lists(engine: Engine) -> None:
    texts = [answer["text"] for answer in engine.generate(["a", "b"], FEW)]
    many: list[Any] = [("a", "b"), np.array(["a", "b"]), (text for text in "ab"), {"a": 1, "b": 2}.keys()]
    for given in many:
        assert [answer["text"] for answer in engine.generate(given, FEW)] == texts
    assert engine.generate(input_ids=np.array([97]), sampling_params=FEW)["text"] == texts[0]
    sampling = {"max_new_tokens": np.int64(1), "temperature": np.float32(0), "logit_bias": {98: 50.0}}
    assert engine.generate(input_ids=[np.array([97])], sampling_params=sampling)[0]["meta_info"]["completion_tokens"] == 1


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (b"a", "^prompt is b'a'; allowed is a text, or a list of texts"),
        ([1, 2], "give them as input_ids"),
        ([[1], [2]], "give them as input_ids"),
    ],
)
def test_what_is_no_prompt_is_told_of(engine: Engine, prompt: Any, message: str) -> None:
    for stream in (False, True):
        with pytest.raises(InvalidRequest, match=message) as failure:
            engine.generate(prompt, FEW, stream=stream)
        assert failure.value.param == "prompt"
    with pytest.raises(InvalidRequest, match="the request holds what JSON has no form for"):
        engine.generate("a", {"max_new_tokens": object()})


@pytest.mark.parametrize("messages", ["hello", CHAT[0], [*CHAT, "hello"], ["hello", CHAT]])
def test_what_is_no_conversation_is_told_of(engine: Engine, messages: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"^messages(\[\d\])? is ") as failure:
        engine.chat(messages, FEW)
    assert (failure.value.param or "").startswith("messages")


def test_logprobs_by_either_name(engine: Engine) -> None:
    meta = engine.generate("abc", SamplingParams(max_tokens=2, logprobs=1, prompt_logprobs=0))["meta_info"]
    assert len(meta["output_token_logprobs"]) == 2 and len(meta["input_token_logprobs"]) == 3
    assert engine.generate(["abc"], FEW, return_logprob=[True])[0]["meta_info"]["output_token_logprobs"]
    for wrong in (-1, 21, "2"):
        with pytest.raises(InvalidRequest, match=r"^logprobs is .*; allowed is 0 to 20") as failure:
            engine.generate("abc", {"logprobs": wrong})
        assert failure.value.param == "sampling_params.logprobs"


def test_a_stream_repeats_the_text_so_far(engine: Engine) -> None:
    texts = [answer["text"] for answer in engine.generate("a", FEW, stream=True)]
    assert len(texts) == 4 and all(later.startswith(earlier) for earlier, later in pairwise(texts))
    last = {answer["index"]: answer["text"] for answer in engine.generate(["a", "b"], FEW, stream=True)}
    assert last == {0: texts[-1], 1: engine.generate("b", FEW)["text"]}


def test_text_comes_in_pieces_from_prompts_and_chats(engine: Engine) -> None:
    assert "".join(engine.stream("a", FEW)) == engine.generate("a", FEW)["text"]
    answer = engine.chat(CHAT, SamplingParams(max_tokens=4, temperature=0))
    assert answer["object"] == "chat.completion"
    assert "".join(engine.stream(CHAT, max_tokens=4, temperature=0)) == answer["choices"][0]["message"]["content"]
    chunks = list(engine.chat(CHAT, SamplingParams(max_tokens=4, temperature=0), stream=True))
    assert (
        "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
        == answer["choices"][0]["message"]["content"]
    )
    assert chunks[0]["object"] == "chat.completion.chunk" and chunks[-1]["choices"][0]["finish_reason"] == "length"
    with pytest.raises(InvalidRequest, match="n is 2"):
        engine.stream("a", {"n": 2})
    with pytest.raises(InvalidRequest, match="messages are 2 conversations"):
        engine.chat([CHAT, CHAT], stream=True)


def test_many_chats_are_answered_in_order(engine: Engine) -> None:
    chats = [[{"role": "user", "content": f"number {i}"}] for i in range(3)]
    alone = [engine.chat(chat, max_tokens=5) for chat in chats]
    together = engine.chat(chats, [{"max_tokens": 5}] * 3)
    assert [a["choices"][0]["message"] for a in together] == [a["choices"][0]["message"] for a in alone]


def test_pictures_are_paths_bytes_and_open_pictures(engine: Engine, tmp_path: Path) -> None:
    picture = Image.new("RGB", (32, 32), "red")
    picture.save(tmp_path / "red.png")
    shown = [str(tmp_path / "red.png"), (tmp_path / "red.png").read_bytes(), picture, [picture]]
    assert {engine.generate("a", FEW, image_data=one)["meta_info"]["image_tokens"] for one in shown} == {16}
    with_one, without = engine.generate(["a", "b"], FEW, image_data=[picture, None])
    assert with_one["meta_info"]["image_tokens"] == 16 and "image_tokens" not in without["meta_info"]
    with pytest.raises(InvalidRequest, match=r"image_data is 'nothing\.png'"):
        engine.generate("a", FEW, image_data="nothing.png")
    with pytest.raises(InvalidRequest, match=r"^image_data: a picture is int"):
        engine.generate("a", FEW, image_data=5)
    bad, good = engine.generate(["a", "b"], FEW, image_data=[Path("nothing.png"), picture], return_exceptions=True)
    assert isinstance(bad, InvalidRequest) and "nothing.png" in str(bad) and good["meta_info"]["image_tokens"] == 16


def test_chats_show_pictures_as_prompts_do(engine: Engine, tmp_path: Path) -> None:
    picture = Image.new("RGB", (32, 32), "red")
    picture.save(tmp_path / "red.png")

    def chat(shown: Any) -> list[dict[str, Any]]:
        return [{"role": "user", "content": [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": shown}]}]

    for shown in ({"url": str(tmp_path / "red.png")}, {"url": picture}, picture):
        assert engine.chat(chat(shown), max_tokens=1)["usage"]["prompt_tokens_details"]["image_tokens"] == 16
    assert "".join(engine.stream(chat(picture), max_tokens=3))
    with pytest.raises(InvalidRequest, match=r"^messages\[0\]\.content\[1\]\.image_url\.url: .*nothing"):
        engine.chat(chat({"url": tmp_path / "nothing.png"}))


def test_a_field_without_effect_is_told_of_once(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "streamserve"):
        for _ in range(2):
            engine.chat(CHAT, max_tokens=1, user="me")
    assert caplog.text.count("user has no effect") == 1


def test_what_an_engine_says_of_itself(engine: Engine) -> None:
    assert engine.get_model_info()["served_model_name"] == "fake"
    assert engine.get_server_info()["fake"] is True
    engine.flush_cache(timeout=5)
    with pytest.raises(InvalidRequest, match="embedding model is served; start the server with embedding_model"):
        engine.encode(["a"])
    assert engine.call("POST", "/tokenize", {"prompt": "ab"})["tokens"] == [97, 98]


def test_vllms_shapes() -> None:
    with LLM("any", fake=True, fake_step_ms=0, seed=1, enforce_eager=True) as llm:
        outputs = llm.generate(["a", {"prompt": "b"}], SamplingParams(n=2, max_tokens=3, logprobs=1))
        assert [output.prompt for output in outputs] == ["a", "b"] and outputs[1].prompt_token_ids == [98]
        first = outputs[0].outputs[1]
        assert (first.index, len(first.token_ids), first.finish_reason) == (1, 3, "length")
        assert first.logprobs is not None and first.logprobs[0][first.token_ids[0]].decoded_token == first.text[0]
        assert llm.generate({"prompt_token_ids": [97]}, {"max_tokens": 3})[0].prompt is None
        (chat,) = llm.chat(CHAT, SamplingParams(max_tokens=3))
        assert len(chat.outputs[0].token_ids) == 3 and chat.prompt_token_ids
        with pytest.raises(InvalidRequest, match="all of one kind"):
            llm.generate(["a", [1]])
        with pytest.raises(InvalidRequest, match="stream is for the methods of Engine"):
            llm.generate("a", stream=True)


@streamserve.function
def ask(s: Any) -> None:
    s += "hello" + streamserve.gen("answer", max_tokens=2)


def test_vllms_outputs_hold_all_that_was_asked_for() -> None:
    with LLM(model_path="any", fake=True, fake_step_ms=0) as llm:
        asked = SamplingParams(max_tokens=2, logprobs=1, prompt_logprobs=1, temperature=0)
        (one,) = llm.generate([97, 98, 99], asked)
        assert one.prompt_logprobs is not None and one.prompt_logprobs[0] is None and len(one.prompt_logprobs) == 3
        assert one.prompt_logprobs[1] is not None and one.prompt_logprobs[1][98].decoded_token == "b"
        (output,) = one.outputs
        assert output.logprobs is not None and output.cumulative_logprob is not None
        assert output.cumulative_logprob == sum(
            entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True)
        )
        (chat,) = llm.chat(CHAT, asked)
        answer = chat.outputs[0]
        assert answer.logprobs is not None and [*map(list, answer.logprobs)] == [[token] for token in answer.token_ids]
        assert answer.message is not None and answer.message["content"] == answer.text
        assert chat.prompt_logprobs is not None and set(chat.prompt_logprobs[1] or {}) == {chat.prompt_token_ids[1]}
        assert ask.run(backend=llm)["answer"] == llm.generate("hello", SamplingParams(max_tokens=2))[0].outputs[0].text
        twins = llm.generate(["a", "b"], SamplingParams(max_tokens=2, n=2), rid=["x", "x"])
        assert [(twin.prompt, len(twin.outputs)) for twin in twins] == [("a", 2), ("b", 2)]
        seen = llm.generate({"prompt": "a", "multi_modal_data": {"image": Image.new("RGB", (32, 32))}}, {"max_tokens": 1})
        assert len(seen[0].prompt_token_ids) > 16
        with pytest.raises(InvalidRequest, match=r"a prompt has multi_modal_data\.audio"):
            llm.generate({"prompt": "a", "multi_modal_data": {"audio": b""}})


# ---- batches -----------------------------------------------------------------------------------------------------------


def test_a_batch_keeps_its_order_and_is_bounded() -> None:
    under_way = most = 0

    async def call(index: int) -> int:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0.001 * (index % 3))
        under_way -= 1
        return index

    calls = [lambda index=index: call(index) for index in range(1000)]
    assert loops.run(all_of(calls, 200)) == list(range(1000))
    assert most == 200


def test_more_prompts_than_may_queue_at_a_server_are_no_matter(engine: Engine) -> None:
    lengths = [1 + index % 3 for index in range(400)]
    answers = engine.generate(["p"] * 400, [{"max_new_tokens": num} for num in lengths])
    assert [len(answer["output_ids"]) for answer in answers] == lengths


def test_a_bad_prompt_ends_the_batch_or_stands_in_its_place(engine: Engine) -> None:
    sampling = [FEW, {"temperature": -1}, FEW]
    with pytest.raises(InvalidRequest, match=r"number 1 of 3: sampling_params\.temperature is -1") as failure:
        engine.generate(["a", "b", "c"], sampling)
    assert failure.value.param == "sampling_params.temperature"
    good, bad, other = engine.generate(["a", "b", "c"], sampling, return_exceptions=True)
    assert isinstance(bad, InvalidRequest) and len(good["output_ids"]) == len(other["output_ids"]) == 4
    with pytest.raises(InvalidRequest, match="sampling_params is a list of 2, but there are 3 prompts"):
        engine.generate(["a", "b", "c"], [FEW, FEW])


def test_a_bar_is_shown_when_asked_for(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    engine.generate(["a"] * 3, FEW)
    assert capsys.readouterr() == ("", "")
    engine.generate(["a"] * 3, FEW, progress=True)
    assert "3/3" in capsys.readouterr().err


# ---- loops -------------------------------------------------------------------------------------------------------------


def test_everything_works_in_a_running_loop_and_from_several(engine: Engine) -> None:
    async def program() -> list[str]:
        sync = engine.generate("a", FEW)["text"]
        answers = await asyncio.gather(*(engine.async_generate("a", FEW) for _ in range(20)))
        streamed = [answer["text"] async for answer in await engine.async_generate("a", FEW, stream=True)]
        pieces = "".join([piece async for piece in engine.stream("a", FEW)])
        chat = await engine.async_chat(CHAT, max_tokens=2)
        assert chat["usage"]["completion_tokens"] == 2
        *_, last = [chunk async for chunk in await engine.async_chat(CHAT, max_tokens=2, stream=True)]
        assert last["choices"][0]["finish_reason"] == "length"
        good, bad = await engine.async_generate(["a", "b"], [FEW, {"temperature": 900}], return_exceptions=True)
        assert isinstance(bad, InvalidRequest) and good["text"] == sync
        chats = await engine.async_chat([CHAT, CHAT], [FEW, {"temperature": 900}], return_exceptions=True)
        assert isinstance(chats[1], InvalidRequest) and len(chats[0]["choices"]) == 1
        return [sync, streamed[-1], pieces, *(answer["text"] for answer in answers)]

    found = [asyncio.run(program())]
    others = [threading.Thread(target=lambda: found.append(asyncio.run(program()))) for _ in range(3)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert len(found) == 4 and len({text for texts in found for text in texts}) == 1


def test_who_leaves_ends_his_requests() -> None:
    with Engine(fake=True, fake_step_ms=5) as slow:
        running = lambda: slow.get_server_info()["internal_states"][0]["running"]  # noqa: E731
        for _ in slow.generate("a", {"max_new_tokens": 4000}, stream=True):
            break
        _until(lambda: running() == 0)

        async def cancelled() -> None:
            task = asyncio.create_task(slow.async_generate(["a"] * 8, {"max_new_tokens": 4000}))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        async def cancelled_stream() -> None:
            async def read() -> None:
                async for _ in slow.stream("a", {"max_new_tokens": 4000}):
                    pass

            task = asyncio.create_task(read())
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        for program in (cancelled, cancelled_stream):
            asyncio.run(program())
            _until(lambda: running() == 0)


def _until(holds: Any) -> None:
    end = monotonic() + 10
    while not holds():
        assert monotonic() < end
        sleep(0.01)


def test_ctrl_c_ends_a_batch_and_the_engine_goes_on() -> None:
    code = (
        "from streamserve import Engine\n"
        "engine = Engine(fake=True, fake_step_ms=5)\n"
        "print('go', flush=True)\n"
        "try:\n"
        "    engine.generate(['a'] * 2000, {'max_new_tokens': 4000})\n"
        "except KeyboardInterrupt:\n"
        "    print('and', flush=True)\n"
        "try:\n"
        "    for piece in engine.stream('a', {'max_new_tokens': 4000}):\n"
        "        pass\n"
        "except KeyboardInterrupt:\n"
        "    print(engine.generate('a', {'max_new_tokens': 1})['meta_info']['completion_tokens'])\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for word in ("go\n", "and\n"):
            assert child.stdout.readline() == word
            sleep(0.2)
            os.kill(child.pid, signal.SIGINT)
        out, err = child.communicate(timeout=30)
    assert (out, err, child.returncode) == ("1\n", "", 0)


# ---- life --------------------------------------------------------------------------------------------------------------


def test_several_engines_live_side_by_side_and_leave_nothing_behind() -> None:
    loops.background()
    before, thresholds, frozen, interval = _threads(), gc.get_threshold(), gc.get_freeze_count(), sys.getswitchinterval()
    handlers = list(logging.getLogger().handlers)
    first, second = Engine(fake=True, fake_step_ms=0), Engine(fake=True, fake_step_ms=0, served_model_name="other")
    assert first.generate("a", FEW)["text"] == second.generate("a", FEW)["text"]
    assert second.get_model_info()["served_model_name"] == "other"
    kept = weakref.ref(first._host._parts[0].engine)  # type: ignore[index]
    first.shutdown()
    first.shutdown()
    assert kept() is None
    with pytest.raises(EngineStopped, match="was shut down"):
        first.generate("a", FEW)
    assert second.generate("a", FEW)["text"]
    host = weakref.ref(second._host)
    endpoint = second.endpoint
    del second
    gc.collect()
    assert loops.run(endpoint.model_info())["served_model_name"] == "other"  # a program may still have it as its back end
    del endpoint
    _until(lambda: gc.collect() >= 0 and host() is None)
    _until(lambda: _threads() <= before)
    assert (gc.get_threshold(), gc.get_freeze_count(), sys.getswitchinterval()) == (thresholds, frozen, interval)
    assert logging.getLogger().handlers == handlers


def _ran(code: str, *arguments: str) -> str:
    """What a script prints that ends well, and says nothing else."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_processes_end_quietly_with_requests_under_way_and_forked_children_are_told() -> None:
    code = (
        "import os, sys, threading, warnings\nfrom contextlib import suppress\nfrom streamserve import Engine\n"
        "warnings.simplefilter('ignore')\n"
        "engine = Engine(fake=True, fake_step_ms=5)\n"
        "stream = engine.generate('a', {'max_new_tokens': 4000}, stream=True)\n"
        "next(stream)\n"
        "if os.fork() == 0:\n"
        "    try:\n"
        "        engine.generate('a')\n"
        "    except Exception as error:\n"
        "        print(error)\n"
        "    del stream\n"
        "    sys.exit(0)\n"
        "os.wait()\n"
        "def ask():\n"
        "    with suppress(Exception):\n"
        "        engine.generate(['a'] * 50, {'max_new_tokens': 4000})\n"
        "threading.Thread(target=ask, daemon=True).start()\n"
        "print('end', len(next(stream)['text']) > 0)\n"
    )
    first, second = _ran(code).splitlines()
    assert "forked" in first and second == "end True"


def test_an_engine_that_breaks_says_so_to_all(caplog: pytest.LogCaptureFixture) -> None:
    async def program(engine: Engine) -> list[Any]:
        async def text() -> str:
            return "".join([piece async for piece in engine.stream("a", {"max_new_tokens": 4000})])

        tasks = asyncio.gather(engine.async_generate("a", {"max_new_tokens": 4000}), text(), return_exceptions=True)
        await asyncio.sleep(0.05)
        engine._host._parts[0].engine._scheduler.next_plan = None  # type: ignore
        return list(await tasks)

    with Engine(fake=True, fake_step_ms=5) as engine:
        for error in asyncio.run(program(engine)):
            assert isinstance(error, StepFailed) and str(error).startswith("the engine has stopped: TypeError")
        with pytest.raises(EngineStopped, match="the engine has stopped"):
            engine.generate("a")
    assert "engine_stopped" in caplog.text


def test_shutting_down_ends_what_runs() -> None:
    async def program() -> None:
        async with Engine(fake=True, fake_step_ms=5) as slow:
            task = asyncio.create_task(slow.async_generate("a", {"max_new_tokens": 4000}))
            await asyncio.sleep(0.05)
        answer = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(answer[0], EngineStopped) or answer[0]["meta_info"]["finish_reason"]["type"] == "abort"

    asyncio.run(program())
