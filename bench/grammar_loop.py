"""What grammars cost the event loop, without a device: processor time per row and step, free and under a schema.

    python bench/grammar_loop.py [--model MODEL] [--rows 64] [--tokens 256]

Answers are free, or follow the schema of an ordinary record without jumps and with. Tokens are drawn at random from those that
may come, which is not counted. Needs a tokenizer (MODEL is a GGUF file or a folder; else the default model) and no weights.

    loop     of the thread that everything waits for: planning, taking in tokens, asking for masks
    others   of the threads that fill them

Microseconds, of whole answers that begin together: the second round counts, when the grammar has been used before.
"""

import argparse
import asyncio
import sys
import time
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.structured import RECORDS
from streamserve.cache.kv_cache import KVCache
from streamserve.default_model import find_default_model
from streamserve.engine.client import collect
from streamserve.engine.core import Engine, EngineOptions
from streamserve.engine.grammar import Grammars
from streamserve.engine.plan import NO_EDITS, Edits, Masks, Plan, RowResult, StepResult
from streamserve.engine.policy import first_come_first_served
from streamserve.engine.scheduler import Limits, Scheduler
from streamserve.messages import GenerateRequest, Guidance, SamplingParams
from streamserve.text.model import load_text_model
from streamserve.text.structure import json_schema, text_of

PROMPT = 16
WAYS = {"free": None, "masked": False, "jumping": True}  # whether a grammar may jump; None: there is none


class Step:
    """One that is done at once."""

    def __init__(self, runner: "Runner", plan: Plan) -> None:
        self._runner, self._plan, self._result = runner, plan, StepResult(())

    def sample(self, edits: Edits = NO_EDITS) -> None:
        """See streamserve's Step."""
        self._result = self._runner.choose(self._plan, edits)

    def is_done(self) -> bool:
        """See streamserve's Step."""
        return True

    async def done(self) -> StepResult:
        """See streamserve's Step."""
        return self._result


class Runner:
    """Any token that may come. Knows how long it took itself: of its thread, and of the process meanwhile."""

    def __init__(self, vocab_size: int) -> None:
        self._rng = Random(7)
        self._vocab_size = vocab_size
        self.num_rows = self.thread_ns = self.process_ns = 0

    def forward(self, plan: Plan) -> Step:
        """See streamserve's Runner."""
        self.num_rows += len(plan.rows)
        return Step(self, plan)

    def choose(self, plan: Plan, edits: Edits) -> StepResult:
        """A token for each row that samples."""
        thread_ns, process_ns = time.thread_time_ns(), time.process_time_ns()
        masks = {place.row: line for place, line in zip(edits.masked, edits.masks, strict=True)}
        rows = [
            RowResult((self._token(masks.get(i)),)) if row.samples and i not in edits.unwanted else RowResult()
            for i, row in enumerate(plan.rows)
        ]
        self.thread_ns += time.thread_time_ns() - thread_ns
        self.process_ns += time.process_time_ns() - process_ns
        return StepResult(rows)

    def _token(self, words_W: Masks | None) -> int:
        if words_W is None:
            return self._rng.randrange(1000, self._vocab_size)
        for _ in range(8):  # of a mask that allows much, most words do
            at = self._rng.randrange(len(words_W))
            if words_W[at]:
                break
        else:
            at = int(self._rng.choice(words_W.nonzero()[0]))
        return 32 * at + self._rng.choice([bit for bit in range(32) if int(words_W[at]) >> bit & 1])


async def costs(engine: Engine, runner: Runner, guidance: Guidance | None, num_rows: int, num_tokens: int) -> tuple[float, float]:
    """Microseconds per row and step, of the loop and of other threads."""
    params = SamplingParams(temperature=0.8, max_new_tokens=num_tokens, ignore_eos=True)
    prompts = [tuple(range(i, i + PROMPT)) for i in range(num_rows)]
    boxes = [await engine.submit(GenerateRequest(f"{p[0]}", p, params, guidance=guidance)) for p in prompts]
    thread_ns, process_ns = time.thread_time_ns(), time.process_time_ns()
    running = asyncio.create_task(engine.run())
    for delta in await asyncio.gather(*(collect(box) for box in boxes)):
        assert delta.error is None, delta.error
    thread_ns = time.thread_time_ns() - thread_ns - runner.thread_ns
    others_ns = time.process_time_ns() - process_ns - runner.process_ns - thread_ns
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    return thread_ns / runner.num_rows / 1e3, max(0, others_ns) / runner.num_rows / 1e3


async def measure(model: str | None, num_rows: int, num_tokens: int) -> None:
    """All ways, a line each."""
    text = load_text_model(Path(model) if model else find_default_model())
    size, eos = text.tokenizer.vocab_size, text.tokenizer.eos_token_ids
    grammars = Grammars(text.tokenizer, vocab_size=size, eos_token_ids=eos)
    grammar = text_of(json_schema(RECORDS, "schema", closes_objects=True))
    print(f"{num_rows} rows, vocabulary of {size:,}, microseconds per row and step\n{'':10}{'loop':>8}{'others':>8}")
    for name, may_jump in WAYS.items():
        guidance = None if may_jump is None else Guidance(grammar, "schema", may_jump=may_jump)
        for _ in range(2):
            num_pages = num_rows * (num_tokens + PROMPT)
            limits = Limits(num_rows, num_rows * PROMPT, eos)
            runner = Runner(size)
            scheduler = Scheduler(KVCache(num_pages, 16), limits, first_come_first_served)
            engine = Engine(scheduler, runner, EngineOptions(num_tokens + PROMPT, size, eos), grammars=grammars)
            loop_us, others_us = await costs(engine, runner, guidance, num_rows, num_tokens)
        print(f"{name:10}{loop_us:8.2f}{others_us:8.2f}")
    grammars.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    args = parser.parse_args()
    asyncio.run(measure(args.model, args.rows, args.tokens))


if __name__ == "__main__":
    main()
