"""Arguments of `streamserve bench`. Imports nothing slow."""

import argparse
import json
import math
from typing import Any

DATASET_NAMES = ("random", "generated-shared-prefix", "sharegpt", "mooncake", "openai", "custom")
BACKENDS = ("openai", "openai-chat", "sglang-oai", "sglang-oai-chat", "vllm", "vllm-chat")
BENCHES = {"serve": "latency and throughput of a running server of OpenAI's API, ours or another"}
GOODPUT = {"ttft": "ttft", "tpot": "tpot", "e2el": "e2e_latency"}  # as vLLM spells them


def add_options(parser: argparse.ArgumentParser) -> None:
    """All of them."""
    _add_server(parser)
    _add_lengths(parser.add_argument_group("lengths of prompts and answers, in tokens"))
    _add_load(parser.add_argument_group("load"))
    _add_result(parser.add_argument_group("result"))


def _add_server(group: argparse.ArgumentParser) -> None:
    add = group.add_argument
    add("bench", nargs="?", metavar="BENCH", help="; ".join(f"{name}: {words}" for name, words in BENCHES.items()))
    add("--backend", choices=BACKENDS, default="openai", help="completions or chat completions (default openai)")
    add("--base-url", metavar="URL", help="the server, instead of --host and --port; https is understood")
    add("--host", default="127.0.0.1", help="default 127.0.0.1")
    add("--port", type=_count, default=30000, metavar="N", help="default 30000")
    add("--endpoint", metavar="PATH", help="default /v1/completions or /v1/chat/completions")
    add("--model", metavar="NAME", help="default: the first that the server lists")
    add("--tokenizer", metavar="PATH", help="GGUF file or folder of the model's tokenizer; without it the server is asked")
    add("--dataset-name", choices=DATASET_NAMES, default="random", help="default random")
    add("--dataset-path", metavar="FILE", help="of sharegpt, mooncake, openai and custom")
    add("--num-prompts", type=_count, default=100, metavar="N", help="most requests (default 100)")


def _add_lengths(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--random-input-len", "--random-input", type=_count, default=1024, metavar="N", help="random: prompts (default 1024)")
    add("--random-output-len", "--random-output", type=_count, default=128, metavar="N", help="random: answers (default 128)")
    add(
        "--random-range-ratio",
        type=float,
        default=1.0,
        metavar="X",
        help="random: shortest length as a share of these (default 1)",
    )
    add("--gsp-num-groups", type=_count, default=64, metavar="N", help="shared prefixes: how many (default 64)")
    add("--gsp-prompts-per-group", type=_count, default=16, metavar="N", help="shared prefixes: requests for each (default 16)")
    add("--gsp-system-prompt-len", type=_count, default=2048, metavar="N", help="shared prefixes: their length (default 2048)")
    add("--gsp-question-len", type=_count, default=128, metavar="N", help="shared prefixes: what follows them (default 128)")
    add("--gsp-output-len", type=_count, default=256, metavar="N", help="shared prefixes: answers (default 256)")
    add("--sharegpt-output-len", type=_count, metavar="N", help="sharegpt: answers, instead of the file's own")
    add("--output-len", type=_count, metavar="N", help="openai and custom: answers, instead of the file's own")


def _add_load(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--request-rate", type=_above_0, default=float("inf"), metavar="X", help="requests a second (default inf: all at once)")
    add(
        "--burstiness",
        type=_above_0,
        default=1.0,
        metavar="X",
        help="1: as independent clients come; less: in bursts; more: evenly",
    )
    add("--max-concurrency", type=_count, metavar="N", help="most requests at once (default: any number)")
    add(
        "--mooncake-slowdown-factor",
        type=_above_0,
        default=1.0,
        metavar="X",
        help="2 plays a trace at half its speed (default 1)",
    )
    add(
        "--warmup-requests",
        type=int,
        default=1,
        metavar="N",
        help="requests of the dataset's kind before the clock runs (default 1)",
    )
    add("--flush-cache", action="store_true", help="empty the server's prefix cache first, where it has /flush_cache")
    add("--seed", type=int, default=0, metavar="N", help="of prompts and times; a repeated seed meets a warm cache (default 0)")
    add("--disable-ignore-eos", action="store_true", help="let answers end before their length")
    add("--extra-request-body", type=_json_object, default={}, metavar="JSON", help="fields for every request")
    add("--request-timeout-s", type=_above_0, default=3600.0, metavar="X", help="most seconds for a request (default 3600)")


def _add_result(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--goodput",
        type=_promises,
        nargs="+",
        default=[],
        metavar="LATENCY:MS",
        help="ttft:500 tpot:50 e2el:9000: what a good answer keeps",
    )
    add("--output-file", metavar="FILE", help="a line of JSON with everything is added to it")
    add("--save-detailed", action="store_true", help="with every request's times and text in it")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no whole number of 1 or more")
    return int(text)


def _above_0(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not found > 0:
        raise argparse.ArgumentTypeError(f"{text} is no number above 0")
    return found


def _json_object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return found


def _promises(text: str) -> dict[str, float]:
    found = {}
    for one in text.split(","):
        name, _, most = one.partition(":")
        try:
            found[GOODPUT[name.strip()]] = float(most)
        except (KeyError, ValueError):
            raise argparse.ArgumentTypeError(
                f"{one!r} is no promise such as {', '.join(f'{name}:500' for name in GOODPUT)}"
            ) from None
    return found
