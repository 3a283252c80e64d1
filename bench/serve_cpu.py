"""What HTTP costs, how long a start takes, what an idle server burns: `streamserve serve` beside the same engine offline.

  python bench/serve_cpu.py [MODEL] [--threads 2] [--streams 16] [--rounds 3]

start     from exec to the first token of a streamed completion, the weights in the page cache
idle      processor time of the server over ten quiet seconds, in per cent of one core
served    tokens per second of 16 SSE streams, prompts of 128 tokens, 128 new ones; the offline engine in turn with it
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.cpu import NEW_TOKENS, PROMPT_LEN, Ours, processor, prompts


class Served:
    """A server process and raw SSE clients on keep-alive connections."""

    def __init__(self, model: str, threads: int) -> None:
        started = time.perf_counter()
        command = [sys.executable, "-m", "streamserve", "serve", model, "--port", "0", "--threads", str(threads)]
        self.process = subprocess.Popen([*command, "--log-format", "json"], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            event = json.loads(line)
            if event["event"] == "streamserve_ready":
                break
        else:
            raise SystemExit("the server did not start")
        self.port, self.model = event["port"], event["model"]
        self.ready_s = time.perf_counter() - started
        asyncio.run(self.generate(prompts(1, 16, 7), 1))
        self.first_token_s = time.perf_counter() - started

    async def stream(self, prompt: list[int], num_new: int) -> int:
        """One completion; the number of tokens that came."""
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": num_new,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        data = json.dumps(body).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = ("POST /v1/completions HTTP/1.1", "Host: bench", "Content-Type: application/json", f"Content-Length: {len(data)}")
        writer.write("\r\n".join(head).encode() + b"\r\n\r\n" + data)
        whole = b""
        while b"data: [DONE]" not in whole[-40:]:
            part = await reader.read(65536)
            assert part, whole[-500:]
            whole += part
        writer.close()
        usage = next(line for line in reversed(whole.split(b"\n")) if b'"usage":{' in line)
        return int(json.loads(usage.removeprefix(b"data: "))["usage"]["completion_tokens"])

    async def generate(self, batch: list[list[int]], num_new: int) -> float:
        """Seconds for all streams at once."""
        started = time.perf_counter()
        counts = await asyncio.gather(*(self.stream(prompt, num_new) for prompt in batch))
        assert counts == [num_new] * len(batch), counts
        return time.perf_counter() - started

    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.model is None:
        from streamserve.default_model import find_default_model

        args.model = str(find_default_model())
    print(f"{processor()}, {args.threads} of {os.cpu_count()} threads, load {os.getloadavg()[0]:.2f}")
    starts = []
    for _ in range(args.rounds):
        served = Served(args.model, args.threads)
        starts.append((served.ready_s, served.first_token_s))
        served.close()
    print(
        "start: ready after "
        + ", ".join(f"{a:.2f}" for a, _ in starts)
        + " s; first token "
        + ", ".join(f"{b:.2f}" for _, b in starts)
    )
    served = Served(args.model, args.threads)
    before = served.cpu_s()
    time.sleep(10)
    print(f"idle: {(served.cpu_s() - before) * 10:.2f} % of a core")
    offline = Ours(args.model, args.threads)
    offline.generate(prompts(2, 32, 0), 4)
    ratios, rates = [], []
    for number in range(args.rounds):
        batch = prompts(args.streams, PROMPT_LEN, 500 + number)
        tokens = args.streams * NEW_TOKENS
        over_http = tokens / asyncio.run(served.generate(batch, NEW_TOKENS))
        timing = offline.generate(batch, NEW_TOKENS)
        alone = tokens / (timing.last - timing.started)
        ratios.append(over_http / alone)
        rates.append((over_http, alone))
    shown = ", ".join(f"{a:.0f} of {b:.0f}" for a, b in rates)
    print(f"served: {shown} tokens/s offline; ratio {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    offline.close()
    served.close()


if __name__ == "__main__":
    main()
