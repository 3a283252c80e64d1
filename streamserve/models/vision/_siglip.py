"""SigLIP's vision transformer (arXiv 2303.15343): no class token, a learned embedding for each place of a patch.

Owns its weights and arithmetic. Which layers' output is wanted, and where its positions come from, its users say: LLaVA, Gemma 3,
and Idefics 3, whose pictures have other sizes than those it was trained at. Shape letters as in _vit.py.
"""

from collections.abc import Collection

from torch import Tensor

from streamserve.models.vision import Read
from streamserve.models.vision._vit import Layers, Linear, Norm, VitSpec, layer_shapes, norm_shapes, patch_rows


def siglip_weights(
    spec: VitSpec, prefix: str, *, num_layers: int | None = None, post_norm: bool = True
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights that Siglip reads, with the same arguments."""
    hidden, patch = spec.hidden_size, spec.patch_size
    return {
        f"{prefix}embeddings.patch_embedding.weight": (hidden, spec.num_channels, patch, patch),
        f"{prefix}embeddings.patch_embedding.bias": (hidden,),
        f"{prefix}embeddings.position_embedding.weight": (spec.side**2, hidden),
        **layer_shapes(spec, prefix, spec.num_layers if num_layers is None else num_layers),
        **(norm_shapes(f"{prefix}post_layernorm", hidden) if post_norm else {}),
    }


class Siglip:
    """The encoder's first `num_layers` layers (None: all), and the norm behind the last one if `post_norm`.

    Names of weights are `prefix` and what transformers calls them, "embeddings.patch_embedding.weight" and so on.
    """

    def __init__(self, spec: VitSpec, read: Read, prefix: str, *, num_layers: int | None = None, post_norm: bool = True) -> None:
        self.spec = spec
        self._patches = Linear(read, f"{prefix}embeddings.patch_embedding")
        self._positions_ND = read(f"{prefix}embeddings.position_embedding.weight")
        self._layers = Layers(spec, read, prefix, spec.num_layers if num_layers is None else num_layers)
        self._norm = Norm(read, f"{prefix}post_layernorm", spec.eps) if post_norm else None

    def states(
        self,
        pixels_BCHW: Tensor,
        *,
        position_ids_BP: Tensor | None = None,
        mask_BP: Tensor | None = None,
        keep: Collection[int] = (),
    ) -> dict[int, Tensor]:
        """The stream [B, P, D] behind as many layers as each of `keep` says and behind the last, before the last norm.

        `position_ids_BP` (or [P]): which row of the position embedding each patch takes; None: pictures have the size it was
        trained at. `mask_BP`: true where there is picture and not padding.
        """
        x_BPD = self._patches(patch_rows(pixels_BCHW, self.spec.patch_size))
        x_BPD = x_BPD + (self._positions_ND if position_ids_BP is None else self._positions_ND[position_ids_BP])
        return self._layers(x_BPD, mask_BP, keep=keep)

    def __call__(self, pixels_BCHW: Tensor, *, position_ids_BP: Tensor | None = None, mask_BP: Tensor | None = None) -> Tensor:
        """What comes out behind the last layer, [B, P, D]; normed if `post_norm`."""
        (x_BPD,) = self.states(pixels_BCHW, position_ids_BP=position_ids_BP, mask_BP=mask_BP).values()
        return x_BPD if self._norm is None else self._norm(x_BPD)
