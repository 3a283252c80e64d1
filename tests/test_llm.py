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
from itertools import pairwise
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import pytest
from PIL import Image

from streamserve import LLM, Engine, SamplingParams
from streamserve.errors import ConfigError, EngineStopped, InvalidRequest
from streamserve.lang import loops
from streamserve.llm.batches import MAX_IN_FLIGHT, all_of
from streamserve.llm.settings import config_of

FEW = {"max_new_tokens": 4}
CHAT = [{"role": "user", "content": "hi"}]


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
    theirs = {"max_new_tokens": 6, "min_new_tokens": 6, "sampling_seed": 3, "stop": ["x"], "no_stop_trim": True}
    ours = SamplingParams(max_tokens=6, min_tokens=6, seed=3, stop=("x",), include_stop_str_in_output=True)
    assert engine.generate("a", ours)["output_ids"] == engine.generate("a", theirs)["output_ids"]
    assert engine.generate("a", {"max_tokens": 2})["meta_info"]["completion_tokens"] == 2
    with pytest.raises(InvalidRequest, match="max_new_tokens is the same"):
        engine.generate("a", {"max_new_tokens": 2, "max_tokens": 2})


def test_logprobs_by_either_name(engine: Engine) -> None:
    meta = engine.generate("abc", SamplingParams(max_tokens=2, logprobs=1, prompt_logprobs=0))["meta_info"]
    assert len(meta["output_token_logprobs"]) == 2 and len(meta["input_token_logprobs"]) == 3
    assert engine.generate(["abc"], FEW, return_logprob=[True])[0]["meta_info"]["output_token_logprobs"]


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
    with pytest.raises(InvalidRequest, match="n is 2"):
        engine.stream("a", {"n": 2})


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


def test_a_field_without_effect_is_told_of_once(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "streamserve"):
        for _ in range(2):
            engine.chat(CHAT, max_tokens=1, user="me")
    assert caplog.text.count("user has no effect") == 1


def test_what_an_engine_says_of_itself(engine: Engine) -> None:
    assert engine.get_model_info()["served_model_name"] == "fake"
    assert engine.get_server_info()["fake"] is True
    engine.flush_cache(timeout=5)
    with pytest.raises(InvalidRequest, match="embedding model"):
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
    assert loops.run(all_of(calls)) == list(range(1000))
    assert most == MAX_IN_FLIGHT


def test_more_prompts_than_may_queue_at_a_server_are_no_matter(engine: Engine) -> None:
    lengths = [1 + index % 5 for index in range(1500)]
    answers = engine.generate(["p"] * 1500, [{"max_new_tokens": num} for num in lengths])
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

        asyncio.run(cancelled())
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
        "    print(engine.generate('a', {'max_new_tokens': 1})['meta_info']['completion_tokens'])\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None and child.stdout.readline() == "go\n"
        sleep(0.3)
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


def test_a_process_ends_with_requests_under_way() -> None:
    code = (
        "import threading\nfrom contextlib import suppress\nfrom streamserve import Engine\n"
        "engine = Engine(fake=True, fake_step_ms=5)\n"
        "stream = engine.generate('a', {'max_new_tokens': 4000}, stream=True)\n"
        "next(stream)\n"
        "def ask():\n"
        "    with suppress(Exception):\n"
        "        engine.generate(['a'] * 50, {'max_new_tokens': 4000})\n"
        "threading.Thread(target=ask, daemon=True).start()\n"
        "print('end')\n"
    )
    assert _ran(code) == "end\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_is_told_that_the_engine_is_elsewhere() -> None:
    code = (
        "import os, warnings\nfrom streamserve import Engine\n"
        "warnings.simplefilter('ignore')\n"
        "engine = Engine(fake=True)\n"
        "if os.fork() == 0:\n"
        "    try:\n"
        "        engine.generate('a')\n"
        "    except Exception as error:\n"
        "        print(error, flush=True)\n"
        "    os._exit(0)\n"
        "os.wait()\n"
        "print(engine.generate('a', {'max_new_tokens': 1})['meta_info']['completion_tokens'])\n"
    )
    first, second = _ran(code).splitlines()
    assert "forked" in first and second == "1"


def test_shutting_down_ends_what_runs() -> None:
    async def program() -> None:
        async with Engine(fake=True, fake_step_ms=5) as slow:
            task = asyncio.create_task(slow.async_generate("a", {"max_new_tokens": 4000}))
            await asyncio.sleep(0.05)
        answer = await asyncio.gather(task, return_exceptions=True)
        assert isinstance(answer[0], EngineStopped) or answer[0]["meta_info"]["finish_reason"]["type"] == "abort"

    asyncio.run(program())


# ---- settings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"modle_path": "x"}, r"^unknown setting modle_path; did you mean model_path\?$"),
        ({"port": 30000}, "^port is for a server"),
        ({"tp_size": 2}, "^tp_size 2 cannot be served: one server uses one GPU"),
        ({"max_total_tokens": "lots"}, "max_total_tokens: 'lots' is not a whole number"),
        ({"max_total_tokens": 64, "mem_fraction_static": 0.5}, "^mem_fraction_static and max_total_tokens both fix"),
        ({"is_embedding": True}, "embedding_model"),
    ],
)
def test_a_wrong_setting_is_named_as_it_was_written(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Engine(fake=True, **settings)


def test_settings_in_everybodys_words() -> None:
    config = config_of(
        {
            "model_path": None,
            "max_model_len": "8k",
            "gpu_memory_utilization": 0.5,
            "enable_prefix_caching": False,
            "op": ["a=b", "c=d"],
            "media_hosts": "example.org",
            "dtype": "half",
            "tp_size": 1,
        }
    )
    assert (config.model.context_length, config.cache.mem_fraction_static) == (8192, 0.5)
    assert config.cache.disable_radix_cache and config.device.op == ("a=b", "c=d")
    assert (config.server.media_hosts, config.model.dtype) == (("example.org",), "float16")


def test_a_setting_without_effect_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "streamserve"):
        config_of({"trust_remote_code": True})
    assert "trust_remote_code means nothing here" in caplog.text
