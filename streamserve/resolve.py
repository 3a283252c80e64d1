"""From settings to numbers: what was left open is decided here, once, and every decision says why.

Owns the defaults that depend on the model or the machine, and the check that settings fit together. Plain numbers in,
plain numbers out: the callers read checkpoints and ask the operating system.
"""

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

from streamserve.config import Config, served_names
from streamserve.errors import ConfigError
from streamserve.speculative import FLAG as SPECULATIVE
from streamserve.speculative import Speculative, read_speculative

MIB, GIB = 1 << 20, 1 << 30
ITEM_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
CPU_CHUNK = 256  # tokens per step: a longer step would hold running streams up, a shorter one wastes prompt speed
CPU_ROWS = 64
CPU_FULL_CONTEXTS = 8  # KV memory on a CPU: so many requests of full length,
CPU_KV_SHARE = 0.4  # but at most this share of the memory left beside the weights
CPU_WORK_BYTES = 512 * MIB  # interpreter, activations, staging
GPU_FREE_SHARE = 0.92  # of what is free at start: the rest is for other programs and for what fragments
GPU_FIXED_WORK_BYTES = 512 * MIB  # kernels, workspaces of libraries, graphs: until they are measured
GPU_ROWS = 256
GPU_DECODE_PAUSE_MS = 1000.0
MEDIA_BYTES = 256 << 20  # embeddings of pictures that are kept (engine/encodings.py)
FLOATS = frozenset({"F32", "F16", "BF16", "F64"})


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What resolve() needs to know of a model. `weight_bytes` is the size of the weights as stored; `weight_kinds` names
    how the matrices are stored: ggml types (Q4_1, ...) or float types (F32, BF16, ...). `encoder_parameters`: numbers in the
    encoder of pictures beside it; they are kept as floats."""

    name: str
    model_type: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    num_parameters: int
    weight_bytes: int
    weight_kinds: frozenset[str]
    encoder_parameters: int = 0

    @property
    def is_quantised(self) -> bool:
        """Whether matrices are stored in a packed format."""
        return not self.weight_kinds <= FLOATS


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What resolve() needs to know of the device. `features` are instruction sets by Linux's names; on a GPU the
    architecture (sm_90), bf16, pdl."""

    kind: str  # cpu, cuda
    name: str
    cores: int
    free_bytes: int
    total_bytes: int
    features: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Fastest:
    """The winner of a race on this machine: a type of weights, or "packed"; and the times, in words."""

    name: str
    why: str


class DrafterNeeds(NamedTuple):
    """Memory of a network that guesses beside the model: for its weights, and for keys and values of every token."""

    weight_bytes: int = 0
    kv_bytes_per_token: int = 0


@dataclass(frozen=True, slots=True)
class Reason:
    """One decision. `origin` is "flag" when the user asked for the value, else "auto"."""

    name: str
    value: str
    why: str
    flag: str
    origin: str = "auto"


@dataclass(frozen=True, slots=True)
class Resolved:
    """Every number that was open, decided. `weight_bytes` and `kv_bytes` are what memory will hold, `reserve_bytes` what
    work takes beside them, `free_bytes` what was free before."""

    served_model_name: str
    context_len: int
    dtype: str
    kv_dtype: str
    page_size: int
    num_pages: int
    max_running_requests: int
    chunked_prefill_size: int
    max_decode_pause_ms: float
    speculative: Speculative
    threads: int
    weight_bytes: int
    kv_bytes_per_token: int
    kv_bytes: int
    reserve_bytes: int
    free_bytes: int
    reasons: tuple[Reason, ...]

    @property
    def kv_tokens(self) -> int:
        """KV tokens that fit."""
        return self.num_pages * self.page_size


def resolve(
    config: Config,
    model: ModelFacts,
    device: DeviceFacts,
    *,
    has_packed_kernel: bool = True,
    fastest: Fastest | None = None,
    work_bytes: int | None = None,
    drafter: DrafterNeeds | None = None,
) -> Resolved:
    """Decide what was left open. Raises ConfigError, with the numbers and the way out, when settings contradict.

    `has_packed_kernel`: whether quantised weights are computed as they are stored; else they are expanded. `fastest`: what
    a race on this machine found to be the fastest type for weights that are not packed. `work_bytes`: memory that the
    largest step, libraries and graphs were measured to take beside weights and KV; None: not measured yet, it is estimated.
    `drafter`: what a network that guesses needs, which counts with the model."""
    check(config)
    drafter = drafter or DrafterNeeds()
    stays_packed = model.is_quantised and config.model.dtype == "auto" and has_packed_kernel and device.kind == "cpu"
    dtype = _dtype(config, model, device, stays_packed, fastest)
    # Packed kernels read KV memory as fast as it comes: half the bytes for a mean KL of 2e-6 (6e-7 with float32 KV).
    kv_dtype = "float16" if stays_packed else dtype.value
    weight_bytes = model.weight_bytes if stays_packed else model.num_parameters * ITEM_BYTES[dtype.value]
    token_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_dim * ITEM_BYTES[kv_dtype]
    wanted_context = _wanted_context(config, model)
    rows = _rows(config, device)
    chunk = _chunk(config, device, weight_bytes)
    work = _work(model, device, int(rows.value), int(chunk.value), ITEM_BYTES[dtype.value], work_bytes)
    if model.encoder_parameters:
        weight_bytes += model.encoder_parameters * ITEM_BYTES[dtype.value] + MEDIA_BYTES
    weight_bytes, token_bytes = weight_bytes + drafter.weight_bytes, token_bytes + drafter.kv_bytes_per_token
    pages = _pages(config, device, weight_bytes, work, token_bytes, wanted_context)
    context = _context(config, model, int(pages.value), token_bytes, device)
    pause = _decode_pause(config, device)
    speculative, guesses = decide_speculative(config, device.kind)
    threads = _threads(config, device)
    num_tokens = int(pages.value) * config.cache.page_size
    return Resolved(
        served_model_name=next(iter(served_names(config)), model.name),
        context_len=int(context.value),
        dtype=dtype.value,
        kv_dtype=kv_dtype,
        page_size=config.cache.page_size,
        num_pages=int(pages.value),
        max_running_requests=int(rows.value),
        chunked_prefill_size=int(chunk.value),
        max_decode_pause_ms=float(pause.value),
        speculative=speculative,
        threads=int(threads.value),
        weight_bytes=weight_bytes,
        kv_bytes_per_token=token_bytes,
        kv_bytes=num_tokens * token_bytes,
        reserve_bytes=work.num_bytes,
        free_bytes=device.free_bytes,
        reasons=(
            *_device(config, device),
            context,
            dtype,
            Reason("kv tokens", str(num_tokens), pages.why, pages.flag, pages.origin),
            rows,
            chunk,
            pause,
            guesses,
            threads,
        ),
    )


@dataclass(frozen=True, slots=True)
class _Work:
    """Memory for everything but weights and KV."""

    num_bytes: int
    is_measured: bool


# ---- ranges, independent of model and machine ---------------------------------------------------------------------

_RANGES: tuple[tuple[str, float, float], ...] = (
    ("context_length", 1, 100_000_000),
    ("page_size", 1, 1024),
    ("mem_fraction_static", 0.01, 0.99),
    ("max_total_tokens", 1, 10**12),
    ("max_running_requests", 1, 65_536),
    ("max_queued_requests", 0, 10_000_000),
    ("chunked_prefill_size", 1, 10_000_000),
    ("max_decode_pause_ms", 0, 600_000),
    ("threads", 1, 4096),
    ("port", 0, 65_535),
    ("max_body_mb", 1, 4096),
    ("keep_alive_s", 0, 86_400),
    ("request_timeout_s", 0, 86_400),
    ("write_timeout_s", 0.1, 86_400),
    ("drain_timeout_s", 0, 86_400),
    ("fake_step_ms", 0, 60_000),
)


def check(config: Config) -> None:
    """Raise ConfigError for a setting that is wrong whatever the model and the machine are."""
    values: dict[str, Any] = {f.name: getattr(part, f.name) for part in _parts(config) for f in fields(part)}
    for name, low, high in _RANGES:
        value = values[name]
        if value is not None and not low <= value <= high:
            raise ConfigError(f"{flag_of(name)} is {value}; allowed is {low:g} to {high:g}")
    if config.cache.mem_fraction_static is not None and config.cache.max_total_tokens is not None:
        raise ConfigError("--mem-fraction-static and --max-total-tokens both fix the KV memory; give one of them")
    if served_names(config)[:1] == ("*",):
        raise ConfigError("--served-model-name begins with *, which stands for any name; give the model's own first: NAME,*")
    if (config.server.ssl_certfile is None) != (config.server.ssl_keyfile is None):
        raise ConfigError("--ssl-certfile and --ssl-keyfile go together; give both or neither")
    asked = config.scheduler.speculative
    if read_speculative(asked).kind in _NETWORKS and config.server.fake:
        raise ConfigError(f"{SPECULATIVE} {asked} and --fake: there is no model that a network could guess for; use ngram")


def flag_of(field_name: str) -> str:
    """The command-line spelling of a setting."""
    return f"--{field_name.replace('_', '-')}"


def _parts(config: Config) -> tuple[Any, ...]:
    return tuple(getattr(config, f.name) for f in fields(config))


# ---- one function per decision ------------------------------------------------------------------------------------


def _dtype(config: Config, model: ModelFacts, device: DeviceFacts, stays_packed: bool, fastest: Fastest | None) -> Reason:
    asked = config.model.dtype
    if asked == "bfloat16" and device.kind == "cuda" and "bf16" not in device.features:
        raise ConfigError(f"--dtype bfloat16: {device.name} does not compute in it; use --dtype float16")
    if asked != "auto":
        return Reason("dtype", asked, "asked for; weights are held in it", "--dtype", "flag")
    if stays_packed:
        kinds = ", ".join(sorted(model.weight_kinds - FLOATS))
        why = f"weights stay packed ({kinds}), KV is float16, the rest float32"
        return Reason("dtype", "float32", why if fastest is None else f"{why}; {fastest.why}", "--dtype")
    expanded = "; packed weights are expanded: no kernel for them here" if model.is_quantised else ""
    if fastest is not None and fastest.name in ITEM_BYTES:
        return Reason("dtype", fastest.name, f"{fastest.why}{expanded}", "--dtype")
    if device.kind != "cpu":
        if "bf16" not in device.features:
            return Reason("dtype", "float16", f"this GPU has no bf16 arithmetic{expanded}", "--dtype")
        own = "BF16" in model.weight_kinds
        why = "the type of the weights in the file" if own else "the usual type on a GPU"
        return Reason("dtype", "bfloat16", f"{why}{expanded}", "--dtype")
    if model.is_quantised:
        return Reason("dtype", "float32", f"rounding would add to that of the quantised weights{expanded}", "--dtype")
    if device.features & {"avx512_bf16", "amx_bf16"}:
        return Reason("dtype", "bfloat16", "this processor has bf16 instructions", "--dtype")
    return Reason("dtype", "float32", "this processor has no bf16 instructions", "--dtype")


def _wanted_context(config: Config, model: ModelFacts) -> int:
    asked, limit = config.model.context_length, model.max_position_embeddings
    if asked is not None and asked > limit:
        raise ConfigError(f"--context-length is {asked}, but {model.name} was made for at most {limit}; ask for {limit} or less")
    return asked or limit


def _device(config: Config, device: DeviceFacts) -> tuple[Reason, ...]:
    """A GPU is named, with its memory; the processor stands in the first line already."""
    if device.kind == "cpu":
        return ()
    why = f"{device.name}, {_gb(device.free_bytes)} of {_gb(device.total_bytes)} free"
    return (Reason("device", device.kind, why, "--device", "flag" if config.device.device == device.kind else "auto"),)


def _work(model: ModelFacts, device: DeviceFacts, rows: int, chunk: int, item_bytes: int, measured: int | None) -> _Work:
    if measured is not None:
        return _Work(measured, True)
    if device.kind == "cpu":
        return _Work(CPU_WORK_BYTES, False)
    # Of one layer at a time: the stream and what norms and products leave of it, q, k, v and what attention makes of them,
    # gate, up and their product. Then logits in float32, and as much again twice for sampling.
    heads = 2 * (model.num_heads + model.num_kv_heads) * model.head_dim
    activations = chunk * (4 * model.hidden_size + heads + 3 * model.intermediate_size) * item_bytes
    return _Work(activations + 3 * rows * model.vocab_size * 4 + GPU_FIXED_WORK_BYTES, False)


def _pages(config: Config, device: DeviceFacts, weight_bytes: int, work: _Work, token_bytes: int, wanted_context: int) -> Reason:
    """How many KV pages; the reason's value is their number."""
    cache, reserve = config.cache, work.num_bytes
    room = device.free_bytes - weight_bytes - reserve
    page_bytes = token_bytes * cache.page_size
    if room < 2 * page_bytes:
        raise ConfigError(
            f"the model does not fit: it needs {_gb(weight_bytes)} for weights and {_gb(reserve)} for work, but only "
            f"{_gb(device.free_bytes)} of {_gb(device.total_bytes)} are free; free memory or serve a smaller model"
        )
    if cache.max_total_tokens is not None:
        num_pages = cache.max_total_tokens // cache.page_size
        _must_fit(num_pages * page_bytes, room, f"--max-total-tokens {cache.max_total_tokens}", token_bytes)
        return Reason("kv pages", str(num_pages), "asked for", "--max-total-tokens", "flag")
    if cache.mem_fraction_static is not None:
        budget = int(device.total_bytes * cache.mem_fraction_static) - weight_bytes
        _must_fit(max(budget, page_bytes), room, f"--mem-fraction-static {cache.mem_fraction_static}", token_bytes)
        if budget < 2 * page_bytes:
            share = (weight_bytes + 2 * page_bytes) / device.total_bytes
            raise ConfigError(
                f"--mem-fraction-static {cache.mem_fraction_static} of {_gb(device.total_bytes)} leaves no KV memory beside "
                f"weights of {_gb(weight_bytes)}; give more than {share + 0.01:.2f}"
            )
        why = f"{cache.mem_fraction_static:g} of {_gb(device.total_bytes)} less weights"
        return Reason("kv pages", str(budget // page_bytes), why, "--mem-fraction-static", "flag")
    if device.kind != "cpu":
        num_pages = max(2, (int(device.free_bytes * GPU_FREE_SHARE) - weight_bytes - reserve) // page_bytes)
        taken = f"weights and {_gb(reserve)} for work ({'measured' if work.is_measured else 'estimated'})"
        why = f"what {taken} leave of {GPU_FREE_SHARE:.0%} of the {_gb(device.free_bytes)} free"
        return Reason("kv pages", str(num_pages), why, "--mem-fraction-static")
    wanted_pages = CPU_FULL_CONTEXTS * (-(-wanted_context // cache.page_size) + 1)
    share_pages = int(room * CPU_KV_SHARE) // page_bytes
    if wanted_pages <= share_pages:
        return Reason("kv pages", str(wanted_pages), f"room for {CPU_FULL_CONTEXTS} full contexts", "--max-total-tokens")
    why = f"{CPU_KV_SHARE:.0%} of the {_gb(room)} that are free beside the weights"
    return Reason("kv pages", str(max(2, share_pages)), why, "--max-total-tokens")


def _must_fit(kv_bytes: int, room: int, asked: str, token_bytes: int) -> None:
    if kv_bytes > room:
        raise ConfigError(
            f"{asked} does not fit: KV memory needs {_gb(kv_bytes)}, free beside weights and work {_gb(room)}; "
            f"at most {room // token_bytes} tokens fit (--max-total-tokens)"
        )


def _context(config: Config, model: ModelFacts, num_pages: int, token_bytes: int, device: DeviceFacts) -> Reason:
    """One page stays out of a single request's reach: the copy of a partly matched page needs it."""
    page_size, asked, limit = config.cache.page_size, config.model.context_length, model.max_position_embeddings
    fits = (num_pages - 1) * page_size
    if fits < 1:
        raise ConfigError(f"KV memory of {num_pages * page_size} tokens is too small; at least {2 * page_size} are needed")
    if asked is not None:
        if asked > fits:
            raise ConfigError(
                f"--context-length {asked} does not fit: it needs {_gb((asked + page_size) * token_bytes)} of KV memory, "
                f"{_gb(num_pages * page_size * token_bytes)} are there; try --context-length {fits}, or more KV memory "
                "(--max-total-tokens)"
            )
        return Reason("context", str(asked), f"asked for; the model allows {limit}", "--context-length", "flag")
    if limit > fits:
        return Reason("context", str(fits), f"the model allows {limit}; lowered to what KV memory holds", "--context-length")
    return Reason("context", str(limit), "the model's own limit", "--context-length")


def _rows(config: Config, device: DeviceFacts) -> Reason:
    asked = config.scheduler.max_running_requests
    if asked is not None:
        return Reason("running requests", str(asked), "asked for", "--max-running-requests", "flag")
    if device.kind == "cpu":
        return Reason("running requests", str(CPU_ROWS), "more rows in a step gain little on a CPU", "--max-running-requests")
    return Reason("running requests", str(GPU_ROWS), "weights are read once for all of them", "--max-running-requests")


def _chunk(config: Config, device: DeviceFacts, weight_bytes: int) -> Reason:
    asked = config.scheduler.chunked_prefill_size
    if asked is not None:
        return Reason("prompt chunk", str(asked), "asked for", "--chunked-prefill-size", "flag")
    if device.kind == "cpu":
        return Reason("prompt chunk", str(CPU_CHUNK), "keeps steps short while others stream", "--chunked-prefill-size")
    size = next(size for limit, size in _GPU_CHUNKS if device.total_bytes < limit)
    why = f"for a device of {_gb(device.total_bytes)}"
    if size >= _LARGE_CHUNK:
        while size < _LARGEST_CHUNK and 2 * size * weight_bytes <= _LARGE_CHUNK * _USUAL_WEIGHT_BYTES:
            size, why = 2 * size, "a small model on a large device: attention is computed best in large pieces"
    return Reason("prompt chunk", str(size), why, "--chunked-prefill-size")


_LARGE_CHUNK, _LARGEST_CHUNK = 8192, 32_768
_USUAL_WEIGHT_BYTES = 8 * 10**9  # with this much or more, a chunk of the usual size takes as long as others should wait
_GPU_CHUNKS: tuple[tuple[float, int], ...] = (  # SGLang's bands
    (20 * GIB, 2048),
    (60 * GIB, 4096),
    (160 * GIB, 8192),
    (float("inf"), 16384),
)


def _decode_pause(config: Config, device: DeviceFacts) -> Reason:
    asked, flag = config.scheduler.max_decode_pause_ms, "--max-decode-pause-ms"
    if asked is not None:
        return Reason("decode pause", f"{asked:g}", "ms, asked for", flag, "flag")
    if device.kind == "cpu":
        return Reason("decode pause", "0", "ms: prompts never stop running answers", flag)
    return Reason("decode pause", f"{GPU_DECODE_PAUSE_MS:g}", "ms at most, while a burst of prompts is computed", flag)


_NETWORKS = ("draft_model", "eagle", "mtp")


def decide_speculative(config: Config, device_kind: str = "cpu") -> tuple[Speculative, Reason]:
    """Who guesses: never "auto"."""
    asked = read_speculative(config.scheduler.speculative)
    is_exact = config.device.deterministic and device_kind != "cpu"
    if asked.kind == "auto":
        if is_exact:
            why = "auto; with --deterministic a token's bits would depend on how many guesses stand beside it"
            return Speculative("none"), Reason("speculation", "none", why, SPECULATIVE)
        chosen = Speculative("ngram", None, asked.max_drafts)
        why = f"auto: text that repeats is guessed, up to {chosen.max_drafts} tokens a step, while that is faster"
        return chosen, Reason("speculation", "ngram", why, SPECULATIVE)
    if asked.kind == "none":
        return asked, Reason("speculation", "none", "asked for; a step brings each answer one token", SPECULATIVE, "flag")
    if is_exact:
        raise ConfigError(
            f"{SPECULATIVE} {config.scheduler.speculative} and --deterministic contradict each other on a GPU: a token's bits "
            f"would depend on how many guesses stand beside it; leave one of them out"
        )
    of = "" if asked.path is None else f" of {asked.path}"
    why = f"asked for; up to {asked.max_drafts} guess{'es' if asked.max_drafts > 1 else ''}{of} a step, while that is faster"
    return asked, Reason("speculation", asked.kind, why, SPECULATIVE, "flag")


def _threads(config: Config, device: DeviceFacts) -> Reason:
    asked = config.device.threads
    if asked is not None:
        return Reason("threads", str(asked), f"asked for; {device.cores} cores are available", "--threads", "flag")
    return Reason("threads", str(device.cores), "all cores this process may use", "--threads")


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB"
