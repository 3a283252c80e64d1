"""How an answer is sampled, as callers of an engine say it: vLLM's names in a value, or SGLang's in a dictionary.

Owns the names. Ranges are checked where requests are (messages.SamplingParams), with errors that name the field.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any

from streamserve.errors import InvalidRequest
from streamserve.messages import MAX_LOGPROBS

# What /generate calls otherwise than vLLM does, and what /v1/chat/completions calls otherwise than /generate.
_NATIVE = {
    "max_tokens": "max_new_tokens",
    "min_tokens": "min_new_tokens",
    "seed": "sampling_seed",
    "include_stop_str_in_output": "no_stop_trim",
}
_CHAT = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "sampling_seed": "seed",
    "include_stop_str_in_output": "no_stop_trim",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """Sampling of an answer. None is what a request that leaves the field out gets.

    `logprobs`: so many alternatives with the log-probability of each token; 0: the token's own; `prompt_logprobs`: the same for
    each token of the prompt. At most one of `json_schema`, `regex` and `ebnf` says what the answer must match. SGLang's names
    of four fields stand below: `max_new_tokens` is `max_tokens`.
    """

    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] | Mapping[str, float] | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    stop_regex: str | Sequence[str] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    json_schema: str | Mapping[str, Any] | None = None
    regex: str | None = None
    ebnf: str | None = None
    max_new_tokens: int | None = None
    min_new_tokens: int | None = None
    sampling_seed: int | None = None
    no_stop_trim: bool | None = None

    def __post_init__(self) -> None:
        native_fields(self)  # what is wrong with it is said now


Sampling = SamplingParams | Mapping[str, Any]


def native_fields(sampling: Sampling | None) -> dict[str, Any]:
    """Fields of a body of /generate: `sampling_params`, and what it has beside them for log-probabilities."""
    params = _renamed(_given(sampling), _NATIVE)
    answer, prompt = (_alternatives(name, params.pop(name, None)) for name in ("logprobs", "prompt_logprobs"))
    if answer is None and prompt is None:
        return {"sampling_params": params}
    beside = {} if prompt is None else {"logprob_start_len": 0}
    return {"sampling_params": params, "return_logprob": True, "top_logprobs_num": max(answer or 0, prompt or 0), **beside}


def chat_fields(sampling: Sampling | None) -> dict[str, Any]:
    """Fields of a body of /v1/chat/completions."""
    params = _renamed(_given(sampling), _CHAT)
    if not isinstance(params.get("logprobs"), bool) and (top := _alternatives("logprobs", params.get("logprobs"))) is not None:
        params |= {"logprobs": True, "top_logprobs": top}
    return params


def _alternatives(name: str, given: Any) -> int | None:
    """How many to each token; OpenAI's clients say whether."""
    if given is None or given is False:
        return None
    if given is True:
        return 0
    if not isinstance(given, Integral) or not 0 <= int(given) <= MAX_LOGPROBS:
        raise InvalidRequest(f"{name} is {given!r}; allowed is 0 to {MAX_LOGPROBS}", param=f"sampling_params.{name}")
    return int(given)


def _given(sampling: Sampling | None) -> Mapping[str, Any]:
    """The fields that were given, by the names they were given under."""
    if sampling is None:
        return {}
    if isinstance(sampling, SamplingParams):
        values = {entry.name: getattr(sampling, entry.name) for entry in fields(sampling)}
        return {name: value for name, value in values.items() if value is not None}
    if isinstance(sampling, Mapping):
        return sampling
    raise InvalidRequest(
        f"sampling_params is {type(sampling).__name__}; allowed is a dictionary, SamplingParams, or a list of these",
        param="sampling_params",
    )


def _renamed(given: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    params: dict[str, Any] = {}
    for name, value in given.items():
        known = names.get(name, name)
        if known in params:
            raise InvalidRequest(f"{name} is given twice: {known} is the same", param=name)
        params[known] = list(value) if isinstance(value, tuple | set | frozenset) else value
    return params
