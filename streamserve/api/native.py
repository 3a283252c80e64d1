"""Routes beside OpenAI's: tokens, aborting, reading calls and thoughts of given texts.

Owns the shapes of these answers. Knows nothing of generation.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from anyio.lowlevel import checkpoint
from msgspec import Struct

from streamserve.api.answer import AnswerReader, Event, Reading, fold
from streamserve.api.forms import Forms, shown_tools
from streamserve.api.generate import Generate
from streamserve.api.generate_schema import NativeRequest
from streamserve.api.openai import chat_options
from streamserve.api.results import Aborted, NativeAnswer, ParsedCalls, Separated, Tokens, TokensText
from streamserve.api.routes import Key, RouteSpec
from streamserve.api.schema import (
    MAX_NAME_CHARS,
    AbortRequest,
    DetokenizeRequest,
    TokenizeRequest,
    ToolDefinition,
    convert,
    load_object,
    messages_of,
)
from streamserve.api.service import Service
from streamserve.api.wire import Exchange
from streamserve.errors import InvalidRequest
from streamserve.text import reasoning as reasoning_formats
from streamserve.text.tools import find as tool_formats
from streamserve.text.tools.format import Tool

CALLS_EXAMPLE = {
    "text": '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>',
    "tools": [{"type": "function", "function": {"name": "add"}}],
    "tool_call_parser": "hermes",
}
PART_CHARS = 2000
THOUGHT_EXAMPLE = {"text": "<think>Hm.</think>Yes.", "reasoning_parser": "qwen3"}


class CallsRequest(Struct, kw_only=True):
    """Body of POST /parse_function_call. Without `tool_call_parser` the served model's own format is read."""

    text: str
    tools: list[ToolDefinition]
    tool_call_parser: str | None = None


class ThoughtRequest(Struct, kw_only=True):
    """Body of POST /separate_reasoning. Without `reasoning_parser` the served model's own format is read."""

    text: str
    reasoning_parser: str | None = None


class Native:
    """These routes."""

    def __init__(self, service: Service, forms: Forms) -> None:
        self._service = service
        self._forms = forms
        self._generate = Generate(service, forms)

    def routes(self) -> list[RouteSpec]:
        """What there is here."""
        create, answers = self._service.streams.again(self._generate.create), NativeAnswer | list[NativeAnswer]
        generate = {"text": "The capital of France is", "sampling_params": {"max_new_tokens": 16, "temperature": 0}}
        return [
            *(
                RouteSpec(method, "/generate", create, NativeRequest, answers, NativeAnswer, example=generate)
                for method in ("POST", "PUT")
            ),
            *(
                RouteSpec("POST", path, self.tokenize, TokenizeRequest, Tokens, example={"prompt": "Hello"})
                for path in ("/tokenize", "/v1/tokenize")
            ),
            *(
                RouteSpec("POST", path, self.detokenize, DetokenizeRequest, TokensText, example={"tokens": [72, 105]})
                for path in ("/detokenize", "/v1/detokenize")
            ),
            RouteSpec("POST", "/parse_function_call", self.parse_calls, CallsRequest, ParsedCalls, example=CALLS_EXAMPLE),
            RouteSpec("POST", "/separate_reasoning", self.separate_reasoning, ThoughtRequest, Separated, example=THOUGHT_EXAMPLE),
            # /abort_request is SGLang's name.
            *(
                RouteSpec("POST", path, self.abort, AbortRequest, Aborted, key=Key.ADMIN, example={"rid": "my-request"})
                for path in ("/abort", "/abort_request")
            ),
        ]

    async def _given(self, exchange: Exchange) -> dict[str, Any]:
        return load_object(await exchange.body(self._service.max_body_bytes))

    async def tokenize(self, exchange: Exchange) -> None:
        """POST /tokenize: the tokens that a prompt, or a conversation, is for this model."""
        request = convert(await self._given(exchange), TokenizeRequest)
        self._service.check_model(request.model)
        prompts = self._service.prompts
        if (request.prompt is None) == (request.messages is None):
            raise InvalidRequest("give either prompt or messages", param="prompt")
        if request.prompt is not None:
            tokens = await prompts.of_text(request.prompt, "prompt", add_special_tokens=request.add_special_tokens)
        else:
            service = self._service
            chat = messages_of(request.messages or [], takes=service.takes)
            options = chat_options(request, shown_tools(request.tools))
            pictures = await self._service.prepared(chat.pictures, self._service.caller(exchange))
            tokens = (await prompts.of_chat(chat.messages, options, pictures)).token_ids
        facts = self._service.client.facts()
        await exchange.answer_json({"tokens": tokens, "count": len(tokens), "max_model_len": facts.context_len})

    async def detokenize(self, exchange: Exchange) -> None:
        """POST /detokenize: the text of tokens. It stands under vLLM's name and under SGLang's."""
        request = convert(await self._given(exchange), DetokenizeRequest)
        self._service.check_model(request.model)
        tokens = self._service.prompts.check_ids(request.tokens, "tokens")
        text = await self._service.prompts.text_of(tokens, skip_special_tokens=request.skip_special_tokens)
        await exchange.answer_json({"prompt": text, "text": text})

    async def parse_calls(self, exchange: Exchange) -> None:
        """POST /parse_function_call: the calls in a model's text, and the text without them."""
        request = convert(await self._given(exchange), CallsRequest)
        shown_tools(request.tools)  # checks them
        format = self._forms.tool_format
        if request.tool_call_parser is not None:
            with naming("tool_call_parser"):
                format = tool_formats.find(request.tool_call_parser)
        reading = Reading(parser=lambda: format.parser(tools_named(request.tools)), has_thoughts=True)
        answer = fold(await read(reading, request.text))
        calls = [
            {"tool_index": index, "name": call.name, "parameters": call.arguments} for index, call in enumerate(answer.calls)
        ]
        await exchange.answer_json({"normal_text": answer.content, "calls": calls})

    async def separate_reasoning(self, exchange: Exchange) -> None:
        """POST /separate_reasoning: the thought in a model's text, and the text without it."""
        request = convert(await self._given(exchange), ThoughtRequest)
        format = self._forms.reasoning
        if request.reasoning_parser is not None:
            with naming("reasoning_parser"):
                format = reasoning_formats.find(request.reasoning_parser)
        if format is None:
            raise InvalidRequest("reasoning_parser is missing, and this model is not known to reason", param="reasoning_parser")
        reasoning = format
        # The prompt, which may have begun the thought, is not here: an end without a beginning tells.
        is_open = reasoning.end in request.text and reasoning.begin not in request.text
        if reasoning.is_channelled:
            reading = Reading(parser=lambda: tool_formats.find("gpt_oss").parser(()), has_thoughts=True)
        else:
            reading = Reading(splitter=lambda: reasoning.splitter(is_open=is_open), has_thoughts=True)
        answer = fold(await read(reading, request.text))
        await exchange.answer_json({"reasoning_text": answer.thought, "text": answer.content})

    async def abort(self, exchange: Exchange) -> None:
        """POST /abort: end live requests by the start of their id (ours or the client's), or all of them."""
        request = convert(await self._given(exchange), AbortRequest)
        if request.rid and request.abort_all:
            raise InvalidRequest("give either rid or abort_all", param="rid")
        if not request.rid and not request.abort_all:
            raise InvalidRequest("rid is missing or empty; to end every request send abort_all", param="rid")
        if len(request.rid or "") > MAX_NAME_CHARS:
            raise InvalidRequest(
                f"rid has {len(request.rid or '')} characters; at most {MAX_NAME_CHARS} are allowed", param="rid"
            )
        await exchange.answer_json({"aborted": self._service.abort(request.rid or "")})


async def read(reading: Reading, text: str) -> list[Event]:
    """All events of a whole text, which may be as long as a body: everybody else's turn comes after each part of it."""
    reader = AnswerReader(reading)
    events: list[Event] = []
    for start in range(0, len(text), PART_CHARS):
        events += reader.push(text[start : start + PART_CHARS])
        await checkpoint()
    return events + reader.finish("stop")[0]


def tools_named(definitions: list[ToolDefinition]) -> list[Tool]:
    """The tools as their parser knows them."""
    functions = [definition.function for definition in definitions if definition.function is not None]
    return [Tool(given.name, given.description or "", given.parameters) for given in functions]


@contextmanager
def naming(param: str) -> Iterator[None]:
    """Give an error about a value the name of the field that it stood in."""
    try:
        yield
    except InvalidRequest as error:
        raise InvalidRequest(f"{param}: {error}", param=param) from None
