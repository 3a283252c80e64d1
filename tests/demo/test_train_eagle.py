"""The recipe for a head: what it trains on is the model's, and the network that it trains is the one that a server runs."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from demo.train_eagle import Head, Target, Texts, converse, judge, train
from streamserve.cache.pool import KVPool
from streamserve.kernels.ops import Batch, NetworkParts, ReferenceAttention, apply_rope, rms_norm, silu_mul
from streamserve.models.checkpoint import open_checkpoint
from streamserve.models.eagle import EagleFile, EagleHead
from streamserve.models.network import build_network
from tests.models.conftest import one_thread as one_thread
from tests.models.tiny import build_reference, reference_logits
from tests.models.tiny_heads import streams

OPS = {"norm.rms": rms_norm, "rope.apply": apply_rope, "mlp.silu_mul": silu_mul, "attention.paged": ReferenceAttention}
NUM, LENGTH = 12, 40


class Script:
    """A template of a few tokens, as demo.train_eagle.Script reads one: a question, 5 6, an answer, 7."""

    beginning = (3, 4, 5)
    ends = (2, *range(84, 97))
    end = 2
    answering = 3
    forced = (-1, 5, 6, -1, 7)
    banned = (1,)


@pytest.fixture
def target(tmp_path: Path) -> Target:
    torch.manual_seed(1)
    build_reference("llama").save_pretrained(tmp_path / "model")
    target = Target(tmp_path / "model", NUM, LENGTH, torch.device("cpu"))
    target.layers_shown = (0, 1, 2)
    return target


@pytest.fixture
def texts(target: Target) -> Texts:
    texts = Texts.room(target, NUM, LENGTH)
    converse(target, Script(), texts, torch.tensor([0.0, 0.7, 1.0] * (NUM // 3)), 0.05)  # type: ignore[arg-type]
    return texts


def new_head(target: Target, texts: Texts) -> Head:
    spread = texts.shown.flatten(0, 1).pow(2).mean(0).sqrt()
    return Head(target, torch.arange(2, 97, 2), spread, LENGTH)


def test_conversations_follow_the_template_and_show_what_the_model_computes(texts: Texts) -> None:
    model = build_reference("llama")
    for row in range(3):
        tokens = texts.tokens[row].tolist()
        assert tokens[:3] == [3, 4, 5] and 1 not in tokens[3:]
        wanted = torch.cat(streams(model, tokens)[:3], -1)
        torch.testing.assert_close(texts.shown[row], wanted, rtol=0, atol=1e-4)
        logits = texts.states[row] @ model.lm_head.weight.detach().T
        torch.testing.assert_close(logits, reference_logits(model, tokens), rtol=0, atol=1e-3)
        if row == 0:  # at temperature 0
            asked = texts.is_answer[row].nonzero()[:, 0]
            logits[:, 1] = -torch.inf
            assert len(asked) and texts.tokens[row][asked].tolist() == logits[asked - 1].argmax(-1).tolist()


def test_a_trained_head_is_what_a_server_computes_pass_after_pass(target: Target, texts: Texts, tmp_path: Path) -> None:
    torch.manual_seed(2)
    head = new_head(target, texts)
    args = argparse.Namespace(train_s=60.0, steps=5, rate=1e-3, batch=5, passes=3, warmup=2)
    train(head, target, texts, args)
    head.save(tmp_path / "head", target)
    checkpoint = open_checkpoint(tmp_path / "model")
    file = EagleFile(tmp_path / "head", checkpoint.spec)
    pool = KVPool(checkpoint.spec, num_pages=8)
    network = build_network(checkpoint, pool=pool, dtype="float32")
    parts = NetworkParts(shape=file.spec, weights=file, dtype=torch.float32, device=torch.device("cpu"), ops=OPS)
    served = EagleHead(parts, file, network)  # type: ignore[arg-type]
    own = KVPool(file.spec, num_pages=8)

    def states(features_TE: Tensor, tokens: Tensor, start: int) -> Tensor:
        table = torch.arange(8, dtype=torch.int32)[None]
        positions, end = torch.arange(start, start + len(tokens)), start + len(tokens)
        batch = Batch(tokens, positions, [0, len(tokens)], [end], table, torch.tensor([0]), own)
        return served.forward(features_TE, tokens, positions, served.prepare(batch))

    with torch.inference_mode():
        tokens = texts.tokens[0]
        passes = [states[0] for states in head.first_passes(texts.shown[:1, :-2], texts.tokens[:1, 1:-1], 3)]
        got = states(served.features(texts.shown[0, :21]), tokens[1:22], 0)
        torch.testing.assert_close(got, passes[0][:21], rtol=0, atol=2e-2)
        for number in (1, 2):
            got = states(got[-1:], tokens[21 + number : 22 + number], 20 + number)
            torch.testing.assert_close(got[0], passes[number][20 + number], rtol=0, atol=2e-2)
        torch.testing.assert_close(served.logits(got), head.logits(passes[2][22:23]), rtol=0, atol=5e-2)
    assert served.token_ids_V is not None and served.token_ids_V.tolist() == list(range(2, 97, 2))


class Knowing(Head):
    """Its states are the model's own, so that it expects what the model expects."""

    target: Target
    texts: Texts

    def first_passes(self, shown_NMX: Tensor, tokens_NM: Tensor, count: int) -> Iterator[Tensor]:
        at = next(i for i in range(0, NUM, 8) if torch.equal(self.texts.tokens[i : i + 8, 1:-1], tokens_NM))
        return (self.texts.states[at : at + 8, 1:-1] for _ in range(count))

    def logits(self, states: Tensor) -> Tensor:
        return self.target.logits(states)


def test_a_head_that_expects_what_the_model_does_is_judged_always_right(target: Target, texts: Texts) -> None:
    head = Knowing(target, torch.arange(97), torch.ones(144), LENGTH)
    head.target, head.texts = target, texts
    assert judge(head, target, texts, 0.7) == [1.0] * 5
    assert max(judge(new_head(target, texts), target, texts, 0.7)) < 0.5
