"""Ways to run a program, and to score a prompt, that must not differ: here or over HTTP, sync or async, alone or in a batch."""

import asyncio
from typing import Any

import pytest

import streamserve as sgl
from streamserve.default_model import find_default_model
from streamserve.errors import CheckpointError
from tests.lang import programs

try:
    find_default_model()
except CheckpointError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.timeout(300)


async def _inside_a_loop(program: Any, arguments: dict[str, Any]) -> str:
    """The synchronous way, where an event loop runs already: a notebook's cell."""
    text: str = program.run(**arguments, temperature=0).text()
    return text


def test_scores_behind_a_cached_prefix_are_those_of_a_whole_prompt(engine: Any) -> None:
    texts = [f"The capital of {country} is a large city by a river." for country in ("Italy", "France", "Japan")]
    options = {"return_logprob": True, "sampling_params": {"max_new_tokens": 1, "temperature": 0}}
    whole = engine.generate(texts, logprob_start_len=0, **options)
    engine.generate(texts, {"max_new_tokens": 1})
    for start in (1, 4, 9):
        for all_of_it, part in zip(whole, engine.generate(texts, logprob_start_len=start, **options), strict=True):
            scores, expected = part["meta_info"]["input_token_logprobs"], all_of_it["meta_info"]["input_token_logprobs"][start:]
            assert [entry[1] for entry in scores] == [entry[1] for entry in expected]
            assert [entry[0] for entry in scores] == pytest.approx([entry[0] for entry in expected], abs=1e-3)
            assert part["meta_info"]["cached_tokens"] == start - 1


def test_every_way_to_run_a_program_says_the_same(server_url: str, engine: Any) -> None:
    sgl.set_default_backend(engine)
    ways = [
        (programs.stream, {"question": "What is a bridge?"}),
        (programs.parallel_decoding, {"topic": "walking"}),
        (programs.select, {"review": "Not bad, not good."}),
    ]
    for program, arguments in ways:
        texts = {"sync": program.run(**arguments, temperature=0).text()}
        texts["async"] = asyncio.run(program.async_run(**arguments, temperature=0)).text()
        texts["batch"], texts["again"] = (s.text() for s in program.run_batch([arguments] * 2, temperature=0))
        texts["threads"] = program.run_batch([arguments] * 2, temperature=0, num_threads=2)[1].text()
        texts["stream"] = "".join(program.run(**arguments, temperature=0, stream=True).text_iter())
        texts["inside a loop"] = asyncio.run(_inside_a_loop(program, arguments))
        texts["http"] = program.run(**arguments, temperature=0, backend=sgl.RuntimeEndpoint(server_url)).text()
        assert set(texts.values()) == {texts["sync"]}, texts
