"""The GPU's sampler against the CPU's, row by row. Where no GPU is, its kernels run in Triton's interpreter."""

from typing import Any

import pytest

pytest.importorskip("triton")

import numpy as np
import torch

from streamserve.engine.device_sampler import DeviceSampler, DraftedRows
from streamserve.engine.plan import Admission, Append
from streamserve.engine.sampler import Sampler
from streamserve.engine.stages import default_stages
from streamserve.kernels.devices.cuda import CUDA
from streamserve.kernels.devices.host import Host
from streamserve.kernels.impl.triton_sampling import Drafted
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
            max_rows=6 * SLOTS,
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
    pair.ours.warm_up(logits, has_drafts=True)
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


DRAFTED = [
    GREEDY,
    SamplingParams(temperature=0.0, repetition_penalty=1.8, logprobs=3),
    SamplingParams(temperature=0.0, presence_penalty=1.0, frequency_penalty=0.9, logit_bias=((9, 3.5), (11, -100.0))),
    SamplingParams(temperature=0.0, min_new_tokens=3, stop_token_ids=frozenset({5})),
    SamplingParams(temperature=1.0),
    SamplingParams(temperature=0.9, top_k=7, top_p=0.9, logprobs=1, logprob_token_ids=(40, 3)),
    SamplingParams(temperature=1.3, min_p=0.05, frequency_penalty=0.8, repetition_penalty=1.1, min_new_tokens=4),
]


class Answers:
    """The same requests in two samplers, one token at a time in one, several in the other: logits depend on the place alone."""

    def __init__(self, asked: list[SamplingParams]) -> None:
        self.one_by_one, self.drafted = Pair(), Pair()
        self.slots = list(range(len(asked)))
        for pair in (self.one_by_one, self.drafted):
            for slot, sampling in enumerate(asked):
                pair.admit(slot, sampling, history=(4, 4, 5, 9), num_prompt=2, seed=70 + slot)
        self.logits = normal(len(asked) * 9, 40).view(len(asked), 9, V)
        self.logits[:, :, [0, 5, 6, 7, 9, 40]] += 6.0  # a few tokens again and again, so that penalties and bans matter
        steps = [self.one_by_one.sample(self.logits[:, at], self.slots) for at in range(9)]
        self.tokens = [[tokens[slot] for tokens, _ in steps] for slot in self.slots]
        self.logprobs = [[entries[slot] for _, entries in steps] for slot in self.slots]
        self.lens = [0] * len(asked)

    def guesses(self, slot: int, num_right: int, num_wrong: int) -> list[int]:
        """Of them the first are right, and the others would be for the place behind."""
        at = self.lens[slot]
        right = self.tokens[slot][at : at + num_right]
        return [*right, *((token + 1) % V for token in self.tokens[slot][at + num_right : at + num_right + num_wrong])]

    def step(self, guesses: list[list[int]], surplus: int = 2, masks: np.ndarray | None = None) -> None:  # type: ignore[type-arg]
        """A drafted step: what comes must be what came one by one."""
        pair, where = self.drafted, self.drafted.device.torch_device
        rows = [(slot, offset) for slot in self.slots for offset in range(len(guesses[slot]) + 1)]
        fed = [token for slot in self.slots for token in (-1, *guesses[slot])]
        slots = [slot for slot, _ in rows]
        slots_R = torch.tensor([*slots, *[-1] * surplus], dtype=torch.int32, device=where)
        offsets = [offset for _, offset in rows]
        offsets_R = torch.tensor([*offsets, *[0] * surplus], dtype=torch.int32, device=where)
        on_device = Drafted(offsets_R, torch.tensor(fed, dtype=torch.int32, device=where))
        logits = torch.stack([self.logits[slot, self.lens[slot] + offset] for slot, offset in rows])
        logits_RV = torch.cat([logits, torch.full((surplus, V), float("nan"))]).to(where)
        tokens_R = torch.full((len(slots_R),), -9, dtype=torch.int32, device=where)
        pending = pair.ours.sample(logits_RV, slots_R, slots, tokens_R, drafted=DraftedRows(offsets, on_device))
        pair.device.synchronize()
        tokens = tokens_R[: len(rows)].tolist()
        logprobs = [()] * len(rows) if pending is None else pending.read(tokens)
        first = 0
        for slot in self.slots:
            mine, entries = tokens[first : first + len(guesses[slot]) + 1], logprobs[first : first + len(guesses[slot]) + 1]
            first += len(mine)
            num = 0
            while num < len(guesses[slot]) and mine[num] == guesses[slot][num]:
                num += 1
            at = self.lens[slot]
            assert mine[: num + 1] == self.tokens[slot][at : at + num + 1]
            for entry, expected in zip(entries[: num + 1], self.logprobs[slot][at : at + num + 1], strict=True):
                compare_logprobs(entry, expected)
            pair.ours.accepted(slot, num)
            self.lens[slot] += num + 1
            assert pair.last_token_S[slot].item() == mine[num]
            assert pair.params_SP[slot, 6].item() == 2 + self.lens[slot]


def test_guesses_change_when_tokens_come_and_not_which() -> None:
    answers = Answers(DRAFTED)
    answers.step([answers.guesses(slot, slot % 4, 2) for slot in answers.slots])
    assert answers.lens == [slot % 4 + 1 for slot in answers.slots]
    answers.step([answers.guesses(slot, slot % 3, slot % 2) for slot in answers.slots])  # rows without guesses among them
    assert answers.lens == [slot % 4 + slot % 3 + 2 for slot in answers.slots]
    rest = [8 - length for length in answers.lens]
    answers.step([answers.guesses(slot, rest[slot], 0) for slot in answers.slots], surplus=0)
    assert answers.lens == [9] * len(answers.slots)
    for ours in (answers.one_by_one.ours, answers.drafted.ours):
        assert 3 not in ours._wishes and not any(wish.bans_left for wish in ours._wishes.values())
    lines = [[answers.drafted.ours, answers.one_by_one.ours][i]._lines_LV for i in (0, 1)]
    assert torch.equal(*lines)


def test_a_ban_ends_in_the_middle_of_a_drafted_row() -> None:
    eager: dict[str, Any] = {"temperature": 0.0, "logit_bias": ((0, 60.0),)}
    answers = Answers([SamplingParams(min_new_tokens=num, **eager) for num in (0, 3, 4, 5, 9)])  # two tokens are there
    assert [tokens.index(0) for tokens in answers.tokens] == [0, 1, 2, 3, 7]
    for num_right in (2, 0, 3):
        answers.step([answers.guesses(slot, num_right, 1) for slot in answers.slots])


def test_plain_steps_follow_drafted_ones() -> None:
    answers = Answers(DRAFTED)
    answers.step([answers.guesses(slot, 2, 2) for slot in answers.slots])
    for at in (3, 4):
        tokens, _ = answers.drafted.sample(answers.logits[:, at], answers.slots)
        assert tokens == [tokens[at] for tokens in answers.tokens]


def test_masks_hold_for_each_place_of_a_drafted_row() -> None:
    pair = Pair()
    pair.admit(0, GREEDY)
    pair.admit(1, SamplingParams(temperature=0.0, presence_penalty=0.4))
    where, logits = pair.device.torch_device, normal(5, 50)
    masks = np.random.default_rng(4).integers(-(2**31), 2**31, (3, -(-V // 32))).astype(np.int32)
    allowed = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")[:, :V].astype(bool)
    wanted = [int(np.where(allowed[i], logits[i].numpy(), -np.inf).argmax()) for i in range(3)]
    on_device = Drafted(*(torch.tensor(x, dtype=torch.int32, device=where) for x in ([0, 1, 2, 0, 1], [3, *wanted[:2], 3, 299])))
    slots_R = torch.tensor([0, 0, 0, 1, 1], dtype=torch.int32, device=where)
    tokens_R = torch.zeros_like(slots_R)
    drafted = DraftedRows([0, 1, 2, 0, 1], on_device)
    pair.ours.sample(logits.to(where), slots_R, slots_R.tolist(), tokens_R, [0, 1, 2], masks, drafted)
    pair.device.synchronize()
    assert tokens_R.tolist()[:3] == wanted and pair.last_token_S[0].item() == wanted[2]
    assert pair.params_SP[[0, 1], 6].tolist() == [3, 1]


def test_a_drafted_row_that_nobody_wants_changes_nothing() -> None:
    pair = Pair()
    for slot in range(2):
        pair.admit(slot, SamplingParams(temperature=0.0, presence_penalty=0.4, min_new_tokens=3))
    where = pair.device.torch_device
    before = pair.params_SP.clone(), pair.ours._lines_LV.clone()
    on_device = Drafted(*(torch.tensor(x, dtype=torch.int32, device=where) for x in ([0, 1, 0, 1], [3, 4, 3, 4])))
    tokens_R = torch.full((4,), -9, dtype=torch.int32, device=where)
    slots_R = pair.ours.slots([-1, -1, 1, 1], 4)
    pair.ours.sample(normal(4, 51).to(where), slots_R, [-1, -1, 1, 1], tokens_R, drafted=DraftedRows([0, 1, 0, 1], on_device))
    pair.device.synchronize()
    assert torch.equal(pair.params_SP[0], before[0][0]) and pair.last_token_S[0].item() == -9
    assert pair.ours._wishes[0].bans_left == 3 and tokens_R[:2].tolist() == [-9, -9]
    line = pair.ours._wishes[0].line
    assert torch.equal(pair.ours._lines_LV[line], before[1][line])
