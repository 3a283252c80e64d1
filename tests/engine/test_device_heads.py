"""Heads that guess on a GPU's runner: they guess what the CPU's drafter guesses on the same weights, plan for plan, and change no
answer.

Two runners take the same plans: that of the CPU, whose heads are held to their definition by test_runner_drafters.py, and that of
a GPU; where none is, in Triton's interpreter, for fewer tokens.
"""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from tests.kernels.devices import HAS_GPU, HAS_TRITON

if not HAS_TRITON:
    pytest.skip("needs Triton, if only its interpreter", allow_module_level=True)

from streamserve.cache.kv_cache import KVCache
from streamserve.cache.pool import DevicePool, KVPool
from streamserve.engine.client import collect
from streamserve.engine.core import Engine, EngineOptions
from streamserve.engine.device_embeddings import DeviceEmbeddings
from streamserve.engine.device_runner import DeviceRunner
from streamserve.engine.device_sampler import DeviceSampler
from streamserve.engine.device_state import MAX_PROMPTS, StepSize, max_decode_rows
from streamserve.engine.drafters.device_heads import DeviceHeadDrafter
from streamserve.engine.drafters.find import Room, load_drafter
from streamserve.engine.drafters.find_on_gpu import DeviceRoom, load_device_drafter
from streamserve.engine.embeddings import Embeddings
from streamserve.engine.plan import NO_EDITS, Admission, Append, Edits, Encode, PageCopy, Plan, Row, StepResult
from streamserve.engine.policy import POLICIES
from streamserve.engine.runner import ModelRunner
from streamserve.engine.sampler import Sampler
from streamserve.engine.scheduler import Limits, Scheduler
from streamserve.engine.stages import default_stages
from streamserve.errors import ConfigError
from streamserve.kernels.devices.cuda import CUDA
from streamserve.kernels.devices.host import Host
from streamserve.kernels.impl.triton_decoder import TritonDecoder
from streamserve.kernels.ops import NetworkParts
from streamserve.messages import GenerateRequest, Media, SamplingParams, media_token_ids
from streamserve.messages import Span as MediaSpan
from streamserve.models.checkpoint import open_checkpoint
from streamserve.models.drafting import open_drafter
from streamserve.models.network import build_network, choose_kernels
from streamserve.models.vision import Repeat, at_once
from tests.engine.by_hand import Answer, Hand
from tests.engine.test_runner_drafters import Always
from tests.models.conftest import one_thread as one_thread
from tests.models.small_heads import HIDDEN, V, save_head, save_target

pytestmark = [
    pytest.mark.timeout(600 if HAS_GPU else 120),
    pytest.mark.filterwarnings("ignore:overflow encountered"),  # numpy, in the interpreter: hashes wrap round
    pytest.mark.filterwarnings("ignore:invalid value encountered"),  # surplus rows are whatever the memory held
]
NUM_SLOTS, MAX_DRAFTS, MAX_LEN, PAGE_SIZE, NUM_PAGES, MAX_STEP = 3, 2, 48, 4, 60, 24
NUM_NEW = 24 if HAS_GPU else 3
SIZES = (StepSize(2), StepSize(6, is_drafted=True), StepSize(2, 8))  # in the interpreter, as few as do
GREEDY = SamplingParams(temperature=0.0)


class Eyes:
    """Embeddings are given instead of pixels."""

    whole_spans: ClassVar[bool] = False
    repeat: Repeat = staticmethod(at_once)

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def encode(self, inputs: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        return [self.repeat(torch.clone, one["embeds"].to(self._device), "embeds") for one in inputs]


class Bench:
    """A runner on a CPU and one on a GPU, with the same model and what guesses for it, and hands that plan for both at once."""

    def __init__(self, folder: Path, kind: str, *, graphs: bool = True, sees: bool = False) -> None:
        self.device = CUDA() if HAS_GPU else Host()
        target = save_target(folder / "target", kind)
        path = None if kind == "mtp" else str(save_head(folder / "head", kind))
        self._sees = sees
        self._open = kind.split("-")[0], path
        self.cpu, self.runner = self._on_cpu(target), self._on_gpu(target, graphs)
        self.hand = Hand(self.execute, num_pages=NUM_PAGES, page_size=PAGE_SIZE)
        self.num_guesses = 0

    def _on_cpu(self, folder: Path) -> ModelRunner:
        checkpoint = open_checkpoint(folder)
        choices = choose_kernels(checkpoint, dtype="float32", page_size=PAGE_SIZE)
        pool = KVPool(checkpoint.spec, num_pages=NUM_PAGES, page_size=PAGE_SIZE)
        network = build_network(checkpoint, pool=pool, dtype="float32", choices=choices)
        opened = open_drafter(*self._open, checkpoint, page_size=PAGE_SIZE, dtype="float32")
        assert opened is not None
        room = Room(NUM_PAGES, PAGE_SIZE, NUM_SLOTS, MAX_DRAFTS, torch.float32, 1, choices)
        drafter = load_drafter(opened, network, room)
        sampler = Sampler(V, default_stages(frozenset()))
        eyes = Eyes(torch.device("cpu")) if self._sees else None
        media = Embeddings(eyes, num_slots=NUM_SLOTS, hidden_size=HIDDEN, has_rotary=False)
        return ModelRunner(network, pool, sampler, num_slots=NUM_SLOTS, max_len=MAX_LEN, drafter=drafter, embeddings=media)

    def _on_gpu(self, folder: Path, graphs: bool) -> DeviceRunner:
        checkpoint, where = open_checkpoint(folder), self.device.torch_device
        max_rows = max_decode_rows(NUM_SLOTS, MAX_DRAFTS) + MAX_PROMPTS
        parts = NetworkParts(checkpoint.spec, checkpoint, torch.float32, where, {}, max_len=MAX_LEN, max_rows=max_rows)
        network = TritonDecoder(parts)
        opened = open_drafter(*self._open, checkpoint, page_size=PAGE_SIZE, dtype="float32", device="cuda")
        assert opened is not None
        room = DeviceRoom(NUM_SLOTS, PAGE_SIZE, MAX_DRAFTS, MAX_STEP, MAX_LEN, torch.float32, graphs)
        make = load_device_drafter(opened, network, self.device, room)
        checkpoint.finish()
        pool = DevicePool(checkpoint.spec, num_pages=NUM_PAGES, page_size=PAGE_SIZE, dtype=torch.float32, device=where)
        runner = DeviceRunner(
            *(self.device, network, pool),
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
            make_drafter=lambda state: make(state, NUM_PAGES, MAX_LEN),
            media=DeviceEmbeddings(self.device, Eyes(where), num_slots=NUM_SLOTS, width=HIDDEN) if self._sees else None,
        )
        drafter = runner._drafter
        assert isinstance(drafter, DeviceHeadDrafter)
        for memory in (pool, drafter._pool):
            memory.k.normal_(std=3.0)  # rubbish, as pages have it that were used before
            memory.v.normal_(std=3.0)
        if HAS_GPU:
            runner.warm_up(MAX_STEP)
        else:
            network._max_few = drafter._head._max_few = 0  # all products are the library's: others take the interpreter minutes
            runner._sizes = SIZES if graphs else ()
        runner.capture()
        return runner

    def execute(self, plan: Plan, edits: Edits) -> StepResult:
        """What the GPU brings, which is what the CPU brings."""
        step = self.runner.forward(plan)
        step.sample(edits)
        self.device.synchronize()
        found, wanted = step.result(), self.cpu.execute(plan, edits)
        assert [(row.token_ids, row.drafts) for row in found.rows] == [(row.token_ids, row.drafts) for row in wanted.rows]
        self.num_guesses += sum(len(row.drafts) for row in found.rows)
        return found

    def run(self, *rows: Row, **parts: Any) -> StepResult:
        """A step of these rows."""
        edits = Edits(unwanted=parts.pop("unwanted", frozenset()))
        return self.execute(Plan(**{"step": 0, "admissions": (), "copies": (), **parts}, rows=rows), edits)

    def pages(self, count: int) -> tuple[int, ...]:
        return tuple(self.hand._free.pop() for _ in range(count))

    def close(self) -> None:
        self.runner.close()
        self.cpu.close()


@pytest.fixture(scope="module", params=["eagle", "mtp"])
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    made = Bench(tmp_path_factory.mktemp(request.param), request.param)
    yield made
    made.close()


def request(number: int, slot: int) -> Answer:
    """The same request for the same number, whatever its slot."""
    return Answer(slot, GREEDY, 40 + number, tuple((7 * number + 5 * i) % V for i in range(9 + 2 * number)))


def run_with_guesses(bench: Bench, numbers: Sequence[int], num_new: int) -> list[Answer]:
    """Prompts in chunks, beside answers; of the guesses of each step some are verified, some are bent first."""
    random = Random(5)
    answers = [request(number, slot) for slot, number in enumerate(numbers)]
    bench.hand.step((answers[0], ()), chunk=7, num_wanted=MAX_DRAFTS)
    while any(len(answer.tokens) < num_new for answer in answers):
        parts: list[tuple[Answer, Sequence[int]]] = []
        for answer in answers:
            guesses = list(answer.drafts)
            if guesses and random.random() < 0.3:
                guesses[random.randrange(len(guesses))] = V - 1
            elif random.random() < 0.3:
                guesses = []
            if len(answer.tokens) < num_new:
                parts.append((answer, guesses))
        bench.hand.step(*parts, chunk=7, num_wanted=random.choice((0, 2, MAX_DRAFTS, MAX_DRAFTS)))
    for answer in answers:
        bench.hand.close(answer)
    return answers


def test_guesses_are_those_of_the_cpu_over_chunks_wrong_guesses_and_slots_used_again(bench: Bench) -> None:
    before = bench.num_guesses
    answers = run_with_guesses(bench, (0, 1, 2), NUM_NEW)
    assert bench.num_guesses - before > 3 * NUM_NEW
    [again] = run_with_guesses(bench, (1,), 2)
    assert again.tokens[:2] == answers[1].tokens[:2]


class Stepping:
    """The bench as an engine's runner."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self.num_admissions = self.num_copies = 0

    def forward(self, plan: Plan) -> "Stepped":
        self.num_admissions += len(plan.admissions)
        self.num_copies += len(plan.copies)
        return Stepped(self._bench, plan)


class Stepped:
    """A step of it: done when its tokens are chosen."""

    def __init__(self, bench: Bench, plan: Plan) -> None:
        self._bench, self._plan = bench, plan

    def sample(self, edits: Edits = NO_EDITS) -> None:
        self._result = self._bench.execute(self._plan, edits)

    def is_done(self) -> bool:
        return True

    async def done(self) -> StepResult:
        return self._result


@pytest.mark.anyio
@pytest.mark.parametrize("bench", ["eagle"], indirect=True)
async def test_an_engine_short_of_pages_makes_plans_that_both_follow_alike(bench: Bench) -> None:
    """Requests with a common prefix that do not fit at once: some are preempted and come back to what is left of their pages."""
    stem, runner = request(2, 0).prompt[:9], Stepping(bench)
    cache = KVCache(8, PAGE_SIZE)
    scheduler = Scheduler(cache, Limits(NUM_SLOTS, 8, frozenset()), POLICIES["fcfs"], speculation=Always())
    engine = Engine(scheduler, runner, EngineOptions(MAX_LEN, V, frozenset(), seed=0))
    params = SamplingParams(temperature=0.0, max_new_tokens=11, ignore_eos=True)
    running = asyncio.create_task(engine.run())
    boxes = [await engine.submit(GenerateRequest(f"{n}", (*stem, n, 4), params)) for n in range(2)]
    answers = [await collect(box) for box in boxes]
    running.cancel()
    await asyncio.wait([running])
    assert all(answer.error is None and len(answer.token_ids) == 11 for answer in answers)
    assert runner.num_admissions > 2 and runner.num_copies and sum(answer.num_drafted for answer in answers)
    cache.check()


def test_what_follows_a_sample_that_nobody_wanted_is_known_when_it_comes(bench: Bench) -> None:
    """Tokens are appended in its place, by themselves or behind a piece of them; meanwhile other slots go on."""
    answer, other = request(0, 2), request(1, 0)
    bench.hand.step((answer, ()), (other, ()), num_wanted=MAX_DRAFTS)
    start, appended = answer.num_computed, (4, 9, 2, 11)
    pages = bench.hand._grow(answer, start + 8)
    row = Row(2, start, 2, (answer.tokens[0], 3), pages, num_drafts=1, num_wanted=MAX_DRAFTS)
    assert bench.run(row, unwanted=frozenset({0})).rows[0].drafts == ()
    bench.hand.step((other, other.drafts), num_wanted=MAX_DRAFTS)
    row = Row(2, start + 1, 2, appended[:2], samples=False)
    bench.run(row, appends=(Append(2, appended, 5),))
    bench.hand.step((other, ()), num_wanted=1)
    row = Row(2, start + 3, 2, appended[2:], num_wanted=MAX_DRAFTS)
    [found] = bench.run(row).rows
    assert len(found.drafts) == MAX_DRAFTS
    bench.hand.close(answer)
    bench.hand.close(other)


def test_prefixes_bring_their_memory_and_so_do_copies_of_pages(bench: Bench) -> None:
    """One request is computed; another one begins with most of its tokens, as after a preemption: prompt and answer so far."""
    first = request(2, 0)
    bench.hand.step((first, ()))
    bench.hand.step((first, ()))
    known = (*first.prompt, *first.tokens)
    num_shared = len(first.prompt) - 2
    assert num_shared % PAGE_SIZE  # the last shared page is shared in part
    shared, src = first.pages[: num_shared // PAGE_SIZE], first.pages[num_shared // PAGE_SIZE]
    own = bench.pages(4)
    row = Row(1, num_shared, 2, known[num_shared : num_shared + 2], (*shared, *own), samples=False)
    entering = (Admission(1, GREEDY, known, len(first.prompt), 7),)
    bench.run(row, admissions=entering, copies=(PageCopy(src, own[0]),))
    row = Row(1, num_shared + 2, 2, known[num_shared + 2 :], num_wanted=MAX_DRAFTS)
    [found] = bench.run(row).rows
    assert found.token_ids and len(found.drafts) == MAX_DRAFTS
    drafted = Row(1, len(known), 1 + MAX_DRAFTS, (*found.token_ids, *found.drafts), num_drafts=MAX_DRAFTS, num_wanted=2)
    assert len(bench.run(drafted).rows[0].drafts) == 2
    bench.hand._free += own
    bench.hand.close(first)


def test_prompts_whose_log_probabilities_are_wanted_are_followed(bench: Bench) -> None:
    answer = request(0, 0)
    sampling = SamplingParams(temperature=0.0, prompt_logprobs=1)
    own = bench.pages(4)
    row = Row(0, 0, 5, answer.prompt[:5], own, samples=False, wants_all_logits=True)
    bench.run(row, admissions=(Admission(0, sampling, answer.prompt, len(answer.prompt), 1),))
    [found] = bench.run(Row(0, 5, 4, answer.prompt[5:], wants_all_logits=True, num_wanted=MAX_DRAFTS)).rows
    assert len(found.drafts) == MAX_DRAFTS and len(found.prompt_logprobs) == 3
    bench.hand._free += own


def test_a_step_that_failed_leaves_nothing_behind(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    before = request(0, 1)
    bench.hand.step((before, ()), num_wanted=MAX_DRAFTS)
    row = Row(1, before.num_computed, 1, (before.tokens[0],), bench.hand._grow(before, 16))
    bench.run(row, unwanted=frozenset({0}))
    with monkeypatch.context() as broken:
        broken.setattr(bench.runner._network, "forward", lambda inputs: 1 / 0)
        broken.setattr(bench.runner, "_graphs", {})
        broken.setattr(bench.runner._state, "_captured", type(bench.runner._state._captured)(()))
        failing = request(1, 0)
        admission = Admission(0, GREEDY, failing.prompt, len(failing.prompt), 1)
        with pytest.raises(ZeroDivisionError):
            bench.runner.forward(Plan(9, (admission,), (), (Row(0, 0, 11, failing.prompt, bench.pages(3)),)))
    bench.hand.close(before)
    answers = request(2, 1), request(0, 0)
    for chunk in (8, 1000):
        bench.hand.step(*((answer, answer.drafts) for answer in answers), chunk=chunk, num_wanted=MAX_DRAFTS)
    for answer in answers:
        assert len(answer.drafts) == MAX_DRAFTS
        bench.hand.close(answer)


def test_prompts_with_pictures_are_followed_in_pieces(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "eagle", graphs=False, sees=True)
    embeds = torch.randn(6, HIDDEN, generator=torch.Generator().manual_seed(6))
    media = Media(b"cat", (MediaSpan(3, 6),), {"embeds": embeds})
    prompt = (5, 7, 9, *media_token_ids(b"cat", 6), 8, 6)
    entering = (Admission(1, GREEDY, prompt, len(prompt), 4, (media,)),)
    first = Row(1, 0, 6, prompt[:6], bench.pages(4), samples=False)  # ends in the middle of the picture
    bench.run(first, admissions=entering, encodes=(Encode(b"cat", 6, media.inputs),))
    [found] = bench.run(Row(1, 6, 5, prompt[6:], num_wanted=MAX_DRAFTS)).rows
    assert len(found.drafts) == MAX_DRAFTS
    bench.run(Row(1, 11, 1, None, num_wanted=2))
    bench.close()


def test_a_head_with_a_vocabulary_and_an_embedding_of_its_own_guesses_kernel_by_kernel(tmp_path: Path) -> None:
    bench = Bench(tmp_path, "eagle-own", graphs=False)
    run_with_guesses(bench, (0, 2), 2)
    assert bench.num_guesses > 3
    bench.close()


def test_a_head_that_kernels_cannot_run_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    target = open_checkpoint(save_target(tmp_path / "target", "eagle"))
    folder = save_head(tmp_path / "head", "eagle", head_dim=8)
    with pytest.raises(ConfigError, match="cannot guess on a GPU: head size 8 is not supported"):
        open_drafter("eagle", str(folder), target, page_size=PAGE_SIZE, dtype="float32", device="cuda")
