"""A whole start on a GPU, from settings to answers, where there is none: kernels interpreted, the host as the card."""

import asyncio
import re
from pathlib import Path

import pytest
import torch

from tests.kernels.devices import HAS_GPU, HAS_TRITON

if HAS_GPU or not HAS_TRITON:
    pytest.skip("needs Triton's interpreter; with a GPU test_device_runner.py looks at more", allow_module_level=True)

import transformers

from streamserve import build as composition
from streamserve import facts
from streamserve.config import CacheConfig, Config, ModelConfig, SchedulerConfig
from streamserve.engine.client import collect
from streamserve.engine.step_costs import StepCosts
from streamserve.kernels.devices.host import Host
from streamserve.kernels.impl import triton_gemv
from streamserve.messages import Delta, GenerateRequest, Guidance, SamplingParams
from streamserve.models.checkpoint import open_checkpoint
from streamserve.models.eagle import EagleFile
from streamserve.text.byte_tokenizer import byte_text_model
from tests.models import small_heads, tiny

GUIDANCE = Guidance('start: "01" /[AB]/ "=3" /[AB]/ "=3"')
PROMPT = (3, 5, 7, 11, 13, 2, 4, 6, 8, 10)


class Card(Host):
    """The host under a GPU's name."""

    name = "cuda"
    model = "no card"
    features = frozenset({"bf16"})


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy, in the interpreter: hashes wrap round
@pytest.mark.filterwarnings("ignore:invalid value encountered")  # surplus rows are whatever the memory held
@pytest.mark.parametrize("guessing", ["ngram,1", "draft_model={target},1", "eagle={head},2"])
def test_settings_become_answers_of_the_model(guessing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = {"head_dim": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    shape = {**tiny.SHAPE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, **heads}
    torch.manual_seed(1)
    reference = tiny.from_config(transformers.LlamaConfig(**shape))
    for parameter in reference.parameters():
        with torch.no_grad():
            _ = parameter.uniform_(0.5, 1.5) if parameter.ndim == 1 else parameter.normal_(0, parameter.shape[1] ** -0.5)
    reference.save_pretrained(tmp_path)
    head = small_heads.save_head(
        tmp_path / "head", "eagle", vocab_size=shape["vocab_size"], eagle_aux_hidden_state_layer_ids=[0, 1]
    )
    monkeypatch.setattr(facts, "find_device", lambda config: Card())
    monkeypatch.setattr(composition, "_load_text", lambda config, path: byte_text_model())
    monkeypatch.setattr(composition, "load_tokenizer", lambda path: byte_text_model().tokenizer)
    # Few large programs: each takes the interpreter some 10 ms. Which tiles are right is not looked at here.
    monkeypatch.setattr(triton_gemv, "_default_tile", lambda *_: triton_gemv.Tile(32, 64, 1))
    config = Config(
        model=ModelConfig(model_path=str(tmp_path), dtype="float32", context_length=32),
        cache=CacheConfig(max_total_tokens=128),
        scheduler=SchedulerConfig(
            chunked_prefill_size=8, max_running_requests=2, speculative=guessing.format(target=tmp_path, head=head)
        ),
    )
    monkeypatch.setattr(composition, "StepCosts", lambda token_cost: StepCosts.free())  # all guesses are verified
    built = composition.build(config)
    assert built.resolved is not None
    num_models = 2 if guessing.startswith("draft_model") else 1
    has_head = guessing.startswith("eagle")
    num_heads = num_models + 2 * has_head  # of keys and values, each of a layer
    num_parameters = num_models * sum(parameter.numel() for parameter in reference.parameters())
    if has_head:
        num_parameters += EagleFile(head, open_checkpoint(tmp_path).spec).num_parameters
    assert built.resolved.kv_bytes_per_token == num_heads * 2 * 16 * 4  # keys and values, 4 bytes each
    assert built.resolved.weight_bytes == 4 * num_parameters

    async def ask() -> list[Delta]:
        engine = asyncio.create_task(built.engine.run())
        params = SamplingParams(max_new_tokens=4, temperature=0.0, ignore_eos=True)
        boxes = [await built.engine.submit(GenerateRequest(f"{n}", PROMPT[:n], params)) for n in (10, 3)]
        answers = [await collect(box) for box in boxes]
        params = SamplingParams(max_new_tokens=9, logit_bias=((ord("0"), 9.0),))
        boxes = [await built.engine.submit(GenerateRequest(f"g{n}", PROMPT[:n], params, guidance=GUIDANCE)) for n in (7, 4)]
        answers += [await collect(box) for box in boxes]
        engine.cancel()
        await asyncio.gather(engine, return_exceptions=True)
        return answers

    *free, long, short = asyncio.run(ask())
    if has_head:
        assert sum(answer.num_drafted for answer in free) > 0
    if num_models == 2:  # what the model would say itself
        assert all(answer.num_accepted == answer.num_drafted > 0 for answer in free)
    for answer in (long, short):  # two letters were sampled under masks
        assert re.fullmatch(rb"01[AB]=3[AB]=3", bytes(answer.token_ids)) and answer.num_jumped == 6
    for prompt, answer in zip((PROMPT[:10], PROMPT[:3]), free, strict=True):
        logits = tiny.reference_logits(reference, [*prompt, *answer.token_ids[:-1]])[len(prompt) - 1 :]
        assert list(answer.token_ids) == logits.argmax(dim=1).tolist()
    built.cache.check()
    built.close()
