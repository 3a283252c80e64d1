"""Bodies of POST /generate out of the arguments of `Engine.generate`: one for all, or one for each prompt of a list.

Owns what a list among the arguments means, and turns pictures into what a body can hold, for which it reads files. Knows no field
beside those that may be lists.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from streamserve.api.generate_schema import each, rids_of
from streamserve.errors import InvalidRequest
from streamserve.lang.pictures import url_of
from streamserve.llm.sampling import native_fields

_LISTS = ("return_logprob", "logprob_start_len", "top_logprobs_num", "image_data")


def generate_body(prompt: Any, sampling: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """One body for a prompt, or for a whole list of them."""
    given = _given(fields)
    body = {**given, **({} if prompt is None else {"text": list(prompt) if _is_list(prompt) else prompt})}
    if not _is_list(sampling):
        return {**native_fields(sampling), **body}
    each_of = [native_fields(entry) for entry in sampling]
    beside = next((set(entry) - {"sampling_params"} for entry in each_of if len(entry) > 1), set())
    if beside:
        raise InvalidRequest(
            "logprobs stand in a list of sampling_params; where the answer is a stream, give return_logprob and top_logprobs_num",
            param="sampling_params",
        )
    return {"sampling_params": [entry["sampling_params"] for entry in each_of], **body}


def generate_bodies(prompt: Any, sampling: Any, fields: Mapping[str, Any]) -> dict[str, Any] | list[dict[str, Any]]:
    """A body for one prompt; a list of them for a list."""
    ids: Any = fields.get("input_ids")
    is_ids = prompt is None and _is_list(ids) and len(ids) > 0 and _is_list(ids[0])
    if not is_ids and not _is_list(prompt):
        return generate_body(prompt, sampling, fields)
    if prompt is not None and ids is not None:
        raise InvalidRequest("give either prompt or input_ids", param="prompt")
    prompts: Sequence[Any] = ids if is_ids else prompt
    num = len(prompts)
    alike = _given(fields)
    alike.pop("input_ids", None)
    own: dict[str, Sequence[Any]] = {name: each(name, alike.pop(name), num, True) for name in _LISTS if name in alike}
    if "rid" in alike:
        own["rid"] = rids_of(alike.pop("rid"), num, True)
    own["input_ids" if is_ids else "text"] = prompts
    sampled = each("sampling_params", list(sampling) if _is_list(sampling) else sampling, num, True)
    return [
        {**native_fields(sampled[at]), **alike, **{name: values[at] for name, values in own.items() if values[at] is not None}}
        for at in range(num)
    ]


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in fields.items() if value is not None}
    if "image_data" in given:
        given["image_data"] = _shown(given["image_data"])
    return given


def _shown(pictures: Any) -> Any:
    """Pictures as URLs: paths are read, and so are bytes and open pictures. Other words are for the server to judge."""
    if _is_list(pictures):
        return [_shown(picture) for picture in pictures]
    if pictures is None or (isinstance(pictures, str) and (":" in pictures or not _is_file(pictures))):
        return pictures
    return url_of(pictures)


def _is_file(name: str) -> bool:
    try:
        return Path(name).expanduser().is_file()
    except OSError:  # too long to be a name: base64
        return False


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)
