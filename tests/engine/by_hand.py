"""Steps made by hand: a test says which rows run and what they guess. Stands in for scheduler and cache, on any runner."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from streamserve.engine.plan import Admission, Edits, Masks, Place, Plan, Row, StepResult
from streamserve.messages import SamplingParams, TokenLogprobs

Rule = Callable[[Sequence[int]], Masks]  # of the answer so far: which tokens may come


@dataclass
class Answer:
    """One request in a slot."""

    slot: int
    sampling: SamplingParams
    seed: int
    prompt: tuple[int, ...]
    rule: Rule | None = None
    tokens: list[int] = field(default_factory=list)  # of the answer
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    drafts: tuple[int, ...] = ()  # the runner's newest
    num_computed: int = 0
    num_accepted: int = 0
    is_new: bool = True


class Hand:
    """Plans and runs steps; pages are handed out in no order."""

    def __init__(self, execute: Callable[[Plan, Edits], StepResult], *, num_pages: int, page_size: int) -> None:
        self._execute = execute
        self._page_size = page_size
        self._free = np.random.default_rng(3).permutation(num_pages).tolist()
        self._step = 0

    def step(self, *parts: tuple[Answer, Sequence[int]], chunk: int = 1000, num_wanted: int = 0) -> StepResult:
        """One row for each: the next tokens of its prompt (at most `chunk`), or its newest token and these guesses."""
        admissions, rows, masked, words = [], [], [], []
        for index, (answer, guesses) in enumerate(parts):
            if answer.is_new:
                answer.is_new = False
                admissions.append(Admission(answer.slot, answer.sampling, answer.prompt, len(answer.prompt), answer.seed))
            known = [*answer.prompt, *answer.tokens]
            start = answer.num_computed
            token_ids = known[start : start + chunk]
            samples = start + len(token_ids) == len(known)
            if not samples or len(token_ids) > 1:
                guesses = ()
            token_ids += guesses
            new_pages = self._grow(answer, start + len(token_ids))
            rows.append(
                Row(answer.slot, start, len(token_ids), tuple(token_ids), new_pages, samples, False, len(guesses), num_wanted)
            )
            if samples and answer.rule is not None:
                for place in range(1 + len(guesses)):
                    masked.append(Place(index, place))
                    words.append(answer.rule([*answer.tokens, *guesses[:place]]))
        edits = Edits(frozenset(), tuple(masked), np.array(words, np.int32)) if masked else Edits()
        self._step += 1
        result = self._execute(Plan(self._step, tuple(admissions), (), tuple(rows)), edits)
        for (answer, _), row, output in zip(parts, rows, result.rows, strict=True):
            self._take(answer, row, output.token_ids, output.logprobs)
            answer.drafts = output.drafts
        return result

    def _grow(self, answer: Answer, num_tokens: int) -> tuple[int, ...]:
        new_pages = [self._free.pop() for _ in range(-(-num_tokens // self._page_size) - len(answer.pages))]
        answer.pages += new_pages
        return tuple(new_pages)

    @staticmethod
    def _take(answer: Answer, row: Row, token_ids: Sequence[int], logprobs: Sequence[TokenLogprobs]) -> None:
        assert bool(token_ids) == row.samples
        assert len(logprobs) == (len(token_ids) if answer.sampling.logprobs is not None else 0)
        if row.num_drafts:
            assert row.token_ids is not None
            guesses = row.token_ids[1:]
            right = len(token_ids) - 1
            assert tuple(token_ids[:right]) == guesses[:right]
            assert right == len(guesses) or token_ids[right] != guesses[right]
            answer.num_accepted += right
        answer.num_computed += row.num_tokens if not row.num_drafts else len(token_ids)
        answer.tokens += token_ids
        answer.logprobs += logprobs

    def close(self, answer: Answer) -> None:
        """Its pages are free again."""
        self._free += answer.pages
        answer.pages = []


def words_of(allowed: Sequence[int], vocab_size: int) -> Masks:
    """A mask that admits these tokens."""
    bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
    bits[list(allowed)] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)
