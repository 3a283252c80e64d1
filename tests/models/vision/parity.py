"""Does a vision model answer through our engine as it does in transformers? One request at a time, beside texts, in chunks of 16
tokens, and from a warm cache.

A family's test saves a tiny random model (`randomised`, so that answers depend on the picture and a forgotten bias shows), lets
transformers answer (`greedy`), and hands prompts over (`asked`) to `check_parity`.
"""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from streamserve import build as composition
from streamserve.config import CacheConfig, Config, DeviceConfig, ModelConfig, SchedulerConfig
from streamserve.engine.client import collect
from streamserve.media.family import Prepared
from streamserve.media.picture import Picture
from streamserve.messages import Delta, GenerateRequest, Media, SamplingParams, Span, media_token_ids
from streamserve.text.byte_tokenizer import byte_text_model

ANSWER_LEN = 8


@dataclass(frozen=True, slots=True)
class Asked:
    """A prompt as it crosses the seam, and what transformers answers to it."""

    token_ids: tuple[int, ...]
    media: tuple[Media, ...]
    expected: list[int]


def randomised(model: Any, seed: int = 1) -> Any:
    """The model with weights of a size that makes every part of it count; norms and biases are random too. In float32."""
    generator = torch.Generator().manual_seed(seed)
    is_tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".bias"):
                parameter.normal_(0, 0.3, generator=generator)
            elif parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif name.endswith("embed_tokens.weight") and not is_tied:  # a tied head would say the last token again
                parameter.normal_(0, 1, generator=generator)
            else:
                sharper = 2.0 if name.endswith(("q_proj.weight", "k_proj.weight")) else 1.0
                parameter.normal_(0, sharper * parameter[0].numel() ** -0.5, generator=generator)
    return model.float().eval()


def drawn(height: int, width: int, seed: int = 0) -> Picture:
    """A picture of noise on coarse blocks, with a digest of its own."""
    generator = np.random.default_rng((seed, height, width))
    blocks = generator.integers(0, 256, (-(-height // 5), -(-width // 5), 3), dtype=np.uint8)
    pixels = blocks.repeat(5, 0).repeat(5, 1)[:height, :width]
    return Picture(np.ascontiguousarray(pixels), bytes((seed, height % 256, width % 256)) + bytes(29))


def greedy(model: Any, input_ids: Sequence[int], **inputs: Any) -> list[int]:
    """The next tokens as transformers' generate() finds them; `inputs`: what the model takes beside them."""
    ids = torch.tensor([list(input_ids)])
    with torch.inference_mode():
        whole = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            **inputs,
            do_sample=False,
            max_new_tokens=ANSWER_LEN,
            min_new_tokens=ANSWER_LEN,
            eos_token_id=None,
            pad_token_id=0,
        )
    found: list[int] = whole[0, len(input_ids) :].tolist()
    assert len(found) == ANSWER_LEN
    return found


def asked(input_ids: Sequence[int], image_token_id: int, prepared: Sequence[Prepared], expected: list[int]) -> Asked:
    """transformers' input ids with our placeholders in the places of its image tokens."""
    token_ids, media = list(input_ids), []
    places = iter([at for at, token in enumerate(input_ids) if token == image_token_id])
    for one in prepared:
        spans = []
        ids = iter(media_token_ids(one.key, one.layout.num_tokens))
        for run in one.layout.runs:
            taken = [next(places) for _ in range(run.num_tokens)]
            assert taken == list(range(taken[0], taken[0] + len(taken))), "a run's places are not neighbours"
            for at in taken:
                token_ids[at] = next(ids)
            spans.append(Span(taken[0], *run))
        media.append(Media(one.key, tuple(spans), one.inputs, one.cost, one.kind))
    assert next(places, None) is None, "there are more image tokens than places"
    return Asked(tuple(token_ids), tuple(media), expected)


def texts_of(model: Any, vocab_size: int) -> list[Asked]:
    """Prompts without pictures, to stand beside the others."""
    generator = torch.Generator().manual_seed(4)
    prompts = [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in (5, 37)]
    return [Asked(tuple(prompt), (), greedy(model, prompt)) for prompt in prompts]


def check_parity(folder: Path, prompts: Sequence[Asked], texts: Sequence[Asked], *, ops: Sequence[str] = ()) -> None:
    """Every answer is transformers', however it is asked for. Some prompts must have pictures, and those answers differ.
    `ops`: implementations to force, as --op takes them."""
    seen = [tuple(prompt.expected) for prompt in prompts if prompt.media]
    assert len(set(seen)) == len(seen), "answers do not depend on the pictures: nothing would be tested"
    everything = [*prompts, *texts]
    warm = asyncio.run(_answers(folder, ops, None, everything))
    for prompt, cached in zip(everything, warm, strict=True):
        assert cached == len(prompt.token_ids) - 1  # of an exact repeat all but the last token comes from the cache
    asyncio.run(_answers(folder, ops, 16, everything))


async def _answers(folder: Path, ops: Sequence[str], chunk: int | None, prompts: Sequence[Asked]) -> list[int]:
    """Check all answers: one by one, cold and together, and together once more. Returns the cached tokens of the last time."""
    config = Config(
        model=ModelConfig(model_path=str(folder), dtype="float32"),
        cache=CacheConfig(max_total_tokens=sum(len(prompt.token_ids) + 2 * ANSWER_LEN for prompt in prompts) + 256),
        scheduler=SchedulerConfig(chunked_prefill_size=chunk, max_running_requests=8, speculative="none"),
        device=DeviceConfig(device="cpu", threads=1, op=tuple(ops)),
    )
    threads = torch.get_num_threads()
    with patch.object(composition, "_load_text", lambda config, path: byte_text_model()):
        built = composition.build(config)
    engine = asyncio.create_task(built.engine.run())
    try:
        for prompt in prompts if chunk is None else ():
            _compare([prompt], [await _ask(built.engine, prompt)], "alone")
        cached: list[int] = []
        for when in ("together", "together, from a warm cache"):
            if not cached:
                assert built.engine.flush_cache()
            answers = await asyncio.gather(*(_ask(built.engine, prompt) for prompt in prompts))
            _compare(prompts, answers, when if chunk is None else f"{when}, in chunks of {chunk}")
            cached = [answer.num_cached_tokens for answer in answers]
    finally:
        engine.cancel()
        await asyncio.gather(engine, return_exceptions=True)
        built.close()
        torch.set_num_threads(threads)
    built.cache.check()
    return cached


async def _ask(engine: Any, prompt: Asked) -> Delta:
    _ask_count[0] += 1
    params = SamplingParams(max_new_tokens=ANSWER_LEN, temperature=0.0, ignore_eos=True)
    request = GenerateRequest(f"r{_ask_count[0]}", prompt.token_ids, params, media=prompt.media)
    return await collect(await engine.submit(request))


_ask_count = [0]  # requests' ids are unique


def _compare(prompts: Sequence[Asked], answers: Sequence[Delta], how: str) -> None:
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.error is None, answer.error
        assert list(answer.token_ids) == prompt.expected, f"asked {how}, with {len(prompt.media)} pictures"


def same_embeddings(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> None:
    """Within what float32 can tell."""
    assert [tuple(one.shape) for one in ours] == [tuple(one.shape) for one in theirs]
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)


def loaded(folder: Path) -> Any:
    """The folder's encoder, in float32 on the CPU."""
    from streamserve.models.checkpoint import open_checkpoint

    vision = open_checkpoint(folder).vision
    assert vision is not None
    return vision.load(torch.device("cpu"), torch.float32)


Inputs = Mapping[str, Any]
