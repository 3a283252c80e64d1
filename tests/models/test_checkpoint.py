"""Opening checkpoints: what is found, what is refused and with which words."""

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from streamserve.errors import CheckpointError
from streamserve.models import hub
from streamserve.models.checkpoint import open_checkpoint
from tests.models.tiny import SHAPE, Driver, build_reference, reference_logits


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the llama folder, to be damaged."""
    return Path(shutil.copytree(folders["llama"], tmp_path / "model"))


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_sharded_safetensors_are_one_model(tmp_path: Path) -> None:
    model = build_reference("llama")
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    driver = Driver.load(tmp_path)
    [logits] = driver.step((driver.request(4), [1, 2, 3, 4]))
    torch.testing.assert_close(logits, reference_logits(model, [1, 2, 3, 4]), atol=1e-4, rtol=0)
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"lacks model-.*\.safetensors.*download the model again"):
        open_checkpoint(tmp_path)


def test_missing_and_unknown_tensors_are_named(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.0.surprise"] = weights.pop("model.norm.weight")
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight missing; model\.layers\.0\.surprise unknown"):
        open_checkpoint(folder)


def test_a_head_stored_beside_tied_embeddings_is_harmless(folder: Path) -> None:
    edit_config(folder, tie_word_embeddings=True)
    assert "lm_head.weight" not in open_checkpoint(folder).names


def test_a_wrong_shape_is_refused(folder: Path) -> None:
    edit_config(folder, intermediate_size=81)
    checkpoint = open_checkpoint(folder)
    with pytest.raises(CheckpointError, match=r"has shape \(80, 48\); config asks for \(81, 48\)"):
        checkpoint.tensor("model.layers.0.mlp.gate_proj.weight")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "'mamba' is not supported; supported are gemma3_text, llama, mimo, mistral, qwen2, qwen3"),
        ({"model_type": "spec"}, "'spec' is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported is silu"),
        ({"num_hidden_layers": None}, "num_hidden_layers is None"),
        ({"num_key_value_heads": 4}, "not a multiple of num_key_value_heads 4"),
        ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}}, "'longrope'; supported are default"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window is true"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised by 'gptq'"),
    ],
)
def test_a_config_that_cannot_be_served_is_refused(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(folder)


def test_broken_config_and_weights_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        open_checkpoint(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        open_checkpoint(folder)


def test_torch_pickles_are_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no \.safetensors file; for random weights add --load-format dummy"):
        open_checkpoint(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="convert them to safetensors"):
        open_checkpoint(folder)


def test_paths_that_hold_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"neither config\.json nor a \.gguf file"):
        open_checkpoint(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(CheckpointError, match="is not a model"):
        open_checkpoint(tmp_path / "notes.txt")
    with pytest.raises(CheckpointError, match=r"does not exist; give a \.gguf file, a Hugging Face folder or a hub id"):
        open_checkpoint(tmp_path / "a" / "b" / "c")
    (tmp_path / "a.gguf").touch()
    (tmp_path / "b.gguf").touch()
    with pytest.raises(CheckpointError, match=r"holds 2 models; name one: a\.gguf, b\.gguf"):
        open_checkpoint(tmp_path)


def test_a_hub_id_without_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="hub cannot be reached; connect"):
        open_checkpoint("owner/no-such-model")


def test_a_hub_id_opens_the_downloaded_folder(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    asked: dict[str, Any] = {}

    def snapshot(hub_id: str, **options: Any) -> str:
        asked.update(options, hub_id=hub_id)
        return str(folder)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    assert open_checkpoint("owner/model", revision="v2").path == folder
    assert (asked["hub_id"], asked["revision"]) == ("owner/model", "v2")
    assert "*.safetensors" in asked["allow_patterns"]
    open_checkpoint("owner/model", load_format="dummy")
    assert "*.safetensors" not in asked["allow_patterns"]


def test_dummy_weights_are_the_same_every_time_and_logits_are_sane(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    first, second = (open_checkpoint(folder, load_format="dummy") for _ in range(2))
    name = "model.layers.2.mlp.down_proj.weight"
    assert torch.equal(first.tensor(name), second.tensor(name))
    assert not torch.equal(first.tensor(name), first.tensor(name.replace("2", "1")))
    driver = Driver.load(folder, load_format="dummy")
    [logits] = driver.step((driver.request(16), list(range(16))))
    assert 0.3 < logits.std() < 3


def test_progress_ends_at_all_bytes(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    checkpoint = open_checkpoint(folder, progress=lambda done, total: seen.append((done, total)))
    for name in [*checkpoint.names, *checkpoint.names]:
        checkpoint.tensor(name)
    assert len(seen) == len(checkpoint.names)
    assert seen == sorted(seen)
    assert seen[-1] == (checkpoint.num_bytes, checkpoint.num_bytes)
    assert checkpoint.num_bytes == 4 * checkpoint.num_parameters


def test_end_of_sequence_ids_come_from_both_configs(folder: Path) -> None:
    edit_config(folder, eos_token_id=5)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6], "temperature": 0.6}))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.spec.eos_token_ids == {5, 6}
    assert checkpoint.generation_config["temperature"] == 0.6


def test_configs_from_before_transformers_5_mean_the_same(folder: Path) -> None:
    new = open_checkpoint(folder).spec
    config = json.loads((folder / "config.json").read_text())
    del config["rope_parameters"], config["head_dim"]
    config |= {"rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": "float32"}
    (folder / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(folder).spec == new
    edit_config(folder, rope_scaling={"type": "linear", "factor": 2.0})
    rope = open_checkpoint(folder).spec.rope
    assert (rope.kind, rope.factor, rope.theta) == ("linear", 2.0, 10000.0)
    assert SHAPE["max_position_embeddings"] == new.max_position_embeddings
