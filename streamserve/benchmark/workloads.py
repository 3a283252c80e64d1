"""Workloads: the requests that a measurement sends, under the names that vLLM's and SGLang's serving benches give them.

Owns what is in a dataset and when its requests are due. Prompts are made by a Maker; knows no server.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from streamserve.benchmark.texts import Maker, Prompt
from streamserve.errors import ConfigError

MOONCAKE_BLOCK = 512  # tokens that one hash id of a trace stands for
AS_THEY_STAND = ("sharegpt", "openai", "custom")  # datasets whose prompts are those of a file
MIN_TOKENS, MAX_PROMPT, MAX_BOTH = 4, 1024, 2048  # of conversations that are taken, as the peers do


@dataclass(frozen=True, slots=True)
class Request:
    """One request. `parts`: of the prompt; of two, the first is shared with others. `num_output`: as many tokens are wanted;
    None: as many as come. `num_prompt`: tokens the prompt is thought to have. `messages`: a chat as it stands. `more`: fields of
    its body."""

    parts: tuple[Prompt, ...]
    num_prompt: int
    num_output: int | None
    at_s: float = 0.0
    messages: tuple[dict[str, Any], ...] | None = None
    more: Mapping[str, Any] | None = None


def random(maker: Maker, rng: Random, options: argparse.Namespace) -> list[Request]:
    """Prompts that share nothing."""
    ratio = options.random_range_ratio
    if not 0.0 <= ratio <= 1.0:
        raise ConfigError(f"--random-range-ratio is {ratio:g}; allowed is 0 to 1: lengths are between that share and all of it")

    def length(asked: int) -> int:
        return rng.randint(max(1, math.ceil(asked * ratio)), asked)

    requests = []
    for _ in range(options.num_prompts):
        num_prompt, num_output = length(options.random_input_len), length(options.random_output_len)
        requests.append(Request((maker.random(rng, num_prompt),), num_prompt, num_output))
    return requests


def generated_shared_prefix(maker: Maker, rng: Random, options: argparse.Namespace) -> list[Request]:
    """Groups of prompts that begin alike, mixed."""
    requests = []
    for _ in range(options.gsp_num_groups):
        shared = maker.random(rng, options.gsp_system_prompt_len)
        for _ in range(options.gsp_prompts_per_group):
            own = maker.random(rng, options.gsp_question_len)
            num_prompt = options.gsp_system_prompt_len + options.gsp_question_len
            requests.append(Request((shared, own), num_prompt, options.gsp_output_len))
    rng.shuffle(requests)
    return requests


def sharegpt(maker: Maker, rng: Random, options: argparse.Namespace) -> list[Request]:
    """First questions of real conversations, with answers as long as theirs."""
    conversations = _json(_path(options))
    if not isinstance(conversations, list) or not all(isinstance(one, dict) for one in conversations):
        raise ConfigError(f"{options.dataset_path} is no list of conversations as ShareGPT's files hold")
    rng.shuffle(conversations)
    requests: list[Request] = []
    for one in conversations:
        if len(requests) == options.num_prompts:
            break
        turns = _turns(one.get("conversations") or one.get("conversation"))
        if len(turns) < 2:
            continue
        prompt, answer = turns[:2]
        num_prompt = maker.count(prompt)
        num_output = options.sharegpt_output_len or maker.count(answer)
        if num_prompt < MIN_TOKENS or num_output < MIN_TOKENS or num_prompt > MAX_PROMPT or num_prompt + num_output > MAX_BOTH:
            continue
        requests.append(Request((prompt,), num_prompt, num_output))
    return requests


def _turns(conversation: object) -> list[str]:
    """What was said, in the two spellings that such files have."""
    turns = conversation if isinstance(conversation, list) else []
    return [str(turn.get("value", turn.get("content", ""))) for turn in turns if isinstance(turn, dict)]


def mooncake(maker: Maker, rng: Random, options: argparse.Namespace) -> list[Request]:
    """A trace in Mooncake's form, at its own times."""
    lines = _lines(_path(options))[: options.num_prompts]
    try:
        requests = mooncake_requests(lines, maker, rng)
    except (KeyError, TypeError, ValueError):
        fields = "timestamp, input_length, output_length and hash_ids"
        raise ConfigError(f"{options.dataset_path} is no trace of Mooncake's: its lines have {fields}") from None
    return [replace(one, at_s=one.at_s * options.mooncake_slowdown_factor) for one in requests]


def mooncake_requests(
    lines: Iterable[Mapping[str, Any]],
    maker: Maker,
    rng: Random,
    *,
    lengths: float = 1.0,
    fits: Callable[[int, int], int] | None = None,
) -> list[Request]:
    """Requests of a trace in Mooncake's form (github.com/kvcache-ai/Mooncake): `timestamp` in ms, `input_length`,
    `output_length`, and one hash id for every 512 tokens of the prompt; equal ids stand for equal tokens.

    `lengths` scales prompts, so that blocks are shared as before. `fits` says how long a prompt may be, given that and its
    answer's length."""
    size = max(1, round(MOONCAKE_BLOCK * lengths))
    blocks: dict[object, Prompt] = {}
    requests = []
    for line in lines:
        num_output = int(line["output_length"])
        num_prompt = max(1, round(int(line["input_length"]) * lengths))
        if fits is not None:
            num_prompt = fits(num_prompt, num_output)
        parts: list[Prompt] = []
        for number in line["hash_ids"]:
            missing = num_prompt - len(parts) * size
            if missing <= 0:
                break
            if number not in blocks:
                blocks[number] = maker.random(rng, size)
            parts.append(blocks[number] if missing >= size else _beginning(blocks[number], missing / size))
        if (missing := num_prompt - len(parts) * size) > 0:
            parts.append(maker.random(rng, missing))
        requests.append(Request((_joined(parts),), num_prompt, num_output, float(line["timestamp"]) / 1e3))
    return requests


def _joined(parts: Sequence[Prompt]) -> Prompt:
    if isinstance(parts[0], str):
        return " ".join(str(part).strip() for part in parts)
    return [id for part in parts for id in part if isinstance(id, int)]


def _beginning(block: Prompt, share: float) -> Prompt:
    if isinstance(block, list):
        return block[: round(len(block) * share)]
    words = block.split()
    return " ".join(words[: max(1, round(len(words) * share))])


def openai(maker: Maker, rng: Random, options: argparse.Namespace) -> list[Request]:
    """Bodies of chat completions, one a line, as they stand."""
    requests = []
    for number, line in enumerate(_lines(_path(options))[: options.num_prompts], 1):
        messages = line.get("messages")
        if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
            raise ConfigError(f"{options.dataset_path}, line {number}: messages are missing")
        text = " ".join(message["content"] for message in messages if isinstance(message.get("content"), str))
        num_output = options.output_len or line.get("max_completion_tokens") or line.get("max_tokens")
        left_out = ("messages", "max_tokens", "max_completion_tokens", "model", "stream", "stream_options")
        more = {name: value for name, value in line.items() if name not in left_out}
        requests.append(Request((text,), maker.count(text), num_output, messages=tuple(messages), more=more))
    return requests


def custom(maker: Maker, rng: Random, options: argparse.Namespace) -> list[Request]:
    """Prompts of a file: a line holds `prompt`, or `conversations` with a question and its answer."""
    requests = []
    for number, line in enumerate(_lines(_path(options))[: options.num_prompts], 1):
        turns = _turns(line.get("conversations"))
        prompt = line.get("prompt") or (turns[0] if turns else None)
        if not isinstance(prompt, str):
            raise ConfigError(f"{options.dataset_path}, line {number}: neither prompt nor conversations are there")
        num_output = options.output_len or line.get("output_tokens")
        if num_output is None and len(turns) > 1:
            num_output = max(1, maker.count(turns[1]))
        requests.append(Request((prompt,), maker.count(prompt), num_output))
    return requests


DATASETS: Mapping[str, Callable[[Maker, Random, argparse.Namespace], list[Request]]] = {
    "random": random,
    "generated-shared-prefix": generated_shared_prefix,
    "sharegpt": sharegpt,
    "mooncake": mooncake,
    "openai": openai,
    "custom": custom,
}


def make(maker: Maker, options: argparse.Namespace) -> list[Request]:
    """The requests of a measurement, with the times at which they are due. Raises ConfigError."""
    rng = Random(options.seed)
    requests = DATASETS[options.dataset_name](maker, rng, options)
    if not requests:
        raise ConfigError(f"the dataset {options.dataset_name} has no request that can be sent")
    if options.dataset_name == "mooncake":
        return requests
    return paced(requests, options.request_rate, options.burstiness, rng)


def paced(requests: Sequence[Request], rate: float, burstiness: float, rng: Random) -> list[Request]:
    """Requests that come at so many a second: at 1 as independent clients come (Poisson), above it more evenly, below in bursts;
    the gaps are gamma distributed. An infinite rate: all at once."""
    if math.isinf(rate):
        return list(requests)
    at_s, found = 0.0, []
    for one in requests:
        found.append(replace(one, at_s=at_s))
        at_s += rng.gammavariate(burstiness, 1.0 / (rate * burstiness))
    return found


def _path(options: argparse.Namespace) -> Path:
    if options.dataset_path is None:
        raise ConfigError(f"--dataset-name {options.dataset_name} reads a file; give --dataset-path FILE")
    return Path(options.dataset_path)


def _json(path: Path) -> Any:
    text = _text(path)
    try:
        return json.loads(text)
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}") from None


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except ValueError as error:
                raise ConfigError(f"{path}, line {number} is no JSON: {error}") from None
            if not isinstance(value, dict):
                raise ConfigError(f"{path}, line {number} is no JSON object")
            found.append(value)
    return found


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no UTF-8 text: {error}") from None
