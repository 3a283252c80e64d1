"""From a network that guesses, opened and held against its target (models/drafting.py), to a runner's drafter.

Owns nothing; composes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch

from streamserve.engine.drafters.draft_model import DraftModel
from streamserve.engine.drafters.heads import HeadDrafter
from streamserve.engine.drafters.passes import Passes, drafter_pool
from streamserve.engine.drafters.runner_drafter import RunnerDrafter
from streamserve.kernels.ops import Network
from streamserve.kernels.registry import Choice
from streamserve.models.drafting import OpenDrafter, OpenModel
from streamserve.models.heads import FeatureNetwork


@dataclass(frozen=True, slots=True)
class Room:
    """What a drafter is loaded for: the target's pages and slots, and how it computes. `choices`: the target's kernels."""

    num_pages: int
    page_size: int
    num_slots: int
    max_drafts: int
    dtype: torch.dtype
    threads: int
    choices: Mapping[str, Choice]


def load_drafter(opened: OpenDrafter, target: Network, room: Room) -> RunnerDrafter:
    """Read the weights. Blocks."""
    pool = drafter_pool(
        opened.kv_shape,
        num_pages=room.num_pages,
        page_size=room.page_size,
        num_slots=room.num_slots,
        max_drafts=room.max_drafts,
        dtype=opened.kv_dtype(room.dtype),
    )
    passes = Passes(pool, num_slots=room.num_slots, max_drafts=room.max_drafts)
    if isinstance(opened, OpenModel):
        return DraftModel(
            opened.load(pool, room.dtype, room.threads),
            passes,
            target,
            num_tokens=opened.checkpoint.spec.vocab_size,
            num_target_tokens=opened.num_target_tokens,
            max_drafts=room.max_drafts,
        )
    shown = cast(FeatureNetwork, target)  # every network on a CPU is one
    head = opened.load(shown, room.dtype, room.choices, room.threads)
    return HeadDrafter(head, passes, shown, max_drafts=room.max_drafts)
