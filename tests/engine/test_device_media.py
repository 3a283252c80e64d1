"""Pictures on a GPU: the same plans on its runner and on the CPU's give the same answers. Without one in Triton's interpreter."""

import gc
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.devices import HAS_GPU, HAS_TRITON

if not HAS_TRITON:
    pytest.skip("needs Triton, if only its interpreter", allow_module_level=True)

from streamserve.cache.pool import DevicePool, KVPool
from streamserve.engine.device_embeddings import DeviceEmbeddings, Piece
from streamserve.engine.device_runner import DeviceRunner
from streamserve.engine.device_sampler import DeviceSampler
from streamserve.engine.device_state import MAX_PROMPTS, StepSize
from streamserve.engine.embeddings import Embeddings
from streamserve.engine.plan import Admission, Encode, Plan, Row, StepResult
from streamserve.engine.runner import ModelRunner
from streamserve.engine.sampler import Sampler
from streamserve.engine.stages import default_stages
from streamserve.kernels.devices.cuda import CUDA
from streamserve.kernels.devices.host import Host
from streamserve.kernels.impl.triton_decoder import TritonDecoder
from streamserve.kernels.ops import NetworkParts
from streamserve.messages import Media, SamplingParams, Span, media_token_ids
from streamserve.models.checkpoint import Checkpoint
from streamserve.models.dummy import random_model
from streamserve.models.network import build_network, choose_kernels
from streamserve.models.vision import Repeat, at_once

pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered"),  # numpy, in the interpreter: hashes wrap round
    pytest.mark.filterwarnings("ignore:invalid value encountered"),  # surplus rows are whatever the memory held
]
CONFIG = {
    "model_type": "qwen2",
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 61,
    "max_position_embeddings": 64,
}
M_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]}}
SLOTS, PAGE, NUM_PAGES = 3, 4, 20
GREEDY = SamplingParams(temperature=0.0, logprobs=2, repetition_penalty=1.5)


class Eyes:
    """Embeddings are given instead of pixels; of a picture without any there are none."""

    whole_spans: ClassVar[bool] = False
    repeat: Repeat = staticmethod(at_once)

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def encode(self, inputs: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        return [self.repeat(torch.clone, torch.from_numpy(one["embeds"]).to(self._device), "embeds") for one in inputs]


class Weights:
    """A checkpoint's weights, the same on every device."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint

    def load(self, name: str, out: Tensor) -> None:
        out.copy_(self._checkpoint.tensor(name))


def picture(key: bytes, width: int, *spans: Span) -> Media:
    num = sum(span.num_tokens for span in spans)
    embeds = torch.randn(num, width, generator=torch.Generator().manual_seed(key[0])).numpy()
    return Media(key, spans, {"embeds": embeds})


def runners(config: dict[str, Any], num_parts: int, *, is_captured: bool = True) -> tuple[ModelRunner, DeviceRunner]:
    """Two on the same network. `is_captured`: there are sizes for all steps."""
    checkpoint = Checkpoint(random_model(Path(), config))
    spec, width = checkpoint.spec, num_parts * 32
    pool = KVPool(spec, num_pages=NUM_PAGES, page_size=PAGE, dtype=torch.float32)
    choices = choose_kernels(checkpoint, dtype="float32", page_size=PAGE, overrides={"network": "torch"})
    network = build_network(checkpoint, pool=pool, dtype="float32", choices=choices)
    media = Embeddings(Eyes(torch.device("cpu")), num_slots=SLOTS, hidden_size=width, has_rotary=spec.has_rotary_sections)
    sampler = Sampler(spec.vocab_size, default_stages(frozenset()))
    reference = ModelRunner(network, pool, sampler, num_slots=SLOTS, max_len=64, embeddings=media)

    device = CUDA() if HAS_GPU else Host()
    where = device.torch_device
    parts = NetworkParts(spec, Weights(checkpoint), torch.float32, where, {}, max_len=64, max_rows=SLOTS + MAX_PROMPTS)  # type: ignore[arg-type]
    decoder = TritonDecoder(parts)
    if not HAS_GPU:
        decoder._max_few = 0  # all products are the library's: others take the interpreter minutes
    runner = DeviceRunner(
        device,
        decoder,
        DevicePool(spec, num_pages=NUM_PAGES, page_size=PAGE, dtype=torch.float32, device=where),
        lambda state: DeviceSampler(
            device,
            vocab_size=spec.vocab_size,
            eos_token_ids=frozenset(),
            max_rows=state.max_logits,
            params_SP=state.params_SP,
            last_token_S=state.last_token_S,
        ),
        vocab_size=spec.vocab_size,
        num_slots=SLOTS,
        max_len=64,
        max_step_tokens=32,
        media=DeviceEmbeddings(device, Eyes(where), num_slots=SLOTS, width=width, has_rotary=spec.has_rotary_sections),
    )
    if is_captured:
        runner._sizes = (StepSize(SLOTS), StepSize(1, 8), StepSize(1, 16))
        runner.capture()
    return reference, runner


def check(found: StepResult, wanted: StepResult) -> None:
    assert found.failed == wanted.failed
    for row, expected in zip(found.rows, wanted.rows, strict=True):
        assert row.token_ids == expected.token_ids
        for entry, other in zip(row.logprobs, expected.logprobs, strict=True):
            assert entry.logprob == pytest.approx(other.logprob, abs=1e-4)


def run(runner: DeviceRunner, plan: Plan) -> StepResult:
    step = runner.forward(plan)
    assert (step._loaded.size is not None) == bool(runner._graphs)
    step.sample()
    runner._device.synchronize()
    return step.result()


@pytest.mark.parametrize(("rope", "num_parts"), [(M_ROPE, 2), ({}, 1)], ids=["m-rope and deepstack, captured", "plain"])
def test_answers_about_pictures_are_the_cpus(rope: dict[str, Any], num_parts: int) -> None:
    reference, runner = runners({**CONFIG, **rope}, num_parts, is_captured=bool(rope))
    one = picture(b"1", 32 * num_parts, Span(1, 6, (1, 2, 3)))
    two = picture(b"2", 32 * num_parts, Span(8, 1, (1, 1, 1)), Span(10, 2, (1, 1, 2)))  # in two pieces
    again = picture(b"1", 32 * num_parts, Span(0, 6, (1, 2, 3)))
    ones, twos = media_token_ids(b"1", 6), media_token_ids(b"2", 3)
    prompt = (5, *ones, 7, twos[0], 11, *twos[1:])  # ends with a picture
    other = (*ones, 8, 9)
    text = (3, 4, 8)
    plans = [
        Plan(
            1,
            (Admission(0, GREEDY, prompt, 12, 0, (one, two)), Admission(1, GREEDY, text, 3, 1)),
            (),
            (Row(0, 0, 5, prompt[:5], (0, 1), samples=False), Row(1, 0, 3, text, (2,))),
            encodes=(Encode(b"1", 6, one.inputs),),
        ),
        Plan(
            2,
            (Admission(2, GREEDY, other, 8, 2, (again,)),),  # its picture is known
            (),
            (Row(0, 5, 6, prompt[5:11], (3,), samples=False), Row(1, 3, 1, None), Row(2, 0, 7, other[:7], (4, 5), samples=False)),
            encodes=(Encode(b"2", 3, two.inputs),),
        ),
        # A row of one token that is a picture's place, and rows whose tokens are known to the device alone.
        Plan(3, (), (), (Row(0, 11, 1, prompt[11:]), Row(1, 4, 1, None, (6,)), Row(2, 7, 1, other[7:])), forgets=(b"1",)),
        Plan(4, (), (), (Row(2, 8, 1, None, (7,)), Row(0, 12, 1, None, (8,)), Row(1, 5, 1, None))),
        # The slot goes to a text.
        Plan(5, (Admission(0, GREEDY, text, 3, 4),), (), (Row(0, 0, 3, text, (9,)), Row(2, 9, 1, None))),
        Plan(6, (), (), (Row(0, 3, 1, None), Row(2, 10, 1, None))),
    ]
    for plan in plans:
        check(run(runner, plan), reference.execute(plan))
    reference.close()
    runner.close()


def test_a_picture_that_cannot_be_encoded_harms_nobody_else() -> None:
    reference, runner = runners({**CONFIG, **M_ROPE}, 1)
    bad = Media(b"3", (Span(0, 2, (1, 1, 2)),), {})
    short = Media(b"4", (Span(0, 2, (1, 1, 2)),), {"embeds": np.zeros((1, 32), np.float32)})
    tokens = (*media_token_ids(b"3", 2), 4)
    plan = Plan(
        1,
        (
            *(Admission(slot, GREEDY, tokens, 3, 0, (one,)) for slot, one in ((0, bad), (1, short))),
            Admission(2, GREEDY, (5,), 1, 0),
        ),
        (),
        (Row(0, 0, 3, tokens, (0,)), Row(1, 0, 3, tokens, (1,)), Row(2, 0, 1, (5,), (2,))),
        encodes=(Encode(b"3", 2, bad.inputs), Encode(b"4", 2, short.inputs)),
    )
    found, wanted = run(runner, plan), reference.execute(plan)
    assert found.failed == wanted.failed and found.failed.keys() == {b"3", b"4"}
    check(StepResult(found.rows[2:]), StepResult(wanted.rows[2:]))
    after = Plan(2, (), (), (Row(2, 1, 1, None),), forgets=(b"3", b"4"))
    check(run(runner, after), reference.execute(after))
    reference.close()
    runner.close()


def test_what_an_encoder_had_when_it_failed_is_let_go() -> None:
    """It may have failed because there was no room for more."""
    held: list[weakref.ref[Tensor]] = []

    class Greedy(Eyes):
        def encode(self, inputs: Sequence[Mapping[str, Any]]) -> list[Tensor]:
            half_done = torch.zeros(4)
            held.append(weakref.ref(half_done))
            raise MemoryError("no more than this")

    device = CUDA() if HAS_GPU else Host()
    media = DeviceEmbeddings(device, Greedy(device.torch_device), num_slots=1, width=32)
    media.take_in(Plan(1, (), (), (), encodes=(Encode(b"1", 6, {}),)))
    taken = torch.ones(6, 32, device=device.torch_device)
    media.fill(taken, Piece(row=0, first=0, num_tokens=6, key=b"1", begin=0))  # a step needs it: now it is known
    assert not taken.any() and media.failures() == {b"1": "MemoryError: no more than this"} and media.failures() == {}
    gc.collect()  # a pretty traceback goes round in circles
    assert held[0]() is None
    media.close()


def test_parts_of_an_encoder_follow_each_other_a_step_apart_until_a_step_needs_it() -> None:
    """A mark that does not come stands for a step that is not done."""
    waits, goes_on = threading.Event(), threading.Event()

    class Mark:
        def record(self) -> None: ...
        def wait(self) -> None: ...
        def query(self) -> bool:
            return goes_on.is_set()

        def synchronize(self) -> None:
            waits.set()
            assert goes_on.wait(60)

    class Parted(Eyes):
        def encode(self, inputs: Sequence[Mapping[str, Any]]) -> list[Tensor]:
            parts.append(0)
            first = self.repeat(lambda x: x + 1, torch.zeros(1, 32, device=device.torch_device), 0)
            parts.append(1)
            second = self.repeat(lambda x: x + 1, first, 1)
            parts.append(2)
            return [self.repeat(lambda x: x + 1, second, 2)]

    parts: list[int] = []
    device = CUDA() if HAS_GPU else Host()
    media = DeviceEmbeddings(device, Parted(device.torch_device), num_slots=1, width=32)
    media.launched(Mark())
    media.take_in(Plan(1, (), (), (), encodes=(Encode(b"1", 1, {}),)))
    assert waits.wait(60) and parts == [0, 1] and media.failures() == {}
    threading.Timer(0.05, goes_on.set).start()  # that step ends, and what comes behind it waits for nothing
    taken = torch.zeros(1, 32, device=device.torch_device)
    media.fill(taken, Piece(row=0, first=0, num_tokens=1, key=b"1", begin=0))
    device.synchronize()
    assert parts == [0, 1, 2] and taken.tolist() == [[3.0] * 32]
    media.close()
