"""The body of SGLang's native /generate as typed values: names, types, and what a list stands for.

Owns field names and defaults, and the errors that name a field by its path. Knows nothing of tokens or answers.
"""

from collections.abc import Mapping
from typing import Any, TypeVar

from msgspec import Struct

from streamserve.api.forms import Constraint
from streamserve.api.schema import MAX_CHOICES_PER_PROMPT, MAX_NAME_CHARS, PictureRef, check_range, convert, show
from streamserve.errors import InvalidRequest

MAX_NEW_TOKENS = 10_000_000

T = TypeVar("T")


class NativeSampling(Struct, kw_only=True):
    """`sampling_params`: SGLang's names. What is left out has SGLang's defaults, not the model's."""

    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    n: int = 1
    stop: str | list[str] | None = None
    stop_regex: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    no_stop_trim: bool = False
    logit_bias: dict[str, float] | None = None
    sampling_seed: int | None = None
    # What the answer must match: one of them.
    json_schema: str | dict[str, Any] | bool | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | dict[str, Any] | None = None


class NativeRequest(Struct, kw_only=True):
    """Body of POST /generate. Fields that may be lists then have one entry per prompt."""

    text: str | list[str] | None = None
    input_ids: list[int | list[int]] | None = None
    image_data: str | list[str | list[str] | None] | None = None
    sampling_params: dict[str, Any] | list[dict[str, Any]] | None = None
    rid: str | list[str] | None = None
    return_logprob: bool | list[bool] = False
    logprob_start_len: int | list[int] = -1
    top_logprobs_num: int | list[int] = 0
    return_text_in_logprobs: bool = False
    return_prompt_token_ids: bool = False
    stream: bool = False
    resumable: bool = False  # not SGLang's: a stream whose client may leave and come back
    # Not SGLang's either, for texts that somebody else rendered: whether the tokenizer's own begin token is added, and what
    # stands in the text for a picture where the model's chat template has nothing for one.
    add_special_tokens: bool = True
    image_marker: str | None = None
    incremental: bool = False
    cache_salt: str = ""
    extra_key: str = ""
    priority: int = 0
    timeout: float | None = None
    model: str | None = None


# Fields of SGLang's body that this server cannot serve, with the values that mean "not wanted" and are therefore accepted.
UNWANTED: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("input_embeds", "video_data", "audio_data", "modalities", "token_ids_logprob"), ()),
    **dict.fromkeys(("session_params", "session_id", "lora_path", "lora_id", "custom_logit_processor", "custom_labels"), ()),
    **dict.fromkeys(("return_hidden_states", "return_routed_experts", "return_bytes", "return_entropy", "background"), (False,)),
    "require_reasoning": (False,),
    "no_logs": (False,),
    "log_metrics": (True,),
}
UNWANTED_SAMPLING: Mapping[str, tuple[Any, ...]] = {
    "spaces_between_special_tokens": (True,),
    "stream_interval": (1,),
    "beam_width": (1,),
    **dict.fromkeys(("custom_params", "watermark"), ()),
}


def without(given: Mapping[str, Any], unwanted: Mapping[str, tuple[Any, ...]], where: str = "") -> dict[str, Any]:
    """The fields that can be served. Raises InvalidRequest for one that cannot, unless its value says that it is not wanted."""
    left: dict[str, Any] = {}
    for name, value in given.items():
        if name not in unwanted:
            left[name] = value
        elif value is not None and not any(
            value is allowed or (value == allowed and type(value) is type(allowed)) for allowed in unwanted[name]
        ):
            raise InvalidRequest(f"{where}{name} is {show(value)}; it is not supported, leave it out", param=f"{where}{name}")
    return left


def sampling_of(given: Mapping[str, Any], where: str) -> NativeSampling:
    """Sampling parameters as a typed value. Raises InvalidRequest naming the field with its path."""
    params = without(given, UNWANTED_SAMPLING, f"{where}.")
    try:
        sampling = convert(params, NativeSampling)
    except InvalidRequest as error:
        raise InvalidRequest(f"{where}: {error}", param=f"{where}.{error.param}") from None
    check_range(f"{where}.n", sampling.n, 1, MAX_CHOICES_PER_PROMPT)
    check_range(f"{where}.max_new_tokens", sampling.max_new_tokens, 0, MAX_NEW_TOKENS)
    return sampling


# Fields that constrain an answer, and how api/forms.py calls what is in them.
CONSTRAINTS = (("json_schema", "schema"), ("regex", "regex"), ("ebnf", "ebnf"), ("structural_tag", "structural_tag"))


def constraint_of(sampling: NativeSampling, where: str) -> Constraint | None:
    """What the answer must match. Raises InvalidRequest when that is said twice."""
    given = [(name, kind) for name, kind in CONSTRAINTS if getattr(sampling, name) is not None]
    if len(given) > 1:
        raise InvalidRequest(
            f"{where}.{given[0][0]} and {where}.{given[1][0]} are both given; an answer has one form",
            param=f"{where}.{given[1][0]}",
        )
    return Constraint(f"{where}.{given[0][0]}", given[0][1], getattr(sampling, given[0][0])) if given else None


def samplings_of(given: dict[str, Any] | list[dict[str, Any]], num: int, is_batch: bool) -> list[tuple[NativeSampling, str]]:
    """Each prompt's sampling parameters, and what names them in an error."""
    entries = each("sampling_params", given, num, is_batch)
    named = [
        (entry, f"sampling_params[{i}]" if isinstance(given, list) else "sampling_params") for i, entry in enumerate(entries)
    ]
    return [(sampling_of(entry, where), where) for entry, where in named]


def each(name: str, given: T | list[T], num: int, is_batch: bool) -> list[T]:
    """A field's value for each prompt: its own where a list was given, else the same for all."""
    if not isinstance(given, list):
        return [given] * num
    if not is_batch or len(given) != num:
        raise InvalidRequest(f"{name} is a list of {len(given)}, but there {_count(num, is_batch)}", param=name)
    return given


def _count(num: int, is_batch: bool) -> str:
    return f"are {num} prompts" if is_batch else "is one prompt, which is not a list"


def images_of(given: str | list[str | list[str] | None] | None, num: int, is_batch: bool) -> list[list[PictureRef]]:
    """Each prompt's pictures. `given` for one prompt: a picture or a list of them; for a batch: a picture for all, or a list with
    an entry for each prompt, which is a picture, a list of them, or null."""
    if given is None:
        return [[] for _ in range(num)]
    if isinstance(given, str):
        return [[PictureRef(given, "image_data")] for _ in range(num)]
    if is_batch and len(given) != num:
        raise InvalidRequest(f"image_data is a list of {len(given)}, but there {_count(num, is_batch)}", param="image_data")
    found: list[list[PictureRef]] = []
    for index, entry in enumerate(given):
        path = f"image_data[{index}]"
        entries = [] if entry is None else [entry] if isinstance(entry, str) else entry
        is_one = isinstance(entry, str)
        found.append([PictureRef(one, path if is_one else f"{path}[{place}]") for place, one in enumerate(entries)])
    return found if is_batch else [[picture for pictures in found for picture in pictures]]


def rids_of(given: str | list[str] | None, num: int, is_batch: bool) -> list[str | None]:
    """Each prompt's name. One name for a batch is numbered, as SGLang does it."""
    if given is None:
        return [None] * num
    names = (
        [f"{given}_{index}" for index in range(num)] if is_batch and isinstance(given, str) else each("rid", given, num, is_batch)
    )
    for name in names:
        if not 0 < len(name) <= MAX_NAME_CHARS:
            raise InvalidRequest(f"rid has {len(name)} characters; allowed is 1 to {MAX_NAME_CHARS}", param="rid")
    return list(names)
