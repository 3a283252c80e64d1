"""How many bytes of pictures, videos and sounds live requests hold, waiting or running: a queue that counts requests alone would
let these fill the memory. Arrays that several requests share (n > 1, a picture that was prepared before) count once. Torch-free.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from streamserve.messages import Media


class HeldInputs:
    """Of one engine."""

    def __init__(self) -> None:
        self._num_holders: dict[int, int] = {}  # by what Media.inputs is
        self.num_bytes = 0

    def hold(self, media: Iterable[Media]) -> None:
        """A request with these is live from now on."""
        for one in media:
            holders = self._num_holders.get(id(one.inputs), 0)
            if not holders:
                self.num_bytes += _num_bytes(one.inputs)
            self._num_holders[id(one.inputs)] = holders + 1

    def release(self, media: Iterable[Media]) -> None:
        """It is no longer."""
        for one in media:
            holders = self._num_holders.pop(id(one.inputs)) - 1
            if holders:
                self._num_holders[id(one.inputs)] = holders
            else:
                self.num_bytes -= _num_bytes(one.inputs)

    def more(self, media: Iterable[Media]) -> int:
        """Bytes that a request with these would add."""
        added = {id(one.inputs): one.inputs for one in media if id(one.inputs) not in self._num_holders}
        return sum(_num_bytes(inputs) for inputs in added.values())


def _num_bytes(inputs: Mapping[str, Any]) -> int:
    return sum(getattr(array, "nbytes", 0) for array in inputs.values())
