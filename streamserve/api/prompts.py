"""Texts, conversations, pictures and ids to checked prompts, and ids to texts.

Owns where tokenising runs: short texts on the loop, long ones in a worker thread; and which ids stand for a picture. Knows
nothing of HTTP, nor how pictures are loaded.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from anyio import CapacityLimiter, to_thread
from msgspec import Meta, ValidationError, convert, defstruct

from streamserve.api.schema import show
from streamserve.api.stream import Prompt
from streamserve.errors import ContextOverflow, InvalidRequest
from streamserve.media.family import Family, Prepared
from streamserve.messages import AUDIO, MEDIA_BASE, EngineFacts, Media, Span, media_token_ids
from streamserve.text.answers import Answers
from streamserve.text.message_ranges import Placing, Range, message_ranges
from streamserve.text.model import TextModel
from streamserve.text.pictures import token_id_of
from streamserve.text.toolless import explained, pictures_apart, spelt_out
from streamserve.text.tools.find import instructions
from streamserve.text.tools.format import Tool

INLINE_CHARS = 2000  # about a millisecond of tokenising: less than handing it to a thread and back can cost a busy loop
INLINE_TOKENS = 500
LONG_CHARS = 20_000  # longer than whatever is done on the loop
MIXED = "{} mixes texts, token ids and lists; allowed is a list of one kind"
SURE_BYTES_PER_TOKEN = 8  # texts under this many bytes per token of context are not suspicious


class Prompts:
    """Makes prompts of one model. `family`: how it takes pictures, if it does. Raises CheckpointError when its tokenizer knows
    nothing of them, though it should."""

    def __init__(self, text: TextModel, facts: Callable[[], EngineFacts], family: Family | None = None) -> None:
        self._marks: dict[str, str | None] = {}
        if family is not None:
            self._marks = {"marker": family.marker, "token": family.token}
            if family.token is not None:
                token_id_of(text.tokenizer, family.token)
        self._text = text
        self._facts = facts
        self._limiter = CapacityLimiter(max(1, (os.cpu_count() or 2) // 2))
        self._longest_token: int | None = None
        self._ids_type: Any = None  # what holds a tuple of this vocabulary's ids, as msgspec knows it
        self.answers = Answers(text.tokenizer)

    @property
    def image_marker(self) -> str | None:
        """What the chat template writes for a picture, if it writes something."""
        marker, template = self._marks.get("marker"), self._text.template
        return marker if marker is not None and template is not None and template.writes(marker) else None

    async def of_text(self, text: str, param: str, *, add_special_tokens: bool = True, is_long: bool = False) -> tuple[int, ...]:
        """Token ids of a text; the text of a special token becomes that token. `is_long`: one of many, long together."""

        def encode() -> list[int]:
            if add_special_tokens:
                return self._text.encode_prompt(text)
            return self._text.tokenizer.encode(text, add_special_tokens=False)

        return await self._encode(encode, [text], param, is_long=is_long or len(text) > INLINE_CHARS)

    async def of_prediction(self, text: str, param: str) -> tuple[int, ...]:
        """Token ids of a text as an answer would have them. Raises ContextOverflow for one that no answer can be."""

        def encode() -> list[int]:
            return self._text.tokenizer.encode(text, add_special_tokens=False, allow_special=False, continues=True)

        token_ids = await self._encode(encode, [text], param, is_long=len(text) > INLINE_CHARS)
        context_len = self._facts().context_len
        if len(token_ids) >= context_len:
            raise ContextOverflow(
                f"{param} has {len(token_ids)} tokens, but the context holds {context_len}; no answer is that long", param=param
            )
        return token_ids

    async def of_pictured_text(
        self, text: str, param: str, pictures: Sequence[Prepared], *, marker: str | None = None, add_special_tokens: bool = True
    ) -> Prompt:
        """A text with pictures, where it has the marker (the model's own, or one that is given), or in front of it."""

        def encode() -> list[int]:
            layouts = [picture.layout for picture in pictures]
            marks = self._marks if marker is None else {**self._marks, "marker": marker}
            try:
                return self._text.encode_pictured_prompt(text, layouts, **marks, add_special_tokens=add_special_tokens)
            except InvalidRequest as error:
                raise InvalidRequest(f"{param}: {error}", param=param) from None

        return _placed(await self._encode(encode, [text], param, is_long=True), pictures)

    async def of_chat(self, messages: list[dict[str, Any]], options: dict[str, Any], pictures: Sequence[Prepared] = ()) -> Prompt:
        """A conversation; control tokens come from the template only, answers keep their tokens. `pictures` are what its content
        parts of type "image" stand for.

        Tools and calls that the template would leave out are written into the messages.
        """
        tools = options.get("tools")
        texts = [text for message in messages for text in _texts(message["content"])]
        # What a template does for a message costs about as much as the 40 characters that chars_of counts for its form.
        num_chars = sum(chars_of(given) for given in (messages, tools, options.get("kwargs")) if given)
        layouts = [picture.layout for picture in pictures]
        num_chars += sum(len(layout.text) for layout in layouts)
        self._refuse_hopeless_pictures(pictures)

        def encode() -> list[int]:
            try:
                chat, shown = self._fitted(messages, tools)
            except RecursionError:
                raise InvalidRequest("messages or tools are nested too deeply", param="tools" if tools else "messages") from None
            given = {**options, "tools": shown, **self._marks}
            return self._text.encode_chat(chat, **given, answers=self.answers, pictures=layouts)

        return _placed(await self._encode(encode, texts, "messages", is_long=num_chars > INLINE_CHARS), pictures)

    async def ranges_of(
        self, messages: list[dict[str, Any]], options: Mapping[str, Any], pictures: Sequence[Prepared], token_ids: Sequence[int]
    ) -> list[Range | None] | None:
        """Where in a prompt that `of_chat` made each message's own tokens are, its pictures not counted; see message_ranges."""
        template = self._text.template
        assert template is not None
        placing = Placing([picture.layout for picture in pictures], **self._marks)
        names = ("add_generation_prompt", "continue_final_message", "kwargs", "tools")
        given = {name: options[name] for name in names if name in options}

        def find() -> list[Range | None] | None:
            tokenizer = self._text.tokenizer
            return message_ranges(tokenizer, template, messages, token_ids, fit=self._fitted, placing=placing, **given)

        return find() if len(token_ids) <= INLINE_TOKENS else await to_thread.run_sync(find, limiter=self._limiter)

    def _fitted(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
    ) -> tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]] | None]:
        """Messages and tools as this model's template can show them."""
        template = self._text.template
        if template is None:
            return messages, tools
        marker = self._marks.get("marker")
        if not (template.renders_calls if tools else template.renders_calls_alone):
            messages = spelt_out(messages)
        elif marker is not None and template.writes(marker) and not template.writes(marker, in_results=True):
            messages = pictures_apart(messages)
        if tools and not template.renders_tools:
            words = instructions([_tool(shown) for shown in tools])
            return explained(messages, words, takes_system=template.takes_system), None
        return messages, tools

    async def _encode(self, encode: Callable[[], list[int]], texts: list[str], param: str, *, is_long: bool) -> tuple[int, ...]:
        if not is_long:
            return tuple(encode())
        await self._refuse_hopeless(sum(len(text.encode()) for text in texts), param)
        return tuple(await to_thread.run_sync(encode, limiter=self._limiter))

    async def _refuse_hopeless(self, num_bytes: int, param: str) -> None:
        """A text that cannot fit whatever its tokens are is not worth seconds of tokenising."""
        context_len = self._facts().context_len
        if num_bytes <= context_len * SURE_BYTES_PER_TOKEN:
            return
        if self._longest_token is None:
            self._longest_token = await to_thread.run_sync(self._measure_longest_token, limiter=self._limiter)
        at_least = num_bytes // self._longest_token
        if at_least > context_len:
            raise ContextOverflow(
                f"{param} has {num_bytes} bytes, which make at least {at_least} tokens, but the context holds {context_len}; "
                f"shorten it",
                param=param,
            )

    def _refuse_hopeless_pictures(self, pictures: Sequence[Prepared]) -> None:
        """As for texts: with their places alone over the context, the rest need not be tokenised."""
        num_places, context_len = sum(one.layout.num_tokens for one in pictures), self._facts().context_len if pictures else 0
        if num_places > context_len:
            raise ContextOverflow(
                f"messages have {len(pictures)} {_noun(pictures)}, which take {num_places} tokens, but the context holds "
                f"{context_len}; send fewer or smaller ones",
                param="messages",
            )

    def _measure_longest_token(self) -> int:
        tokenizer = self._text.tokenizer
        return max(len(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size))

    async def text_of(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of checked ids."""

        def decode() -> str:
            return self._text.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

        return decode() if len(token_ids) <= INLINE_CHARS else await to_thread.run_sync(decode, limiter=self._limiter)

    def check_ids(self, token_ids: Sequence[int], param: str) -> tuple[int, ...]:
        """Given ids as a prompt. Raises InvalidRequest when one is no id, or not in the vocabulary."""
        if not token_ids:
            return ()
        if self._ids_type is None:
            ids_type = tuple[Annotated[int, Meta(ge=0, lt=self._facts().vocab_size)], ...]
            self._ids_type = defstruct("Ids", [("ids", ids_type)])  # msgspec reads a type anew at every call, a Struct once
        try:  # one pass in C: 32,768 ids take half a millisecond, a third of set(map(type, …)), min, max and tuple
            ids: tuple[int, ...] = convert({"ids": token_ids}, self._ids_type).ids
        except ValidationError:
            raise self._bad_id(token_ids, param) from None
        return ids

    def logit_bias(self, given: Mapping[str, float], param: str) -> tuple[tuple[int, float], ...]:
        """Biases by token id. Raises InvalidRequest for a name that is no id; "07" is none, so that no token has two."""
        vocab_size = self._facts().vocab_size if given else 0
        for name in given:
            if not (name.isascii() and name.isdigit() and len(name) < 10 and int(name) < vocab_size and str(int(name)) == name):
                raise InvalidRequest(f"{param} names token {show(name)}; allowed is 0 to {vocab_size - 1}", param=param)
        return tuple((int(name), bias) for name, bias in given.items())

    def _bad_id(self, token_ids: Sequence[int], param: str) -> InvalidRequest:
        vocab_size = self._facts().vocab_size
        if not all(isinstance(token, int) for token in token_ids):
            return InvalidRequest(MIXED.format(param), param=param)
        index, bad = next((index, token) for index, token in enumerate(token_ids) if not 0 <= token < vocab_size)
        if MEDIA_BASE <= bad < 2 * MEDIA_BASE:
            return InvalidRequest(
                f"{param}[{index}] is {bad}, which stands for a place of a picture or sound: it has no text, and no meaning "
                f"without them",
                param=f"{param}[{index}]",
            )
        return InvalidRequest(f"{param}[{index}] is {bad}; token ids are 0 to {vocab_size - 1}", param=f"{param}[{index}]")

    def check_room(self, prompt: Prompt, max_new_tokens: int, prompt_param: str, length_param: str) -> None:
        """Raises ContextOverflow, with the numbers, when a prompt and its answer cannot fit."""
        context_len = self._facts().context_len
        num_prompt = len(prompt.token_ids)
        if num_prompt == 0:
            raise InvalidRequest(f"{prompt_param} has no tokens; at least 1 is needed", param=prompt_param)
        num_pictures = len(prompt.media)
        which = "" if not num_pictures else f" ({prompt.num_media_tokens} of them for {_noun(prompt.media)}: {num_pictures})"
        if num_prompt >= context_len:
            raise ContextOverflow(
                f"{prompt_param} has {num_prompt} tokens{which}, but the context holds {context_len} and needs room for an "
                f"answer; shorten it",
                param=prompt_param,
            )
        if num_prompt + max_new_tokens > context_len:
            raise ContextOverflow(
                f"{length_param} is {max_new_tokens}, but the prompt has {num_prompt} tokens{which} and the context holds "
                f"{context_len}; ask for at most {context_len - num_prompt}",
                param=length_param,
            )


def _texts(content: Any) -> list[str]:
    """The texts of a message's content."""
    return [content] if isinstance(content, str) else [part["text"] for part in content if "text" in part]


def _placed(token_ids: tuple[int, ...], pictures: Sequence[Prepared]) -> Prompt:
    """A prompt whose slots (text/pictures.py) have become the ids of their pictures."""
    if not pictures:
        return Prompt(token_ids)
    ids = list(token_ids)
    places: list[list[int]] = [[] for _ in pictures]
    for place, id in enumerate(token_ids):
        if id < 0:
            places[-id - 1].append(place)
    media = []
    for picture, found in zip(pictures, places, strict=True):
        for place, id in zip(found, media_token_ids(picture.key, len(found)), strict=True):
            ids[place] = id
        media.append(Media(picture.key, _spans(picture, found), picture.inputs, picture.cost, picture.kind))
    return Prompt(tuple(ids), media=tuple(sorted(media, key=lambda one: one.spans[0].start)))


def _noun(media: Sequence[Prepared | Media]) -> str:
    return "sounds" if all(one.kind == AUDIO for one in media) else "pictures"


def _spans(picture: Prepared, places: Sequence[int]) -> tuple[Span, ...]:
    """The runs of a picture's layout, at their places."""
    spans, done = [], 0
    for run in picture.layout.runs:
        start = places[done]
        assert places[done + run.num_tokens - 1] == start + run.num_tokens - 1, "the places of a run are neighbours"
        spans.append(Span(start, *run))
        done += run.num_tokens
    assert done == len(places)
    return tuple(spans)


def chars_of(value: Any) -> int:
    """About how many characters a JSON value has, however deep it is; of a long one only that it is long."""
    num_chars, waiting = 0, [value]
    while waiting and num_chars <= LONG_CHARS:
        found = waiting.pop()
        if isinstance(found, str):
            num_chars += len(found)
        elif isinstance(found, Mapping):
            waiting += found
            waiting += found.values()
        elif isinstance(found, (list, tuple)):
            waiting += found
        num_chars += 4  # a number, or quotes and separators
    return num_chars


def _tool(shown: Mapping[str, Any]) -> Tool:
    function = shown["function"]
    return Tool(function["name"], function["description"], function["parameters"])
