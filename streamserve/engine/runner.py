"""Executes plans on a network: copies, batch, forward pass, sampling. One instance per device.

Owns the slot tables, the sampler and the thread that runs steps. On a CPU a step runs in one worker thread, so that the
event loop goes on serving while torch and the kernels have released the GIL; steps run in the order of `forward`.
"""

from asyncio import Future, get_running_loop
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from streamserve.cache.pool import KVPool
from streamserve.engine.batch import SlotTables
from streamserve.engine.plan import Plan, RowResult, StepResult
from streamserve.engine.sampler import Sampler
from streamserve.kernels.ops import Network


class ThreadStep:
    """A step in the worker thread."""

    def __init__(self, future: "Future[StepResult]") -> None:
        self._future = future

    def is_done(self) -> bool:
        """See Step."""
        return self._future.done()

    async def done(self) -> StepResult:
        return await self._future


class ModelRunner:
    """Runner over a real network."""

    long_chunk: int | None = None  # all chunks are computed alike

    def __init__(self, network: Network, pool: KVPool, sampler: Sampler, *, num_slots: int, max_len: int) -> None:
        self._network = network
        self._pool = pool
        self._sampler = sampler
        self._tables = SlotTables(num_slots, max_len, pool)
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine-step")

    def forward(self, plan: Plan) -> ThreadStep:
        """See Runner."""
        return ThreadStep(get_running_loop().run_in_executor(self._thread, self.execute, plan))

    def close(self) -> None:
        """Wait for the running step and end the thread."""
        self._thread.shutdown(wait=True)

    @torch.inference_mode()
    def execute(self, plan: Plan) -> StepResult:
        """Run one plan to its end. Blocks; runs in the worker thread."""
        for admission in plan.admissions:
            self._sampler.admit(admission)
        if plan.copies:
            self._pool.copy_pages([(copy.src, copy.dst) for copy in plan.copies])
        batch = self._tables.build(plan)
        return self._results(plan, self._network.forward(batch))

    def _results(self, plan: Plan, logits_RV: Tensor) -> StepResult:
        rows = [RowResult()] * len(plan.rows)
        sampling: list[int] = []  # indexes into plan.rows
        last: list[int] = []  # and into logits_RV
        at = 0
        for i, row in enumerate(plan.rows):
            num_logits = row.num_tokens if row.wants_all_logits else int(row.samples)
            if row.wants_all_logits:
                rows[i] = RowResult(prompt_logprobs=self._prompt_logprobs(plan, i, logits_RV[at : at + num_logits]))
            at += num_logits
            if row.samples:
                sampling.append(i)
                last.append(at - 1)
        if not sampling:
            return StepResult(rows)
        chosen_RV = logits_RV if len(last) == len(logits_RV) else logits_RV[last]
        tokens, logprobs = self._sampler.sample(chosen_RV, [plan.rows[i].slot for i in sampling])
        for i, token, entry in zip(sampling, tokens, logprobs, strict=True):
            row = plan.rows[i]
            self._tables.took(row.slot, row.start + row.num_tokens, token)
            rows[i] = RowResult((token,), entry, rows[i].prompt_logprobs)
        return StepResult(rows)

    def _prompt_logprobs(self, plan: Plan, index: int, logits_TV: Tensor) -> tuple:  # type: ignore[type-arg]
        row = plan.rows[index]
        end = row.start + row.num_tokens + (0 if row.samples else 1)
        following = self._tables.tokens(row.slot, row.start + 1, end)
        return self._sampler.prompt_logprobs(logits_TV, row.slot, following)
