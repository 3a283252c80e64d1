"""What programs are made of: text, answers to be generated, choices, pictures, turns; and the functions that make them.

Owns the values and their sums (`"a" + gen("b") + "c"`). They are data: the executor gives them meaning. The names and arguments
are those of SGLang's language (Zheng et al. 2023, arXiv 2312.07104).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, Union

from streamserve.lang.arguments import name_given, number, sampling_of, strings
from streamserve.lang.backend import ChoicesMethod, Sampling
from streamserve.lang.choices import check_choices
from streamserve.lang.pictures import check_picture

Strings = str | Sequence[str]
Part = Union["Expression", str]


class Expression:
    """Something that can be appended to a program's state. Expressions and strings add up, in either order."""

    __slots__ = ()

    def __add__(self, other: Part) -> "Chain":
        return Chain((*parts_of(self), *parts_of(other)))

    def __radd__(self, other: Part) -> "Chain":
        return Chain((*parts_of(other), *parts_of(self)))

    def __format__(self, _: str) -> NoReturn:
        raise TypeError(f"{self!r} is inside an f-string, where it would only be its name; add it instead: 'a' + {self!r} + 'b'")


@dataclass(frozen=True, slots=True)
class Text(Expression):
    """Words of the program itself."""

    value: str


@dataclass(frozen=True, slots=True)
class Gen(Expression):
    """An answer of the model, kept under a name."""

    name: str | None
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Select(Expression):
    """One of several choices: the one that the model finds likeliest."""

    name: str | None
    choices: tuple[str, ...]
    temperature: float
    method: ChoicesMethod | None  # None: the usual one


@dataclass(frozen=True, slots=True)
class Image(Expression):
    """A picture: a path, bytes of a file, an open picture, a data: or an http(s) URL."""

    source: Any


@dataclass(frozen=True, slots=True)
class Video(Expression):
    """Frames of a video."""

    path: str
    num_frames: int


@dataclass(frozen=True, slots=True)
class RoleBegin(Expression):
    """A turn begins. `is_written`: the program says all of it, the model nothing."""

    role: str
    is_written: bool = False


@dataclass(frozen=True, slots=True)
class RoleEnd(Expression):
    """A turn ends."""

    role: str


@dataclass(frozen=True, slots=True)
class ScopeBegin(Expression):
    """What follows, up to the scope's end, becomes a variable."""

    name: str


@dataclass(frozen=True, slots=True)
class ScopeEnd(Expression):
    """The end of that."""

    name: str


@dataclass(frozen=True, slots=True)
class SeparateReasoning(Expression):
    """Splits the answers kept under these names into thoughts and the rest."""

    names: tuple[str, ...]
    format: str


@dataclass(frozen=True, slots=True)
class Chain(Expression):
    """Expressions one after another."""

    parts: tuple[Expression, ...]


def parts_of(value: object) -> tuple[Expression, ...]:
    """A value that may be appended, as simple expressions."""
    if isinstance(value, str):
        return (Text(value),)
    if isinstance(value, Chain):
        return value.parts
    if isinstance(value, Expression):
        return (value,)
    hint = "; join its items, or append one" if isinstance(value, list) else "; str() makes text of it"
    raise TypeError(
        f"{value!r} is {type(value).__name__}; text or an expression can be appended{hint if value is not None else ''}"
    )


def gen(
    name: str | None = None,
    max_tokens: int | None = None,
    min_tokens: int | None = None,
    n: int | None = None,
    stop: Strings | None = None,
    stop_token_ids: Sequence[int] | None = None,
    stop_regex: Strings | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    min_p: float | None = None,
    frequency_penalty: float | None = None,
    presence_penalty: float | None = None,
    ignore_eos: bool | None = None,
    return_logprob: bool | None = None,
    logprob_start_len: int | None = None,
    top_logprobs_num: int | None = None,
    return_text_in_logprobs: bool | None = None,
    dtype: type | str | None = None,
    choices: Sequence[str] | None = None,
    choices_method: ChoicesMethod | None = None,
    regex: str | None = None,
    json_schema: str | Mapping[str, Any] | None = None,
) -> Expression:
    """The model's answer to all that stands before it, kept as variable `name`.

    What is left out is as the program's run says, and else the model's own. With `choices` it is a `select`. `regex`,
    `json_schema` (text or an object) and `dtype` (int, float, bool, str) say what the answer must look like. With n > 1 the
    variable is a list, and the text goes on behind its first.
    """
    if choices is not None:
        return select(name, choices, 0.0 if temperature is None else temperature, choices_method)
    sampling = {
        "max_tokens": max_tokens,
        "min_tokens": min_tokens,
        "n": n,
        "stop": stop,
        "stop_token_ids": stop_token_ids,
        "stop_regex": stop_regex,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "min_p": min_p,
        "frequency_penalty": frequency_penalty,
        "presence_penalty": presence_penalty,
        "ignore_eos": ignore_eos,
        "return_logprob": return_logprob,
        "logprob_start_len": logprob_start_len,
        "top_logprobs_num": top_logprobs_num,
        "return_text_in_logprobs": return_text_in_logprobs,
        "dtype": dtype,
        "regex": regex,
        "json_schema": json_schema,
    }
    return Gen(name_given(name), sampling_of(sampling))


def gen_int(name: str | None = None, max_tokens: int | None = None, n: int | None = None, **sampling: Any) -> Expression:
    """A whole number. Its arguments are those of `gen`."""
    return gen(name, max_tokens, n=n, dtype=int, **sampling)


def gen_string(name: str | None = None, max_tokens: int | None = None, n: int | None = None, **sampling: Any) -> Expression:
    """A string in double quotes. Its arguments are those of `gen`."""
    return gen(name, max_tokens, n=n, dtype=str, **sampling)


def select(
    name: str | None = None,
    choices: Sequence[str] | None = None,
    temperature: float = 0.0,
    choices_method: ChoicesMethod | None = None,
) -> Expression:
    """The likeliest of the choices, by `choices_method` (token_length_normalized, where it is not given)."""
    if choices is None or isinstance(choices, str):
        raise TypeError(f"choices is {choices!r}; allowed is a list of strings")
    found = strings("choices", choices)
    check_choices(found, number("temperature", temperature))
    if choices_method is not None and not callable(choices_method):
        raise TypeError(f"choices_method is {choices_method!r}; allowed is one of sgl's, or a ChoicesSamplingMethod of your own")
    return Select(name_given(name), found, temperature, choices_method)


def image(source: Any) -> Expression:
    """A picture: a path, the bytes of a file, an open picture (with a method `save`), a data: or an http(s) URL."""
    check_picture(source)
    return Image(source)


def video(path: str, num_frames: int) -> Expression:
    """Frames of a video."""
    return Video(path, num_frames)


def turn(role: str, content: Part | None = None) -> Chain:
    """A turn of that role, whole."""
    parts = () if content is None else parts_of(content)
    return Chain((RoleBegin(role, all(isinstance(part, Text) for part in parts)), *parts, RoleEnd(role)))


def system(expr: Part | None = None) -> Expression:
    """A system message."""
    return turn("system", expr)


def user(expr: Part | None = None) -> Expression:
    """A user's turn."""
    return turn("user", expr)


def assistant(expr: Part | None = None) -> Expression:
    """An assistant's turn."""
    return turn("assistant", expr)


def system_begin() -> Expression:
    """A system message begins."""
    return RoleBegin("system")


def system_end() -> Expression:
    """A system message ends."""
    return RoleEnd("system")


def user_begin() -> Expression:
    """A user's turn begins."""
    return RoleBegin("user")


def user_end() -> Expression:
    """A user's turn ends."""
    return RoleEnd("user")


def assistant_begin() -> Expression:
    """An assistant's turn begins."""
    return RoleBegin("assistant")


def assistant_end() -> Expression:
    """An assistant's turn ends."""
    return RoleEnd("assistant")


def separate_reasoning(expr: Expression, model_type: str) -> Expression:
    """The expression, its answers told from their thoughts: variable `x` is the answer, `x_reasoning_content` the thought.

    `model_type` names how the model marks thoughts (deepseek-r1, qwen3, ...). A program that is streamed shows both as they are.
    """
    from streamserve.text.reasoning import find

    find(model_type)
    parts: list[Expression] = []
    names: list[str] = []
    for part in (*parts_of(expr), None):
        if names and (part is None or isinstance(part, RoleEnd)):  # within the turn: its message is without the thoughts too
            parts.append(SeparateReasoning(tuple(names), model_type))
            names.clear()
        if part is not None:
            parts.append(part)
            names += [] if (name := defined_by(part)) is None else [name]
    return Chain(tuple(parts))


def defined_by(part: Expression) -> str | None:
    """The variable that a simple expression sets, if it sets one."""
    return part.name if isinstance(part, Gen | Select | ScopeEnd) else None


def thought_of(name: str) -> str:
    """The variable of the thought behind an answer."""
    return f"{name}_reasoning_content"
