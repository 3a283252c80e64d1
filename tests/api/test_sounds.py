"""Sounds in chats for models that do not hear, or hear and do not see: refused by name, before anything is read. What one that
hears makes of them is in tests/models/vision/test_qwen2_audio_served.py."""

from typing import Any

import msgspec
import pytest

from streamserve.api.schema import Conversation, Message, messages_of
from streamserve.errors import InvalidRequest
from streamserve.messages import AUDIO, IMAGE, VIDEO

SOUND = {"type": "input_audio", "input_audio": {"data": "UklGRg==", "format": "wav"}}
BY_URL = {"type": "audio_url", "audio_url": {"url": "https://example.com/a.mp3"}}
PICTURE = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}


def read(*parts: dict[str, Any], takes: set[str], role: str = "user") -> Conversation:
    return messages_of(msgspec.convert([{"role": role, "content": list(parts)}], list[Message]), takes=takes)


def refusal(*parts: dict[str, Any], takes: set[str], role: str = "user") -> tuple[str, str | None]:
    with pytest.raises(InvalidRequest) as refused:
        read(*parts, takes=takes, role=role)
    return str(refused.value), refused.value.param


@pytest.mark.parametrize("takes", [set(), {IMAGE}, {IMAGE, VIDEO}])
@pytest.mark.parametrize("part", [SOUND, BY_URL])
def test_a_model_that_does_not_hear_refuses_sounds_and_names_who_does(part: dict[str, Any], takes: set[str]) -> None:
    message, param = refusal(part, takes=takes)
    assert message == f"{param} is {part['type']}; this model takes no sounds; those of type qwen2_audio do (--model-path)"
    assert param == "messages[0].content[0].type"


def test_a_model_that_only_hears_refuses_pictures() -> None:
    message, param = refusal(SOUND, PICTURE, takes={AUDIO})
    assert param == "messages[0].content[1].type" and "this model takes no pictures; those of type" in message
    assert "qwen2_vl" in message and "qwen2_audio" not in message


def test_sounds_keep_their_places_among_texts() -> None:
    found = read({"type": "text", "text": "a"}, SOUND, {"type": "text", "text": "b"}, BY_URL, takes={AUDIO})
    assert [part["type"] for part in found.messages[0]["content"]] == ["text", "audio", "text", "audio"]
    assert [(one.source, one.param, one.kind) for one in found.pictures] == [
        ("data:audio/wav;base64,UklGRg==", "messages[0].content[1].input_audio.data", AUDIO),
        ("https://example.com/a.mp3", "messages[0].content[3].audio_url.url", AUDIO),
    ]
    short = read({"type": "audio_url", "audio_url": "file-1"}, takes={AUDIO}).pictures[0]
    assert (short.source, short.param) == ("file-1", "messages[0].content[0].audio_url")


def test_parts_that_contradict_themselves_are_refused() -> None:
    place = "messages[0].content[0]"
    for part, param in (
        ({**SOUND, **PICTURE, "type": "input_audio"}, "image_url"),
        ({**PICTURE, "input_audio": SOUND["input_audio"]}, "input_audio"),
        ({**BY_URL, "input_audio": SOUND["input_audio"]}, "input_audio"),
        ({**SOUND, "file_id": "file-1"}, "file_id"),
    ):
        message, named = refusal(part, takes={AUDIO, IMAGE})
        assert named == f"{place}.{param}" and message.startswith(f"{named} is given; a part of type {part['type']} has none")


def test_only_users_and_tools_have_sounds() -> None:
    message, param = refusal(SOUND, takes={AUDIO}, role="assistant")
    assert param == "messages[0].content[0].type" and "not assistant's" in message
    assert len(read(SOUND, takes={AUDIO}, role="tool").pictures) == 1
