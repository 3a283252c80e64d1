"""Mixed Markdown, as a model writes it, and a server in front of another that streams it to the playground at a fixed rate.

The page's files and everything else it asks come from the server behind; only its socket is answered here, in the frames of
docs/streams.md: one chunk a token. Owns the text and the pace. Knows nothing of what the page does with them.
"""

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from random import Random
from typing import Any

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

WORDS = re.findall(
    r"\w+",
    """the a of and to in that cache prefix token request answer page tree node step batch model prompt row memory engine it is
    was are by for with as on at from each every one two first last longer shorter therefore because however when while until
    keeps holds reads writes frees matches evicts schedules samples decodes waits begins ends""",
)
TOKEN = re.compile(r"\n+|[ \t]*[A-Za-z]{1,7}|[ \t]*\d{1,3}|[ \t]*[^\w\s]{1,2}|[ \t]+|.")
PART = 1 << 16
KINDS = ("mixed", "code", "list", "table", "quote", "words")  # but for the first: one block without end


class Markdown:
    """A text without end: sections of everything that the page can draw, some of it long."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self._section = 0

    def tokens(self, count: int, kind: str = "mixed") -> list[str]:
        """The next `count` tokens, of about four characters each."""
        if kind == "words":
            return TOKEN.findall(self._text(count // 5))[:count]
        if kind != "mixed":
            return TOKEN.findall(getattr(self, f"_{kind}")(count // 10))[:count]
        found: list[str] = []
        while len(found) < count:
            found += TOKEN.findall(self.section())
        return found[:count]

    def section(self) -> str:
        """A heading, a paragraph and one thing more."""
        self._section += 1
        kinds = (self._list, self._code, self._table, self._quote, self._formula)
        long = self._section % 10 == 0  # once in ten it is a long one
        at, sizes = (self._section // 10 % 3, (80, 200, 60)) if long else (self._section % 5, (6, 20, 6, 3, 4))
        one = kinds[at](sizes[at])
        return f"## {self._words(4).capitalize()}\n\n{self._text(3)}\n\n{one}\n\n"

    def _words(self, count: int) -> str:
        return " ".join(self._random.choices(WORDS, k=count))

    def _text(self, sentences: int) -> str:
        marks = ("{}", "{}", "{}", "**{}**", "*{}*", "`{}`", "[{}](https://example.com/page)", "$x_{{{}}}$")
        return " ".join(
            f"{self._words(5).capitalize()} {self._random.choice(marks).format(self._random.choice(WORDS))} {self._words(4)}."
            for _ in range(sentences)
        )

    def _list(self, size: int) -> str:
        items = (f"- {self._text(1)}\n" + (f"  - {self._words(6)}\n" if k % 3 == 0 else "") for k in range(size))
        return "".join(items).rstrip()

    def _code(self, size: int) -> str:
        lines = (
            f"    {self._random.choice(WORDS)} = {self._random.choice(WORDS)}(node, {k})  # {self._words(3)}" for k in range(size)
        )
        return "```python\ndef step(node):\n" + "\n".join(lines) + "\n    return node\n```"

    def _table(self, size: int) -> str:
        rows = (f"| {self._words(2)} | {k} | {self._text(1)} |" for k in range(size))
        return "| name | count | what |\n|:--|--:|---|\n" + "\n".join(rows)

    def _formula(self, size: int) -> str:
        return "$$\n" + " + ".join(f"\\frac{{x_{k}^2}}{{\\sqrt{{y_{k}}}}}" for k in range(size)) + "\n$$"

    def _quote(self, size: int) -> str:
        return "\n".join(f"> {self._text(1)}" for _ in range(size))


class Feed:
    """Answers every question of the page with `num_tokens` tokens, `rate` of them a second; the rest is the other server's."""

    def __init__(self, behind: int) -> None:
        self.num_tokens, self.rate = 1_000, 400.0
        self.kind = "mixed"
        self.port = 0
        self.late_s = 0.0  # the most that a token went out after its time: this machine's fault, not the page's
        self._behind = behind
        self._numbers = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def start(self) -> None:
        self._thread.start()
        self._call(self._listen())

    def stop(self) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _call(self, action: Any) -> None:
        future: Future[None] = asyncio.run_coroutine_threadsafe(action, self._loop)
        future.result(20)

    async def _listen(self) -> None:
        self._sockets = await serve(self._talk, "127.0.0.1", 0, compression=None)
        self._front = await asyncio.start_server(self._pass, "127.0.0.1", 0)
        self.port = self._front.sockets[0].getsockname()[1]

    async def _close(self) -> None:
        self._front.close()
        self._sockets.close()
        await self._sockets.wait_closed()
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()

    # ---------------------------------------------------------------------------------------------------------- in front

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A connection's first line tells whose it is: browsers open one of its own for a socket."""
        with suppress(OSError, asyncio.CancelledError):
            head = await reader.read(PART)
            is_socket = head.startswith(b"GET /v1/ws ")
            port = next(iter(self._sockets.sockets)).getsockname()[1] if is_socket else self._behind
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", port)
            up_writer.write(head)
            there, back = (asyncio.ensure_future(_pour(*pair)) for pair in ((reader, up_writer), (up_reader, writer)))
            await asyncio.wait((there, back), return_when=asyncio.FIRST_COMPLETED)
            there.cancel()
            back.cancel()
            up_writer.close()
        writer.close()

    # -------------------------------------------------------------------------------------------------------- the socket

    async def _talk(self, socket: ServerConnection) -> None:
        running: dict[str, asyncio.Task[None]] = {}
        with suppress(ConnectionClosed):
            async for text in socket:
                frame = json.loads(text)
                if frame["type"] == "ping":
                    await socket.send('{"type":"pong"}')
                elif frame["type"] == "chat.create":
                    running[frame["id"]] = asyncio.ensure_future(self._answer(socket, frame["id"], frame["request"]))
                elif frame["type"] == "cancel" and frame["id"] in running:
                    running[frame["id"]].cancel()
                    await socket.send(json.dumps({"type": "done", "id": frame["id"], "usage": None}))
        for task in running.values():
            task.cancel()

    async def _answer(self, socket: ServerConnection, id: str, request: dict[str, Any]) -> None:
        self._numbers += 1
        name, prompt = f"chatcmpl-{self._numbers:032x}", len(json.dumps(request["messages"])) // 4
        wants_logprobs = bool(request.get("logprobs"))
        tokens = Markdown(self._numbers).tokens(self.num_tokens, self.kind)
        loop = asyncio.get_running_loop()
        with suppress(ConnectionClosed):
            await socket.send(json.dumps({"type": "stream", "id": id, "stream": name}))
            started = loop.time()
            for n, token in enumerate(tokens, 1):
                wait = started + n / self.rate - loop.time()
                if wait > 0:
                    await asyncio.sleep(wait)
                self.late_s = max(self.late_s, -wait)
                choice = {"index": 0, "delta": {"content": token}, "logprobs": None, "finish_reason": None}
                if wants_logprobs:
                    choice["logprobs"] = {"content": [_logprob(token, n)]}
                await socket.send(_chunk(id, n, name, [choice], prompt))
            last = {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop", "matched_stop": None}
            await socket.send(_chunk(id, len(tokens) + 1, name, [last], prompt, len(tokens)))
            await socket.send(json.dumps({"type": "done", "id": id, "usage": _usage(prompt, len(tokens))}))


async def _pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while part := await reader.read(PART):
            writer.write(part)
            await writer.drain()


def _chunk(id: str, n: int, name: str, choices: list[dict[str, Any]], prompt: int, count: int | None = None) -> str:
    chunk = {"id": name, "object": "chat.completion.chunk", "created": 1, "model": "fake", "choices": choices}
    return json.dumps(
        {"type": "chunk", "id": id, "n": n, "chunk": {**chunk, "usage": _usage(prompt, n if count is None else count)}}
    )


def _usage(prompt: int, completion: int) -> dict[str, Any]:
    details = ("reasoning_tokens", "jumped_tokens", "accepted_prediction_tokens", "rejected_prediction_tokens")
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": prompt // 2},
        "completion_tokens_details": dict.fromkeys(details, 0),
    }


def _logprob(token: str, n: int) -> dict[str, Any]:
    one = {"token": token, "logprob": -0.25 * (n % 7), "bytes": list(token.encode())}
    return {**one, "top_logprobs": [one] + [{"token": word, "logprob": -3.5, "bytes": list(word.encode())} for word in WORDS[:4]]}


@contextmanager
def feed_before(behind: int) -> Iterator[Feed]:
    """A feed in front of the server on this port."""
    feed = Feed(behind)
    feed.start()
    try:
        yield feed
    finally:
        feed.stop()
