"""Model and device as resolve() sees them, and the decisions that follow: the device, plain numbers and the kernels.

Owns the translation between the layers' own types and resolve's, and the order of the decisions. Imports torch, so the
command line loads it only where a model is read.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from streamserve.calibrate import PACKED, race
from streamserve.config import Config, served_names
from streamserve.default_model import DEFAULT_MODEL_NAME, find_default_eyes, find_default_model
from streamserve.errors import ConfigError
from streamserve.kernels.devices.cpu import CPU
from streamserve.kernels.devices.cuda import CUDA, why_absent
from streamserve.kernels.registry import Choice, parse_overrides
from streamserve.models.checkpoint import Checkpoint, Progress, open_checkpoint, open_eyes
from streamserve.models.drafting import OpenDrafter, open_drafter
from streamserve.models.network import choose_kernels
from streamserve.models.part import OpenVision
from streamserve.resolve import DeviceFacts, DrafterNeeds, Fastest, ModelFacts, Reason, Resolved, decide_speculative, resolve

Machine = CPU | CUDA
NO_VISION = "none"


def open_model(config: Config, progress: Progress | None = None) -> Checkpoint:
    """The checkpoint that the settings name, or the default model's. Blocks. Raises CheckpointError."""
    model = config.model
    path = model.model_path or find_default_model()
    checkpoint = open_checkpoint(path, revision=model.revision, load_format=model.load_format, progress=progress)
    asked = model.vision_model or (find_default_eyes() if model.model_path is None else None)
    if asked == NO_VISION:
        checkpoint.vision = None
    elif asked is not None:
        checkpoint.vision = _eyes(Path(asked), checkpoint)
    return checkpoint


def _eyes(folder: Path, checkpoint: Checkpoint) -> OpenVision:
    """An encoder from elsewhere for a language model that has none. Raises CheckpointError, ConfigError."""
    eyes, spec = open_eyes(folder), checkpoint.spec
    made_for = int(eyes.kind.text_config(eyes.config).get("hidden_size", 0))
    if made_for != spec.hidden_size:
        raise ConfigError(
            f"--vision-model: the encoder in {folder} was made for a language model of hidden size {made_for}; "
            f"this one has {spec.hidden_size}"
        )
    return eyes


def model_facts(config: Config, checkpoint: Checkpoint) -> ModelFacts:
    """The numbers of an open checkpoint. A model without a given name is called after its file or folder."""
    spec = checkpoint.spec
    return ModelFacts(
        name=model_name(config),
        model_type=spec.model_type,
        num_layers=spec.num_layers,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
        vocab_size=spec.vocab_size,
        max_position_embeddings=spec.max_position_embeddings,
        num_parameters=checkpoint.num_parameters,
        weight_bytes=checkpoint.num_bytes,
        weight_kinds=checkpoint.weight_kinds,
        encoder_parameters=0 if checkpoint.vision is None else checkpoint.vision.num_parameters,
    )


def model_name(config: Config) -> str:
    """What clients call the model: as asked, or the last part of its path without .gguf."""
    if names := served_names(config):
        return names[0]
    if config.model.model_path is None:
        return DEFAULT_MODEL_NAME
    return config.model.model_path.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")


def find_device(config: Config) -> Machine:
    """Where to compute: as asked; with "auto" a GPU if torch can use one, else the CPU. Raises ConfigError."""
    asked = config.device.device
    gpu = None if asked == "cpu" else CUDA.find()
    if gpu is not None:
        return gpu
    if asked == "cuda":
        what, fix = why_absent()
        raise ConfigError(f"--device cuda: {what}; {fix}; or serve with --device cpu")
    return CPU.here()


def device_facts(device: Machine) -> DeviceFacts:
    """The numbers of a device, as they are now."""
    free, total = device.memory()
    cores = device.num_cores if isinstance(device, CPU) else CPU.here().num_cores
    return DeviceFacts(device.name, device.model, cores, free, total, device.features)


def find_drafter(config: Config, checkpoint: Checkpoint, device: Machine) -> OpenDrafter | None:
    """The network that the settings let guess, opened; None when no network does. Blocks. Raises CheckpointError, ConfigError."""
    asked, _ = decide_speculative(config, device.name)
    if asked.kind in ("none", "ngram", "ngram_shared"):
        return None
    model = config.model
    try:
        return open_drafter(
            *(asked.kind, asked.path, checkpoint),
            page_size=config.cache.page_size,
            dtype=model.dtype,
            device=device.name,
            load_format=model.load_format,
        )
    except ConfigError as error:
        raise ConfigError(f"--speculative {asked.kind}: {error}") from error


def decide(
    config: Config, checkpoint: Checkpoint, device: Machine, drafter: OpenDrafter | None = None
) -> tuple[Resolved, dict[str, Choice]]:
    """All that was left open: the numbers, then the kernel of every op. Raises ConfigError. `drafter`: its memory counts too."""
    if isinstance(device, CPU):
        return _decide_for_cpu(config, checkpoint, device, drafter)
    facts = model_facts(config, checkpoint), device_facts(device)
    resolved = resolve(config, *facts)
    overrides = parse_overrides(config.device.op)
    try:
        choices = _choose(config, checkpoint, device, resolved.dtype, resolved.kv_dtype, overrides)
    except ConfigError as error:
        raise ConfigError(f"{error}; --device cpu may serve it") from error
    if drafter is not None:
        resolved = resolve(config, *facts, drafter=drafter.needs(getattr(torch, resolved.dtype), choices))
    return resolved, choices


def measured(
    config: Config,
    checkpoint: Checkpoint,
    device: CUDA,
    before: Resolved,
    work_bytes: int,
    drafter: DrafterNeeds | None = None,
) -> Resolved:
    """The numbers anew, with the memory that work was measured to take beside the weights, out of what was free `before`
    anything was loaded. Raises ConfigError when the model turns out not to fit."""
    then = replace(device_facts(device), free_bytes=before.free_bytes)
    return resolve(config, model_facts(config, checkpoint), then, work_bytes=work_bytes, drafter=drafter)


def _decide_for_cpu(
    config: Config, checkpoint: Checkpoint, cpu: CPU, drafter: OpenDrafter | None
) -> tuple[Resolved, dict[str, Choice]]:
    """Whether packed weights have a kernel here, and whether it is the fastest way, decides how large the weights are: the
    network is chosen first. With dtype auto a short race decides, whose result is kept (calibrate.py)."""
    overrides = parse_overrides(config.device.op)
    choices = _choose(config, checkpoint, cpu, config.model.dtype, "float32", overrides)
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
    choices = _choose(config, checkpoint, cpu, config.model.dtype, resolved.kv_dtype, overrides)
    if drafter is not None:
        needs = drafter.needs(getattr(torch, resolved.dtype), choices)
        resolved = resolve(config, *facts, has_packed_kernel=has_packed_kernel, fastest=fastest, drafter=needs)
    return resolved, choices


def _choose(
    config: Config, checkpoint: Checkpoint, device: Machine, dtype: str, kv_dtype: str, overrides: Mapping[str, str]
) -> dict[str, Choice]:
    return choose_kernels(
        checkpoint,
        dtype=dtype,
        device=device.name,
        page_size=config.cache.page_size,
        kv_dtype=getattr(torch, kv_dtype),
        overrides=overrides,
    )


def kernel_reasons(choices: dict[str, Choice]) -> tuple[Reason, ...]:
    """The kernels, in the form of the other decisions."""
    return tuple(
        Reason(op, choice.name, choice.reason, "--op", "flag" if choice.reason.startswith("asked for") else "auto")
        for op, choice in choices.items()
    )
