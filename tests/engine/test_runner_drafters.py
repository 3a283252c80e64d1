"""Drafters with networks of their own: what they guess is what their definition says, in chunks, on shared and copied pages and
after preemption; and no answer depends on it.

A model that guesses for itself is always right, at any temperature: so its guesses show whether it has read what it should. Heads
are compared with plain torch over whole sequences (tests/models/tiny_heads.py).
"""

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig

from streamserve.build import build
from streamserve.cache.kv_cache import KVCache
from streamserve.cache.pool import KVPool
from streamserve.config import CacheConfig, Config, DeviceConfig, ModelConfig, SchedulerConfig
from streamserve.engine.client import collect
from streamserve.engine.core import Engine, EngineOptions
from streamserve.engine.drafters import draft_model
from streamserve.engine.drafters.find import Room, load_drafter
from streamserve.engine.drafters.runner_drafter import RunnerDrafter
from streamserve.engine.drafters.runner_drafts import OfferedDrafter
from streamserve.engine.embeddings import Embeddings
from streamserve.engine.plan import Admission, Append, Edits, Plan, Row, RowResult
from streamserve.engine.policy import POLICIES
from streamserve.engine.runner import ModelRunner
from streamserve.engine.sampler import Sampler
from streamserve.engine.scheduler import Limits, Scheduler
from streamserve.engine.speculation import Offer, Speculation
from streamserve.engine.stages import default_stages
from streamserve.engine.step_costs import StepCosts
from streamserve.errors import CheckpointError, ConfigError
from streamserve.kernels.ops import Batch
from streamserve.messages import Delta, GenerateRequest, Media, SamplingParams, Span, media_token_ids
from streamserve.models.checkpoint import open_checkpoint
from streamserve.models.drafting import open_drafter
from streamserve.models.eagle import EagleFile
from streamserve.models.network import build_network, choose_kernels
from streamserve.resolve import Resolved
from streamserve.text.byte_tokenizer import byte_text_model
from streamserve.text.tokenizer import load_tokenizer
from streamserve.text.vocabulary import refuse_other_tokens
from tests.models.conftest import one_thread as one_thread
from tests.models.tiny import SHAPE, build_reference, from_config
from tests.models.tiny_heads import EAGLE_CONFIG, eagle_states, mtp_states, norm, save_eagle, save_mimo, streams
from tests.text.toys import byte_level_folder

pytestmark = pytest.mark.anyio
VOCAB, CONTEXT, MAX_DRAFTS = SHAPE["vocab_size"], 96, 3
GREEDY = SamplingParams(temperature=0.0)
Guesses = list[tuple[tuple[int, ...], tuple[int, ...]]]  # an answer's tokens so far with its prompt, and what was guessed


class Watched:
    """Writes down what a drafter guesses, and behind which tokens."""

    def __init__(self, drafter: RunnerDrafter) -> None:
        self._drafter = drafter
        self._tokens: dict[int, list[int]] = {}
        self.guesses: Guesses = []
        self.num_copies = self.num_admissions = 0

    def forward(self, plan: Plan, batch: Batch) -> Tensor:
        for admission in plan.admissions:
            self._tokens[admission.slot] = list(admission.history)
        for append in plan.appends:
            self._tokens[append.slot] += append.token_ids
        self.num_copies += len(plan.copies)
        self.num_admissions += len(plan.admissions)
        return self._drafter.forward(plan, batch)

    def follow(self, plan: Plan, results: Sequence[RowResult]) -> list[tuple[int, ...]]:
        found = self._drafter.follow(plan, results)
        for row, result, guess in zip(plan.rows, results, found, strict=True):
            self._tokens[row.slot] += result.token_ids
            assert len(guess) == (min(row.num_wanted, MAX_DRAFTS) if result.token_ids else 0)
            if guess:
                self.guesses.append((tuple(self._tokens[row.slot]), guess))
        return found


class Always(Speculation):
    """Verifies whatever is guessed."""

    def __init__(self) -> None:
        super().__init__(OfferedDrafter(MAX_DRAFTS), StepCosts.free())

    def may_pay(self, num_rows: int, room: int) -> bool:
        return True

    def choose(self, offers: Sequence[Offer], num_rows: int, room: int) -> list[Sequence[int]]:
        return [one.drafts.guess(one.most).token_ids if one.most > 0 else () for one in offers]

    def is_worth_waiting(self, offers: Sequence[Offer], num_rows: int, room: int) -> bool:
        return True


class Eyes:
    """An encoder of pictures that are a seed and a number of places."""

    whole_spans = False

    def __init__(self, hidden_size: int) -> None:
        self._hidden_size = hidden_size

    def encode(self, inputs: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        seeded = [(torch.Generator().manual_seed(one["seed"]), one["places"]) for one in inputs]
        return [torch.randn(places, self._hidden_size, generator=generator) for generator, places in seeded]


class Bench:
    """A tiny model, and what guesses for it; `kind` None: nothing."""

    def __init__(
        self,
        model: Path,
        kind: str | None,
        path: Path | None = None,
        *,
        num_pages: int = 64,
        page_size: int = 4,
        sees: bool = False,
    ) -> None:
        checkpoint = open_checkpoint(model)
        choices = choose_kernels(checkpoint, dtype="float32", page_size=page_size)
        self.pool = KVPool(checkpoint.spec, num_pages=num_pages, page_size=page_size)
        self.network = build_network(checkpoint, pool=self.pool, dtype="float32", choices=choices)
        self.watched: Watched | None = None
        self.num_slots = 4
        if kind is not None:
            opened = open_drafter(kind, None if path is None else str(path), checkpoint, page_size=page_size, dtype="float32")
            assert opened is not None and opened.needs(torch.float32, choices).weight_bytes > 0
            room = Room(num_pages, page_size, self.num_slots, MAX_DRAFTS, torch.float32, 1, choices)
            self.watched = Watched(load_drafter(opened, self.network, room))
        sampler = Sampler(VOCAB, default_stages(frozenset()))
        hidden = checkpoint.spec.hidden_size
        eyes = Embeddings(Eyes(hidden), num_slots=self.num_slots, hidden_size=hidden, has_rotary=False) if sees else None
        self.runner = ModelRunner(
            *(self.network, self.pool, sampler),
            num_slots=self.num_slots,
            max_len=CONTEXT,
            drafter=self.watched,
            embeddings=eyes,
        )
        self.cache = KVCache(num_pages, page_size)
        limits = Limits(self.num_slots, 8, frozenset())
        speculation = None if kind is None else Always()
        scheduler = Scheduler(self.cache, limits, POLICIES["fcfs"], speculation=speculation)
        self.engine = Engine(scheduler, self.runner, EngineOptions(CONTEXT, VOCAB, frozenset(), seed=0, takes_media=sees))

    async def answers(
        self, *requests: tuple[Sequence[int], int], one_by_one: bool = False, media: tuple[Media, ...] = (), **sampling: Any
    ) -> list[Delta]:
        """To prompts, with so many tokens each; all have the same `media`."""

        async def ask(i: int, prompt: Sequence[int], num_new: int) -> Delta:
            params = SamplingParams(max_new_tokens=num_new, seed=i, ignore_eos=True, **sampling)
            return await collect(await self.engine.submit(GenerateRequest(f"r{i}", tuple(prompt), params, media=media)))

        running = asyncio.create_task(self.engine.run())
        try:
            if one_by_one:
                return [await ask(i, *request) for i, request in enumerate(requests)]
            return list(await asyncio.gather(*(ask(i, *request) for i, request in enumerate(requests))))
        finally:
            running.cancel()
            await asyncio.wait([running])
            self.runner.close()
            self.cache.check()


def prompt_of(length: int, seed: int = 0) -> list[int]:
    tokens: list[int] = torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return tokens


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    build_reference("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def eagle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("eagle")
    save_eagle(folder, config={**EAGLE_CONFIG, "eagle_aux_hidden_state_layer_ids": [0, 1, 2]})
    return folder


@pytest.fixture(scope="module")
def mimo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mimo")
    save_mimo(folder)
    return folder


def accepted(answers: Sequence[Delta]) -> tuple[int, int]:
    return sum(answer.num_drafted for answer in answers), sum(answer.num_accepted for answer in answers)


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 0.8, "top_p": 0.9, "top_k": 20}]
)
@pytest.mark.parametrize("page_size", [1, 4])
async def test_a_model_that_guesses_for_itself_is_always_right(sampling: dict[str, float], page_size: int, llama: Path) -> None:
    bench = Bench(llama, "draft_model", llama, num_pages=256 // page_size, page_size=page_size)
    requests = [(prompt_of(n, seed=n), 22) for n in (1, 5, 19, 33)]
    answers = await bench.answers(*requests, **sampling)
    num_drafted, num_accepted = accepted(answers)
    assert num_drafted == num_accepted > 25
    plain = await Bench(llama, None).answers(*requests, **sampling)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in plain]


async def test_it_is_right_behind_prefixes_that_others_have_computed_and_copied_pages(llama: Path) -> None:
    bench = Bench(llama, "draft_model", llama)
    stem = prompt_of(30)
    requests = [(stem, 10), (stem, 10), ([*stem[:27], *prompt_of(5, 1)], 10), ([*stem[:14], *prompt_of(9, 2)], 10)]
    answers = await bench.answers(*requests, one_by_one=True, temperature=0.0)
    assert [answer.num_cached_tokens for answer in answers] == [0, 29, 27, 14]
    assert bench.watched is not None and bench.watched.num_copies >= 3
    num_drafted, num_accepted = accepted(answers)
    assert num_drafted == num_accepted > 0


async def test_it_is_right_after_preemption(llama: Path) -> None:
    bench = Bench(llama, "draft_model", llama, num_pages=25)
    requests = [(prompt_of(12, seed=n), 40) for n in range(4)]
    answers = await bench.answers(*requests, temperature=0.0)
    assert bench.watched is not None and bench.watched.num_admissions > 4
    num_drafted, num_accepted = accepted(answers)
    assert num_drafted == num_accepted > 0
    plain = await Bench(llama, None).answers(*requests, temperature=0.0)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in plain]


def eagle_guesses(folder: Path) -> Callable[[Sequence[int]], tuple[int, ...]]:
    """What an EAGLE-3 head guesses behind these tokens: by its definition, over the whole of them."""
    weights = save_eagle(folder, config={**EAGLE_CONFIG, "eagle_aux_hidden_state_layer_ids": [0, 1, 2]})
    model = build_reference("llama")
    embedding = model.get_input_embeddings().weight.detach()

    def guess(tokens: Sequence[int]) -> tuple[int, ...]:
        features = torch.cat(streams(model, list(tokens[:-1]))[:3], -1) @ weights["fc.weight"].T
        behind, guesses = list(tokens[1:]), []
        for _ in range(MAX_DRAFTS):
            state = eagle_states(features, behind, weights, embedding)[-1:]
            logits = norm(state, weights["norm.weight"]) @ weights["lm_head.weight"].T
            best = int(logits.argmax())
            guesses.append(best + int(weights["d2t"][best]))
            features, behind = torch.cat((features, state)), [*behind, guesses[-1]]
        return tuple(guesses)

    return guess


def mtp_guesses(folder: Path) -> Callable[[Sequence[int]], tuple[int, ...]]:
    """The same of MiMo's layer."""
    model, weights = save_mimo(folder)
    embedding, head = model.get_input_embeddings().weight.detach(), model.lm_head.weight.detach()

    def guess(tokens: Sequence[int]) -> tuple[int, ...]:
        hidden = streams(model, list(tokens[:-1]))[-1]
        behind, guesses = list(tokens[1:]), []
        for _ in range(MAX_DRAFTS):
            state = mtp_states(hidden, behind, weights, embedding)[-1:]
            guesses.append(int(F.linear(state, head).argmax()))
            hidden, behind = torch.cat((hidden, state)), [*behind, guesses[-1]]
        return tuple(guesses)

    return guess


@pytest.mark.parametrize("kind", ["eagle", "mtp"])
@pytest.mark.parametrize("page_size", [1, 4])
async def test_heads_guess_what_their_definition_says_and_change_no_answer(
    kind: str, page_size: int, llama: Path, mimo: Path, eagle: Path, tmp_path: Path
) -> None:
    model = llama if kind == "eagle" else mimo
    bench = Bench(model, kind, eagle if kind == "eagle" else None, num_pages=256 // page_size, page_size=page_size)
    stem = [3, *prompt_of(20)]
    requests = [*(([n, *prompt_of(n, seed=n)], 14) for n in (1, 8, 30)), (stem, 8), (stem, 8)]
    answers = await bench.answers(*requests, temperature=0.0)
    assert answers[4].num_cached_tokens == 20
    wanted = (eagle_guesses if kind == "eagle" else mtp_guesses)(tmp_path)
    assert bench.watched is not None and len(bench.watched.guesses) > 40
    assert len({guess for _, guess in bench.watched.guesses}) > 8
    for tokens, guess in bench.watched.guesses:
        assert guess == wanted(tokens)[: len(guess)]
    plain = await Bench(model, None).answers(*requests, temperature=0.0)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in plain]
    assert accepted(answers)[0] > 0


@pytest.mark.parametrize("kind", ["eagle", "mtp"])
async def test_heads_change_no_answer_at_a_temperature_with_scarce_pages(kind: str, llama: Path, mimo: Path, eagle: Path) -> None:
    model = llama if kind == "eagle" else mimo
    bench = Bench(model, kind, eagle if kind == "eagle" else None, num_pages=25)
    stem = prompt_of(10, seed=3)
    requests = [([*stem, *prompt_of(n, seed=n)], 40) for n in (1, 2, 6, 8)]
    answers = await bench.answers(*requests, temperature=0.9, top_p=0.95)
    assert bench.watched is not None and bench.watched.num_admissions > 4
    plain = await Bench(model, None).answers(*requests, temperature=0.9, top_p=0.95)
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in plain]


@pytest.mark.parametrize("kind", ["eagle", "mtp", "draft_model"])
async def test_guessers_change_no_answer_about_a_picture_that_is_computed_in_parts(
    kind: str, llama: Path, mimo: Path, eagle: Path
) -> None:
    model = mimo if kind == "mtp" else llama
    path = {"eagle": eagle, "mtp": None, "draft_model": llama}[kind]
    media = (Media(b"cat", (Span(4, 21),), {"seed": 1, "places": 21}),)
    requests = [([*prompt_of(4), *media_token_ids(b"cat", 21), *prompt_of(6, seed=n)], 20) for n in range(3)]
    answers = await Bench(model, kind, path, sees=True).answers(*requests, media=media, temperature=0.0)
    plain = await Bench(model, None, sees=True).answers(*requests, media=media, temperature=0.0)
    assert [answer.error for answer in answers] == [None] * 3
    assert [answer.token_ids for answer in answers] == [answer.token_ids for answer in plain]
    assert accepted(answers)[0] > 0


class Hand:
    """One request by hand-made plans, on pages that lie anywhere."""

    def __init__(self, bench: Bench, prompt: Sequence[int]) -> None:
        self.bench, self.step = bench, 0
        self.tokens, self.num_prompt, self.computed = list(prompt), len(prompt), 0
        admission = Admission(0, GREEDY, tuple(prompt), len(prompt), 0)
        pages = tuple(range(len(self.bench.pool.k[0]) - 1, 40, -1))
        self._first = Plan(0, (admission,), (), (Row(0, 0, 1, (prompt[0],), pages, samples=False),))
        self.bench.runner.execute(self._first)
        self.computed = 1

    def run(self, *, num_wanted: int = 0, edits: Edits | None = None, appends: Sequence[int] = ()) -> RowResult:
        """All known tokens that were not computed yet."""
        self.tokens += appends
        appended = (Append(0, tuple(appends), len(self.tokens) - self.num_prompt),) if appends else ()
        new = tuple(self.tokens[self.computed :])
        row = Row(0, self.computed, len(new), new, num_wanted=num_wanted)
        self.step += 1
        [result] = self.bench.runner.execute(Plan(self.step, (), (), (row,), appended), edits or Edits()).rows
        self.computed += len(new)
        self.tokens += result.token_ids
        return result

    def close(self) -> None:
        self.bench.runner.close()


def continuation(hand: Hand, model: Any, count: int) -> tuple[int, ...]:
    tokens = list(hand.tokens)
    for _ in range(count):
        with torch.inference_mode():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tuple(tokens[len(hand.tokens) :])


def test_a_draft_model_reads_nothing_while_nobody_wants_guesses_and_catches_up(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hand, model = Hand(Bench(llama, "draft_model", llama), prompt_of(9)), build_reference("llama")
    for _ in range(6):
        assert hand.run().drafts == ()
    assert hand.run(num_wanted=2).drafts == continuation(hand, model, 2)
    for _ in range(6):
        hand.run()
    monkeypatch.setattr(draft_model, "MAX_CATCH_UP", 3)
    assert hand.bench.watched is not None
    drafter = hand.bench.watched._drafter
    hand.bench.runner._drafter = drafter  # unwatched: it may guess nothing although something is wanted
    assert hand.run(num_wanted=3).drafts == ()  # seven tokens behind, three a step, one more each time
    assert hand.run(num_wanted=3).drafts == ()
    assert hand.run(num_wanted=3).drafts == continuation(hand, model, 3)
    hand.close()


@pytest.mark.parametrize("kind", ["eagle", "mtp"])
def test_a_head_follows_tokens_that_were_appended_in_the_place_of_a_sample(
    kind: str, llama: Path, mimo: Path, eagle: Path, tmp_path: Path
) -> None:
    hand = Hand(Bench(llama if kind == "eagle" else mimo, kind, eagle if kind == "eagle" else None), prompt_of(9))
    wanted = (eagle_guesses if kind == "eagle" else mtp_guesses)(tmp_path)
    assert hand.run(num_wanted=3).drafts == wanted(hand.tokens)
    in_vain = Edits(unwanted=frozenset({0}))
    assert hand.run(num_wanted=3, edits=in_vain).token_ids == ()
    assert hand.run(num_wanted=2, appends=prompt_of(4, seed=5)).drafts == wanted(hand.tokens)[:2]
    assert hand.run(num_wanted=3).drafts == wanted(hand.tokens)
    hand.close()


def test_what_cannot_guess_for_a_model_is_refused_with_the_reason(llama: Path, mimo: Path, tmp_path: Path) -> None:
    target = open_checkpoint(llama)
    with pytest.raises(CheckpointError, match="num_nextn_predict_layers"):
        open_drafter("mtp", None, target, page_size=16)
    save_mimo(tmp_path, has_mtp=False)
    with pytest.raises(CheckpointError, match="saved without them"):
        open_drafter("mtp", None, open_checkpoint(tmp_path), page_size=16)
    other = build_reference("llama")
    other.resize_token_embeddings(97 + 2000)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match=r"has 2097 tokens, .* 97; a model can guess only for one with the same vocabulary"):
        open_drafter("draft_model", str(tmp_path / "other"), target, page_size=16)
    choices = choose_kernels(target)
    packed = {**choices, "network": replace(choices["network"], name="packed")}
    head = open_drafter("mtp", None, open_checkpoint(mimo), page_size=16)
    assert head is not None
    with pytest.raises(ConfigError, match=r"--speculative mtp needs the model's last matrix.* add --dtype float32"):
        head.needs(torch.float32, packed)


def test_memory_that_a_drafter_needs_is_what_it_takes(llama: Path, mimo: Path, eagle: Path) -> None:
    num_parameters = {
        "draft_model": open_checkpoint(llama).num_parameters,
        "eagle": EagleFile(eagle, open_checkpoint(llama).spec).num_parameters,
        "mtp": open_checkpoint(mimo).num_optional_parameters,
    }
    for kind, model, path, layers in (("draft_model", llama, llama, 3), ("eagle", llama, eagle, 1), ("mtp", mimo, None, 1)):
        target = open_checkpoint(model)
        opened = open_drafter(kind, None if path is None else str(path), target, page_size=16, dtype="float32")
        assert opened is not None
        needs = opened.needs(torch.float32, choose_kernels(target))
        assert needs.kv_bytes_per_token == 2 * layers * 2 * 8 * 4  # keys and values, 2 heads of 8 numbers of 4 bytes
        assert needs.weight_bytes == 4 * num_parameters[kind] > 0
    assert open_drafter("ngram", None, open_checkpoint(llama), page_size=16) is None


@pytest.mark.parametrize("kind", ["draft_model", "eagle", "mtp"])
def test_what_the_setting_names_is_built_and_its_memory_is_counted(kind: str, tmp_path: Path) -> None:
    folder = byte_level_folder(tmp_path / "target")
    vocab_size = load_tokenizer(folder).vocab_size
    config = {
        **SHAPE,
        "vocab_size": vocab_size,
        "model_type": "mimo",
        "num_nextn_predict_layers": 1,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    small = byte_level_folder(tmp_path / "small")
    from_config(LlamaConfig(**{**SHAPE, "vocab_size": vocab_size, "num_hidden_layers": 2})).save_pretrained(small)
    layers = {"eagle_aux_hidden_state_layer_ids": [0, 1, 2], "vocab_size": vocab_size}
    save_eagle(tmp_path / "eagle", config={**EAGLE_CONFIG, **layers})
    asked = {"draft_model": f"draft_model={small},3", "eagle": f"eagle={tmp_path / 'eagle'},3", "mtp": "mtp"}[kind]

    def answer(speculative: str) -> tuple[Delta, Resolved]:
        built = build(
            Config(
                model=ModelConfig(model_path=str(folder), load_format="dummy", dtype="float32", context_length=64),
                cache=CacheConfig(max_total_tokens=1024),
                scheduler=SchedulerConfig(speculative=speculative, max_running_requests=2),
                device=DeviceConfig(device="cpu", threads=1),
            )
        )

        if (speculation := built.engine._scheduler._speculation) is not None:
            speculation.costs = StepCosts.free()  # or the times of this machine would say whether there are guesses

        async def ask() -> Delta:
            running = asyncio.create_task(built.engine.run())
            params = SamplingParams(max_new_tokens=30, temperature=0.0, ignore_eos=True)
            try:
                return await collect(await built.engine.submit(GenerateRequest("a", (5, 6, 7), params)))
            finally:
                running.cancel()
                await asyncio.wait([running])

        try:
            assert built.resolved is not None
            return asyncio.run(ask()), built.resolved
        finally:
            built.close()

    (plain, without), (guessed, resolved) = answer("none"), answer(asked)
    assert guessed.token_ids == plain.token_ids and len(plain.token_ids) == 30
    assert guessed.num_drafted > 0 == plain.num_drafted
    layer = 2 * 2 * 8 * 4
    assert resolved.kv_bytes_per_token - without.kv_bytes_per_token == layer * (2 if kind == "draft_model" else 1)
    assert resolved.weight_bytes > without.weight_bytes


def test_a_model_with_other_tokens_is_refused_and_one_with_other_control_tokens_is_not(tmp_path: Path) -> None:
    ours = load_tokenizer(byte_level_folder(tmp_path / "a"))
    refuse_other_tokens(ours, load_tokenizer(byte_level_folder(tmp_path / "b")), of=tmp_path / "b")
    names = {"<|end|>": "<|eot|>", "<think>": "<plan>"}
    text = (tmp_path / "b" / "tokenizer.json").read_text()
    for before, after in names.items():
        text = text.replace(before, after)
    (tmp_path / "b" / "tokenizer.json").write_text(text)
    refuse_other_tokens(ours, load_tokenizer(tmp_path / "b"), of=tmp_path / "b")
    other = byte_text_model().tokenizer
    with pytest.raises(CheckpointError, match=r"has other tokens than the model served: \d+ of 259 differ, the first is 0"):
        refuse_other_tokens(ours, other, of=tmp_path / "c")
