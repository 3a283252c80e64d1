"""From settings to a running set of parts: text, cache, network, runner, engine. Used by the server and the offline front.

Owns nothing; composes. Blocks while weights load: call `build` in a worker thread where a loop must go on.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from streamserve.cache.kv_cache import KVCache
from streamserve.config import Config, served_names
from streamserve.default_model import DEFAULT_MODEL_SAMPLING
from streamserve.engine.core import Engine, EngineOptions, StepObserver
from streamserve.engine.drafters.drafter import Drafter
from streamserve.engine.drafters.ngram import NgramDrafter
from streamserve.engine.drafters.runner_drafts import OfferedDrafter
from streamserve.engine.embedder import Embedder
from streamserve.engine.encodings import Encodings
from streamserve.engine.fake import FakeRunner
from streamserve.engine.grammar import Grammars
from streamserve.engine.pause import BurstLimits
from streamserve.engine.plan import Admission, Plan, Row, Runner
from streamserve.engine.policy import POLICIES
from streamserve.engine.scheduler import Limits, Scheduler
from streamserve.engine.speculation import Speculation
from streamserve.engine.step_costs import StepCosts
from streamserve.errors import ConfigError
from streamserve.media.families import find as find_family
from streamserve.media.family import Family, PictureFamily, Prepared, SoundFamily
from streamserve.media.fixed import FixedFamily
from streamserve.media.picture import Picture
from streamserve.media.sound import Sound
from streamserve.messages import SamplingParams
from streamserve.resolve import MEDIA_BYTES, Reason, Resolved, decide_speculative
from streamserve.speculative import Speculative
from streamserve.text.byte_tokenizer import byte_text_model
from streamserve.text.encoder_text import EncoderText, load_encoder_text
from streamserve.text.model import TextModel, load_text_model
from streamserve.text.tokenizer import load_tokenizer
from streamserve.text.vocabulary import refuse_other_tokens

if TYPE_CHECKING:  # what serves without torch must not load it
    from streamserve.engine.embeddings import Embeddings
    from streamserve.kernels.devices.cpu import CPU
    from streamserve.kernels.devices.cuda import CUDA
    from streamserve.models.checkpoint import Checkpoint
    from streamserve.models.drafting import OpenDrafter

FAKE_MODEL_NAME = "fake"
FAKE_CONTEXT_LEN = 8192
FAKE_PAGES = 4096
FAKE_ANSWER = (
    "This answer was made up by the fake engine: no model is loaded, every token is drawn from this text, and the place "
    "where it begins depends on the prompt. It is here so that pages, clients and tests have something to stream. "
    "Grüße, 世界, 👩‍👩‍👧 and `code` are in it, since text is more than ASCII.\n\n"
)


class Display(Protocol):
    """What is shown while parts are built; startup.StartUp shows it to a person."""

    def hello(self, model: str, device: str) -> None: ...
    def decided(self, resolved: Resolved, more: tuple[Reason, ...] = ()) -> None: ...
    def loading(self) -> AbstractContextManager[Callable[[int, int], None]]: ...
    def phase(self, name: str) -> AbstractContextManager[Callable[[int, int], None]]: ...


class Quiet:
    """A Display that shows nothing."""

    def hello(self, model: str, device: str) -> None: ...
    def decided(self, resolved: Resolved, more: tuple[Reason, ...] = ()) -> None: ...
    def loading(self) -> AbstractContextManager[Callable[[int, int], None]]:
        return nullcontext(lambda done, total: None)

    def phase(self, name: str) -> AbstractContextManager[Callable[[int, int], None]]:
        return nullcontext(lambda done, total: None)


@dataclass(frozen=True, slots=True)
class BuiltEncoder:
    """An embedding model. `embedder.run()` has yet to be started."""

    name: str
    embedder: Embedder
    text: EncoderText


@dataclass(frozen=True, slots=True)
class Built:
    """All parts of one model. `engine.run()` has yet to be started; `close` ends what is not a coroutine. `resolved`: what was
    decided for it; None where there was nothing to decide. `encoder`: the embedding model beside it. `pictures`: how they are
    prepared for the model; None: it takes none. `release`: gives the device's memory back, when nothing refers to this any more;
    it does not itself."""

    engine: Engine
    text: TextModel
    model_name: str
    cache: KVCache
    close: Callable[[], None]
    resolved: Resolved | None = None
    encoder: BuiltEncoder | None = None
    pictures: Family | None = None
    release: Callable[[], None] = lambda: None


def build(
    config: Config,
    observer: StepObserver | None = None,
    display: Display | None = None,
    *,
    drafter: Drafter | None = None,
) -> Built:
    """Load what the settings name. Raises StartError. `drafter` takes the place of the one that --speculative names: for
    measurements."""
    make = _build_fake if config.server.fake else _build_model
    return make(config, observer, display or Quiet(), drafter)


def _build_model(
    config: Config,
    observer: StepObserver | None,
    display: Display,
    drafter: Drafter | None,
) -> Built:
    # Imports inside functions, here and below: --fake must start without torch, and a CPU without triton.
    with display.phase("imports"):
        from streamserve import facts
        from streamserve.kernels.devices.cpu import CPU

        device = facts.find_device(config)
    display.hello(facts.model_name(config), device.model)
    encoder = _build_encoder(config, display)  # first: what it holds is not free for the KV memory
    with display.loading() as progress:
        checkpoint = facts.open_model(config, progress)
        network = None if drafter is not None else facts.find_drafter(config, checkpoint, device)
        vision = checkpoint.vision
        pictures = None if vision is None else find_family(str(vision.config["model_type"]))(vision.path, vision.config)
        if isinstance(device, CPU):
            runner, text, grammars, resolved = _build_on_cpu(config, checkpoint, device, display, network)
        else:
            runner, text, grammars, resolved = _build_on_gpu(config, checkpoint, device, display, network, pictures, drafter)
    eos = _eos(text, checkpoint)
    options = _options(config, resolved.context_len, checkpoint.spec.vocab_size, eos, takes_media=vision is not None)
    cache = KVCache(resolved.num_pages, resolved.page_size, reuse=not config.cache.disable_radix_cache)
    limits = Limits(
        resolved.max_running_requests,
        resolved.chunked_prefill_size,
        eos,
        burst_limits(resolved, on_gpu=not isinstance(device, CPU)),
        runner.long_chunk,
        runner.max_appended_rows,
        runner.max_drafted_tokens,
        vision is not None and vision.kind.whole_spans,
        encodes_beside=not isinstance(device, CPU),
    )
    speculation = _speculation(drafter or host_drafter(resolved.speculative), CPU_TOKEN if isinstance(device, CPU) else GPU_TOKEN)
    encodings = Encodings(max_media_tokens(checkpoint)) if vision is not None else None
    engine = _engine(config, cache, limits, runner, options, observer, grammars, speculation, encodings)
    close = _closing(runner.close, grammars, encoder)
    release = (lambda: None) if isinstance(device, CPU) else device.release
    return Built(engine, text, resolved.served_model_name, cache, close, resolved, encoder, pictures, release)


def max_media_tokens(checkpoint: "Checkpoint") -> int:
    """Embeddings of pictures that are kept."""
    num_beside = 0 if checkpoint.vision is None else checkpoint.vision.num_deepstack
    return MEDIA_BYTES // (4 * (1 + num_beside) * checkpoint.spec.hidden_size)


class ClosableRunner(Runner, Protocol):
    """A runner that holds threads. `long_chunk`, `max_appended_rows`, `max_drafted_tokens`: see Limits."""

    long_chunk: int | None
    max_appended_rows: int | None
    max_drafted_tokens: int | None

    def close(self) -> None: ...


Parts = tuple[ClosableRunner, TextModel, Grammars, Resolved]


def _eos(text: TextModel, checkpoint: "Checkpoint") -> frozenset[int]:
    return text.tokenizer.eos_token_ids | checkpoint.spec.eos_token_ids


def _build_on_cpu(config: Config, checkpoint: "Checkpoint", cpu: "CPU", display: Display, guesses: "OpenDrafter | None") -> Parts:
    import torch

    from streamserve import facts
    from streamserve.cache.pool import KVPool
    from streamserve.engine.drafters.find import Room, load_drafter
    from streamserve.engine.runner import ModelRunner
    from streamserve.engine.sampler import Sampler
    from streamserve.engine.stages import default_stages
    from streamserve.models.drafting import OpenModel
    from streamserve.models.network import build_network

    resolved, choices = facts.decide(config, checkpoint, cpu, guesses)
    display.decided(resolved, facts.kernel_reasons(choices))
    text, grammars = _text_and_grammars(config, checkpoint)
    if isinstance(guesses, OpenModel):
        refuse_other_tokens(text.tokenizer, load_tokenizer(guesses.checkpoint.path), of=guesses.checkpoint.path)
    kv_dtype = getattr(torch, resolved.kv_dtype)
    pool = KVPool(checkpoint.spec, num_pages=resolved.num_pages, page_size=resolved.page_size, dtype=kv_dtype)
    network = build_network(
        checkpoint,
        pool=pool,
        dtype="auto" if config.model.dtype == "auto" and choices["network"].name != "torch" else resolved.dtype,
        threads=resolved.threads,
        choices=choices,
    )
    drafter = None
    if guesses is not None:
        room = Room(
            num_pages=resolved.num_pages,
            page_size=resolved.page_size,
            num_slots=resolved.max_running_requests,
            max_drafts=resolved.speculative.max_drafts,
            dtype=getattr(torch, resolved.dtype),
            threads=resolved.threads,
            choices=choices,
        )
        drafter = load_drafter(guesses, network, room)
    runner = ModelRunner(
        network,
        pool,
        Sampler(checkpoint.spec.vocab_size, default_stages(_eos(text, checkpoint))),
        num_slots=resolved.max_running_requests,
        max_len=resolved.context_len,
        drafter=drafter,
        embeddings=_embeddings(checkpoint, resolved.max_running_requests, resolved.threads, display),
    )
    runner.execute(_warm_up_plan())
    return runner, text, grammars, resolved


def _embeddings(checkpoint: "Checkpoint", num_slots: int, threads: int, display: Display) -> "Embeddings | None":
    """Of a model that takes pictures, its encoder loaded. It computes between the network's steps, with as many threads."""
    if checkpoint.vision is None:
        return None
    import torch

    from streamserve.engine.embeddings import Embeddings

    with display.phase("encoder of pictures"):
        torch.set_num_threads(threads)  # a network that is not torch's leaves this to us
        vision = checkpoint.vision.load(torch.device("cpu"), torch.float32)
    spec = checkpoint.spec
    width = (1 + vision.num_deepstack) * spec.hidden_size
    return Embeddings(vision, num_slots=num_slots, hidden_size=width, has_rotary=spec.has_rotary_sections)


def _build_on_gpu(
    config: Config,
    checkpoint: "Checkpoint",
    gpu: "CUDA",
    display: Display,
    guesses: "OpenDrafter | None",
    pictures: Family | None = None,
    drafter: Drafter | None = None,
) -> Parts:
    """Weights first, then the largest step on a small KV memory: what it takes decides how much is left for the real one."""
    import torch

    from streamserve import facts
    from streamserve.cache.pool import DevicePool
    from streamserve.engine.device_embeddings import DeviceEmbeddings
    from streamserve.engine.device_runner import DeviceRunner
    from streamserve.engine.device_sampler import DeviceSampler
    from streamserve.engine.device_state import MAX_PROMPTS, DeviceState, max_decode_rows
    from streamserve.engine.drafters.device_drafter import DeviceDrafter
    from streamserve.engine.drafters.find_on_gpu import DeviceRoom, load_device_drafter
    from streamserve.kernels.warm import rehearsal
    from streamserve.models.drafting import OpenModel
    from streamserve.models.network import build_device_network

    spec = checkpoint.spec
    if checkpoint.vision is not None and checkpoint.vision.kind.whole_spans:
        raise ConfigError(
            f"pictures of a {checkpoint.vision.config['model_type']} model look at all of themselves, which attention on a GPU "
            "does not do yet; --device cpu serves it"
        )
    planned, choices = facts.decide(config, checkpoint, gpu, guesses)
    with display.phase("tokenizer"):
        text, grammars = _text_and_grammars(config, checkpoint)
        grammars.use_memory(lambda num_lines, num_words: gpu.pinned((num_lines, num_words), torch.int32).numpy())
        if isinstance(guesses, OpenModel):
            refuse_other_tokens(text.tokenizer, load_tokenizer(guesses.checkpoint.path), of=guesses.checkpoint.path)
    dtype = getattr(torch, planned.dtype)
    needs = None if guesses is None else guesses.needs(dtype, choices)
    max_drafts = planned.speculative.max_drafts if drafter is None else drafter.max_drafts
    use_graphs = not config.device.disable_cuda_graph
    longest = config.model.context_length or spec.max_position_embeddings  # memory, once measured, may allow more
    with display.phase("weights"):
        network = build_device_network(
            checkpoint,
            dtype=dtype,
            device=gpu.torch_device,
            choices=choices,
            max_len=longest,
            max_rows=max_decode_rows(planned.max_running_requests, max_drafts) + MAX_PROMPTS,
            deterministic=config.device.deterministic,
        )
        guesser = None
        if guesses is not None:
            room = DeviceRoom(
                num_slots=planned.max_running_requests,
                page_size=planned.page_size,
                max_drafts=max_drafts,
                max_step_tokens=planned.chunked_prefill_size,
                longest=longest,
                dtype=dtype,
                use_graphs=use_graphs,
            )
            guesser = load_device_drafter(guesses, network, gpu, room)
        checkpoint.finish()
        vision = None if checkpoint.vision is None else checkpoint.vision.load(gpu.torch_device, dtype)
        gpu.synchronize()

    max_graph_tokens = min(_worth_capturing(spec.num_layers, planned.weight_bytes), planned.chunked_prefill_size, BURST_STEP)

    def media() -> DeviceEmbeddings | None:
        if vision is None:
            return None
        return DeviceEmbeddings(
            gpu,
            vision,
            num_slots=planned.max_running_requests,
            width=(1 + vision.num_deepstack) * spec.hidden_size,
            dtype=dtype,
            has_rotary=spec.has_rotary_sections,
        )

    def runner_on(num_pages: int, max_len: int) -> DeviceRunner:
        pool = DevicePool(spec, num_pages=num_pages, page_size=planned.page_size, dtype=dtype, device=gpu.torch_device)

        def sampler(state: DeviceState) -> DeviceSampler:
            return DeviceSampler(
                gpu,
                vocab_size=spec.vocab_size,
                eos_token_ids=_eos(text, checkpoint),
                max_rows=state.max_logits,
                params_SP=state.params_SP,
                last_token_S=state.last_token_S,
            )

        def drafter_on(state: DeviceState) -> DeviceDrafter:
            assert guesser is not None
            return guesser(state, num_pages, max_len)

        return DeviceRunner(
            gpu,
            network,
            pool,
            sampler,
            vocab_size=spec.vocab_size,
            num_slots=planned.max_running_requests,
            max_len=max_len,
            max_step_tokens=planned.chunked_prefill_size,
            max_graph_tokens=max_graph_tokens,
            use_graphs=use_graphs,
            max_drafts=max_drafts,
            make_drafter=None if guesser is None else drafter_on,
            media=media(),
        )

    with display.phase("kernels and memory") as progress:
        chunk = max(2, min(planned.chunked_prefill_size, planned.context_len))
        num_pages = -(-chunk // planned.page_size) + 1
        media_work = 0
        if (eyes := media()) is not None and pictures is not None:
            large, before = _large(pictures), gpu.memory()[0]
            eyes.warm_up(large.inputs, large.layout.num_tokens, MEDIA_BYTES)
            eyes.close()
            media_work = max(0, before - gpu.memory()[0] - MEDIA_BYTES)
        trial = runner_on(num_pages, chunk)
        with rehearsal(progress):
            trial.warm_up(chunk)
        trial.warm_up(chunk)
        trial.warm_up_long(planned.context_len, chunk)
        gpu.synchronize()
        page_bytes = planned.kv_bytes_per_token * planned.page_size
        taken = planned.free_bytes - gpu.memory()[0] - planned.weight_bytes - num_pages * page_bytes - media_work
        trial.close()
        del trial
        if use_graphs:  # whose memory is their own
            taken += taken * (max_graph_tokens + planned.max_running_requests) // chunk + GRAPH_BYTES
        resolved = facts.measured(config, checkpoint, gpu, planned, max(0, taken) + media_work, needs)
        display.decided(resolved, facts.kernel_reasons(choices))
        runner = runner_on(resolved.num_pages, resolved.context_len)
    with display.phase("graphs") as progress:
        runner.capture(progress)
    return runner, text, grammars, resolved


LARGE_SIDE = 2048  # pixels


def _large(family: Family) -> Prepared:
    """A picture, or the longest sound: what encoding it takes of a GPU's memory is measured."""
    if isinstance(family, PictureFamily):
        return family.prepare(Picture(np.zeros((LARGE_SIDE, LARGE_SIDE, 3), np.uint8), bytes(32)))
    assert isinstance(family, SoundFamily)
    return family.prepare_sound(Sound(np.zeros(int(family.max_seconds * family.rate), np.float32), family.rate, bytes(32)))


BURST_STEP = 8192  # most tokens of a step of prompts alone
MEDIA_TOKENS = 128  # for whose products a device needs half as long as for reading the weights
GPU_FLOP_S = 600e12  # in matrix products, about


def burst_limits(resolved: Resolved, *, on_gpu: bool) -> BurstLimits:
    """Prompts that ride along bring 5 ms of matrix products to a step, prompts alone 40 ms, if a step may hold that; 0.45 s of
    them are a burst. A token costs about as many FLOP as the weights have bytes. Multiples of what a product's tile holds."""
    pause_s = resolved.max_decode_pause_ms / 1000
    if not pause_s and not on_gpu:
        return BurstLimits()

    def tokens(seconds: float, least: int, most: int) -> int:
        return min(max(least, int(GPU_FLOP_S * seconds / resolved.weight_bytes) // 64 * 64), most)

    step_tokens = tokens(0.04, 2048, min(BURST_STEP, resolved.chunked_prefill_size))
    ride_tokens = tokens(0.0055, 128, 1024)
    return BurstLimits(
        pause_s,
        tokens=max(step_tokens, tokens(0.45, 1024, 1 << 30)),
        step_tokens=step_tokens,
        ride_tokens=ride_tokens,
        media_tokens=MEDIA_TOKENS,
        gather_s=0.01 if ride_tokens == 1024 else 0.0,  # a step of a small model takes about as long for two prompts as for one
    )


GRAPH_BYTES = 512 << 20  # what captured graphs take beside what their steps work in


def _worth_capturing(num_layers: int, weight_bytes: int) -> int:
    """Prompt tokens up to which launching a step kernel by kernel takes longer than the step: about 0.45 ms of Python per layer
    on the host of an H200, against 500 TFLOP/s in matrix products; twice that, for the loop has other things to do."""
    return max(1024, int(2 * num_layers * 0.45e-3 * 500e12 / weight_bytes))


def _warm_up_plan() -> Plan:
    """One token on a page that nobody has yet: kernels are compiled and weights touched before the first request."""
    admission = Admission(slot=0, sampling=SamplingParams(temperature=0.0), history=(0,), num_prompt=1, seed=0)
    row = Row(slot=0, start=0, num_tokens=1, token_ids=(0,), new_pages=(0,))
    return Plan(0, (admission,), (), (row,))


# By what part of a step each further token is believed to lengthen it, until it was measured: for the default model on two cores;
# and for a GPU, whose steps take as long as reading the weights, up to some tens of tokens.
CPU_TOKEN, GPU_TOKEN = 0.15, 0.01


def host_drafter(asked: Speculative) -> Drafter | None:
    """The scheduler's side of who guesses."""
    if asked.kind == "none":
        return None
    if asked.kind in ("ngram", "ngram_shared"):
        return NgramDrafter(asked.max_drafts, is_shared=asked.kind == "ngram_shared")
    return OfferedDrafter(asked.max_drafts)


def _speculation(drafter: Drafter | None, token_cost: float) -> Speculation | None:
    return None if drafter is None else Speculation(drafter, StepCosts(token_cost))


def _build_fake(config: Config, observer: StepObserver | None, display: Display, drafter: Drafter | None) -> Built:
    name = next(iter(served_names(config)), FAKE_MODEL_NAME)
    display.hello(name, "no device")
    encoder = _build_encoder(config, display)
    text = byte_text_model()
    tokenizer = text.tokenizer
    eos = min(tokenizer.eos_token_ids)
    runner = FakeRunner(
        vocab_size=tokenizer.vocab_size,
        page_size=config.cache.page_size,
        step_s=config.server.fake_step_ms / 1000,
        script=tokenizer.encode(FAKE_ANSWER, add_special_tokens=False),
        eos_token_id=eos,
        answer_len=400,
    )
    num_pages = (config.cache.max_total_tokens or FAKE_PAGES * config.cache.page_size) // config.cache.page_size
    context_len = min(config.model.context_length or FAKE_CONTEXT_LEN, (num_pages - 1) * config.cache.page_size)
    cache = KVCache(num_pages, config.cache.page_size, reuse=not config.cache.disable_radix_cache)
    limits = Limits(
        config.scheduler.max_running_requests or 256, config.scheduler.chunked_prefill_size or 512, tokenizer.eos_token_ids
    )
    options = _options(config, context_len, tokenizer.vocab_size, tokenizer.eos_token_ids, takes_media=True)
    grammars = Grammars(tokenizer, vocab_size=tokenizer.vocab_size, eos_token_ids=tokenizer.eos_token_ids)
    guesses = drafter or host_drafter(decide_speculative(config)[0])
    engine = _engine(config, cache, limits, runner, options, observer, grammars, _speculation(guesses, 0.0), Encodings())
    close = _closing(lambda: None, grammars, encoder)
    return Built(engine, text, name, cache, close, encoder=encoder, pictures=FixedFamily())


# Tokens of one batch of an embedding model. all-MiniLM-L6-v2 (22 million parameters) takes 0.1 s for so many on two cores, and is
# no faster with more; larger models get fewer, so that nobody waits long for the end of a batch.
CPU_BATCH_TOKENS = 1024
MIN_CPU_BATCH_TOKENS = 128
GPU_BATCH_TOKENS = 16384


def _build_encoder(config: Config, display: Display) -> BuiltEncoder | None:
    """The embedding model that the settings name, on the LLM's device, in a thread of its own."""
    asked = config.model.embedding_model
    if asked is None:
        return None
    with display.phase("embedding model"):
        import torch

        from streamserve import facts
        from streamserve.kernels.devices.cpu import CPU
        from streamserve.messages import EncoderInput
        from streamserve.models.encoder import Encoder, locate_encoder

        name, path = _name_and_path(asked)
        folder = locate_encoder(path)
        device = facts.find_device(config)
        if isinstance(device, CPU):
            threads = config.device.threads or device.num_cores
            encoder = Encoder(folder, device=torch.device("cpu"), threads=threads)
            batch_tokens = max(
                MIN_CPU_BATCH_TOKENS, min(CPU_BATCH_TOKENS, CPU_BATCH_TOKENS * 22_000_000 // encoder.num_parameters)
            )
        else:
            encoder, batch_tokens = Encoder(folder, device=device.torch_device), GPU_BATCH_TOKENS
        threads_before = torch.get_num_threads()
        embedder = Embedder(encoder, batch_tokens=batch_tokens, max_queued=config.scheduler.max_queued_requests)
        torch.set_num_threads(threads_before)  # see Encoder.enter_thread
        embedder.warm_up(EncoderInput((0,) * min(8, encoder.facts.max_len)))
        return BuiltEncoder(name, embedder, load_encoder_text(folder))


def _name_and_path(asked: str) -> tuple[str, str]:
    """NAME=MODEL, or a model that is called after the last part of its path."""
    name, equals, path = asked.partition("=")
    if equals and name and path and not Path(asked).exists():
        return name, path
    return asked.rstrip("/").rsplit("/", 1)[-1], asked


def _closing(close: Callable[[], None], grammars: Grammars, encoder: BuiltEncoder | None) -> Callable[[], None]:
    def close_all() -> None:
        close()
        grammars.close()
        if encoder is not None:
            encoder.embedder.shut()

    return close_all


def _load_text(config: Config, path: Path) -> TextModel:
    model = config.model
    text = load_text_model(
        path,
        tokenizer_path=Path(model.tokenizer_path) if model.tokenizer_path else None,
        chat_template_path=Path(model.chat_template) if model.chat_template else None,
    )
    return replace(text, defaults={**DEFAULT_MODEL_SAMPLING, **text.defaults}) if model.model_path is None else text


def _text_and_grammars(config: Config, checkpoint: "Checkpoint") -> tuple[TextModel, Grammars]:
    """The text side, and grammars over its vocabulary, which a thread goes on to read while weights are loaded."""
    text = _load_text(config, checkpoint.path)
    grammars = Grammars(text.tokenizer, vocab_size=checkpoint.spec.vocab_size, eos_token_ids=_eos(text, checkpoint))
    grammars.prepare()
    return text, grammars


MIN_HELD_BYTES = 1 << 30  # of pictures and the like in requests under way; a sixteenth of the machine's memory, if that is more


def _options(
    config: Config, context_len: int, vocab_size: int, eos: frozenset[int], *, takes_media: bool = False
) -> EngineOptions:
    from streamserve.kernels.devices.cpu import CPU

    return EngineOptions(
        context_len,
        vocab_size,
        eos,
        max_queued=config.scheduler.max_queued_requests,
        seed=config.scheduler.random_seed,
        takes_priorities=config.scheduler.schedule_policy == "priority",
        takes_media=takes_media,
        max_media_bytes=max(MIN_HELD_BYTES, CPU.here().memory()[1] // 16),
    )


def _engine(
    config: Config,
    cache: KVCache,
    limits: Limits,
    runner: Runner,
    options: EngineOptions,
    observer: StepObserver | None,
    grammars: Grammars,
    speculation: Speculation | None,
    encodings: Encodings | None = None,
) -> Engine:
    policy = POLICIES[config.scheduler.schedule_policy]
    scheduler = Scheduler(cache, limits, policy, speculation=speculation, encodings=encodings)
    return Engine(scheduler, runner, options, grammars=grammars, observer=observer)
