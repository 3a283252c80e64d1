"""SGLang's command lines: what becomes of each kind of flag."""

import re

import pytest

from streamserve import launch_server
from streamserve.config import Config, DeviceConfig, ModelConfig, SchedulerConfig, ServerConfig
from streamserve.flags import Parser, UsageError, add_flags, read_config, settings
from streamserve.sglang_flags import _SAME, _SPECIAL, _THEIRS, _VALUES, arguments_of, read
from streamserve.speculative import Speculative, read_speculative


def _config(line: str) -> Config:
    parser = Parser("test")
    add_flags(parser, show_all=False)
    return read_config(parser.parse(read(line.split()).flags))[0]


def test_flags_that_are_ours_stay_as_they_are() -> None:
    line = "--model-path m --host 0.0.0.0 --port 30000 --mem-fraction-static 0.8 --disable-radix-cache --op a=b"
    found = read(line.split())
    assert found.flags == tuple(line.split()) and found.notes == ()


def test_what_means_nothing_here_is_left_out_with_one_reason_each() -> None:
    line = (
        "--trust-remote-code --tp 1 --enable-metrics --attention-backend=flashinfer --cuda-graph-bs 1 2 4 --port 1 "
        "--enable-metrics --grammar-backend xgrammar --cuda-graph-max-bs 8 --watchdog-timeout 300 --stream-interval 1 "
        "--chunked-prefill-size -1"
    )
    found = read(line.split())
    assert found.flags == ("--port", "1")
    assert len(found.notes) == 10
    assert found.notes[1] == "--tp means nothing here: one server uses one GPU"


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--tp 2", "--tp 2 cannot be served: one server uses one GPU; choose a model that fits it"),
        ("--tensor-parallel-size=4", "--tensor-parallel-size 4 cannot be served"),
        ("--dp-size 2", "start one per GPU and put a balancer before them"),
        (
            "--quantization fp8",
            "--quantization fp8 cannot be served: weights are served as the checkpoint holds them; give a GGUF",
        ),
        ("--lora-paths a=b c=d", "--lora-paths cannot be served: adapters are not served; merge"),
        ("--is-embedding", "--embedding-model MODEL"),
        ("--kv-cache-dtype fp8_e5m2", "leave it out"),
        ("--tp", "--tp is given without a value"),
        ("--enable-metric", "unknown flag --enable-metric; did you mean --enable-metrics?"),
        ("--model-pth x", "did you mean --model-path?"),
        ("--speculative-num-steps 3", "without --speculative-algorithm; allowed is NGRAM"),
        ("--speculative-algorithm EAGLE3", "without --speculative-draft-model-path, the network that guesses"),
        ("--speculative-algorithm NGRAM --speculative-draft-model-path x", "x has no use with --speculative-algorithm NGRAM"),
    ],
)
def test_what_cannot_be_served_is_an_error_that_says_what_to_do(line: str, words: str) -> None:
    with pytest.raises(UsageError, match=re.escape(words)):
        read(line.split())


@pytest.mark.parametrize(
    ("line", "guesses"),
    [
        ("--speculative-algorithm NGRAM", Speculative("ngram", None, 12)),
        ("--speculative-algorithm NGRAM --speculative-num-draft-tokens 8", Speculative("ngram", None, 7)),
        (
            "--speculative-algorithm EAGLE3 --speculative-draft-model-path p --speculative-num-steps 3 "
            "--speculative-eagle-topk 1 --speculative-num-draft-tokens 4",
            Speculative("eagle", "p", 3),
        ),
        ("--speculative-algorithm STANDALONE --speculative-draft-model p", Speculative("draft_model", "p", 4)),
        ("--speculative-algorithm NEXTN", Speculative("mtp", None, 4)),
        ("--speculative-algorithm ngram_shared", Speculative("ngram_shared", None, 12)),
    ],
)
def test_flags_about_guesses_become_one(line: str, guesses: Speculative) -> None:
    assert read_speculative(_config(line).scheduler.speculative) == guesses


def test_values_that_are_spelled_otherwise_are_translated() -> None:
    line = "--model m --dtype half --load-format gguf --schedule-policy dfs-weight"
    line += " --enable-deterministic-inference --reasoning-parser step3"
    assert _config(line) == Config(
        model=ModelConfig(model_path="m", dtype="float16", load_format="auto"),
        scheduler=SchedulerConfig(schedule_policy="lpm"),
        device=DeviceConfig(deterministic=True),
        server=ServerConfig(reasoning_parser="deepseek-r1"),
    )
    assert _config("--enable-priority-scheduling").scheduler.schedule_policy == "priority"


def test_the_tables_name_no_flag_twice() -> None:
    ours = {setting.flag for setting in settings()}
    assert ours & (_THEIRS.keys() | _SAME.keys()) == set()
    assert set(_VALUES) <= ours and _THEIRS.keys() & (_SAME.keys() | _SPECIAL.keys()) == set()
    assert all(flag in ours | _THEIRS.keys() or flag.startswith("--speculative-") for flag in _SAME.values())


def test_keyword_arguments_are_flags() -> None:
    given = {
        "model_path": "m",
        "tp_size": 1,
        "disable_cuda_graph": True,
        "enable_metrics": False,
        "cuda_graph_bs": [1, 2],
        "op": None,
    }
    assert arguments_of(given) == ["--model-path", "m", "--tp-size", "1", "--disable-cuda-graph", "--cuda-graph-bs", "1", "2"]


def test_notes_and_errors_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch_server.main(["--enable-metrics", "--port", "99999"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines()[0].startswith("streamserve: --enable-metrics means nothing here")
    assert "--port is 99999" in err
    assert launch_server.main(["--tp", "8"]) == 2
    assert capsys.readouterr().err.startswith("streamserve: --tp 8 cannot be served")
