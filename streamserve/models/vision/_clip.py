"""CLIP's vision transformer (arXiv 2103.00020): a class token before the patches, a norm before the first layer.

Owns its weights and arithmetic. Which layers' output is wanted its users say. Shape letters as in _vit.py.
"""

from collections.abc import Collection

from torch import Tensor, cat

from streamserve.models.vision import Read
from streamserve.models.vision._vit import Layers, Linear, Norm, VitSpec, layer_shapes, norm_shapes, patch_rows


def clip_weights(spec: VitSpec, prefix: str, *, num_layers: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights that Clip reads."""
    hidden, patch = spec.hidden_size, spec.patch_size
    return {
        f"{prefix}embeddings.class_embedding": (hidden,),
        f"{prefix}embeddings.patch_embedding.weight": (hidden, spec.num_channels, patch, patch),
        f"{prefix}embeddings.position_embedding.weight": (spec.side**2 + 1, hidden),
        **norm_shapes(f"{prefix}pre_layrnorm", hidden),  # so it is spelled in every checkpoint
        **layer_shapes(spec, prefix, num_layers),
    }


class Clip:
    """The encoder's first `num_layers` layers. The norm behind the last one belongs to the class token and has no use here."""

    def __init__(self, spec: VitSpec, read: Read, prefix: str, *, num_layers: int) -> None:
        self.spec = spec
        self._class_D = read(f"{prefix}embeddings.class_embedding")
        self._patches = Linear(read, f"{prefix}embeddings.patch_embedding", bias=False)
        self._positions_ND = read(f"{prefix}embeddings.position_embedding.weight")
        self._norm = Norm(read, f"{prefix}pre_layrnorm", spec.eps)
        self._layers = Layers(spec, read, prefix, num_layers)

    def states(self, pixels_BCHW: Tensor, *, keep: Collection[int] = ()) -> dict[int, Tensor]:
        """The stream [B, 1 + P, D], the class token first, behind as many layers as each of `keep` says and behind the last."""
        patches_BPD = self._patches(patch_rows(pixels_BCHW, self.spec.patch_size))
        first_B1D = self._class_D.expand(len(patches_BPD), 1, -1)
        return self._layers(self._norm(cat([first_B1D, patches_BPD], 1) + self._positions_ND), keep=keep)
