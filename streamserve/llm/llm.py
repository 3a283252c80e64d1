"""`LLM`: an engine in the shapes of vLLM's offline class: values with attributes instead of dictionaries.

Owns these shapes. What happens is `Engine`'s affair; what is not here is reached by `LLM.engine`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Self

from streamserve.errors import InvalidRequest
from streamserve.llm.engine import Chat, Engine
from streamserve.llm.sampling import Sampling


class Logprob(NamedTuple):
    """Of one token at one place."""

    logprob: float
    decoded_token: str | None


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One answer. `stop_reason`: the stop string or token that ended it. `logprobs`: for each token, it and its alternatives."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None
    stop_reason: int | str | None = None
    logprobs: list[dict[int, Logprob]] | None = None


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """What became of one prompt. `prompt` is None where it was token ids or a chat."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0
    finished: bool = True


class LLM:
    """vLLM's way to an engine. `settings` as for `Engine`, which also knows vLLM's common names."""

    def __init__(self, model: str | None = None, **settings: Any) -> None:
        self.engine = Engine(model, **settings)

    def generate(
        self,
        prompts: Any,
        sampling_params: Sampling | Sequence[Sampling] | None = None,
        *,
        use_tqdm: bool | None = None,
        **fields: Any,
    ) -> list[RequestOutput]:
        """Complete a prompt or each of a list: texts, {"prompt": text} or {"prompt_token_ids": ids}. `use_tqdm`: show a bar."""
        _no_exceptions(fields)
        texts, ids = _prompts(prompts)
        given: dict[str, Any] = {} if ids is None else {"input_ids": ids}
        given |= {"return_prompt_token_ids": True, "return_text_in_logprobs": True, **fields}
        answers = self.engine.generate(texts, sampling_params, progress=use_tqdm, **given)
        found: list[RequestOutput] = []
        for answer in answers:  # those of one prompt follow each other, under its id
            meta = answer["meta_info"]
            if not found or found[-1].request_id != meta["id"]:
                text = None if texts is None else texts[len(found)]
                found.append(RequestOutput(meta["id"], text, answer["prompt_token_ids"], [], meta["cached_tokens"]))
            outputs = found[-1].outputs
            outputs.append(_completion(len(outputs), answer))
        return found

    def chat(
        self,
        messages: Chat | Sequence[Chat],
        sampling_params: Sampling | Sequence[Sampling] | None = None,
        *,
        use_tqdm: bool | None = None,
        **fields: Any,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of a list."""
        _no_exceptions(fields)
        answers = self.engine.chat(messages, sampling_params, progress=use_tqdm, return_token_ids=True, **fields)
        return [_of_chat(answer) for answer in (answers if isinstance(answers, list) else [answers])]

    def embed(self, prompts: str | Sequence[str], **fields: Any) -> list[list[float]]:
        """A vector for each text, by the embedding model."""
        rows: list[list[float]] = self.engine.embed([prompts] if isinstance(prompts, str) else prompts, **fields).tolist()
        return rows

    def score(self, text_1: str | Sequence[str], text_2: str | Sequence[str]) -> list[float]:
        """How well texts fit, one with many or pair by pair, by the embedding model or classifier."""
        body = {"text_1": text_1, "text_2": [text_2] if isinstance(text_2, str) else list(text_2)}
        return [entry["score"] for entry in self.engine.call("POST", "/v1/score", body)["data"]]

    def shutdown(self) -> None:
        """See Engine."""
        self.engine.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.shutdown()


def _no_exceptions(fields: Mapping[str, Any]) -> None:
    if "return_exceptions" in fields:
        raise InvalidRequest("return_exceptions is for the methods of Engine: LLM.engine is one", param="return_exceptions")


def _prompts(prompts: Any) -> tuple[list[str] | None, list[list[int]] | None]:
    """All as texts, or all as ids."""
    given = list(prompts) if isinstance(prompts, list | tuple) else [prompts]
    bare = [prompt.get("prompt_token_ids", prompt.get("prompt")) if isinstance(prompt, Mapping) else prompt for prompt in given]
    if all(isinstance(prompt, str) for prompt in bare):
        return bare, None
    if all(isinstance(prompt, list | tuple) for prompt in bare):
        return None, [list(ids) for ids in bare]
    raise InvalidRequest('prompts are texts, {"prompt": text}, or {"prompt_token_ids": ids}; all of one kind', param="prompts")


def _completion(index: int, answer: Mapping[str, Any]) -> CompletionOutput:
    meta, finish = answer["meta_info"], answer["meta_info"]["finish_reason"] or {}
    tokens = meta.get("output_token_logprobs")
    if tokens is not None:
        tops = meta.get("output_top_logprobs") or [[] for _ in tokens]
        tokens = [
            {token: Logprob(logprob, text) for logprob, token, text in (*top, chosen)}
            for chosen, top in zip(tokens, tops, strict=True)
        ]
    return CompletionOutput(index, answer["text"], answer["output_ids"], finish.get("type"), finish.get("matched"), tokens)


def _of_chat(answer: Mapping[str, Any]) -> RequestOutput:
    outputs = [
        CompletionOutput(
            choice["index"],
            choice["message"]["content"] or "",
            choice.get("token_ids") or [],
            choice["finish_reason"],
            choice.get("matched_stop"),
        )
        for choice in answer["choices"]
    ]
    cached = ((answer.get("usage") or {}).get("prompt_tokens_details") or {}).get("cached_tokens", 0)
    return RequestOutput(answer["id"], None, answer.get("prompt_token_ids") or [], outputs, cached)
