"""Sampling kernels against the definitions of their parameters, worked out in float64, and against exact probabilities."""

import numpy as np
import pytest
import torch

from streamserve.kernels.impl.triton_sampling import NUM_WORDS, SamplingKernels, is_filtered, words
from streamserve.messages import SamplingParams

V = 1003


def state(device: str, rows: list[tuple[SamplingParams, int]], vocab_size: int = V, num_generated: int = 0) -> torch.Tensor:
    """Sampling words of slots 0, 1, ... from (parameters, seed)."""
    lines = [words(params, seed, num_generated, vocab_size) for params, seed in rows]
    return torch.tensor(lines, dtype=torch.int32).reshape(-1, NUM_WORDS).to(device)


class Chooser:
    """The kernels with buffers that begin as nonsense."""

    def __init__(self, device: str, vocab_size: int, max_rows: int) -> None:
        self.kernels = SamplingKernels(vocab_size, max_rows, torch.device(device))
        for value in vars(self.kernels).values():
            if isinstance(value, torch.Tensor) and value is not self.kernels._no_thresholds_R:
                value.fill_(float("nan") if value.is_floating_point() else -7)

    def thresholds(self, logits_RV: torch.Tensor, params_SP: torch.Tensor, slots: list[int] | None = None) -> torch.Tensor:
        slots_R = torch.tensor(range(len(logits_RV)) if slots is None else slots, dtype=torch.int32, device=logits_RV.device)
        return self.kernels.thresholds(logits_RV, slots_R, params_SP)[: len(logits_RV)].clone()

    def choose(
        self,
        logits_RV: torch.Tensor,
        params_SP: torch.Tensor,
        slots: list[int] | None = None,
        thresholds_R: torch.Tensor | None = None,
    ) -> list[int]:
        slots_R = torch.tensor(range(len(logits_RV)) if slots is None else slots, dtype=torch.int32, device=logits_RV.device)
        out_R = torch.full((len(logits_RV),), -9, dtype=torch.int32, device=logits_RV.device)
        last_S = torch.full((len(params_SP),), -9, dtype=torch.int32, device=logits_RV.device)
        self.kernels.choose(logits_RV, slots_R, params_SP, out_R, last_S, thresholds_R)
        chosen: list[int] = out_R.tolist()
        for slot, last in enumerate(last_S.tolist()):
            assert last == next((token for token, s in zip(chosen, slots_R.tolist(), strict=True) if s == slot), -9)
        return chosen


def normal(rows: int, seed: int = 1, vocab_size: int = V, spread: float = 4.0) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * spread


def kept(logits_V: torch.Tensor, params: SamplingParams) -> tuple[int, float, float]:
    """What the definitions leave of a row without equal logits: how many best tokens stay, and how close the row comes to
    leaving one more or one less: the distances of mass and of min-p's ratio from where that happens."""
    probs = torch.softmax(logits_V.double() / params.temperature, -1).sort(descending=True).values
    num, slack = len(probs), 1.0
    if params.top_k:
        num = min(num, params.top_k)
    if params.min_p:
        slack = float((torch.log(probs[:num] / probs[0]) - np.log(params.min_p)).abs().min())
        num = int((probs[:num] >= params.min_p * probs[0]).sum())
    mass_slack = 1.0
    if params.top_p < 1.0:
        mass = torch.cumsum(probs[:num], 0) / probs[:num].sum()
        mass_slack = float((mass - params.top_p).abs().min())
        num = int(((mass - probs[:num] / probs[:num].sum()) < params.top_p).sum())
    return num, slack, mass_slack


def draw_params(rng: np.random.Generator) -> SamplingParams:
    return SamplingParams(
        temperature=float(rng.choice([0.3, 0.7, 1.0, 1.6, 5.0])),
        top_k=int(rng.choice([0, 2, 5, 37, 400])),
        top_p=float(rng.choice([1.0, 0.05, 0.5, 0.9, 0.97])),
        min_p=float(rng.choice([0.0, 0.0, 0.02, 0.3])),
    )


@pytest.mark.parametrize("spread", [0.5, 4.0])
def test_thresholds_leave_what_the_definitions_leave(device: str, spread: float) -> None:
    rng = np.random.default_rng(int(spread * 10))
    logits = normal(16, 2, spread=spread)
    logits[3] -= 500.0
    logits[4, ::3] = float("-inf")  # banned tokens
    asked = [draw_params(rng) for _ in logits]
    found = Chooser(device, V, 16).thresholds(logits.to(device), state(device, [(params, 0) for params in asked])).cpu()
    num_compared = 0
    for row, params, threshold in zip(logits, asked, found, strict=True):
        num, min_p_slack, mass_slack = kept(row, params)
        if min_p_slack > 1e-5 and mass_slack > 1e-5:
            num_compared += 1
            allowed = int((row >= threshold).sum())
            assert allowed == num or (threshold == float("-inf") and not is_filtered(params, V)), (params, allowed, num)
    assert num_compared >= 13


def test_thresholds_are_exact_with_lists_that_are_full_too_short_or_enough(device: str) -> None:
    """Two blocks of the vocabulary. The list of candidates overflows in rows 2 and 3, and cannot do for rows 4 and 5."""
    vocab_size = 8000
    logits = normal(6, 3, vocab_size)
    logits[2:4, :300] += 60.0  # 3.7 % of all tokens far above the mean
    logits[4:] *= 0.02
    asked = [
        SamplingParams(temperature=1.0, top_k=20),
        SamplingParams(temperature=1.0, top_k=20, top_p=0.6),
        SamplingParams(temperature=1.0, top_k=290),
        SamplingParams(temperature=1.0, top_p=0.99),
        SamplingParams(temperature=1.0, top_p=0.9),
        SamplingParams(temperature=1.0, top_k=5000, top_p=0.5, min_p=0.8),
    ]
    chooser = Chooser(device, vocab_size, 6)
    found = chooser.thresholds(logits.to(device), state(device, [(params, 0) for params in asked], vocab_size)).cpu()
    assert int(chooser.kernels._counts[2].max()) > 128
    for row, params, threshold in zip(logits, asked, found, strict=True):
        num, min_p_slack, mass_slack = kept(row, params)
        assert min(min_p_slack, mass_slack) > 1e-5
        assert int((row >= threshold).sum()) == num, params


def test_tokens_with_the_limiting_logit_all_stay(device: str) -> None:
    row = torch.full((1, V), -3.0)
    row[0, :10] = torch.tensor([9.0, 8, 7, 7, 7, 7, 6, 0.0, -0.0, 5])
    many = row.repeat(5, 1).to(device)
    many[4] = 2.0  # one value everywhere
    asked = [
        SamplingParams(temperature=1.0, top_k=4),
        SamplingParams(temperature=1.0, top_k=9),
        SamplingParams(temperature=10.0, top_p=0.0001),
        SamplingParams(temperature=1.0, min_p=1.0),
        SamplingParams(temperature=1.0, top_k=3),
    ]
    found = Chooser(device, V, 5).thresholds(many, state(device, [(params, 0) for params in asked]))
    assert (many >= found.unsqueeze(1)).sum(1).tolist() == [6, 10, 1, 1, V]


def test_the_best_token_always_stays(device: str) -> None:
    logits = normal(3, 5).to(device)
    logits[2] = float("-inf")
    asked = [SamplingParams(temperature=1e-5, top_p=1e-6), SamplingParams(temperature=100.0, min_p=1.0, top_p=1e-6)]
    params_SP = state(device, [(params, 7) for params in (*asked, asked[0])])
    chooser = Chooser(device, V, 3)
    chosen = chooser.choose(logits, params_SP, thresholds_R=chooser.thresholds(logits, params_SP))
    assert chosen[:2] == logits[:2].argmax(-1).tolist()
    assert 0 <= chosen[2] < V  # a row without any possible token still yields a token that exists


def test_greedy_takes_the_first_of_the_best(device: str, dtype: torch.dtype) -> None:
    vocab_size = 5000  # three parts of the vocabulary
    logits = normal(4, 6, vocab_size).to(device, dtype)
    logits[1, [4999, 4100, 2047]] = 50.0
    logits[2] = -1e30
    logits[3, 17] = float("nan")
    params_SP = state(
        device, [(SamplingParams(temperature=0.0), 0), (SamplingParams(temperature=2.0, top_k=1), 0)] * 2, vocab_size
    )
    chosen = Chooser(device, vocab_size, 4).choose(logits, params_SP)
    first, last = (row == row.nan_to_num(-99.0).max() for row in (logits[0], logits[3]))
    assert chosen == [int(first.nonzero()[0]), 2047, 0, int(last.nonzero()[0])]


def test_surplus_rows_change_nothing(device: str) -> None:
    logits = normal(4, 7).to(device)
    params = SamplingParams(temperature=1.0, top_k=3)
    params_SP = state(device, [(params, seed) for seed in range(3)], num_generated=5)
    chooser = Chooser(device, V, 4)
    slots = [2, -1, 0, -1]
    chosen = chooser.choose(logits, params_SP, slots, chooser.thresholds(logits, params_SP, slots))
    assert chosen[1] == chosen[3] == -9
    assert params_SP[:, 6].tolist() == [6, 5, 6]
    best = logits.topk(3).indices.tolist()
    assert chosen[0] in best[0] and chosen[2] in best[2]


def philox(counter: np.ndarray, place: np.ndarray, seed: np.ndarray) -> np.ndarray:
    """Philox4x32-10 as its paper writes it (Salmon et al., SC'11), on uint64 arrays: four numbers of 32 bits each."""
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    zero = np.uint64(0)
    c = [counter, place, zero, zero]
    k = [seed & mask, seed >> half]
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [b >> half ^ c[1] ^ k[0], b & mask, a >> half ^ c[3] ^ k[1], a & mask]
        k = [k[0] + np.uint64(0x9E3779B9) & mask, k[1] + np.uint64(0xBB67AE85) & mask]
    return np.stack(np.broadcast_arrays(*c))


def noise(vocab_size: int, places: range, seeds: range | list[int]) -> torch.Tensor:
    """The Gumbel noise of every token in float64, [rows, V], for rows of (place, seed)."""
    lane = np.arange(-(-vocab_size // 2048) * 512, dtype=np.uint64)
    place = np.array(places, np.uint64)[:, None]
    seed = np.array([seed % 2**64 for seed in seeds], np.uint64)[:, None]
    bits = philox(lane[None, :], place, seed)  # [4, rows, lanes]
    bits = bits.reshape(4, bits.shape[1], -1, 512).transpose(1, 2, 0, 3).reshape(bits.shape[1], -1)[:, :vocab_size]
    v = torch.from_numpy((bits.astype(np.float64) + 0.5) / 2**32)
    return -torch.log(-torch.log1p(-v))


@pytest.mark.parametrize("seed", [0, -1, -(2**63), 0x1234567890ABCDEF])
def test_the_noise_is_philox_of_seed_place_and_token(device: str, seed: int) -> None:
    vocab_size, place = 5000, 41
    logits = normal(3, 8, vocab_size, spread=1.0)
    params_SP = state(device, [(SamplingParams(temperature=0.7), seed)] * 3, vocab_size)
    params_SP[:, 6] = torch.arange(place, place + 3)
    chosen = Chooser(device, vocab_size, 3).choose(logits.to(device), params_SP)
    scores = logits.double() / 0.7 + noise(vocab_size, range(place, place + 3), [seed])
    best = scores.topk(2).values
    assert ((best[:, 0] - best[:, 1]) > 1e-4).all()
    assert chosen == scores.argmax(-1).tolist()


def test_a_seed_gives_the_same_token_in_any_company(device: str) -> None:
    logits = normal(7, 9, spread=1.5).to(device)
    rows = [(SamplingParams(temperature=1.0, top_p=0.9 if i % 2 else 1.0), 100 + i) for i in range(7)]
    chooser = Chooser(device, V, 7)
    params_SP = state(device, rows)
    together = chooser.choose(logits, params_SP, thresholds_R=chooser.thresholds(logits, params_SP))
    alone = []
    for i, row in enumerate(rows[:3]):
        one_SP = state(device, [row])
        alone.append(chooser.choose(logits[i : i + 1], one_SP, thresholds_R=chooser.thresholds(logits[i : i + 1], one_SP))[0])
    assert together[:3] == alone
    params_SP[:, 6] = 0
    backwards = chooser.choose(logits.flip(0).contiguous(), params_SP, slots=list(range(7))[::-1], thresholds_R=None)
    plain = [i for i in range(7) if i % 2 == 0]
    assert [backwards[6 - i] for i in plain] == [together[i] for i in plain]


def surprise(chosen: list[int], probs: np.ndarray) -> float:
    """Chi-square of counts against probabilities, as standard deviations of a normal number (Wilson and Hilferty, 1931).
    Tokens expected fewer than five times count as one."""
    expected = probs * len(chosen)
    counts = np.bincount(chosen, minlength=len(probs))
    is_rare = expected < 5
    counts, expected = np.append(counts[~is_rare], counts[is_rare].sum()), np.append(expected[~is_rare], expected[is_rare].sum())
    free = len(expected) - 1
    ratio = float(((counts - expected) ** 2 / expected).sum()) / free
    return (ratio ** (1 / 3) - (1 - 2 / (9 * free))) / (2 / (9 * free)) ** 0.5


@pytest.mark.parametrize(("places", "seeds"), [(range(4000), [7]), (range(1), range(4000)), (range(4000), range(4000))])
def test_tokens_come_as_often_as_their_probability_says(device: str, places: range, seeds: range | list[int]) -> None:
    """One seed at consecutive places, and consecutive seeds. The interpreter has no time for thousands of tokens: there it is
    the noise that is tested, which the test above proves to be the kernel's."""
    vocab_size, temperature = 12, 1.3
    scores = torch.tensor([2.0, 1.5, 1.4, 1.0, 0.8, 0.8, 0.3, 0.0, -0.5, -1.0, -3.0, -9.0]) / temperature
    probs = torch.softmax(scores.double(), -1).numpy()
    chosen = (scores + noise(vocab_size, places, seeds)).argmax(-1).tolist()
    assert surprise(chosen, probs) < 3.7  # one in 10,000
    assert surprise((0.75 * scores + noise(vocab_size, places, seeds)).argmax(-1).tolist(), probs) > 3.7
    if device == "cuda":
        num = len(chosen)
        params_SP = state(device, [(SamplingParams(temperature=temperature), seed) for seed in seeds], vocab_size)
        params_SP = params_SP.expand(num, NUM_WORDS).contiguous()
        params_SP[:, 6] = torch.tensor(places)
        drawn = Chooser(device, vocab_size, num).choose((scores * temperature).repeat(num, 1).to(device), params_SP)
        assert surprise(drawn, probs) < 3.7


def test_penalties_do_what_their_papers_say(device: str, dtype: torch.dtype) -> None:
    logits = normal(3, 10).to(device, dtype)
    logits[0, 5] = float("-inf")
    lines_LV = torch.zeros((2, V), dtype=torch.int32, device=device)
    lines_LV[1, 3:900:7] = 1  # in the prompt
    lines_LV[1, 2:900:5] += 2 * 3  # three times in the answer
    penalties_L4 = torch.full((2, 4), float("nan"), device=device)
    penalties_L4[1] = torch.tensor([1.7, 0.4, -0.6, 0.0])
    params = SamplingParams(frequency_penalty=0.4)
    lines = [words(params, 0, 0, V), words(params, 0, 0, V, line=1)]
    params_SP = torch.tensor(lines, dtype=torch.int32, device=device)
    x, seen = logits[0].float(), lines_LV[1] > 0
    expected = torch.where(seen, torch.where(x > 0, x / 1.7, x * 1.7), x)
    expected = (expected - 0.4 * (lines_LV[1] // 2) + 0.6 * (lines_LV[1] > 1)).to(dtype)
    slots_R = torch.tensor([1, 0, -1], dtype=torch.int32, device=device)
    edited = logits.clone()
    kernels = SamplingKernels(V, 3, torch.device(device))
    kernels.penalise(edited, slots_R, params_SP, lines_LV, penalties_L4)
    torch.testing.assert_close(edited[0], expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
    assert torch.equal(edited[1:], logits[1:])
    before = lines_LV.clone()
    kernels.count(torch.tensor([8, 9, 10], dtype=torch.int32, device=device), slots_R, params_SP, lines_LV)
    before[1, 8] += 2
    assert torch.equal(lines_LV, before)


def test_masks_leave_the_tokens_whose_bits_are_set(device: str, dtype: torch.dtype) -> None:
    logits = normal(4, 11).to(device, dtype)
    logits[3, 4] = float("nan")
    bits_GV = torch.rand((2, V), generator=torch.Generator().manual_seed(12)) < 0.3
    padded = np.zeros((2, -(-V // 32) * 32), dtype=bool)
    padded[:, :V] = bits_GV.numpy()
    words_GW = np.packbits(padded, axis=1, bitorder="little").view(np.int32)
    rows_G = torch.tensor([2, 0], dtype=torch.int32, device=device)
    edited = logits.clone()
    SamplingKernels(V, 4, torch.device(device)).mask(edited, rows_G, torch.from_numpy(words_GW).to(device))
    forbidden = ~bits_GV.to(device)
    for row, line in ((2, 0), (0, 1)):
        assert torch.equal(edited[row], logits[row].masked_fill(forbidden[line], float("-inf")))
    assert torch.equal(edited[[1, 3]].nan_to_num(7.0), logits[[1, 3]].nan_to_num(7.0))
