"""Guesses change no token on a GPU: drafted rows on its runner, against the same answers token by token.

Where no GPU is, in Triton's interpreter, on a network of one layer and for fewer tokens.
"""

from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.devices import HAS_GPU, HAS_TRITON

if not HAS_TRITON:
    pytest.skip("needs Triton, if only its interpreter", allow_module_level=True)

from streamserve.cache.pool import DevicePool
from streamserve.engine.device_runner import DeviceRunner
from streamserve.engine.device_sampler import DeviceSampler
from streamserve.engine.device_state import MAX_PROMPTS, StepSize, max_decode_rows
from streamserve.engine.plan import Edits, Plan, Row, StepResult
from streamserve.kernels.devices.cuda import CUDA
from streamserve.kernels.devices.host import Host
from streamserve.kernels.impl.triton_decoder import TritonDecoder
from streamserve.kernels.ops import NetworkParts
from streamserve.messages import SamplingParams
from tests.engine.by_hand import Answer, Hand, words_of
from tests.kernels.packed import RandomWeights, small_spec

pytestmark = [
    pytest.mark.timeout(600 if HAS_GPU else 120),
    pytest.mark.filterwarnings("ignore:overflow encountered"),  # numpy, in the interpreter: hashes wrap round
    pytest.mark.filterwarnings("ignore:invalid value encountered"),  # surplus rows are whatever the memory held
]
NUM_SLOTS, MAX_DRAFTS, MAX_LEN, PAGE_SIZE, NUM_PAGES = 4, 4, 64, 4, 90
NUM_NEW = 30 if HAS_GPU else 5
# In the interpreter, as few as do.
SIZES = (StepSize(1), StepSize(2), StepSize(3, is_drafted=True), StepSize(16, is_drafted=True), StepSize(6, 16, False, True))
SPEC = small_spec(
    vocab_size=61,
    num_hidden_layers=2 if HAS_GPU else 1,
    hidden_size=32,
    intermediate_size=64,
    num_attention_heads=4,
    head_dim=16,
)
V, EOS = SPEC.vocab_size, frozenset({3, 7})

ASKED = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.0, frequency_penalty=0.7, min_new_tokens=5, logit_bias=((3, 6.0),), logprobs=2),
    SamplingParams(temperature=0.8, top_k=20, top_p=0.9, repetition_penalty=1.3, logprobs=0, logprob_token_ids=(5, 2)),
]


class Weights(RandomWeights):
    """Copied to wherever they are wanted."""

    def load(self, name: str, out: Tensor) -> None:
        out.copy_(self.tensor(name))


class Bench:
    """A runner, and hands that plan for it."""

    def __init__(self, *, deterministic: bool, graphs: bool) -> None:
        self.device = CUDA() if HAS_GPU else Host()
        where = self.device.torch_device
        max_rows = max_decode_rows(NUM_SLOTS, MAX_DRAFTS) + MAX_PROMPTS
        parts = NetworkParts(
            *(SPEC, Weights(SPEC, "Q8_0"), torch.float32, where, {}),
            max_len=MAX_LEN,
            max_rows=max_rows,
            deterministic=deterministic,
        )
        pool = DevicePool(SPEC, num_pages=NUM_PAGES, page_size=PAGE_SIZE, dtype=torch.float32, device=where)
        pool.k.normal_(std=3.0)  # rubbish, as pages have it that were used before
        pool.v.normal_(std=3.0)
        network = TritonDecoder(parts)
        if not HAS_GPU:
            network._max_few = 0  # all products are the library's: others take the interpreter minutes
        self.runner = DeviceRunner(
            self.device,
            network,
            pool,
            lambda state: DeviceSampler(
                self.device,
                vocab_size=V,
                eos_token_ids=EOS,
                max_rows=state.max_logits,
                params_SP=state.params_SP,
                last_token_S=state.last_token_S,
            ),
            vocab_size=V,
            num_slots=NUM_SLOTS,
            max_len=MAX_LEN,
            max_step_tokens=32,
            use_graphs=graphs,
            max_drafts=MAX_DRAFTS,
        )
        if HAS_GPU:
            self.runner.warm_up(32)
        elif graphs:
            self.runner._sizes = SIZES
        self.runner.capture()
        self.hand = Hand(self.execute, num_pages=NUM_PAGES, page_size=PAGE_SIZE)

    def execute(self, plan: Plan, edits: Edits) -> StepResult:
        step = self.runner.forward(plan)
        step.sample(edits)
        self.device.synchronize()
        return step.result()


OPTIONS: list[dict[str, bool]] = [{"deterministic": False, "graphs": True}]
if HAS_GPU:
    OPTIONS += [{"deterministic": True, "graphs": True}, {"deterministic": True, "graphs": False}]


@pytest.fixture(scope="module", params=OPTIONS, ids=str)
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    made = Bench(**request.param)
    yield made
    made.runner.close()


def a_third(answer: Sequence[int]) -> Any:
    """A rule under which what may come depends on what came: the sum of an answer stays divisible by three."""
    rest = -sum(answer) % 3
    return words_of([token for token in range(V) if token % 3 == rest], V)


def request(number: int, slot: int) -> Answer:
    """The same request for the same number, whatever its slot."""
    prompt = [(7 * number + 5 * i) % V for i in range(3 + 2 * number)]
    rule = a_third if number == 0 else None
    return Answer(slot, ASKED[number], 40 + number, tuple(prompt), rule)


@pytest.fixture(scope="module")
def alone(bench: Bench) -> list[Answer]:
    """Every request, by itself and token by token."""
    answers = []
    for number in range(len(ASKED)):
        answer = request(number, NUM_SLOTS - 1)
        while len(answer.tokens) < NUM_NEW:
            bench.hand.step((answer, ()))
        bench.hand.close(answer)
        answers.append(answer)
    return answers


def compare(answer: Answer, alone: Answer) -> None:
    assert answer.tokens[:NUM_NEW] == alone.tokens[: len(answer.tokens)]
    for ours, theirs in zip(answer.logprobs, alone.logprobs, strict=False):
        assert ours.token_id == theirs.token_id and ours.logprob == pytest.approx(theirs.logprob, abs=1e-4)
        assert dict(ours.top) == pytest.approx(dict(theirs.top), abs=1e-4)
        assert dict(ours.asked) == pytest.approx(dict(theirs.asked), abs=1e-4)


@pytest.mark.slow
def test_guesses_change_neither_tokens_nor_log_probabilities(bench: Bench, alone: list[Answer]) -> None:
    """Slots and pages are used again; some steps have prompts in them, some rows have no guesses."""
    random = Random(5)
    for numbers in ((0, 2, 3), (1, 2), (3, 0, 1)) if HAS_GPU else ((0, 2, 3), (1,)):
        answers = [request(number, slot) for slot, number in enumerate(numbers)]
        bench.hand.step((answers[0], ()))
        while any(len(answer.tokens) < NUM_NEW for answer in answers):
            parts = []
            for number, answer in zip(numbers, answers, strict=True):
                at = len(answer.tokens)
                guesses = alone[number].tokens[at : at + random.randint(0, MAX_DRAFTS)]
                guesses = [token if random.random() < 0.8 else random.randrange(V) for token in guesses]
                if at < NUM_NEW:
                    parts.append((answer, guesses))
            bench.hand.step(*parts, chunk=6)
        for number, answer in zip(numbers, answers, strict=True):
            compare(answer, alone[number])
            bench.hand.close(answer)


def test_right_guesses_are_all_taken_and_the_first_wrong_one_ends_its_row(bench: Bench, alone: list[Answer]) -> None:
    tokens, answer = alone[1].tokens, request(1, 0)
    bench.hand.step((answer, ()))
    bench.hand.step((answer, tokens[1:3]))
    assert answer.tokens == tokens[:4] and answer.num_accepted == 2
    bench.hand.step((answer, [(tokens[4] + 1) % V, *tokens[5:7]]))
    assert answer.tokens == tokens[:5] and answer.num_accepted == 2
    bench.hand.close(answer)


def test_a_row_whose_tokens_nobody_wants_leaves_its_slot_as_it_was(bench: Bench, alone: list[Answer]) -> None:
    answer, company = request(2, 0), request(1, 1)
    bench.hand.step((answer, ()), (company, ()))
    rows = []
    for one, right in ((answer, alone[2]), (company, alone[1])):
        pages = bench.hand._grow(one, one.num_computed + 2)
        rows.append(Row(one.slot, one.num_computed, 2, (one.tokens[0], right.tokens[1]), pages, num_drafts=1))
    result = bench.execute(Plan(0, (), (), tuple(rows)), Edits(frozenset({0})))
    assert result.rows[0].token_ids == () and list(result.rows[1].token_ids) == alone[1].tokens[1:3]
    bench.hand.step((answer, alone[2].tokens[1:3]))
    compare(answer, alone[2])
    assert answer.num_accepted == 2
    bench.hand.close(answer)
    bench.hand.close(company)
