"""`LLM`: an engine in the shapes of vLLM's offline class: values with attributes instead of dictionaries.

Owns these shapes. What happens is `Engine`'s affair; what is not here is reached by `LLM.engine`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Self

from streamserve.errors import InvalidRequest
from streamserve.lang import loops
from streamserve.lang.tokenizer import ServerTokenizer
from streamserve.llm.engine import GENERATE, Chat, Engine
from streamserve.llm.prompts import generate_bodies, listed
from streamserve.llm.sampling import Sampling


class Logprob(NamedTuple):
    """Of one token at one place."""

    logprob: float
    decoded_token: str | None


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One answer. `stop_reason`: the stop string or token that ended it. `logprobs`: for each token, it and its alternatives.
    `message`: of a chat, with what stands beside the text: tool calls, thoughts."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    message: dict[str, Any] | None = None

    @property
    def cumulative_logprob(self) -> float | None:
        """The sum of its tokens' log-probabilities, where these were asked for."""
        if self.logprobs is None:
            return None
        return sum(entry[token].logprob for entry, token in zip(self.logprobs, self.token_ids, strict=False))


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What became of one prompt. `prompt` is None where it was token ids or a chat."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0
    finished: bool = True
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None  # the first token has none


class LLM:
    """vLLM's way to an engine. `settings` as for `Engine`, which also knows vLLM's common names."""

    def __init__(self, model: str | None = None, **settings: Any) -> None:
        self.engine = Engine(**settings) if model is None else Engine(**{**settings, "model": model})
        self.endpoint = self.engine.endpoint  # the back end of programs

    def generate(
        self,
        prompts: Any,
        sampling_params: Sampling | Sequence[Sampling] | None = None,
        *,
        use_tqdm: bool | None = None,
        **fields: Any,
    ) -> list[RequestOutput]:
        """Complete a prompt or each of a list: texts, {"prompt": text} or {"prompt_token_ids": ids}, the latter two also with
        {"multi_modal_data": {"image": pictures}}. `use_tqdm`: show a bar."""
        _only_whole(fields)
        texts, prompt_fields = _prompts(prompts)
        given = {"return_prompt_token_ids": True, "return_text_in_logprobs": True, **fields, **prompt_fields}
        answers = self.engine._answered(generate_bodies(texts, sampling_params, given), GENERATE, use_tqdm, False)
        shown: Sequence[str | None] = [None] * len(answers) if texts is None else texts
        return [_of_prompt(text, answer) for text, answer in zip(shown, answers, strict=True)]

    def chat(
        self,
        messages: Chat | Sequence[Chat],
        sampling_params: Sampling | Sequence[Sampling] | None = None,
        *,
        use_tqdm: bool | None = None,
        **fields: Any,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of a list."""
        _only_whole(fields)
        answers = self.engine.chat(messages, sampling_params, progress=use_tqdm, return_token_ids=True, **fields)
        return [_of_chat(answer) for answer in (answers if isinstance(answers, list) else [answers])]

    def embed(self, prompts: str | Sequence[str], **fields: Any) -> list[list[float]]:
        """A vector for each text, by the embedding model."""
        rows: list[list[float]] = self.engine.embed([prompts] if isinstance(prompts, str) else prompts, **fields).tolist()
        return rows

    def score(self, text_1: str | Sequence[str], text_2: str | Sequence[str]) -> list[float]:
        """How well texts fit, one with many or pair by pair, by the embedding model or classifier."""
        first, second = (entries if (entries := listed(texts)) is not None else [texts] for texts in (text_1, text_2))
        return loops.run(self.engine._scores(first, second))

    def get_tokenizer(self) -> ServerTokenizer:
        """See Engine."""
        return self.engine.get_tokenizer()

    def shutdown(self) -> None:
        """See Engine."""
        self.engine.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.shutdown()


def _only_whole(fields: Mapping[str, Any]) -> None:
    name = next((name for name in ("stream", "return_exceptions") if name in fields), None)
    if name is not None:
        raise InvalidRequest(f"{name} is for the methods of Engine: LLM.engine is one", param=name)


def _prompts(prompts: Any) -> tuple[list[str] | None, dict[str, Any]]:
    """All as texts, or all as ids; and fields of the body that belong to them."""
    given = listed(prompts)
    if given is None or (given and all(isinstance(entry, int) for entry in given)):
        given = [prompts if given is None else given]
    pictures = [_pictures(entry) for entry in given]
    fields = {"image_data": pictures} if any(entry is not None for entry in pictures) else {}
    bare = [entry.get("prompt_token_ids", entry.get("prompt")) if isinstance(entry, Mapping) else entry for entry in given]
    if all(isinstance(entry, str) for entry in bare):
        return bare, fields
    if all(listed(entry) is not None for entry in bare):
        return None, {**fields, "input_ids": bare}
    raise InvalidRequest('prompts are texts, {"prompt": text}, or {"prompt_token_ids": ids}; all of one kind', param="prompts")


def _pictures(prompt: Any) -> Any:
    if not isinstance(prompt, Mapping):
        return None
    media = prompt.get("multi_modal_data") or {}
    unknown = [name for name in prompt if name not in ("prompt", "prompt_token_ids", "multi_modal_data")]
    unknown += [f"multi_modal_data.{name}" for name in media if name != "image"]
    if unknown:
        raise InvalidRequest(f"a prompt has {unknown[0]}, which is not known here; leave it out", param="prompts")
    return media.get("image")


def _of_prompt(text: str | None, answer: Any) -> RequestOutput:
    choices = answer if isinstance(answer, list) else [answer]
    meta = choices[0]["meta_info"]
    return RequestOutput(
        meta["id"],
        text,
        choices[0]["prompt_token_ids"],
        [_completion(index, choice) for index, choice in enumerate(choices)],
        meta["cached_tokens"],
        prompt_logprobs=_by_token(meta.get("input_token_logprobs") or None, meta.get("input_top_logprobs")),
    )


def _completion(index: int, answer: Mapping[str, Any]) -> CompletionOutput:
    meta, finish = answer["meta_info"], answer["meta_info"]["finish_reason"] or {}
    logprobs: Any = _by_token(meta.get("output_token_logprobs"), meta.get("output_top_logprobs"))
    return CompletionOutput(index, answer["text"], answer["output_ids"], finish.get("type"), finish.get("matched"), logprobs)


def _by_token(tokens: Sequence[Any] | None, tops: Sequence[Any] | None) -> list[dict[int, Logprob] | None] | None:
    """/generate's lists in vLLM's shape."""
    if tokens is None:
        return None
    return [
        None if own[0] is None else {token: Logprob(logprob, text) for logprob, token, text in (*(top or ()), own)}
        for own, top in zip(tokens, tops or [None] * len(tokens), strict=True)
    ]


def _of_chat(answer: Mapping[str, Any]) -> RequestOutput:
    outputs = [
        CompletionOutput(
            choice["index"],
            choice["message"]["content"] or "",
            choice.get("token_ids") or [],
            choice["finish_reason"],
            choice.get("matched_stop"),
            _scored(choice.get("logprobs")),
            choice["message"],
        )
        for choice in answer["choices"]
    ]
    cached = ((answer.get("usage") or {}).get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    prompt = answer.get("prompt_logprobs")
    if prompt is not None:
        prompt = [
            entry and {int(token): Logprob(one["logprob"], one["decoded_token"]) for token, one in entry.items()}
            for entry in prompt
        ]
    return RequestOutput(answer["id"], None, answer.get("prompt_token_ids") or [], outputs, cached, prompt_logprobs=prompt)


def _scored(logprobs: Mapping[str, Any] | None) -> list[dict[int, Logprob]] | None:
    """The chat route's lists in vLLM's shape."""
    if logprobs is None:
        return None
    return [
        {one["token_id"]: Logprob(one["logprob"], one["token"]) for one in (*entry["top_logprobs"], entry)}
        for entry in logprobs["content"]
    ]
