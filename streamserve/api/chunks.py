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

from streamserve.api.stream import Piece, Run, Usage
from streamserve.messages import TokenLogprobs
from streamserve.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a client wants to see beside text. `top_logprobs` None: no log-probabilities."""

    usage: bool = False
    running_usage: bool = False
    token_ids: bool = False
    top_logprobs: int | None = None


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
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


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

    def __init__(self, run: Run, model: str, wishes: Wishes, tokenizer: Tokenizer) -> None:
        self._run = run
        self._head = {"id": run.call.id, "object": self.kind, "created": int(time()), "model": model}
        self._chunk_head = orjson.dumps({**self._head, "object": self.chunk_kind})[:-1]
        self._wishes = wishes
        self._tokenizer = tokenizer
        self._tail = b"}" if not wishes.usage or wishes.running_usage else b',"usage":null}'
        self._before_index = self._chunk_head + b',"choices":[{"index":'
        self._is_plain = not wishes.running_usage and not wishes.token_ids and wishes.top_logprobs is None

    def _chunk(self, choice: dict[str, Any]) -> bytes:
        body = self._chunk_head + b',"choices":[' + orjson.dumps(choice) + b"]"
        return body + (self._usage() if self._wishes.running_usage else self._tail)

    def _usage(self) -> bytes:
        return b',"usage":' + orjson.dumps(usage_json(self._run.usage)) + b"}"

    def closing(self) -> list[bytes]:
        """See Shape."""
        return [self._chunk_head + b',"choices":[]' + self._usage()] if self._wishes.usage else []

    def _shows(self, piece: Piece) -> bool:
        if piece.text:
            return True
        return bool(piece.logprobs or piece.prompt_logprobs or (self._wishes.token_ids and piece.token_ids))


class ChatShape(_Shape):
    """Answers of /v1/chat/completions."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def opening(self) -> list[bytes]:
        """One chunk per choice, in order: clients take the first to be index 0."""
        delta = {"role": "assistant", "content": ""}
        return [
            self._chunk({"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None})
            for choice in self._run.choices
        ]

    def chunks(self, piece: Piece) -> list[bytes]:
        """See Shape."""
        made: list[bytes] = []
        if self._shows(piece):
            made.append(self._plain(piece) if self._is_plain else self._full(piece))
        if piece.finish_reason is not None:
            end = {"index": piece.index, "delta": {}, "logprobs": None, "finish_reason": piece.finish_reason}
            made.append(self._chunk({**end, "matched_stop": piece.matched_stop}))
        return made

    def _plain(self, piece: Piece) -> bytes:
        return b'%b%d,"delta":{"content":%b},"logprobs":null,"finish_reason":null}]%b' % (
            self._before_index,
            piece.index,
            orjson.dumps(piece.text),
            self._tail,
        )

    def _full(self, piece: Piece) -> bytes:
        choice: dict[str, Any] = {
            "index": piece.index,
            "delta": {"content": piece.text},
            "logprobs": self._logprobs(piece.logprobs),
            "finish_reason": None,
        }
        if self._wishes.token_ids:
            choice["token_ids"] = piece.token_ids
            if piece.prompt is not None:
                choice["prompt_token_ids"] = piece.prompt.token_ids
        return self._chunk(choice)

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """See Shape."""
        answer: dict[str, Any] = {
            **self._head,
            "choices": [self._choice(piece) for piece in pieces],
            "usage": usage_json(self._run.usage),
        }
        if self._wishes.token_ids and pieces[0].prompt is not None:
            answer["prompt_token_ids"] = pieces[0].prompt.token_ids
        return answer

    def _choice(self, piece: Piece) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": piece.index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self._logprobs(piece.logprobs),
            "finish_reason": piece.finish_reason,
            "matched_stop": piece.matched_stop,
        }
        if self._wishes.token_ids:
            choice["token_ids"] = piece.token_ids
        return choice

    def _logprobs(self, logprobs: Sequence[TokenLogprobs]) -> dict[str, Any] | None:
        if self._wishes.top_logprobs is None:
            return None
        return {"content": [self._entry(entry) for entry in logprobs], "refusal": None}

    def _entry(self, entry: TokenLogprobs) -> dict[str, Any]:
        top = entry.top[: self._wishes.top_logprobs]
        return {**self._token(entry.token_id, entry.logprob), "top_logprobs": [self._token(*alternative) for alternative in top]}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token_id)
        return {"token": token_text(raw), "logprob": max(logprob, -9999.0), "bytes": list(raw)}


class TextShape(_Shape):
    """Answers of /v1/completions."""

    kind = "text_completion"
    chunk_kind = "text_completion"

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
            made.append(self._plain(piece) if self._is_plain else self._chunk(self._choice(piece, None, None)))
        if piece.finish_reason is not None:
            end = Piece(piece.index)
            choice = {**self._choice(end, piece.finish_reason, piece.matched_stop), "logprobs": None}
            made.append(self._chunk(choice))
        return made

    def _plain(self, piece: Piece) -> bytes:
        return b'%b%d,"text":%b,"logprobs":null,"finish_reason":null}]%b' % (
            self._before_index,
            piece.index,
            orjson.dumps(piece.text),
            self._tail,
        )

    def whole(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """See Shape."""
        choices = [self._choice(piece, piece.finish_reason, piece.matched_stop) for piece in pieces]
        return {**self._head, "choices": choices, "usage": usage_json(self._run.usage)}

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
        return choice

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        num_top = self._wishes.top_logprobs
        if num_top is None:
            return None
        entries: list[TokenLogprobs | None] = [*(piece.prompt_logprobs or ()), *piece.logprobs]
        ids = [entry.token_id if entry is not None else -1 for entry in entries]
        if piece.prompt_logprobs and piece.prompt is not None:
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
