"""The GPU's whole path on tiny models: scheduler, state in device memory, kernels, graphs, sampling.
On a machine with a GPU only."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.kernels.devices import HAS_GPU, HAS_TRITON

if not HAS_TRITON:
    pytest.skip("needs Triton", allow_module_level=True)

import itertools
import re
from dataclasses import replace

from streamserve.cache.kv_cache import KVCache
from streamserve.cache.pool import DevicePool
from streamserve.engine import device_state, prefix_groups
from streamserve.engine.client import collect
from streamserve.engine.core import Engine, EngineOptions
from streamserve.engine.device_runner import DeviceRunner, graph_sizes
from streamserve.engine.device_sampler import DeviceSampler
from streamserve.engine.device_state import MAX_PROMPTS, DeviceState, max_decode_rows
from streamserve.engine.drafters.device_draft_model import DeviceDraftModel, max_guessed_tokens
from streamserve.engine.drafters.device_passes import num_own_pages
from streamserve.engine.drafters.ngram import NgramDrafter
from streamserve.engine.drafters.runner_drafts import OfferedDrafter
from streamserve.engine.grammar import Grammars
from streamserve.engine.pause import BurstLimits
from streamserve.engine.policy import first_come_first_served
from streamserve.engine.scheduler import Limits, Scheduler
from streamserve.engine.speculation import Speculation
from streamserve.engine.step_costs import StepCosts
from streamserve.kernels.devices.cuda import CUDA
from streamserve.kernels.impl.triton_decoder import TritonDecoder
from streamserve.kernels.ops import NetworkParts
from streamserve.messages import Delta, GenerateRequest, Guidance, SamplingParams
from streamserve.models.checkpoint import open_checkpoint
from streamserve.text.byte_tokenizer import ByteTokenizer
from tests.models import tiny

if not HAS_GPU:  # what is imported above is there on every machine
    pytest.skip("needs a GPU: Triton's interpreter takes minutes for it", allow_module_level=True)

pytestmark = [
    pytest.mark.timeout(600),
    # numpy, in the interpreter: hashes wrap round
    pytest.mark.filterwarnings("ignore:overflow encountered"),
]
PAGE_SIZE, SLOTS, CHUNK = 4, 6, 16
MODELS = {
    "llama": {"head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2},
    "qwen3": {"head_dim": 16, "num_attention_heads": 3, "num_key_value_heads": 1},
}


@pytest.fixture(scope="module", params=sorted(MODELS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, object]]:
    """A folder with a tiny model, and transformers' own view of it."""
    import transformers

    config_type = {"llama": transformers.LlamaConfig, "qwen3": transformers.Qwen3Config}[request.param]
    shape = {**tiny.SHAPE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, **MODELS[request.param]}
    torch.manual_seed(1)
    reference = tiny.from_config(config_type(**shape))
    for parameter in reference.parameters():
        with torch.no_grad():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(0, parameter.shape[1] ** -0.5)
    folder = tmp_path_factory.mktemp(request.param)
    reference.save_pretrained(folder)
    yield folder, reference


class Bench:
    """An engine on the device runner."""

    def __init__(
        self,
        folder: Path,
        *,
        graphs: bool = True,
        chunk: int = CHUNK,
        num_pages: int = 80,
        deterministic: bool = False,
        slots: int = SLOTS,
        max_drafts: int = 0,
        guesses_itself: bool = False,
    ) -> None:
        """`max_drafts` above 0: texts that repeat are guessed, and every guess is verified. `guesses_itself`: the model guesses
        instead, for itself."""
        checkpoint = open_checkpoint(folder)
        spec = checkpoint.spec
        device = CUDA()  # one each: a pool of graph memory does not outlive its last graph
        where, dtype = device.torch_device, torch.float32
        parts = NetworkParts(
            spec,
            checkpoint,
            dtype,
            where,
            {},
            max_len=tiny.SHAPE["max_position_embeddings"],
            max_rows=max_decode_rows(slots, max_drafts) + MAX_PROMPTS,
            deterministic=deterministic,
        )
        pool = DevicePool(spec, num_pages=num_pages, page_size=PAGE_SIZE, dtype=dtype, device=where)

        def draft_model(state: DeviceState) -> DeviceDraftModel:
            own = num_own_pages(slots, max_drafts, PAGE_SIZE)
            drafter_pool = DevicePool(spec, num_pages=num_pages + own, page_size=PAGE_SIZE, dtype=dtype, device=where)
            rows = max_guessed_tokens(slots, max_drafts)
            return DeviceDraftModel(
                *(device, TritonDecoder(replace(parts, max_rows=rows)), drafter_pool, state),
                vocab_size=spec.vocab_size,
                num_target_tokens=spec.vocab_size,
                max_len=tiny.SHAPE["max_position_embeddings"],
                max_drafts=max_drafts,
                max_step_tokens=chunk,
                read_sizes=(8, 16),
                use_graphs=graphs,
            )

        self.runner = DeviceRunner(
            device,
            TritonDecoder(parts),
            pool,
            lambda state: DeviceSampler(
                device,
                vocab_size=spec.vocab_size,
                eos_token_ids=frozenset(),
                max_rows=state.max_logits,
                params_SP=state.params_SP,
                last_token_S=state.last_token_S,
            ),
            vocab_size=spec.vocab_size,
            num_slots=slots,
            max_len=tiny.SHAPE["max_position_embeddings"],
            max_step_tokens=chunk,
            use_graphs=graphs,
            max_drafts=max_drafts,
            make_drafter=draft_model if guesses_itself else None,
        )
        self.runner.warm_up(min(chunk, num_pages * PAGE_SIZE // 2))
        self.runner.capture()
        self.cache = KVCache(num_pages, PAGE_SIZE)
        most = self.runner.max_drafted_tokens
        limits = Limits(slots, chunk, frozenset(), BurstLimits(0.5, tokens=8), max_drafted_tokens=most)
        drafter = OfferedDrafter(max_drafts) if guesses_itself else NgramDrafter(max_drafts)
        speculation = Speculation(drafter, StepCosts.free()) if max_drafts else None
        scheduler = Scheduler(self.cache, limits, first_come_first_served, speculation=speculation)
        self.grammars = Grammars(ByteTokenizer(), vocab_size=spec.vocab_size, eos_token_ids={0})
        options = EngineOptions(100, spec.vocab_size, frozenset(), seed=0)
        self.engine = Engine(scheduler, self.runner, options, grammars=self.grammars)

    def ask(self, prompts: list[list[int]], guidance: list[Guidance | None] | None = None, **sampling: object) -> list[Delta]:
        """All at once."""

        async def run() -> list[Delta]:
            self.engine._wake, self.engine._idle = asyncio.Event(), asyncio.Event()  # those of another loop are bound to it
            task = asyncio.create_task(self.engine.run())
            params = SamplingParams(**{"max_new_tokens": 6, "temperature": 0.0, "ignore_eos": True, **sampling})  # type: ignore[arg-type]
            guided = guidance or [None] * len(prompts)
            boxes = [
                await self.engine.submit(GenerateRequest(str(i), tuple(prompt), params, guidance=guide))
                for i, (prompt, guide) in enumerate(zip(prompts, guided, strict=True))
            ]
            answers = [await collect(box) for box in boxes]
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            self.engine._stopped = None
            return answers

        answers = asyncio.run(run())
        self.cache.check()
        return answers

    def close(self) -> None:
        self.runner.close()
        self.grammars.close()


def prompt_of(length: int, seed: int) -> list[int]:
    return torch.randint(0, tiny.SHAPE["vocab_size"], (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [prompt_of(length, seed) for seed, length in enumerate((5, 1, 17, 30, 4, 9, 2))]


def is_greedy(reference: object, prompt: list[int], tokens: tuple[int, ...]) -> bool:
    """Whether every token is transformers' best one, or within a hair of it."""
    logits = tiny.reference_logits(reference, [*prompt, *tokens[:-1]])[len(prompt) - 1 :]
    chosen = logits.gather(1, torch.tensor(tokens).unsqueeze(1)).squeeze(1)
    return bool((logits.max(dim=1).values - chosen < 1e-3).all())


@pytest.mark.parametrize("options", [{}, {"graphs": False}, {"chunk": 5}, {"num_pages": 14}, {"deterministic": True}], ids=str)
def test_greedy_answers_are_the_models(model: tuple[Path, object], options: dict[str, int]) -> None:
    folder, reference = model
    bench = Bench(folder, **options)  # type: ignore[arg-type]
    alone = [bench.ask([prompt])[0] for prompt in PROMPTS[2:5]]
    answers = bench.ask(PROMPTS)
    again = bench.ask(PROMPTS)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert is_greedy(reference, prompt, answer.token_ids), prompt
    assert [answer.token_ids for answer in again] == [answer.token_ids for answer in answers]
    assert [answer.token_ids for answer in alone] == [answer.token_ids for answer in answers[2:5]]
    if "num_pages" not in options:
        assert [answer.num_cached_tokens for answer in again] == [len(prompt) - 1 for prompt in PROMPTS]
    else:
        assert bench.engine.num_preemptions > 0
    bench.close()


@pytest.mark.parametrize(
    "options", [{}, {"graphs": False}, {"num_pages": 40}, {"deterministic": True, "num_pages": 120}], ids=str
)
def test_greedy_answers_with_guesses_are_the_models(model: tuple[Path, object], options: dict[str, int]) -> None:
    folder, reference = model
    bench = Bench(folder, max_drafts=4, **options)  # type: ignore[arg-type]
    prompts = [(prompt_of(7, 80 + i) * 3)[: 15 + i] for i in range(7)]
    for _ in range(2):  # the second time with prefixes in the cache, which no wrong guess may be in
        answers = bench.ask(prompts, max_new_tokens=40)
        for prompt, answer in zip(prompts, answers, strict=True):
            assert is_greedy(reference, prompt, answer.token_ids), prompt
        assert sum(answer.num_drafted for answer in answers) > 0
    if "deterministic" in options:
        plain = Bench(folder, **options)  # type: ignore[arg-type]
        assert [answer.token_ids for answer in plain.ask(prompts, max_new_tokens=40)] == [answer.token_ids for answer in answers]
        plain.close()
    bench.close()


@pytest.mark.parametrize("options", [{}, {"graphs": False}, {"num_pages": 24}], ids=str)
def test_greedy_answers_are_the_models_where_it_guesses_for_itself_and_its_guesses_are_right(
    model: tuple[Path, object], options: dict[str, int]
) -> None:
    folder, reference = model
    bench = Bench(folder, max_drafts=4, guesses_itself=True, **options)  # type: ignore[arg-type]
    for _ in range(2):  # the second time with prefixes in the cache, and what the drafter left of them
        answers = bench.ask(PROMPTS, max_new_tokens=24)
        for prompt, answer in zip(PROMPTS, answers, strict=True):
            assert is_greedy(reference, prompt, answer.token_ids), prompt
        drafted, accepted = (sum(getattr(answer, name) for answer in answers) for name in ("num_drafted", "num_accepted"))
        assert accepted >= 0.9 * drafted > 0
    if "num_pages" in options:
        assert bench.engine.num_preemptions > 0
    sampled = bench.ask(PROMPTS, max_new_tokens=24, temperature=1.0, seed=3, top_p=0.9)
    drafted, accepted = (sum(getattr(answer, name) for answer in sampled) for name in ("num_drafted", "num_accepted"))
    assert accepted >= 0.9 * drafted > 0
    bench.close()


@pytest.mark.parametrize(
    "sampling", [{}, {"frequency_penalty": 0.05, "min_new_tokens": 20}, {"top_p": 0.8, "logprobs": 1}], ids=str
)
def test_a_seed_gives_the_same_text_with_guesses_and_without(model: tuple[Path, object], sampling: dict[str, object]) -> None:
    prompts = [(prompt_of(7, 80 + i) * 3)[: 15 + i] for i in range(5)]
    answers = []
    for max_drafts in (0, 4):
        bench = Bench(model[0], deterministic=True, max_drafts=max_drafts, num_pages=120)
        answers.append(bench.ask(prompts, max_new_tokens=40, temperature=0.2, seed=3, **sampling))
        bench.close()
    assert [answer.token_ids for answer in answers[1]] == [answer.token_ids for answer in answers[0]]
    for answer, plain in zip(answers[1], answers[0], strict=True):  # float32 kernels of two kinds: not to the bit
        assert [entry.logprob for entry in answer.logprobs] == pytest.approx(
            [entry.logprob for entry in plain.logprobs], abs=1e-4
        )
    assert sum(answer.num_drafted for answer in answers[1]) > 0


def test_log_probabilities_are_the_models(model: tuple[Path, object]) -> None:
    folder, reference = model
    bench = Bench(folder)
    prompt = PROMPTS[3]
    answer = bench.ask([prompt], logprobs=2, prompt_logprobs=1, temperature=0.7, seed=5)[0]
    whole = [*prompt, *answer.token_ids]
    wanted = torch.log_softmax(tiny.reference_logits(reference, whole), dim=-1)
    assert answer.prompt_logprobs is not None and answer.prompt_logprobs[0] is None
    found = [entry for entry in answer.prompt_logprobs[1:] if entry is not None] + list(answer.logprobs)
    assert len(found) == len(whole) - 1
    for position, entry in enumerate(found):
        assert entry.token_id == whole[position + 1]
        assert abs(entry.logprob - float(wanted[position, entry.token_id])) < 1e-4
    best = wanted[len(prompt) - 1].topk(2)
    assert [token for token, _ in answer.logprobs[0].top] == best.indices.tolist()
    bench.close()


@pytest.mark.parametrize("graphs", [True, False])
def test_rows_that_share_a_prefix_give_the_models_answers(
    model: tuple[Path, object], graphs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, reference = model
    shared, found = prompt_of(70, 50), []
    monkeypatch.setattr(prefix_groups, "MIN_SHARED", 64)

    def find_groups(*args: object, **options: object) -> list[prefix_groups.PrefixGroup]:
        groups = prefix_groups.find_groups(*args, **options)  # type: ignore[arg-type]
        found.extend(groups)
        return groups

    monkeypatch.setattr(device_state, "find_groups", find_groups)
    bench = Bench(folder, graphs=graphs, chunk=128, num_pages=250, slots=10)
    prompts = [shared + prompt_of(2 + i, i) for i in range(8)] + [prompt_of(30, 60), prompt_of(3, 61)]
    bench.ask(prompts[:1])  # leaves the prefix in the tree
    answers = bench.ask(prompts, max_new_tokens=12)
    assert max(len(group.rows) for group in found) > 2
    for prompt, answer in zip(prompts, answers, strict=True):
        assert is_greedy(reference, prompt, answer.token_ids), prompt
    bench.close()


def test_a_seed_gives_the_same_tokens_alone_and_in_company(model: tuple[Path, object]) -> None:
    bench = Bench(model[0], deterministic=True)
    alone = bench.ask([PROMPTS[2]], temperature=1.0, seed=7, top_p=0.9)[0]
    company = bench.ask([PROMPTS[0], PROMPTS[2], *PROMPTS[3:]], temperature=1.0, seed=7, top_p=0.9)[1]
    assert alone.token_ids == company.token_ids
    bench.close()


@pytest.mark.parametrize("options", [{}, {"graphs": False}, {"num_pages": 24}], ids=str)
def test_answers_under_grammars_are_the_same_with_jumps_and_without(model: tuple[Path, object], options: dict[str, int]) -> None:
    bench = Bench(model[0], **options)  # type: ignore[arg-type]
    grammars = ['start: ("01234" /[AB]/ "56789"){1,3}', 'start: /[A-Z]{2,9}/ " = 0123"', None]
    which = [grammars[i % 3] for i in range(len(PROMPTS))]
    sampling = {"max_new_tokens": 40, "presence_penalty": 0.5, "ignore_eos": False}
    jumping = bench.ask(PROMPTS, [grammar and Guidance(grammar) for grammar in which], **sampling)
    walking = bench.ask(PROMPTS, [grammar and Guidance(grammar, may_jump=False) for grammar in which], **sampling)
    patterns = [rb"(01234[AB]56789){1,3}", rb"[A-Z]{2,9} = 0123", rb"(?s:.{40})"]
    for i, (jumped, walked) in enumerate(zip(jumping, walking, strict=True)):
        assert re.fullmatch(patterns[i % 3], bytes(token for token in jumped.token_ids if token or i % 3 == 2))
        assert jumped.token_ids == walked.token_ids
        assert (jumped.num_jumped > 3) is (i % 3 < 2) and walked.num_jumped == 0
    bench.close()


def test_graph_sizes_cover_every_number_of_rows() -> None:
    for rows in (1, 3, 64, 100, 256, 300):
        sizes = [size.num_decode for size in graph_sizes(rows, 16) if not size.num_prompt]
        assert sizes[-1] == rows and all(small < large for small, large in itertools.pairwise(sizes))
