"""From a network that guesses, opened and held against its target (models/drafting.py), to a drafter of a GPU's runner: what
find.py is on a CPU.

Owns nothing; composes. In two steps: weights are loaded once, memory is handed out when it is known how much there is.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from streamserve.cache.pool import DevicePool
from streamserve.engine.device_state import DeviceState
from streamserve.engine.drafters.device_draft_model import DeviceDraftModel, max_guessed_tokens
from streamserve.engine.drafters.device_drafter import DeviceDrafter
from streamserve.engine.drafters.device_heads import DeviceHeadDrafter, max_guessing_rows
from streamserve.engine.drafters.device_passes import num_own_pages
from streamserve.kernels.devices.device import Device
from streamserve.kernels.ops import DeviceNetwork
from streamserve.models.drafting import OpenDrafter, OpenModel


@dataclass(frozen=True, slots=True)
class DeviceRoom:
    """What a drafter is loaded for. `longest`: most tokens that a request may ever hold; `dtype`: the target's."""

    num_slots: int
    page_size: int
    max_drafts: int
    max_step_tokens: int
    longest: int
    dtype: torch.dtype
    use_graphs: bool


def load_device_drafter(
    opened: OpenDrafter, target: DeviceNetwork, device: Device, room: DeviceRoom
) -> Callable[[DeviceState, int, int], DeviceDrafter]:
    """Read the weights. What is returned makes the drafter for a target's state, with so many pages and so long requests.
    Blocks."""
    where, dtype = device.torch_device, room.dtype
    num_own = num_own_pages(room.num_slots, room.max_drafts, room.page_size)

    def pool(num_pages: int) -> DevicePool:
        kv_dtype = opened.kv_dtype(dtype)
        size = {"num_pages": num_pages + num_own, "page_size": room.page_size}
        return DevicePool(opened.kv_shape, **size, dtype=kv_dtype, device=where)

    if isinstance(opened, OpenModel):
        max_rows = max_guessed_tokens(room.num_slots, room.max_drafts)
        network = opened.load_on_gpu(where, dtype, max_len=room.longest, max_rows=max_rows)
        opened.checkpoint.finish()
        vocab_size, num_target_tokens = opened.checkpoint.spec.vocab_size, opened.num_target_tokens
        return lambda state, num_pages, max_len: DeviceDraftModel(
            *(device, network, pool(num_pages), state),
            vocab_size=vocab_size,
            num_target_tokens=num_target_tokens,
            max_len=max_len,
            max_drafts=room.max_drafts,
            max_step_tokens=room.max_step_tokens,
            use_graphs=room.use_graphs,
        )
    head = opened.load_on_gpu(target, where, dtype, max_len=room.longest, max_rows=max_guessing_rows(room.num_slots))
    return lambda state, num_pages, max_len: DeviceHeadDrafter(
        *(device, head, pool(num_pages), state),
        vocab_size=opened.num_target_tokens,
        max_len=max_len,
        max_drafts=room.max_drafts,
        use_graphs=room.use_graphs,
    )
