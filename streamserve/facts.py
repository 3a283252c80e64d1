"""Model and device as resolve() sees them, and the decisions that follow: plain numbers and the kernels.

Owns the translation between the layers' own types and resolve's, and the order of the decisions. Imports torch, so the
command line loads it only where a model is read.
"""

import torch

from streamserve.calibrate import PACKED, race
from streamserve.config import Config
from streamserve.default_model import DEFAULT_MODEL_NAME, find_default_model
from streamserve.kernels.devices.cpu import CPU
from streamserve.kernels.registry import Choice, parse_overrides
from streamserve.models.checkpoint import Checkpoint, Progress, open_checkpoint
from streamserve.models.network import choose_kernels
from streamserve.resolve import DeviceFacts, Fastest, ModelFacts, Reason, Resolved, resolve


def open_model(config: Config, progress: Progress | None = None) -> Checkpoint:
    """The checkpoint that the settings name, or the default model's. Blocks. Raises CheckpointError."""
    model = config.model
    path = model.model_path or find_default_model()
    return open_checkpoint(path, revision=model.revision, load_format=model.load_format, progress=progress)


def model_facts(config: Config, checkpoint: Checkpoint) -> ModelFacts:
    """The numbers of an open checkpoint. A model without a given name is called after its file or folder."""
    spec = checkpoint.spec
    return ModelFacts(
        name=model_name(config),
        model_type=spec.model_type,
        num_layers=spec.num_layers,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        vocab_size=spec.vocab_size,
        max_position_embeddings=spec.max_position_embeddings,
        num_parameters=checkpoint.num_parameters,
        weight_bytes=checkpoint.num_bytes,
        weight_kinds=checkpoint.weight_kinds,
    )


def model_name(config: Config) -> str:
    """What clients call the model: as asked, or the last part of its path without .gguf."""
    if config.model.served_model_name is not None:
        return config.model.served_model_name
    if config.model.model_path is None:
        return DEFAULT_MODEL_NAME
    return config.model.model_path.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")


def device_facts(cpu: CPU) -> DeviceFacts:
    """The CPU as a device."""
    free, total = cpu.memory()
    return DeviceFacts("cpu", cpu.model, cpu.num_cores, free, total, cpu.features)


def decide(config: Config, checkpoint: Checkpoint, cpu: CPU) -> tuple[Resolved, dict[str, Choice]]:
    """All that was left open: the numbers, then the kernel of every op. Raises ConfigError.

    Whether packed weights have a kernel here, and whether it is the fastest way, decides how large the weights are: the
    network is chosen first. With dtype auto a short race decides, whose result is kept (calibrate.py)."""
    overrides = dict(parse_overrides(config.device.op))

    def choose(kv_dtype: str) -> dict[str, Choice]:
        return choose_kernels(
            checkpoint,
            dtype=config.model.dtype,
            page_size=config.cache.page_size,
            kv_dtype=getattr(torch, kv_dtype),
            overrides=overrides,
        )

    choices = choose("float32")
    facts = model_facts(config, checkpoint), device_facts(cpu)
    fastest = None
    if config.model.dtype == "auto" and "network" not in overrides:
        threads = config.device.threads or cpu.num_cores
        timed = race(checkpoint, choices, cpu, threads)
        fastest = Fastest(timed.fastest, timed.why)
        if fastest.name != PACKED:
            overrides["network"] = "torch"
    has_packed_kernel = choices["network"].name == PACKED and overrides.get("network") != "torch"
    resolved = resolve(config, *facts, has_packed_kernel=has_packed_kernel, fastest=fastest)
    return resolved, choose(resolved.kv_dtype)


def kernel_reasons(choices: dict[str, Choice]) -> tuple[Reason, ...]:
    """The kernels, in the form of the other decisions."""
    return tuple(
        Reason(op, choice.name, choice.reason, "--op", "flag" if choice.reason.startswith("asked for") else "auto")
        for op, choice in choices.items()
    )
