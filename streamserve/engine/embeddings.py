"""Embeddings of media as a runner keeps them, and which tokens of a step they take the places of.

Owns the tensors by key, and each slot's places. Which to encode and which to give up the scheduler says (engine/encodings.py).
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import numpy as np
import structlog
import torch
from torch import Tensor

from streamserve.engine.plan import Plan
from streamserve.engine.rotary import Rotary, rotary_positions
from streamserve.kernels.ops import Embedded
from streamserve.messages import Span

log = structlog.get_logger(__name__)


class Encoder(Protocol):
    """Of the models' encoders what is needed here: models.vision.Vision."""

    whole_spans: ClassVar[bool]

    def encode(self, inputs: Sequence[Mapping[str, Any]]) -> list[Tensor]: ...


class Embeddings:
    """Of one runner. `has_rotary`: the network takes three rope positions a token."""

    def __init__(self, encoder: Encoder | None, *, num_slots: int, hidden_size: int, has_rotary: bool) -> None:
        self._encoder = encoder
        self._hidden_size = hidden_size
        self._kept: dict[bytes, Tensor] = {}
        self._places: list[Sequence[tuple[bytes, tuple[Span, ...]]]] = [()] * num_slots  # the arrays of media are not kept
        self._has_rotary = has_rotary
        self._rotary: list[Rotary | None] = [None] * num_slots
        self._shift = np.zeros(num_slots, np.int64)

    def take_in(self, plan: Plan) -> dict[bytes, str]:
        """The plan's admissions, then what it gives up and encodes. Returns what could not be encoded (zeros), and why."""
        failed: dict[bytes, str] = {}
        for admission in plan.admissions:
            self._places[admission.slot] = [(media.key, media.spans) for media in admission.media]
            if self._has_rotary:
                positions, shift = rotary_positions(admission.num_prompt, admission.media) if admission.media else (None, 0)
                self._rotary[admission.slot], self._shift[admission.slot] = positions, shift
        for key in plan.forgets:
            self._kept.pop(key, None)  # not there if the step that was to encode it failed
        for encode in plan.encodes:
            try:
                assert self._encoder is not None
                (embeds,) = self._encoder.encode((encode.inputs,))
                assert len(embeds) == encode.num_tokens, f"{len(embeds)} embeddings for {encode.num_tokens} places"
            except Exception as error:
                log.error("media_not_encoded", exc_info=error)
                failed[encode.key] = f"{type(error).__name__}: {error}"
                embeds = torch.zeros(encode.num_tokens, self._hidden_size)
            self._kept[encode.key] = embeds
        return failed

    def of(self, plan: Plan, firsts: Sequence[int]) -> Embedded | None:
        """Which tokens of the step take embeddings, and these. `firsts`: index in T of each row's first token."""
        places: list[np.ndarray[Any, np.dtype[np.int64]]] = []
        until: list[np.ndarray[Any, np.dtype[np.int64]]] = []
        parts: list[Tensor] = []
        for row, first in sorted(zip(plan.rows, firsts, strict=True), key=lambda pair: pair[1]):
            for key, spans in self._places[row.slot]:
                done = 0
                for span in spans:
                    begin, end = max(span.start, row.start), min(span.end, row.start + row.num_tokens)
                    if begin < end:
                        places.append(np.arange(begin, end) - row.start + first)
                        until.append(np.full(end - begin, span.end - 1))
                        parts.append(self._kept[key][done + begin - span.start : done + end - span.start])
                    done += span.num_tokens
        if not parts:
            return None
        assert self._encoder is not None
        device = parts[0].device
        see_until = torch.from_numpy(np.concatenate(until)).to(device) if self._encoder.whole_spans else None
        return Embedded(torch.from_numpy(np.concatenate(places)).to(device), torch.cat(parts), see_until)

    def rope(self, plan: Plan) -> Tensor | None:
        """Rope positions of the step's tokens, [3, T]; None for a network that takes one a token."""
        if not self._has_rotary:
            return None
        rows = [self.rotary(row.slot, row.start, row.num_tokens) for row in plan.rows]
        return torch.from_numpy(np.concatenate(rows, axis=1))

    def rotary(self, slot: int, start: int, num_tokens: int) -> "np.ndarray[Any, np.dtype[np.int64]]":
        """Rope positions [3, num_tokens] of a slot's tokens from position `start` on."""
        at = np.arange(start, start + num_tokens)
        out = np.broadcast_to(at + self._shift[slot], (3, num_tokens)).copy()
        known = self._rotary[slot]
        if known is not None and start < known.shape[1]:
            end = min(start + num_tokens, known.shape[1])
            out[:, : end - start] = known[:, start:end]
        return out
