"""A thousand forks at once, on the engine in this process: a handful of threads, and a prefix that is computed once."""

import threading
from itertools import pairwise
from typing import Any

import pytest

import streamserve as sgl
from streamserve.default_model import find_default_model
from streamserve.errors import CheckpointError
from streamserve.text.model import load_text_model

try:
    MODEL = find_default_model()
except CheckpointError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.timeout(300)
NUM_FORKS = 1000
HANDFUL = 5
RULES = "The shop sells fruit, bread and milk. It is open from nine to five. " * 8


def _names(count: int) -> list[str]:
    firsts = ("Ann", "Bob", "Carl", "Dora", "Emil", "Fred", "Gina", "Hans", "Ida", "Jack")
    middles = ("North", "South", "East", "West", "Hill", "Lake", "Wood", "Field", "Stone", "Bridge")
    lasts = ("son", "man", "er", "ley", "ton", "ford", "by", "well", "worth", "land")
    return [f"{firsts[i % 10]} {middles[i // 10 % 10]}{lasts[i // 100 % 10]}" for i in range(count)]


@sgl.function
def shop(s: Any, names: list[str], most_threads: list[int]) -> None:
    """One state for each customer, all at once."""
    s += RULES
    forks = s.fork(len(names))
    for fork, name in zip(forks, names, strict=True):
        fork += f"{name} asks for" + sgl.gen("wish", max_tokens=1, temperature=0, ignore_eos=True)
    for fork in forks:
        assert fork["wish"]
        most_threads.append(threading.active_count())
    forks.join()
    s["prompts"] = [fork.text()[: -len(wish)] for fork, wish in zip(forks, s["wish"], strict=True)]
    s["infos"] = [fork.get_meta_info("wish") for fork in forks]


def _own_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if "streamserve-" in thread.name}


def _distinct(token_lists: list[list[int]]) -> int:
    """How many tokens there are when beginnings that are alike are counted once."""
    lists = sorted(token_lists)
    total = len(lists[0])
    for before, tokens in pairwise(lists):
        alike = next((i for i, pair in enumerate(zip(before, tokens, strict=False)) if pair[0] != pair[1]), len(before))
        total += len(tokens) - alike
    return total


def test_a_thousand_forks_take_a_handful_of_threads_and_compute_their_prefix_once(engine: Any) -> None:
    shop.run(names=_names(2), most_threads=[], backend=engine)  # every thread that there will be has begun
    sgl.flush_cache(engine)
    before, most, ours = threading.active_count(), [], _own_threads()
    state = shop.run(names=_names(NUM_FORKS), most_threads=most, backend=engine)
    assert len(state["wish"]) == NUM_FORKS
    assert max(most) - before <= HANDFUL
    assert _own_threads() == ours

    infos = state["infos"]
    text_model = load_text_model(MODEL)
    prompts = [text_model.encode_prompt(text) for text in state["prompts"]]
    assert [len(prompt) for prompt in prompts] == [info["prompt_tokens"] for info in infos]
    ahead = len(text_model.encode_prompt(RULES))  # what the parent has, which may have been computed before the forks began
    computed = ahead + sum(info["prompt_tokens"] - info["cached_tokens"] for info in infos)
    assert computed <= 1.05 * _distinct(prompts), (computed, _distinct(prompts))
