"""Programs against a server of OpenAI's interface, where every call is paid for: one long guess serves several nodes."""

import json
import urllib.request
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


def _openai(url: str, *, is_chat_model: bool) -> Any:
    with urllib.request.urlopen(f"{url}/v1/models") as answer:
        model = json.load(answer)["data"][0]["id"]
    return sgl.OpenAI(model, is_chat_model=is_chat_model, base_url=f"{url}/v1", api_key="none")


def test_completion_speculative(server_url: str) -> None:
    backend = _openai(server_url, is_chat_model=False)
    usage = backend.token_usage

    usage.reset()
    guessed = programs.completion_speculative.run(backend=backend, temperature=0)
    guessed.sync()
    with_guesses = usage.prompt_tokens

    usage.reset()
    plain = programs.character.run(backend=backend, temperature=0)
    plain.sync()
    without = usage.prompt_tokens

    assert 0 < with_guesses < without
    for name in ("name", "birthday", "work"):
        assert guessed[name].strip() and "\n" not in guessed[name]
    assert guessed.text().startswith("Make up a person in this form:\n")


def test_chat_completion_speculative(server_url: str) -> None:
    backend = _openai(server_url, is_chat_model=True)
    state = programs.chat_completion_speculative.run(backend=backend, temperature=0)
    state.sync()
    assert state.error() is None
    last = state.messages()[-1]
    assert last["role"] == "assistant"
    for title, name in (("Name", "name"), ("Birthday", "birthday"), ("Work", "work")):
        assert f"{title}:{state[name]}" in last["content"]
