"""Where messages stand among a prompt's tokens: exactly, or nothing is said."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from streamserve.messages import MEDIA_BASE, Layout, Run
from streamserve.text.byte_tokenizer import byte_text_model
from streamserve.text.message_ranges import Placing, Range, Tools, message_ranges
from streamserve.text.model import TextModel, load_text_model
from streamserve.text.template import ChatTemplate, Message
from tests.text.toys import sentencepiece_gguf

PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{{ '>' if add_generation_prompt }}"
)
CHAT: list[Message] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "  Hello <|im_end|> there, 🦙!  \n"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Hello"},
]


def as_they_are(messages: Sequence[Message], tools: Tools) -> tuple[Sequence[Message], Tools]:
    return messages, tools


def found(text: TextModel, chat: Sequence[Message], **options: Any) -> tuple[list[int], list[Range | None] | None]:
    ids = text.encode_chat(chat, **options)
    assert text.template is not None
    return ids, message_ranges(text.tokenizer, text.template, chat, ids, fit=as_they_are, **options)


def with_template(source: str) -> TextModel:
    return TextModel(byte_text_model().tokenizer, ChatTemplate(source))


def texts(text: TextModel, ids: list[int], ranges: list[Range | None] | None) -> list[str | None]:
    assert ranges is not None
    return [None if one is None else text.tokenizer.decode(ids[one.start : one.end], skip_special_tokens=False) for one in ranges]


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize(
    "source", [PLAIN, PLAIN.replace("m.content", "m.content | trim"), PLAIN.replace("m.content", "m.content + ''")]
)
def test_a_range_is_the_messages_own_text_whatever_else_says_the_same(source: str, add_generation_prompt: bool) -> None:
    text = with_template(source)
    ids, ranges = found(text, CHAT, add_generation_prompt=add_generation_prompt)
    assert texts(text, ids, ranges) == [str(message["content"]).strip() for message in CHAT]
    assert ranges is not None and all(a.end < b.start for a, b in pairwise(ranges) if a and b)


def test_a_message_that_is_shown_twice_in_part_or_not_at_all_has_no_range() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}[{{ m.content }}]{% if loop.first %}({{ m.content }}){% endif %}"
        "{% elif m.role == 'assistant' %}{{ m.content.split('</think>')[-1] }}{% endif %}{% endfor %}"
    )
    text = with_template(source)
    chat = [CHAT[1], {"role": "assistant", "content": "<think>Hm</think>Yes"}, {"role": "system", "content": "x"}, CHAT[3]]
    ids, ranges = found(text, chat)
    assert texts(text, ids, ranges) == [None, None, None, "Hello"]


def test_nothing_is_said_where_the_template_looks_into_messages_and_the_letters_change_what_it_sees() -> None:
    text = with_template("{% for m in messages %}{{ 'A' if m.content.startswith('Hello') else 'B' }}{{ m.content }}{% endfor %}")
    assert found(text, CHAT)[1] is None
    strict = with_template(PLAIN + "{% if messages[0].content != 'Be brief.' %}{{ raise_exception('no') }}{% endif %}")
    assert found(strict, CHAT)[1] is None


def test_calls_are_a_messages_own_from_the_first_name_to_the_last_argument() -> None:
    source = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
        '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}{% endfor %}</m>{% endfor %}'
        "{{ tools | tojson if tools }}"
    )
    text = with_template(source)
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]

    def call(arguments: Any) -> dict[str, Any]:
        return {"id": "c", "type": "function", "function": {"name": "add", "arguments": arguments}}

    chat: list[Message] = [
        {"role": "user", "content": "add"},
        {"role": "assistant", "content": "", "tool_calls": [call('{"a": "x", "b": "y"}'), call('{"a": {"b": "z\\""}}')]},
        {"role": "tool", "tool_call_id": "c", "content": "3"},
        {"role": "assistant", "content": "So: ", "tool_calls": [call("{}")]},
        {"role": "assistant", "content": "", "tool_calls": [call({"a": 1})]},
    ]
    ids, ranges = found(text, chat, tools=tools)
    assert texts(text, ids, ranges) == [
        "add",
        'add", "arguments": {"a": "x", "b": "y"}}{"name": "add", "arguments": {"a": {"b": "z\\"',
        "3",
        'So: {"name": "add',
        "add",
    ]


@pytest.mark.parametrize(("marker", "token"), [(None, None), (None, "<|endoftext|>"), ("<img>", "<|endoftext|>")])
def test_pictures_stand_between_texts_and_move_nothing(marker: str | None, token: str | None) -> None:
    shown = "{% for p in m.content %}{{ p.text if p.type == 'text' else '<img>' }}{% endfor %}"
    text = with_template(PLAIN.replace("{{ m.content }}", shown))
    chat: list[Message] = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}, {"type": "image"}]},
        {"role": "user", "content": [{"type": "image"}]},
        {"role": "user", "content": [{"type": "text", "text": "And this?"}]},
    ]
    assert text.template is not None
    placing = Placing([Layout((token or "") * 3, (Run(3),))] * 3, marker, token)
    ids = text.encode_chat(chat, pictures=placing.pictures, marker=marker, token=token)
    placed = [MEDIA_BASE - id if id < 0 else id for id in ids]
    assert sum(id >= MEDIA_BASE for id in placed) == 9
    ranges = message_ranges(text.tokenizer, text.template, chat, placed, fit=as_they_are, placing=placing)
    assert texts(text, ids, ranges) == ["What is it?", None, "And this?"]


def test_a_space_that_sentencepiece_adds_is_no_text(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    sentencepiece_gguf(path, template="{% for m in messages %}{{ m.content }}</s>{% endfor %}")
    text = load_text_model(path)
    chat = [{"role": "user", "content": "hi"}, {"role": "user", "content": "hi hi"}]
    ids, ranges = found(text, chat)
    assert [part and part.strip() for part in texts(text, ids, ranges)] == ["hi", "hi hi"]


def test_tokens_that_a_message_shares_with_its_frame_are_its_own(smollm: TextModel) -> None:
    ids, ranges = found(smollm, CHAT)
    shown = texts(smollm, ids, ranges)
    for message, own in zip(CHAT, shown, strict=True):
        content = str(message["content"]).strip()
        assert own is not None and content in own and len(own) <= len(content) + 3


def test_other_tokens_than_the_chats_are_noticed() -> None:
    text = with_template(PLAIN)
    ids, _ = found(text, CHAT)
    assert text.template is not None
    for wrong in (ids[:-1], [*ids, 65], [66, *ids[1:]]):
        assert message_ranges(text.tokenizer, text.template, CHAT, wrong, fit=as_they_are) is None
