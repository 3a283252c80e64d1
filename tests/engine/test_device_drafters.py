"""A network that guesses on a GPU's runner: it guesses what it would say itself, whatever was read before, and changes no answer.

A model that guesses for itself is right at any temperature, as far as it has read what it should: that is what is looked at, over
prompts in chunks, wrong guesses, answers that nobody wanted guesses for, shared and copied pages, and appended tokens. Where no
GPU is, in Triton's interpreter, for fewer tokens.
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
from streamserve.engine.device_state import MAX_PROMPTS, DeviceState, StepSize, max_decode_rows
from streamserve.engine.drafters import device_draft_model
from streamserve.engine.drafters.device_draft_model import DeviceDraftModel, max_guessed_tokens
from streamserve.engine.drafters.device_passes import num_own_pages
from streamserve.engine.plan import Admission, Append, Edits, PageCopy, Plan, Row, StepResult
from streamserve.kernels.devices.cuda import CUDA
from streamserve.kernels.devices.host import Host
from streamserve.kernels.impl.triton_decoder import TritonDecoder
from streamserve.kernels.ops import NetworkParts
from streamserve.messages import SamplingParams
from tests.engine.by_hand import Answer, Hand
from tests.kernels.packed import RandomWeights, small_spec

pytestmark = [
    pytest.mark.timeout(600 if HAS_GPU else 120),
    pytest.mark.filterwarnings("ignore:overflow encountered"),  # numpy, in the interpreter: hashes wrap round
    pytest.mark.filterwarnings("ignore:invalid value encountered"),  # surplus rows are whatever the memory held
]
NUM_SLOTS, MAX_DRAFTS, MAX_LEN, PAGE_SIZE, NUM_PAGES, MAX_STEP = 3, 3, 48, 4, 60, 24
NUM_NEW = 24 if HAS_GPU else 5
# In the interpreter, as few as do.
SIZES = (StepSize(2), StepSize(8, is_drafted=True), StepSize(2, 8))
SPEC = small_spec(
    vocab_size=61,
    num_hidden_layers=2,  # of the last one prompts leave keys and values only
    hidden_size=32,
    intermediate_size=64,
    num_attention_heads=4,
    head_dim=16,
)
V = SPEC.vocab_size
GREEDY = SamplingParams(temperature=0.0)
ASKED = [GREEDY, SamplingParams(temperature=1.0), SamplingParams(temperature=0.9, top_k=20, top_p=0.8)]


class Weights(RandomWeights):
    """Copied to wherever they are wanted."""

    def load(self, name: str, out: Tensor) -> None:
        out.copy_(self.tensor(name))


class Bench:
    """A runner on which a model guesses for itself, and hands that plan for it."""

    def __init__(self, *, graphs: bool, num_target_tokens: int = V) -> None:
        self.device = CUDA() if HAS_GPU else Host()
        pool, drafter_pool = self._pool(NUM_PAGES), self._pool(NUM_PAGES + num_own_pages(NUM_SLOTS, MAX_DRAFTS, PAGE_SIZE))

        def drafter(state: DeviceState) -> DeviceDraftModel:
            return DeviceDraftModel(
                *(self.device, self._network(max_guessed_tokens(NUM_SLOTS, MAX_DRAFTS)), drafter_pool, state),
                vocab_size=V,
                num_target_tokens=num_target_tokens,
                max_len=MAX_LEN,
                max_drafts=MAX_DRAFTS,
                max_step_tokens=MAX_STEP,
                read_sizes=(8,),
                use_graphs=graphs,
            )

        self.runner = DeviceRunner(
            self.device,
            self._network(max_decode_rows(NUM_SLOTS, MAX_DRAFTS) + MAX_PROMPTS),
            pool,
            lambda state: DeviceSampler(
                self.device,
                vocab_size=V,
                eos_token_ids=frozenset(),
                max_rows=state.max_logits,
                params_SP=state.params_SP,
                last_token_S=state.last_token_S,
            ),
            vocab_size=V,
            num_slots=NUM_SLOTS,
            max_len=MAX_LEN,
            max_step_tokens=MAX_STEP,
            use_graphs=graphs,
            max_drafts=MAX_DRAFTS,
            make_drafter=drafter,
        )
        if HAS_GPU:
            self.runner.warm_up(MAX_STEP)
        elif graphs:
            self.runner._sizes = SIZES
        self.runner.capture()
        self.hand = Hand(self.execute, num_pages=NUM_PAGES, page_size=PAGE_SIZE)

    def _network(self, max_rows: int) -> TritonDecoder:
        parts = NetworkParts(
            *(SPEC, Weights(SPEC, "Q8_0"), torch.float32, self.device.torch_device, {}), max_len=MAX_LEN, max_rows=max_rows
        )
        network = TritonDecoder(parts)
        if not HAS_GPU:
            network._max_few = 0  # all products are the library's: others take the interpreter minutes
        return network

    def _pool(self, num_pages: int) -> DevicePool:
        where = self.device.torch_device
        pool = DevicePool(SPEC, num_pages=num_pages, page_size=PAGE_SIZE, dtype=torch.float32, device=where)
        pool.k.normal_(std=3.0)  # rubbish, as pages have it that were used before
        pool.v.normal_(std=3.0)
        return pool

    def execute(self, plan: Plan, edits: Edits) -> StepResult:
        step = self.runner.forward(plan)
        step.sample(edits)
        self.device.synchronize()
        return step.result()

    def run(self, *rows: Row, appends: tuple[Append, ...] = (), copies: tuple[PageCopy, ...] = (), **edits: Any) -> StepResult:
        return self.execute(Plan(0, (), copies, rows, appends), Edits(**edits))


@pytest.fixture(scope="module", params=[True, False] if HAS_GPU else [True], ids=["graphs", "eager"] if HAS_GPU else ["graphs"])
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    made = Bench(graphs=request.param)
    yield made
    made.runner.close()


def request(number: int, slot: int) -> Answer:
    """The same request for the same number, whatever its slot."""
    prompt = [(7 * number + 5 * i) % V for i in range(9 + 2 * number)]
    return Answer(slot, ASKED[number], 40 + number, tuple(prompt))


@pytest.fixture(scope="module")
def alone(bench: Bench) -> list[list[int]]:
    """The tokens of every request, by itself and one by one."""
    answers = []
    for number in range(len(ASKED)):
        answer = request(number, NUM_SLOTS - 1)
        while len(answer.tokens) < NUM_NEW + MAX_DRAFTS + 1:
            assert bench.hand.step((answer, ())).rows[0].drafts == ()
        bench.hand.close(answer)
        answers.append(answer.tokens)
    return answers


def check(answer: Answer, alone: Sequence[int]) -> None:
    """The answer is what it is without guesses, and what is guessed is how it goes on."""
    at = len(answer.tokens)
    assert answer.tokens == alone[:at]
    assert list(answer.drafts)[: len(alone) - at] == alone[at : at + MAX_DRAFTS]


def test_a_model_guesses_its_own_tokens_over_chunks_and_wrong_guesses(bench: Bench, alone: list[list[int]]) -> None:
    random = Random(5)
    answers = [request(number, slot) for slot, number in enumerate((0, 1, 2))]
    bench.hand.step((answers[0], ()), chunk=5, num_wanted=MAX_DRAFTS)
    while any(len(answer.tokens) < NUM_NEW for answer in answers):
        parts: list[tuple[Answer, Sequence[int]]] = []
        for answer in answers:
            guesses = list(answer.drafts)
            if guesses and random.random() < 0.4:
                guesses[random.randrange(len(guesses))] = V - 1
            if len(answer.tokens) < NUM_NEW:
                parts.append((answer, guesses))
        bench.hand.step(*parts, chunk=5, num_wanted=MAX_DRAFTS)
        for answer, _ in parts:
            if answer.tokens:
                assert len(answer.drafts) == MAX_DRAFTS
                check(answer, alone[answers.index(answer)])
    assert sum(answer.num_accepted for answer in answers) > NUM_NEW / 2
    for answer in answers:
        bench.hand.close(answer)


def plain_steps(bench: Bench, answer: Answer, count: int) -> None:
    for _ in range(count):
        assert bench.hand.step((answer, ())).rows[0].drafts == ()


def test_an_answer_that_nobody_wanted_guesses_for_is_caught_up_with(
    bench: Bench, alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = request(0, 1)
    plain_steps(bench, answer, 3)
    bench.hand.step((answer, ()), num_wanted=2)
    assert list(answer.drafts) == alone[0][4:6]
    plain_steps(bench, answer, 3)
    monkeypatch.setattr(device_draft_model, "MAX_CATCH_UP", 2)
    assert bench.hand.step((answer, ()), num_wanted=1).rows[0].drafts == ()  # three tokens behind, two a step
    bench.hand.step((answer, ()), num_wanted=1)
    assert answer.tokens == alone[0][:9] and len(answer.drafts) == 1
    plain = request(0, 0)
    plain_steps(bench, plain, 10)
    assert [*answer.tokens, *answer.drafts] == plain.tokens
    bench.hand.close(plain)
    bench.hand.close(answer)


def test_tokens_that_were_appended_in_the_place_of_a_sample_are_read(bench: Bench) -> None:
    answer, appended = request(0, 2), (4, 9, 2)
    bench.hand.step((answer, ()), num_wanted=MAX_DRAFTS)
    start = answer.num_computed
    pages = bench.hand._grow(answer, start + 8)
    row = Row(answer.slot, start, 1, (answer.tokens[0],), pages, num_wanted=MAX_DRAFTS)
    [result] = bench.run(row, unwanted=frozenset({0})).rows
    assert result.token_ids == result.drafts == ()
    known = [*answer.prompt, answer.tokens[0], *appended]
    row = Row(answer.slot, start + 1, 3, appended, num_wanted=MAX_DRAFTS)
    [found] = bench.run(row, appends=(Append(answer.slot, appended, 4),)).rows
    bench.hand.close(answer)
    whole = Answer(0, GREEDY, 1, tuple(known))
    bench.hand.step((whole, ()))
    plain_steps(bench, whole, MAX_DRAFTS)
    assert [*found.token_ids, *found.drafts] == whole.tokens
    bench.hand.close(whole)


def test_a_prefix_brings_its_memory_with_it_and_so_does_the_copy_of_a_page(bench: Bench, alone: list[list[int]]) -> None:
    first, prompt = request(0, 0), request(0, 0).prompt
    bench.hand.step((first, ()))
    num_shared = len(prompt) - 2
    assert num_shared % PAGE_SIZE  # the last shared page is shared in part
    own = [bench.hand._free.pop() for _ in range(3)]
    src = first.pages[num_shared // PAGE_SIZE]
    shared = first.pages[: num_shared // PAGE_SIZE]
    admission = Admission(1, GREEDY, prompt, len(prompt), 1)
    row = Row(1, num_shared, 2, prompt[num_shared:], (*shared, *own), num_wanted=MAX_DRAFTS)
    [found] = bench.execute(Plan(0, (admission,), (PageCopy(src, own[0]),), (row,)), Edits()).rows
    assert [*found.token_ids, *found.drafts] == alone[0][: 1 + MAX_DRAFTS]
    bench.hand._free += own
    bench.hand.close(first)


def test_a_request_may_enter_its_slot_before_its_first_row(bench: Bench, alone: list[list[int]]) -> None:
    """As one does whose picture is encoded beside the step."""
    before, first = request(1, 1), request(0, 0)
    bench.hand.step((before, ()))
    plain_steps(bench, before, 3)  # so much of it is left unread in the slot
    bench.hand.close(before)
    first.slot, first.is_new, other = 1, False, request(1, 0)
    entering = (
        Admission(1, GREEDY, first.prompt, len(first.prompt), 0),
        Admission(0, GREEDY, other.prompt, len(other.prompt), 1),
    )
    page = bench.hand._free.pop()
    bench.execute(Plan(0, entering, (), (Row(0, 0, 1, other.prompt[:1], (page,), samples=False),)), Edits())
    bench.hand._free.append(page)
    [found] = bench.hand.step((first, ()), num_wanted=MAX_DRAFTS).rows
    assert [*found.token_ids, *found.drafts] == alone[0][: 1 + MAX_DRAFTS]
    bench.hand.close(first)


def test_a_prefix_that_was_never_read_is_read_by_the_first_who_wants_guesses(bench: Bench, alone: list[list[int]]) -> None:
    """An answer for which nobody wanted guesses enters the tree: those who go on from there want some."""
    first = request(0, 0)
    plain_steps(bench, first, 5)
    known = [*first.prompt, *first.tokens]
    num_shared = (len(known) - 1) // PAGE_SIZE * PAGE_SIZE
    shared = first.pages[: num_shared // PAGE_SIZE]
    assert num_shared >= len(first.prompt)  # the prompt alone was read
    for slot in (1, 2):
        own = [bench.hand._free.pop() for _ in range(2)]
        admission = Admission(slot, GREEDY, tuple(known), len(known), 1)
        row = Row(slot, num_shared, len(known) - num_shared, tuple(known[num_shared:]), (*shared, *own), num_wanted=MAX_DRAFTS)
        drafter = bench.runner._drafter
        assert isinstance(drafter, DeviceDraftModel)
        assert drafter._memory.opened(shared, num_shared) == (len(first.prompt) if slot == 1 else num_shared)
        [found] = bench.execute(Plan(0, (admission,), (), (row,)), Edits()).rows
        assert [*found.token_ids, *found.drafts][: len(alone[0]) - 5] == alone[0][5 : 6 + MAX_DRAFTS]
        bench.hand._free += own
    bench.hand.close(first)


def test_guesses_behind_the_last_page_of_a_row_go_into_a_page_that_is_nobodys(bench: Bench) -> None:
    """No page of another row is written to, wherever in its page a row ends."""
    for length in (PAGE_SIZE, 2 * PAGE_SIZE - 1):
        answer = Answer(1, GREEDY, 3, tuple(range(1, 1 + length)))
        pool = bench.runner._drafter._pool  # type: ignore[union-attr]
        before = pool.k.normal_(std=3.0).clone()
        bench.hand.step((answer, ()), num_wanted=MAX_DRAFTS)
        changed = set((pool.k != before).any(dim=(0, 2, 3, 4)).nonzero().flatten().tolist())
        assert changed <= {*answer.pages, NUM_PAGES}
        assert set(answer.pages) <= changed
        bench.hand.close(answer)


def test_no_token_is_guessed_that_the_target_does_not_have(alone: list[list[int]]) -> None:
    limit = 8
    assert max(alone[0][1 : 1 + MAX_DRAFTS]) >= limit
    few = Bench(graphs=False, num_target_tokens=limit)
    answer = request(0, 0)
    few.hand.step((answer, ()), num_wanted=MAX_DRAFTS)
    assert len(answer.drafts) == MAX_DRAFTS and max(answer.drafts) < limit
    few.runner.close()
