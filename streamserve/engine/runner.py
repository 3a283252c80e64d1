"""Executes plans on a network: copies, batch, forward pass, sampling. One instance per device.

Owns the slot tables, the sampler and the thread that runs steps. On a CPU a step runs in one worker thread, so that the
event loop goes on serving while torch and the kernels have released the GIL; steps run in the order of `forward` and `sample`.
"""

from asyncio import Future, get_running_loop
from collections.abc import Callable, Mapping
from concurrent.futures import Future as Job
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

from streamserve.cache.pool import KVPool
from streamserve.engine.batch import SlotTables
from streamserve.engine.drafters.runner_drafter import RunnerDrafter
from streamserve.engine.embeddings import Embeddings
from streamserve.engine.plan import NO_EDITS, Edits, Masks, Place, Plan, RowResult, StepResult
from streamserve.engine.sampler import Sampler
from streamserve.kernels.ops import Network


class ThreadStep:
    """A step in the worker thread: one job computes its rows, a second one chooses its tokens."""

    def __init__(self, thread: ThreadPoolExecutor, logits: "Job[Tensor]", choose: Callable[[Tensor, Edits], StepResult]) -> None:
        self._thread = thread
        self._logits = logits
        self._choose = choose
        self._result: Future[StepResult] | None = None

    def sample(self, edits: Edits = NO_EDITS) -> None:
        """See Step."""
        assert self._result is None
        self._result = get_running_loop().run_in_executor(self._thread, lambda: self._choose(self._logits.result(), edits))

    def is_done(self) -> bool:
        """See Step."""
        return self._result is not None and self._result.done()

    async def done(self) -> StepResult:
        """See Step."""
        assert self._result is not None
        return await self._result


class ModelRunner:
    """Runner over a real network."""

    long_chunk: int | None = None  # all chunks are computed alike
    max_appended_rows: int | None = None
    max_drafted_tokens: int | None = None

    def __init__(
        self,
        network: Network,
        pool: KVPool,
        sampler: Sampler,
        *,
        num_slots: int,
        max_len: int,
        drafter: RunnerDrafter | None = None,
        embeddings: Embeddings | None = None,
    ) -> None:
        """`embeddings`: of a model that takes media."""
        self._network = network
        self._embeddings = embeddings or Embeddings(None, num_slots=num_slots, hidden_size=0, has_rotary=False)
        self._failed: dict[int, dict[bytes, str]] = {}  # encodes that raised, by step
        self._drafter = drafter
        self._pool = pool
        self._sampler = sampler
        self._tables = SlotTables(num_slots, max_len, pool)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine-step")

    def forward(self, plan: Plan) -> ThreadStep:
        """See Runner."""
        return ThreadStep(self._thread, self._thread.submit(self._compute, plan), partial(self._results, plan))

    def close(self) -> None:
        """Wait for the running step and end the thread."""
        self._thread.shutdown(wait=True)

    def execute(self, plan: Plan, edits: Edits = NO_EDITS) -> StepResult:
        """Run one plan to its end. Blocks."""
        return self._results(plan, self._compute(plan), edits)

    @torch.inference_mode()
    def _compute(self, plan: Plan) -> Tensor:
        for admission in plan.admissions:
            self._sampler.admit(admission)
        for append in plan.appends:
            self._sampler.append(append)
        if plan.copies:
            self._pool.copy_pages([(copy.src, copy.dst) for copy in plan.copies])
        if failed := self._embeddings.take_in(plan):
            self._failed[plan.step] = failed
        batch = self._tables.build(plan, self._embeddings)
        return self._network.forward(batch) if self._drafter is None else self._drafter.forward(plan, batch)

    @torch.inference_mode()
    def _results(self, plan: Plan, logits_RV: Tensor, edits: Edits) -> StepResult:
        rows, failed = self._choose(plan, logits_RV, edits).rows, self._failed.pop(plan.step, {})
        if self._drafter is not None:
            drafts = self._drafter.follow(plan, rows)
            rows = [row.with_drafts(guess) for row, guess in zip(rows, drafts, strict=True)]
        return StepResult(rows, failed)

    def _choose(self, plan: Plan, logits_RV: Tensor, edits: Edits) -> StepResult:
        rows = [RowResult()] * len(plan.rows)
        masks = dict(zip(edits.masked, edits.masks, strict=True))
        sampling: list[int] = []  # indexes into plan.rows, of those without guesses
        last: list[int] = []  # and into logits_RV
        at = 0
        for i, row in enumerate(plan.rows):
            num_logits = row.num_tokens if row.wants_all_logits else (1 + row.num_drafts) * row.samples
            if row.wants_all_logits:
                rows[i] = RowResult(prompt_logprobs=self._prompt_logprobs(plan, i, logits_RV[at : at + num_logits]))
            at += num_logits
            if not row.samples or i in edits.unwanted:
                continue
            if row.num_drafts:
                rows[i] = self._verified(plan, i, logits_RV[at - 1 - row.num_drafts : at], masks, rows[i])
            else:
                sampling.append(i)
                last.append(at - 1)
        if not sampling:
            return StepResult(rows)
        chosen_RV = logits_RV if len(last) == len(logits_RV) else logits_RV[last]
        words = {at: masks[Place(i)] for at, i in enumerate(sampling) if Place(i) in masks} if masks else None
        tokens, logprobs = self._sampler.sample(chosen_RV, [plan.rows[i].slot for i in sampling], words)
        for i, token, entry in zip(sampling, tokens, logprobs, strict=True):
            row = plan.rows[i]
            self._tables.took(row.slot, row.start + row.num_tokens, token)
            rows[i] = RowResult((token,), entry, rows[i].prompt_logprobs)
        return StepResult(rows)

    def _verified(self, plan: Plan, index: int, logits_DV: Tensor, masks: Mapping[Place, Masks], result: RowResult) -> RowResult:
        """A drafted row's result: `result` with what was sampled."""
        row = plan.rows[index]
        assert row.token_ids is not None
        words = [masks.get(Place(index, place)) for place in range(1 + row.num_drafts)] if masks else None
        tokens, logprobs = self._sampler.verify(logits_DV, row.slot, row.token_ids[1:], words)
        for position, token in enumerate(tokens, row.start + 1):
            self._tables.took(row.slot, position, token)
        return RowResult(tuple(tokens), tuple(logprobs), result.prompt_logprobs)

    def _prompt_logprobs(self, plan: Plan, index: int, logits_TV: Tensor) -> tuple:  # type: ignore[type-arg]
        row = plan.rows[index]
        end = row.start + row.num_tokens - row.num_drafts + (0 if row.samples else 1)
        following = self._tables.tokens(row.slot, row.start + 1, end)
        return self._sampler.prompt_logprobs(logits_TV, row.slot, following)
