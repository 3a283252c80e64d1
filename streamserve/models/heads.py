"""What small networks that guess tokens ahead have in common: they read the target's stream and the token behind it.

Owns the protocol. A position's pair is (what the target's stream was at it, the token after it); from the pair a head makes a
state, which predicts the token after that one, and which stands for the stream at the next position as long as the target has
not been there. Shape letters: see kernels/ops.py; X is the width of what the target shows.
"""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from streamserve.kernels.ops import Batch, Network


class FeatureNetwork(Network, Protocol):
    """A network that lets others see its stream."""

    def forward_with_features(self, batch: Batch, layers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """`forward`, and the stream as it was before each of these layers (their number: behind the last one, before the last
        norm), side by side: [T, len(layers) * E]. `layers` ascend."""
        ...

    def embed(self, token_ids_T: Tensor) -> Tensor:
        """The stream before the first layer: [T, E]."""
        ...


class Head(Protocol):
    """A network that guesses, of one layer."""

    @property
    def layers(self) -> tuple[int, ...]:
        """What it reads of the target: FeatureNetwork.forward_with_features."""
        ...

    @property
    def token_ids_V(self) -> Tensor | None:
        """The target's token for each of the head's; None: they are the same."""
        ...

    def features(self, shown_TX: Tensor) -> Tensor:
        """What stands for the target's stream in a pair: [T, E]."""
        ...

    def prepare(self, batch: Batch) -> Any:
        """Index work of one pass over pairs, whose keys and values are the head's own."""
        ...

    def forward(self, features_TE: Tensor, token_ids_T: Tensor, positions_T: Tensor, prepared: Any) -> Tensor:
        """The states of pairs: [T, E]."""
        ...

    def logits(self, states_RE: Tensor) -> Tensor:
        """Float32, over the head's own tokens."""
        ...
