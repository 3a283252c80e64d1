"""Load on an OpenAI-compatible server: streamed completions over raw HTTP/1.1, and when each event came back.

Owns the client processes, their connections, and what an answer's bytes mean. Knows no workload and no server process.

A client must not be what is measured. Requests are made into bytes beforehand and spread over a few processes; while the
clock runs, a connection only notes when a read came and what it held. Everything is parsed afterwards. An event's time is
that of the read which brought the last byte of its `data: `.
"""

import asyncio
import json
import multiprocessing
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from random import Random
from typing import Any

Figures = dict[str, float]
Reads = Sequence[tuple[float, bytes]]  # when a read came, and what it held

PROCESSES = 4
LAST_CHUNK = b"\r\n0\r\n\r\n"
MARK = b"data: "
LEFT = "the client left"
AT_ONCE_S = 0.02  # a client that leaves before anything came stays this long: the request must get there
IDLE_S = 5.0  # a connection that was quiet for longer is not used again: the server may be closing it at that moment


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: its bytes, when it is due (seconds after the start; later when no connection is free), and after how
    many reads of its answer the client hangs up, if it does; 0 is before anything came."""

    request: bytes
    at_s: float = 0.0
    leaves_after: int | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a request. Times are of the machine's monotonic clock, alike in all processes.

    `num_accepted` of the answer's tokens had been guessed, out of `num_drafted` guesses; `num_jumped` were forced by a grammar.
    `text` is that of the only choice.
    """

    sent_s: float
    events_s: tuple[float, ...] = ()
    num_prompt: int = 0
    num_output: int = 0
    num_cached: int = 0
    has_left: bool = False
    error: str | None = None
    text: str = ""
    num_drafted: int = 0
    num_accepted: int = 0
    num_jumped: int = 0


def ask(body: dict[str, Any], *, at_s: float = 0.0, leaves_after: int | None = None, path: str = "/v1/completions") -> Ask:
    """A streamed request that ends with its usage."""
    data = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    head = (
        f"POST {path} HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
    )
    return Ask("\r\n".join(head).encode() + b"\r\n\r\n" + data, at_s, leaves_after)


def random_tokens(rng: Random, count: int, tokens: range) -> list[int]:
    """`count` token ids."""
    return [rng.randrange(tokens.start, tokens.stop) for _ in range(count)]


def completion(model: str, prompt: list[int], max_tokens: int) -> dict[str, Any]:
    """The body of a greedy completion of exactly `max_tokens` tokens."""
    return {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True}


def drive(port: int, asks: Sequence[Ask], *, at_once: int, processes: int = PROCESSES, limit_s: float = 300.0) -> list[Answer]:
    """Send everything, at most `at_once` at a time, each process its share; the answers in the order of the requests."""
    processes = max(1, min(processes, at_once, len(asks)))
    context = multiprocessing.get_context("fork")  # the requests are there already, nothing is copied
    starts_s = time.perf_counter() + 0.3
    ends, workers = [], []
    for number in range(processes):
        share = at_once // processes + (number < at_once % processes)
        here, there = context.Pipe(duplex=False)
        arguments = (port, asks[number::processes], share, starts_s, limit_s, there)
        worker = context.Process(target=_client, args=arguments)
        worker.start()
        there.close()
        ends.append(here)
        workers.append(worker)
    answers: list[Answer | None] = [None] * len(asks)
    for number, end in enumerate(ends):
        answers[number::processes] = end.recv()
    for worker in workers:
        worker.join()
    return [answer for answer in answers if answer is not None]


def _client(port: int, asks: Sequence[Ask], at_once: int, starts_s: float, limit_s: float, out: Connection) -> None:
    """One client process."""
    try:
        import uvloop
    except ImportError:
        run: Any = asyncio.run
    else:
        run = uvloop.run
    out.send([parsed(*sent) for sent in run(send_all(port, asks, at_once, starts_s, limit_s))])
    out.close()


Sent = tuple[float, Reads, str | None]  # when, what came, why it did not come to its end


async def send_all(port: int, asks: Sequence[Ask], at_once: int, starts_s: float, limit_s: float) -> list[Sent]:
    """Send what is due, at most `at_once` at a time; what came of it, in the order of the requests."""
    due, sent = deque(sorted(enumerate(asks), key=lambda numbered: numbered[1].at_s)), dict[int, Sent]()

    async def lane() -> None:
        """Request after request, on one connection as long as it holds."""
        line: _Line | None = None
        while due:
            number, one = due.popleft()
            await asyncio.sleep(max(0.0, starts_s + one.at_s - time.perf_counter()))
            try:
                if line is not None and time.perf_counter() - line.ended_s > IDLE_S:
                    line.close()
                    line = None
                if line is None or line.is_lost:
                    line = (await asyncio.get_running_loop().create_connection(_Line, "127.0.0.1", port))[1]
                sent[number] = await line.send(one, limit_s)
            except OSError as error:
                sent[number] = (time.perf_counter(), [], f"cannot connect: {error}")
        if line is not None:
            line.close()

    await asyncio.gather(*(lane() for _ in range(min(at_once, len(asks)))))
    return [sent[number] for number in range(len(asks))]


class Streams:
    """Answers that are streamed beside whatever else is measured, until they are told to stop."""

    def __init__(self, port: int, asks: Sequence[Ask], *, processes: int = PROCESSES) -> None:
        context = multiprocessing.get_context("fork")
        self._ends: list[Connection] = []
        self._workers = []
        for number in range(min(processes, len(asks))):
            here, there = context.Pipe()
            worker = context.Process(target=_stream, args=(port, asks[number::processes], there), daemon=True)
            worker.start()
            there.close()
            self._ends.append(here)
            self._workers.append(worker)

    def stop(self) -> list[Answer]:
        """Hang up. What came so far; `has_left` says that an answer was still under way."""
        for end in self._ends:
            end.send(None)
        found = [answer for end in self._ends for answer in end.recv()]
        for worker in self._workers:
            worker.join()
        return found


def _stream(port: int, asks: Sequence[Ask], pipe: Connection) -> None:
    """One client process of Streams."""

    async def run() -> list[tuple[float, list[tuple[float, bytes]], bool]]:
        loop = asyncio.get_running_loop()
        lines = [(await loop.create_connection(_Line, "127.0.0.1", port))[1] for _ in asks]
        sent_s = [time.perf_counter() for _ in asks]
        tasks = [asyncio.create_task(line.send(one, 3600.0)) for line, one in zip(lines, asks, strict=True)]
        await loop.run_in_executor(None, pipe.recv)
        running = [not task.done() for task in tasks]
        for line in lines:
            line.close()
        await asyncio.gather(*tasks)
        return [(at, line.reads, is_running) for at, line, is_running in zip(sent_s, lines, running, strict=True)]

    found = []
    for sent_s, reads, is_running in asyncio.run(run()):
        events = tuple(at for at, text in timed_events(reads) if is_output(text))
        found.append(Answer(sent_s, events, has_left=is_running))
    pipe.send(found)
    pipe.close()


class _Line(asyncio.Protocol):
    """A keep-alive connection that carries one request at a time."""

    def __init__(self) -> None:
        self.is_lost = False
        self.ended_s = time.perf_counter()  # when it fell quiet
        self._transport: asyncio.Transport | None = None
        self._reads: list[tuple[float, bytes]] = []
        self._tail = b""
        self._is_chunked = False
        self._leaves_after: int | None = None
        self._ended: asyncio.Future[str | None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        self._reads.append((time.perf_counter(), data))
        if len(self._reads) == self._leaves_after:
            self._end(LEFT)
        elif self._is_chunked:
            self._tail = (self._tail + data)[-len(LAST_CHUNK) :]
            if self._tail == LAST_CHUNK:
                self._end(None)
        else:
            self._look_at_head()

    def _look_at_head(self) -> None:
        """Streams come in chunks; an error is a plain body of a known length."""
        whole = b"".join(data for _, data in self._reads)
        head, blank, body = whole.partition(b"\r\n\r\n")
        if not blank:
            return
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        self._is_chunked = fields.get(b"transfer-encoding") == b"chunked"
        self._tail = whole[-len(LAST_CHUNK) :]
        if self._tail == LAST_CHUNK if self._is_chunked else len(body) >= int(fields.get(b"content-length", 0)):
            self._end(None)

    def connection_lost(self, error: Exception | None) -> None:
        self.is_lost = True
        self._end(f"connection lost: {error}")

    def _end(self, why: str | None) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(why)

    @property
    def reads(self) -> list[tuple[float, bytes]]:
        """What came of the last request."""
        return self._reads

    def close(self) -> None:
        """Hang up."""
        assert self._transport is not None
        self._transport.close()

    async def send(self, one: Ask, limit_s: float) -> Sent:
        """Send a request and wait for the end of its answer, or until its client leaves."""
        assert self._transport is not None
        self._reads, self._tail, self._is_chunked, self._leaves_after = [], b"", False, one.leaves_after
        self._ended = asyncio.get_running_loop().create_future()
        sent_s = time.perf_counter()
        self._transport.write(one.request)
        try:
            why = await asyncio.wait_for(self._ended, AT_ONCE_S if one.leaves_after == 0 else limit_s)
        except TimeoutError:
            why = LEFT if one.leaves_after == 0 else f"no end after {limit_s:g} s"
        self.ended_s = time.perf_counter()
        if why is not None:
            self.is_lost = True
            self._transport.abort()
        return sent_s, self._reads, why


# ---- what came back -------------------------------------------------------------------------------------------------


def parsed(sent_s: float, reads: Reads, error: str | None) -> Answer:
    """What the bytes of an answer say."""
    if error == LEFT:
        return Answer(sent_s, has_left=True)
    if error is not None or not reads:
        return Answer(sent_s, error=error or "no answer")
    status, _, rest = b"".join(data for _, data in reads).partition(b"\r\n")
    if b" 200" not in status:
        body = rest.partition(b"\r\n\r\n")[2]
        return Answer(sent_s, error=f"{status.decode('latin1')}: {body[:300].decode('utf-8', 'replace')}")
    times, texts, usage, is_done = [], [], None, False
    for at, text in timed_events(reads):
        if text == b"[DONE]":
            is_done = True
        elif text.startswith(b'{"error"'):
            return Answer(sent_s, error=text[:300].decode("utf-8", "replace"))
        elif is_output(text):
            times.append(at)
            texts.append(json.loads(text)["choices"][0].get("text") or "")
        else:
            usage = json.loads(text)["usage"] or usage
    if not is_done or usage is None or not times:
        return Answer(sent_s, tuple(times), error="the stream ended without usage, tokens or [DONE]")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    details = usage.get("completion_tokens_details") or {}
    accepted = details.get("accepted_prediction_tokens") or 0
    return Answer(
        sent_s,
        tuple(times),
        usage["prompt_tokens"],
        usage["completion_tokens"],
        cached,
        text="".join(texts),
        num_drafted=accepted + (details.get("rejected_prediction_tokens") or 0),
        num_accepted=accepted,
        num_jumped=details.get("jumped_tokens") or 0,
    )


def is_output(text: bytes) -> bool:
    """Whether an event speaks of a choice; the one with the usage does not."""
    return b'"choices":[]' not in text and b'"choices": []' not in text


def timed_events(reads: Reads) -> Iterator[tuple[float, bytes]]:
    """Each event's time and text, from the reads of one chunked answer. What is cut off at the end is left out."""
    raw = b"".join(data for _, data in reads)
    read_starts = []
    num_bytes = 0
    for _, data in reads:
        read_starts.append(num_bytes)
        num_bytes += len(data)
    chunks = list(_chunks(raw))
    body = b"".join(raw[start : start + size] for start, size in chunks)
    chunk_starts = []  # in the body
    num_bytes = 0
    for _, size in chunks:
        chunk_starts.append(num_bytes)
        num_bytes += size
    at = 0
    while (end := body.find(b"\n\n", at)) >= 0:
        if body.startswith(MARK, at):  # else a comment
            marked = at + len(MARK) - 1
            chunk = bisect_right(chunk_starts, marked) - 1
            place = chunks[chunk][0] + marked - chunk_starts[chunk]
            yield reads[bisect_right(read_starts, place) - 1][0], body[at + len(MARK) : end]
        at = end + 2


def _chunks(raw: bytes) -> Iterator[tuple[int, int]]:
    """Where the data of each chunk begins in `raw`, and how long it is."""
    at = raw.find(b"\r\n\r\n") + 4
    while (line_end := raw.find(b"\r\n", at)) >= 0:
        size = int(raw[at:line_end].split(b";")[0], 16)
        if size == 0 or line_end + 2 + size > len(raw):
            return
        yield line_end + 2, size
        at = line_end + 2 + size + 2


# ---- figures --------------------------------------------------------------------------------------------------------


def percentile(values: Iterable[float], percent: float) -> float:
    """The value that `percent` of the others do not exceed (nearest rank)."""
    ordered = sorted(values)
    return ordered[round(percent / 100 * (len(ordered) - 1))]


def failures(answers: Iterable[Answer]) -> list[str]:
    """What went wrong, one entry per failed request."""
    return [answer.error for answer in answers if answer.error is not None]


def figures(answers: Sequence[Answer]) -> Figures:
    """Rates over the time from the first request to the last event; times to the first token, and between events, in ms.

    Only whole answers count. Raises SystemExit when any request failed: its figures would not be worth reading."""
    if failed := failures(answers):
        raise SystemExit(f"{len(failed)} of {len(answers)} requests failed; the first: {failed[0]}")
    whole = [answer for answer in answers if not answer.has_left]
    if not whole:
        raise SystemExit("no request was answered to its end")
    seconds = max(answer.events_s[-1] for answer in whole) - min(answer.sent_s for answer in whole)
    num_output, num_prompt = sum(answer.num_output for answer in whole), sum(answer.num_prompt for answer in whole)
    first_ms = [(answer.events_s[0] - answer.sent_s) * 1e3 for answer in whole]
    gaps_ms = [
        (later - before) * 1e3 for answer in whole for before, later in zip(answer.events_s, answer.events_s[1:], strict=False)
    ]
    per_token_ms = [
        (answer.events_s[-1] - answer.events_s[0]) / (answer.num_output - 1) * 1e3 for answer in whole if answer.num_output > 1
    ]
    found = {
        "requests": float(len(whole)),
        "seconds": seconds,
        "out_tok_s": num_output / seconds,
        "in_tok_s": num_prompt / seconds,
        "req_s": len(whole) / seconds,
        "ttft_p50_ms": percentile(first_ms, 50),
        "ttft_p99_ms": percentile(first_ms, 99),
        "cached_rate": sum(answer.num_cached for answer in whole) / num_prompt,
        "events_per_token": sum(len(answer.events_s) for answer in whole) / num_output,
    }
    if gaps_ms:
        found |= {f"itl_p{percent}_ms": percentile(gaps_ms, percent) for percent in (50, 99)}
        found |= {"itl_max_ms": max(gaps_ms), "itl_mean_ms": sum(gaps_ms) / len(gaps_ms)}
    if per_token_ms:
        found["tpot_p50_ms"] = percentile(per_token_ms, 50)
    return found
