"""resolve(): open settings get numbers with reasons; contradictions are refused with the numbers and the way out."""

from dataclasses import replace

import pytest

from streamserve.build import burst_limits
from streamserve.config import CacheConfig, Config, DeviceConfig, ModelConfig, SchedulerConfig, ServerConfig
from streamserve.errors import ConfigError
from streamserve.resolve import CPU_WORK_BYTES, GIB, DeviceFacts, ModelFacts, Resolved, check, resolve
from streamserve.speculative import Speculative, read_speculative

MODEL = ModelFacts(
    name="SmolLM2-135M-Instruct",
    model_type="llama",
    num_layers=30,
    hidden_size=576,
    intermediate_size=1536,
    num_heads=9,
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
        scheduler=SchedulerConfig(max_running_requests=3, chunked_prefill_size=16, max_decode_pause_ms=20, speculative="ngram"),
        device=DeviceConfig(threads=1),
    )
    resolved = resolve(config, MODEL, CPU)
    assert (resolved.context_len, resolved.kv_tokens, resolved.max_running_requests) == (4096, 10_000, 3)
    assert (resolved.chunked_prefill_size, resolved.threads, resolved.served_model_name) == (16, 1, "tiny")
    assert resolved.weight_bytes == 2 * MODEL.num_parameters  # a named type expands packed weights
    assert {reason.origin for reason in resolved.reasons} == {"flag"}


def test_scarce_memory_lowers_the_context_and_says_so() -> None:
    scarce = replace(CPU, free_bytes=CPU_WORK_BYTES + MODEL.weight_bytes + 1000 * TOKEN_BYTES)
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


def test_quantised_weights_are_not_rounded_once_more() -> None:
    device = replace(CPU, features=frozenset({"avx2", "avx512_bf16", "amx_bf16"}))
    assert resolve(Config(), MODEL, device, has_packed_kernel=False).dtype == "float32"


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


# ---- a GPU --------------------------------------------------------------------------------------------------------

LLAMA_8B = ModelFacts(
    name="Llama-8B",
    model_type="llama",
    num_layers=32,
    hidden_size=4096,
    intermediate_size=14_336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=128_256,
    max_position_embeddings=131_072,
    num_parameters=8_030_261_248,
    weight_bytes=16_060_522_496,
    weight_kinds=frozenset({"BF16"}),
)
GPU = DeviceFacts(
    "cuda", "a card", cores=16, free_bytes=139 * GIB, total_bytes=140 * GIB, features=frozenset({"sm_90", "bf16", "pdl"})
)


def _why(resolved: Resolved, name: str) -> str:
    return next(reason.why for reason in resolved.reasons if reason.name == name)


def test_defaults_on_a_gpu() -> None:
    resolved = resolve(Config(), LLAMA_8B, GPU)
    assert (resolved.dtype, resolved.kv_dtype, resolved.context_len) == ("bfloat16", "bfloat16", 131_072)
    assert (resolved.max_running_requests, resolved.chunked_prefill_size, resolved.max_decode_pause_ms) == (256, 8192, 1000)
    assert resolved.weight_bytes == 2 * LLAMA_8B.num_parameters
    assert resolved.kv_bytes_per_token == 2 * 32 * 8 * 128 * 2
    assert "a card" in _why(resolved, "device")


def test_kv_memory_on_a_gpu_is_what_weights_and_work_leave_of_what_is_free() -> None:
    busy = replace(GPU, free_bytes=60 * GIB)
    for work in (GIB, 5 * GIB):
        resolved = resolve(Config(), LLAMA_8B, busy, work_bytes=work)
        assert resolved.reserve_bytes == work
        used = resolved.weight_bytes + resolved.kv_bytes + work
        assert 0.92 * 60 * GIB - 16 * resolved.kv_bytes_per_token <= used <= 0.92 * 60 * GIB
        assert "measured" in _why(resolved, "kv tokens")


def test_work_is_estimated_until_it_is_measured_and_grows_with_the_step() -> None:
    small, large = (
        resolve(Config(scheduler=SchedulerConfig(chunked_prefill_size=size)), LLAMA_8B, GPU).reserve_bytes for size in (512, 8192)
    )
    assert GIB / 2 < small < large < 4 * GIB
    assert "estimated" in _why(resolve(Config(), LLAMA_8B, GPU), "kv tokens")


def test_a_card_that_is_too_small_names_weights_and_work() -> None:
    with pytest.raises(ConfigError, match=r"does not fit.*16\.06 GB for weights and \d\.\d\d GB for work"):
        resolve(Config(), LLAMA_8B, replace(GPU, free_bytes=15 * GIB))
    with pytest.raises(ConfigError, match=r"17\.18 GB of 150\.32 GB are free"):
        resolve(Config(), LLAMA_8B, replace(GPU, free_bytes=16 * GIB))


def test_a_long_context_is_lowered_to_what_the_card_holds() -> None:
    resolved = resolve(Config(), LLAMA_8B, replace(GPU, free_bytes=24 * GIB, total_bytes=24 * GIB))
    assert 1000 < resolved.context_len < 131_072
    assert resolved.context_len == resolved.kv_tokens - resolved.page_size
    assert "lowered" in _why(resolved, "context")


def test_quantised_weights_are_expanded_on_a_gpu() -> None:
    resolved = resolve(Config(), MODEL, GPU)
    assert (resolved.dtype, resolved.weight_bytes) == ("bfloat16", 2 * MODEL.num_parameters)
    assert "expanded" in _why(resolved, "dtype")


def test_a_card_without_bf16_takes_float16() -> None:
    old = replace(GPU, features=frozenset({"sm_75"}))
    assert resolve(Config(), LLAMA_8B, old).dtype == "float16"
    with pytest.raises(ConfigError, match="a card does not compute in it; use --dtype float16"):
        resolve(Config(model=ModelConfig(dtype="bfloat16")), LLAMA_8B, old)


@pytest.mark.parametrize("total, chunk", [(16, 2048), (24, 4096), (80, 8192), (140, 8192), (180, 16_384)])
def test_the_prompt_chunk_grows_with_the_card(total: int, chunk: int) -> None:
    model = replace(LLAMA_8B, num_parameters=4 * 10**9)
    resolved = resolve(Config(), model, replace(GPU, free_bytes=total * GIB, total_bytes=total * GIB))
    assert resolved.chunked_prefill_size == chunk


@pytest.mark.parametrize("billions, total, chunk", [(0.6, 140, 32_768), (1.7, 140, 16_384), (3.2, 80, 8192), (0.6, 24, 4096)])
def test_the_prompt_chunk_of_a_small_model_grows_on_a_large_card(billions: float, total: int, chunk: int) -> None:
    model = replace(LLAMA_8B, num_parameters=int(billions * 1e9))
    resolved = resolve(Config(), model, replace(GPU, free_bytes=total * GIB, total_bytes=total * GIB))
    assert resolved.chunked_prefill_size == chunk


def test_prompts_never_stop_answers_on_a_cpu_unless_asked_to() -> None:
    assert resolve(Config(), MODEL, CPU).max_decode_pause_ms == 0
    asked = Config(scheduler=SchedulerConfig(max_decode_pause_ms=12.5))
    assert resolve(asked, MODEL, CPU).max_decode_pause_ms == 12.5
    with pytest.raises(ConfigError, match="--max-decode-pause-ms is -1"):
        check(Config(scheduler=SchedulerConfig(max_decode_pause_ms=-1)))


@pytest.mark.parametrize("billions", [0.1, 0.6, 8.0])
@pytest.mark.parametrize(
    "device, chunk", [(GPU, None), (replace(GPU, free_bytes=24 * GIB, total_bytes=24 * GIB), None), (GPU, 300), (CPU, None)]
)
def test_a_step_holds_what_makes_a_burst(billions: float, device: DeviceFacts, chunk: int | None) -> None:
    config = Config(scheduler=SchedulerConfig(max_decode_pause_ms=50, chunked_prefill_size=chunk))
    resolved = resolve(config, replace(MODEL, num_parameters=int(billions * 1e9)), device)
    bursts = burst_limits(resolved, on_gpu=device is not CPU)
    assert bursts.max_pause_s == 0.05 and bursts.step_tokens is not None and bursts.ride_tokens is not None
    assert 0 < bursts.step_tokens <= min(bursts.tokens, resolved.chunked_prefill_size) and 128 <= bursts.ride_tokens <= 1024


def test_steps_of_a_gpu_stay_short_where_prompts_never_stop_answers() -> None:
    config = Config(scheduler=SchedulerConfig(max_decode_pause_ms=0))
    for billions, ride_tokens in ((0.6, 1024), (3.0, 512), (8.0, 192), (30.0, 128)):
        model = replace(MODEL, num_parameters=int(billions * 1e9))
        assert burst_limits(resolve(config, model, GPU), on_gpu=True).ride_tokens == ride_tokens
    assert burst_limits(resolve(Config(), MODEL, CPU), on_gpu=False).ride_tokens is None


@pytest.mark.parametrize("device", [CPU, GPU])
def test_text_that_repeats_is_guessed_unless_said_otherwise(device: DeviceFacts) -> None:
    resolved = resolve(Config(), MODEL, device)
    assert resolved.speculative == Speculative("ngram", None, 12)
    assert "auto" in _why(resolved, "speculation") and "12" in _why(resolved, "speculation")
    for asked in ("none", "ngram_shared,3", "ngram,1"):
        resolved = resolve(Config(scheduler=SchedulerConfig(speculative=asked)), MODEL, device)
        assert resolved.speculative == read_speculative(asked)
        assert {reason.origin for reason in resolved.reasons if reason.name == "speculation"} == {"flag"}
    with pytest.raises(ConfigError, match="--speculative is 'medusa'"):
        check(Config(scheduler=SchedulerConfig(speculative="medusa")))


def test_nothing_is_guessed_where_bits_must_not_depend_on_company() -> None:
    exact = DeviceConfig(deterministic=True)
    assert resolve(Config(device=exact), MODEL, GPU).speculative == Speculative("none")
    assert resolve(Config(device=exact), MODEL, CPU).speculative.kind == "ngram"  # a row there never depends on others
    with pytest.raises(ConfigError, match="--deterministic contradict"):
        resolve(Config(device=exact, scheduler=SchedulerConfig(speculative="ngram")), MODEL, GPU)


@pytest.mark.parametrize("asked", ["eagle=/heads/one", "mtp,2", "draft_model=small"])
def test_no_network_guesses_for_what_is_made_up(asked: str) -> None:
    config = Config(scheduler=SchedulerConfig(speculative=asked))
    assert resolve(config, MODEL, CPU).speculative == resolve(config, MODEL, GPU).speculative == read_speculative(asked)
    with pytest.raises(ConfigError, match="--fake"):
        check(replace(config, server=ServerConfig(fake=True)))
