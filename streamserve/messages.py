"""Words shared by every layer: what a request asks, what it gets back. Plain frozen values, no behaviour beyond checks.

Owns the ranges of the sampling parameters. Knows nothing of HTTP, text or tensors.
"""

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from hashlib import shake_128
from math import isfinite
from typing import Any, NamedTuple

from msgspec import Struct
from msgspec.structs import replace as replaced

from streamserve.errors import InvalidRequest


class FinishReason(StrEnum):
    """Why a request ended."""

    STOP = "stop"  # end-of-sequence token, stop token or stop string
    LENGTH = "length"  # max_new_tokens reached
    ABORT = "abort"  # the client left or cancelled
    ERROR = "error"  # Delta.error says what happened


MAX_LOGPROBS = 20
MAX_LOGPROB_TOKEN_IDS = 256
MAX_LOGIT_BIAS = 1024


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is sampled. Raises InvalidRequest naming the field when a value is out of range.

    `max_new_tokens` None means: to the end of the context. `top_k` 0 (or -1 on input) is off. `logprobs` None is off,
    k >= 0 gives the chosen token's log-probability and the k best alternatives, from the model's own distribution
    (before temperature and penalties); `prompt_logprobs` the same for every prompt token from `prompt_logprobs_start` on, and
    what stands before that may come from the prefix cache. `logprob_token_ids` are tokens whose
    log-probability is wanted at every place of the answer beside these; they need `logprobs`.
    """

    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop_token_ids: frozenset[int] = field(default_factory=frozenset)
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_start: int = 0
    logprob_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.top_k == -1:
            object.__setattr__(self, "top_k", 0)
        for name, low, high in RANGES:
            value = getattr(self, name)
            if value is None:
                continue
            if not isfinite(value) or not low <= value <= high:
                raise InvalidRequest(f"{name} is {value}; allowed is {low:g} to {high:g}", param=name)
        if self.top_p == 0.0:
            raise InvalidRequest("top_p is 0; allowed is above 0 up to 1", param="top_p")
        if self.repetition_penalty == 0.0:
            raise InvalidRequest("repetition_penalty is 0; allowed is above 0 up to 2", param="repetition_penalty")
        if len(self.logprob_token_ids) > MAX_LOGPROB_TOKEN_IDS:
            raise InvalidRequest(
                f"logprob_token_ids has {len(self.logprob_token_ids)} entries; at most {MAX_LOGPROB_TOKEN_IDS} are allowed",
                param="logprob_token_ids",
            )
        assert self.logprobs is not None or not self.logprob_token_ids
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequest(
                f"logit_bias has {len(self.logit_bias)} entries; at most {MAX_LOGIT_BIAS} are allowed", param="logit_bias"
            )
        for token_id, bias in self.logit_bias:
            if not isfinite(bias) or not -100 <= bias <= 100:
                raise InvalidRequest(f"logit_bias of token {token_id} is {bias}; allowed is -100 to 100", param="logit_bias")

    @property
    def is_greedy(self) -> bool:
        """Temperatures below 1e-6 mean: take the best token."""
        return self.temperature < 1e-6 or self.top_k == 1


RANGES: tuple[tuple[str, float, float], ...] = (
    ("max_new_tokens", 1, 10_000_000),
    ("min_new_tokens", 0, 10_000_000),
    ("temperature", 0.0, 100.0),
    ("top_p", 0.0, 1.0),
    ("top_k", 0, 10_000_000),
    ("min_p", 0.0, 1.0),
    ("frequency_penalty", -2.0, 2.0),
    ("presence_penalty", -2.0, 2.0),
    ("repetition_penalty", 0.0, 2.0),
    ("seed", -(2**63), 2**63 - 1),
    ("logprobs", 0, MAX_LOGPROBS),
    ("prompt_logprobs", 0, MAX_LOGPROBS),
    ("prompt_logprobs_start", 0, 10_000_000),
)
assert {name for name, _, _ in RANGES} <= {f.name for f in fields(SamplingParams)}


@dataclass(frozen=True, slots=True)
class ThoughtLimits:
    """How reasoning before an answer is found among its tokens, and how long it may be.

    `begin` and `end` are the markers as bytes of the generated text. `is_open`: the prompt ends inside the thought, so no `begin`
    comes. `end_ids` are the tokens that end it when `max_tokens` (tokens of thought; None: no limit) are spent, or when
    the client asks for it.
    """

    begin: bytes
    end: bytes
    end_ids: tuple[int, ...]
    is_open: bool = False
    max_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Guidance:
    """What the engine sees to while an answer is sampled, beside sampling itself.

    `grammar`: what the answer must match, in llguidance's notation: Lark text, or JSON text of `{"grammars": [...]}`. It holds
    from the end of the thought on, where there is one. `param` is the request's field to name when the grammar does not
    compile. `may_jump`: tokens that the grammar leaves no choice about are appended without a step of their own (jump-forward).
    """

    grammar: str | None = None
    param: str = "response_format"
    may_jump: bool = True
    thought: ThoughtLimits | None = None


MEDIA_BASE = 1 << 30  # ids from here on stand for places of pictures, not for words: no vocabulary reaches so far


def media_token_ids(key: bytes, count: int) -> tuple[int, ...]:
    """The ids that stand in a prompt for `count` embeddings of the media with this key: 30 bits each out of its hash, so that the
    prefix tree finds the same picture again like text, and two pictures differ from their first place on."""
    words = array("I", shake_128(key).digest(4 * count))
    assert words.itemsize == 4
    return tuple([MEDIA_BASE | word & (MEDIA_BASE - 1) for word in words])


class Run(NamedTuple):
    """Neighbouring places of a prompt that embeddings of one picture fill. `grid`: frames, rows and columns that they are, for
    models whose positions have three numbers (M-RoPE); None where places count like tokens. `frame_step`: how far the numbers of
    neighbouring frames lie apart."""

    num_tokens: int
    grid: tuple[int, int, int] | None = None
    frame_step: float = 1.0


@dataclass(frozen=True, slots=True)
class Layout:
    """What stands in a prompt for one picture: `text`, in which the model's image token is written once for each place, and the
    runs that those places make up, in order. For a model without an image token the text is empty: the places stand alone."""

    text: str
    runs: tuple[Run, ...]

    @property
    def num_tokens(self) -> int:
        """Places, which is embeddings."""
        return sum(run.num_tokens for run in self.runs)


class Span(NamedTuple):
    """A run, and where in the prompt it begins."""

    start: int
    num_tokens: int
    grid: tuple[int, int, int] | None = None
    frame_step: float = 1.0

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


IMAGE, VIDEO, AUDIO = "image", "video", "audio"  # kinds of media; a video counts as a picture once it is prepared


@dataclass(frozen=True, slots=True, eq=False)
class Media:
    """A picture (or clip, or sound) of a prompt, as it crosses the seam. Places of `spans`, in order, take its embeddings, in
    order; the prompt has media_token_ids(key) there.

    `key` says what the embeddings depend on: contents and preparation. `inputs`: arrays for the model's encoder. `cost`: how many
    tokens of the language model take about as long as encoding it.
    """

    key: bytes
    spans: tuple[Span, ...]
    inputs: Mapping[str, Any]
    cost: int = 0
    kind: str = IMAGE

    @property
    def num_tokens(self) -> int:
        """Embeddings."""
        return sum(span.num_tokens for span in self.spans)


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One sampled sequence, as it crosses the seam between API and engine: token ids, never text.

    `id` is unique among live requests of one engine. `salt` separates prefix-cache namespaces: requests with different
    salts never share cached tokens. `priority`: of waiting requests higher ones run first, in order of arrival among equals.
    `wants_progress`: a delta after each part of a prompt that takes several steps. `prediction`: what the client expects much of
    the answer to be; it makes the answer faster where it is right, and changes nothing where not (speculative decoding). `media`
    in order of their places.
    """

    id: str
    token_ids: tuple[int, ...]
    sampling: SamplingParams = SamplingParams()
    salt: str = ""
    guidance: Guidance | None = None
    priority: int = 0
    wants_progress: bool = False
    prediction: tuple[int, ...] = ()
    media: tuple[Media, ...] = ()


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probability of one token and of the best alternatives: `top` holds (token id, logprob), best first; `asked` the same of
    the request's logprob_token_ids, in their order."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    asked: tuple[tuple[int, float], ...] = ()


class Delta(Struct, frozen=True, gc=False):
    """What a client receives from one or several merged steps.

    `token_ids` includes a final stop token (the text layer hides it). `logprobs` is parallel to `token_ids` when asked
    for, else empty. `num_cached_tokens` (prompt tokens taken from the prefix cache) is right from the first delta on.
    `prompt_logprobs` has one entry per prompt token, None for the first and for those before `prompt_logprobs_start`; set on
    the first delta only.
    `matched_stop` is the token id that ended the request. After a delta with `finish_reason` nothing follows. `num_jumped` counts
    the answer's tokens so far that cost no step of their own; `num_thought` those of its thought. A delta without tokens and
    without an end says how much of the prompt is computed: `num_computed`, cached tokens included.
    `is_grammar_error`: what `error` says is the doing of the request's own grammar. Of the answer's tokens so far `num_accepted`
    were guessed before they were sampled, out of `num_drafted` guesses; `accepted` says which of `token_ids` were, where any was,
    and `jumped` which of them a grammar forced.

    Made for every row of every step, so it is a Struct: a frozen dataclass takes ten times as long to make.
    """

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    matched_stop: int | None = None
    error: str | None = None
    num_jumped: int = 0
    num_thought: int = 0
    is_grammar_error: bool = False
    num_computed: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    accepted: tuple[bool, ...] = ()  # parallel to token_ids, or empty
    queued_s: float = 0.0  # how long the request waited before its prompt was begun; on the first delta with tokens only
    jumped: tuple[bool, ...] = ()  # parallel to token_ids, or empty

    @staticmethod
    def merged(deltas: Sequence["Delta"]) -> "Delta":
        """Deltas that followed each other (at least one) as one. What is not joined is as the last one says."""
        last = deltas[-1]
        if len(deltas) == 1:
            return last
        token_ids: list[int] = []
        is_plain = True  # as nearly always: nothing but tokens is to be joined
        for delta in deltas:
            token_ids += delta.token_ids
            if delta.logprobs or delta.accepted or delta.jumped or delta.queued_s or delta.prompt_logprobs is not None:
                is_plain = False
        if is_plain:
            return replaced(last, token_ids=tuple(token_ids))
        return replaced(
            last,
            token_ids=tuple(token_ids),
            logprobs=tuple([entry for delta in deltas for entry in delta.logprobs]),
            prompt_logprobs=next((delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None), None),
            accepted=_joined_marks([(delta.accepted, len(delta.token_ids)) for delta in deltas]),
            queued_s=max([delta.queued_s for delta in deltas]),
            jumped=_joined_marks([(delta.jumped, len(delta.token_ids)) for delta in deltas]),
        )


def _joined_marks(parts: Sequence[tuple[tuple[bool, ...], int]]) -> tuple[bool, ...]:
    """Marks of so many tokens each, where there are any, as one."""
    if not any(marks for marks, _ in parts):
        return ()
    return tuple([mark for marks, num_tokens in parts for mark in marks or (False,) * num_tokens])


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """The engine's load at one moment: requests and KV tokens."""

    running: int = 0
    waiting: int = 0
    free_tokens: int = 0
    evictable_tokens: int = 0
    total_tokens: int = 0


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What the API needs to know of an engine to check a request before it is submitted.

    `context_len` is the most tokens (prompt and answer) one request may hold: the model's limit or what the KV memory
    allows, whichever is less. `uses_predictions`: whether a request's prediction makes a difference to its speed. `takes_media`:
    whether requests may have pictures. `max_running`: how many requests run at once; 0: nobody said.
    """

    context_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    page_size: int
    is_healthy: bool = True
    is_ready: bool = True
    load: EngineLoad = EngineLoad()
    uses_predictions: bool = True
    takes_media: bool = False
    max_running: int = 0


@dataclass(frozen=True, slots=True)
class PrefixSummary:
    """One node of the prefix tree as an operator sees it."""

    num_tokens: int  # length of the whole prefix down to this node
    num_requests: int  # running requests that hold it
    hits: int
    age_s: float
    first_token_ids: tuple[int, ...]  # at most 16; for a preview


@dataclass(frozen=True, slots=True)
class NodeSummary:
    """One node of the prefix tree by itself. `id` names the prefix that ends with it while it lives; `parent` 0 is the root.

    `num_tokens` are its own, `end` counts those down to its end. `num_requests` (running) and `num_pins` stand at it or below.
    """

    id: int
    parent: int
    num_tokens: int
    end: int
    num_pages: int
    num_requests: int
    num_pins: int
    is_pinned: bool
    hits: int
    age_s: float  # since a request let go of it; 0 while one holds it
    num_children: int
    is_salted: bool
    first_token_ids: tuple[int, ...]


class MatchEnd(StrEnum):
    """Why the cache knows no more of a prompt."""

    COMPLETE = "complete"  # it knows all that it may: the last token is always computed
    DIFFERS = "differs"  # it goes on, but with other tokens
    EVICTED = "evicted"  # it went on until lately
    NEW = "new"  # nothing of what follows was computed, or that is long forgotten
    OTHER_SALT = "other_salt"  # more is known under another salt
    PICTURE = "picture"  # it ends inside a picture, which this model computes whole or not at all
    OFF = "off"  # nothing is kept


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """What the cache knows of a prompt: `num_tokens` of it, in these nodes from the top. `other` is the token that it has where
    the prompt differs, if that is one."""

    num_tokens: int
    path: tuple[int, ...]
    end: MatchEnd
    other: int | None = None


@dataclass(frozen=True, slots=True)
class PinSummary:
    """What pins hold of the memory, and how many had to be given up for a request that needed more."""

    num_pins: int = 0
    pinned_tokens: int = 0
    max_pinned_tokens: int = 0
    num_given_up: int = 0


class StepRecord(NamedTuple):
    """What a step was, in numbers. Made for every step, so it is a tuple.

    `time_s` on the engine's clock is when it was taken in, `ms` how long after the one before (or after its start on an idle
    engine). Of its rows `decode_rows` were answers', `prompt_rows` parts of prompts with `prompt_tokens`. From `running` on it is
    the state behind it: requests, KV tokens, and prompt tokens that were asked for and found since the start.
    """

    step: int
    time_s: float
    ms: float
    decode_rows: int
    prompt_rows: int
    prompt_tokens: int
    drafted: int
    accepted: int
    encodes: int
    jumped: int
    preemptions: int
    running: int
    waiting: int
    used_tokens: int
    evictable_tokens: int
    free_tokens: int
    prompt_tokens_seen: int
    prompt_tokens_hit: int


@dataclass(frozen=True, slots=True)
class RequestSummary:
    """A live request as an operator sees it. `num_computed` of its tokens are in KV memory, found ones included; `age_s` since it
    was submitted."""

    id: str
    is_running: bool
    num_prompt: int
    num_computed: int
    num_cached: int
    num_generated: int
    age_s: float


@dataclass(frozen=True, slots=True)
class CacheSummary:
    """The prefix cache at one moment. Rates are over all prompts since the start."""

    num_nodes: int = 0
    cached_tokens: int = 0
    evictable_tokens: int = 0
    free_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_seen: int = 0
    prompt_tokens_hit: int = 0
    top_prefixes: tuple[PrefixSummary, ...] = ()
    pins: PinSummary = PinSummary()

    @property
    def hit_rate(self) -> float:
        """Share of prompt tokens that came from the cache."""
        return self.prompt_tokens_hit / self.prompt_tokens_seen if self.prompt_tokens_seen else 0.0


@dataclass(frozen=True, slots=True)
class EncoderInput:
    """One sequence for an encoder. From token `second_from` on it is the second text of a pair; None: there is one text."""

    token_ids: tuple[int, ...]
    second_from: int | None = None


@dataclass(frozen=True, slots=True)
class EncoderFacts:
    """What the API needs to know of an encoder. One with `labels` classifies (a single label: a score for a pair of texts);
    `is_squashed`: each class goes through a sigmoid by itself. One without gives vectors of `dimension` numbers, of length 1 if
    `is_normalised`.
    """

    max_len: int
    vocab_size: int
    dimension: int = 0
    is_normalised: bool = False
    labels: tuple[str, ...] = ()
    is_squashed: bool = False
