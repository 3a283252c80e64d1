"""From checkpoint to network: which kernels run, and the torch network as one choice among them.

Owns nothing; composes checkpoint, registry and pool.
"""

import sys
from collections.abc import Mapping

import torch

from streamserve.errors import ConfigError
from streamserve.kernels import registry
from streamserve.kernels.ops import DeviceNetwork, KVPages, Network, NetworkParts
from streamserve.kernels.registry import Choice, Facts, implements
from streamserve.models.checkpoint import Checkpoint

_DTYPES = {"auto": torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@implements("network", name="torch", device="cpu")
def torch_network(parts: NetworkParts) -> Network:
    """The family's Decoder, in torch; sets torch's thread count for the process when it runs on a CPU."""
    assert isinstance(parts.weights, Checkpoint)
    if parts.device.type == "cpu":
        torch.set_num_threads(parts.threads)
    return parts.weights.model(parts)


def build_device_network(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device,
    choices: Mapping[str, Choice],
    max_len: int,
    max_rows: int,
    deterministic: bool = False,
) -> DeviceNetwork:
    """Load the weights into the chosen network of a GPU. Blocks; reports progress through the checkpoint. Raises StartError."""
    parts = NetworkParts(
        shape=checkpoint.spec,
        weights=checkpoint,
        dtype=dtype,
        device=device,
        ops={op: choice.run for op, choice in choices.items()},
        max_len=max_len,
        max_rows=max_rows,
        deterministic=deterministic,
    )
    network: DeviceNetwork = choices["network"].run(parts)
    return network


def choose_kernels(
    checkpoint: Checkpoint,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    page_size: int = 16,
    kv_dtype: torch.dtype = torch.float32,
    overrides: Mapping[str, str] | None = None,
) -> dict[str, Choice]:
    """What runs each op for this model here, and why. `overrides` maps op to name (--op). Raises ConfigError."""
    facts = Facts(
        device=device,
        dtype=dtype,
        shape=checkpoint.spec,
        page_size=page_size,
        kv_dtype=str(kv_dtype).removeprefix("torch."),
        weight_kinds=checkpoint.weight_kinds,
    )
    return registry.load(sys.modules[__name__], device=device).choose(facts, overrides)


def build_network(
    checkpoint: Checkpoint,
    *,
    pool: KVPages,
    dtype: str = "auto",
    device: str = "cpu",
    threads: int = 1,
    choices: Mapping[str, Choice] | None = None,
) -> Network:
    """Load the weights into the chosen network. Blocks; reports progress through the checkpoint. Raises StartError."""
    if dtype not in _DTYPES:
        raise ConfigError(f"dtype is {dtype!r}; allowed are {', '.join(_DTYPES)}")
    if choices is None:
        choices = choose_kernels(checkpoint, dtype=dtype, device=device, page_size=pool.page_size, kv_dtype=pool.k.dtype)
    parts = NetworkParts(
        shape=checkpoint.spec,
        weights=checkpoint,
        dtype=_DTYPES[dtype],
        device=torch.device(device),
        ops={op: choice.run for op, choice in choices.items()},
        threads=threads,
    )
    network: Network = choices["network"].run(parts)
    return network
