"""Sounds in chats: a template shows them by parts of type "audio"; all else is as for pictures (test_pictures.py)."""

from pathlib import Path

import pytest

from streamserve.messages import Layout, Run
from streamserve.text.template import ChatTemplate
from tests.text.test_pictures import TEXTS, model, shown, user
from tests.text.toys import byte_level_folder

# As transformers' processor for Qwen2-Audio has it: sounds are counted, each has a line of its own.
COUNTED = (
    "{% set count = namespace(value=0) %}{% for m in messages %}[{{ m.role }}:{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for p in m.content %}{% if p.type == 'audio' %}{% set count.value = count.value + 1 %}"
    "Audio {{ count.value }}: <|start|><|stop|><|end|>\n{% elif 'text' in p %}{{ p.text }}{% endif %}{% endfor %}{% endif %}]"
    "{% endfor %}"
)
MARKER, TOKEN = "<|start|><|stop|><|end|>", "<|stop|>"
AUDIO = {"type": "audio"}


def layout(num_places: int) -> Layout:
    return Layout(f"<|start|>{TOKEN * num_places}<|end|>", (Run(num_places),))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return byte_level_folder(tmp_path_factory.mktemp("toy"))


def test_sounds_stand_where_the_template_shows_them(folder: Path) -> None:
    chat = [user(AUDIO, "what?"), {"role": "assistant", "content": "A dog."}, user(AUDIO, "and?")]
    sounds = (layout(2), layout(3))
    for template, expected in (
        (COUNTED, "[user:Audio 1: <|start|>11<|end|>\nwhat?][assistant:A dog.][user:Audio 2: <|start|>222<|end|>\nand?]"),
        (TEXTS, "[user:<|start|>11<|end|>\nwhat?][assistant:A dog.][user:<|start|>222<|end|>\nand?]"),
    ):
        text = model(folder, template)
        assert shown(text, text.encode_chat(chat, pictures=sounds, marker=MARKER, token=TOKEN)) == expected


def test_a_template_shows_pictures_or_sounds_by_its_marker() -> None:
    template = ChatTemplate(COUNTED)
    assert template.writes(MARKER) and not template.writes("<image>")
