"""The GPU's sampler against the CPU's, row by row. Where no GPU is, its kernels run in Triton's interpreter."""

import pytest

pytest.importorskip("triton")

import numpy as np
import torch

from streamserve.engine.device_sampler import DeviceSampler
from streamserve.engine.plan import Admission, Append
from streamserve.engine.sampler import Sampler
from streamserve.engine.stages import default_stages
from streamserve.kernels.devices.cuda import CUDA
from streamserve.kernels.devices.host import Host
from streamserve.messages import SamplingParams, TokenLogprobs

V, SLOTS, EOS = 301, 12, frozenset({0, 7})
GREEDY = SamplingParams(temperature=0.0)


class Pair:
    """The same admissions and rows on both samplers."""

    def __init__(self) -> None:
        self.device = CUDA.find() or Host()
        where = self.device.torch_device
        self.params_SP = torch.full((SLOTS, 8), -7, dtype=torch.int32, device=where)
        self.last_token_S = torch.full((SLOTS,), -9, dtype=torch.int32, device=where)
        self.ours = DeviceSampler(
            self.device,
            vocab_size=V,
            eos_token_ids=EOS,
            max_rows=SLOTS,
            params_SP=self.params_SP,
            last_token_S=self.last_token_S,
        )
        self.cpu = Sampler(V, default_stages(EOS))

    def admit(
        self, slot: int, sampling: SamplingParams, history: tuple[int, ...] = (1, 2, 3), num_prompt: int = 3, seed: int = 5
    ) -> None:
        admission = Admission(slot, sampling, history, num_prompt, seed)
        self.params_SP[slot] = torch.tensor(self.ours.admit(admission), dtype=torch.int32)
        self.cpu.admit(admission)

    def sample(
        self, logits: torch.Tensor, slots: list[int], surplus: int = 0
    ) -> tuple[list[int], list[tuple[TokenLogprobs, ...]]]:
        """On the GPU's sampler: tokens, log-probabilities."""
        where = self.device.torch_device
        slots_R = torch.tensor([*slots, *[-1] * surplus], dtype=torch.int32, device=where)
        tokens_R = torch.full((len(slots_R),), -9, dtype=torch.int32, device=where)
        logits_RV = torch.cat([logits, torch.full((surplus, V), float("nan"))]).to(where)
        pending = self.ours.sample(logits_RV, slots_R, slots, tokens_R)
        self.device.synchronize()
        tokens = tokens_R.tolist()
        assert tokens[len(slots) :] == [-9] * surplus
        assert [self.last_token_S[slot].item() for slot in slots] == tokens[: len(slots)]
        tokens = tokens[: len(slots)]
        return tokens, [()] * len(slots) if pending is None else pending.read(tokens)

    def compare(self, logits: torch.Tensor, slots: list[int]) -> list[int]:
        """On both: all must be the same."""
        tokens, logprobs = self.sample(logits, slots)
        expected_tokens, expected_logprobs = self.cpu.sample(logits.clone(), slots)
        assert tokens == expected_tokens
        for entries, expected in zip(logprobs, expected_logprobs, strict=True):
            compare_logprobs(entries, expected)
        return tokens


def compare_logprobs(entries: tuple[TokenLogprobs, ...], expected: tuple[TokenLogprobs, ...]) -> None:
    assert len(entries) == len(expected)
    for entry, other in zip(entries, expected, strict=True):
        assert entry.token_id == other.token_id
        assert entry.logprob == pytest.approx(other.logprob, abs=1e-5)
        assert [token for token, _ in entry.top] == [token for token, _ in other.top]
        assert [p for _, p in entry.top] == pytest.approx([p for _, p in other.top], abs=1e-5)
        assert [token for token, _ in entry.asked] == [token for token, _ in other.asked]
        assert [p for _, p in entry.asked] == pytest.approx([p for _, p in other.asked], abs=1e-5)


def normal(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, V, generator=torch.Generator().manual_seed(seed)) * 2


def test_every_edit_gives_the_tokens_of_the_cpu() -> None:
    pair = Pair()
    asked = [
        GREEDY,
        SamplingParams(temperature=0.0, repetition_penalty=1.8, logprobs=3),
        SamplingParams(temperature=0.0, frequency_penalty=1.5),
        SamplingParams(temperature=0.0, presence_penalty=-0.7, frequency_penalty=0.2, repetition_penalty=0.6),
        SamplingParams(temperature=0.0, logit_bias=((9, 3.5), (11, -100.0), (9, 4.0))),
        SamplingParams(temperature=0.0, min_new_tokens=3, stop_token_ids=frozenset({5})),
        SamplingParams(temperature=0.0, min_new_tokens=2, ignore_eos=True, stop_token_ids=frozenset({6})),
        SamplingParams(temperature=0.0, logprobs=0, presence_penalty=2.0, logit_bias=((0, 6.0),), min_new_tokens=2),
        SamplingParams(temperature=0.0, logprobs=1, logprob_token_ids=(40, 3, 40, 7)),
        SamplingParams(temperature=0.0, logprobs=2, logprob_token_ids=(1,)),
    ]
    for slot, sampling in enumerate(asked):
        pair.admit(slot, sampling, history=(4, 4, 5, 9), num_prompt=2 + slot % 2)
    logits = normal(len(asked), 1)
    logits[:, [0, 5, 6, 7, 9, 40]] += 7.0  # the same few tokens win again and again, so that penalties and bans matter
    seen = [pair.compare(logits.clone(), list(range(len(asked)))) for _ in range(5)]
    columns = list(zip(*seen, strict=True))
    assert len(set(columns[0])) == 1 and len(set(columns[2])) > 2  # greedy repeats itself, a penalty stops that
    assert 5 not in columns[5][:1] and set(columns[5]) != set(columns[5][:1])


def test_rows_may_come_in_any_order_with_surplus_rows_behind_them() -> None:
    pair = Pair()
    pair.admit(3, SamplingParams(temperature=0.0, frequency_penalty=2.0, logprobs=1))
    pair.admit(8, GREEDY)
    logits = normal(2, 2)
    first, logprobs = pair.sample(logits, [8, 3], surplus=2)
    assert first == logits.argmax(-1).tolist()
    assert [len(entries) for entries in logprobs] == [0, 1]
    again, _ = pair.sample(logits.flip(0), [3, 8], surplus=1)
    assert again[1] == first[0] and again[0] != first[1]
    assert pair.params_SP[[3, 8], 6].tolist() == [2, 2]
    pair.ours.admit(Admission(3, GREEDY, (1,), 1, 0))
    tokens, nothing = pair.sample(logits, [8, 3])
    assert tokens[0] == first[0] and nothing == [(), ()]


def test_only_the_tokens_that_top_k_and_the_others_leave_come() -> None:
    pair = Pair()
    row = normal(1, 3)
    order = row[0].sort(descending=True).indices.tolist()
    asked = [
        SamplingParams(temperature=5.0, top_k=2),
        SamplingParams(temperature=5.0, top_k=4, min_p=0.01),
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=5.0, top_k=3, frequency_penalty=2.0),
    ]
    for slot, sampling in enumerate(asked):
        pair.admit(slot, sampling, seed=slot)
    drawn = [pair.sample(row.repeat(4, 1), [0, 1, 2, 3])[0] for _ in range(10)]
    assert {tokens[0] for tokens in drawn} == set(order[:2])
    assert {tokens[1] for tokens in drawn} <= set(order[:4])
    assert len({tokens[2] for tokens in drawn}) > 4
    assert len({tokens[3] for tokens in drawn}) > 3


def test_a_preempted_request_goes_on_where_it_was() -> None:
    seeded = SamplingParams(temperature=1.0, repetition_penalty=1.2, presence_penalty=0.5, min_new_tokens=4)
    steps = [normal(1, 30 + i) for i in range(6)]
    pair = Pair()
    pair.admit(0, seeded)
    tokens = [pair.sample(step, [0])[0][0] for step in steps]
    pair.admit(5, GREEDY, seed=1)
    pair.admit(0, seeded, history=(1, 2, 3, *tokens[:3]))
    company = [pair.sample(step.repeat(2, 1), [5, 0])[0] for step in steps[3:]]
    assert [both[1] for both in company] == tokens[3:]


def test_lines_of_counts_are_used_again_and_grow_with_the_need() -> None:
    pair = Pair()
    penalised = SamplingParams(temperature=0.0, repetition_penalty=1.5)
    logits = normal(SLOTS, 4)
    for _ in range(3):
        for slot in range(SLOTS):
            pair.admit(slot, penalised, history=tuple(range(slot, 300, 3)), num_prompt=9)
    pair.compare(logits, list(range(SLOTS)))
    pair.compare(logits, list(range(SLOTS)))
    for slot in range(0, SLOTS, 2):
        pair.admit(slot, GREEDY)
    pair.admit(2, penalised, history=(1, 2), num_prompt=1)
    pair.compare(logits, list(range(SLOTS)))


def test_bans_end_and_leave_nothing_to_look_at() -> None:
    pair = Pair()
    pair.admit(0, SamplingParams(temperature=0.0, min_new_tokens=3), history=(1, 2, 4), num_prompt=2)
    pair.admit(1, SamplingParams(temperature=0.0, min_new_tokens=9, ignore_eos=True))
    logits = normal(2, 5)
    logits[:, 0] = 20.0
    assert [pair.compare(logits.clone(), [0, 1])[0] == 0 for _ in range(4)] == [False, False, True, True]
    assert pair.ours._wishes == {}


def test_logprobs_of_a_prompt_are_the_models_own() -> None:
    pair = Pair()
    pair.admit(4, SamplingParams(prompt_logprobs=3, logit_bias=((5, 50.0),)))
    pair.admit(2, SamplingParams(prompt_logprobs=0))
    logits = normal(6, 6)
    for slot, following in ((4, [9, 8, 7, 6, 5]), (2, [1]), (4, [])):
        pending = pair.ours.prompt_logprobs(logits.to(pair.device.torch_device), slot, following)
        pair.device.synchronize()
        entries = tuple(entry for row in pending.read(following) for entry in row)
        compare_logprobs(entries, pair.cpu.prompt_logprobs(logits, slot, following))


def test_warming_up_changes_nothing() -> None:
    pair = Pair()
    pair.admit(0, SamplingParams(temperature=1.0, top_k=2, frequency_penalty=1.0))
    before = pair.params_SP.clone(), pair.last_token_S.clone()
    logits = normal(2, 7).to(pair.device.torch_device)
    kept = logits.clone()
    pair.ours.warm_up(logits)
    assert torch.equal(pair.params_SP, before[0]) and torch.equal(pair.last_token_S, before[1]) and torch.equal(logits, kept)


def test_masks_and_rows_to_leave_alone_give_the_tokens_of_the_cpu() -> None:
    pair = Pair()
    asked = [GREEDY, SamplingParams(temperature=0.0, repetition_penalty=1.8, logprobs=3), GREEDY, SamplingParams(temperature=0.0)]
    for slot, sampling in enumerate(asked):
        pair.admit(slot, sampling)
    masks = np.random.default_rng(3).integers(-(2**31), 2**31, (2, -(-V // 32))).astype(np.int32)
    where, logits = pair.device.torch_device, normal(4, 8)
    for _ in range(3):
        slots = [0, 1, -1, 3]
        tokens_R = torch.full((5,), -9, dtype=torch.int32, device=where)
        logits_RV = torch.cat([logits, torch.full((1, V), float("nan"))]).to(where)
        pending = pair.ours.sample(logits_RV, pair.ours.slots(slots, 5), slots, tokens_R, [1, 3], masks)
        pair.device.synchronize()
        tokens = tokens_R.tolist()
        wanted, entries = pair.cpu.sample(logits[[0, 1, 3]].clone(), [0, 1, 3], {1: masks[0], 2: masks[1]})
        assert tokens == [*wanted[:2], -9, wanted[2], -9]
        assert pending is not None
        compare_logprobs(pending.read(tokens[:4])[1], entries[1])
    assert pair.last_token_S[2].item() == -9 and pair.params_SP[2, 6].item() == 0


def test_appended_tokens_count_like_sampled_ones() -> None:
    seeded = SamplingParams(temperature=1.0, repetition_penalty=1.2, presence_penalty=0.5, min_new_tokens=4)
    steps = [normal(1, 30 + i) for i in range(6)]
    pair = Pair()
    pair.admit(0, seeded)
    pair.admit(1, seeded)
    tokens = [pair.sample(step, [0])[0][0] for step in steps]
    first = pair.sample(steps[0], [1])[0][0]
    pair.params_SP[1] = torch.tensor(pair.ours.append(Append(1, tuple(tokens[1:4]), 4)), dtype=torch.int32)
    assert [first, *tokens[1:4], *(pair.sample(step, [1])[0][0] for step in steps[4:])] == tokens
    assert not pair.ours._wishes[1].bans_left
