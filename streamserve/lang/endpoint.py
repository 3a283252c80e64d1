"""A server of this API, or of SGLang's, as a back end of programs: its native /generate, over any transport.

Owns how a prompt and its sampling become a body, and what was learned of the server once. Knows no sockets (transport.py) and no
programs.
"""

import asyncio
import ssl
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from streamserve.errors import InvalidRequest
from streamserve.lang import loops
from streamserve.lang.backend import ChoicesMethod, Chosen, Piece, Prompt, Sampling
from streamserve.lang.choices import check_choices, healed, mean_of
from streamserve.lang.dtypes import REGEXES
from streamserve.lang.roles import PLACE, TemplateRoles, roles_of
from streamserve.lang.tokenizer import ServerTokenizer
from streamserve.lang.transport import Http, Transport
from streamserve.messages import MEDIA_BASE

NUM_HEALED = 2  # the prompt's last tokens that a choice may change, as SGLang has it
MAX_SCORED = 256  # choices in one call
FLUSH_WAIT_S = 30  # for requests that run
NOTHING: dict[str, Any] = {"max_new_tokens": 0, "temperature": 0}


@dataclass(frozen=True, slots=True)
class Known:
    """What a server says of its model. `shows_template`: its roles are its own, and it knows our additions to SGLang's fields.
    `sampling`: what the model's makers would have, which SGLang's servers apply to /generate themselves, ours to chats only."""

    roles: TemplateRoles
    shows_template: bool
    sampling: Mapping[str, Any]


class Native:
    """See backend.Backend. `chat_template`: a template's text, or a name of templates.TEMPLATES, instead of the server's own."""

    def __init__(self, transport: Transport, *, chat_template: str | None = None) -> None:
        if chat_template is not None:
            roles_of(chat_template)  # what is wrong with it is said now
        self._transport = transport
        self._chat_template = chat_template
        self._known: Known | None = None
        self._learning: asyncio.Lock | None = None

    async def roles(self) -> TemplateRoles:
        """See Backend."""
        return (await self._learned()).roles

    async def generate(self, prompt: Prompt, sampling: Sampling) -> list[Piece]:
        """See Backend."""
        answer = await self._ask(await self._body(prompt, sampling))
        choices = answer if isinstance(answer, list) else [answer]
        return [Piece("" if _only_looks(sampling) else choice["text"], choice["meta_info"]) for choice in choices]

    async def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncGenerator[Piece, None]:
        """See Backend."""
        if sampling.n not in (None, 1):
            raise InvalidRequest(f"n is {sampling.n}; of a streamed answer there is one", param="n")
        known = await self._learned()
        body = {**await self._body(prompt, sampling), "stream": True}
        if known.shows_template:
            body["incremental"] = True
        num_shown = 0
        async with aclosing(self._transport.events("/generate", body)) as events:
            async for event in events:
                text: str = event["text"]
                if not known.shows_template:  # SGLang's server repeats the text in each event
                    text, num_shown = text[num_shown:], len(text)
                yield Piece("" if _only_looks(sampling) else text, event["meta_info"])

    async def choose(self, prompt: Prompt, choices: Sequence[str], temperature: float, method: ChoicesMethod) -> Chosen:
        """See Backend. The prompt is computed once; all choices are scored behind it, side by side."""
        check_choices(choices, temperature)
        given = await self._given(prompt)
        prompt_ids: list[int] = []
        start = 0
        if prompt.text:
            warm = await self._ask({**given, "sampling_params": NOTHING, "return_prompt_token_ids": True})
            prompt_ids = warm.get("prompt_token_ids") or []
            start = _first_scored(warm["meta_info"]["prompt_tokens"], prompt_ids)
        wishes = {"return_logprob": True, "logprob_start_len": start, "return_text_in_logprobs": True}
        body = {**given, **wishes, "text": [prompt.text + choice for choice in choices]}
        if "image_data" in given:
            body["image_data"] = [list(prompt.images)] * len(choices)
        metas = await self._scored(body)
        inputs = [_own(meta["input_token_logprobs"], prompt.text, prompt_ids, start) for meta in metas]
        for place, entries in enumerate(inputs):
            if all(entry[0] is None for entry in entries):
                raise InvalidRequest(
                    f"choices[{place}] is a token that follows none; let a text stand before it", param="choices"
                )
        unconditional = None
        if method.requires_unconditional_logprobs:
            ids = [[entry[1] for entry in entries] for entries in inputs]
            alone = await self._scored({"input_ids": ids, "return_logprob": True, "logprob_start_len": 0})
            unconditional = [meta["input_token_logprobs"] for meta in alone]
        return method(
            choices=choices,
            normalized_prompt_logprobs=[mean_of(entries) for entries in inputs],
            input_token_logprobs=inputs,
            output_token_logprobs=[meta.get("output_token_logprobs", []) for meta in metas],
            unconditional_token_logprobs=unconditional,
        )

    async def cache_prefix(self, prompt: Prompt) -> None:
        """See Backend."""
        if prompt.text:
            await self._ask({**await self._given(prompt), "sampling_params": NOTHING})

    async def flush_cache(self) -> None:
        """See Backend. Waits for requests that run."""
        await self._transport.call("POST", f"/flush_cache?timeout={FLUSH_WAIT_S}")

    async def server_info(self) -> dict[str, Any]:
        """See Backend."""
        info: dict[str, Any] = await self._transport.call("GET", "/get_server_info")
        return info

    async def model_info(self) -> dict[str, Any]:
        """See Backend."""
        info: dict[str, Any] = await self._transport.call("GET", "/get_model_info")
        return info

    async def aclose(self) -> None:
        """See Backend."""
        await self._transport.aclose()

    async def call(self, method: str, path: str, body: Any = None) -> Any:
        """Any other call of the server's API."""
        return await self._transport.call(method, path, body)

    def events(self, path: str, body: Any) -> AsyncGenerator[Any, None]:
        """Any other call whose answer is a stream."""
        return self._transport.events(path, body)

    def get_tokenizer(self) -> ServerTokenizer:
        """The model's tokenizer, as far as scripts use transformers'. Its methods wait for the server."""
        return ServerTokenizer(self.call)

    async def _learned(self) -> Known:
        if self._known is None:
            if self._learning is None:
                self._learning = asyncio.Lock()
            async with self._learning:
                if self._known is None:
                    self._known = await self._learn()
        return self._known

    async def _learn(self) -> Known:
        info = await self.model_info()
        name = str(info.get("served_model_name") or info.get("model_path") or "the model")
        shown = info.get("chat_template")
        roles = roles_of(self._chat_template or shown, name=name)
        if self._chat_template is not None and shown is not None and shown.get("image_marker"):
            roles.image, roles.marks_places = shown["image_marker"], False
        is_ours = "chat_template" in info
        return Known(roles, is_ours, (info.get("preferred_sampling_params") or {}) if is_ours else {})

    async def _body(self, prompt: Prompt, sampling: Sampling) -> dict[str, Any]:
        known = await self._learned()
        params = {**known.sampling, **sampling_params(sampling)}
        if _only_looks(sampling):
            params["max_new_tokens"] = 1
        body = {**await self._given(prompt), "sampling_params": params}
        for name in ("return_logprob", "logprob_start_len", "top_logprobs_num", "return_text_in_logprobs"):
            if (value := getattr(sampling, name)) is not None:
                body[name] = value
        return body

    async def _given(self, prompt: Prompt) -> dict[str, Any]:
        """A prompt as fields of a body."""
        known = await self._learned()
        given: dict[str, Any] = {"text": prompt.text}
        if prompt.images:
            given["image_data"] = list(prompt.images)
            if known.roles.marks_places and known.shows_template and PLACE in prompt.text:
                given["image_marker"] = PLACE
        if known.shows_template and self._chat_template is None and _begins_as_rendered(prompt, known.roles):
            given["add_special_tokens"] = False  # the template has written the begin token, if there is to be one
        return given

    async def _scored(self, body: dict[str, Any]) -> list[dict[str, Any]]:
        """What is said of each prompt of a body, whose lists have one entry per prompt."""
        num = max(len(value) for value in body.values() if isinstance(value, list))
        metas: list[dict[str, Any]] = []
        for at in range(0, num, MAX_SCORED):
            part = {name: value[at : at + MAX_SCORED] if isinstance(value, list) else value for name, value in body.items()}
            metas += [answer["meta_info"] for answer in await self._ask({**part, "sampling_params": NOTHING})]
        return metas

    async def _ask(self, body: dict[str, Any]) -> Any:
        return await self._transport.call("POST", "/generate", body)


class RuntimeEndpoint(Native):
    """A server at a URL. Opens nothing before it is first used."""

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        verify: bool | str | ssl.SSLContext | None = None,
        chat_template_name: str | None = None,
        *,
        chat_template: str | None = None,
    ) -> None:
        if chat_template is not None and chat_template_name is not None:
            raise InvalidRequest("chat_template and chat_template_name are both given; give one", param="chat_template_name")
        self.base_url = base_url.rstrip("/")
        transport = Http(base_url, api_key=api_key, verify=True if verify is None else verify)
        super().__init__(transport, chat_template=chat_template or chat_template_name)

    def get_model_name(self) -> str:
        """Which model is served, waited for."""
        return str(loops.run(self.model_info())["model_path"])

    def get_server_info(self) -> dict[str, Any]:
        """What the server says of itself, waited for."""
        return loops.run(self.server_info())


def _only_looks(sampling: Sampling) -> bool:
    """No token is wanted, but how likely the next ones are: SGLang's way to see that. One is sampled, and not appended."""
    return sampling.max_tokens == 0 and sampling.return_logprob is True


def sampling_params(sampling: Sampling) -> dict[str, Any]:
    """A sampling as the native body has it. What a type looks like becomes a regular expression."""
    regex = sampling.regex
    if sampling.dtype is not None:
        if regex is not None or sampling.json_schema is not None:
            raise InvalidRequest("dtype is given beside regex or json_schema; an answer has one form", param="dtype")
        regex = REGEXES[sampling.dtype]
    given: dict[str, Any] = {
        "max_new_tokens": sampling.max_tokens,
        "min_new_tokens": sampling.min_tokens,
        "stop": list(sampling.stop) or None,
        "stop_token_ids": list(sampling.stop_token_ids) or None,
        "stop_regex": list(sampling.stop_regex) or None,
        "regex": regex,
    }
    names = ("n", "temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "ignore_eos", "json_schema")
    given |= {name: getattr(sampling, name) for name in names}
    return {name: value for name, value in given.items() if value is not None}


def _first_scored(num_prompt: int, prompt_ids: Sequence[int]) -> int:
    """Where scores begin: at the prompt's last tokens, but behind its pictures, whose places have none; where it can be, not at
    the token right behind one, which is told in one go with the picture by models that see it as a whole."""
    behind = 1 + max((place for place, id in enumerate(prompt_ids) if id >= MEDIA_BASE), default=-1)
    return max(num_prompt - NUM_HEALED, behind + (0 < behind < num_prompt - 1), 0)


def _own(entries: Sequence[Sequence[Any]], text: str, prompt_ids: Sequence[int], start: int) -> list[Sequence[Any]]:
    """A choice's own tokens. Where the prompt's ids are not shown, as by SGLang's server, its text tells, as SGLang does it."""
    if prompt_ids or not text:
        return healed(entries, prompt_ids, start)
    is_same = len(entries) > 1 and text.endswith(str(entries[0][2]))
    return list(entries[1:] if is_same else entries)


def _begins_as_rendered(prompt: Prompt, roles: TemplateRoles) -> bool:
    """Whether the text begins with what the chat template writes before the first turn."""
    role: str | None = prompt.messages[0]["role"] if prompt.messages else prompt.role
    if role is None:
        return False
    return any(prompt.text.startswith(roles.begin((), role, is_written=is_written)) for is_written in (False, True))
