"""Logits to tokens on a GPU: what engine/sampler.py does on a CPU, without ever waiting for the device.

Owns what requests with unusual wishes need on the device: lines of token counts for penalties, biases, banned tokens. The
choice itself and everything common (temperature, top-k, top-p, min-p, seeds) is kernels/impl/triton_sampling.py's, from the
sampling words of each slot, which travel with the step's other integers.

Two things differ from the CPU: a seed gives other tokens (the random numbers are others), and of tokens with exactly the
logit at which top-k or top-p ends all stay.

Of a drafted row (engine/plan.py) every token has a row of logits. Each is chosen from as if the guesses before it were right; the
device finds how many were, and the host finds it again from the tokens, and tells by `accepted`.

Shape letters: R rows of logits, V vocabulary, S slots, P sampling words, L lines (in Pending: rows that want
log-probabilities), K best tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from streamserve.engine.plan import Admission, Append, Masks
from streamserve.kernels.devices.device import Device
from streamserve.kernels.impl.triton_sampling import Drafted, SamplingKernels, is_filtered, words
from streamserve.messages import MEDIA_BASE, SamplingParams, TokenLogprobs

_FIRST_LINES = 8


class Pending:
    """Log-probabilities on their way to the host. `num_top` of each of `num_rows` rows; None: the row wants none. `asked`: for
    rows that want some the tokens they ask for, whose values stand in `asked_N` one behind the other."""

    def __init__(
        self,
        num_top: list[int | None],
        logprobs_L: Tensor,
        top_logprobs_LK: Tensor,
        top_ids_LK: Tensor,
        asked: Sequence[tuple[int, ...]],
        asked_N: Tensor | None,
    ) -> None:
        self._num_top = num_top
        self._asked = asked
        self._asked_N = asked_N
        self._logprobs_L = logprobs_L
        self._top_logprobs_LK = top_logprobs_LK
        self._top_ids_LK = top_ids_LK

    def read(self, tokens: Sequence[int]) -> list[tuple[TokenLogprobs, ...]]:
        """One entry per row of logits that wants it, given the rows' tokens. The step's event must have come."""
        wanting = zip(
            self._logprobs_L.tolist(), self._top_logprobs_LK.tolist(), self._top_ids_LK.tolist(), self._asked, strict=True
        )
        values = iter([] if self._asked_N is None else self._asked_N.tolist())
        entries: list[tuple[TokenLogprobs, ...]] = []
        for token, num_top in zip(tokens, self._num_top, strict=True):
            if num_top is None:
                entries.append(())
                continue
            logprob, top_logprobs, top_ids, asked = next(wanting)
            top = tuple(zip(top_ids[:num_top], top_logprobs[:num_top], strict=True))
            entries.append((TokenLogprobs(token, logprob, top, tuple((one, next(values)) for one in asked)),))
        return entries


class DraftedRows(NamedTuple):
    """Which rows of logits stand behind guesses: `offsets`, per row, behind how many; `on_device` has the same there."""

    offsets: list[int]
    on_device: Drafted


@dataclass(slots=True)
class _Wishes:
    """What a slot wants beyond temperature. `bans_left`: tokens still to come for which `banned` must not."""

    is_filtered: bool
    num_top: int | None
    asked: tuple[int, ...]
    line: int | None
    bias: tuple[Tensor, Tensor] | None  # token ids, values
    banned: Tensor | None  # token ids
    bans_left: int

    def is_any(self) -> bool:
        return (
            self.is_filtered or self.num_top is not None or self.line is not None or self.bias is not None or self.bans_left > 0
        )


class DeviceSampler:
    """Sampling state of all slots, and the choice of tokens. Calls launch work on the current stream, in order."""

    def __init__(
        self,
        device: Device,
        *,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        max_rows: int,
        params_SP: Tensor,
        last_token_S: Tensor,
    ) -> None:
        """`params_SP` and `last_token_S` (int32) are the caller's: what `admit` returns must be in the slot's line of the first
        before the slot's first row, and each slot's newest token is put into the second."""
        self._device = device
        self._vocab_size = vocab_size
        self._eos = sorted(eos_token_ids)
        self._params_SP = params_SP
        self._last_token_S = last_token_S
        self._kernels = SamplingKernels(vocab_size, max_rows, device.torch_device, pdl=device.supports_pdl)
        self._wishes: dict[int, _Wishes] = {}  # of slots that have any
        self._given: dict[int, tuple[SamplingParams, int, int | None]] = {}  # of each slot: what its words say, but for its count
        self._num_prompt_top: dict[int, int] = {}
        where = device.torch_device
        self._lines_LV = torch.zeros((0, vocab_size), dtype=torch.int32, device=where)
        self._penalties_L4 = torch.zeros((0, 4), device=where)
        self._free_lines: list[int] = []

    def admit(self, admission: Admission) -> tuple[int, ...]:
        """A request enters a slot. Returns the slot's sampling words."""
        slot, sampling = admission.slot, admission.sampling
        before = self._wishes.pop(slot, None)
        if before is not None and before.line is not None:
            self._free_lines.append(before.line)
        num_generated = len(admission.history) - admission.num_prompt
        self._num_prompt_top[slot] = sampling.prompt_logprobs or 0
        banned = self._banned(sampling) if sampling.min_new_tokens > num_generated else None
        wishes = _Wishes(
            is_filtered(sampling, self._vocab_size),
            sampling.logprobs,
            sampling.logprob_token_ids,
            self._new_line(admission) if _is_penalised(sampling) else None,
            self._bias(sampling) if sampling.logit_bias else None,
            banned,
            0 if banned is None else sampling.min_new_tokens - num_generated,
        )
        if wishes.is_any():
            self._wishes[slot] = wishes
        self._given[slot] = sampling, admission.seed, wishes.line
        return words(sampling, admission.seed, num_generated, self._vocab_size, wishes.line)

    def append(self, append: Append) -> tuple[int, ...]:
        """Tokens that were not sampled join a slot's answer. Returns the slot's sampling words from now on."""
        sampling, seed, line = self._given[append.slot]
        if line is not None:
            ids = self._to_device(torch.tensor(append.token_ids, dtype=torch.int64))
            counts_V = self._lines_LV[line]
            counts_V.index_add_(0, ids, counts_V.new_full((len(ids),), 2))
        wish = self._wishes.get(append.slot)
        if wish is not None:
            wish.bans_left = max(0, wish.bans_left - len(append.token_ids))
        return words(sampling, seed, append.num_generated, self._vocab_size, line)

    def slots(self, slots: Sequence[int], num_rows: int) -> Tensor:
        """`slots_R` on the device: the slots of the first rows, -1 of a row to leave alone."""
        return self._to_device(torch.tensor([*slots, *[-1] * (num_rows - len(slots))], dtype=torch.int32))

    def sample(
        self,
        logits_RV: Tensor,
        slots_R: Tensor,
        rows: Sequence[int],
        out_tokens_R: Tensor,
        masked: Sequence[int] = (),
        masks: Masks | None = None,
        drafted: DraftedRows | None = None,
    ) -> Pending | None:
        """One token per row into `out_tokens_R` (int32) and into the slots' places in last_token_S. May edit `logits_RV`.

        `slots_R` (int32) says each row's slot, -1 of one to leave alone, `rows` the same on the host; behind those `slots_R` may
        hold surplus rows (-1). `masks` has the bits of tokens that may come, a line for each of the rows `masked`. In a step that
        has drafted rows, `drafted` is given; `accepted` must then be told of them before their slots' next step.
        Returns the log-probabilities on their way, for `rows`, if any of them wants some: those of the model itself, before
        penalties and temperature.
        """
        on_device = None if masks is None or not masked else self._masks_to_device(masked, masks)
        if not self.is_plain(rows):
            return self._sample_wishes(logits_RV, slots_R, rows, out_tokens_R, on_device, drafted)
        if on_device is not None:
            self._kernels.mask(logits_RV, *on_device)
        self.choose(logits_RV, slots_R, out_tokens_R, drafted)
        return None

    def mask(self, logits_RV: Tensor, masked: Sequence[int], masks: Masks) -> None:
        """Forbid tokens in place: what `sample` does first for rows that have masks."""
        self._kernels.mask(logits_RV, *self._masks_to_device(masked, masks))

    def is_plain(self, rows: Sequence[int]) -> bool:
        """Whether `choose` is all that `sample` would do for the slots `rows`, unless they have masks."""
        return not self._wishes or self._wishes.keys().isdisjoint(rows)

    def accepted(self, slot: int, num_accepted: int) -> None:
        """So many guesses of the slot's drafted row were right."""
        wish = self._wishes.get(slot)
        if wish is not None and wish.bans_left:
            wish.bans_left = max(0, wish.bans_left - num_accepted)
            if not wish.is_any():
                del self._wishes[slot]

    def choose(
        self,
        logits_RV: Tensor,
        slots_R: Tensor,
        out_tokens_R: Tensor,
        drafted: DraftedRows | None,
        thresholds_R: Tensor | None = None,
        *,
        counts: bool = False,
    ) -> None:
        """The tokens of edited logits. `counts`: into the lines of their slots, too."""
        kernels, params_SP, lines_LV = self._kernels, self._params_SP, self._lines_LV
        if drafted is not None:
            kernels.choose(logits_RV, slots_R, params_SP, out_tokens_R, None, thresholds_R, drafted.on_device)
            counted_LV = lines_LV if counts else None
            kernels.accept(out_tokens_R, slots_R, params_SP, self._last_token_S, drafted.on_device, counted_LV)
            return
        kernels.choose(logits_RV, slots_R, params_SP, out_tokens_R, self._last_token_S, thresholds_R)
        if counts:
            kernels.count(out_tokens_R, slots_R, params_SP, lines_LV)

    def prompt_logprobs(self, logits_TV: Tensor, slot: int, following: Sequence[int]) -> Pending:
        """Log-probability of each following prompt token, given the logits one position before it: one entry per token of
        `following`, by Pending.read(following)."""
        num_top = self._num_prompt_top[slot]
        chosen_T = self._to_device(torch.tensor(following, dtype=torch.int64))
        nothing_asked = [()] * len(following)
        return self._logprobs(logits_TV[: len(following)], chosen_T, [num_top] * len(following), num_top, nothing_asked)

    def warm_up(self, logits_RV: Tensor, *, has_drafts: bool = False) -> None:
        """Have every kernel compiled for logits like these (their type; the number of rows does not matter). `has_drafts`: those
        of drafted rows, too."""
        nobody_R = torch.full((len(logits_RV),), -1, dtype=torch.int32, device=logits_RV.device)
        tokens_R = torch.zeros_like(nobody_R)
        no_lines_LV, no_penalties_L4 = self._lines_LV.new_zeros((1, self._vocab_size)), self._penalties_L4.new_zeros((1, 4))
        self._kernels.penalise(logits_RV, nobody_R, self._params_SP, no_lines_LV, no_penalties_L4)
        all_tokens = np.full((1, -(-self._vocab_size // 32)), -1, dtype=np.int32)
        self._kernels.mask(logits_RV, *self._masks_to_device([0], all_tokens))
        thresholds_R = self._kernels.thresholds(logits_RV, nobody_R, self._params_SP)
        self._kernels.choose(logits_RV, nobody_R, self._params_SP, tokens_R, self._last_token_S, thresholds_R)
        self._kernels.count(tokens_R, nobody_R, self._params_SP, no_lines_LV)
        if not has_drafts:
            return
        drafted = Drafted(torch.zeros_like(nobody_R), tokens_R)
        self._kernels.penalise(logits_RV, nobody_R, self._params_SP, no_lines_LV, no_penalties_L4, drafted)
        self._kernels.choose(logits_RV, nobody_R, self._params_SP, tokens_R, None, None, drafted)
        for lines_LV in (None, no_lines_LV):
            self._kernels.accept(tokens_R, nobody_R, self._params_SP, self._last_token_S, drafted, lines_LV)

    def _sample_wishes(
        self,
        logits_RV: Tensor,
        slots_R: Tensor,
        rows: Sequence[int],
        out_tokens_R: Tensor,
        masks: tuple[Tensor, Tensor] | None,
        drafted: DraftedRows | None,
    ) -> Pending | None:
        """`sample` where rows want more than a temperature."""
        wishes = [(i, wish) for i, slot in enumerate(rows) if (wish := self._wishes.get(slot)) is not None]
        asking = [i for i, wish in wishes if wish.num_top is not None]
        if asking:
            asking_L = self._to_device(torch.tensor(asking, dtype=torch.int64))
            unedited_LV = logits_RV.index_select(0, asking_L)
        if masks is not None:
            self._kernels.mask(logits_RV, *masks)
        is_penalised = any(wish.line is not None for _, wish in wishes)
        if is_penalised:
            on_device = None if drafted is None else drafted.on_device
            self._kernels.penalise(logits_RV, slots_R, self._params_SP, self._lines_LV, self._penalties_L4, on_device)
        for i, wish in wishes:
            if wish.bias is not None:
                logits_RV[i].index_add_(0, *wish.bias)
            if wish.bans_left:
                self._ban(logits_RV[i], rows[i], wish, 0 if drafted is None else drafted.offsets[i])
        thresholds_R = None
        if any(wish.is_filtered for _, wish in wishes):
            thresholds_R = self._kernels.thresholds(logits_RV, slots_R, self._params_SP)
        self.choose(logits_RV, slots_R, out_tokens_R, drafted, thresholds_R, counts=is_penalised)
        if not asking:
            return None
        num_top: list[int | None] = [None] * len(rows)
        for i, wish in wishes:
            num_top[i] = wish.num_top
        chosen_L = out_tokens_R.index_select(0, asking_L).long()
        asked = [wish.asked for _, wish in wishes if wish.num_top is not None]
        return self._logprobs(unedited_LV, chosen_L, num_top, max(num for num in num_top if num is not None), asked)

    def _ban(self, logits_V: Tensor, slot: int, wish: _Wishes, offset: int) -> None:
        """Before min_new_tokens. The first token of a slot's rows comes for certain; `accepted` tells which of the others did."""
        assert wish.banned is not None
        # Behind guesses the slot's first row was here before, and counted its token off.
        if wish.bans_left >= max(offset, 1):
            logits_V.index_fill_(0, wish.banned, float("-inf"))
        if offset == 0:
            wish.bans_left -= 1
            if not wish.is_any():
                del self._wishes[slot]

    def _logprobs(
        self,
        logits_LV: Tensor,
        chosen_L: Tensor,
        num_top: Sequence[int | None],
        max_top: int,
        asked: Sequence[tuple[int, ...]],
    ) -> Pending:
        """Log-probabilities of the chosen tokens, of the best and of those that were asked for, sent to the host."""
        logits_LV = logits_LV.float()
        norm_L1 = torch.logsumexp(logits_LV, dim=-1, keepdim=True)
        top_LK, ids_LK = torch.topk(logits_LV, min(max_top, self._vocab_size), dim=-1)
        logprobs_L = (logits_LV.gather(1, chosen_L.unsqueeze(1)) - norm_L1).squeeze(1)
        asked_N = None
        if any(asked):
            places = [(line, token) for line, tokens in enumerate(asked) for token in tokens]
            lines_N, tokens_N = self._to_device(torch.tensor(places, dtype=torch.int64)).unbind(1)
            asked_N = self._to_host(logits_LV[lines_N, tokens_N] - norm_L1[lines_N, 0])
        return Pending(
            list(num_top), self._to_host(logprobs_L), self._to_host(top_LK - norm_L1), self._to_host(ids_LK), asked, asked_N
        )

    def _new_line(self, admission: Admission) -> int:
        """A line of the slot's own, filled from its history, and its penalties beside it."""
        if not self._free_lines:
            self._add_lines()
        line, sampling = self._free_lines.pop(), admission.sampling
        words, num_prompt = admission.history, admission.num_prompt
        if admission.media:
            kept = [token for token in words[:num_prompt] if token < MEDIA_BASE]
            words, num_prompt = (*kept, *words[num_prompt:]), len(kept)
        history = self._to_device(torch.tensor(words, dtype=torch.int64))
        prompt, generated = history[:num_prompt], history[num_prompt:]
        counts_V = self._lines_LV[line].zero_()
        counts_V.index_fill_(0, prompt, 1)
        counts_V.index_add_(0, generated, counts_V.new_full((len(generated),), 2))
        penalties = (sampling.repetition_penalty, sampling.frequency_penalty, sampling.presence_penalty, 0.0)
        self._penalties_L4[line].copy_(self._to_device(torch.tensor(penalties)))
        return line

    def _add_lines(self) -> None:
        """Twice as many lines. Those in use are copied, in stream order; there are never more than slots."""
        old, slots = len(self._lines_LV), len(self._params_SP)
        new = min(max(_FIRST_LINES, 2 * old), slots)
        assert new > old
        lines_LV, penalties_L4 = self._lines_LV.new_zeros((new, self._vocab_size)), self._penalties_L4.new_zeros((new, 4))
        lines_LV[:old] = self._lines_LV
        penalties_L4[:old] = self._penalties_L4
        self._lines_LV, self._penalties_L4 = lines_LV, penalties_L4
        self._free_lines += range(old, new)

    def _bias(self, sampling: SamplingParams) -> tuple[Tensor, Tensor]:
        values = dict(sampling.logit_bias)  # ids once each, so that they can be added all at once
        ids = torch.tensor(list(values), dtype=torch.int64)
        return self._to_device(ids), self._to_device(torch.tensor(list(values.values()), dtype=torch.float32))

    def _banned(self, sampling: SamplingParams) -> Tensor | None:
        """What may not come before min_new_tokens; None when that is nothing."""
        banned = {*([] if sampling.ignore_eos else self._eos), *sampling.stop_token_ids}
        ids = sorted(token for token in banned if 0 <= token < self._vocab_size)
        return self._to_device(torch.tensor(ids, dtype=torch.int64)) if ids else None

    def _masks_to_device(self, masked: Sequence[int], masks_GW: Masks) -> tuple[Tensor, Tensor]:
        """Rows and bits of the masks, as SamplingKernels.mask takes them. The bits travel from where they were filled, which is
        pinned memory (`Grammars.use_memory`) that stays as it is until the step is done."""
        rows_G = self._to_device(torch.tensor(masked, dtype=torch.int32))
        return rows_G, torch.from_numpy(masks_GW).to(self._device.torch_device, non_blocking=True)

    def _to_device(self, values: Tensor) -> Tensor:
        """A copy on the device, through pinned memory that torch keeps until it is made."""
        staged = self._device.pinned(tuple(values.shape), values.dtype).copy_(values)
        return staged.to(self._device.torch_device, non_blocking=True)

    def _to_host(self, values: Tensor) -> Tensor:
        return self._device.pinned(tuple(values.shape), values.dtype).copy_(values, non_blocking=True)


def _is_penalised(sampling: SamplingParams) -> bool:
    return sampling.repetition_penalty != 1.0 or sampling.frequency_penalty != 0.0 or sampling.presence_penalty != 0.0
