"""Routes beside OpenAI's: tokens, aborting.

Owns the shapes of these answers. Knows nothing of generation.
"""

from typing import Any

from streamserve.api.generate import Generate
from streamserve.api.generate_schema import NativeRequest
from streamserve.api.openai import chat_options
from streamserve.api.results import Aborted, NativeAnswer, Tokens, TokensText
from streamserve.api.routes import Key, RouteSpec
from streamserve.api.schema import (
    MAX_NAME_CHARS,
    AbortRequest,
    DetokenizeRequest,
    TokenizeRequest,
    convert,
    load_object,
    messages_of,
)
from streamserve.api.service import Service
from streamserve.api.wire import Exchange
from streamserve.errors import InvalidRequest


class Native:
    """These routes."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._generate = Generate(service)

    def routes(self) -> list[RouteSpec]:
        """What there is here."""
        answers = NativeAnswer | list[NativeAnswer]
        generate = {"text": "The capital of France is", "sampling_params": {"max_new_tokens": 16, "temperature": 0}}
        return [
            *(
                RouteSpec(method, "/generate", self._generate.create, NativeRequest, answers, NativeAnswer, example=generate)
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
            tokens = await prompts.of_chat(messages_of(request.messages or []), chat_options(request))
        facts = self._service.client.facts()
        await exchange.answer_json({"tokens": tokens, "count": len(tokens), "max_model_len": facts.context_len})

    async def detokenize(self, exchange: Exchange) -> None:
        """POST /detokenize: the text of tokens. It stands under vLLM's name and under SGLang's."""
        request = convert(await self._given(exchange), DetokenizeRequest)
        self._service.check_model(request.model)
        tokens = self._service.prompts.check_ids(request.tokens, "tokens")
        text = self._service.text.tokenizer.decode(tokens, skip_special_tokens=request.skip_special_tokens)
        await exchange.answer_json({"prompt": text, "text": text})

    async def abort(self, exchange: Exchange) -> None:
        """POST /abort: end live requests by the start of their id (ours or the client's), or all of them."""
        request = convert(await self._given(exchange), AbortRequest)
        if (request.rid is None) != request.abort_all:
            raise InvalidRequest("give either rid or abort_all", param="rid")
        if request.rid == "":
            raise InvalidRequest("rid is empty; to end every request send abort_all", param="rid")
        if len(request.rid or "") > MAX_NAME_CHARS:
            raise InvalidRequest(
                f"rid has {len(request.rid or '')} characters; at most {MAX_NAME_CHARS} are allowed", param="rid"
            )
        await exchange.answer_json({"aborted": self._service.abort(request.rid or "")})
