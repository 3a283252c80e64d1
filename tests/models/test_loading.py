"""Weights straight into memory that is there: every source, the staged way of safetensors files, slices of joined weights."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from streamserve.errors import CheckpointError
from streamserve.kernels.devices.device import Device
from streamserve.models import staging
from streamserve.models.checkpoint import Checkpoint, open_checkpoint
from streamserve.models.hf_folder import FolderSource
from streamserve.models.staging import Staging
from tests.kernels.found import find
from tests.models.test_gguf import write
from tests.models.tiny import build_reference

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["host", "cuda"])
def device(request: pytest.FixtureRequest) -> Device:
    name: str = request.param
    return find(name)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny tensors still go in several pieces, and slots are used again and again."""
    monkeypatch.setattr(staging, "MIN_PIECE_BYTES", 64)


def _staged(folder: Path, device: Device) -> Checkpoint:
    return Checkpoint(FolderSource(folder, lambda _: Staging(device, slot_bytes=256, threads=3)))


@pytest.mark.parametrize("dtype", FLOATS)
def test_staged_weights_equal_those_read_by_torch(
    device: Device, folders: dict[str, Path], small_pieces: None, dtype: torch.dtype
) -> None:
    checkpoint = _staged(folders["llama_biased"], device)
    for name in sorted(checkpoint.names):
        expected = checkpoint.tensor(name).to(dtype)
        out = torch.full(expected.shape, float("nan"), dtype=dtype, device=device.torch_device)
        checkpoint.load(name, out)
        assert torch.equal(out.cpu(), expected), name
    checkpoint.finish()
    checkpoint.finish()  # nothing is left to do


@pytest.mark.parametrize("kind", [*FLOATS, torch.float64])
def test_every_float_type_of_a_file_is_converted(device: Device, tmp_path: Path, small_pieces: None, kind: torch.dtype) -> None:
    source = torch.randn(37, 29, dtype=torch.float64).to(kind)  # odd: the last piece is a short one
    save_file({"a": torch.ones(3, dtype=torch.float16), "w": source}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    folder = FolderSource(tmp_path, lambda _: Staging(device, slot_bytes=256, threads=2))
    out = torch.empty(37, 29, dtype=torch.bfloat16, device=device.torch_device)
    folder.load("w", out)
    folder.finish()
    assert torch.equal(out.cpu(), source.to(torch.bfloat16))


def test_shards_are_loaded_from_their_files(device: Device, tmp_path: Path, small_pieces: None) -> None:
    model = build_reference("llama")
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    checkpoint = _staged(tmp_path, device)
    for name, expected in model.state_dict().items():
        out = torch.empty(expected.shape, device=device.torch_device)
        checkpoint.load(name, out)
        assert torch.equal(out.cpu(), expected), name
    checkpoint.finish()


def test_slices_of_joined_weights_are_filled_and_their_neighbours_left_alone(
    device: Device, folders: dict[str, Path], small_pieces: None
) -> None:
    checkpoint = _staged(folders["llama"], device)
    name = "model.layers.1.self_attn.k_proj.weight"
    expected = checkpoint.tensor(name)
    rows, columns = expected.shape
    joined = torch.zeros(2 * rows, columns + 3, device=device.torch_device)
    checkpoint.load(name, joined[rows:, :columns])  # not contiguous
    checkpoint.load(name, (whole := torch.zeros(3 * rows, columns, device=device.torch_device))[rows : 2 * rows])
    checkpoint.finish()
    assert torch.equal(joined[rows:, :columns].cpu(), expected)
    assert torch.equal(whole[rows : 2 * rows].cpu(), expected)
    assert not joined[:rows].any() and not joined[:, columns:].any() and not whole[:rows].any() and not whole[2 * rows :].any()


def test_loading_and_reading_count_a_weight_once(folders: dict[str, Path]) -> None:
    seen: list[tuple[int, int]] = []
    checkpoint = open_checkpoint(folders["llama"], progress=lambda done, total: seen.append((done, total)))
    for name in checkpoint.names:
        checkpoint.load(name, torch.empty_like(checkpoint.tensor(name)))
    assert len(seen) == len(checkpoint.names)
    assert seen[-1] == (checkpoint.num_bytes, checkpoint.num_bytes)


def test_memory_of_another_shape_is_our_bug(folders: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(folders["llama"])
    name = "model.norm.weight"
    with pytest.raises(AssertionError, match=name):
        checkpoint.load(name, torch.empty(3))


def test_a_file_that_ends_early_is_refused(device: Device, tmp_path: Path, small_pieces: None) -> None:
    path = tmp_path / "short"
    path.write_bytes(bytes(1000))
    staging = Staging(device, slot_bytes=64, threads=2)
    out = torch.empty(500, device=device.torch_device)
    with path.open("rb") as file, pytest.raises(CheckpointError, match="ends before its last tensor"):
        staging.load(file.fileno(), 0, torch.float32, out)
    with path.open("rb") as file:
        staging.load(file.fileno(), 0, torch.float32, out[:250])  # the slots are whole again
    staging.close()
    assert not out[:250].any()


def test_dummy_weights_are_drawn_in_place_with_the_right_spread(folders: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(folders["llama_biased"], load_format="dummy")
    name = "model.layers.2.mlp.down_proj.weight"
    out = torch.full((48, 80), float("nan"), dtype=torch.bfloat16)
    checkpoint.load(name, out)
    again = torch.empty_like(out)
    checkpoint.load(name, again)
    assert torch.equal(out, again)
    assert 0.9 * 80**-0.5 < out.float().std() < 1.1 * 80**-0.5
    norm, bias = torch.empty(48), torch.empty(48)
    checkpoint.load("model.norm.weight", norm)
    checkpoint.load("model.layers.0.mlp.down_proj.bias", bias)
    assert norm.unique().tolist() == [1.0] and bias.unique().tolist() == [0.0]


def test_quantised_weights_are_expanded_into_place(tmp_path: Path) -> None:
    write(tmp_path / "model.gguf", "llama", "Q8_0")
    checkpoint = open_checkpoint(tmp_path / "model.gguf")
    name = "model.layers.0.mlp.up_proj.weight"
    expected = checkpoint.tensor(name)
    out = torch.empty(expected.shape, dtype=torch.float16)
    checkpoint.load(name, out)
    assert torch.equal(out, expected.half())
