"""Guesses change no token: drafted rows on real networks and on the fake one, against the same answers token by token."""

import asyncio
import os
from collections.abc import Iterator, Sequence
from functools import partial
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from streamserve.cache.pool import KVPool
from streamserve.default_model import find_default_model
from streamserve.engine.fake import FakeRunner, VirtualClock
from streamserve.engine.plan import Edits, Plan, Row, StepResult
from streamserve.engine.runner import ModelRunner
from streamserve.engine.sampler import Sampler
from streamserve.engine.stages import default_stages
from streamserve.errors import CheckpointError
from streamserve.kernels.ops import Network, NetworkParts, ReferenceAttention, apply_rope, rms_norm, silu_mul
from streamserve.kernels.registry import Facts
from streamserve.messages import SamplingParams, TokenLogprobs
from streamserve.models.checkpoint import open_checkpoint
from streamserve.models.decoder import Decoder
from streamserve.models.network import build_network
from tests.engine.by_hand import Answer, Hand, Rule, words_of
from tests.engine.memory import MemoryRunner, expected_tokens
from tests.kernels.packed import RandomWeights, small_spec

EXAMPLES = int(os.environ.get("STREAMSERVE_EXAMPLES", "40"))
SPEC = small_spec(vocab_size=61, num_hidden_layers=2)
V = SPEC.vocab_size
EOS = frozenset({3, 7})
PAGE_SIZE, NUM_PAGES, MAX_LEN, NUM_SLOTS = 16, 64, 96, 4
NUM_NEW = 18


def exact_network() -> tuple[Network, KVPool]:
    """A random network in float64, so that what else is in a step does not show in 32 bits."""
    ops: dict[str, Any] = {
        "norm.rms": rms_norm,
        "rope.apply": apply_rope,
        "mlp.silu_mul": silu_mul,
        "attention.paged": ReferenceAttention,
    }
    parts = NetworkParts(SPEC, RandomWeights(SPEC, "Q8_0"), torch.float64, torch.device("cpu"), ops)
    return Decoder(parts), KVPool(SPEC, num_pages=NUM_PAGES, page_size=PAGE_SIZE, dtype=torch.float64)


def packed_network() -> tuple[Network, KVPool]:
    """The packed decoder, whose bits do not depend on what else is in a step."""
    pytest.importorskip("numba")
    from streamserve.kernels.impl.numba_decoder import PackedDecoder, refusal

    reason = refusal(Facts("cpu", "auto", SPEC, PAGE_SIZE, "float32", frozenset(("Q4_1",))))
    if reason is not None:
        pytest.skip(reason)
    return PackedDecoder(SPEC, RandomWeights(SPEC, "Q4_1")), KVPool(SPEC, num_pages=NUM_PAGES, page_size=PAGE_SIZE)


@pytest.fixture(scope="module")
def exact() -> Iterator[ModelRunner]:
    yield from running_on(*exact_network())


@pytest.fixture(scope="module")
def packed() -> Iterator[ModelRunner]:
    yield from running_on(*packed_network())


def running_on(network: Network, pool: KVPool) -> Iterator[ModelRunner]:
    pool.k.normal_(std=3.0)  # rubbish, as pages have it that were used before
    pool.v.normal_(std=3.0)
    made = ModelRunner(network, pool, Sampler(V, default_stages(EOS)), num_slots=NUM_SLOTS, max_len=MAX_LEN)
    yield made
    made.close()


def a_third(answer: Sequence[int]) -> Any:
    """A rule under which what may come depends on what came."""
    rest = (sum(answer) + len(answer)) % 3
    return words_of([token for token in range(V) if token % 3 == rest], V)


@st.composite
def samplings(draw: st.DrawFn) -> SamplingParams:
    logprobs = draw(st.sampled_from([None, None, 0, 3]))
    return SamplingParams(
        temperature=draw(st.sampled_from([0.0, 0.0, 0.7, 1.5])),
        top_k=draw(st.sampled_from([0, 0, 1, 9])),
        top_p=draw(st.sampled_from([1.0, 0.8])),
        min_p=draw(st.sampled_from([0.0, 0.05])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.0, 1.4])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.0, 0.7])),
        presence_penalty=draw(st.sampled_from([0.0, 0.0, -0.4])),
        min_new_tokens=draw(st.integers(0, NUM_NEW)),
        logit_bias=draw(st.sampled_from([(), ((3, 4.0), (20, 3.0)), ((7, 6.0),)])),
        stop_token_ids=draw(st.sampled_from([frozenset(), frozenset({20, 21})])),
        logprobs=logprobs,
        logprob_token_ids=(5, 2) if logprobs == 0 else (),
    )


class Case:
    """A request, and how it is answered token by token, alone."""

    def __init__(
        self,
        hand: Hand,
        slot: int,
        sampling: SamplingParams,
        prompt: Sequence[int],
        seed: int,
        rule: Rule | None = None,
        num_new: int = NUM_NEW,
    ) -> None:
        self._new = partial(Answer, sampling=sampling, seed=seed, prompt=tuple(prompt), rule=rule)
        self._slot = slot
        self.alone = self._new(NUM_SLOTS - 1)  # a slot that nobody else has: its tokens are the right ones
        while len(self.alone.tokens) < num_new:
            hand.step((self.alone, ()))
        hand.close(self.alone)

    def new(self) -> Answer:
        return self._new(self._slot)

    def continuation(self, answer: Answer, count: int) -> list[int]:
        """The right guesses, as far as they are known."""
        at = len(answer.tokens)
        return self.alone.tokens[at : at + count]


@settings(max_examples=EXAMPLES // 4, deadline=None)
@given(data=st.data())
def test_guesses_change_neither_tokens_nor_log_probabilities(exact: ModelRunner, data: st.DataObject) -> None:
    compare_with_one_by_one(exact, data)


@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.data())
def test_guesses_change_nothing_on_the_packed_decoder_either(packed: ModelRunner, data: st.DataObject) -> None:
    compare_with_one_by_one(packed, data, tolerance=0.0)


def numbers(entry: TokenLogprobs) -> list[float]:
    return [entry.logprob, *(logprob for _, logprob in (*entry.top, *entry.asked))]


def compare_with_one_by_one(runner: ModelRunner, data: st.DataObject, tolerance: float = 1e-5) -> None:
    hand = Hand(runner.execute, num_pages=NUM_PAGES, page_size=PAGE_SIZE)
    cases = [
        Case(
            hand,
            slot,
            data.draw(samplings()),
            data.draw(st.lists(st.integers(0, V - 1), min_size=1, max_size=20)),
            data.draw(st.integers(0, 1000)),
            data.draw(st.sampled_from([None, None, a_third])),
        )
        for slot in range(data.draw(st.integers(1, 3)))
    ]
    answers = [case.new() for case in cases]
    chunk = data.draw(st.sampled_from([3, 100]))
    random = Random(data.draw(st.integers(0, 10_000)))
    while any(len(answer.tokens) < NUM_NEW for answer in answers):
        parts = []
        for case, answer in zip(cases, answers, strict=True):
            if len(answer.tokens) >= NUM_NEW or random.random() < 0.2:
                continue
            guesses = case.continuation(answer, random.randint(0, 5))
            guesses = [token if random.random() < 0.8 else random.randrange(V) for token in guesses]
            parts.append((answer, guesses))
        if parts:
            hand.step(*parts, chunk=chunk)
    for case, answer in zip(cases, answers, strict=True):
        assert answer.tokens[:NUM_NEW] == case.alone.tokens
        for ours, theirs in zip(answer.logprobs, case.alone.logprobs, strict=False):
            assert ours.token_id == theirs.token_id
            assert [ours.logprob, *dict(ours.top).values()] == pytest.approx(
                [theirs.logprob, *dict(theirs.top).values()], abs=1e-5
            )
            assert dict(ours.asked) == pytest.approx(dict(theirs.asked), abs=1e-5)
        hand.close(answer)


def test_right_guesses_are_all_taken_and_the_first_wrong_one_ends_its_row(exact: ModelRunner) -> None:
    hand = Hand(exact.execute, num_pages=NUM_PAGES, page_size=PAGE_SIZE)
    case = Case(hand, 0, SamplingParams(temperature=1.0), range(10), 4)
    tokens = case.alone.tokens
    answer = case.new()
    hand.step((answer, ()))
    assert answer.tokens == tokens[:1]
    hand.step((answer, tokens[1:6]))
    assert answer.tokens == tokens[:7] and answer.num_accepted == 5
    hand.step((answer, [(tokens[7] + 1) % V, *tokens[8:11]]))
    assert answer.tokens == tokens[:8] and answer.num_accepted == 5
    hand.step((answer, [tokens[8], tokens[9], (tokens[10] + 1) % V, tokens[11]]))
    assert answer.tokens == tokens[:11] and answer.num_accepted == 7


def test_a_row_whose_tokens_nobody_wants_leaves_its_slot_behind_its_known_token(exact: ModelRunner) -> None:
    hand = Hand(exact.execute, num_pages=NUM_PAGES, page_size=PAGE_SIZE)
    case = Case(hand, 0, SamplingParams(temperature=1.0, frequency_penalty=1.0), range(10), 4)
    answer = case.new()
    hand.step((answer, ()))
    known, guesses = answer.tokens[0], case.alone.tokens[1:4]
    row = Row(0, answer.num_computed, 4, (known, *guesses), num_drafts=3)
    assert exact.execute(Plan(0, (), (), (row,)), Edits(frozenset({0}))).rows[0].token_ids == ()
    while len(answer.tokens) < NUM_NEW:
        hand.step((answer, ()))
    assert answer.tokens == case.alone.tokens


# ---- the default model


NUM_TOLD = 10
PROMPTS = (
    "The capital of France is Paris. The capital of Germany is",
    "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return",
    "1, 2, 3, 4, 5, 6, 7, 8,",
)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_the_default_model_answers_the_same_whoever_guesses(dtype: str) -> None:
    try:
        checkpoint = open_checkpoint(find_default_model())
    except CheckpointError as error:
        pytest.skip(str(error))
    from streamserve.text.model import load_text_model

    tokenizer = load_text_model(checkpoint.path).tokenizer
    pool = KVPool(checkpoint.spec, num_pages=64, page_size=16)
    network = build_network(checkpoint, pool=pool, dtype=dtype)
    vocab_size = checkpoint.spec.vocab_size
    runner = ModelRunner(network, pool, Sampler(vocab_size, default_stages(frozenset({0}))), num_slots=4, max_len=128)
    hand = Hand(runner.execute, num_pages=64, page_size=16)
    params = [SamplingParams(temperature=0.0, logprobs=1), SamplingParams(temperature=0.0), SamplingParams(temperature=0.8)]
    cases = [
        Case(hand, slot, given, tokenizer.encode(text), 11, num_new=NUM_TOLD)
        for slot, (text, given) in enumerate(zip(PROMPTS, params, strict=True))
    ]
    answers = [case.new() for case in cases]
    while parts := [(case, answer) for case, answer in zip(cases, answers, strict=True) if len(answer.tokens) < NUM_TOLD]:
        drafted = []
        for case, answer in parts:
            guesses = case.continuation(answer, 1 + (answer.slot + len(answer.tokens)) % 4)
            if len(answer.tokens) % 3 == 0 and guesses:
                guesses[-1] += 1
            drafted.append((answer, guesses))
        hand.step(*drafted)
    runner.close()
    for case, answer in zip(cases, answers, strict=True):
        assert answer.tokens[:NUM_TOLD] == case.alone.tokens
        assert answer.num_accepted > NUM_TOLD // 3
        for ours, theirs in zip(answer.logprobs, case.alone.logprobs, strict=False):
            assert ours == theirs if dtype == "auto" else ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)


# ---- the fake


def fake(*, accuracy: float | None = None) -> MemoryRunner:
    return MemoryRunner(vocab_size=V, page_size=4, step_s=0.0, clock=VirtualClock(), draft_accuracy=accuracy)


def run_fake(runner: FakeRunner, plan: Plan, edits: Edits) -> StepResult:
    step = runner.forward(plan)
    step.sample(edits)
    return asyncio.run(step.done())


@given(data=st.data())
@settings(max_examples=EXAMPLES, deadline=None)
def test_the_fake_takes_the_guesses_that_its_model_agrees_with(data: st.DataObject) -> None:
    runner = fake()
    hand = Hand(partial(run_fake, runner), num_pages=64, page_size=4)
    prompt = data.draw(st.lists(st.integers(0, V - 1), min_size=1, max_size=12))
    right = expected_tokens(runner, prompt, NUM_NEW + 5)
    answer = Answer(0, SamplingParams(logprobs=0), 0, tuple(prompt))
    while len(answer.tokens) < NUM_NEW:
        guesses = right[len(answer.tokens) :][: data.draw(st.integers(0, 4))]
        if guesses and data.draw(st.booleans()):
            guesses[data.draw(st.integers(0, len(guesses) - 1))] += 1
        hand.step((answer, guesses))
    assert answer.tokens == right[: len(answer.tokens)]


def test_the_fakes_memory_holds_wrong_guesses_until_they_are_computed_again() -> None:
    runner = fake()
    hand = Hand(partial(run_fake, runner), num_pages=64, page_size=4)
    answer = Answer(0, SamplingParams(), 0, (1, 2, 3))
    right = expected_tokens(runner, [1, 2, 3], 6)
    hand.step((answer, ()))
    hand.step((answer, [right[1], (right[2] + 1) % V, right[3]]))
    assert answer.tokens == right[:3]
    runner._slots[0].computed = answer.num_computed = 6  # as if the wrong guess, which is at position 5, were right
    with pytest.raises(AssertionError, match="another prefix"):
        answer.tokens.append(right[3])
        runner._slots[0].tokens.append(right[3])
        hand.step((answer, ()))


def test_the_fake_notices_a_plan_over_guesses_that_are_being_verified() -> None:
    runner = fake()
    hand = Hand(partial(run_fake, runner), num_pages=64, page_size=4)
    answer = Answer(0, SamplingParams(), 0, (1, 2, 3))
    hand.step((answer, ()))
    row = Row(0, 3, 2, (answer.tokens[0], 9), (0,), num_drafts=1)
    step = runner.forward(Plan(2, (), (), (row,)))
    step.sample()
    with pytest.raises(AssertionError, match="being verified"):
        runner.forward(Plan(3, (), (), (Row(0, 4, 1, None),)))
    result = asyncio.run(step.done())
    assert len(result.rows[0].token_ids) == 1  # 9 was wrong
    runner.forward(Plan(3, (), (), (Row(0, 4, 1, result.rows[0].token_ids),)))


@pytest.mark.parametrize(("accuracy", "low", "high"), [(1.0, 1.0, 1.0), (0.0, 0.0, 0.0), (0.7, 0.6, 0.8)])
def test_the_fakes_drafter_is_right_as_often_as_it_is_told_to_be(accuracy: float, low: float, high: float) -> None:
    runner = fake(accuracy=accuracy)
    hand = Hand(partial(run_fake, runner), num_pages=256, page_size=4)
    answer = Answer(0, SamplingParams(), 0, (1, 2, 3))
    good = total = 0
    while len(answer.tokens) < 400:
        drafts, before = answer.drafts, len(answer.tokens)
        hand.step((answer, drafts), num_wanted=3)
        assert len(answer.drafts) == 3
        good += len(answer.tokens) - before - 1 if drafts else 0
        total += min(len(answer.tokens) - before, 3) if drafts else 0
    assert low <= good / total <= high
