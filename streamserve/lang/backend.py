"""What a program asks of a model, and what comes back: plain values and the promise every back end keeps.

Owns no behaviour. All methods of a back end run on the background loop (loops.py); what crosses from a program to it and back
is frozen. Sampling follows SGLang's names (`gen` of its language, Zheng et al. 2023, arXiv 2312.07104).
"""

from abc import abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Protocol, runtime_checkable

FORMS = ("dtype", "regex", "json_schema")  # an answer takes one of them


@dataclass(frozen=True, slots=True, repr=False)
class Sampling:
    """How one answer is sampled. None, and an empty tuple, leave a matter to the back end."""

    max_tokens: int | None = None
    min_tokens: int | None = None
    n: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    stop_regex: tuple[str, ...] = ()
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    ignore_eos: bool | None = None
    return_logprob: bool | None = None
    logprob_start_len: int | None = None
    top_logprobs_num: int | None = None
    return_text_in_logprobs: bool | None = None
    dtype: str | None = None  # int, float, str or bool: see dtypes.py for what they look like
    regex: str | None = None
    json_schema: str | None = None

    def over(self, defaults: "Sampling") -> "Sampling":
        """These, and where they say nothing, the defaults. Which form an answer takes is one matter."""
        has_form = any(getattr(self, name) is not None for name in FORMS)
        values = {}
        for each in fields(self):
            value = getattr(self, each.name)
            is_left = (value is None or value == ()) and not (has_form and each.name in FORMS)
            values[each.name] = getattr(defaults, each.name) if is_left else value
        return Sampling(**values)

    def __repr__(self) -> str:
        said = ((each.name, getattr(self, each.name)) for each in fields(self))
        return f"Sampling({', '.join(f'{name}={value!r}' for name, value in said if value is not None and value != ())})"


@dataclass(frozen=True, slots=True)
class Prompt:
    """All that stands before an answer, as text and as turns: a back end takes the one it understands."""

    text: str
    messages: tuple[dict[str, Any], ...] = ()  # finished turns, in OpenAI's shape; pictures are image_url parts
    images: tuple[str, ...] = ()  # data: or http(s) URLs, in the order of their markers in `text`
    role: str | None = None  # whose turn is open
    opened: str = ""  # what stands in the open turn so far
    opened_images: tuple[str, ...] = ()  # those of `images` that are in the open turn


@dataclass(frozen=True, slots=True)
class Piece:
    """An answer, or what is new of a streamed one. `meta` is SGLang's meta_info, as of now."""

    text: str
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Chosen:
    """Which choice a select took. `meta` has SGLang's keys: normalized_prompt_logprobs, input_token_logprobs, ..."""

    decision: str
    meta: dict[str, Any] = field(default_factory=dict)


class ChoicesMethod(Protocol):
    """How a choice is taken from the log-probabilities of all; those there are, are in choices.py."""

    @property
    def requires_unconditional_logprobs(self) -> bool:
        """Whether the choices must be scored without the prompt as well."""

    @abstractmethod
    def __call__(
        self,
        *,
        choices: Sequence[str],
        normalized_prompt_logprobs: Sequence[float],
        input_token_logprobs: Sequence[Sequence[Any]],
        output_token_logprobs: Sequence[Sequence[Any]],
        unconditional_token_logprobs: Sequence[Sequence[Any]] | None = None,
    ) -> Chosen:
        """The choice taken. Each list has one entry per choice."""


class Roles(Protocol):
    """The pieces of text around the turns of a chat, for one model's template."""

    @property
    def image(self) -> str:
        """What marks a picture's place in the text of a prompt."""

    def begin(self, before: tuple[str, ...], role: str, *, is_written: bool = False) -> str:
        """Text that opens a turn after closed turns of the roles `before`. A default system message is part of it.

        `is_written`: the program says all of the turn itself, so that an assistant's opens as one that was said already.
        """

    def end(self, before: tuple[str, ...], role: str) -> str:
        """Text that closes it."""


class Backend(Protocol):
    """A model behind some interface. All methods run on the background loop."""

    async def roles(self) -> Roles:
        """How it writes turns. Called often: the answer is kept."""

    async def generate(self, prompt: Prompt, sampling: Sampling) -> list[Piece]:
        """The answers, one per choice (`n`). Cancelling the call aborts them."""

    def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncIterator[Piece]:
        """One answer as it comes. Closing the iterator aborts it."""

    async def choose(self, prompt: Prompt, choices: Sequence[str], temperature: float, method: ChoicesMethod) -> Chosen:
        """Which of the choices goes on from the prompt best, as `method` sees it."""

    async def cache_prefix(self, prompt: Prompt) -> None:
        """Computes the prompt, so that those which begin with it find it. May do nothing."""

    async def flush_cache(self) -> None:
        """Forgets all prefixes."""

    async def server_info(self) -> dict[str, Any]:
        """What the server says of itself."""

    async def model_info(self) -> dict[str, Any]:
        """What the server says of its model."""

    async def aclose(self) -> None:
        """Lets connections go."""


class Guesses(Protocol):
    """One program's text guessed ahead, where each answer is a paid call (SGLang's API speculation).

    With `whole_turns` the program hands over an assistant's turn when it ends, and its answers come together. Otherwise it tells
    what it writes between answers, and an answer is taken from the last guess where that went on as the program did.
    """

    @property
    def whole_turns(self) -> bool:
        """Whether answers of an assistant's turn are given at its end."""

    def wrote(self, text: str) -> None:
        """The program wrote this itself."""

    async def generate(self, prompt: Prompt, sampling: Sampling) -> Piece:
        """The next answer, from the guess or from a new one."""

    async def turn(self, prompt: Prompt, parts: Sequence["str | Sampling"]) -> list[Piece]:
        """A whole turn: its answers, one per Sampling among the parts, which stand in order."""


@runtime_checkable
class Guessing(Protocol):
    """A back end that can guess ahead: what `num_api_spec_tokens` of a program needs beside `Backend`."""

    def guesses(self, num_tokens: int) -> Guesses:
        """For one program; its answers may be guessed up to so many tokens ahead."""
