"""How pieces look to an OpenAI client: chunks of a stream, and whole answers. JSON only; SSE and WebSocket frame it.

Owns the shape of every answer to a completion. Knows nothing of requests, engines or transports.

A chunk of plain text, nearly all of them, is prefix bytes + the text as JSON + suffix bytes.
"""

from codecs import getincrementaldecoder
from collections.abc import Sequence
from dataclasses import dataclass
from time import time
from typing import Any, Protocol

import orjson

from streamserve.api.answer import TOOL_CALLS, CallBegan, CallGrew, Content, Event, MadeCall, Thought, fold
from streamserve.api.stream import Mark, Piece, Run, Timings, Usage, events_of
from streamserve.messages import TokenLogprobs
from streamserve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a client wants to see beside text. `top_logprobs` None: no log-probabilities, and so `prompt_logprobs` of the prompt.

    `has_thoughts`, `has_calls`: a chat's answer may hold such. `is_legacy`: a call has OpenAI's older form, function_call.
    `best`: of each prompt's choices only so many are shown, the likeliest; None: all. `marks`: which parts of a text were
    guessed before they were sampled, or forced. `timings`: how long the parts of the answer took, when it is over.
    """

    usage: bool = False
    running_usage: bool = False
    token_ids: bool = False
    top_logprobs: int | None = None
    prompt_logprobs: int | None = None
    has_thoughts: bool = False
    has_calls: bool = False
    is_legacy: bool = False
    best: int | None = None
    marks: bool = False
    timings: bool = False


def timings_json(timings: Timings) -> dict[str, Any]:
    """Timings as llama.cpp writes them, and the time in the queue. Rates of what took no time are left out."""
    shown: dict[str, Any] = {
        "queue_ms": round(timings.queue_s * 1000, 3),
        "cache_n": timings.num_cached,
        "prompt_n": timings.num_computed,
        "prompt_ms": round(timings.prompt_s * 1000, 3),
        "predicted_n": timings.num_predicted,
        "predicted_ms": round(timings.predicted_s * 1000, 3),
    }
    if timings.num_computed and timings.prompt_s:
        shown["prompt_per_token_ms"] = round(timings.prompt_s * 1000 / timings.num_computed, 4)
        shown["prompt_per_second"] = round(timings.num_computed / timings.prompt_s, 2)
    num_timed = timings.num_predicted - timings.num_first  # the first tokens came at the end of prompt_ms
    if num_timed > 0 and timings.predicted_s:
        shown["predicted_per_token_ms"] = round(timings.predicted_s * 1000 / num_timed, 4)
        shown["predicted_per_second"] = round(num_timed / timings.predicted_s, 2)
    if timings.num_drafted:
        shown |= {"draft_n": timings.num_drafted, "draft_n_accepted": timings.num_accepted}
    return shown


class Shape(Protocol):
    """One answer's shape."""

    def opening(self) -> list[bytes]:
        """Chunks that come before any token."""
        ...

    def chunks(self, piece: Piece) -> list[bytes]:
        """The chunks of a piece; none when it shows nothing."""
        ...

    def closing(self) -> list[bytes]:
        """Chunks that come after every choice has finished."""
        ...

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """The answer as one object; each piece is a whole choice."""
        ...


def usage_json(usage: Usage) -> dict[str, Any]:
    """Usage as OpenAI writes it."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens, **media_tokens(usage)},
        "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning_tokens,
            "jumped_tokens": usage.jumped_tokens,
            "accepted_prediction_tokens": usage.accepted_tokens,
            "rejected_prediction_tokens": usage.drafted_tokens - usage.accepted_tokens,
        },
    }


def media_tokens(usage: Usage) -> dict[str, int]:
    """Of a prompt's tokens those of its pictures and sounds, where it has some."""
    counts = {"image_tokens": usage.image_tokens, "audio_tokens": usage.audio_tokens}
    return {name: count for name, count in counts.items() if count}


def _shown(mark: Mark) -> dict[str, Any]:
    shown = {"text": mark.text, "drafted": mark.is_drafted}
    return {**shown, "forced": True} if mark.is_forced else shown


def token_text(raw: bytes) -> str:
    """A token as text. Part of a character is shown by its bytes, as OpenAI does, so that different tokens stay different."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class _Shape:
    """What both shapes share: the head of every object, and the template of a plain chunk."""

    kind: str
    chunk_kind: str
    before_text: bytes  # of a plain chunk: what stands between its choice's index and the text
    after_text: bytes

    def __init__(self, run: Run, model: str, wishes: Wishes, tokenizer: Tokenizer) -> None:
        self._run = run
        self._head = {"id": run.call.id, "object": self.kind, "created": int(time()), "model": model}
        self._chunk_head = orjson.dumps({**self._head, "object": self.chunk_kind})[:-1]
        self._wishes = wishes
        self._tokenizer = tokenizer
        self._tail = b"}" if not wishes.usage or wishes.running_usage else b',"usage":null}'
        self._before_text = self._before(self.before_text)
        self._after_text = b"" if wishes.running_usage else self.after_text + self._tail
        self._is_plain = (
            not wishes.token_ids and not wishes.marks and wishes.top_logprobs is None and wishes.prompt_logprobs is None
        )

    def _before(self, text: bytes) -> list[bytes]:
        """A plain chunk up to its text, by choice."""
        return [b'%b,"choices":[{"index":%d,%b' % (self._chunk_head, choice.index, text) for choice in self._run.choices]

    def _plain(self, before: bytes, text: str) -> bytes:
        return before + orjson.dumps(text) + (self._after_text or self.after_text + self._usage())

    def _chunk(self, choice: dict[str, Any], more: dict[str, Any] | None = None) -> bytes:
        body = self._chunk_head + b',"choices":[' + orjson.dumps(choice) + b"]"
        if more:
            body += b"," + orjson.dumps(more)[1:-1]
        return body + (self._usage() if self._wishes.running_usage else self._tail)

    def _usage(self) -> bytes:
        return b',"usage":' + orjson.dumps(usage_json(self._run.usage)) + b"}"

    def closing(self) -> list[bytes]:
        """See Shape."""
        if not self._wishes.usage and not self._wishes.timings:
            return []
        more = b"," + orjson.dumps(self._timings())[1:-1] if self._wishes.timings else b""
        return [self._chunk_head + b',"choices":[]' + more + (self._usage() if self._wishes.usage else self._tail)]

    def _timings(self) -> dict[str, Any]:
        return {"timings": timings_json(self._run.timings)} if self._wishes.timings else {}

    def _shows(self, piece: Piece) -> bool:
        if piece.text:
            return True
        return bool(piece.logprobs or piece.prompt_logprobs or (self._wishes.token_ids and piece.token_ids))

    def _add_marks(self, piece: Piece, to: dict[str, Any]) -> None:
        """Ours: the text once more, in parts: those guessed before they were sampled, those that a grammar forced, the rest."""
        if self._wishes.marks:
            marks = piece.marks or ((Mark(piece.text),) if piece.text else ())
            to["draft_marks"] = [_shown(mark) for mark in marks]

    def _add_prompt_logprobs(self, piece: Piece, to: dict[str, Any]) -> None:
        """vLLM's form: per prompt token the token itself and the best ones, by id."""
        num_top = self._wishes.prompt_logprobs
        if num_top is not None and piece.prompt_logprobs is not None:
            to["prompt_logprobs"] = [
                None if entry is None else self._prompt_entry(entry, num_top) for entry in piece.prompt_logprobs
            ]

    def _prompt_entry(self, entry: TokenLogprobs, num_top: int) -> dict[str, dict[str, Any]]:
        ranked = {token: (logprob, rank) for rank, (token, logprob) in enumerate(entry.top, 1)}
        own = {entry.token_id: ranked.get(entry.token_id, (entry.logprob, None))}  # beyond the best ones its rank is not known
        best = {token: ranked[token] for token, _ in entry.top[:num_top]}
        return {
            str(token): {
                "logprob": max(logprob, -9999.0),
                "rank": rank,
                "decoded_token": token_text(self._tokenizer.token_bytes(token)),
            }
            for token, (logprob, rank) in (own | best).items()
        }


class ChatShape(_Shape):
    """Answers of /v1/chat/completions."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"
    before_text = b'"delta":{"content":'
    after_text = b'},"logprobs":null,"finish_reason":null}]'

    def __init__(self, run: Run, model: str, wishes: Wishes, tokenizer: Tokenizer) -> None:
        super().__init__(run, model, wishes, tokenizer)
        if wishes.has_thoughts:  # clients read both by attribute
            self._before_text = self._before(b'"delta":{"reasoning_content":null,"content":')
            self._before_thought = self._before(b'"delta":{"content":null,"reasoning_content":')

    def opening(self) -> list[bytes]:
        """One chunk per choice, in order: clients take the first to be index 0."""
        wishes = self._wishes
        delta: dict[str, Any] = {"role": "assistant", "content": None if wishes.has_calls or wishes.has_thoughts else ""}
        if wishes.has_thoughts:
            delta["reasoning_content"] = None
        return [
            self._chunk({"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None})
            for choice in self._run.choices
        ]

    def chunks(self, piece: Piece) -> list[bytes]:
        """See Shape."""
        made: list[bytes] = []
        if self._is_plain:
            if piece.events is not None:
                made += [self._plain_event(piece.index, event) for event in piece.events]
            elif piece.text:
                made.append(self._plain(self._before_text[piece.index], piece.text))
        elif piece.events or self._shows(piece):
            made += self._full(piece)
        if piece.finish_reason is not None:
            end = {"index": piece.index, "delta": {}, "logprobs": None, "finish_reason": self._reason(piece)}
            made.append(self._chunk({**end, "matched_stop": piece.matched_stop}))
        return made

    def _reason(self, piece: Piece) -> str | None:
        return "function_call" if self._wishes.is_legacy and piece.finish_reason == TOOL_CALLS else piece.finish_reason

    def _plain_event(self, index: int, event: Event) -> bytes:
        if type(event) is Content:
            return self._plain(self._before_text[index], event.text)
        if type(event) is Thought:
            return self._plain(self._before_thought[index], event.text)
        return self._chunk({"index": index, "delta": self._delta(event), "logprobs": None, "finish_reason": None})

    def _full(self, piece: Piece) -> list[bytes]:
        """A chunk per event. What belongs to the piece as a whole is on the first one, log-probabilities on the content's."""
        events: Sequence[Event] = events_of(piece) or (Content(""),)
        scored = next((place for place, event in enumerate(events) if type(event) is Content), 0 if piece.logprobs else -1)
        made: list[bytes] = []
        is_marked = False  # the marks are of the whole text, and stand beside its first part
        for place, event in enumerate(events):
            choice: dict[str, Any] = {
                "index": piece.index,
                "delta": self._delta(event),
                "logprobs": self._logprobs(piece.logprobs) if place == scored else None,
                "finish_reason": None,
            }
            more: dict[str, Any] = {}
            if type(event) is Content and not is_marked:
                is_marked = True
                self._add_marks(piece, choice)
            if place == 0:
                if self._wishes.token_ids:
                    choice["token_ids"] = piece.token_ids
                    if piece.prompt is not None:
                        choice["prompt_token_ids"] = piece.prompt.token_ids
                self._add_prompt_logprobs(piece, more)
            made.append(self._chunk(choice, more))
        return made

    def _delta(self, event: Event) -> dict[str, Any]:
        match event:
            case Content(text):
                return {"reasoning_content": None, "content": text} if self._wishes.has_thoughts else {"content": text}
            case Thought(text):
                return {"content": None, "reasoning_content": text}
            case CallBegan(index, name, id):
                function = {"name": name, "arguments": ""}
                if self._wishes.is_legacy:
                    return {"function_call": function}
                return {"tool_calls": [{"index": index, "id": id, "type": "function", "function": function}]}
            case CallGrew(index, arguments):
                if self._wishes.is_legacy:
                    return {"function_call": {"arguments": arguments}}
                return {"tool_calls": [{"index": index, "function": {"arguments": arguments}}]}

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """See Shape."""
        answer: dict[str, Any] = {
            **self._head,
            "choices": [self._choice(piece) for piece in pieces],
            "usage": usage_json(self._run.usage),
            **self._timings(),
        }
        if self._wishes.token_ids and pieces[0].prompt is not None:
            answer["prompt_token_ids"] = pieces[0].prompt.token_ids
        self._add_prompt_logprobs(pieces[0], answer)
        return answer

    def _choice(self, piece: Piece) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": piece.index,
            "message": self._message(piece),
            "logprobs": self._logprobs(piece.logprobs),
            "finish_reason": self._reason(piece),
            "matched_stop": piece.matched_stop,
        }
        if self._wishes.token_ids:
            choice["token_ids"] = piece.token_ids
        self._add_marks(piece, choice)
        return choice

    def _message(self, piece: Piece) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": piece.text, "refusal": None}
        if piece.events is None:
            return message
        answer = fold(piece.events)
        if answer.calls:
            message["content"] = piece.text or None
            if self._wishes.is_legacy:
                message["function_call"] = _function(answer.calls[0])
            else:
                message["tool_calls"] = [
                    {"id": call.id, "type": "function", "function": _function(call)} for call in answer.calls
                ]
        if self._wishes.has_thoughts:
            message["reasoning_content"] = answer.thought or None
        return message

    def _logprobs(self, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        if self._wishes.top_logprobs is None:
            return None
        return {"content": [self._entry(entry) for entry in logprobs], "refusal": None}

    def _entry(self, entry: TokenLogprobs) -> dict[str, Any]:
        top = entry.top[: self._wishes.top_logprobs]
        return {**self._token(entry.token_id, entry.logprob), "top_logprobs": [self._token(*alternative) for alternative in top]}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token_id)
        shown = {"token": token_text(raw), "logprob": max(logprob, -9999.0), "bytes": list(raw)}
        return {**shown, "token_id": token_id} if self._wishes.token_ids else shown


def _function(call: MadeCall) -> dict[str, str]:
    return {"name": call.name, "arguments": call.arguments}


class TextShape(_Shape):
    """Answers of /v1/completions."""

    kind = "text_completion"
    chunk_kind = "text_completion"
    before_text = b'"text":'
    after_text = b',"logprobs":null,"finish_reason":null}]'

    def __init__(self, run: Run, model: str, wishes: Wishes, tokenizer: Tokenizer) -> None:
        super().__init__(run, model, wishes, tokenizer)
        self._rulers: dict[int, _Ruler] = {}

    def opening(self) -> list[bytes]:
        """Nothing: text completions have no roles."""
        return []

    def chunks(self, piece: Piece) -> list[bytes]:
        """See Shape."""
        made: list[bytes] = []
        if self._shows(piece):
            if self._is_plain:
                made.append(self._plain(self._before_text[piece.index], piece.text))
            else:
                made.append(self._chunk(self._choice(piece, None, None)))
        if piece.finish_reason is not None:
            end = Piece(piece.index)
            choice = {**self._choice(end, piece.finish_reason, piece.matched_stop), "logprobs": None}
            made.append(self._chunk(choice))
        return made

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """See Shape."""
        pieces = self._best(pieces)
        choices = [self._choice(piece, piece.finish_reason, piece.matched_stop) for piece in pieces]
        return {**self._head, "choices": choices, "usage": usage_json(self._run.usage), **self._timings()}

    def _best(self, pieces: Sequence[Piece]) -> Sequence[Piece]:
        """Of each prompt's choices the ones that are to be shown, likeliest first, numbered anew."""
        best, num_each = self._wishes.best, self._run.call.n
        if best is None:
            return pieces
        kept: list[Piece] = []
        for first in range(0, len(pieces), num_each):
            kept += sorted(pieces[first : first + num_each], key=_mean_logprob, reverse=True)[:best]
        for index, piece in enumerate(kept):
            piece.index = index
        return kept

    def _choice(self, piece: Piece, finish_reason: str | None, matched_stop: int | str | None) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": piece.index,
            "text": piece.text,
            "logprobs": self._logprobs(piece),
            "finish_reason": finish_reason,
        }
        if finish_reason is not None:
            choice["matched_stop"] = matched_stop
        if self._wishes.token_ids:
            choice["token_ids"] = piece.token_ids
            if piece.prompt is not None:
                choice["prompt_token_ids"] = piece.prompt.token_ids
        self._add_marks(piece, choice)
        self._add_prompt_logprobs(piece, choice)
        return choice

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        num_top = self._wishes.top_logprobs
        if num_top is None:
            return None
        has_echo = piece.prompt is not None and piece.prompt.echo is not None
        before = (piece.prompt_logprobs or ()) if has_echo else ()
        entries: list[TokenLogprobs | None] = [*before, *piece.logprobs]
        ids = [entry.token_id if entry is not None else -1 for entry in entries]
        if before and piece.prompt is not None:
            ids[0] = piece.prompt.token_ids[0]  # the first prompt token follows nothing, so it has no probability
        raws = [self._tokenizer.token_bytes(token) for token in ids]
        ruler = self._rulers.setdefault(piece.index, _Ruler())
        return {
            "tokens": [token_text(raw) for raw in raws],
            "token_logprobs": [None if entry is None else max(entry.logprob, -9999.0) for entry in entries],
            "top_logprobs": [None if entry is None else self._top(entry, num_top) for entry in entries],
            "text_offset": [ruler.place(raw) for raw in raws],
        }

    def _top(self, entry: TokenLogprobs, num_top: int) -> dict[str, float]:
        tops = {token_text(self._tokenizer.token_bytes(token)): max(logprob, -9999.0) for token, logprob in entry.top[:num_top]}
        tops.setdefault(token_text(self._tokenizer.token_bytes(entry.token_id)), max(entry.logprob, -9999.0))
        return tops


def _mean_logprob(piece: Piece) -> float:
    return sum(entry.logprob for entry in piece.logprobs) / max(1, len(piece.logprobs))


class _Ruler:
    """Where tokens start in a text, in characters. A token that continues a character starts where the character does."""

    def __init__(self) -> None:
        self._decoder = getincrementaldecoder("utf-8")(errors="replace")
        self._chars = 0

    def place(self, raw: bytes) -> int:
        """The start of the next token."""
        start = self._chars
        self._chars += len(self._decoder.decode(raw))
        return start
