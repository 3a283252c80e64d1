"""What the load generator makes of bytes and times, and what traces become."""

import asyncio
import json
import time
from asyncio import StreamReader, StreamWriter
from dataclasses import replace
from random import Random

import pytest

from bench.load import ask, completion, figures, local, percentile
from bench.serve import trace_asks
from streamserve.benchmark import client
from streamserve.benchmark.answers import Answer, parsed, timed_events
from streamserve.benchmark.client import Ask, send_all

HEAD = b"HTTP/1.1 200 \r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
USAGE = (
    b'{"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":3},"completion_tokens_details":'
    b'{"jumped_tokens":1,"accepted_prediction_tokens":4,"rejected_prediction_tokens":3}}}'
)


def token(text: str) -> bytes:
    return json.dumps({"choices": [{"index": 0, "text": text}], "usage": None}, separators=(",", ":")).encode()


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(data: bytes) -> bytes:
    return b"data: " + data + b"\n\n"


def answer_bytes(*events: bytes) -> bytes:
    return HEAD + b"".join(chunk(event(data)) for data in events) + b"0\r\n\r\n"


def test_events_have_the_time_of_the_read_that_completes_their_mark() -> None:
    whole = HEAD + chunk(b": comment\n\n" + event(b"one")) + chunk(b"da") + chunk(b"ta: two\n\n" + event(b"three"))
    reads = [(float(i), bytes([byte])) for i, byte in enumerate(whole)]
    expected = [whole.index(b"data: one") + 5, whole.index(b"ta: two") + 3, whole.index(b"data: three") + 5]
    assert list(timed_events(reads)) == list(zip(expected, (b"one", b"two", b"three"), strict=True))
    assert [text for _, text in timed_events([(0.0, whole[:-4])])] == [b"one"], "what is cut off is no event"


@pytest.mark.parametrize("size", [1, 7, 10_000])
def test_an_answer_is_its_events_and_its_usage(size: int) -> None:
    whole = answer_bytes(token("data: x"), token('"choices":[]'), USAGE, b"[DONE]")
    reads = [(at / size, whole[at : at + size]) for at in range(0, len(whole), size)]
    answer = parsed(-1.0, reads, None)
    assert (answer.num_prompt, answer.num_output, answer.num_cached, answer.error) == (5, 2, 3, None)
    assert len(answer.events_s) == 2 and answer.events_s == tuple(sorted(answer.events_s))
    assert answer.text == 'data: x"choices":[]'
    assert (answer.num_drafted, answer.num_accepted, answer.num_jumped) == (7, 4, 1)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'HTTP/1.1 429 \r\ncontent-length: 16\r\n\r\n{"error":"full"}', "429"),
        (answer_bytes(token("a"), b'{"error":{"message":"the step failed"}}'), "the step failed"),
        (answer_bytes(token("a"), USAGE), "ended without"),
        (answer_bytes(USAGE, b"[DONE]"), "ended without"),
        (answer_bytes(b"<html>"), "no event of a stream: <html>"),
        (b"", "no answer"),
    ],
)
def test_what_went_wrong_is_told(data: bytes, words: str) -> None:
    error = parsed(0.0, [(0.5, data)] if data else [], None).error
    assert error is not None and words in error


@pytest.mark.anyio
async def test_requests_are_sent_on_kept_connections_and_clients_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[int] = []
    ends: list[asyncio.Event] = []

    async def serve(reader: StreamReader, writer: StreamWriter) -> None:
        ended = asyncio.Event()
        ends.append(ended)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                body = json.loads(await reader.readexactly(length))
                requests.append(body["prompt"][0])
                if body["prompt"][0] == 9:
                    writer.write(b"HTTP/1.1 400 \r\ncontent-length: 3\r\n\r\nbad")
                    continue
                writer.write(HEAD)
                for data in (token("a"), token("b"), USAGE, b"[DONE]"):
                    writer.write(chunk(event(data)))
                    await writer.drain()
                    await asyncio.sleep(0.01)
                writer.write(b"0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()
            ended.set()

    def one(number: int, leaves_after: int | None = None) -> Ask:
        return ask(completion("m", [number], 2), leaves_after=leaves_after)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    sent = await send_all(local(port), [one(1), one(9), one(2), one(3, 0), one(4, 2), one(5)], 1, 0.0, 5.0)
    num_connections = len(ends)
    monkeypatch.setattr(client, "IDLE_S", 0.05)
    late = [replace(one(6 + i), at_s=at_s) for i, at_s in enumerate((0.0, 0.0, 0.3))]
    await send_all(local(port), late, 1, time.perf_counter(), 5.0)
    server.close()
    await asyncio.gather(*(ended.wait() for ended in ends))
    answers = [parsed(*one) for one in sent]
    assert [answer.sent_s for answer in answers] == sorted(answer.sent_s for answer in answers)
    assert requests == [1, 9, 2, 3, 4, 5, 6, 7, 8]
    assert [answer.has_left for answer in answers] == [False, False, False, True, True, False]
    assert [answer.error is not None for answer in answers] == [False, True, False, False, False, False]
    assert num_connections == 3, "only a client that leaves needs a new connection"
    assert len(ends) == 5, "or one whose connection was quiet for so long that the server may have enough of it"


def test_figures_come_from_whole_answers_only() -> None:
    answers = [
        Answer(10.0, (11.0, 12.0, 14.0), num_prompt=10, num_output=3, num_cached=5),
        Answer(10.5, (12.5, 15.0), num_prompt=30, num_output=2),
        Answer(9.0, has_left=True),
    ]
    found = figures(answers)
    assert found["seconds"] == 5.0 and found["out_tok_s"] == 1.0 and found["req_s"] == 0.4
    assert (found["ttft_p50_ms"], found["ttft_p99_ms"]) == (1500.0, 1990.0)
    assert (found["itl_p50_ms"], found["itl_max_ms"]) == (2000.0, 2500.0)
    assert found["cached_rate"] == 0.125
    with pytest.raises(SystemExit, match="1 of 4 requests failed; the first: no"):
        figures([*answers, Answer(0.0, error="no")])


def test_percentiles_lie_between_values_as_the_peers_count_them() -> None:
    assert [percentile([3, 1, 2, 5, 4], percent) for percent in (0, 50, 90, 100)] == pytest.approx([1, 3, 4.6, 5])
    assert percentile([7], 99) == 7


def test_a_trace_keeps_its_shared_blocks_and_fits_the_context() -> None:
    lines = [
        {"timestamp": 0, "input_length": 1200, "output_length": 4, "hash_ids": [0, 1, 2]},
        {"timestamp": 3000, "input_length": 1100, "output_length": 500, "hash_ids": [0, 1, 9]},
        {"timestamp": 9000, "input_length": 10, "output_length": 1, "hash_ids": [0]},
    ]
    asks = trace_asks(
        lines, "m", range(0, 50_000), context_len=400, seconds=4.0, lengths=0.25, speed=2.0, rng=Random(0), leaving=0.0
    )
    bodies = [json.loads(one.request.partition(b"\r\n\r\n")[2]) for one in asks]
    assert [one.at_s for one in asks] == [0.0, 1.5], "the third comes after the end"
    first, second = (body["prompt"] for body in bodies)
    assert (len(first), len(second)) == (300, 200)
    assert first[:200] == second and len(set(first)) > 250
    assert [body["max_tokens"] for body in bodies] == [4, 200]
