"""One API request while it generates: its engine requests, their tokens turned into text, and how they end.

Owns text so far, held-back stop text and what was counted, per choice. Stop strings, n > 1 and several prompts exist
only here: the engine sees single sequences of token ids. Where a call has a Reading (api/answer.py), a piece's text is the
answer's content, and thoughts and calls stand in its events. Knows nothing of HTTP, JSON or message formats.
"""

from asyncio import Future, get_running_loop
from collections.abc import Awaitable, Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import groupby
from operator import itemgetter
from time import monotonic
from typing import NamedTuple, Protocol
from uuid import uuid4

from anyio import create_task_group
from msgspec import Struct

from streamserve.api.answer import TOOL_CALLS, AnswerReader, Content, Event, Reading, Thought
from streamserve.api.wire import one_error
from streamserve.engine.client import EngineClient, Mailbox
from streamserve.errors import DeadlineExceeded, GrammarFailed, StepFailed
from streamserve.messages import (
    AUDIO,
    IMAGE,
    Delta,
    FinishReason,
    GenerateRequest,
    Guidance,
    Media,
    SamplingParams,
    TokenLogprobs,
)
from streamserve.text.answers import Answers
from streamserve.text.detokenizer import Detokenizer
from streamserve.text.stop_patterns import StopPatterns
from streamserve.text.stops import Stops, stops_in
from streamserve.text.tokenizer import Tokenizer

SEED_SPAN = 1 << 64
# Set where others go first: what every choice of a run that is made there waits for before it goes to the engine.
TURN: ContextVar[Callable[[], Awaitable[None]] | None] = ContextVar("TURN", default=None)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Token ids, the text to repeat in front of the answer when `echo` asks for it, and the pictures in it, in order."""

    token_ids: tuple[int, ...]
    echo: str | None = None
    media: tuple[Media, ...] = ()

    @property
    def num_media_tokens(self) -> int:
        """Of the tokens those that are places of pictures and sounds."""
        return self.num_tokens_of(*{media.kind for media in self.media})

    def num_tokens_of(self, *kinds: str) -> int:
        """Of the tokens those that are places of these kinds of media."""
        return sum(media.num_tokens for media in self.media if media.kind in kinds)


@dataclass(frozen=True, slots=True)
class Call:
    """A checked API request: what to generate, `n` times for each prompt, and what of it to show.

    `client_id` is the name the client gave it, for /abort; it need not be unique. `keeps_stop`: the text that stopped
    a choice stays in its text. `drops_output`: only the prompt is wanted (echo with max_tokens 0). `scores_stop`: a final stop
    token has its log-probability too, though no text; not with a `reading`: how thoughts and calls are found in the answers
    (None: there are none). `deadline_s`: how long after its start the call may take. `prediction`: what much of each answer is
    expected to be. `wants_marks`: which parts of a text were guessed, or forced by a grammar, is to be shown.
    """

    id: str
    prompts: tuple[Prompt, ...]
    sampling: SamplingParams
    n: int = 1
    stops: tuple[str, ...] = ()
    stop_patterns: StopPatterns | None = None
    keeps_stop: bool = False
    skips_special: bool = True
    drops_output: bool = False
    scores_stop: bool = False
    salt: str = ""
    is_chat: bool = False
    client_id: str | None = None
    reading: Reading | None = None
    guidance: Guidance | None = None
    priority: int = 0
    deadline_s: float | None = None
    wants_progress: bool = False
    prediction: tuple[int, ...] = ()
    wants_marks: bool = False

    def is_named(self, prefix: str) -> bool:
        """Whether the call's own id, or the name its client gave it, starts with `prefix`."""
        return self.id.startswith(prefix) or (self.client_id is not None and self.client_id.startswith(prefix))


@dataclass(frozen=True, slots=True)
class Progress:
    """How much of a choice's prompt is computed; `cached` tokens of it did not have to be."""

    index: int
    computed: int
    total: int
    cached: int

    def as_json(self) -> dict[str, int]:
        """For clients: llama.cpp's names."""
        return {"index": self.index, "processed": self.computed, "total": self.total, "cache": self.cached}


class Mark(NamedTuple):
    """A part of a text: whether it was guessed before it was sampled, or was not sampled since a grammar left no choice."""

    text: str
    is_drafted: bool = False
    is_forced: bool = False


class Piece(Struct, gc=False):
    """What one choice gained since the last piece. `logprobs` belongs to `text` (see Call.scores_stop), `token_ids` includes a
    final stop token.

    `events` is set where the call has a reading: content, thoughts and calls in order; `text` is the content among them.
    `marks`, where the call wants them: the text in parts, and what was behind each.
    """

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: str | None = None
    matched_stop: int | str | None = None
    prompt: Prompt | None = None  # set on a choice's first piece
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    events: tuple[Event, ...] | None = None
    marks: tuple[Mark, ...] = ()
    progress: Progress | None = None  # then there is nothing else, and it goes to Run.on_progress


def events_of(piece: Piece) -> tuple[Event, ...]:
    """A piece's events, whether its call has a reading or not."""
    if piece.events is None:
        return (Content(piece.text),) if piece.text else ()
    return piece.events


class Usage(Struct, frozen=True, gc=False):
    """Tokens of a call. Each prompt counts once, whatever n is. `jumped_tokens` of the answer cost no step of their own. Of
    `drafted_tokens`, guesses of what would come, `accepted_tokens` stand in the answer. `image_tokens` of the prompts are places
    of their `num_images` pictures, `audio_tokens` of their sounds.

    Made for every token where a client wants it beside each, so it is a Struct, as Delta is."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int = 0
    jumped_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    image_tokens: int = 0
    num_images: int = 0
    audio_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time of a call went. `queue_s` its first choice waited; `prompt_s` later came the first tokens, `num_first` of
    them; `predicted_s` later the last. Choices side by side share these times. `num_cached` tokens of the prompts were found,
    `num_computed` were not."""

    queue_s: float
    prompt_s: float
    predicted_s: float
    num_cached: int
    num_computed: int
    num_predicted: int
    num_first: int
    num_drafted: int
    num_accepted: int


class Choice:
    """One sequence: engine deltas in, pieces of text out."""

    __slots__ = (
        "_call",
        "_detokenizer",
        "_is_first",
        "_is_plain",
        "_last",
        "_num_cut",
        "_reader",
        "_stops",
        "_unplaced",
        "first_s",
        "index",
        "is_finished",
        "last_s",
        "mailbox",
        "num_first",
        "num_tokens",
        "prompt",
        "queued_s",
        "request",
    )

    def __init__(self, call: Call, index: int, tokenizer: Tokenizer) -> None:
        nth = index % call.n
        self._call = call
        self._stops = stops_in(call.stops, call.stop_patterns, include_stop=call.keeps_stop)
        self._is_first = True
        self._is_plain = False  # begun, and nothing but text is made of its tokens
        self.index = index
        self.prompt = call.prompts[index // call.n]
        reading = call.reading
        self._reader = None if reading is None else AnswerReader(reading)
        self._unplaced: list[tuple[TokenLogprobs, str]] = []  # tokens not yet known to be content, and their text
        self._detokenizer = Detokenizer(
            tokenizer,
            skip_special_tokens=call.skips_special,
            prompt_ids=self.prompt.token_ids,
            shows=frozenset() if reading is None else reading.marker_ids,
        )
        self.request = GenerateRequest(
            f"{call.id}-{index}",
            self.prompt.token_ids,
            _nth_sampling(call.sampling, nth),
            call.salt,
            call.guidance,
            call.priority,
            call.wants_progress,
            call.prediction,
            self.prompt.media,
        )
        self.mailbox: Mailbox | None = None
        self.is_finished = False
        self.num_tokens = 0
        self.queued_s = 0.0  # how long it waited for its turn
        self.first_s = self.last_s = 0.0  # when its first tokens came, num_first of them, and its last
        self.num_first = 0
        self._last: Delta | None = None
        self._num_cut = 0  # tokens that were guessed rightly, but stand behind the answer's end

    @property
    def num_cached(self) -> int | None:
        """Prompt tokens from the cache; unknown until something arrives."""
        return None if self._last is None else self._last.num_cached_tokens

    @property
    def num_jumped(self) -> int:
        """Tokens of the answer that cost no step of their own."""
        # The answer may end among them, at a stop string or behind its only call.
        return 0 if self._last is None else min(self._last.num_jumped, self.num_tokens)

    @property
    def num_drafted(self) -> int:
        """Guesses of the answer's tokens."""
        return 0 if self._last is None else self._last.num_drafted

    @property
    def num_accepted(self) -> int:
        """Tokens of the answer that were guessed."""
        return 0 if self._last is None else min(self._last.num_accepted - self._num_cut, self.num_tokens)

    @property
    def num_thought(self) -> int:
        """Tokens of the answer's thought."""
        return 0 if self._last is None else self._last.num_thought

    def take(self, delta: Delta) -> Piece:
        """Turn what arrived into text. Raises StepFailed or GrammarFailed when the engine ended this request with an error."""
        if self._is_plain and delta.finish_reason is None and delta.token_ids:  # as nearly always
            self._last = delta
            token_ids = delta.token_ids
            self.num_tokens += len(token_ids)
            return Piece(self.index, self._detokenizer.push(token_ids), token_ids, delta.logprobs)
        call, piece = self._call, Piece(self.index)
        if delta.finish_reason is None:
            if not delta.token_ids:
                piece.progress = Progress(self.index, delta.num_computed, len(self.prompt.token_ids), delta.num_cached_tokens)
                return piece
        else:
            if delta.finish_reason is FinishReason.ERROR:
                self.is_finished = True
                message, guidance = delta.error or "the engine failed this request", call.guidance
                if delta.is_grammar_error and guidance is not None:
                    raise GrammarFailed(message, param=guidance.param)
                raise StepFailed(message)
            piece.finish_reason = delta.finish_reason.value
            piece.matched_stop = delta.matched_stop
        self._last = delta
        if self._is_first:
            self._is_first = False
            self._is_plain = not (call.reading or call.stops or call.stop_patterns or call.drops_output or call.wants_marks)
            self.queued_s = delta.queued_s
            piece.prompt = self.prompt
            piece.prompt_logprobs = delta.prompt_logprobs
        if call.drops_output:
            self._drop(piece)
        elif call.wants_marks:
            self._take_marked(delta, piece)
        else:
            self._take(delta, piece)
        if delta.accepted:
            self._num_cut = sum(delta.accepted[len(piece.token_ids) :])
        if piece.prompt is not None and self.prompt.echo is not None:
            piece.text = self.prompt.echo + piece.text
            piece.marks = (Mark(self.prompt.echo), *piece.marks) if piece.marks else ()
        self.is_finished = piece.finish_reason is not None
        return piece

    def _take(self, delta: Delta, piece: Piece) -> None:
        if self._reader is not None:
            self._take_read(delta, piece, self._reader)
        elif self._stops is None:
            self._take_all(delta, piece)
        else:
            self._take_until_stop(delta, piece, self._stops)

    def _take_marked(self, delta: Delta, piece: Piece) -> None:
        """As if what was guessed, what was forced and the rest had come one after the other. Text that waits, for the rest of a
        character or to see whether a stop string follows, has the mark of the token that brings it."""
        whole = Collected(self.index)
        marks: list[Mark] = []
        for part, is_accepted, is_forced in _parts_of(delta):
            gained = Piece(self.index)
            if part.finish_reason is not None:
                gained.finish_reason, gained.matched_stop = piece.finish_reason, piece.matched_stop
            self._take(part, gained)
            whole.add(gained)
            if gained.text:
                marks.append(Mark(gained.text, is_accepted, is_forced))
            if gained.finish_reason is not None:
                break
        gained = whole.as_piece()
        piece.text, piece.token_ids, piece.logprobs, piece.events = gained.text, gained.token_ids, gained.logprobs, gained.events
        piece.finish_reason, piece.matched_stop, piece.marks = gained.finish_reason, gained.matched_stop, tuple(marks)

    def _drop(self, piece: Piece) -> None:
        if piece.finish_reason == FinishReason.STOP:
            piece.finish_reason, piece.matched_stop = FinishReason.LENGTH.value, None

    def _shown(self, delta: Delta) -> int:
        """How many of the delta's tokens may be text: all but the stop token."""
        is_hidden = delta.matched_stop is not None and not self._call.keeps_stop
        if is_hidden and self._call.reading is not None and delta.matched_stop in self._call.reading.marker_ids:
            is_hidden = False  # a marker that ends the answer too, as the end of a call does in some formats
        return len(delta.token_ids) - is_hidden

    def _take_all(self, delta: Delta, piece: Piece) -> None:
        token_ids, piece.logprobs = delta.token_ids, delta.logprobs
        piece.token_ids = token_ids
        self.num_tokens += len(token_ids)
        if delta.finish_reason is None:
            piece.text = self._detokenizer.push(token_ids)
            return
        shown = self._shown(delta)
        piece.text = self._detokenizer.push(token_ids[:shown]) + self._detokenizer.finish()
        if not self._call.scores_stop:
            piece.logprobs = delta.logprobs[:shown]

    def _take_until_stop(self, delta: Delta, piece: Piece, stops: Stops) -> None:
        """Token by token, so that the count ends with the token that completed the stop string."""
        shown = self._shown(delta)
        parts: list[str] = []
        for used, token in enumerate(delta.token_ids[:shown], 1):
            text = self._detokenizer.push((token,))
            if self.num_tokens + used > self._call.sampling.min_new_tokens:
                text, _ = stops.push(text)
            parts.append(text)
            if stops.matched is not None:
                piece.token_ids, piece.logprobs = delta.token_ids[:used], delta.logprobs[:used]
                break
        else:
            piece.token_ids = delta.token_ids
            piece.logprobs = delta.logprobs if self._call.scores_stop else delta.logprobs[:shown]
            if delta.finish_reason is not None:
                parts += [stops.push(self._detokenizer.finish())[0], stops.flush()]
        if stops.matched is not None:
            piece.finish_reason, piece.matched_stop = FinishReason.STOP.value, stops.matched
        piece.text = "".join(parts)
        self.num_tokens += len(piece.token_ids)

    def _take_read(self, delta: Delta, piece: Piece, reader: AnswerReader) -> None:
        """Through the reader: all at once, or token by token where something depends on the very token: a stop string, the end of
        the last call, log-probabilities."""
        push, stops = self._detokenizer.push, self._stops
        if stops is None and piece.finish_reason is None and not delta.logprobs and not reader.may_end:  # as nearly always
            gained = reader.push(push(delta.token_ids))
            piece.token_ids, piece.events, piece.text = delta.token_ids, tuple(gained), _content_of(gained)
            self.num_tokens += len(delta.token_ids)
            return
        shown = self._shown(delta)
        events: list[Event] = []
        used = len(delta.token_ids)
        logprobs: list[TokenLogprobs] = []
        if stops is None and not delta.logprobs and not reader.may_end:
            events += reader.push(push(delta.token_ids[:shown]))
        else:
            for index, token in enumerate(delta.token_ids[:shown]):
                text = push((token,))
                gained = reader.push(text)
                if stops is not None and self.num_tokens + index + 1 > self._call.sampling.min_new_tokens:
                    gained = _until_stop(gained, stops)
                if delta.logprobs:
                    self._unplaced.append((delta.logprobs[index], text))
                    logprobs += self._placed(gained)
                events += gained
                if reader.is_over or (stops is not None and stops.matched is not None):
                    used = index + 1
                    break
        piece.token_ids = delta.token_ids[:used]
        if stops is not None and stops.matched is not None:
            piece.finish_reason, piece.matched_stop = reader.finish(FinishReason.STOP.value)[1], stops.matched
        elif reader.is_over:
            piece.finish_reason, piece.matched_stop = TOOL_CALLS, None
        elif piece.finish_reason is not None:
            rest = reader.push(self._detokenizer.finish())
            held, ended = reader.finish(FinishReason.STOP.value)
            rest += held
            if piece.finish_reason == FinishReason.STOP:
                piece.finish_reason = ended
            if stops is not None:
                rest = _until_stop(rest, stops)
                if text := stops.flush():
                    rest.append(Content(text))
                if stops.matched is not None:
                    piece.finish_reason, piece.matched_stop = ended, stops.matched
            logprobs += self._placed(rest)
            events += rest
        piece.events, piece.text = tuple(events), _content_of(events)
        piece.logprobs = tuple(logprobs)
        self.num_tokens += used

    def _placed(self, events: list[Event]) -> list[TokenLogprobs]:
        """Of the tokens whose place was open, those that these events show to be content. A token is where its text is; one that
        the reader holds back stays open."""
        found: list[TokenLogprobs] = []
        for event in events:
            if type(event) is not Content and type(event) is not Thought:
                self._unplaced = []  # a call's, or its marker's
                continue
            text, waiting = event.text, self._unplaced
            start = "".join([piece for _, piece in waiting]).find(text)
            if start < 0:  # part of it came with a token that has its place already, or a marker was left out of it
                start = max(0, sum(len(piece) for _, piece in waiting) - len(text))
            end, at = start + len(text), 0
            self._unplaced = []
            for entry, piece in waiting:
                if at >= end:
                    self._unplaced.append((entry, piece))
                elif type(event) is Content and at + len(piece) > start - (not piece):  # part of a character has no text yet
                    found.append(entry)
                at += len(piece)
        return found


def _parts_of(delta: Delta) -> Iterator[tuple[Delta, bool, bool]]:
    """A delta cut where its tokens' marks change: whether those of a part were accepted guesses, or forced."""
    if not (delta.accepted or delta.jumped):
        yield delta, False, False
        return
    start, none = 0, (False,) * len(delta.token_ids)
    for (is_accepted, is_forced), run in groupby(zip(delta.accepted or none, delta.jumped or none, strict=True)):
        end = start + sum(1 for _ in run)
        is_last = end == len(delta.token_ids)
        yield (
            Delta(
                delta.token_ids[start:end],
                delta.logprobs[start:end],
                finish_reason=delta.finish_reason if is_last else None,
                matched_stop=delta.matched_stop if is_last else None,
            ),
            is_accepted,
            is_forced,
        )
        start = end


def _content_of(events: list[Event]) -> str:
    return "".join([event.text for event in events if type(event) is Content])


def _until_stop(events: list[Event], stops: Stops) -> list[Event]:
    """The events before a stop string in their content. What is held back comes before a thought or a call at the latest."""
    kept: list[Event] = []
    for event in events:
        is_content = type(event) is Content
        text = stops.push(event.text)[0] if type(event) is Content else stops.flush()
        if text:
            kept.append(Content(text))
        if stops.matched is not None:
            break
        if not is_content:
            kept.append(event)
    return kept


def _nth_sampling(sampling: SamplingParams, nth: int) -> SamplingParams:
    """Choices of one prompt differ, and are the same again for the same seed."""
    if sampling.seed is None or nth == 0:
        return sampling
    return replace(sampling, seed=(sampling.seed + nth + SEED_SPAN // 2) % SEED_SPAN - SEED_SPAN // 2)


class Watch(Protocol):
    """Is told when tokens arrive."""

    def first_token(self, seconds: float) -> None:
        """The first token of a choice came `seconds` after its submission."""
        ...

    def next_tokens(self, num_tokens: int, seconds: float) -> None:
        """Later tokens came `seconds` after the ones before."""
        ...


Emit = Callable[[Piece], Awaitable[None] | None]  # None: taken; else to be awaited before the choice's next piece


class Pace:
    """How often streams may send where `--send-interval-ms` says so. One object for all streams of a server.

    Without an interval nothing is held back: the mailboxes' turns (engine/client.py) make streams send less often exactly
    while the loop has no time. Each stream has its own phase, so that their sends spread over the interval.
    """

    __slots__ = ("_interval_s", "_now", "_num_streams")

    def __init__(self, interval_ms: float | None = None, *, now: Callable[[], float] = monotonic) -> None:
        self._interval_s = (interval_ms or 0.0) / 1000
        self._now = now
        self._num_streams = 0

    def new_phase(self) -> float:
        """A stream's place in the interval, 0 to 1; far from those of the streams before (steps of the golden ratio)."""
        self._num_streams += 1
        return self._num_streams * 0.6180339887 % 1.0

    @property
    def has_pauses(self) -> bool:
        """Whether there is an interval."""
        return self._interval_s > 0

    def pause_s(self, phase: float) -> float:
        """How long a stream that has just sent should let its tokens merge; 0 without an interval."""
        interval_s = self._interval_s
        return interval_s and interval_s - (self._now() - phase * interval_s) % interval_s


class Run:
    """A call on its way through the engine."""

    __slots__ = (
        "_answers",
        "_client",
        "_is_cancelled",
        "_limit_s",
        "_num_media",
        "_pace",
        "_started_s",
        "_submitted_s",
        "_turn",
        "_watch",
        "call",
        "choices",
        "on_progress",
        "outcome",
    )

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer,
        call: Call,
        watch: Watch | None = None,
        answers: Answers | None = None,
        pace: Pace | None = None,
    ) -> None:
        self._client = client
        self._pace = pace or Pace(0.0)
        self._answers = answers if call.is_chat else None
        self._watch = watch
        self._turn = TURN.get()
        self._is_cancelled = False
        self._limit_s: float | None = None  # the time that was allowed, once it is over
        self._started_s = self._submitted_s = 0.0
        self.on_progress: Callable[[Progress], Awaitable[None] | None] | None = None
        self.outcome = FinishReason.ABORT.value  # until a choice has finished
        self.call = call
        self.choices = [Choice(call, index, tokenizer) for index in range(len(call.prompts) * call.n)]
        self._num_media = (  # as the last fields of Usage
            sum([prompt.num_tokens_of(IMAGE) for prompt in call.prompts]),
            sum([media.kind == IMAGE for prompt in call.prompts for media in prompt.media]),
            sum([prompt.num_tokens_of(AUDIO) for prompt in call.prompts]),
        )

    async def start(self) -> None:
        """Submit every choice, before anything was answered; where each waits for its turn, `deliver` does. Raises what `submit`
        raises, leaving nothing behind."""
        self._started_s = monotonic()
        try:
            for choice in self.choices if self._turn is None else ():
                await self._submit(choice)
        except BaseException:
            self.abort()
            raise
        if self._is_cancelled:
            self.abort()

    async def _submit(self, choice: Choice) -> Mailbox:
        mailbox = choice.mailbox = await self._client.submit(choice.request)
        self._submitted_s = self._submitted_s or monotonic()  # its grammar is compiled: from here on it waits or runs
        return mailbox

    async def _submitted(self, choice: Choice) -> Mailbox:
        """The choice's mailbox, which it has when it had its turn."""
        if choice.mailbox is not None:
            return choice.mailbox
        assert self._turn is not None, "start() comes first"
        if not self._is_cancelled:
            await self._turn()
        mailbox = await self._submit(choice)
        if self._is_cancelled:
            self._client.abort(choice.request.id)
        return mailbox

    def abort(self) -> None:
        """End what is not finished, now: its pages are free for the next plan. Choices still get their last piece."""
        self._is_cancelled = True
        for choice in self.choices:
            if not choice.is_finished:
                self._client.abort(choice.request.id)

    def _tell(self, progress: Progress) -> Awaitable[None] | None:
        return None if self.on_progress is None else self.on_progress(progress)

    def end_thought(self) -> int:
        """End the reasoning of every choice that is still at it; returns how many that were."""
        return sum(self._client.end_thought(choice.request.id) for choice in self.choices if not choice.is_finished)

    def expire(self, limit_s: float) -> None:
        """The time for the answer is over: what is not finished is aborted, and `deliver` will raise DeadlineExceeded."""
        if not all(choice.is_finished for choice in self.choices):
            self._limit_s = limit_s
            self.abort()

    async def deliver(self, emit: Emit) -> None:
        """Hand every piece of every choice to `emit`, in order within a choice; until all have finished.

        While something that `emit` returned waits, deltas merge in the mailbox. Nothing lives on when this returns or raises.
        """
        try:
            if len(self.choices) == 1:
                await self._pump(self.choices[0], emit)
            else:
                with one_error():
                    async with create_task_group() as tasks:
                        for choice in self.choices:
                            tasks.start_soon(self._pump, choice, emit)
        finally:
            self.abort()
        if self._limit_s is not None:
            raise DeadlineExceeded(f"the answer was not complete after {self._limit_s:g} s; allow it more time, or ask for less")

    async def _pump(self, choice: Choice, emit: Emit) -> None:
        """The path of every token. A turn runs as a plain call of the event loop's; this task only waits where it has to."""
        mailbox, watch, answers, pace = await self._submitted(choice), self._watch, self._answers, self._pace
        phase, has_pauses = pace.new_phase(), pace.has_pauses
        last_s = self._started_s
        texts: list[str] = []
        token_ids: list[int] = []
        handover: Future[Awaitable[None] | None]  # what to wait for; None: nothing, the choice has finished

        def turn() -> None:
            nonlocal last_s
            if handover.done():  # cancelled, and not yet run since
                return
            try:
                delta = mailbox.take()
                if delta.token_ids:
                    now_s = choice.last_s = monotonic()
                    if choice.num_tokens == 0:
                        choice.first_s, choice.num_first = now_s, len(delta.token_ids)
                        if watch is not None:
                            watch.first_token(now_s - last_s)
                    elif watch is not None:
                        watch.next_tokens(len(delta.token_ids), now_s - last_s)
                    last_s = now_s
                piece = choice.take(delta)
                if answers is not None:
                    texts.append(piece.text)
                    token_ids.extend(piece.token_ids)
                if piece.finish_reason is not None:
                    self._note_end(choice, delta, piece)
                    has_more = choice.num_thought or piece.finish_reason == TOOL_CALLS  # tokens that its text does not stand for
                    if answers is not None and not has_more and not isinstance(piece.matched_stop, str):
                        end = len(token_ids) - (piece.matched_stop is not None)
                        answers.note("".join(texts), token_ids[:end])
                waits_for = emit(piece) if piece.progress is None else self._tell(piece.progress)
            except Exception as error:
                mailbox.listen(None)
                handover.set_exception(error)
                return
            if waits_for is not None or choice.is_finished:
                mailbox.listen(None)
                handover.set_result(waits_for)
            elif has_pauses:
                mailbox.rest(pace.pause_s(phase))

        try:
            while True:
                handover = get_running_loop().create_future()
                mailbox.listen(turn)
                waits_for = await handover
                if waits_for is not None:
                    await waits_for
                if choice.is_finished:
                    return
                if has_pauses:
                    mailbox.rest(pace.pause_s(phase))
        finally:
            mailbox.listen(None)

    def _note_end(self, choice: Choice, delta: Delta, piece: Piece) -> None:
        assert piece.finish_reason is not None
        self.outcome = piece.finish_reason
        if delta.finish_reason is None:
            self._client.abort(choice.request.id)  # a stop string: the engine does not know yet

    @property
    def usage(self) -> Usage:
        """Tokens so far. Of n choices of a prompt the first to run finds least in the cache, and it counts."""
        n, choices = self.call.n, self.choices
        prompt_tokens = cached_tokens = completion_tokens = num_thought = num_jumped = num_drafted = num_accepted = 0
        for place, prompt in enumerate(self.call.prompts):
            num_prompt = len(prompt.token_ids)
            prompt_tokens += num_prompt
            known = [choice.num_cached for choice in choices[place * n : place * n + n] if choice.num_cached is not None]
            cached_tokens += min(*known, num_prompt - 1) if known else 0
        for choice in choices:
            completion_tokens += choice.num_tokens
            num_thought += choice.num_thought
            num_jumped += choice.num_jumped
            num_drafted += choice.num_drafted
            num_accepted += choice.num_accepted
        counts = num_thought, num_jumped, num_drafted, num_accepted
        return Usage(prompt_tokens, completion_tokens, cached_tokens, *counts, *self._num_media)

    @property
    def timings(self) -> Timings:
        """Times so far."""
        usage, begun = self.usage, [choice for choice in self.choices if choice.first_s]
        queue_s = min([choice.queued_s for choice in begun], default=0.0)
        first_s = min([choice.first_s for choice in begun], default=self._submitted_s + queue_s)
        last_s = max([choice.last_s for choice in begun], default=first_s)
        return Timings(
            queue_s,
            max(0.0, first_s - self._submitted_s - queue_s),
            last_s - first_s,
            usage.cached_tokens,
            usage.prompt_tokens - usage.cached_tokens,
            usage.completion_tokens,
            sum([min(choice.num_first, choice.num_tokens) for choice in begun]),
            usage.drafted_tokens,
            usage.accepted_tokens,
        )


@dataclass(slots=True)
class Collected:
    """A whole choice, put together from its pieces."""

    index: int
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    matched_stop: int | str | None = None
    prompt: Prompt | None = None
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    events: list[Event] | None = None
    marks: list[Mark] = field(default_factory=list)

    def add(self, piece: Piece) -> None:
        """Append a piece."""
        self.texts.append(piece.text)
        self.token_ids.extend(piece.token_ids)
        self.logprobs.extend(piece.logprobs)
        self.finish_reason, self.matched_stop = piece.finish_reason, piece.matched_stop
        if piece.prompt is not None:
            self.prompt, self.prompt_logprobs = piece.prompt, piece.prompt_logprobs
        if piece.events is not None:
            self.events = self.events or []
            self.events += piece.events
        self.marks += piece.marks

    def as_piece(self) -> Piece:
        """The whole choice as one piece."""
        return Piece(
            self.index,
            "".join(self.texts),
            tuple(self.token_ids),
            tuple(self.logprobs),
            self.finish_reason,
            self.matched_stop,
            self.prompt,
            self.prompt_logprobs,
            None if self.events is None else tuple(self.events),
            _joined_marks(self.marks),
        )


def _joined_marks(marks: list[Mark]) -> tuple[Mark, ...]:
    """Neighbours of one kind as one."""
    return tuple(Mark("".join([mark.text for mark in group]), *kind) for kind, group in groupby(marks, itemgetter(1, 2)))


async def collect(run: Run) -> list[Piece]:
    """Deliver a run into one piece per choice."""
    whole = [Collected(choice.index) for choice in run.choices]

    def add(piece: Piece) -> None:
        whole[piece.index].add(piece)

    await run.deliver(add)
    return [collected.as_piece() for collected in whole]


def new_id(kind: str) -> str:
    """An id that no other request has."""
    return f"{kind}-{uuid4().hex}"
