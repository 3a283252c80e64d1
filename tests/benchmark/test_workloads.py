"""Datasets as requests: lengths, what is shared, when they are due."""

import argparse
import json
import math
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest

from streamserve.benchmark import workloads
from streamserve.benchmark.options import DATASET_NAMES, add_options
from streamserve.benchmark.texts import WORDS, Ids, Tokenized, Words
from streamserve.benchmark.workloads import DATASETS, Request, make, mooncake_requests, paced
from streamserve.errors import ConfigError
from streamserve.text.byte_tokenizer import ByteTokenizer


def _options(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_options(parser)
    return parser.parse_args(arguments)


IDS = Ids(range(100, 200), Words())


def test_the_command_line_offers_every_dataset() -> None:
    assert tuple(DATASETS) == DATASET_NAMES


def test_random_lengths_lie_between_their_share_and_all_of_them() -> None:
    options = _options("--num-prompts", "200", "--random-input", "40", "--random-output", "10", "--random-range-ratio", "0.5")
    requests = make(IDS, options)
    assert {one.num_prompt for one in requests} == set(range(20, 41))
    assert {one.num_output for one in requests} == set(range(5, 11))
    assert all(len(one.parts[0]) == one.num_prompt for one in requests)
    assert make(IDS, options) == requests, "a seed makes the same again"
    assert make(IDS, _options("--seed", "1")) != make(IDS, _options())
    exact = make(IDS, _options("--num-prompts", "9"))
    assert {(one.num_prompt, one.num_output, one.at_s) for one in exact} == {(1024, 128, 0.0)}


def test_groups_share_their_first_part_only() -> None:
    names = ("--gsp-num-groups", "3", "--gsp-prompts-per-group", "4", "--gsp-system-prompt-len", "30", "--gsp-question-len", "5")
    requests = make(IDS, _options("--dataset-name", "generated-shared-prefix", *names))
    assert len(requests) == 12
    assert len({str(one.parts[0]) for one in requests}) == 3 and len({str(one.parts[1]) for one in requests}) == 12
    assert all((len(one.parts[0]), len(one.parts[1]), one.num_prompt) == (30, 5, 35) for one in requests)
    assert len({str(one.parts[0]) for one in requests[:4]}) > 1, "groups are mixed"


def _file(folder: Path, *lines: Any) -> str:
    path = folder / "data"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return str(path)


def test_conversations_that_are_too_short_or_too_long_are_left_out(tmp_path: Path) -> None:
    def one(prompt: int, answer: int) -> dict[str, Any]:
        return {"conversations": [{"from": "human", "value": "a " * prompt}, {"from": "gpt", "value": "b " * answer}]}

    path = _file(
        tmp_path, [one(10, 20), one(2, 20), one(10, 2), one(2000, 20), one(1000, 1500), {"conversations": []}, one(8, 9)]
    )
    requests = make(IDS, _options("--dataset-name", "sharegpt", "--dataset-path", path))
    assert sorted((one.num_prompt, one.num_output) for one in requests) == [(8, 9), (10, 20)]
    (first,) = make(
        IDS, _options("--dataset-name", "sharegpt", "--dataset-path", path, "--num-prompts", "1", "--sharegpt-output-len", "7")
    )
    assert first.num_output == 7


@pytest.mark.parametrize("maker", [IDS, Words()])
def test_a_trace_shares_blocks_and_keeps_its_times(maker: Any, tmp_path: Path) -> None:
    lines = [
        {"timestamp": 0, "input_length": 1200, "output_length": 4, "hash_ids": [0, 1, 2]},
        {"timestamp": 3000, "input_length": 1100, "output_length": 500, "hash_ids": [0, 1, 9]},
    ]
    path = _file(tmp_path, *lines)
    first, second = make(maker, _options("--dataset-name", "mooncake", "--dataset-path", path, "--mooncake-slowdown-factor", "2"))
    assert (first.at_s, second.at_s) == (0.0, 6.0)
    one, other = (
        request.parts[0] if isinstance(request.parts[0], list) else request.parts[0].split() for request in (first, second)
    )
    assert (len(one), len(other)) == (1200, 1100)
    assert one[:1024] == other[:1024] and one[1024:1100] != other[1024:]
    (half,) = mooncake_requests(lines[:1], maker, Random(0), lengths=0.5)
    assert half.num_prompt == 600


def test_chats_keep_their_fields_and_custom_files_their_prompts(tmp_path: Path) -> None:
    chat = {"model": "x", "messages": [{"role": "user", "content": "a b"}], "max_tokens": 3, "tools": [], "stream": False}
    (one,) = make(Words(), _options("--dataset-name", "openai", "--dataset-path", _file(tmp_path, chat)))
    assert (one.num_output, one.num_prompt, one.messages, one.more) == (3, 2, tuple(chat["messages"]), {"tools": []})
    lines = [{"prompt": "a b c"}, {"conversations": [{"content": "q"}, {"content": "d e"}]}, {"prompt": "f", "output_tokens": 9}]
    found = make(Words(), _options("--dataset-name", "custom", "--dataset-path", _file(tmp_path, *lines)))
    assert [(one.parts, one.num_output) for one in found] == [(("a b c",), None), (("q",), 2), (("f",), 9)]


@pytest.mark.parametrize(
    ("dataset", "text", "words"),
    [
        ("custom", None, "--dataset-name custom reads a file; give --dataset-path"),
        ("custom", '{"prompt": "a"}\n{', "line 2 is no JSON"),
        ("custom", "[]", "line 1 is no JSON object"),
        ("custom", "{}", "line 1: neither prompt nor conversations"),
        ("openai", '{"messages": []}', "line 1: messages are missing"),
        ("openai", '{"messages": [3]}', "line 1: messages are missing"),
        ("custom", '{"conversations": [3]}', "line 1: neither prompt nor conversations"),
        ("custom", "\udcff", "is no UTF-8 text"),
        ("mooncake", '{"timestamp": 0}', "is no trace of Mooncake's"),
        ("sharegpt", "{}", "no list of conversations"),
        ("sharegpt", "[1]", "no list of conversations"),
        ("sharegpt", '[{"conversations": [3, 4]}]', "has no request that can be sent"),
        ("sharegpt", "[]", "has no request that can be sent"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, dataset: str, text: str | None, words: str) -> None:
    arguments = ["--dataset-name", dataset]
    if text is not None:
        (tmp_path / "data").write_text(text, encoding="utf-8", errors="surrogateescape")
        arguments += ["--dataset-path", str(tmp_path / "data")]
    with pytest.raises(ConfigError, match=words):
        make(Words(), _options(*arguments))


@pytest.mark.parametrize(("burstiness", "spread"), [(1.0, 1.0), (100.0, 0.1), (0.25, 2.0)])
def test_requests_come_at_their_rate(burstiness: float, spread: float) -> None:
    requests = [Request(("a",), 1, 1)] * 4000
    due = [one.at_s for one in paced(requests, 20.0, burstiness, Random(3))]
    gaps = [later - before for before, later in pairwise(due)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 20, rel=0.15)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert deviation / mean == pytest.approx(spread, rel=0.15)
    assert {one.at_s for one in paced(requests, math.inf, 1.0, Random(0))} == {0.0}


def test_texts_have_the_tokens_that_were_asked_for() -> None:
    maker = Tokenized(ByteTokenizer())
    for count in (1, 17, 300):
        assert maker.count(maker.random(Random(count), count)) == count
    assert Words(2.0).count(Words(2.0).random(Random(0), 50)) == 50
    assert len(set(WORDS)) == len(WORDS) > 400
    assert workloads.MOONCAKE_BLOCK == 512
