"""A command line for SGLang's server, read as one for ours.

Owns what each of SGLang's flags becomes: ours under the same name, ours under another, nothing (with the reason), or an error
that says what to do. The names are those of its list of server arguments (docs.sglang.io, 0.5). Knows no setting's meaning: the
flags that come out are checked like any others.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from streamserve.flags import Parser, UsageError, add_flags

# Several spellings of one flag: the one below is used.
_SAME = {
    "--tp": "--tp-size",
    "--tensor-parallel-size": "--tp-size",
    "--dp": "--dp-size",
    "--data-parallel-size": "--dp-size",
    "--pp": "--pp-size",
    "--pipeline-parallel-size": "--pp-size",
    "--ep": "--ep-size",
    "--expert-parallel-size": "--ep-size",
    "--nccl-init-addr": "--dist-init-addr",
    "--speculative-draft-model": "--speculative-draft-model-path",
    "--enable-deterministic-inference": "--deterministic",
}


@dataclass(frozen=True, slots=True)
class _Theirs:
    """A flag that is none of ours, and why. `harmless`: values with which it means nothing here, and others are refused; None:
    all values mean nothing; empty: it is always refused. `instead`: what to do then. `takes`: values behind it; None: any."""

    why: str
    takes: int | None = 1
    harmless: tuple[str, ...] | None = None
    instead: str = ""


def _nothing(names: str, why: str, takes: int | None = 1) -> dict[str, _Theirs]:
    return {f"--{name}": _Theirs(why, takes) for name in names.split()}


def _only(names: str, harmless: tuple[str, ...], why: str, instead: str = "leave it out") -> dict[str, _Theirs]:
    return {f"--{name}": _Theirs(why, 1, harmless, instead) for name in names.split()}


def _cannot(names: str, why: str) -> dict[str, _Theirs]:
    return {f"--{name}": _Theirs(why, 0, ()) for name in names.split()}


_KERNELS = "kernels are chosen at the start; --op OP=NAME forces one"
_ONE_GPU = "one server uses one GPU"
_GRAPHS = "graphs are captured for the sizes that pay"
_LORA = "adapters are not served; merge the adapter into the weights and give that model"
_QUANTISED = "weights are served as the checkpoint holds them; give a GGUF file for quantised ones"
_HOST_CACHE = "the prefix cache is in the device's memory only; leave the flag out"
_SPLIT = "prefill and decode run in one server; leave the flag out"
_DRAFTS = "guesses stand in a row, and how many pay is measured"

_THEIRS: Mapping[str, _Theirs] = {
    # ---- they mean nothing here -----------------------------------------------------------------------------------------
    **_nothing("trust-remote-code", "no code of a checkpoint is ever run", 0),
    **_nothing("enable-metrics enable-metrics-for-all-schedulers", "/metrics is always there", 0),
    **_nothing("enable-cache-report", "usage always tells of cached tokens", 0),
    **_nothing("collect-tokens-histogram", "/metrics counts tokens", 0),
    **_nothing("enable-request-time-stats-logging", "--log-requests logs how long a request took", 0),
    **_nothing("enable-multimodal", "a model that takes pictures is served with them", 0),
    **_nothing("attention-backend prefill-attention-backend decode-attention-backend mm-attention-backend", _KERNELS),
    **_nothing("sampling-backend fp8-gemm-backend fp4-gemm-backend speculative-draft-attention-backend", _KERNELS),
    **_nothing("disable-flashinfer-autotune triton-attention-reduce-in-fp32 flashinfer-mla-disable-ragged", _KERNELS, 0),
    **_nothing("triton-attention-num-kv-splits triton-attention-split-tile-size", _KERNELS),
    **_only("grammar-backend", ("llguidance", "xgrammar", "outlines", "none"), "llguidance guides answers that ask for a form"),
    **_nothing("disable-outlines-disk-cache", "llguidance guides answers", 0),
    **_nothing("skip-server-warmup", "the one request that warms the server up takes moments, and doors open behind it", 0),
    **_nothing("warmups", "the server warms up by itself"),
    **_nothing("enable-torch-compile enable-torch-compile-debug-mode", "kernels and graphs do not go through torch.compile", 0),
    **_nothing("torch-compile-max-bs", "kernels and graphs do not go through torch.compile"),
    **_nothing("log-level-http", "--log-level is that of all"),
    **_nothing("log-requests-level log-requests-format", "--log-requests logs one line without contents; see --log-format"),
    **_nothing("log-requests-target uvicorn-access-log-exclude-prefixes", "the log goes to standard output", None),
    **_nothing("decode-log-interval", "nothing is logged per step; see /metrics and the page's view of the engine"),
    **_nothing("show-time-cost", "see /metrics and the page's view of the engine", 0),
    **_nothing("disable-overlap-schedule", "a step is always prepared while the one before it runs", 0),
    **_nothing("enable-mixed-chunk enable-dynamic-chunking", "prompts and running answers always share steps", 0),
    **_nothing("cuda-graph-max-bs torch-compile-max-bs piecewise-cuda-graph-max-tokens piecewise-cuda-graph-compiler", _GRAPHS),
    **_nothing("cuda-graph-bs piecewise-cuda-graph-tokens", _GRAPHS, None),
    **_nothing("disable-cuda-graph-padding disable-piecewise-cuda-graph enforce-piecewise-cuda-graph", _GRAPHS, 0),
    **_nothing("enable-profile-cuda-graph enable-cudagraph-gc", _GRAPHS, 0),
    **_nothing("max-prefill-tokens prefill-max-requests", "--chunked-prefill-size bounds a step"),
    **_nothing("schedule-conservativeness", "admission counts pages; nothing is guessed ahead"),
    **_nothing("num-continuous-decode-steps scheduler-recv-interval", "the loop looks for new requests before every step"),
    **_nothing("tokenizer-worker-num", "long texts are tokenised in threads"),
    **_nothing("enable-tokenizer-batch-encode disable-tokenizer-batch-decode enable-dynamic-batch-tokenizer",
               "long texts are tokenised in threads", 0),
    **_nothing("dynamic-batch-tokenizer-batch-size dynamic-batch-tokenizer-batch-timeout", "long texts are tokenised in threads"),
    **_nothing("skip-tokenizer-init", "token ids are taken and given beside text", 0),
    **_nothing("stream-interval", "a token is sent when the loop has time; --send-interval-ms sends less often"),
    **_nothing("incremental-streaming-output", "OpenAI's streams are made of pieces; /generate has a field for it", 0),
    **_nothing("watchdog-timeout soft-watchdog-timeout", "a step is awaited like a socket; --request-timeout-s ends requests"),
    **_nothing("file-storage-path", "uploaded files are kept in memory; --batch-folder keeps those of batches"),
    **_nothing("sleep-on-idle", "an idle server sleeps", 0),
    **_nothing("dist-timeout nccl-port gpu-id-step mooncake-ib-device", _ONE_GPU),
    **_nothing("disable-custom-all-reduce enable-p2p-check enable-nccl-nvls enable-symm-mem enable-mscclpp", _ONE_GPU, 0),
    **_nothing("enable-torch-symm-mem enable-flashinfer-allreduce-fusion enable-dp-lm-head", _ONE_GPU, 0),
    **_nothing("load-balance-method", _ONE_GPU),
    **_nothing("mm-max-concurrent-calls mm-per-request-timeout", "pictures are prepared in threads, within a request's time"),
    **_nothing("disable-fast-image-processor keep-mm-feature-on-device", "pictures have one preparation", 0),
    **_nothing("weight-loader-disable-mmap weight-loader-prefetch-checkpoints", "weights have one way in", 0),
    **_nothing("weight-loader-prefetch-num-threads", "weights have one way in"),
    **_nothing("speculative-eagle-topk speculative-attention-mode", _DRAFTS),
    **_nothing("speculative-ngram-min-bfs-breadth speculative-ngram-max-bfs-breadth speculative-ngram-match-type", _DRAFTS),
    **_nothing("speculative-ngram-max-trie-depth speculative-ngram-capacity", _DRAFTS),
    # ---- with some values they mean nothing here, and others cannot be served -----------------------------------------------
    **_only("tp-size", ("1",), _ONE_GPU, "choose a model that fits it, or a file of it with fewer bits per weight"),
    **_only("pp-size attn-cp-size ep-size moe-dp-size moe-dense-tp-size", ("1",), _ONE_GPU),
    **_only("dp-size", ("1",), _ONE_GPU, "start one per GPU and put a balancer before them"),
    **_only("nnodes", ("1",), _ONE_GPU),
    **_only("node-rank", ("0",), _ONE_GPU),
    **_only("base-gpu-id", ("0",), "CUDA_VISIBLE_DEVICES chooses the GPU"),
    **_only("tokenizer-mode", ("auto", "slow", "fast"), "there is one way to tokenise"),
    **_only("model-impl", ("auto", "sglang"), "models are this server's own"),
    **_only("kv-cache-dtype", ("auto",), "keys and values are held in the type of the arithmetic"),
    **_only("quantization", ("gguf",), "weights are served as the checkpoint holds them", "give a GGUF file for quantised ones"),
    **_only("moe-a2a-backend elastic-ep-backend", ("none",), _ONE_GPU),
    **_only("moe-runner-backend", ("auto",), _KERNELS),
    **_only("radix-eviction-policy", ("lru",), "what was used last stays"),
    **_only("disaggregation-mode", ("null",), _SPLIT),
    **_only("cpu-offload-gb hicache-size", ("0",), "all is in the device's memory", "--device cpu serves from the host's"),
    **_only("weight-version", ("default",), "weights are loaded once and have no version"),
    **_only("speculative-accept-threshold-single speculative-accept-threshold-acc", ("1", "1.0"),
            "guesses never change what is sampled"),
    # ---- they ask for what cannot be done here ----------------------------------------------------------------------------
    **_cannot("lora-paths enable-lora max-lora-rank max-loras-per-batch max-loaded-loras lora-target-modules", _LORA),
    **_cannot("is-embedding", "give --embedding-model MODEL: it is served beside a chat model, under /v1/embeddings"),
    **_cannot("enable-hierarchical-cache hicache-ratio hicache-storage-backend hicache-write-policy enable-lmcache", _HOST_CACHE),
    **_cannot("hicache-io-backend hicache-mem-layout hicache-storage-prefetch-policy", _HOST_CACHE),
    **_cannot("disaggregation-transfer-backend disaggregation-bootstrap-port disaggregation-ib-device enable-pdmux", _SPLIT),
    **_cannot("encoder-only language-only encoder-urls", "pictures are encoded in the server that answers; leave the flag out"),
    **_cannot("dist-init-addr enable-dp-attention enable-two-batch-overlap enable-eplb", f"{_ONE_GPU}; leave the flag out"),
    **_cannot("torchao-config modelopt-quant quantize-and-serve quantization-param-path", _QUANTISED),
    **_cannot("grpc-mode", "the server speaks HTTP and WebSocket; leave the flag out"),
    **_cannot("config", "settings are given as flags; write them out"),
    **_cannot("json-model-override-args", "the checkpoint's config.json says what the model is; change it there"),
    **_cannot("preferred-sampling-params", "the model's generation_config.json says how to sample; see --sampling-defaults"),
    **_cannot("hf-chat-template-name completion-template", "give --chat-template FILE"),
    **_cannot("download-dir", "set HF_HOME to the folder that holds downloads"),
    **_cannot("fastapi-root-path", "set STREAMSERVE_ROOT_PATH to the prefix that the proxy serves this below"),
    **_cannot("enable-trace otlp-traces-endpoint", "there is no tracing; --log-requests and /metrics tell of requests"),
    **_cannot("allow-auto-truncate", "a prompt that does not fit is an error that says so; cut it before sending"),
    **_cannot("enable-custom-logit-processor", "code from requests is not run; logit_bias and grammars steer answers"),
    **_cannot("enable-return-hidden-states enable-return-routed-experts", "hidden states are not given; see --embedding-model"),
    **_cannot("enable-memory-saver delete-ckpt-after-loading custom-weight-loader", "weights are loaded once and stay"),
    **_cannot("constrained-json-whitespace-pattern", "JSON comes without spaces; leave the flag out"),
    **_cannot("tool-server", "tools are called by clients"),
    **_cannot("ssl-ca-certs ssl-keyfile-password", "give a certificate chain in --ssl-certfile and a key without a password"),
    **_cannot("speculative-token-map speculative-draft-model-revision speculative-draft-load-format",
              "--speculative says who guesses in one: eagle=PATH,N"),
    **_cannot("speculative-draft-model-quantization", _QUANTISED),
    **_cannot("enable-multi-layer-eagle", "--speculative mtp uses the model's own layers"),
}  # fmt: skip

# Ours under the same name, whose values are spelled otherwise there.
_VALUES: Mapping[str, Mapping[str, str]] = {
    "--dtype": {"half": "float16", "float": "float32"},
    "--load-format": {"safetensors": "auto", "gguf": "auto", "fastsafetensors": "auto"},
    "--schedule-policy": {"dfs-weight": "lpm"},
    "--reasoning-parser": {"qwen3-thinking": "qwen3", "deepseek-v3": "qwen3", "step3": "deepseek-r1"},
    "--tool-call-parser": {"glm": "glm45"},
}
# How its speculation is called in --speculative; with a path or without.
_ALGORITHMS = {
    "NGRAM": ("ngram", False),
    "EAGLE": ("eagle", True),
    "EAGLE3": ("eagle", True),
    "STANDALONE": ("draft_model", True),
    "NEXTN": ("mtp", False),
}
_ALGORITHM, _DRAFT_PATH = "--speculative-algorithm", "--speculative-draft-model-path"
_NUM_STEPS, _NUM_DRAFTS = "--speculative-num-steps", "--speculative-num-draft-tokens"


@dataclass(frozen=True, slots=True)
class Read:
    """`flags`: what to give to `streamserve serve`. `notes`: a sentence for each flag that means nothing here."""

    flags: tuple[str, ...]
    notes: tuple[str, ...]


def arguments_of(settings: Mapping[str, Any]) -> list[str]:
    """SGLang's keyword arguments, as in Engine(tp_size=1, disable_cuda_graph=True), as flags. False and None are left out."""
    found: list[str] = []
    for name, value in settings.items():
        flag = "--" + name.replace("_", "-")
        if value is True:
            found.append(flag)
        elif isinstance(value, list | tuple):
            found += [flag, *map(str, value)]
        elif value is not None and value is not False:
            found += [flag, str(value)]
    return found


def read(arguments: Sequence[str]) -> Read:
    """See module. Raises UsageError."""
    flags: list[str] = []
    notes: dict[str, str] = {}  # by flag: once each
    guesses: dict[str, str] = {}
    for name, values, whole in _groups(arguments):
        flag = _SAME.get(name, name)
        if flag in _SPECIAL:
            flags += _SPECIAL[flag](flag, values, notes)
        elif flag in (_ALGORITHM, _DRAFT_PATH, _NUM_STEPS, _NUM_DRAFTS):
            guesses[flag] = _one(name, values)
            flags += values[1:]
        elif flag in _THEIRS:
            flags += _dropped(name, _THEIRS[flag], values, notes)
        elif flag in _VALUES and values and values[0] in _VALUES[flag]:
            flags += [flag, _VALUES[flag][values[0]], *values[1:]]
        elif flag.startswith("--"):
            _refuse_unknown(flag)
            flags += [flag, *values]
        else:
            flags += whole
    return Read((*flags, *_speculative(guesses)), tuple(notes.values()))


def _groups(arguments: Sequence[str]) -> Iterator[tuple[str, list[str], list[str]]]:
    """Each flag with the values behind it, and as it was written; what stands before the first flag is one by itself."""
    at = 0
    while at < len(arguments):
        end = at + 1
        while end < len(arguments) and not arguments[end].startswith("--"):
            end += 1
        name, equals, value = arguments[at].partition("=")
        yield name, [*([value] if equals else []), *arguments[at + 1 : end]], list(arguments[at:end])
        at = end


def _one(name: str, values: Sequence[str]) -> str:
    if not values:
        raise UsageError(f"{name} is given without a value")
    return values[0]


def _dropped(name: str, theirs: _Theirs, values: Sequence[str], notes: dict[str, str]) -> Sequence[str]:
    """What stands behind a flag and is none of its values. Notes why the flag is left out."""
    if theirs.harmless is not None and (not theirs.harmless or _one(name, values).lower() not in theirs.harmless):
        asked = f"{name} {values[0]}" if theirs.harmless else name
        raise UsageError(f"{asked} cannot be served: {theirs.why}" + (f"; {theirs.instead}" if theirs.instead else ""))
    notes.setdefault(name, f"{name} means nothing here: {theirs.why}")
    return () if theirs.takes is None else values[theirs.takes :]


def _chunks(flag: str, values: Sequence[str], notes: dict[str, str]) -> Sequence[str]:
    if _one(flag, values) == "-1":
        notes[flag] = f"{flag} -1 means nothing here: a long prompt is always computed in pieces"
        return values[1:]
    return (flag, *values)


def _priorities(flag: str, values: Sequence[str], notes: dict[str, str]) -> Sequence[str]:
    return ("--schedule-policy", "priority", *values)


_SPECIAL: Mapping[str, Callable[[str, Sequence[str], dict[str, str]], Sequence[str]]] = {
    "--chunked-prefill-size": _chunks,
    "--enable-priority-scheduling": _priorities,
}
THEIR_FLAGS = frozenset({*_THEIRS, *_SAME, *_SPECIAL, _ALGORITHM, _DRAFT_PATH, _NUM_STEPS, _NUM_DRAFTS})


def _speculative(given: Mapping[str, str]) -> tuple[str, ...]:
    """Its flags about guesses, as our one. A step there verifies the last token too, which is no guess."""
    if not given:
        return ()
    algorithm = given.get(_ALGORITHM)
    if algorithm is None:
        raise UsageError(f"{next(iter(given))} is given without {_ALGORITHM}; allowed is {', '.join(_ALGORITHMS)}")
    if algorithm.upper() not in _ALGORITHMS:
        return ("--speculative", algorithm)  # one of our own spellings, or refused with a list of them
    kind, has_path = _ALGORITHMS[algorithm.upper()]
    path = given.get(_DRAFT_PATH)
    if has_path and path is None:
        raise UsageError(f"{_ALGORITHM} {algorithm} is given without {_DRAFT_PATH}, the network that guesses")
    if path is not None and not has_path:
        raise UsageError(f"{_DRAFT_PATH} {path} has no use with {_ALGORITHM} {algorithm}; leave it out")
    number = given.get(_NUM_STEPS)
    if number is None and (drafts := given.get(_NUM_DRAFTS)) is not None:
        number = str(int(drafts) - 1) if drafts.isdecimal() else drafts
    return ("--speculative", kind + (f"={path}" if has_path else "") + (f",{number}" if number is not None else ""))


def _refuse_unknown(flag: str) -> None:
    parser = Parser("streamserve serve")
    add_flags(parser, show_all=True)
    ours = {"--help-all", *parser._option_string_actions}
    if flag not in ours and not flag.startswith("--speculative-"):  # of these our own parser says more
        near = get_close_matches(flag, [*ours, *_THEIRS, *_SAME, *_SPECIAL], n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UsageError(f"unknown flag {flag}{hint} (`streamserve serve --help-all` shows the flags)")
