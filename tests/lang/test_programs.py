"""SGLang's own test programs, re-created, against a server over HTTP and against an engine in this process.

The default model is small: where it cannot know an answer, what can break is checked instead, the form of the answer, counts,
order, what the cache served, and that every way to run a program says the same at temperature 0.
"""

import asyncio
import json
import math
import re
from typing import Any

import pytest

import streamserve as sgl
from streamserve.default_model import find_default_model
from streamserve.errors import CheckpointError
from tests.lang import programs
from tests.media.pictures import file_of

try:
    find_default_model()
except CheckpointError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.timeout(300)

ENDINGS = [
    ("Baking: A man mixes flour and eggs in a bowl. He pours the dough into a pan and ", 1,
     ["throws the bowl at the moon.", "puts it into the oven.", "reads the newspaper to it.", "swims across the river."]),
    ("Reading: A girl sits under a tree with a book. She opens it and ", 2,
     ["eats the pages.", "drives it to town.", "begins to read.", "fills it with water."]),
    ("Washing: A woman puts dirty clothes into the machine. She adds soap and ", 0,
     ["starts the machine.", "sings in the church.", "plants a tree.", "climbs the mountain."]),
    ("Fishing: An old man stands by the lake with his rod. He throws the line into the water and ", 3,
     ["paints the ceiling.", "kicks the ball.", "cuts his hair.", "waits for a fish."]),
]  # fmt: skip


@pytest.fixture(scope="module", params=["http", "engine"])
def backend(request: pytest.FixtureRequest) -> Any:
    if request.param == "http":
        return sgl.RuntimeEndpoint(request.getfixturevalue("server_url"))
    return request.getfixturevalue("engine")


@pytest.fixture(autouse=True)
def default_backend(backend: Any) -> None:
    sgl.set_default_backend(backend)


def _info(state: Any, name: str) -> dict[str, Any]:
    found: dict[str, Any] = state.get_meta_info(name)
    return found


def test_few_shot_qa() -> None:
    state = programs.few_shot_qa.run(country="France")
    assert state["capital"] == " Paris"
    assert state.text().endswith("Country: France\nCapital: Paris")
    countries = ["Germany", "Japan", "Egypt", "Russia"]
    states = programs.few_shot_qa.run_batch([{"country": country} for country in countries], temperature=0.1)
    assert [state["capital"].strip() for state in states] == ["Berlin", "Tokyo", "Cairo", "Moscow"]
    for state in states:  # all but the country's own tokens and what frames them was read before
        assert _info(state, "capital")["prompt_tokens"] - _info(state, "capital")["cached_tokens"] <= 8


def test_mt_bench() -> None:
    state = programs.mt_bench.run(first="Name a planet.", second="Name another one.", temperature=0, max_new_tokens=16)
    messages = state.messages()
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [messages[2]["content"], messages[4]["content"]] == [state["answer_1"], state["answer_2"]]
    first, second = _info(state, "answer_1"), _info(state, "answer_2")
    assert second["cached_tokens"] >= first["prompt_tokens"] + first["completion_tokens"] - 2


def test_select() -> None:
    reviews = {"The best meal I have ever had.": " positive", "It was awful, I hated it.": " negative"}
    for review, verdict in reviews.items():
        state = programs.select.run(review=review)
        assert state["verdict"] == verdict
        assert state.text().endswith(f"Verdict:{verdict}")
        scores = _info(state, "verdict")["normalized_prompt_logprobs"]
        assert scores[[" positive", " negative", " neutral"].index(verdict)] == max(scores)


def test_decode_int() -> None:
    state = programs.decode_int.run(temperature=0.1)
    assert int(state["days"]) == 7
    assert int(state["seconds"]) == 60


def test_decode_json() -> None:
    facts = json.loads(programs.decode_json.run(max_new_tokens=24, temperature=0)["facts"])
    assert list(facts) == ["city", "people", "districts", "river"]
    assert [type(value) for value in facts.values()] == [str, int, int, str]


def test_decode_json_regex() -> None:
    facts = json.loads(programs.decode_json_regex.run(max_new_tokens=24, temperature=0)["facts"])
    assert isinstance(facts["city"], str)
    assert isinstance(facts["people"], int)
    assert isinstance(facts["latitude"], int | float)


def test_dtypes() -> None:
    state = programs.dtypes.run(max_new_tokens=16, temperature=0)
    assert isinstance(json.loads(state["string"]), str)
    assert isinstance(int(state["whole"]), int)
    assert math.isfinite(float(state["real"]))
    assert state["truth"] in ("True", "False")


def test_expert_answer() -> None:
    state = programs.expert_answer.run(question="What is the capital of France?", temperature=0.1)
    assert state.text().count(state["expert"]) >= 2
    assert state.text().endswith(state["answer"] + ".")


def test_tool_use() -> None:
    state = programs.tool_use(left=21, right=46, temperature=0)
    assert state["expression"] == "21 * 46"
    assert state["result"] == "966"
    assert state.text().endswith("calc(21 * 46) = 966")


def test_react() -> None:
    state = programs.react.run(question="Who wrote the book that the film Jurassic Park was made from?", temperature=0.1)
    assert state["answer"].strip()
    taken = [state[f"action_{i}"] for i in range(1, 4) if f"action_{i}" in state]
    assert taken and set(taken) <= {"Search", "Finish"}
    assert "Finish" not in taken[:-1]


def test_parallel_decoding() -> None:
    state = programs.parallel_decoding.run(topic="sleeping well", temperature=0.3)
    assert isinstance(state["summary"], str)
    details = state["detail"]
    assert len(details) == programs.NUM_TIPS
    places = [state.text().index(f"Tip {i + 1}:{detail}\n") for i, detail in enumerate(details)]
    assert places == sorted(places)


def test_parallel_encoding() -> None:
    facts = ["The cat is black.", "The dog is white.", "The horse is brown."]
    state = programs.parallel_encoding.run(facts=facts, question="Which colour is the dog?", temperature=0)
    read = "".join(f"Fact {i + 1}: {fact}\n" for i, fact in enumerate(facts))
    assert state.text().startswith("Some facts.\n" + read + "Question: ")
    assert "white" in state["answer"]


def _red_circle() -> bytes:
    from PIL import Image, ImageDraw

    picture = Image.new("RGB", (160, 160), "white")
    ImageDraw.Draw(picture).ellipse((40, 40, 120, 120), fill="#e01010")
    return file_of(picture)


def test_a_choice_about_a_picture() -> None:
    state = programs.image_choice.run(picture=_red_circle(), temperature=0)
    assert state["colour"] == "Red"
    assert len(_info(state, "colour")["normalized_prompt_logprobs"]) == 3


def test_image_qa() -> None:
    state = programs.image_qa.run(picture=_red_circle(), question="What is in this picture?", temperature=0, max_new_tokens=24)
    content = state.messages()[0]["content"] if state.messages()[0]["role"] == "user" else state.messages()[1]["content"]
    assert sorted(part["type"] for part in content) == ["image_url", "text"]
    assert state.messages()[-1]["content"] == state["answer"]
    assert "red circle" in state["answer"]
    assert _info(state, "answer")["prompt_tokens"] > 100  # the picture's places are tokens


def test_stream() -> None:
    question = "What is a river?"
    whole = programs.stream.run(question=question, temperature=0)
    state = programs.stream(question=question, temperature=0, stream=True)
    assert "".join(state.text_iter()) == whole.text()
    state = programs.stream(question=question, temperature=0, stream=True)
    pieces = list(state.text_iter("answer"))
    assert "".join(pieces) == whole["answer"] == state["answer"]
    assert len(pieces) > 4

    async def read() -> list[str]:
        state = programs.stream.run(question=question, temperature=0, stream=True)
        return [piece async for piece in state.text_async_iter("answer")]

    assert "".join(asyncio.run(read())) == whole["answer"]


def test_regex() -> None:
    assert re.fullmatch(programs.IP_ADDRESS, programs.regex.run()["answer"])


def test_fork() -> None:
    colours = ["green", "white", "yellow"]
    state = programs.fork.run(colours=colours, temperature=0)
    lines = state.text().splitlines()
    assert lines[0] == "Things and their colours."
    assert all(line.startswith("Also: the") for line in lines[1:4])
    assert "Nobody" not in state.text()
    assert state["after"] in state.text()


def test_min_new_tokens() -> None:
    state = programs.min_new_tokens.run(least=24, most=32, temperature=0)
    assert 24 <= _info(state, "answer")["completion_tokens"] <= 32


def test_hellaswag_select() -> None:
    arguments = [{"beginning": beginning, "endings": endings} for beginning, _, endings in ENDINGS]
    states = programs.hellaswag_select.run_batch(arguments, temperature=0, num_threads=8)
    taken = [endings.index(state["ending"]) for state, (_, _, endings) in zip(states, ENDINGS, strict=True)]
    assert taken == [right for _, right, _ in ENDINGS]


def test_bind_and_trace_and_cache(backend: Any) -> None:
    bound = programs.few_shot_qa.bind(country="Norway")
    assert bound.run()["capital"].strip() == "Oslo"
    assert "capital" in str(programs.few_shot_qa.trace())
    programs.few_shot_qa.cache(backend)
    assert _info(programs.few_shot_qa.run(country="Sweden"), "capital")["cached_tokens"] > 30


def test_a_program_calls_another() -> None:
    state = programs.multi_function.run(topic="cooking", temperature=0)
    assert state.text().startswith("A tip for cooking:" + state["tip"] + ".\n")
