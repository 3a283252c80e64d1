"""Request bodies as typed values, and the errors that say which field is wrong, what it was and what is allowed.

Owns field names, types and their documentation. Ranges of sampling parameters are SamplingParams' own. Knows nothing of
tokens or of the model.

null means "not given" for every optional field. Fields that others define and this server does not have are refused by name
(api/fields.py says why); so is everything unknown: a misspelt parameter is an error, not a default.
"""

import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import msgspec
import orjson
from msgspec import Struct

from streamserve.api.fields import REFUSED
from streamserve.errors import InvalidRequest
from streamserve.media.families import types_that_take
from streamserve.messages import AUDIO, IMAGE
from streamserve.messages import VIDEO as MOVING
from streamserve.text.stop_patterns import StopPatterns

MAX_CHOICES_PER_PROMPT = 128
MAX_STOPS = 32
MAX_STOP_CHARS = 1024
MAX_NAME_CHARS = 256
SHOWN_CHARS = 60

T = TypeVar("T", bound=Struct)


class StreamOptions(Struct, forbid_unknown_fields=True):
    """What a stream carries beside text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None  # without effect


class Formed(Struct, kw_only=True):
    """What an answer must match, at most one of them (api/forms.py), and how its JSON is spaced."""

    response_format: dict[str, Any] | None = None
    json_schema: dict[str, Any] | bool | str | None = None
    regex: str | None = None
    ebnf: str | None = None
    choice: list[str] | None = None
    guided_choice: list[str] | None = None
    json_whitespace: str | None = None


class Sampled(Formed, kw_only=True):
    """Fields that chat and text completions share."""

    model: str | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    n: int = 1
    stop: str | list[str] | None = None
    stop_regex: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    no_stop_trim: bool = False
    skip_special_tokens: bool = True
    stream: bool = False
    stream_options: StreamOptions | None = None
    resumable: bool = False  # a stream whose client may leave and come back: api/resume.py
    return_progress: bool = False  # of a prompt that takes several steps
    return_token_ids: bool = False
    return_timings: bool = False  # how long the answer's parts took, in llama.cpp's names
    return_draft_marks: bool = False  # which parts of the text were guessed, or forced by a grammar
    prompt_logprobs: int | None = None
    cache_salt: str = ""
    rid: str | None = None
    request_id: str | None = None
    priority: int = 0
    timeout: float | None = None  # seconds
    jump_forward: bool = True
    # Checked for their types, without effect here (api/fields.py):
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None


class FunctionDefinition(Struct, forbid_unknown_fields=True):
    """A function that the model may call. `parameters` is a JSON schema."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolDefinition(Struct, forbid_unknown_fields=True):
    """A tool. Only functions can be served; other kinds are named to be refused."""

    type: str = "function"
    function: FunctionDefinition | None = None
    custom: dict[str, Any] | None = None


class ToolFunction(Struct):
    """The function part of a call in the history."""

    name: str
    arguments: str | dict[str, Any] = ""


class ToolCall(Struct):
    """A call that an assistant made earlier in the conversation."""

    function: ToolFunction
    id: str | None = None
    type: str = "function"


class ImageUrl(Struct):
    """A picture: a data: URL, an https or http URL, or the id of an uploaded file."""

    url: str
    detail: str | None = None


class InputAudio(Struct):
    """A sound: a file in base64. What file it is its bytes say; `format` is checked, and nothing else."""

    data: str
    format: str


class AudioUrl(Struct):
    """A sound: a data: URL, an https or http URL, or the id of an uploaded file."""

    url: str


class Part(Struct):
    """One part of a message's content: text, or a picture or sound where the model takes some. Others are named to be refused.

    A picture is `image_url` (type image_url; of type input_image, too, then as a text) or `file_id` (type input_image); a video
    is `video_url` (type video_url), a sound `input_audio` or `audio_url` (each of that type).
    """

    type: str
    text: str | None = None
    refusal: str | None = None
    image_url: ImageUrl | str | None = None
    video_url: ImageUrl | str | None = None
    input_audio: InputAudio | None = None
    audio_url: AudioUrl | str | None = None
    file_id: str | None = None
    detail: str | None = None


class Message(Struct):
    """One turn. Fields that are not here are passed over with a warning (unread_in): clients send answers back as they came.

    `reasoning_content`, or `reasoning`, is the thought of an assistant's answer; the chat template decides whether the model sees
    it again. `refusal` is what an assistant said instead of its content. `function_call` is the older form of tool_calls. `audio`
    is named to be refused.
    """

    role: str
    content: str | list[Part] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None
    function_call: ToolFunction | None = None
    audio: dict[str, Any] | None = None


class Prediction(Struct, forbid_unknown_fields=True):
    """What the client expects much of the answer to be: OpenAI's Predicted Outputs."""

    content: str | list[Part]
    type: str = "content"


class ChatRequest(Sampled, kw_only=True):
    """Body of POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, str | int | float | bool | None] | None = None
    allow_control_tokens: bool = False
    tools: list[ToolDefinition] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    functions: list[FunctionDefinition] | None = None
    function_call: str | dict[str, Any] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    separate_reasoning: bool = True
    stream_reasoning: bool = True
    max_thinking_tokens: int | None = None
    thinking_budget: int | None = None
    prediction: Prediction | None = None
    # Checked for their types, without effect here (api/fields.py):
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict[str, Any] | None = None


class CompletionRequest(Sampled, kw_only=True):
    """Body of POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    echo: bool = False
    logprobs: int | None = None
    best_of: int | None = None


class TokenizeRequest(Struct, kw_only=True):
    """Body of POST /tokenize: a prompt, or a conversation as the chat route would see it."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    tools: list[ToolDefinition] | None = None
    add_special_tokens: bool = True
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, str | int | float | bool | None] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    allow_control_tokens: bool = False


class DetokenizeRequest(Struct, kw_only=True):
    """Body of POST /detokenize."""

    tokens: list[int]
    model: str | None = None
    skip_special_tokens: bool = True


class ControlRequest(Struct, kw_only=True):
    """Body of POST /v1/chat/completions/control. `id` is the answer's, or the name its client gave it."""

    id: str
    action: str


class AbortRequest(Struct, kw_only=True):
    """Body of POST /abort: one of the two."""

    rid: str | None = None
    abort_all: bool = False


def load_object(body: bytes | str) -> dict[str, Any]:
    """The JSON object in `body`. Raises InvalidRequest naming the field whose value cannot be read, where there is one."""
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise _unreadable(body, error) from None
    if not isinstance(value, dict):
        raise InvalidRequest(f"the body is {show(value)}; a JSON object is expected", param="body")
    return value


def _unreadable(body: bytes | str, error: orjson.JSONDecodeError) -> InvalidRequest:
    reason, position = error.msg, error.pos
    if isinstance(body, bytes):
        try:
            before = body.decode()[:position]
        except UnicodeDecodeError as broken:
            reason, position = "it is not valid UTF-8", broken.start
            before = body[:position].decode()
    else:
        before = body[:position]
    # NaN, Infinity, 0x10 and half a string have no place in JSON, but the field they were meant for can still be named.
    field = re.search(r'"([^"\\]{1,64})"\s*:\s*(?:[-+.\w]*|"[^"]*)$', before[-4096:])
    place = f" in the value of {field[1]}" if field else ""
    return InvalidRequest(f"the body is not JSON: {reason} (at {position}{place})", param=field[1] if field else "body")


def convert(given: Mapping[str, Any], kind: type[T]) -> T:
    """`given` as a checked value of `kind`. Raises InvalidRequest naming the field."""
    names = kind.__struct_encode_fields__
    known: dict[str, Any] = {}
    for name, value in given.items():
        if name in names:
            if value is not None:
                known[name] = value
        elif name in REFUSED:
            if value is not None and value not in REFUSED[name].harmless:
                raise InvalidRequest(f"{name} is {show(value)}, which is not supported: {REFUSED[name].note}", param=name)
        else:
            raise InvalidRequest(_unknown(name, names), param=name[:MAX_NAME_CHARS])
    try:
        return msgspec.convert(known, kind)
    except msgspec.ValidationError as error:
        if "got `float`" in str(error):  # writers that know only one kind of number send 16.0, which JSON takes for an integer
            with suppress(msgspec.ValidationError):
                return msgspec.convert(_with_whole_numbers(known), kind)
        raise _invalid(given, str(error)) from None


def _with_whole_numbers(value: Any) -> Any:
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    if isinstance(value, dict):
        return {name: _with_whole_numbers(entry) for name, entry in value.items()}
    return [_with_whole_numbers(entry) for entry in value] if isinstance(value, list) else value


def _unknown(name: str, names: tuple[str, ...]) -> str:
    close = get_close_matches(name[:MAX_NAME_CHARS], names, n=1)
    return f"unknown field {show(name)}" + (f"; did you mean {close[0]!r}?" if close else "; leave it out")


def _invalid(given: Mapping[str, Any], message: str) -> InvalidRequest:
    missing = re.fullmatch(r"Object missing required field `(\w+)`(?: - at `\$(.*)`)?", message)
    if missing:
        param = f"{missing[2] or ''}.{missing[1]}".lstrip(".")
        return InvalidRequest(f"{param} is missing", param=param)
    unknown = re.fullmatch(r"Object contains unknown field `(.*)` - at `\$\.(.*)`", message, re.DOTALL)
    if unknown:
        param = f"{unknown[2]}.{unknown[1]}"[:MAX_NAME_CHARS]
        return InvalidRequest(f"unknown field {show(param)}; leave it out", param=param)
    reason, _, path = message.partition(" - at `$")
    param = path.rstrip("`").lstrip(".").replace("[...]", "")
    what = reason[:1].lower() + reason[1:].replace("`", "").replace(" | null", "")
    return InvalidRequest(f"{param} is {show(_at(given, param))}; {what}", param=param)


def _at(value: Any, path: str) -> Any:
    for name, index in re.findall(r"(\w+)|\[(\d+)\]", path):
        value = value[int(index)] if index else value[name]
    return value


def show(value: Any) -> str:
    """A value in an error message: as JSON, cut where it gets long."""
    if isinstance(value, str):
        value = value[: SHOWN_CHARS + 1]
    elif isinstance(value, (list, dict)) and len(value) > SHOWN_CHARS:
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)} entries"
    try:
        text = orjson.dumps(value).decode()
    except orjson.JSONEncodeError:  # nested deeper than the writer goes, though the reader went
        return "a deeply nested value"
    return text if len(text) <= SHOWN_CHARS else text[:SHOWN_CHARS] + "…"


def stops_of(given: str | list[str] | None, param: str = "stop") -> tuple[str, ...]:
    """The stop strings. Raises InvalidRequest."""
    stops = [given] if isinstance(given, str) else given or []
    if len(stops) > MAX_STOPS:
        raise InvalidRequest(f"{param} has {len(stops)} entries; at most {MAX_STOPS} are allowed", param=param)
    for stop in stops:
        if not 0 < len(stop) <= MAX_STOP_CHARS:
            raise InvalidRequest(f"{param} has an entry of {len(stop)} characters; allowed is 1 to {MAX_STOP_CHARS}", param=param)
    return tuple(stops)


def stop_patterns_of(given: str | list[str] | None, param: str = "stop_regex") -> StopPatterns | None:
    """The stop patterns, compiled. Raises InvalidRequest."""
    patterns = [given] if isinstance(given, str) else given or []
    if len(patterns) > MAX_STOPS:
        raise InvalidRequest(f"{param} has {len(patterns)} entries; at most {MAX_STOPS} are allowed", param=param)
    return _compiled(tuple(patterns), param) if patterns else None


@lru_cache(maxsize=32)
def _compiled(patterns: tuple[str, ...], param: str) -> StopPatterns:
    """A list of prompts has the same for each."""
    return StopPatterns(patterns, param)


def check_range(name: str, value: int | None, low: int, high: int) -> None:
    """Raises InvalidRequest when a number that was given is out of range."""
    if value is not None and not low <= value <= high:
        raise InvalidRequest(f"{name} is {value}; allowed is {low} to {high}", param=name)


def client_id_of(request: Sampled) -> str | None:
    """The name the client gave the request: `rid` (SGLang) or `request_id` (vLLM)."""
    if None not in (request.rid, request.request_id) and request.rid != request.request_id:
        raise InvalidRequest("rid and request_id are both given, and differ; they say the same", param="request_id")
    for name, value in (("rid", request.rid), ("request_id", request.request_id)):
        if value is not None:
            if not 0 < len(value) <= MAX_NAME_CHARS:
                raise InvalidRequest(f"{name} has {len(value)} characters; allowed is 1 to {MAX_NAME_CHARS}", param=name)
            return value
    return None


ROLES = ("system", "developer", "user", "assistant", "tool", "function")
PICTURED_ROLES = ("user", "tool", "function")  # whose messages may show pictures
_ROLE_OF = {"developer": "system", "function": "tool"}  # newer and older names for the same things
VIDEO = "video_url"
PICTURES = ("image_url", "input_image", VIDEO)  # a video is shown as a picture is
SOUNDS = ("input_audio", "audio_url")
SOUND_FORMATS = ("wav", "mp3", "flac", "ogg", "opus", "webm", "m4a", "mp4", "aac")
NEITHER = ("file", "input_file")  # parts that are neither text nor picture nor sound
DETAILS = ("auto", "low", "high", "original")


class PartName(NamedTuple):
    """What a part that shows a picture is called in the request's own dialect, its type there, and the field of it that holds the
    picture; None: as in a chat."""

    part: str
    kind: str | None = None
    source: str | None = None


@dataclass(frozen=True, slots=True)
class PictureRef:
    """A picture (or video, or sound, as `kind` says) that a request shows: a URL or the id of a file, and the field it stands
    in."""

    source: str
    param: str
    kind: str = IMAGE


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as templates take them, and the pictures or sounds that their content parts of type "image" or "audio" stand for,
    in order. `warnings`: what is said of the pictures and has no effect."""

    messages: list[dict[str, Any]]
    pictures: list[PictureRef] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def messages_of(messages: list[Message], *, takes: Collection[str], names: Mapping[str, PartName] | None = None) -> Conversation:
    """A conversation as templates take it. `takes`: kinds of media that the model takes. `names`: parts that another dialect
    calls otherwise, by their paths here. Raises InvalidRequest naming the message that cannot be."""
    if not messages:
        raise InvalidRequest("messages is []; at least one message is needed", param="messages")
    reader = _ContentReader(takes, names or {}, Conversation([]))
    reader.into.messages.extend([_message(message, f"messages[{index}]", reader) for index, message in enumerate(messages)])
    return reader.into


def _message(message: Message, path: str, reader: "_ContentReader") -> dict[str, Any]:
    if message.role not in ROLES:
        raise InvalidRequest(f"{path}.role is {show(message.role)}; allowed is {', '.join(ROLES)}", param=f"{path}.role")
    if message.content is None and message.role != "assistant":
        raise InvalidRequest(f"{path}.content is missing; only an assistant's may be", param=f"{path}.content")
    if message.audio is not None:
        raise InvalidRequest(f"{path}.audio is given; this model takes no sound", param=f"{path}.audio")
    for index, call in enumerate(message.tool_calls or ()):
        if call.type != "function":
            place = f"{path}.tool_calls[{index}].type"
            raise InvalidRequest(f"{place} is {show(call.type)}; only functions can be called here", param=place)
    turn: dict[str, Any] = {
        "role": _ROLE_OF.get(message.role, message.role),
        "content": reader.content(message.content, f"{path}.content", message.role),
    }
    if message.refusal:
        assert isinstance(turn["content"], str), "messages of assistants show no pictures"
        turn["content"] = f"{turn['content']}\n{message.refusal}" if turn["content"] else message.refusal
    if message.name is not None:
        turn["name"] = message.name
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    thought = message.reasoning if message.reasoning_content is None else message.reasoning_content
    if thought is not None:
        turn["reasoning_content"] = thought
    if message.tool_calls:
        turn["tool_calls"] = msgspec.to_builtins(message.tool_calls)
    elif message.function_call is not None:
        turn["tool_calls"] = [{"type": "function", "function": msgspec.to_builtins(message.function_call)}]
    return turn


@dataclass(frozen=True, slots=True)
class _ContentReader:
    """Reads contents, and collects the pictures and sounds in them."""

    takes: Collection[str]
    names: Mapping[str, PartName]
    into: Conversation

    def content(self, content: str | list[Part] | None, path: str, role: str) -> str | list[dict[str, Any]]:
        """A text; or texts, pictures and sounds as parts, where it is not all text. Neighbouring texts are joined by newlines."""
        if content is None or isinstance(content, str):
            return content or ""
        if not any(part.type in PICTURES or part.type in SOUNDS for part in content):
            return _text(content, path)
        parts: list[dict[str, Any]] = []
        for index, part in enumerate(content):
            where = f"{path}[{index}]"
            if part.type in PICTURES:
                self.into.pictures.append(self._picture(part, where, role))
                parts.append({"type": "image"})
                continue
            if part.type in SOUNDS:
                self.into.pictures.append(self._sound(part, where, role))
                parts.append({"type": "audio"})
                continue
            text = _part_text(part, where)
            if parts and "text" in parts[-1]:
                text = f"{parts.pop()['text']}\n{text}"
            parts.append({"type": "text", "text": text})
        return parts

    def _picture(self, part: Part, where: str, role: str) -> PictureRef:
        name = self.names.get(where, PartName(where))
        if IMAGE not in self.takes:
            raise no_pictures(f"{name.part}.type is {name.kind or part.type}", f"{name.part}.type")
        if part.type == VIDEO and MOVING not in self.takes:
            raise InvalidRequest(
                f"{name.part}.type is {VIDEO}; this model takes pictures, but no videos", param=f"{name.part}.type"
            )
        if role not in PICTURED_ROLES:
            raise InvalidRequest(
                f"{name.part}.type is {name.kind or part.type}; only messages of users and results of tools may show "
                f"pictures, and this one's role is {role}",
                param=f"{name.part}.type",
            )
        source, field, detail = _source_of(part, name)
        if detail is not None and detail not in DETAILS:
            place = field.removesuffix("url") + "detail" if field.endswith(".url") else f"{name.part}.detail"
            raise InvalidRequest(f"{place} is {show(detail)}; allowed is {', '.join(DETAILS)}", param=place)
        warning = "detail of pictures has no effect: a picture is always shown to the model as its own settings say"
        if detail not in (None, "auto") and warning not in self.into.warnings:
            self.into.warnings.append(warning)
        return PictureRef(source, name.source or field)

    def _sound(self, part: Part, where: str, role: str) -> PictureRef:
        what, place = f"{where}.type is {part.type}", f"{where}.type"
        if AUDIO not in self.takes:
            raise InvalidRequest(
                f"{what}; this model takes no sounds; those of type {', '.join(types_that_take(AUDIO))} do (--model-path)",
                param=place,
            )
        if role not in PICTURED_ROLES:
            raise InvalidRequest(
                f"{what}; only messages of users and results of tools may have sounds, not {role}'s", param=place
            )
        for other in ("text", "input_audio", "audio_url", "image_url", "file_id", VIDEO):
            if getattr(part, other) is not None and other != part.type:
                raise InvalidRequest(f"{where}.{other} is given; a part of type {part.type} has none", param=f"{where}.{other}")
        given = part.input_audio if part.type == "input_audio" else part.audio_url
        if given is None:
            raise InvalidRequest(f"{where}.{part.type} is missing", param=f"{where}.{part.type}")
        if isinstance(given, InputAudio):
            if given.format not in SOUND_FORMATS:
                place = f"{where}.input_audio.format"
                raise InvalidRequest(f"{place} is {show(given.format)}; allowed is {', '.join(SOUND_FORMATS)}", param=place)
            return PictureRef(f"data:audio/{given.format};base64,{given.data}", f"{where}.input_audio.data", AUDIO)
        if isinstance(given, AudioUrl):
            return PictureRef(given.url, f"{where}.audio_url.url", AUDIO)
        return PictureRef(given, f"{where}.audio_url", AUDIO)


def _source_of(part: Part, name: PartName) -> tuple[str, str, str | None]:
    """Where a picture or video is, the field that says so, and the detail it is wanted in."""
    url, file_id, kind = part.image_url, part.file_id, "image_url"
    if part.type == VIDEO:
        url, file_id, kind = part.video_url, None, VIDEO
    fields = (VIDEO,) if part.type == VIDEO else ("image_url", "file_id")
    for other in ("image_url", "file_id", VIDEO, *SOUNDS):
        if getattr(part, other) is not None and other not in fields:
            place = f"{name.part}.{other}"
            raise InvalidRequest(f"{place} is given; a part of type {name.kind or part.type} has none", param=place)
    if part.type == "image_url" and file_id is not None:
        place = f"{name.part}.file_id"
        raise InvalidRequest(f"{place} is for parts of type input_image; here the id's place is image_url.url", param=place)
    if url is not None and file_id is not None:
        raise InvalidRequest(
            f"{name.part} has both image_url and file_id; a part shows one picture", param=f"{name.part}.file_id"
        )
    if isinstance(url, ImageUrl):
        return url.url, f"{name.part}.{kind}.url", url.detail if part.detail is None else part.detail
    if url is not None:
        return url, f"{name.part}.{kind}", part.detail
    if file_id is not None:
        return file_id, f"{name.part}.file_id", part.detail
    raise InvalidRequest(f"{name.part}.{kind} is missing", param=f"{name.part}.{kind}")


def no_pictures(what: str, param: str) -> InvalidRequest:
    """The refusal of a picture that the model cannot see; `what` says where there is one."""
    others = f"; those of type {', '.join(kinds)} do (--model-path)" if (kinds := types_that_take(IMAGE)) else ""
    return InvalidRequest(f"{what}; this model takes no pictures{others}", param=param)


def _text(content: str | list[Part] | None, path: str) -> str:
    """A content that may hold texts only."""
    if content is None or isinstance(content, str):
        return content or ""
    return "\n".join([_part_text(part, f"{path}[{index}]") for index, part in enumerate(content)])


def _part_text(part: Part, where: str) -> str:
    if part.type in PICTURES or part.type in SOUNDS:
        raise InvalidRequest(f"{where}.type is {part.type}; allowed is text", param=f"{where}.type")
    if part.type in NEITHER:
        raise InvalidRequest(f"{where}.type is {part.type}; allowed are text, pictures and sounds", param=f"{where}.type")
    if part.type == "refusal" and part.refusal is not None:
        return part.refusal
    if part.type != "text":
        allowed = ", ".join(("text", *PICTURES, *SOUNDS))
        raise InvalidRequest(f"{where}.type is {show(part.type)}; allowed is {allowed}", param=f"{where}.type")
    if part.text is None:
        raise InvalidRequest(f"{where}.text is missing", param=f"{where}.text")
    return part.text


def prediction_of(prediction: Prediction) -> str:
    """The text of a prediction. Raises InvalidRequest."""
    if prediction.type != "content":
        raise InvalidRequest(f'prediction.type is {show(prediction.type)}; allowed is "content"', param="prediction.type")
    return _text(prediction.content, "prediction.content")


# Fields of messages that say something, and those that come back with answers (the openai client's parse() adds some).
_READ_OF_MESSAGE = frozenset((*Message.__struct_fields__, "annotations", "parsed"))
_READ_OF_PART = frozenset(Part.__struct_fields__)
_READ_OF_URL = {
    "image_url": frozenset(ImageUrl.__struct_fields__),
    "video_url": frozenset(ImageUrl.__struct_fields__),
    "audio_url": frozenset(AudioUrl.__struct_fields__),
    "input_audio": frozenset(InputAudio.__struct_fields__),
}
_READ_OF_CALL = frozenset((*ToolCall.__struct_fields__, "index"))
_READ_OF_FUNCTION = frozenset((*ToolFunction.__struct_fields__, "parsed_arguments"))
_MAX_UNREAD = 8
_NOTHING: tuple[Any, ...] = (None, "", False, [], {})


def unread_in(messages: list[dict[str, Any]], prediction: dict[str, Any] | None = None) -> tuple[str, ...]:
    """A sentence for each field of a checked conversation that nothing reads, about the first place where it stands; and of a
    checked prediction."""
    found: dict[str, str] = {}
    for index, message in enumerate(messages):
        note_unread(message, _READ_OF_MESSAGE, found, f"messages[{index}]")
        _note_parts(message.get("content"), found, f"messages[{index}].content")
        for at, call in enumerate(message.get("tool_calls") or ()):
            note_unread(call, _READ_OF_CALL, found, f"messages[{index}].tool_calls[{at}]")
            note_unread(call["function"], _READ_OF_FUNCTION, found, f"messages[{index}].tool_calls[{at}].function")
    _note_parts((prediction or {}).get("content"), found, "prediction.content")
    return tuple(found.values())


def _note_parts(content: Any, found: dict[str, str], path: str) -> None:
    for at, part in enumerate(content if isinstance(content, list) else ()):
        note_unread(part, _READ_OF_PART, found, f"{path}[{at}]")
        for name, read in _READ_OF_URL.items():
            if isinstance(url := part.get(name), dict):
                note_unread(url, read, found, f"{path}[{at}].{name}")


def note_unread(given: Mapping[str, Any], read: frozenset[str], found: dict[str, str], path: str) -> None:
    """Add a sentence to `found`, by field, for each field of `given` that is not among those that are read."""
    if given.keys() <= read:
        return
    for name, value in given.items():
        if name not in read and name not in found and value not in _NOTHING and len(found) < _MAX_UNREAD:
            found[name] = f"{path}.{name[:64]} has no effect: nothing here reads it"
