"""Chat messages to one text (chat templates), and to ids without letting messages forge control tokens.

Owns the template environment and the form in which templates see messages. Knows nothing of HTTP or the engine.

The environment offers what transformers offers to templates; transformers' own renderer is not used because importing it
takes 0.8 s.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from itertools import islice, product
from typing import Any, NoReturn

import jinja2
from jinja2 import meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from streamserve.errors import CheckpointError, InvalidRequest
from streamserve.messages import Layout
from streamserve.text.answers import Answers
from streamserve.text.pictures import (
    PICTURES,
    Slots,
    check_shown,
    filled,
    is_picture,
    lettered,
    num_pictures,
    seamed,
    slots,
    token_id_of,
)
from streamserve.text.tokenizer import Tokenizer

Message = Mapping[str, Any]

# What a template may raise on messages that it was not written for.
_TEMPLATE_FAULTS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
_OWN_VARIABLES = frozenset(("messages", "tools", "add_generation_prompt", "continue_final_message"))
_PRIVATE_USE = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE), range(0xE000, 0xF900))


@dataclass(frozen=True, slots=True)
class _CallForm:
    """How a template reads the calls of messages. Most want `arguments` as an object, though clients send a string of JSON; some
    the string; some show calls only of a message whose content is null; some take only ids of nine letters and digits."""

    has_text_arguments: bool = False
    has_null_content: bool = False
    has_short_ids: bool = False

    def apply(self, message: dict[str, Any]) -> None:
        """Put a message into that form."""
        if calls := message.get("tool_calls"):
            message["tool_calls"] = [self._call(call) for call in calls]
            if self.has_null_content and not message.get("content"):
                message["content"] = None
        if self.has_short_ids and message.get("role") == "tool":
            message["tool_call_id"] = _short_id(message.get("tool_call_id") or message.get("name"))

    def _call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments that are no JSON object, as of an answer that was cut short, stay as they are."""
        function = call.get("function")
        if not isinstance(function, Mapping):
            return dict(call)
        arguments = function.get("arguments")
        if self.has_text_arguments:
            if isinstance(arguments, Mapping):
                arguments = json.dumps(arguments, ensure_ascii=False)
        elif isinstance(arguments, str):
            arguments = _object(arguments)
        formed = {**call, "function": {**function, "arguments": arguments}}
        return {**formed, "id": _short_id(call.get("id") or function.get("name"))} if self.has_short_ids else formed


def _object(text: str) -> Any:
    try:
        loaded = json.loads(text or "{}")
    except ValueError:
        return text
    return loaded if isinstance(loaded, dict) else text


def _short_id(name: object) -> str:
    """An id as it is where it fits, else one that stands for it."""
    text = str(name)
    return text if re.fullmatch("[a-zA-Z0-9]{9}", text) else sha256(text.encode("utf-8", "replace")).hexdigest()[:9]


_CALL_FORMS = tuple(_CallForm(*form) for form in product((False, True), repeat=3))


# A tool, a call of it and its result, by whose names one sees what a template leaves out.
_PROBES = "".join(chr(_PRIVATE_USE[0][place]) for place in range(3))
_PROBE_TOOLS: tuple[Message, ...] = (
    {
        "type": "function",
        "function": {
            "name": _PROBES[0],
            "description": "probe",
            "parameters": {"type": "object", "properties": {"x": {"type": "string", "description": "probe"}}, "required": ["x"]},
        },
    },
)
_PROBE_SYSTEM: Message = {"role": "system", "content": _PROBES[0]}
_PROBE_CHAT: tuple[Message, ...] = (
    {"role": "user", "content": "probe"},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": "call_of_the_probe", "type": "function", "function": {"name": "probe", "arguments": {"x": _PROBES[1]}}},
        ],
    },
    {"role": "tool", "name": "probe", "tool_call_id": "call_of_the_probe", "content": _PROBES[2]},
)


class ChatTemplate:
    """A compiled chat template. CheckpointError when it does not compile. May be used from several threads at once.

    `tool_source` is the template to use when a request brings tools, where the model has one of its own for that. `source` is the
    text that tools go through, `plain_source` the other; `variables` are the names that a request may set in `kwargs`, as far as
    the template reads them.

    What of a conversation gets through is tried out: `takes_system` a system message; `renders_tools` the tools;
    `renders_calls` calls and their results beside tools, `renders_calls_alone` where a request brings no tools.
    """

    def __init__(self, source: str, *, special_tokens: Mapping[str, str] | None = None, tool_source: str | None = None) -> None:
        environment = _environment()
        self.plain_source = source
        self._special_tokens = dict(special_tokens or {})
        self._plain = _compile(environment, source)
        self._with_tools = self._plain if tool_source is None else _compile(environment, tool_source)
        self._takes_parts = self._wants_parts()
        self._writes: dict[tuple[str, bool], bool] = {}  # what was tried for a marker
        self.source = source if tool_source is None else tool_source
        read = meta.find_undeclared_variables(environment.parse(source)) | meta.find_undeclared_variables(
            environment.parse(self.source)
        )
        self.variables = frozenset(read - _OWN_VARIABLES - set(environment.globals) - set(self._special_tokens))
        self._call_form = _CALL_FORMS[0]
        self.takes_system = self._shows_all((_PROBE_SYSTEM, *_PROBE_CHAT[:1]), None, _PROBES[:1])
        self.renders_tools = self._shows_all(_PROBE_CHAT[:1], _PROBE_TOOLS, _PROBES[:1])
        self.renders_calls = False
        for form in _CALL_FORMS:
            self._call_form = form
            if self._shows_all(_PROBE_CHAT, _PROBE_TOOLS, _PROBES):
                self.renders_calls = True
                break
        else:
            self._call_form = _CALL_FORMS[0]
        self.renders_calls_alone = self.renders_calls and self._shows_all(_PROBE_CHAT, None, _PROBES[1:])

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt as text. InvalidRequest when the template refuses the messages.

        `continue_final_message` leaves the last message open for the model to go on with; no generation prompt is added
        then. `kwargs` are further variables of the template.
        """
        chat = self.normalise(messages)
        variables = self._variables(chat, tools, kwargs)
        if not continue_final_message:
            return self._render(variables, tools, add_generation_prompt)
        mark = next(free_letters((chat, tools, kwargs)))
        chat[-1] = _with_mark(chat[-1], mark + " ")
        return _cut_at_mark(self._render(variables, tools, False), mark)

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """The tokens that the template may write by their names, as bos_token."""
        return self._special_tokens

    def normalise(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Messages in the form that templates expect: see _content and _CallForm; null fields are left out."""
        chat = []
        for message in messages:
            known = {key: value for key, value in message.items() if value is not None}
            known["content"] = self._content(message.get("content"))
            self._call_form.apply(known)
            chat.append(known)
        return chat

    def writes(self, marker: str, *, in_results: bool = False) -> bool:
        """Whether the template writes this where a part of a user's content is a picture (or a sound: a marker stands for one of
        them); or of a tool's result."""
        known = self._writes.get((marker, in_results))
        if known is None:
            known = self._writes[marker, in_results] = any(self._writes_for(kind, marker, in_results) for kind in PICTURES)
        return known

    def _writes_for(self, kind: str, marker: str, in_results: bool) -> bool:
        content = [{"type": kind}, {"type": "text", "text": _PROBES[2]}]
        given = (
            [*_PROBE_CHAT[:2], {**_PROBE_CHAT[2], "content": content}] if in_results else [{"role": "user", "content": content}]
        )
        tools = _PROBE_TOOLS if in_results else None
        try:
            text = self._render(self._variables(self.normalise(given), tools, None), tools, True)
        except InvalidRequest:
            return False
        return _PROBES[2] in text and text.count(marker) == 1

    def _content(self, content: Any) -> Any:
        """A string, with text parts joined by newlines; a list of parts for templates that take nothing else, and where there is
        a picture."""
        if content is None:
            content = ""
        if isinstance(content, str):
            return [{"type": "text", "text": content}] if self._takes_parts else content
        if any(map(is_picture, content)):
            return [
                {"type": part["type"]} if is_picture(part) else {"type": "text", "text": _part_text(part)} for part in content
            ]
        texts = [_part_text(part) for part in content]
        return [{"type": "text", "text": text} for text in texts] if self._takes_parts else "\n".join(texts)

    def _variables(
        self, chat: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]] | None, kwargs: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        if reserved := sorted(_OWN_VARIABLES & set(kwargs or ())):
            raise InvalidRequest(
                f"chat_template_kwargs holds {', '.join(reserved)}; these are set by the request's own fields",
                param="chat_template_kwargs",
            )
        return {"documents": None, **self._special_tokens, **(kwargs or {}), "messages": chat, "tools": tools}

    def _render(self, variables: Mapping[str, Any], tools: Any, add_generation_prompt: bool) -> str:
        template = self._with_tools if tools else self._plain
        try:
            return template.render(variables, add_generation_prompt=add_generation_prompt)
        except _TEMPLATE_FAULTS as error:
            raise InvalidRequest(f"the model's chat template refuses these messages: {error}", param="messages") from error

    def _wants_parts(self) -> bool:
        """Whether a message's text gets through as a list of parts only."""
        probe = chr(_PRIVATE_USE[0][0])
        return not self._shows(probe, probe) and self._shows(probe, [{"type": "text", "text": probe}])

    def _shows_all(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, probes: str) -> bool:
        """Whether what these of _PROBES stand for gets into the prompt."""
        try:
            text = self._render(self._variables(self.normalise(messages), tools, None), tools, True)
        except InvalidRequest:
            return False
        return all(probe in text for probe in probes)

    def _shows(self, probe: str, content: Any) -> bool:
        variables = self._variables([{"role": "user", "content": content}], None, None)
        try:
            return probe in self._render(variables, None, False)
        except InvalidRequest:
            return False


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    answers: Answers | None = None,
    allow_control_tokens: bool = False,
    pictures: Sequence[Layout] = (),
    marker: str | None = None,
    token: str | None = None,
) -> list[int]:
    """Ids of a chat. The template writes control tokens; the same text inside messages, tools or kwargs stays plain text, unless
    `allow_control_tokens`.

    Such text is replaced by one private letter per control token before rendering and encoded on its own afterwards.
    Begin and end tokens are the template's business; none is added. An assistant's message that `answers` knows keeps the
    tokens it was generated with.

    `pictures` are what the content parts of type "image" or "audio" stand for, in order; where they are, the result has slots
    (see text/pictures.py). `marker` is what the template writes for such a part, if it knows of pictures, and `token` the text of
    the model's image token, if it has one: neither can be forged, whatever else is allowed.
    """
    assert num_pictures(messages) == len(pictures) and (marker is None or token is not None)
    reserved = tuple(filter(None, dict.fromkeys((marker, token))))
    is_marked = bool(pictures) and marker is not None and template.writes(marker)
    letters: list[str] = []
    seam = ""
    try:
        if is_marked:
            pattern = _any_of(reserved, tokenizer.control_pattern)
            messages, seam = seamed(messages, pattern, lambda: next(free_letters((messages, tools, kwargs))))
        elif pictures:
            letters = list(islice(free_letters((messages, tools, kwargs)), len(pictures)))
            messages = lettered(messages, letters)
        given = {"messages": template.normalise(messages), "tools": tools, "kwargs": kwargs}
        disguise = _Disguise(
            tokenizer, given, answers, hides_control_tokens=not allow_control_tokens, reserved=reserved, seam=seam
        )
        given = disguise.apply(given)
    except RecursionError as error:
        raise InvalidRequest("messages or tools are nested too deeply", param="messages") from error
    text = template.render(
        given["messages"],
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        tools=given["tools"],
        kwargs=given["kwargs"],
    )
    if not pictures:
        return disguise.encode(text)
    if is_marked:
        assert marker is not None
        text, order = filled(text, marker, pictures), list(range(len(pictures)))
    else:
        order = [letters.index(letter) for letter in re.findall(f"[{''.join(letters)}]", text)]
        check_shown(len(order) if len(set(order)) == len(order) else 0, pictures)
    if token is None:
        return disguise.encode(text, {letter: slots(place, pictures[place]) for place, letter in enumerate(letters)})
    for place, letter in enumerate(letters):
        text = text.replace(letter, pictures[place].text)
    given_out = Slots(token_id_of(tokenizer, token), pictures, order)
    ids = disguise.encode(text, take=given_out.take)
    assert given_out.is_spent, "a picture's text has its image token once for every place"
    return ids


class _Disguise:
    """Control tokens' texts found in a request, each with a letter that occurs nowhere in it. `reserved`: texts that are hidden
    though others may be control tokens, and whatever the tokenizer takes them for. `seam`: a letter that becomes nothing."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        given: Any,
        answers: Answers | None = None,
        *,
        hides_control_tokens: bool = True,
        reserved: tuple[str, ...] = (),
        seam: str = "",
    ) -> None:
        self._tokenizer = tokenizer
        control = tokenizer.control_pattern if hides_control_tokens else None
        self._pattern = _any_of(reserved, control) if reserved or control is None else control
        encoded = [tokenizer.encode(text, continues=True) for text in reserved]
        self._reserved_ids = frozenset(ids[0] for ids in encoded if len(ids) == 1)
        known = {text: ids for text in _answers(given["messages"]) if (ids := answers.get(text))} if answers is not None else {}
        strings = _strings(given) if hides_control_tokens or reserved else ()
        found = {text for string in strings for text in self._pattern.findall(string)}
        letters = free_letters(given) if found or known else iter(())
        self._letter_of = {text: next(letters) for text in sorted(found)}
        self._answer_letter = {text: next(letters) for text in sorted(known)}
        self._answer_ids = {self._answer_letter[text]: list(ids) for text, ids in known.items()}
        self._seam = seam

    def apply(self, given: Any) -> Any:
        """The same value with every control token's text replaced by its letter."""
        if self._answer_letter:
            given = {**given, "messages": [self._hide_answer(message) for message in given["messages"]]}
        return _map_strings(given, self._hide) if self._letter_of else given

    def _hide_answer(self, message: Any) -> Any:
        letter = self._answer_letter.get(_answer_of(message) or "")
        if letter is None:
            return message
        is_text = isinstance(message["content"], str)
        return {**message, "content": letter if is_text else [{**message["content"][0], "text": letter}]}

    def encode(
        self, text: str, more: Mapping[str, list[int]] | None = None, take: Callable[[Sequence[int]], list[int]] = list
    ) -> list[int]:
        """Ids of a rendered text in which letters stand for plain text; `more`: letters and what stands in their places. `take`
        gets the ids of all that is not in place of a letter, in order, and says what becomes of them."""
        plain = {letter: self._encode_plain(marker) for marker, letter in self._letter_of.items()} | self._answer_ids
        plain |= more or {}
        if self._seam:
            plain[self._seam] = []
        if not plain:
            return take(self._tokenizer.encode(text, add_special_tokens=False))
        first, *rest = re.split(f"([{''.join(plain)}])", text)
        ids = take(self._tokenizer.encode(first, add_special_tokens=False))
        for piece in filter(None, rest):
            ids += plain[piece] if piece in plain else take(self._tokenizer.encode(piece, continues=True))
        return ids

    def _encode_plain(self, marker: str) -> list[int]:
        ids = self._tokenizer.encode(marker, allow_special=False, continues=True)
        # Some vocabularies hold control tokens as ordinary words too; and a model's image token need not be a control token.
        if any(self._tokenizer.is_special(id) or id in self._reserved_ids for id in ids):
            apart = (self._tokenizer.encode(letter, allow_special=False, continues=True) for letter in marker)
            return [id for letter_ids in apart for id in letter_ids]
        return ids

    def _hide(self, text: str) -> str:
        return self._pattern.sub(lambda match: self._letter_of[match[0]], text)


def _any_of(texts: Sequence[str], more: re.Pattern[str] | None = None) -> re.Pattern[str]:
    """Matches any of the texts, the longest where several begin, else what `more` matches."""
    patterns = [re.escape(text) for text in sorted(texts, key=len, reverse=True)]
    return re.compile("|".join([*patterns, *([more.pattern] if more is not None else [])]) or r"(?!)")


def _answer_of(message: Any) -> str | None:
    """The text of an assistant's message, in either form that templates take; None for others."""
    if not isinstance(message, Mapping) or message.get("role") != "assistant":
        return None
    content = message.get("content")
    if isinstance(content, list) and len(content) == 1:
        content = content[0].get("text")
    return content if isinstance(content, str) else None


def _answers(messages: Any) -> Iterator[str]:
    yield from (answer for message in messages if (answer := _answer_of(message)))


def _strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)


def _map_strings(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {_map_strings(key, change): _map_strings(item, change) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_map_strings(item, change) for item in value]
    return value


def free_letters(given: Any) -> Iterator[str]:
    """Letters of Unicode's private use areas that occur nowhere in a JSON value."""
    taken = {ord(letter) for letter in set().union(*map(set, _strings(given))) if letter >= "\ue000"}
    yield from (chr(code) for area in _PRIVATE_USE for code in area if code not in taken)
    raise InvalidRequest("the messages hold every private-use character of Unicode; leave some out", param="messages")


def _part_text(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind != "text" or not isinstance(part.get("text"), str):
        raise InvalidRequest(
            f'a content part is of type {kind!r}; this model reads text: {{"type": "text", "text": "..."}}', param="messages"
        )
    text: str = part["text"]
    return text


def _with_mark(message: dict[str, Any], mark: str) -> dict[str, Any]:
    content = message["content"] or ""
    if isinstance(content, str):
        return {**message, "content": content + mark}
    *before, last = content
    return {**message, "content": [*before, {**last, "text": last["text"] + mark}]}


def _cut_at_mark(text: str, mark: str) -> str:
    """The text up to the mark. A template that trimmed the space behind the mark would have trimmed the message's own."""
    at = text.rfind(mark)
    if at < 0:
        raise InvalidRequest(
            "the chat template leaves out the text of the last message, so it cannot be continued", param="continue_final_message"
        )
    return text[:at] if text[at + 1 : at + 2] == " " else text[:at].rstrip()


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks answers for training; here the body is rendered as if they were absent."""

    tags = {"generation"}  # noqa: RUF012 (jinja2 declares it as an instance variable)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation])
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _compile(environment: ImmutableSandboxedEnvironment, source: str) -> jinja2.Template:
    try:
        return environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(f"line {error.lineno} of the chat template does not compile: {error.message}") from error


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """jinja2's own filter escapes HTML, which models have not seen."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
