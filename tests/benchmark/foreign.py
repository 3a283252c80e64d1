"""A server that is not ours: a bare part of OpenAI's API that refuses what it does not know, and counts no tokens.

Written on sockets, so that it can be as odd as servers are: lines that end in CR LF, no [DONE], bodies that end with the
connection, a connection that is closed without a word.
"""

import asyncio
import json
import threading
from dataclasses import dataclass, field
from typing import Any

KNOWN = {"model", "messages", "prompt", "max_tokens", "temperature", "stream", "seed"}


@dataclass
class Foreign:
    """`bodies`: of all requests that were answered. `is_chunked`: else a body ends with its connection."""

    known: set[str] = field(default_factory=lambda: set(KNOWN))
    counts: bool = False
    is_chunked: bool = True
    says_done: bool = True
    refuses_with: int = 422
    key: str | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    port: int = 0

    def __enter__(self) -> "Foreign":
        self._loop = asyncio.new_event_loop()
        started = threading.Event()

        async def serve() -> None:
            self._server = await asyncio.start_server(self._answer, "127.0.0.1", 0)
            self.port = self._server.sockets[0].getsockname()[1]
            started.set()
            self._stop = asyncio.Event()
            await self._stop.wait()
            self._server.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(serve(),))
        self._thread.start()
        assert started.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()
        self._loop.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                fields = dict(line.lower().split(": ", 1) for line in head.splitlines()[1:] if line)
                data = await reader.readexactly(int(fields.get("content-length", 0)))
                if self.key is not None and fields.get("authorization") != f"bearer {self.key}".lower():
                    self._whole(writer, 401, {"detail": "no key"})
                elif head.startswith("GET /v1/models"):
                    self._whole(writer, 200, {"data": [{"id": "theirs"}]})
                elif head.startswith(("POST /v1/completions", "POST /v1/chat/completions")):
                    body = json.loads(data)
                    if unknown := body.keys() - self.known:
                        self._whole(writer, self.refuses_with, {"detail": f"unexpected fields: {sorted(unknown)}"})
                    elif isinstance(body.get("prompt"), list):
                        self._whole(writer, self.refuses_with, {"detail": "prompt is no text"})
                    else:
                        self.bodies.append(body)
                        await self._stream(writer, body)
                        if not self.is_chunked:
                            break
                else:
                    self._whole(writer, 404, {"detail": "no such route"})
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def _whole(self, writer: asyncio.StreamWriter, status: int, body: Any) -> None:
        data = json.dumps(body).encode()
        writer.write(b"HTTP/1.1 %d Said\r\nContent-Length:%d\r\n\r\n%b" % (status, len(data), data))

    async def _stream(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        framing = b"transfer-encoding:Chunked\r\n" if self.is_chunked else b"Connection: close\r\n"
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n" + framing + b"\r\n")
        is_chat = "messages" in body
        count = body.get("max_tokens", 3)
        events: list[Any] = [{"choices": [{"index": 0, "delta": {"role": "assistant"}}]}] if is_chat else []
        for number in range(count):
            text = f" word{number}"
            events.append({"choices": [{"index": 0, **({"delta": {"content": text}} if is_chat else {"text": text})}]})
        end: dict[str, Any] = {"index": 0, "finish_reason": "length", **({"delta": {}} if is_chat else {"text": ""})}
        usage = {"prompt_tokens": self._length(body), "completion_tokens": count} if self.counts else None
        events.append({"choices": [end], **({"usage": usage} if usage else {})})
        lines = [json.dumps(event).encode() for event in events] + ([b"[DONE]"] if self.says_done else [])
        for line in lines:
            data = b": ping\r\n\r\ndata:" + line + b"\r\n\r\n"
            writer.write(b"%x\r\n%b\r\n" % (len(data), data) if self.is_chunked else data)
            await writer.drain()
            await asyncio.sleep(0.001)
        if self.is_chunked:
            writer.write(b"0\r\n\r\n")

    def _length(self, body: dict[str, Any]) -> int:
        """Two tokens for every word."""
        texts = [message["content"] for message in body["messages"]] if "messages" in body else [body["prompt"]]
        return 7 + 2 * sum(len(text.split()) for text in texts)
