"""Markers of calls and thoughts that are control tokens: the parsers see them, clients do not."""

from dataclasses import replace
from typing import Any

import pytest

from streamserve.api.app import create_app
from streamserve.config import ServerConfig
from streamserve.errors import ConfigError
from streamserve.messages import Delta, FinishReason, GenerateRequest
from streamserve.text.byte_tokenizer import ByteTokenizer, byte_text_model
from streamserve.text.model import TextModel
from streamserve.text.template import ChatTemplate
from tests.api.conftest import client_of
from tests.api.scripted import Script, ScriptedEngine

pytestmark = pytest.mark.anyio
HI = [{"role": "user", "content": "hi"}]
NOW = {"type": "function", "function": {"name": "now"}}
CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
SHOWS_TOOLS = "{{ tools | tojson }}{% for m in messages %}{{ m.content }}{% endfor %}"
HARMONY = ("<|start|>", "<|channel|>", "<|message|>", "<|constrain|>", "<|end|>", "<|call|>", "<|return|>")


class MarkingTokenizer(ByteTokenizer):
    """Bytes, and further control tokens."""

    def __init__(self, *markers: str) -> None:
        self._id_of = {marker: ByteTokenizer.vocab_size + place for place, marker in enumerate(markers)}
        self._text_of = {id: text for text, id in self._id_of.items()}
        self.vocab_size = ByteTokenizer.vocab_size + len(markers)

    def token_bytes(self, id: int) -> bytes:
        return self._text_of[id].encode() if id in self._text_of else super().token_bytes(id)

    def is_special(self, id: int) -> bool:
        return id in self._text_of or super().is_special(id)

    def ids_of(self, text: str) -> list[int]:
        ids: list[int] = []
        while text:
            marker = next((marker for marker in self._id_of if text.startswith(marker)), None)
            ids += [self._id_of[marker]] if marker else text[0].encode()
            text = text[len(marker or "x") :]
        return ids


def says(tokenizer: MarkingTokenizer, text: str, *, stop: bool = False) -> Script:
    """Token by token; `stop`: the last token ends the answer."""

    def script(request: GenerateRequest) -> list[Delta]:
        ids = tokenizer.ids_of(text)
        deltas = [Delta((token,)) for token in ids[:-1]]
        return [*deltas, Delta(ids[-1:], finish_reason=FinishReason.STOP, matched_stop=ids[-1] if stop else None)]  # type: ignore[arg-type]

    return script


async def answer(
    tokenizer: MarkingTokenizer, text: str, config: ServerConfig, *, stop: bool = False, **fields: Any
) -> tuple[dict[str, Any], ScriptedEngine]:
    engine = ScriptedEngine(says(tokenizer, text, stop=stop))
    engine.state = replace(engine.state, context_len=4096, vocab_size=tokenizer.vocab_size)
    app = create_app(engine, TextModel(tokenizer, ChatTemplate(SHOWS_TOOLS)), config, model_name="tiny")
    async with client_of(app) as http:
        response = await http.post("/v1/chat/completions", json={"messages": HI, **fields})
    assert response.status_code == 200, response.text
    (choice,) = response.json()["choices"]
    return choice, engine


async def test_control_tokens_are_seen_by_the_parsers_and_by_nobody_else() -> None:
    tokenizer = MarkingTokenizer("<tool_call>", "</tool_call>", "<think>", "</think>")
    config = ServerConfig(tool_call_parser="hermes", reasoning_parser="qwen3")
    text = f"<think>\nHm.\n</think>\n\nSo.\n{CALL}"
    choice, _ = await answer(tokenizer, text, config, tools=[NOW])
    message = choice["message"]
    assert (message["reasoning_content"], message["content"], choice["finish_reason"]) == ("Hm.", "So.", "tool_calls")
    (call,) = message["tool_calls"]
    assert call["function"] == {"name": "now", "arguments": "{}"}
    broken, _ = await answer(tokenizer, "So <tool_call>{no call}</tool_call>.", config, tools=[NOW])
    assert broken["message"]["content"] == "So {no call}."
    shown, _ = await answer(tokenizer, "So <tool_call>{no call}</tool_call>.", config, tools=[NOW], skip_special_tokens=False)
    assert shown["message"]["content"] == "So <tool_call>{no call}</tool_call>."
    without_tools, _ = await answer(tokenizer, "So <tool_call>.", config)
    assert without_tools["message"]["content"] == "So ."


async def test_thoughts_that_stay_in_the_content_keep_their_markers() -> None:
    tokenizer = MarkingTokenizer("<think>", "</think>")
    text = "<think>\nHm.\n</think>\n\nSo."
    for tools in ({}, {"tools": [NOW]}):
        choice, _ = await answer(tokenizer, text, ServerConfig(reasoning_parser="qwen3"), separate_reasoning=False, **tools)
        assert choice["message"]["content"] == text


async def test_a_grammar_names_control_tokens_by_their_ids() -> None:
    tokenizer = MarkingTokenizer("<tool_call>", "</tool_call>")
    _, engine = await answer(tokenizer, CALL, ServerConfig(tool_call_parser="hermes"), tools=[NOW], tool_choice="required")
    guidance = engine.requests[0].guidance
    assert guidance is not None and guidance.grammar is not None
    begin, end = tokenizer.ids_of("<tool_call></tool_call>")
    assert f"<[{begin}]>" in guidance.grammar and f"<[{end}]>" in guidance.grammar


async def test_channels_are_read_with_or_without_tools() -> None:
    tokenizer = MarkingTokenizer(*HARMONY)
    config = ServerConfig(reasoning_parser="gpt-oss")
    thought = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    choice, engine = await answer(tokenizer, f"{thought}<|channel|>final<|message|>So.", config)
    message = choice["message"]
    assert (message["reasoning_content"], message["content"], choice["finish_reason"]) == ("Hm.", "So.", "stop")
    guidance = engine.requests[0].guidance
    assert guidance is not None and guidance.thought is not None and guidance.thought.end == b"<|end|>"
    kept, _ = await answer(tokenizer, f"{thought}<|channel|>final<|message|>So.", config, separate_reasoning=False)
    assert "Hm." in kept["message"]["content"] and "reasoning_content" not in kept["message"]
    made = '<|channel|>commentary to=functions.now <|constrain|>json<|message|>{"a": 1}<|call|>'
    called, _ = await answer(tokenizer, thought + made, config, stop=True, tools=[NOW])
    assert called["finish_reason"] == "tool_calls"  # the token that ends the call ends the answer, too
    assert called["message"]["tool_calls"][0]["function"] == {"name": "now", "arguments": '{"a": 1}'}
    _, constrained = await answer(tokenizer, "<|channel|>final<|message|>7", config, json_schema={"const": 7})
    grammar = constrained.requests[0].guidance
    assert grammar is not None and '"const":7' in str(grammar.grammar)


def test_formats_that_do_not_fit_the_model_stop_the_start() -> None:
    text = byte_text_model()
    shows = TextModel(text.tokenizer, ChatTemplate(SHOWS_TOOLS))
    for given, config, word in (
        (text, ServerConfig(tool_call_parser="nope"), "nope"),
        (text, ServerConfig(tool_call_parser="mistral"), "mistral"),  # its template shows no tools
        (text, ServerConfig(reasoning_parser="nope"), "nope"),
        (shows, ServerConfig(tool_call_parser="gpt_oss"), "--reasoning-parser"),
        (shows, ServerConfig(tool_call_parser="hermes", reasoning_parser="gpt-oss"), "hermes"),
    ):
        with pytest.raises(ConfigError, match=word):
            create_app(ScriptedEngine(), given, config, model_name="tiny")
    create_app(ScriptedEngine(), shows, ServerConfig(tool_call_parser="mistral", reasoning_parser="[a],[b]"), model_name="tiny")
