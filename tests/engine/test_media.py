"""Prompts with pictures on the fake device, which checks itself that pictures are encoded before their places are computed."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from hashlib import sha256
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamserve.cache.kv_cache import KVCache
from streamserve.engine.client import collect
from streamserve.engine.core import Engine, EngineOptions
from streamserve.engine.encodings import Encodings
from streamserve.engine.fake import FakeStep
from streamserve.engine.plan import NO_EDITS, Edits, Plan, StepResult
from streamserve.engine.policy import POLICIES
from streamserve.engine.rotary import rotary_positions
from streamserve.engine.scheduler import Limits, Scheduler
from streamserve.errors import ContextOverflow, InvalidRequest, QueueFull
from streamserve.messages import (
    MEDIA_BASE,
    Delta,
    FinishReason,
    GenerateRequest,
    Media,
    SamplingParams,
    Span,
    media_token_ids,
)
from tests.engine.memory import MemoryRunner, expected_tokens

pytestmark = pytest.mark.anyio
VOCAB = 1000
Piece = int | tuple[str, int]  # so many words, or a picture by name and its places


class _Lost(FakeStep):
    async def done(self) -> StepResult:
        await asyncio.sleep(0)
        raise RuntimeError("lost")


class _Failing(MemoryRunner):
    """Cannot encode some pictures; of others the first step that encodes them raises."""

    def __init__(self, broken: frozenset[bytes], lost: frozenset[bytes], **more: object) -> None:
        super().__init__(**more)  # type: ignore[arg-type]
        self._broken, self._lost = broken, set(lost)

    def forward(self, plan: Plan) -> FakeStep:
        step, lost = super().forward(plan), self._lost & {encode.key for encode in plan.encodes}
        self._lost -= lost
        return _Lost(self._clock, 0.0, lambda edits: StepResult(())) if lost else step

    def _sample(self, plan: Plan, prompt_logprobs: object, edits: Edits = NO_EDITS) -> StepResult:
        result = super()._sample(plan, prompt_logprobs, edits)  # type: ignore[arg-type]
        failed = {encode.key: "no such thing" for encode in plan.encodes if encode.key in self._broken}
        return replace(result, failed=failed)


class Bench:
    def __init__(
        self,
        *,
        num_pages: int = 256,
        max_step_tokens: int = 32,
        max_running: int = 8,
        has_whole_spans: bool = False,
        encodes_beside: bool = False,
        keeps: int = 10_000,
        broken: frozenset[bytes] = frozenset(),
        lost: frozenset[bytes] = frozenset(),
        max_media_bytes: int = 1 << 30,
    ) -> None:
        self.cache = KVCache(num_pages, 4)
        self.runner = _Failing(broken, lost, vocab_size=VOCAB, page_size=4)
        self.runner.plans = []
        limits = Limits(max_running, max_step_tokens, frozenset(), has_whole_spans=has_whole_spans, encodes_beside=encodes_beside)
        self.scheduler = Scheduler(self.cache, limits, POLICIES["fcfs"], encodings=Encodings(keeps))
        options = EngineOptions(num_pages * 4 - 4, VOCAB, frozenset(), seed=0, takes_media=True, max_media_bytes=max_media_bytes)
        self.engine = Engine(self.scheduler, self.runner, options)

    async def ask(self, name: str, request: GenerateRequest) -> Delta:
        return await collect(await self.engine.submit(replace(request, id=name)))

    @property
    def plans(self) -> list[Plan]:
        assert self.runner.plans is not None
        return self.runner.plans

    @property
    def encoded(self) -> list[bytes]:
        return [encode.key for plan in self.plans for encode in plan.encodes]


@asynccontextmanager
async def running(bench: Bench) -> AsyncIterator[Bench]:
    task = asyncio.create_task(bench.engine.run())
    try:
        yield bench
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    bench.cache.check()


def key_of(name: str) -> bytes:
    return sha256(name.encode()).digest()


def request_of(*pieces: Piece, num_new: int = 4, cost: int = 8, seed: int = 0) -> GenerateRequest:
    """A prompt of words and pictures. The words depend on the seed and on their place."""
    tokens: list[int] = []
    media: list[Media] = []
    for piece in pieces:
        if isinstance(piece, int):
            tokens += [Random(seed * 10_000 + len(tokens) + i).randrange(VOCAB) for i in range(piece)]
        else:
            name, count = piece
            media.append(Media(key_of(name), (Span(len(tokens), count),), {}, cost))
            tokens += media_token_ids(key_of(name), count)
    return GenerateRequest("", tuple(tokens), SamplingParams(max_new_tokens=num_new), media=tuple(media))


async def test_the_same_picture_asked_twice_is_encoded_once_and_found_in_the_tree() -> None:
    async with running(Bench()) as bench:
        first = await bench.ask("a", request_of(5, ("cat", 40), 6))
        again = await bench.ask("b", request_of(5, ("cat", 40), 6, 9, seed=0))
    assert bench.encoded == [key_of("cat")]
    assert first.num_cached_tokens == 0
    assert again.num_cached_tokens >= 45 + 6 - 1


async def test_another_picture_of_equal_size_shares_nothing_behind_its_first_place() -> None:
    async with running(Bench()) as bench:
        await bench.ask("a", request_of(5, ("cat", 40), 6))
        other = await bench.ask("b", request_of(5, ("dog", 40), 6))
    assert other.num_cached_tokens <= 6
    assert bench.encoded == [key_of("cat"), key_of("dog")]


async def test_requests_that_bring_one_picture_together_encode_it_once() -> None:
    async with running(Bench()) as bench:
        await asyncio.gather(*(bench.ask(f"r{i}", request_of(3, ("cat", 50), 7 + i)) for i in range(6)))
    assert bench.encoded == [key_of("cat")]


async def test_encoding_draws_on_the_budget_of_the_step() -> None:
    """One picture that costs more than a step has a step to itself; cheap ones share one. Answers go on in every step."""
    async with running(Bench(max_step_tokens=32)) as bench:
        talk = await bench.engine.submit(GenerateRequest("talk", (1, 2, 3), SamplingParams(max_new_tokens=100)))
        await talk.get()
        await asyncio.gather(*(bench.ask(f"dear{i}", request_of(2, (f"dear{i}", 8), 1, cost=500)) for i in range(4)))
        await asyncio.gather(*(bench.ask(f"cheap{i}", request_of(2, (f"cheap{i}", 4), 1, cost=2)) for i in range(4)))
        await collect(talk)
    of = {key_of(f"{kind}{i}"): kind for kind in ("dear", "cheap") for i in range(4)}
    per_plan = [[of[encode.key] for encode in plan.encodes] for plan in bench.plans if plan.encodes]
    assert [kinds for kinds in per_plan if "dear" in kinds] == [["dear"]] * 4
    assert any(len(kinds) > 1 for kinds in per_plan if "cheap" in kinds)
    for plan in bench.plans[1:101]:
        assert any(row.slot == bench.plans[0].rows[0].slot for row in plan.rows), "the talk is in every step"


async def test_pictures_are_encoded_before_the_step_that_needs_them_where_that_is_done_beside_steps() -> None:
    async with running(Bench(max_step_tokens=32, encodes_beside=True)) as bench:
        talk = await bench.engine.submit(GenerateRequest("talk", (1, 2, 3), SamplingParams(max_new_tokens=100)))
        await talk.get()
        asked = [request_of(2, (f"p{i}", 30), 3, (f"q{i}", 30), 1, cost=10) for i in range(5)]
        await asyncio.gather(*(bench.ask(f"r{i}", request) for i, request in enumerate(asked)))
        await asyncio.gather(*(bench.ask(f"s{i}", request) for i, request in enumerate(asked)))  # all is in the tree
        await collect(talk)
    begun = {encode.key: at for at, plan in enumerate(bench.plans) for encode in plan.encodes}
    assert len(bench.encoded) == len(begun) == 10
    ids = {key: media_token_ids(key, 30) for key in begun}
    num_ahead = 0
    for at, plan in enumerate(bench.plans):
        num_ahead += len(plan.encodes)
        for row in plan.rows:
            tokens = set(row.token_ids or ())
            assert all(begun[key] < at for key in begun if tokens & set(ids[key]))
            num_ahead -= sum(ids[key][-1] in tokens for key in begun)
        assert num_ahead <= 3


async def test_a_picture_that_cannot_be_encoded_ends_its_own_requests_only() -> None:
    async with running(Bench(broken=frozenset({key_of("bad")}))) as bench:
        bad, worse, good, words = await asyncio.gather(
            bench.ask("a", request_of(3, ("bad", 20), 5)),
            bench.ask("b", request_of(4, ("good", 20), 2, ("bad", 20), 5)),
            bench.ask("c", request_of(3, ("good", 20), 5)),
            bench.ask("d", request_of(30)),
        )
        again = await bench.ask("e", request_of(3, ("bad", 20), 5))
    for failed in (bad, worse, again):
        assert failed.finish_reason is FinishReason.ERROR
        assert failed.error is not None and "no such thing" in failed.error
    assert again.num_cached_tokens <= 3, "nothing that was computed without the picture is kept"
    assert good.finish_reason is words.finish_reason is FinishReason.LENGTH


async def test_who_has_a_picture_of_a_step_that_raised_ends_with_it_and_the_next_one_encodes_it_anew() -> None:
    async with running(Bench(lost=frozenset({key_of("cat")}))) as bench:
        first, second, words = await asyncio.gather(
            bench.ask("a", request_of(3, ("cat", 20), 5)),
            bench.ask("b", request_of(4, ("cat", 20), 5)),  # in the step behind that one, and relies on it
            bench.ask("c", request_of(30)),
        )
        later = await bench.ask("d", request_of(4, ("cat", 20), 5))
    for ended in (first, second):
        assert ended.finish_reason is FinishReason.ERROR and ended.error is not None and "lost" in ended.error
    assert words.finish_reason is later.finish_reason is FinishReason.LENGTH
    assert bench.encoded == [key_of("cat")] * 2


async def test_the_runner_forgets_what_could_not_be_encoded() -> None:
    async with running(Bench(broken=frozenset({key_of(f"bad{i}") for i in range(5)}))) as bench:
        for i in range(5):
            await bench.ask(f"{i}", request_of(3, (f"bad{i}", 20), 5))
        await bench.ask("good", request_of(3, ("good", 20), 5))
    assert bench.runner._encoded == {key_of("good")}


async def test_a_long_prompt_gives_up_pictures_whose_places_are_computed() -> None:
    async with running(Bench(keeps=50)) as bench:
        await bench.ask("a", request_of(*(part for i in range(12) for part in (2, (f"p{i}", 20)))))
    kept: set[bytes] = set()
    for plan in bench.plans:
        kept -= set(plan.forgets)
        kept |= {encode.key for encode in plan.encodes}
        assert len(kept) <= 5


async def test_embeddings_that_are_not_used_make_room_for_new_ones() -> None:
    async with running(Bench(keeps=100, num_pages=40)) as bench:
        for round in range(2):
            for i in range(6):
                await bench.ask(f"{round}.{i}", request_of(3, (f"p{i}", 40), 2))
                bench.engine.flush_cache()
    kept: set[bytes] = set()
    for plan in bench.plans:
        kept -= set(plan.forgets)
        kept |= {encode.key for encode in plan.encodes}
        assert len(kept) * 40 <= 160, "two are kept, and those that the plan adds"
    assert len(bench.encoded) == 12


async def test_spans_that_must_be_whole_are_in_one_row() -> None:
    async with running(Bench(max_step_tokens=16, has_whole_spans=True)) as bench:
        asked = request_of(5, ("cat", 40), 30, ("dog", 7), 4)
        first = await bench.ask("a", asked)
        cut = replace(asked, token_ids=asked.token_ids[:44] + (3,) * 8, media=(Media(key_of("cat"), (Span(5, 39),), {}),))
        await bench.ask("b", cut)  # agrees with the first up to the middle of the picture
        again = await bench.ask("c", asked)
    for plan in bench.plans:
        for row in plan.rows:
            assert not 5 < row.start < 44 and not 5 < row.start + row.num_tokens < 44
    assert again.token_ids == first.token_ids and again.num_cached_tokens == len(asked.token_ids) - 1


async def test_ids_of_places_without_a_picture_are_refused_and_so_are_log_probabilities_of_places() -> None:
    async with running(Bench()) as bench:
        with pytest.raises(InvalidRequest, match="not in the vocabulary"):
            await bench.engine.submit(GenerateRequest("a", (1, MEDIA_BASE + 5)))
        asked = request_of(3, ("cat", 5), 2)
        with pytest.raises(InvalidRequest, match="begin at 8"):
            await bench.engine.submit(replace(asked, sampling=SamplingParams(max_new_tokens=1, prompt_logprobs=1)))


@pytest.mark.parametrize("is_whole", [False, True])
async def test_log_probabilities_may_begin_behind_a_picture(is_whole: bool) -> None:
    first = 23 + is_whole
    asked = request_of(3, ("cat", 20), 6)
    async with running(Bench(max_step_tokens=8, has_whole_spans=is_whole)) as bench:
        for start in range(first, 30):
            sampling = SamplingParams(max_new_tokens=1, prompt_logprobs=1, prompt_logprobs_start=start)
            found = (await bench.ask(f"from {start}", replace(asked, sampling=sampling))).prompt_logprobs
            shown = [entry and entry.token_id for entry in found or ()]
            assert shown == [None] * start + list(asked.token_ids[start:])
        sampling = SamplingParams(max_new_tokens=1, prompt_logprobs=1, prompt_logprobs_start=first - 1)
        with pytest.raises(InvalidRequest, match=f"begin at {first}"):
            await bench.engine.submit(replace(asked, id="in it", sampling=sampling))


async def test_pictures_of_requests_that_wait_are_bounded_by_their_bytes() -> None:
    def show(name: str, num_bytes: int) -> GenerateRequest:
        asked = request_of(3, (name, 8), 2, num_new=20)
        (media,) = asked.media
        return replace(asked, media=(replace(media, inputs={"pixels": np.zeros(num_bytes, np.uint8), "scale": 1}),))

    async with running(Bench(max_media_bytes=100)) as bench:
        large, half = show("large", 300), show("half", 50)
        alone = await bench.engine.submit(replace(large, id="alone"))
        same = await bench.engine.submit(replace(large, id="same"))  # as n = 2 brings the same arrays
        with pytest.raises(QueueFull, match="hold 0 MiB"):
            await bench.engine.submit(replace(half, id="too much"))
        assert bench.engine.abort("alone")
        with pytest.raises(QueueFull):
            await bench.engine.submit(replace(half, id="too much"))
        await asyncio.gather(collect(alone), collect(same))
        answers = await asyncio.gather(bench.ask("half", half), bench.ask("other half", show("other half", 50)))
    assert [len(answer.token_ids) for answer in answers] == [20, 20]
    assert bench.scheduler.held.num_bytes == 0


async def test_a_clip_whose_times_reach_beyond_the_context_is_refused_and_one_that_fits_leaves_less_to_the_answer() -> None:
    def watch(frame_step: float) -> GenerateRequest:
        ids, span = media_token_ids(key_of("clip"), 40), Span(2, 40, (10, 2, 2), frame_step)
        return GenerateRequest("", (1, 2, *ids, 3), media=(Media(key_of("clip"), (span,), {}),))

    async with running(Bench(num_pages=32)) as bench:
        for frame_step in (20.0, 1e12):
            with pytest.raises(ContextOverflow, match="times of its videos"):
                await bench.engine.submit(watch(frame_step))
        short, long = await bench.ask("short", watch(1.0)), await bench.ask("long", watch(8.0))
    context_len = 32 * 4 - 4
    assert len(short.token_ids) == context_len - 43
    assert len(long.token_ids) == context_len - 43 - (9 * 8 + 1 - 40)


PIECES = st.lists(
    st.one_of(st.integers(1, 12), st.tuples(st.sampled_from("abc"), st.sampled_from((1, 4, 9, 30)))), min_size=1, max_size=6
)


@settings(max_examples=40, deadline=None)
@given(
    asked=st.lists(PIECES, min_size=1, max_size=8),
    whole=st.booleans(),
    beside=st.booleans(),
    num_pages=st.sampled_from((60, 200)),
    max_step_tokens=st.sampled_from((8, 16, 64)),
    keeps=st.sampled_from((0, 50, 10_000)),
)
async def test_any_mix_of_words_and_pictures_gives_each_its_own_answer(
    asked: list[list[Piece]], whole: bool, beside: bool, num_pages: int, max_step_tokens: int, keeps: int
) -> None:
    requests = []
    for pieces in asked:
        sized = [(f"{piece[0]}{piece[1]}", piece[1]) if isinstance(piece, tuple) else piece for piece in pieces]
        requests.append(request_of(*sized, 1, num_new=6))
    bench = Bench(num_pages=num_pages, max_step_tokens=max_step_tokens, has_whole_spans=whole, encodes_beside=beside, keeps=keeps)
    async with running(bench):
        answers = await asyncio.gather(*(bench.ask(f"r{i}", request) for i, request in enumerate(requests)))
    for request, answer in zip(requests, answers, strict=True):
        assert list(answer.token_ids) == expected_tokens(bench.runner, list(request.token_ids), 6)


def test_positions_of_a_prompt_with_two_pictures() -> None:
    """After the example in Qwen2-VL's own rule: text counts on, places count frames, rows, columns."""
    media = (Media(b"a", (Span(2, 6, (1, 2, 3)),), {}), Media(b"b", (Span(9, 2, (2, 1, 1)),), {}))
    positions, shift = rotary_positions(12, media)
    expected = [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6, 7, 8],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6, 6, 8],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6, 6, 8],
    ]
    np.testing.assert_array_equal(positions, expected)
    assert shift == -3
