"""From the setting to a runner's drafter: opens what guesses beside the target, says what memory it needs, and loads it.

Owns the check that a drafter fits its target. In two steps, because what it needs must be known before memory is handed out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch

from streamserve.cache.pool import KVPool
from streamserve.engine.drafters.draft_model import DraftModel
from streamserve.engine.drafters.heads import HeadDrafter
from streamserve.engine.drafters.passes import Passes, drafter_pool
from streamserve.engine.drafters.runner_drafter import RunnerDrafter
from streamserve.errors import CheckpointError, ConfigError
from streamserve.kernels.ops import Network, NetworkParts, Weights
from streamserve.kernels.registry import Choice
from streamserve.models.checkpoint import Checkpoint, locate, open_checkpoint
from streamserve.models.decoder import Decoder
from streamserve.models.eagle import EagleFile, EagleHead
from streamserve.models.heads import Head
from streamserve.models.mtp import MTPHead
from streamserve.models.network import build_network, choose_kernels
from streamserve.models.spec import ModelSpec

KINDS = ("draft_model", "eagle", "mtp")


class Needs(NamedTuple):
    """Memory: for weights, and for the keys and values of a token."""

    weight_bytes: int
    kv_bytes_per_token: int


@dataclass(frozen=True, slots=True)
class Room:
    """What a drafter is loaded for: the target's pages and rows, and how it computes. `choices`: the target's kernels."""

    num_pages: int
    page_size: int
    num_slots: int
    max_drafts: int
    dtype: torch.dtype
    threads: int
    choices: Mapping[str, Choice]


class OpenDrafter(Protocol):
    """A drafter whose weights are not read yet."""

    def needs(self, dtype: torch.dtype, choices: Mapping[str, Choice]) -> Needs:
        """With the target's type of numbers and kernels. Raises ConfigError when it cannot read that target."""
        ...

    def load(self, target: Network, room: Room) -> RunnerDrafter:
        """Read the weights. Blocks."""
        ...


def open_drafter(kind: str, path: str | None, target: Checkpoint, *, page_size: int, dtype: str = "auto") -> OpenDrafter:
    """One of KINDS, for this target. `dtype`: the setting. Raises CheckpointError."""
    if kind == "mtp":
        return _open_mtp(target)
    assert path is not None
    if kind == "eagle":
        return _OpenEagle(EagleFile(locate(path), target.spec))
    assert kind == "draft_model"
    return _OpenDraftModel(open_checkpoint(path), target, page_size, dtype)


class _OpenDraftModel:
    def __init__(self, checkpoint: Checkpoint, target: Checkpoint, page_size: int, dtype: str) -> None:
        self._checkpoint = checkpoint
        self._num_target_tokens = target.spec.vocab_size
        self._dtype = dtype
        small, large = sorted((checkpoint.spec.vocab_size, target.spec.vocab_size))
        if large - small > _MAX_PADDING:
            raise CheckpointError(
                f"{checkpoint.path} has {checkpoint.spec.vocab_size} tokens, {target.path} {target.spec.vocab_size}; a model can "
                "guess only for one with the same vocabulary"
            )
        kernels = choose_kernels(checkpoint, dtype=dtype, page_size=page_size)
        self._is_packed = kernels["network"].name != "torch"
        if self._is_packed:  # keys and values as resolve.py has them for the target
            kernels = choose_kernels(checkpoint, dtype=dtype, page_size=page_size, kv_dtype=torch.float16)
        self._choices = kernels

    def needs(self, dtype: torch.dtype, choices: Mapping[str, Choice]) -> Needs:
        checkpoint = self._checkpoint
        weights = checkpoint.num_bytes if self._is_packed else checkpoint.num_parameters * dtype.itemsize
        return Needs(weights, _token_bytes(checkpoint.spec, self._kv_dtype(dtype)))

    def load(self, target: Network, room: Room) -> RunnerDrafter:
        spec = self._checkpoint.spec
        pool, passes = _memory(spec, room, self._kv_dtype(room.dtype))
        network = build_network(
            self._checkpoint,
            pool=pool,
            dtype=self._dtype if self._is_packed else str(room.dtype).removeprefix("torch."),
            threads=room.threads,
            choices=self._choices,
        )
        return DraftModel(
            network,
            passes,
            target,
            num_tokens=spec.vocab_size,
            num_target_tokens=self._num_target_tokens,
            max_drafts=room.max_drafts,
        )

    def _kv_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float16 if self._is_packed else dtype


# Models of one family and different sizes have the same tokens, and more or fewer places behind them that no token has: Qwen2.5
# has 151,936 or 152,064.
_MAX_PADDING = 1024


class _OpenHead:
    """What the two kinds of head share."""

    name: str

    def __init__(self, spec: ModelSpec, weights: Weights, num_parameters: int) -> None:
        self._spec = replace(spec, num_layers=1)  # of its keys and values
        self._weights = weights
        self._num_parameters = num_parameters

    def needs(self, dtype: torch.dtype, choices: Mapping[str, Choice]) -> Needs:
        if choices["network"].name != "torch":
            raise ConfigError(
                f"--speculative {self.name} reads what is between the layers of the model, which the {choices['network'].name} "
                "network does not show; add --dtype float32, or guess with ngram or draft_model"
            )
        return Needs(self._num_parameters * dtype.itemsize, _token_bytes(self._spec, dtype))

    def load(self, target: Network, room: Room) -> RunnerDrafter:
        assert isinstance(target, Decoder)
        _, passes = _memory(self._spec, room, room.dtype)
        parts = NetworkParts(
            shape=self._shape(),
            weights=self._weights,
            dtype=room.dtype,
            device=torch.device("cpu"),
            ops={op: choice.run for op, choice in room.choices.items()},
            threads=room.threads,
        )
        return HeadDrafter(self._head(parts, target), passes, target, max_drafts=room.max_drafts)

    def _shape(self) -> ModelSpec:
        return self._spec

    def _head(self, parts: NetworkParts, target: Decoder) -> Head:
        raise NotImplementedError


class _OpenEagle(_OpenHead):
    name = "eagle"

    def __init__(self, file: EagleFile) -> None:
        super().__init__(file.spec, file, file.num_parameters)
        self._file = file

    def _head(self, parts: NetworkParts, target: Decoder) -> Head:
        return EagleHead(parts, self._file, target)


class _OpenMTP(_OpenHead):
    name = "mtp"

    def __init__(self, target: Checkpoint) -> None:
        super().__init__(target.spec, target, target.num_optional_parameters // target.spec.num_mtp_layers)
        self._target_spec = target.spec

    def _shape(self) -> ModelSpec:
        return self._target_spec

    def _head(self, parts: NetworkParts, target: Decoder) -> Head:
        return MTPHead(parts, target)


def _open_mtp(target: Checkpoint) -> OpenDrafter:
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
    return _OpenMTP(target)


def _memory(spec: ModelSpec, room: Room, dtype: torch.dtype) -> tuple[KVPool, Passes]:
    pool = drafter_pool(
        spec,
        num_pages=room.num_pages,
        page_size=room.page_size,
        num_slots=room.num_slots,
        max_drafts=room.max_drafts,
        dtype=dtype,
    )
    return pool, Passes(pool, num_slots=room.num_slots, max_drafts=room.max_drafts)


def _token_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    return KVPool.bytes_per_page(spec, dtype, page_size=1)
