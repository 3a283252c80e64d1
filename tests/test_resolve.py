"""resolve(): open settings get numbers with reasons; contradictions are refused with the numbers and the way out."""

from dataclasses import replace

import pytest

from streamserve.config import CacheConfig, Config, DeviceConfig, ModelConfig, SchedulerConfig, ServerConfig
from streamserve.errors import ConfigError
from streamserve.resolve import GIB, RESERVE_BYTES, DeviceFacts, ModelFacts, check, resolve

MODEL = ModelFacts(
    name="SmolLM2-135M-Instruct",
    model_type="llama",
    num_layers=30,
    num_kv_heads=3,
    head_dim=64,
    vocab_size=49_152,
    max_position_embeddings=8192,
    num_parameters=134_515_008,
    weight_bytes=98_000_000,
    weight_kinds=frozenset({"Q4_1", "Q8_0", "F32"}),
)
CPU = DeviceFacts("cpu", "a processor", cores=2, free_bytes=20 * GIB, total_bytes=24 * GIB, features=frozenset({"avx2"}))
TOKEN_BYTES = 2 * 30 * 3 * 64 * 2  # packed weights keep KV in float16


def test_defaults_on_a_cpu_hold_eight_full_contexts() -> None:
    resolved = resolve(Config(), MODEL, CPU)
    assert resolved.context_len == 8192
    assert resolved.kv_bytes_per_token == TOKEN_BYTES
    assert resolved.kv_tokens >= 8 * 8192
    assert resolved.kv_bytes == resolved.kv_tokens * TOKEN_BYTES
    assert (resolved.dtype, resolved.kv_dtype) == ("float32", "float16")
    assert (resolved.threads, resolved.chunked_prefill_size) == (2, 256)
    assert resolved.weight_bytes == MODEL.weight_bytes
    assert resolved.served_model_name == MODEL.name


def test_every_decision_says_why_and_names_its_flag() -> None:
    reasons = resolve(Config(), MODEL, CPU).reasons
    assert {reason.flag for reason in reasons} >= {"--context-length", "--dtype", "--threads", "--max-running-requests"}
    assert all(reason.why and reason.value and reason.origin == "auto" for reason in reasons)


def test_what_the_user_asked_for_is_kept_and_marked() -> None:
    config = Config(
        model=ModelConfig(context_length=4096, dtype="bfloat16", served_model_name="tiny"),
        cache=CacheConfig(max_total_tokens=10_000),
        scheduler=SchedulerConfig(max_running_requests=3, chunked_prefill_size=16),
        device=DeviceConfig(threads=1),
    )
    resolved = resolve(config, MODEL, CPU)
    assert (resolved.context_len, resolved.kv_tokens, resolved.max_running_requests) == (4096, 10_000, 3)
    assert (resolved.chunked_prefill_size, resolved.threads, resolved.served_model_name) == (16, 1, "tiny")
    assert resolved.weight_bytes == 2 * MODEL.num_parameters  # a named type expands packed weights
    assert {reason.origin for reason in resolved.reasons} == {"flag"}


def test_scarce_memory_lowers_the_context_and_says_so() -> None:
    scarce = replace(CPU, free_bytes=RESERVE_BYTES["cpu"] + MODEL.weight_bytes + 1000 * TOKEN_BYTES)
    resolved = resolve(Config(), MODEL, scarce)
    assert 0 < resolved.context_len < 1000
    assert resolved.kv_bytes <= 1000 * TOKEN_BYTES
    assert "lowered" in next(reason.why for reason in resolved.reasons if reason.name == "context")


def test_a_request_of_full_length_leaves_a_page_for_a_copy() -> None:
    resolved = resolve(Config(cache=CacheConfig(max_total_tokens=320)), MODEL, CPU)
    assert resolved.context_len == 320 - resolved.page_size


@pytest.mark.parametrize("features, dtype", [({"avx2"}, "float32"), ({"avx2", "avx512_bf16"}, "bfloat16")])
def test_float_weights_take_bf16_only_where_the_processor_computes_it(features: set[str], dtype: str) -> None:
    model = replace(MODEL, weight_kinds=frozenset({"BF16"}))
    assert resolve(Config(), model, replace(CPU, features=frozenset(features))).dtype == dtype


def test_without_a_kernel_for_packed_weights_they_are_expanded_and_counted_so() -> None:
    resolved = resolve(Config(), MODEL, CPU, has_packed_kernel=False)
    assert resolved.weight_bytes == 4 * MODEL.num_parameters
    assert "expanded" in next(reason.why for reason in resolved.reasons if reason.name == "dtype")


def test_mem_fraction_static_covers_weights_and_kv() -> None:
    resolved = resolve(Config(cache=CacheConfig(mem_fraction_static=0.1)), MODEL, CPU)
    assert 0.099 * CPU.total_bytes < resolved.weight_bytes + resolved.kv_bytes <= 0.1 * CPU.total_bytes


@pytest.mark.parametrize(
    "config, words",
    [
        (Config(model=ModelConfig(context_length=9000)), ("9000", "8192", "--context-length")),
        (Config(cache=CacheConfig(max_total_tokens=10**9)), ("does not fit", "needs", "free", "--max-total-tokens")),
        (Config(cache=CacheConfig(max_total_tokens=16)), ("16", "at least 32")),
        (Config(cache=CacheConfig(mem_fraction_static=0.95)), ("does not fit", "0.95")),
        (
            Config(model=ModelConfig(context_length=8000), cache=CacheConfig(max_total_tokens=4000)),
            ("does not fit", "--context-length 3984"),
        ),
    ],
)
def test_a_contradiction_is_refused_with_numbers_and_a_way_out(config: Config, words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(config, MODEL, CPU)
    assert [word for word in words if word not in str(caught.value)] == []


def test_a_model_larger_than_memory_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match=r"does not fit.*0\.10 GB for weights.*0\.10 GB of 25\.77 GB are free"):
        resolve(Config(), MODEL, replace(CPU, free_bytes=100_000_000))


def test_a_small_share_of_memory_names_the_share_that_would_do() -> None:
    model = replace(MODEL, weight_bytes=10 * GIB)
    with pytest.raises(ConfigError, match=r"leaves no KV memory.*give more than 0\.43"):
        resolve(Config(cache=CacheConfig(mem_fraction_static=0.2)), model, CPU)


@pytest.mark.parametrize(
    "config, words",
    [
        (Config(server=ServerConfig(port=70_000)), "--port is 70000; allowed is 0 to 65535"),
        (Config(cache=CacheConfig(page_size=0)), "--page-size is 0"),
        (Config(cache=CacheConfig(mem_fraction_static=float("nan"))), "--mem-fraction-static is nan"),
        (Config(device=DeviceConfig(threads=0)), "--threads is 0"),
        (Config(cache=CacheConfig(mem_fraction_static=0.5, max_total_tokens=100)), "give one of them"),
        (Config(server=ServerConfig(ssl_certfile="a.pem")), "go together"),
    ],
)
def test_a_setting_out_of_range_names_its_flag(config: Config, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        check(config)
