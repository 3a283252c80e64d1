"""Networks that guess for another one: opened, held against it, measured, loaded.

Owns the check that such a network fits its target. In two steps, because what it needs must be known before memory is handed
out. What becomes of guesses is not known here.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from streamserve.cache.pool import KVPool
from streamserve.errors import CheckpointError, ConfigError
from streamserve.kernels.ops import DeviceNetwork, KVPages, Network, NetworkParts
from streamserve.kernels.registry import Choice, Facts
from streamserve.models.checkpoint import Checkpoint, locate, open_checkpoint
from streamserve.models.decoder import Decoder
from streamserve.models.eagle import EagleFile, EagleHead
from streamserve.models.heads import FeatureNetwork, Head
from streamserve.models.mtp import MTPHead
from streamserve.models.network import build_device_network, build_network, choose_kernels
from streamserve.models.spec import ModelSpec
from streamserve.resolve import DrafterNeeds

if TYPE_CHECKING:  # it imports triton
    from streamserve.models.device_heads import DeviceHead

# Models of one family and different sizes have the same tokens, and more or fewer places behind them that no token has: Qwen2.5
# has 151,936 or 152,064.
_MAX_PADDING = 1024


class OpenModel:
    """A whole model, smaller than the target. `dtype` is the setting."""

    def __init__(self, checkpoint: Checkpoint, target: Checkpoint, *, page_size: int, dtype: str, device: str = "cpu") -> None:
        small, large = sorted((checkpoint.spec.vocab_size, target.spec.vocab_size))
        if large - small > _MAX_PADDING:
            raise CheckpointError(
                f"{checkpoint.path} has {checkpoint.spec.vocab_size} tokens, {target.path} {target.spec.vocab_size}; a model can "
                "guess only for one with the same vocabulary"
            )
        self.checkpoint = checkpoint
        self.num_target_tokens = target.spec.vocab_size
        self._dtype = dtype
        self._choices = choose_kernels(checkpoint, dtype=dtype, device=device, page_size=page_size)
        self._is_packed = device == "cpu" and self._choices["network"].name != "torch"

    @property
    def kv_shape(self) -> ModelSpec:
        """The numbers that fix the size of its keys and values."""
        return self.checkpoint.spec

    def kv_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """How its keys and values are held, beside a target that computes in `dtype`: see resolve.py."""
        return torch.float16 if self._is_packed else dtype

    def needs(self, dtype: torch.dtype, choices: Mapping[str, Choice]) -> DrafterNeeds:
        """See OpenDrafter."""
        weights = self.checkpoint.num_bytes if self._is_packed else self.checkpoint.num_parameters * dtype.itemsize
        return DrafterNeeds(weights, _token_bytes(self.kv_shape, self.kv_dtype(dtype)))

    def load_on_gpu(self, device: torch.device, dtype: torch.dtype, *, max_len: int, max_rows: int) -> DeviceNetwork:
        """See build_device_network."""
        return build_device_network(
            self.checkpoint, dtype=dtype, device=device, choices=self._choices, max_len=max_len, max_rows=max_rows
        )

    def load(self, pool: KVPages, dtype: torch.dtype, threads: int) -> Network:
        """Read the weights, on a CPU. Blocks."""
        return build_network(
            self.checkpoint,
            pool=pool,
            dtype=self._dtype if self._is_packed else str(dtype).removeprefix("torch."),
            threads=threads,
            choices=self._choices,
        )


class OpenHead:
    """A head on the target's stream: an EAGLE-3 head's file, or None for the layer that the target's own checkpoint has.
    `device`: where it is to guess."""

    def __init__(self, target: Checkpoint, file: EagleFile | None, *, device: str = "cpu") -> None:
        self._target = target
        self._file = file
        self._device = device
        self.num_target_tokens = target.spec.vocab_size
        self.kv_shape: ModelSpec = replace(target.spec if file is None else file.spec, num_layers=1)

    def kv_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Its keys and values are held as it computes."""
        return dtype

    def needs(self, dtype: torch.dtype, choices: Mapping[str, Choice]) -> DrafterNeeds:
        """See OpenDrafter."""
        network = choices["network"].name
        if self._device == "cpu" and network != "torch" and (self._file is None or self._file.borrows_head):
            raise ConfigError(
                f"--speculative {'mtp' if self._file is None else 'eagle'} needs the model's last matrix to guess with, which "
                f"the {network} network holds for itself; add --dtype float32, or let ngram or draft_model guess"
            )
        if self._file is None:
            count = self._target.num_optional_parameters // self._target.spec.num_mtp_layers
        else:
            count = self._file.num_parameters
        return DrafterNeeds(count * dtype.itemsize, _token_bytes(self.kv_shape, dtype))

    def load(self, target: FeatureNetwork, dtype: torch.dtype, choices: Mapping[str, Choice], threads: int) -> Head:
        """Read the weights, for a target whose kernels are `choices`. Blocks."""
        parts = self._parts(dtype, torch.device("cpu"), ops={op: choice.run for op, choice in choices.items()})
        if choices["network"].name != "torch":
            torch.set_num_threads(threads)  # as torch's own network does; the packed one needs none of torch's
        if self._file is not None:
            return EagleHead(parts, self._file, target)
        assert isinstance(target, Decoder)
        return MTPHead(parts, target)

    def load_on_gpu(
        self, target: DeviceNetwork, device: torch.device, dtype: torch.dtype, *, max_len: int, max_rows: int
    ) -> "DeviceHead":
        """Read the weights onto a GPU, for a target that is there. `max_len`, `max_rows`: see NetworkParts. Blocks."""
        from streamserve.kernels.impl.triton_decoder import TritonDecoder
        from streamserve.models.device_heads import DeviceEagle, DeviceMTP

        assert isinstance(target, TritonDecoder)  # the only network of a GPU
        parts = self._parts(dtype, device, max_len=max_len, max_rows=max_rows)
        if self._file is None:
            return DeviceMTP(parts, target)
        head = DeviceEagle(parts, self._file, target)
        self._file.finish()
        return head

    def _parts(self, dtype: torch.dtype, device: torch.device, **more: Any) -> NetworkParts:
        shape = self._target.spec if self._file is None else self._file.spec
        return NetworkParts(shape, self._target if self._file is None else self._file, dtype, device, **{"ops": {}, **more})


# `needs` says what memory it takes, with the target's type of numbers and kernels; it raises ConfigError for a target that it
# cannot read.
OpenDrafter = OpenModel | OpenHead


def open_drafter(
    kind: str,
    path: str | None,
    target: Checkpoint,
    *,
    page_size: int,
    dtype: str = "auto",
    device: str = "cpu",
    load_format: str = "auto",
) -> OpenDrafter | None:
    """What --speculative names, for this target; None for a kind without a network. `dtype`: the setting, and `load_format`,
    which holds for whole models. Blocks. Raises CheckpointError, and ConfigError for a model that `device` has no kernels for."""
    match kind:
        case "draft_model":
            assert path is not None
            checkpoint = open_checkpoint(path, load_format=load_format)
            return OpenModel(checkpoint, target, page_size=page_size, dtype=dtype, device=device)
        case "eagle":
            assert path is not None
            file = EagleFile(locate(path), target.spec)
            if device != "cpu":
                _check_on_gpu(file, dtype=dtype, device=device, page_size=page_size)
            return OpenHead(target, file, device=device)
        case "mtp":
            _check_mtp(target)
            return OpenHead(target, None, device=device)
    return None


def _check_on_gpu(file: EagleFile, *, dtype: str, device: str, page_size: int) -> None:
    from streamserve.kernels.impl.triton_decoder import refusal

    facts = Facts(device=device, dtype=dtype, shape=file.spec, page_size=page_size, kv_dtype=dtype, weight_kinds=frozenset())
    if (reason := refusal(facts)) is not None:
        raise ConfigError(f"{file.path} cannot guess on a GPU: {reason}")


def _check_mtp(target: Checkpoint) -> None:
    if not target.spec.num_mtp_layers:
        raise CheckpointError(
            f"{target.path} has no layers that predict several tokens (config.json: num_nextn_predict_layers); "
            "--speculative mtp is for models that have, as MiMo does"
        )
    if not target.has_optional_weights:
        raise CheckpointError(
            f"{target.path} lacks the weights of its {target.spec.num_mtp_layers} layers that predict several tokens "
            "(model.mtp_layers): this copy was saved without them"
        )


def _token_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    return KVPool.bytes_per_page(spec, dtype, page_size=1)
