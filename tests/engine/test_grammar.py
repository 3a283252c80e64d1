"""Grammars: what compiles and what is refused, within what limits, and that one request's grammar is nobody else's trouble."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace

import numpy as np
import pytest

from streamserve.engine.grammar import GrammarLimits, Grammars
from streamserve.engine.guide import Guide
from streamserve.engine.plan import Masks
from streamserve.errors import InvalidRequest, QueueFull
from streamserve.messages import Guidance
from tests.conftest import LoopWatch
from tests.engine.words import END, ENDS, STOP, THINK, TOKENS, Words

pytestmark = pytest.mark.anyio
WORDS = Words()


def of_schema(schema: object) -> str:
    return json.dumps({"grammars": [{"json_schema": schema}]})


def over_words(limits: GrammarLimits | None = None) -> Grammars:
    return Grammars(WORDS, vocab_size=len(TOKENS) + 40, eos_token_ids=ENDS, limits=limits, num_lanes=1)


@pytest.fixture
async def grammars() -> AsyncIterator[Grammars]:
    grammars = over_words()
    yield grammars
    grammars.close()


async def mask_of(grammars: Grammars, grammar: str, *taken: bytes) -> set[int]:
    """Tokens that may come after some others."""
    guide = Guide(
        Guidance(grammar), matcher=(await grammars.matcher(grammar, "regex"))[0], token_bytes=WORDS.token_bytes, jumps=False
    )
    guide.begin()
    for token in taken:
        guide.took(TOKENS.index(token))
    words = (await grammars.fill([(guide, ())]))[0]
    return set(np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little")).tolist())


async def test_a_mask_has_the_tokens_that_the_grammar_allows_and_no_others(grammars: Grammars) -> None:
    grammar = 'start: ("red" | "green") " is" /[a-b]+/'
    first = await mask_of(grammars, grammar)
    assert first == {TOKENS.index(token) for token in (b"r", b"red", b"g", b"green")}
    last = await mask_of(grammars, grammar, b"red", b" is", b"a")
    assert last == {TOKENS.index(token) for token in (b"a", b"b", b"ab")} | ENDS


async def test_many_answers_of_one_grammar_are_spread_over_lanes_with_the_same_masks() -> None:
    grammars = Grammars(WORDS, vocab_size=len(TOKENS) + 40, eos_token_ids=ENDS, num_lanes=3)
    grammar = 'start: ("red" | "green") " is" /[a-b]+/'
    found = await asyncio.gather(*(grammars.matcher(grammar, "regex") for _ in range(40)))
    lanes = Counter(lane for _, lane in found)
    assert lanes.keys() == {0, 1, 2} and min(lanes.values()) >= 8
    guides = [Guide(Guidance(grammar), matcher=m, lane=lane, token_bytes=WORDS.token_bytes, jumps=False) for m, lane in found]
    for i, guide in enumerate(guides):
        guide.begin()
        guide.took(TOKENS.index((b"red", b"g")[i % 2]))
    by_threads = []
    for last_s in (1.0, 1.0, 0.0):  # in threads, in threads, on the loop
        grammars._last_fill_s = last_s
        by_threads.append((await grammars.fill([(guide, ()) for guide in guides])).copy())
    assert all((masks == by_threads[0]).all() for masks in by_threads)
    assert (by_threads[0][0] != by_threads[0][1]).any() and (by_threads[0][::2] == by_threads[0][0]).all()
    grammars.close()


async def test_masks_are_filled_where_the_device_wants_them(grammars: Grammars) -> None:
    memory: list[Masks] = []

    def lines(num_lines: int, num_words: int) -> Masks:
        memory.append(np.full((num_lines, num_words), -1, np.int32))
        return memory[-1]

    grammars.use_memory(lines)
    guides = []
    for _ in range(3):
        matcher, _ = await grammars.matcher("start: /a+/", "regex")
        guides.append(Guide(Guidance(), matcher=matcher, token_bytes=WORDS.token_bytes, jumps=False))
        guides[-1].begin()
    masks = [await grammars.fill([(guide, ()) for guide in guides]) for _ in range(4)]
    assert [next(i for i, lines in enumerate(memory) if np.shares_memory(lines, found)) for found in masks] == [0, 1, 0, 1]
    assert len(memory) == 2 and all((found == masks[0][0]).all() for found in masks)


async def test_control_tokens_never_stand_for_their_text(grammars: Grammars) -> None:
    allowed = await mask_of(grammars, "start: /(?s:.*)/")
    assert THINK not in allowed and {END, STOP} <= allowed and max(allowed) < len(TOKENS)
    assert THINK in await mask_of(grammars, "start: <think> /.*/")


@pytest.mark.parametrize(
    ("grammar", "named"),
    [
        ("start: /[a-/", "invalid regex"),
        ("start: nothing", 'unknown name: "nothing"'),
        ("", "Empty grammar"),
        ('{"grammars": 3}', "expected a sequence"),
        (of_schema({"type": "object", "not": {"type": "string"}}), '["not"]'),
        (of_schema({"type": "array", "uniqueItems": True}), '["uniqueItems"]'),
        (of_schema({"type": "string", "pattern": "(?=a)b"}), "look-around"),
        (of_schema({"type": "string", "pattern": "^[a-z"}), "unclosed"),
        (of_schema({"$ref": "#"}), "NoExtension"),
        ("start: \ud800", "surrogates"),
    ],
)
async def test_a_grammar_that_does_not_compile_is_an_error_that_names_what_is_wrong(
    grammars: Grammars, grammar: str, named: str
) -> None:
    for _ in range(2):  # the second time from the cache
        with pytest.raises(InvalidRequest) as caught:
            await grammars.matcher(grammar, "structured_outputs.grammar")
        assert named in str(caught.value) and caught.value.param == "structured_outputs.grammar"
        assert "<state>" not in str(caught.value) and "non-verbose" not in str(caught.value)


def deep(levels: int) -> object:
    schema: object = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}, "required": ["a"]}
    return schema


HOSTILE = {
    "branches": of_schema({"anyOf": [{"type": "object", "properties": {f"k{i}": {"type": "string"}}} for i in range(10_000)]}),
    "values": of_schema({"enum": [f"value {i} {i * i}" for i in range(60_000)]}),
    "optional keys": of_schema({"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(10_000)}}),
    "depth": of_schema(deep(400)),
    "itself": of_schema({"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}}),
    "bytes": of_schema({"type": "string", "description": "y" * 5_000_000}),
    "counting regex": "start: /((a{1,300}){1,300}){1,300}/",
    "doubling regex": "start: /[ab]*a[ab]{30}c/",
    "nested stars": "start: /((a+)+)+(a+)+b/",
    "long": of_schema({"type": "array", "minItems": 1_000_000, "items": {"type": "integer"}}),
    "tools": of_schema({"anyOf": [{"const": {"name": f"t{i}", "arguments": {"a": i}}} for i in range(1000)]}),
}


async def test_hostile_grammars_are_answered_soon_and_the_loop_and_others_go_on(grammars: Grammars) -> None:
    watch = LoopWatch()
    watching = asyncio.create_task(watch.run())
    await mask_of(grammars, "start: /a+/")  # the vocabulary is read
    await asyncio.sleep(0.01)
    watch.longest_s = 0.0

    async def ask(grammar: str) -> bool:
        try:
            await grammars.matcher(grammar, "response_format")
        except InvalidRequest:
            return False
        return True

    async with asyncio.timeout(60):
        answers = dict(zip(HOSTILE, await asyncio.gather(*map(ask, HOSTILE.values())), strict=True))
        assert await ask("start: /b+/")
    watching.cancel()
    assert not any(answers[name] for name in ("branches", "optional keys", "depth", "itself", "bytes"))
    assert watch.longest_s < 2.0  # a compilation with the GIL held would take longer; a busy machine does not


async def test_a_matcher_that_spends_its_limits_fails_alone(grammars: Grammars) -> None:
    ambiguous, _ = await grammars.matcher('start: s\ns: s s s | s s | "a" | ', "grammar")
    good, _ = await grammars.matcher("start: /a+/", "grammar")
    guides = [Guide(Guidance(), matcher=matcher, token_bytes=WORDS.token_bytes) for matcher in (ambiguous, good)]
    for guide in guides:
        guide.begin()
    for _ in range(600):
        await grammars.fill([(guide, ()) for guide in guides])
        for guide in guides:
            guide.check_mask()
            if guide.error is None:
                guide.took(TOKENS.index(b"a"))
        if guides[0].error is not None:
            break
    assert guides[0].error is not None and ("limit" in guides[0].error or "too ambiguous" in guides[0].error)
    assert guides[1].error is None


async def test_copies_of_one_grammar_go_their_own_ways(grammars: Grammars) -> None:
    one, other = [(await grammars.matcher('start: "red" | "green"', "grammar"))[0] for _ in range(2)]
    assert one.consume_token(TOKENS.index(b"red")) and one.is_stopped()
    assert not other.is_stopped() and other.consume_token(TOKENS.index(b"green"))


async def test_the_same_grammar_is_compiled_once_and_the_least_used_is_forgotten() -> None:
    grammars = over_words(GrammarLimits(max_cached=2))
    compiled: list[str] = []
    compile = grammars._compile

    def counting(grammar: str) -> object:
        compiled.append(grammar)
        return compile(grammar)

    grammars._compile = counting  # type: ignore[method-assign,assignment]
    one, two, three = (f'start: "{name}"' for name in ("one", "two", "three"))
    await asyncio.gather(*(grammars.matcher(one, "grammar") for _ in range(5)))
    await grammars.matcher(two, "grammar")
    await grammars.matcher(one, "grammar")
    assert compiled == [one, two]
    await grammars.matcher(three, "grammar")
    await grammars.matcher(one, "grammar")
    await grammars.matcher(two, "grammar")
    assert compiled == [one, two, three, two]
    assert grammars._cached_bytes == sum(map(len, grammars._cache))
    grammars.close()


async def test_who_waits_too_long_gives_up_and_a_full_queue_is_said_to_be_full() -> None:
    grammars = over_words(replace(GrammarLimits(), compile_s=0.05, max_compiling=2))
    grammars._compile = lambda grammar: time.sleep(0.3)  # type: ignore[method-assign,assignment,return-value]
    first, second = (asyncio.create_task(grammars.matcher(name, "regex")) for name in ("one", "two"))
    await asyncio.sleep(0)
    with pytest.raises(QueueFull, match="2 grammars"):
        await grammars.matcher("three", "regex")
    with pytest.raises(InvalidRequest, match=r"within 0\.05 seconds"):
        await first
    with pytest.raises(QueueFull, match="still being compiled"):
        await second
    grammars.close()


async def test_markers_are_control_tokens_where_the_vocabulary_has_them(grammars: Grammars) -> None:
    assert await grammars.encode(b"<think>") == [THINK]


async def test_a_check_says_what_is_wrong_and_keeps_nothing(grammars: Grammars) -> None:
    for n in range(3):
        await grammars.check(f"start: /[a-f]{{{n + 1}}}/", "ebnf")
    assert not grammars._cache and grammars._cached_bytes == 0
    with pytest.raises(InvalidRequest, match="unknown name") as refused:
        await grammars.check("start: foo", "ebnf")
    assert refused.value.param == "ebnf" and not grammars._cache
    with pytest.raises(InvalidRequest, match="bytes"):
        await grammars.check("x" * (GrammarLimits().max_bytes + 1), "ebnf")
    await grammars.matcher("start: /a/", "ebnf")
    await grammars.check("start: /a/", "ebnf")
    assert list(grammars._cache) == ["start: /a/"]
