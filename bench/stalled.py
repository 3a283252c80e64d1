"""What a client that stops reading costs the others: 8 healthy SSE streams, alone and beside one that never reads.

    python bench/stalled.py [--rounds 3]

The engine is the fake one at 2 ms a step, so that the server's own work is all there is. For HTTP/1.1, HTTP/2 and WebSocket:
tokens per second of the healthy streams beside the stalled one over those alone, the server's growth in resident memory,
and after how long the stalled request was gone (the bound is --write-timeout-s 5 from when its buffers are full).
"""

import argparse
import asyncio
import json
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h2.config
import h2.connection

HEALTHY, TOKENS = 8, 1500
LIMIT_S = 5.0


class Server:
    """`streamserve serve --fake` in a process of its own."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "streamserve", "serve", "--fake", "--fake-step-ms", "2", "--port", "0"]
        command += ["--write-timeout-s", str(LIMIT_S), "--log-format", "json", "--log-level", "error"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        ready = next(e for line in self.process.stdout if (e := json.loads(line))["event"] == "streamserve_ready")
        self.port = ready["port"]

    def resident_mib(self) -> float:
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                return int(line.split()[1]) / 1024
        raise AssertionError

    async def running(self) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(b"GET /v1/loads HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        answer = await reader.read()
        writer.close()
        return int(json.loads(answer[answer.index(b"{") :])["running"])


def body(tokens: int) -> dict[str, Any]:
    text = "never mind " * 20
    return {"prompt": text, "max_tokens": tokens, "ignore_eos": True, "stream": True, "return_token_ids": True}


def post(fields: dict[str, Any]) -> bytes:
    data = json.dumps(fields).encode()
    return b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(data), data)


async def healthy(port: int) -> float:
    """Tokens per second of all healthy streams together."""

    async def one() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post(body(TOKENS)))
        tail = b""
        while b"data: [DONE]" not in tail:
            part = await reader.read(65536)
            assert part
            tail = (tail + part)[-40:]
        writer.close()

    started = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(HEALTHY)))
    return HEALTHY * TOKENS / (time.perf_counter() - started)


def stalled_socket(port: int) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", port))
    return sock


def stall_http1(port: int) -> socket.socket:
    sock = stalled_socket(port)
    sock.sendall(post({**body(7000), "n": 8}))
    return sock


def stall_http2(port: int) -> socket.socket:
    sock = stalled_socket(port)
    connection = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
    connection.initiate_connection()
    head = [(":method", "POST"), (":path", "/v1/completions"), (":scheme", "http"), (":authority", "x")]
    connection.send_headers(1, head)
    connection.send_data(1, json.dumps({**body(7000), "n": 8}).encode(), end_stream=True)
    sock.sendall(connection.data_to_send())
    return sock


def stall_websocket(port: int) -> socket.socket:
    sock = stalled_socket(port)
    key = b"sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA==\r\nsec-websocket-version: 13\r\n"
    sock.sendall(b"GET /v1/ws HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\nconnection: upgrade\r\n" + key + b"\r\n")
    assert b" 101 " in sock.recv(4096)
    frame = json.dumps({"type": "completion.create", "id": "a", "request": {**body(7000), "n": 8}}).encode()
    sock.sendall(b"\x81" + bytes([0x80 | 126]) + len(frame).to_bytes(2, "big") + bytes(4) + frame)
    return sock


async def measure(server: Server, stall: Any) -> tuple[float, float, float]:
    alone = await healthy(server.port)
    before = server.resident_mib()
    started = time.perf_counter()
    sock = stall(server.port)
    beside, grown, gone_s = await healthy(server.port), server.resident_mib() - before, float("nan")
    while time.perf_counter() - started < 60:
        if await server.running() == 0:
            gone_s = time.perf_counter() - started
            break
        await asyncio.sleep(0.1)
    sock.close()
    return beside / alone, grown, gone_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    for name, stall in (("HTTP/1.1", stall_http1), ("HTTP/2", stall_http2), ("WebSocket", stall_websocket)):
        server = Server()
        results = [asyncio.run(measure(server, stall)) for _ in range(rounds)]
        server.process.terminate()
        server.process.wait()
        ratios, grown, gone = zip(*results, strict=True)
        print(
            f"{name:10} healthy beside / alone {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            f"   memory +{max(grown):.1f} MiB   gone after {max(gone):.1f} s at most",
            flush=True,
        )


if __name__ == "__main__":
    main()
