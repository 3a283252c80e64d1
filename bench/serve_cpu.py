"""What HTTP costs, how long a start takes, what an idle server burns: `streamserve serve` beside the same engine offline.

  python bench/serve_cpu.py [MODEL] [--threads 2] [--streams 16] [--rounds 3]

start     from exec to the first token of a streamed completion, the weights in the page cache
idle      processor time of the server over ten quiet seconds, in per cent of one core
served    tokens per second of 16 SSE streams, prompts of 128 tokens, 128 new ones; the offline engine in turn with it
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.cpu import NEW_TOKENS, PROMPT_LEN, Ours, prompts
from bench.load import ask, completion, drive, figures
from bench.machine import processor
from bench.server import Server
from streamserve.benchmark.client import Ask


def first_token_s(server: Server) -> float:
    """From exec to the first streamed token of a short completion."""
    (answer,) = drive(server.port, asks(server, prompts(1, 16, 7), 4), at_once=1)
    assert answer.error is None, answer.error
    return server.ready_s + answer.events_s[0] - answer.sent_s


def asks(server: Server, batch: list[list[int]], num_new: int) -> list[Ask]:
    """Their requests."""
    return [ask(completion(server.model, prompt, num_new)) for prompt in batch]


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
    flags = ["--device", "cpu", "--threads", str(args.threads)]
    starts = []
    for _ in range(args.rounds):
        served = Server(args.model, flags)
        starts.append((served.ready_s, first_token_s(served)))
        served.close()
    print(
        "start: ready after "
        + ", ".join(f"{a:.2f}" for a, _ in starts)
        + " s; first token "
        + ", ".join(f"{b:.2f}" for _, b in starts)
    )
    served = Server(args.model, flags)
    first_token_s(served)
    before = served.cpu_s()
    time.sleep(10)
    print(f"idle: {(served.cpu_s() - before) * 10:.2f} % of a core")
    offline = Ours(args.model, args.threads)
    offline.generate(prompts(2, 32, 0), 4)
    ratios, rates = [], []
    for number in range(args.rounds):
        batch = prompts(args.streams, PROMPT_LEN, 500 + number)
        tokens = args.streams * NEW_TOKENS
        over_http = figures(drive(served.port, asks(served, batch, NEW_TOKENS), at_once=args.streams, processes=1))["out_tok_s"]
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
