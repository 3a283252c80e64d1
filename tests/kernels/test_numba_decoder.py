"""The packed decoder: against plain float32 torch on the same weights, and bit for bit against itself."""

import gc
import threading
import time
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from streamserve.default_model import find_default_model
from streamserve.errors import CheckpointError
from streamserve.kernels.ops import Embedded
from streamserve.kernels.registry import Facts
from streamserve.models.checkpoint import Checkpoint, open_checkpoint
from streamserve.models.decoder import Decoder
from streamserve.models.spec import Traits
from tests.kernels.packed import Driver, RandomWeights, new_driver, new_reference, random_tokens, small_spec

pytest.importorskip("numba")

from streamserve.kernels.impl.numba_decoder import MAX_TOKENS, PackedDecoder, refusal
from streamserve.kernels.impl.numba_pack import quantise_q8_0
from streamserve.kernels.impl.numba_team import Pace

_SPEC = small_spec()
_REASON = refusal(Facts("cpu", "auto", _SPEC, 16, "float32", frozenset(("Q4_1",))))
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))

VARIANTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "qwen2": {"traits": Traits(qkv_bias=True)},
    "qwen3": {"traits": Traits(qk_norm=True)},
    "one_head_per_group": {"num_attention_heads": 2},
    "eight_heads_per_group": {"num_attention_heads": 16, "head_dim": 64},
    "linear_rope": {"rope_parameters": {"rope_type": "linear", "factor": 4.0}},
}


@pytest.fixture(scope="module")
def small() -> PackedDecoder:
    return PackedDecoder(_SPEC, RandomWeights(_SPEC, "Q4_1"), threads=1)


@pytest.fixture(scope="module")
def default_checkpoint() -> Checkpoint:
    try:
        return open_checkpoint(find_default_model())
    except CheckpointError as error:
        pytest.skip(str(error))


def mean_kl(reference: Tensor, other: Tensor) -> float:
    p, q = torch.log_softmax(reference.double(), -1), torch.log_softmax(other.double(), -1)
    return float((p.exp() * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_float32_torch_over_prompt_chunks_and_decode(variant: str) -> None:
    spec = small_spec(**VARIANTS[variant])
    weights = RandomWeights(spec, "Q8_0")  # int16 activations: rounding of 2e-5 of a group's largest
    packed = new_driver(PackedDecoder(spec, weights), spec)
    plain = new_reference(spec, weights)
    tokens = random_tokens(spec, 160)
    pairs = [(driver, driver.request(200), driver.request(200)) for driver in (packed, plain)]
    for (a, b), (c, d) in (((0, 150), (0, 3)), ((150, 157), (3, 4)), ((157, 158), (4, 5)), ((158, 160), (5, 60))):
        logits = [driver.step((one, tokens[a:b]), (other, tokens[c:d])) for driver, one, other in pairs]
        torch.testing.assert_close(logits[0], logits[1], rtol=0, atol=2e-3)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q8_0"])
def test_every_kind_of_weights_stays_near_float32(kind: str) -> None:
    spec = small_spec()
    weights = RandomWeights(spec, kind)
    packed = new_driver(PackedDecoder(spec, weights), spec)
    plain = new_reference(spec, weights)
    tokens = random_tokens(spec, 60)
    logits, expected = (driver.step((driver.request(60), tokens)) for driver in (packed, plain))
    assert mean_kl(expected, logits) < 1e-3


def test_mixed_kinds_in_one_fused_product_are_brought_to_eight_bits() -> None:
    weights, other = RandomWeights(_SPEC, "Q4_1"), RandomWeights(_SPEC, "Q8_0")
    for name in list(weights._packed):
        if "v_proj" in name or "up_proj" in name:
            weights._packed[name], weights._tensors[name] = other._packed[name], other._tensors[name]
    packed = new_driver(PackedDecoder(_SPEC, weights), _SPEC)
    plain = new_reference(_SPEC, weights)
    tokens = random_tokens(_SPEC, 40)
    logits, expected = (driver.step((driver.request(40), tokens)) for driver in (packed, plain))
    assert mean_kl(expected, logits) < 1e-3


def logits_in_chunks(driver: Driver, tokens: list[int], chunk: int) -> Tensor:
    request = driver.request(len(tokens))
    return torch.cat([driver.step((request, tokens[at : at + chunk])) for at in range(0, len(tokens), chunk)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_bits_do_not_depend_on_how_a_prompt_is_cut(small: PackedDecoder, dtype: torch.dtype) -> None:
    tokens = random_tokens(_SPEC, MAX_TOKENS + 60)
    whole = logits_in_chunks(new_driver(small, _SPEC, dtype=dtype), tokens, len(tokens))
    for chunk in (1, 7, 16, 129):
        assert torch.equal(logits_in_chunks(new_driver(small, _SPEC, dtype=dtype), tokens, chunk), whole), chunk


def test_bits_do_not_depend_on_neighbours(small: PackedDecoder) -> None:
    prompts = [random_tokens(_SPEC, count, seed=count) for count in (1, 5, 17, 130, 64, 2, 33, 16, 200)]
    alone = [logits_in_chunks(new_driver(small, _SPEC), prompt, len(prompt)) for prompt in prompts]
    driver = new_driver(small, _SPEC)
    requests = [driver.request(len(prompt)) for prompt in prompts]
    # All but the last token in one mixed step, then the last ones as decode rows beside a new prompt.
    together = driver.step(*((r, p[:-1]) for r, p in zip(requests, prompts, strict=True) if len(p) > 1))
    expected = torch.cat([logits[:-1] for logits in alone])
    assert torch.equal(together, expected)
    last = driver.step(*((r, p[-1:]) for r, p in zip(requests, prompts, strict=True)), (driver.request(50), prompts[3][:50]))
    assert torch.equal(last[: len(prompts)], torch.cat([logits[-1:] for logits in alone]))
    assert torch.equal(last[len(prompts) :], alone[3][:50])


def test_bits_do_not_depend_on_the_number_of_threads(small: PackedDecoder) -> None:
    tokens = random_tokens(_SPEC, 300)
    others = PackedDecoder(_SPEC, RandomWeights(_SPEC, "Q4_1"), threads=3)
    for chunk in (300, 1):
        expected = logits_in_chunks(new_driver(small, _SPEC), tokens, chunk)
        assert torch.equal(logits_in_chunks(new_driver(others, _SPEC), tokens, chunk), expected)


def test_embeddings_take_the_places_of_tokens_however_a_prompt_is_cut(small: PackedDecoder) -> None:
    """Embeddings that are those of other tokens: bit for bit as if those tokens stood there."""
    tokens = random_tokens(_SPEC, MAX_TOKENS + 40)
    places = torch.cat((torch.arange(3, 90), torch.arange(MAX_TOKENS - 20, MAX_TOKENS + 10)))
    hidden_from = torch.tensor(tokens)
    hidden_from[places] = 0
    expected = logits_in_chunks(new_driver(small, _SPEC), tokens, len(tokens))
    for chunk in (len(tokens), 33):
        driver = new_driver(small, _SPEC)
        request, logits = driver.request(len(tokens)), []
        for at in range(0, len(tokens), chunk):
            batch = driver.batch((request, hidden_from[at : at + chunk].tolist()))
            here = places[(places >= at) & (places < at + chunk)]
            if len(here):
                batch.embedded = Embedded(here - at, small.embed(torch.tensor(tokens)[here]))
            logits.append(small.forward(batch))
        assert torch.equal(torch.cat(logits), expected)


@pytest.mark.parametrize("page_size", [32, 64, 128])
def test_bits_do_not_depend_on_the_page_size(small: PackedDecoder, page_size: int) -> None:
    tokens = random_tokens(_SPEC, 200)
    expected = logits_in_chunks(new_driver(small, _SPEC), tokens, 50)
    assert torch.equal(logits_in_chunks(new_driver(small, _SPEC, page_size=page_size), tokens, 50), expected)


def test_float16_pages_stay_near_float32_pages() -> None:
    decoder = PackedDecoder(_SPEC, RandomWeights(_SPEC, "Q8_0"))
    tokens = random_tokens(_SPEC, 150)
    full, half = (logits_in_chunks(new_driver(decoder, _SPEC, dtype=d), tokens, 150) for d in (torch.float32, torch.float16))
    assert 0 < (full - half).abs().max() < 0.01


def test_logits_come_for_the_wanted_tokens_in_the_wanted_order(small: PackedDecoder) -> None:
    tokens = random_tokens(_SPEC, MAX_TOKENS + 20)
    every = logits_in_chunks(new_driver(small, _SPEC), tokens, len(tokens))
    for wanted in ([], [0], [3, 4, MAX_TOKENS - 1, MAX_TOKENS, MAX_TOKENS + 19], [MAX_TOKENS + 1, 2, 2]):
        driver = new_driver(small, _SPEC)
        logits = driver.step((driver.request(len(tokens)), tokens), logit_rows=wanted)
        assert logits.shape == (len(wanted), _SPEC.vocab_size)
        assert torch.equal(logits, every[wanted])


@pytest.mark.parametrize("threads", [1, 2])
def test_the_stream_is_shown_before_the_layers_that_are_asked_for_and_changes_no_logits(threads: int) -> None:
    weights = RandomWeights(_SPEC, "Q8_0")
    decoder = PackedDecoder(_SPEC, weights, threads=threads)
    packed, plain = new_driver(decoder, _SPEC, num_pages=4 * MAX_TOKENS // 16), new_reference(_SPEC, weights)
    assert isinstance(plain.network, Decoder)
    tokens = random_tokens(_SPEC, 2 * MAX_TOKENS - 200)
    ours, again, theirs = packed.request(len(tokens)), packed.request(len(tokens)), plain.request(len(tokens))
    for first, end in ((0, MAX_TOKENS + 20), (MAX_TOKENS + 20, MAX_TOKENS + 21), (MAX_TOKENS + 21, len(tokens))):
        part = tokens[first:end]
        logits, shown = decoder.forward_with_features(packed.batch((ours, part)), (0, 2, 3))
        _, wanted = plain.network.forward_with_features(plain.batch((theirs, part)), (0, 2, 3))
        torch.testing.assert_close(shown, wanted, rtol=0, atol=2e-3)
        assert torch.equal(logits, packed.step((again, part)))
        assert torch.equal(shown[:, : _SPEC.hidden_size], decoder.embed(torch.tensor(part)))


def test_helper_threads_sleep_between_steps_and_end_with_their_decoder() -> None:
    before = threading.active_count()
    decoder = PackedDecoder(_SPEC, RandomWeights(_SPEC, "Q4_1"), threads=4)
    new_driver(decoder, _SPEC).step((new_driver(decoder, _SPEC).request(9), random_tokens(_SPEC, 9)))
    assert threading.active_count() == before + 3
    started = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - started < 0.1  # a thread that spins would have used 0.3 s
    del decoder
    gc.collect()
    assert threading.active_count() == before


@pytest.mark.parametrize("tokens", [1, 100])
def test_a_step_runs_on_one_thread_where_that_is_faster_and_the_other_way_is_tried_again(tokens: int) -> None:
    pace, seconds = Pace(4), {1: 1.0, 4: 2.0}

    def steps(count: int) -> list[int]:
        chosen = []
        for _ in range(count):
            chosen.append(pace.choose(tokens))
            pace.took(tokens, chosen[-1], seconds[chosen[-1]])
        return chosen

    assert steps(1) == [4]
    assert steps(300).count(1) >= 200
    seconds[1] = 3.0  # now it is better together
    assert steps(500)[-50:].count(4) >= 46
    assert {Pace(1).choose(tokens) for _ in range(300)} == {1}


@pytest.mark.parametrize("faster", [1, 4])
def test_a_step_that_wakes_a_thread_or_reads_cold_memory_says_nothing_of_those_behind_it(faster: int) -> None:
    pace = Pace(4)
    chosen: list[int] = []
    for _ in range(300):
        threads = pace.choose(1)
        is_first = not chosen or chosen[-1] != threads
        pace.took(1, threads, (1.0 if threads == faster else 1.5) + 9.0 * is_first)
        chosen.append(threads)
    assert set(chosen) == {1, 4}
    assert chosen[9:].count(faster) >= 280


@settings(max_examples=20, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 16), st.integers(1, 600)), min_size=200, max_size=200), st.integers(1, 3))
def test_steps_of_any_size_may_follow_each_other(tokens: list[int], threads: int) -> None:
    pace, random = Pace(threads), Random(1)
    for count in tokens * 6:
        chosen = pace.choose(count)
        assert chosen in (1, threads)
        pace.took(count, chosen, random.random())


def test_a_bad_moment_is_got_over_by_the_next_trial() -> None:
    pace = Pace(4)
    chosen: list[int] = []
    for i in range(1200):
        chosen.append(pace.choose(1))
        others_want_cores = i < 50
        pace.took(1, chosen[-1], 30.0 if chosen[-1] == 4 and others_want_cores else 1.0 if chosen[-1] == 4 else 2.0)
    assert chosen[10:100].count(1) == 90, "two threads wait for one another"
    assert chosen[110:].count(4) >= 1070, "and then they do not"


def test_refusals_name_what_does_not_fit() -> None:
    def ask(spec: Any = _SPEC, dtype: str = "auto", page: int = 16, kv: str = "float32", kinds: str = "Q4_1") -> str | None:
        return refusal(Facts("cpu", dtype, spec, page, kv, frozenset((kinds,))))

    assert ask() is None
    assert "float32" in str(ask(dtype="float32"))
    assert "F16" in str(ask(kinds="F16"))
    assert "page size is 4" in str(ask(page=4))
    assert "bfloat16" in str(ask(kv="bfloat16"))
    assert "head size 48" in str(ask(spec=small_spec(head_dim=48)))
    assert "hidden size 48" in str(ask(spec=small_spec(hidden_size=48)))
    assert "window" in str(ask(spec=small_spec(Traits(sliding_window=9))))
    assert "biases" in str(ask(spec=small_spec(Traits(mlp_bias=True))))


def test_quantising_to_eight_bits_rounds_to_nearest() -> None:
    weight = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    weight[1, :32] = 0
    rows = quantise_q8_0(weight).reshape(4, 2, 34)
    scale = rows[..., :2].copy().view(np.float16).astype(np.float32)
    back = (rows[..., 2:].view(np.int8) * scale).reshape(4, 64)
    assert np.all(np.abs(back - weight).reshape(4, 2, 32).max(-1) <= scale[..., 0] * 0.51)
    assert not back[1, :32].any()


def test_default_model_stays_near_float32_on_text(default_checkpoint: Checkpoint) -> None:
    spec = default_checkpoint.spec
    text = Path(__file__).read_text()[:1500]
    tokens = _tokens_of(default_checkpoint, text)[:200]
    packed = new_driver(PackedDecoder(spec, default_checkpoint, threads=2), spec)
    plain = new_reference(spec, default_checkpoint)
    logits, expected = (driver.step((driver.request(len(tokens)), tokens)) for driver in (packed, plain))
    assert mean_kl(expected, logits) < 1e-4
    assert float((expected.argmax(-1) == logits.argmax(-1)).float().mean()) > 0.99


def _tokens_of(checkpoint: Checkpoint, text: str) -> list[int]:
    """Greedy longest match over the file's vocabulary: near enough to the tokenizer for text-like ids."""
    from gguf import GGUFReader

    field = GGUFReader(checkpoint.path).fields["tokenizer.ggml.tokens"]
    vocabulary = {bytes(field.parts[at]).decode(): i for i, at in enumerate(field.data)}
    text, ids = text.replace(" ", "Ġ").replace("\n", "Ċ"), []
    while text:
        length = next((n for n in range(min(16, len(text)), 0, -1) if text[:n] in vocabulary), 0)
        if length:
            ids.append(vocabulary[text[:length]])
        text = text[max(1, length) :]
    return ids
