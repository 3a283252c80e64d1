"""Every family against transformers, in float32 on the CPU."""

from pathlib import Path

import pytest
import torch

from streamserve.models import supported_types
from tests.models.tiny import VARIANTS, Driver, build_reference, reference_logits

variants = pytest.mark.parametrize("variant", VARIANTS)


def prompt(length: int, seed: int) -> list[int]:
    tokens: list[int] = torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return tokens


def check(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)


def test_every_model_file_is_among_the_variants() -> None:
    of_their_own = {"mimo"}  # not in transformers: tests/models/test_heads.py
    assert set(supported_types()) == {model_type for model_type, _ in VARIANTS.values()} | of_their_own


@variants
def test_whole_prompt_gives_transformers_logits(variant: str, folders: dict[str, Path]) -> None:
    tokens = prompt(41, 1)
    driver = Driver.load(folders[variant])
    [logits] = driver.step((driver.request(41), tokens))
    check(logits, reference_logits(build_reference(variant), tokens))


@variants
def test_chunks_and_decoding_give_transformers_logits(variant: str, folders: dict[str, Path]) -> None:
    tokens = prompt(41, 2)
    driver = Driver.load(folders[variant])
    request = driver.request(41)
    pieces, at = [], 0
    for length in (3, 1, 4, 16, 7, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1):
        pieces += driver.step((request, tokens[at : at + length]))
        at += length
    assert at == len(tokens)
    check(torch.cat(pieces), reference_logits(build_reference(variant), tokens))


@variants
def test_prompts_chunks_and_decode_rows_mix_in_one_step(variant: str, folders: dict[str, Path]) -> None:
    a, b, c, d = prompt(60, 3), prompt(30, 4), prompt(20, 5), prompt(6, 6)
    driver = Driver.load(folders[variant])
    ra, rb, rc, rd = (driver.request(len(tokens)) for tokens in (a, b, c, d))
    driver.step((ra, a[:59]), (rd, d[:5]))  # ra decodes next, far longer than rd
    driver.step((rb, b[:10]))
    got = driver.step((rd, d[5:]), (rb, b[10:]), (ra, a[59:]), (rc, c))
    model = build_reference(variant)
    for logits, tokens in zip(got, (d, b, a, c), strict=True):
        check(logits, reference_logits(model, tokens)[-len(logits) :])


@pytest.mark.parametrize("page_size", [1, 3, 16, 64])
def test_page_size_does_not_matter(page_size: int, folders: dict[str, Path]) -> None:
    tokens = prompt(37, 7)
    driver = Driver.load(folders["llama"], page_size=page_size)
    request = driver.request(37)
    pieces = driver.step((request, tokens[:20])) + driver.step((request, tokens[20:36])) + driver.step((request, tokens[36:]))
    check(torch.cat(pieces), reference_logits(build_reference("llama"), tokens))


def test_only_the_wanted_logits_are_computed(folders: dict[str, Path]) -> None:
    tokens = prompt(12, 8)
    driver = Driver.load(folders["llama"])
    [everything] = driver.step((driver.request(12), tokens))
    kept: list[torch.Tensor] = []
    forward = driver.network.forward

    def last_only(batch):  # type: ignore[no-untyped-def]
        batch.logit_rows_R = torch.tensor([3, 11])
        kept.append(forward(batch))
        batch.logit_rows_R = torch.tensor([], dtype=torch.int64)
        return forward(batch)

    driver.network.forward = last_only  # type: ignore[method-assign]
    [nothing] = driver.step((driver.request(12), tokens))
    check(kept[0], everything[[3, 11]])
    assert nothing.shape == (0, 97)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_close_to_float32(dtype: str, folders: dict[str, Path]) -> None:
    tokens = prompt(24, 9)
    driver = Driver.load(folders["qwen3"], dtype=dtype)
    [logits] = driver.step((driver.request(24), tokens))
    assert logits.dtype == torch.float32
    expected = reference_logits(build_reference("qwen3"), tokens)
    assert (logits - expected).abs().max() < 0.15
