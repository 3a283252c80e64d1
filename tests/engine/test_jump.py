"""The engine under grammars and limits of thought, on the fake device: the same answers with jumps and without, in any company.

The memory runner checks that every position a row reads holds exactly its request's tokens.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from streamserve.cache.kv_cache import KVCache
from streamserve.engine.client import collect
from streamserve.engine.core import Engine, EngineOptions
from streamserve.engine.fake import _Slot
from streamserve.engine.grammar import GrammarLimits, Grammars
from streamserve.engine.guide import Guide
from streamserve.engine.pause import BurstLimits
from streamserve.engine.plan import Edits, Plan
from streamserve.engine.policy import POLICIES
from streamserve.engine.scheduler import FEW_ROWS, Limits, Scheduler
from streamserve.errors import InvalidRequest
from streamserve.messages import Delta, FinishReason, GenerateRequest, Guidance, SamplingParams, ThoughtLimits
from tests.engine.memory import MemoryRunner
from tests.engine.words import END, END_THINK, ENDS, THINK, TOKENS, Words, favourite, text_of

pytestmark = pytest.mark.anyio
EXAMPLES = int(os.environ.get("STREAMSERVE_EXAMPLES", "40"))
WORDS = Words()
VOCAB = len(TOKENS)


def of_schema(schema: dict[str, object]) -> str:
    return json.dumps({"grammars": [{"json_schema": {**schema, "x-guidance": {"whitespace_flexible": False}}}]})


PERSON = of_schema(
    {
        "type": "object",
        "properties": {"name": {"enum": ["red", "green"]}, "kind": {"const": "the green is red"}, "n": {"type": "boolean"}},
        "required": ["name", "kind", "n"],
        "additionalProperties": False,
    }
)
CONST = of_schema({"const": {"name": "the red"}})
LETTERS = "start: /[a-f]*/"
CHOICES = 'start: ("red is the " | "redder than " | "green ") /[0-9]{2}/ " is done"'
GRAMMARS = (PERSON, CONST, LETTERS, CHOICES)


class Runner(MemoryRunner):
    """A model that never ends an answer or a thought by itself."""

    def _token(self, slot: _Slot) -> int:
        return super()._token(slot) % END


class Bench:
    """An engine over the small vocabulary."""

    def __init__(
        self,
        *,
        num_pages: int = 128,
        page_size: int = 4,
        max_running: int = 8,
        max_step_tokens: int = 32,
        max_appended_rows: int | None = None,
        bursts: BurstLimits | None = None,
        grammar_limits: GrammarLimits | None = None,
    ) -> None:
        self.cache = KVCache(num_pages, page_size)
        self.runner = Runner(vocab_size=VOCAB, page_size=page_size, step_s=0.0, eos_token_id=END)
        self.runner.plans = []
        limits = Limits(max_running, max_step_tokens, ENDS, bursts or BurstLimits(), max_appended_rows=max_appended_rows)
        self.scheduler = Scheduler(self.cache, limits, POLICIES["fcfs"])
        self.grammars = Grammars(WORDS, vocab_size=VOCAB, eos_token_ids=ENDS, limits=grammar_limits, num_lanes=3)
        context_len = min(4096, (num_pages - 1) * page_size)
        self.engine = Engine(self.scheduler, self.runner, EngineOptions(context_len, VOCAB, ENDS, seed=0), grammars=self.grammars)

    async def ask(
        self,
        id: str,
        prompt: list[int],
        grammar: str | None = None,
        *,
        thought: ThoughtLimits | None = None,
        may_jump: bool = True,
        max_new_tokens: int = 100,
        **sampling: object,
    ) -> Delta:
        guidance = None if grammar is None and thought is None else Guidance(grammar, may_jump=may_jump, thought=thought)
        params = SamplingParams(max_new_tokens=max_new_tokens, **sampling)  # type: ignore[arg-type]
        return await collect(await self.engine.submit(GenerateRequest(id, tuple(prompt), params, guidance=guidance)))

    @property
    def plans(self) -> list[Plan]:
        assert self.runner.plans is not None
        return self.runner.plans


@asynccontextmanager
async def running(bench: Bench) -> AsyncIterator[Bench]:
    task = asyncio.create_task(bench.engine.run())
    try:
        yield bench
    finally:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        bench.grammars.close()
    bench.cache.check()


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = Random(seed)
    return [rng.randrange(256) for _ in range(length)]


async def expected(bench: Bench, prompt: list[int], grammar: str | None, num_new: int) -> list[int]:
    """The answer, one token at a time: the fake model's favourite, or the next token that the grammar allows."""
    answer: list[int] = []
    if grammar is None:
        return [favourite(bench.runner, prompt, index) for index in range(num_new)]
    matcher, _ = await bench.grammars.matcher(grammar, "")
    guide = Guide(Guidance(), matcher=matcher, token_bytes=WORDS.token_bytes, jumps=False)
    guide.begin()
    while len(answer) < num_new and not guide.is_over:
        words_W = np.frombuffer(matcher.compute_bitmask(), np.int32)  # the engine's own masks are the engine's
        allowed = np.flatnonzero(np.unpackbits(words_W.view(np.uint8), bitorder="little"))
        wanted = favourite(bench.runner, prompt, len(answer))
        answer.append(int(allowed[np.searchsorted(allowed, wanted) % len(allowed)]))
        if answer[-1] in ENDS:
            break
        guide.took(answer[-1])
    return answer


@pytest.mark.parametrize("grammar", GRAMMARS)
@pytest.mark.parametrize("may_jump", [True, False])
async def test_an_answer_is_what_the_model_likes_best_of_what_the_grammar_allows(grammar: str, may_jump: bool) -> None:
    async with running(Bench()) as bench:
        for seed in range(4):
            prompt = prompt_of(9, seed)
            answer = await bench.ask(f"{seed}", prompt, grammar, may_jump=may_jump)
            assert list(answer.token_ids) == await expected(bench, prompt, grammar, 100)
            assert answer.finish_reason is (FinishReason.LENGTH if len(answer.token_ids) == 100 else FinishReason.STOP)
            assert may_jump or answer.num_jumped == 0


async def test_forced_tokens_cost_no_steps_of_their_own() -> None:
    async with running(Bench()) as bench:
        answer = await bench.ask("jumps", prompt_of(9), PERSON)
        num_jumping = len(bench.plans)
        await bench.ask("walks", prompt_of(9, 1), PERSON, may_jump=False)
        num_walking = len(bench.plans) - num_jumping
    assert json.loads(text_of(answer.token_ids))["kind"] == "the green is red"
    assert answer.num_jumped > len(answer.token_ids) / 2
    assert num_jumping <= len(answer.token_ids) - answer.num_jumped < num_walking


@pytest.mark.parametrize("grammar", GRAMMARS)
async def test_an_answer_says_which_of_its_tokens_were_forced(grammar: str) -> None:
    async with running(Bench(num_pages=32)) as bench:  # some are preempted in between
        answers = await asyncio.gather(*[bench.ask(f"{seed}", prompt_of(9, seed), grammar) for seed in range(4)])
        for answer in answers:
            assert sum(answer.jumped) == answer.num_jumped and len(answer.jumped) in (0, len(answer.token_ids))
            matcher, _ = await bench.grammars.matcher(grammar, "")
            for token_id, is_forced in zip(answer.token_ids, answer.jumped, strict=False):
                words_W = np.frombuffer(matcher.compute_bitmask(), np.int32)
                num_allowed = int(np.unpackbits(words_W.view(np.uint8)).sum())
                assert num_allowed == 1 or not is_forced
                matcher.consume_token(token_id)
        walked = await bench.ask("walks", prompt_of(9), grammar, may_jump=False)
        assert walked.jumped == ()


async def test_an_answer_without_choices_needs_no_step_at_all() -> None:
    async with running(Bench()) as bench:
        answer = await bench.ask("const", prompt_of(9), CONST)
        assert bench.plans == []
        assert text_of(answer.token_ids) == b'{"name":"the red"}' and answer.finish_reason is FinishReason.STOP
        assert answer.num_jumped == len(answer.token_ids)
        cut = await bench.ask("cut", prompt_of(9), CONST, max_new_tokens=3)
        assert cut.token_ids == answer.token_ids[:3] and cut.finish_reason is FinishReason.LENGTH
        assert bench.engine.load().running == 0 and bench.plans == []
        scored = await bench.ask("scored", prompt_of(9), CONST, prompt_logprobs=1)
        assert scored.token_ids == answer.token_ids
        assert scored.prompt_logprobs is not None and len(scored.prompt_logprobs) == 9


async def test_forced_tokens_are_counted_when_they_are_sent() -> None:
    bench = Bench()
    guidance = Guidance(PERSON)
    request = GenerateRequest("a", tuple(prompt_of(9)), SamplingParams(max_new_tokens=100), guidance=guidance)
    mailbox = await bench.engine.submit(request)  # nothing runs: its first tokens are forced, and stay here
    assert bench.engine.abort("a")
    left = await collect(mailbox)
    assert (left.num_jumped, bench.scheduler.num_jumped) == (0, 0)
    async with running(bench):
        answer = await bench.ask("b", prompt_of(9), PERSON)
    assert bench.scheduler.num_jumped == answer.num_jumped > 0


async def test_limits_hold_inside_a_jump() -> None:
    async with running(Bench()) as bench:
        prompt = prompt_of(9)
        whole = await bench.ask("whole", prompt, PERSON)
        for length in range(1, len(whole.token_ids) + 1):
            cut = await bench.ask(f"{length}", prompt, PERSON, max_new_tokens=length)
            assert cut.token_ids == whole.token_ids[:length]
            is_whole = length == len(whole.token_ids)
            assert cut.finish_reason is (FinishReason.STOP if is_whole else FinishReason.LENGTH)
        stop = WORDS.encode("kind")[0]
        stopped = await bench.ask("stop", prompt, PERSON, stop_token_ids=frozenset({stop}))
        assert stopped.token_ids == whole.token_ids[: whole.token_ids.index(stop) + 1]
        assert (stopped.finish_reason, stopped.matched_stop) == (FinishReason.STOP, stop)


async def test_a_least_length_holds_where_the_grammar_has_more_to_say() -> None:
    async with running(Bench()) as bench:
        for seed in range(6):
            longer = await bench.ask(f"long{seed}", prompt_of(9, seed), LETTERS, min_new_tokens=30)
            assert len(text_of(longer.token_ids)) >= 30 and set(text_of(longer.token_ids)) <= set(b"abcdef")
            whole = await bench.ask(f"whole{seed}", prompt_of(9, seed), PERSON, min_new_tokens=90)
            assert set(json.loads(text_of(whole.token_ids))) == {"name", "kind", "n"}
            assert whole.finish_reason is FinishReason.STOP


async def test_log_probabilities_come_for_every_token_and_so_without_jumps() -> None:
    async with running(Bench()) as bench:
        answer = await bench.ask("scored", prompt_of(9), PERSON, logprobs=1)
        assert [entry.token_id for entry in answer.logprobs] == list(answer.token_ids)
        plain = await bench.ask("plain", prompt_of(9), PERSON)
    assert plain.token_ids == answer.token_ids and answer.num_jumped == 0


async def test_only_guided_rows_get_masks_and_few_of_them_wait_for_their_tokens() -> None:
    bench = Bench(max_running=FEW_ROWS + 4)
    seen: list[tuple[Plan, Edits]] = []
    sample = bench.runner._sample

    def noting(plan: Plan, logprobs: object, edits: Edits) -> object:
        seen.append((plan, edits))
        return sample(plan, logprobs, edits)  # type: ignore[arg-type]

    bench.runner._sample = noting  # type: ignore[method-assign,assignment]
    async with running(bench):
        await asyncio.gather(*(bench.ask(f"few{i}", prompt_of(9, i), PERSON) for i in range(FEW_ROWS)))
        assert not any(edits.unwanted for _, edits in seen)
        assert all(len(edits.masked) == sum(row.samples for row in plan.rows) for plan, edits in seen)
        seen.clear()
        await asyncio.gather(
            *(bench.ask(f"many{i}", prompt_of(9, i), PERSON, max_new_tokens=40) for i in range(FEW_ROWS)),
            *(bench.ask(f"plain{i}", prompt_of(9, i), max_new_tokens=40) for i in range(4)),
        )
        assert any(edits.unwanted for _, edits in seen)
        assert all(len(edits.masked) + len(edits.unwanted) <= FEW_ROWS for _, edits in seen)


async def test_a_bad_grammar_is_refused_before_anything_starts_and_harms_nobody() -> None:
    async with running(Bench()) as bench:
        good = asyncio.create_task(bench.ask("good", prompt_of(9), PERSON))
        with pytest.raises(InvalidRequest, match="unknown name") as caught:
            await bench.ask("bad", prompt_of(9), "start: nothing")
        assert caught.value.param == "response_format"
        assert (await good).finish_reason is FinishReason.STOP
        assert bench.engine.load().waiting == 0


async def test_a_grammar_that_spends_its_limits_ends_its_own_request() -> None:
    async with running(Bench()) as bench:
        others = [asyncio.create_task(bench.ask(f"good{i}", prompt_of(9, i), PERSON)) for i in range(6)]
        bad = 'start: s\ns: s s s | s s | "a" | '
        answer = await bench.ask("bad", prompt_of(9), bad, max_new_tokens=400, min_new_tokens=400)
        assert answer.finish_reason is FinishReason.ERROR and answer.error is not None and "grammar" in answer.error
        assert answer.is_grammar_error
        for other in others:
            assert (await other).finish_reason is FinishReason.STOP


async def test_a_grammar_whose_limits_one_answer_spent_is_compiled_afresh_for_the_next() -> None:
    async with running(Bench(grammar_limits=GrammarLimits(max_lexer_states=60))) as bench:
        grammar = "start: /(a|b)*a(a|b){9}/"  # each text is a state of its own
        for _ in range(2):
            answer = await bench.ask("spent", prompt_of(9), grammar, max_new_tokens=100, min_new_tokens=100)
            assert answer.finish_reason is FinishReason.ERROR and len(answer.token_ids) > 0


async def test_who_leaves_while_a_grammar_compiles_or_masks_are_filled_leaves_nothing_behind() -> None:
    async with running(Bench()) as bench:
        bench.grammars._last_fill_s = 1.0  # in the thread
        for num_turns in range(0, 40, 3):
            task = asyncio.create_task(
                bench.ask("leaver", prompt_of(9), f'start: "red" /[a-f]+/ "{num_turns}"', max_new_tokens=50)
            )
            for _ in range(num_turns):
                await asyncio.sleep(0.0005)
            task.cancel()
            bench.engine.abort("leaver")
            await asyncio.gather(task, return_exceptions=True)
            bench.engine.abort("leaver")
        load = bench.engine.load()
        assert (load.running, load.waiting) == (0, 0)
        assert (await bench.ask("next", prompt_of(9), PERSON)).finish_reason is FinishReason.STOP


THOUGHT = ThoughtLimits(b"<think>", b"</think>", (END_THINK,), True)


def limited(max_tokens: int | None, *, is_open: bool = True) -> ThoughtLimits:
    return ThoughtLimits(THOUGHT.begin, THOUGHT.end, THOUGHT.end_ids, is_open, max_tokens)


@pytest.mark.parametrize("options", [{}, {"logprobs": 0}, {"may_jump": False}], ids=str)
@pytest.mark.parametrize("is_open", [True, False])
async def test_a_thought_is_cut_at_its_budget_and_then_the_grammar_holds(options: dict[str, object], is_open: bool) -> None:
    async with running(Bench()) as bench:
        answer = await bench.ask("a", prompt_of(9), PERSON, thought=limited(12, is_open=is_open), **options)  # type: ignore[arg-type]
    ids = list(answer.token_ids)
    assert answer.num_thought == 12 and (THINK in ids[:1]) is not is_open
    end = ids.index(END_THINK)
    assert end == 12 + (not is_open) and not ENDS & set(ids[:end])
    assert set(json.loads(text_of(ids[end + 1 :]))) == {"name", "kind", "n"}


async def test_a_thought_without_a_grammar_is_cut_at_its_budget() -> None:
    async with running(Bench()) as bench:
        prompts = [prompt_of(9, seed) for seed in range(6)]
        cut = await asyncio.gather(*(bench.ask(f"{i}", p, thought=limited(5), max_new_tokens=20) for i, p in enumerate(prompts)))
        for prompt, answer in zip(prompts, cut, strict=True):
            wanted = await expected(bench, prompt, None, 20)
            wanted[5] = END_THINK  # the random numbers behind it are those of their places
            assert list(answer.token_ids) == wanted and answer.num_thought == 5


async def test_a_thought_ends_when_somebody_asks_for_it() -> None:
    async with running(Bench()) as bench:
        request = GenerateRequest(
            "a", tuple(prompt_of(9)), SamplingParams(max_new_tokens=400), guidance=Guidance(PERSON, thought=limited(None))
        )
        mailbox = await bench.engine.submit(request)
        deltas = [await mailbox.get()]
        assert bench.engine.end_thought("a") and not bench.engine.end_thought("nobody")
        deltas.append(await collect(mailbox))
        answer = Delta.merged(deltas)
        assert not bench.engine.end_thought("a")
    ids = list(answer.token_ids)
    end = ids.index(END_THINK)
    assert end == answer.num_thought <= len(deltas[0].token_ids) + 2
    assert set(json.loads(text_of(ids[end + 1 :]))) == {"name", "kind", "n"}


async def test_a_step_holds_so_many_appended_rows_and_no_more() -> None:
    async with running(Bench(num_pages=400, max_step_tokens=200, max_appended_rows=2)) as bench:
        answers = await asyncio.gather(*(bench.ask(f"{i}", prompt_of(9, i), PERSON) for i in range(8)))
        for plan in bench.plans:
            new = {admission.slot for admission in plan.admissions}
            assert sum(row.num_tokens > 1 and row.slot not in new for row in plan.rows) <= 2
        for i, answer in enumerate(answers):
            assert list(answer.token_ids) == await expected(bench, prompt_of(9, i), PERSON, 100)


async def test_jumps_meet_bursts_of_prompts() -> None:
    bursts = BurstLimits(0.01, tokens=24, step_tokens=32, ride_tokens=8)
    async with running(Bench(num_pages=400, max_running=12, bursts=bursts)) as bench:
        prompts = [prompt_of(60, seed) for seed in range(16)]
        answers = await asyncio.gather(*(bench.ask(f"{i}", p, PERSON) for i, p in enumerate(prompts)))
        for prompt, answer in zip(prompts, answers, strict=True):
            assert list(answer.token_ids) == await expected(bench, prompt, PERSON, 100)


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32),
    num_pages=st.integers(24, 60),
    page_size=st.sampled_from([1, 2, 4, 16]),
    max_running=st.integers(1, 7),
    max_step_tokens=st.integers(1, 40),
    is_threaded=st.booleans(),
)
def test_any_mix_of_grammars_jumps_and_aborts_stays_exact(
    seed: int, num_pages: int, page_size: int, max_running: int, max_step_tokens: int, is_threaded: bool
) -> None:
    """Shared prompts, scarce pages, aborts at any time, masks on the loop and in a thread."""

    async def run() -> None:
        bench = Bench(num_pages=num_pages, page_size=page_size, max_running=max_running, max_step_tokens=max_step_tokens)
        rng = Random(seed)
        context_len = bench.engine.facts().context_len
        stem = prompt_of(context_len, seed=1)

        async def client(index: int) -> None:
            for turn in range(3):
                length = rng.randrange(1, max(2, context_len // 2))
                prompt = stem[:length] + prompt_of(rng.randrange(0, 3), seed=rng.randrange(3))
                num_new = rng.randrange(1, max(2, context_len - len(prompt)))
                if len(prompt) + num_new > context_len:
                    continue
                grammar, may_jump = rng.choice((*GRAMMARS, None)), rng.random() < 0.8
                if is_threaded:
                    bench.grammars._last_fill_s = rng.choice((0.0, 1.0))
                task = asyncio.create_task(
                    bench.ask(f"{index}.{turn}", prompt, grammar, may_jump=may_jump, max_new_tokens=num_new)
                )
                if rng.random() < 0.2:
                    for _ in range(rng.randrange(30)):
                        await asyncio.sleep(0)
                    bench.engine.abort(f"{index}.{turn}")
                answer = await task
                wanted = await expected(bench, prompt, grammar, num_new)
                assert list(answer.token_ids) == wanted[: len(answer.token_ids)]
                if answer.finish_reason is not FinishReason.ABORT:
                    assert len(answer.token_ids) == len(wanted)
                bench.cache.check()

        async with running(bench):
            async with asyncio.timeout(60):
                await asyncio.gather(*(client(i) for i in range(5)))
        load = bench.engine.load()
        assert (load.running, load.waiting) == (0, 0)
        assert load.free_tokens + load.evictable_tokens == load.total_tokens

    asyncio.run(run())
