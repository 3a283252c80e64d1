"""What the encoders of Qwen's vision models share: patches of pictures of any size, turned by row and column, merged in squares.

Owns the order of patches, the turning of heads (RoPE over two axes), attention within frames or windows, and the passage from a
picture's bytes to embeddings. Layers, norms and mergers are the families'. Which weight of a folder is whose is here too.

A picture is one frame, a clip several; frames never look at each other here. Patches stand in the order in which they are
merged: square after square of merge x merge patches, row after row of such squares. What depends on a frame's size alone (its
Tables) is worked out once.

Shape letters: F frames of one size, N patches of a frame, S squares of a frame (N / merge²), X bytes of a patch, E hidden size,
H heads, D head size, d D / 2.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from streamserve.errors import CheckpointError
from streamserve.models.vision import Read, Vision
from streamserve.models.vision._pixels import to_device
from streamserve.models.vision._vit import Linear, linear_shapes

MAX_PATCHES = 16_384  # in one pass: of a clip, so many frames that these are not exceeded
MAX_TABLES = 32  # sizes of frames whose tables are kept
LAYERS_OF_PART = 8
Places = NDArray[np.int64]
Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class EncoderSpec:
    """The numbers of a vision_config."""

    depth: int
    hidden_size: int
    inner_size: int
    num_heads: int
    out_size: int
    patch_size: int
    num_frames: int  # frames that a patch is deep
    merge: int
    theta: float
    window: int = 0  # squares along a side of an attention window; 0: there are none
    full_layers: frozenset[int] = frozenset()  # those that have no windows

    @property
    def head_dim(self) -> int:
        """Numbers of a head."""
        return self.hidden_size // self.num_heads

    @property
    def num_merged(self) -> int:
        """Patches of a square."""
        return self.merge**2


def read_encoder(config: Mapping[str, Any], defaults: Mapping[str, Any], *, hidden: str, out: str) -> EncoderSpec:
    """The vision_config of a folder's config.json. `hidden` and `out`: what it calls the width of the encoder, and of what comes
    out. Raises CheckpointError."""
    known = {"in_channels": 3, "spatial_merge_size": 2, "temporal_patch_size": 2, **defaults, **config.get("vision_config", {})}

    def number(key: str) -> int:
        value = known.get(key)
        if not isinstance(value, int) or value <= 0:
            raise CheckpointError(f"config.json: vision_config's {key} is {value!r}; a positive whole number is needed")
        return value

    spec = EncoderSpec(
        depth=number("depth"),
        hidden_size=number(hidden),
        inner_size=number(hidden) * number("mlp_ratio") if "mlp_ratio" in defaults else number("intermediate_size"),
        num_heads=number("num_heads"),
        out_size=number(out),
        patch_size=number("patch_size"),
        num_frames=number("temporal_patch_size"),
        merge=number("spatial_merge_size"),
        theta=float((known.get("rope_parameters") or {}).get("rope_theta") or 10000.0),
        window=known.get("window_size", 0) // number("patch_size") // number("spatial_merge_size"),
        full_layers=frozenset(known.get("fullatt_block_indexes", ())),
    )
    if number("in_channels") != 3 or spec.hidden_size % (4 * spec.num_heads):
        raise CheckpointError("config.json: vision_config has other than 3 channels, or heads whose size is no multiple of 4")
    return spec


# ---- which weight is whose ---------------------------------------------------------------------------------------------


def text_config(
    config: Mapping[str, Any], model_type: str, defaults: Mapping[str, Any], sections: Sequence[int], *, is_interleaved: bool
) -> dict[str, Any]:
    """The language model's config. In folders from before transformers 5 its keys stand beside vision_config."""
    text = {**defaults, **{key: value for key, value in (config.get("text_config") or config).items() if value is not None}}
    rope = {**text.pop("rope_scaling", {}), **text.pop("rope_parameters", {})}
    text.pop("vision_config", None)
    if "eos_token_id" not in text and config.get("eos_token_id") is not None:
        text["eos_token_id"] = config["eos_token_id"]
    return {
        **text,
        "model_type": model_type,
        "rope_parameters": {"mrope_section": list(sections), **rope, "mrope_interleaved": is_interleaved},
        "tie_word_embeddings": bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings")),
    }


def text_name(name: str) -> str | None:
    """Names with and without the prefix that transformers 5 writes."""
    if name.startswith("model.language_model."):
        return "model." + name.removeprefix("model.language_model.")
    return None if name.startswith(("visual.", "model.visual.")) else name


def encoder_name(name: str) -> str | None:
    """The same of the encoder's: canonical names have no prefix."""
    for prefix in ("model.visual.", "visual."):
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return None


# ---- order ---------------------------------------------------------------------------------------------------------------


class Windows(NamedTuple):
    """Windows of one shape, which follow one another: so many of `num_patches`, the first beginning at patch `start`."""

    start: int
    num_windows: int
    num_patches: int

    @property
    def end(self) -> int:
        return self.start + self.num_windows * self.num_patches


@dataclass(frozen=True, slots=True)
class Tables:
    """Of frames of one size, in patches. `turns_N1d`: cos + i sin of each patch's heads; `row_N` and `column_N`: where it lies.
    `order_N` says which patch stands where, and `back_S` which square each place takes in the end; None: all stay in order."""

    rows: int
    columns: int
    turns_N1d: Tensor
    row_N: Tensor
    column_N: Tensor
    windows: tuple[Windows, ...] = ()
    order_N: Tensor | None = None
    back_S: Tensor | None = None


def patch_places(rows: int, columns: int, merge: int) -> Places:
    """Row and column [2, N] of each patch of a frame."""
    cut = np.indices((rows, columns)).reshape(2, rows // merge, merge, columns // merge, merge)
    return cut.transpose(0, 1, 3, 2, 4).reshape(2, -1)


def window_order(rows: int, columns: int, side: int) -> tuple[Places, list[tuple[int, int]]]:
    """Squares of a frame, window after window, and how many windows of how many squares follow one another.

    Windows of equal shape stand together: whole ones, those cut off at the right, at the bottom, and at both. So attention takes
    at most four products, without padding and without a mask."""
    squares = np.arange(rows * columns).reshape(rows, columns)
    parts, shapes = [], []
    for top, bottom in ((0, rows - rows % side), (rows - rows % side, rows)):
        for left, right in ((0, columns - columns % side), (columns - columns % side, columns)):
            block = squares[top:bottom, left:right]
            if not block.size:
                continue
            high, wide = min(side, bottom - top), min(side, right - left)
            cut = block.reshape(block.shape[0] // high, high, block.shape[1] // wide, wide).transpose(0, 2, 1, 3)
            parts.append(cut.reshape(-1))
            shapes.append((block.size // (high * wide), high * wide))
    return np.concatenate(parts), shapes


# ---- arithmetic ------------------------------------------------------------------------------------------------------------


class Attention:
    """Each patch looks at all of its frame, or of its window.

    A head's two halves are turned against each other. Rows of q's and k's weights are put in another order at load, so that what
    is turned together lies together: as complex numbers, that is one product. What q and k give together stays the same.
    """

    def __init__(self, read: Read, at: str, num_heads: int) -> None:
        self._heads = num_heads
        weight, bias = read(f"{at}qkv.weight"), read(f"{at}qkv.bias")
        self._weight, self._bias = self._paired(weight), self._paired(bias)
        self._out = Linear(read, f"{at}proj")

    def _paired(self, qkv: Tensor) -> Tensor:
        qk, v = torch.split(qkv, [len(qkv) // 3 * 2, len(qkv) // 3])
        paired = qk.view(2 * self._heads, 2, -1, *qkv.shape[1:]).transpose(1, 2)
        return torch.cat((paired.reshape(qk.shape), v))

    def __call__(self, x_FNE: Tensor, turns_N1d: Tensor, windows: Sequence[Windows]) -> Tensor:
        frames, num_patches, _ = x_FNE.shape
        qkv_FNJD = F.linear(x_FNE, self._weight, self._bias).view(frames, num_patches, 3 * self._heads, -1)
        qk_FNJd2 = qkv_FNJD[:, :, : 2 * self._heads].float().view(frames, num_patches, 2 * self._heads, -1, 2)
        pairs = torch.view_as_complex(qk_FNJd2)
        qk_FNJD = torch.view_as_real(pairs * turns_N1d).flatten(-2).to(x_FNE.dtype)
        heads = qk_FNJD[:, :, : self._heads], qk_FNJD[:, :, self._heads :], qkv_FNJD[:, :, 2 * self._heads :]
        if not windows:
            return self._out(_attend(*heads).flatten(2))
        parts = []
        for part in windows:
            q, k, v = (x[:, part.start : part.end].reshape(-1, part.num_patches, *x.shape[2:]) for x in heads)
            parts.append(_attend(q, k, v).reshape(frames, part.end - part.start, -1))
        return self._out(torch.cat(parts, dim=1))


def _attend(q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BLHD, v_BLHD))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


class PatchEmbedding:
    """A convolution by whole patches, which is a product. Bytes are normalised here: they travel as they are.

    A picture's patch is one frame, although the convolution is two deep: it sees the same frame twice, so the weights of both
    are added up beforehand, and a picture comes as one."""

    def __init__(self, read: Read, *, bias: bool) -> None:
        weight = read("patch_embed.proj.weight")
        self._of_clip, self._of_picture = weight.flatten(1), weight.float().sum(2).flatten(1).to(weight.dtype)
        self._bias = read("patch_embed.proj.bias") if bias else None

    def __call__(self, patches_FNX: Tensor, scale_3: Tensor, shift_3: Tensor) -> Tensor:
        colours = patches_FNX.view(*patches_FNX.shape[:2], 3, -1).float()
        levels = torch.addcmul(shift_3.unsqueeze(1), colours, scale_3.unsqueeze(1)).flatten(2)
        weight = self._of_clip if levels.shape[-1] == self._of_clip.shape[1] else self._of_picture
        return F.linear(levels.to(weight.dtype), weight, self._bias)


def patch_shapes(spec: EncoderSpec, *, bias: bool) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a PatchEmbedding's weights."""
    weight = (spec.hidden_size, 3, spec.num_frames, spec.patch_size, spec.patch_size)
    return {"patch_embed.proj.weight": weight, **({"patch_embed.proj.bias": (spec.hidden_size,)} if bias else {})}


def attention_shapes(spec: EncoderSpec, at: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of an Attention's weights."""
    hidden = spec.hidden_size
    return linear_shapes(f"{at}qkv", 3 * hidden, hidden) | linear_shapes(f"{at}proj", hidden, hidden)


def in_parts(layers: Sequence[Layer], last: Layer) -> list[Layer]:
    """Layers, and what comes behind them, in the parts of an encoder."""

    def part(some: Sequence[Layer], x: Tensor) -> Tensor:
        for layer in some:
            x = layer(x)
        return x

    parts = [list(layers[first : first + LAYERS_OF_PART]) for first in range(0, len(layers), LAYERS_OF_PART)]
    parts[-1].append(last)
    return [partial(part, some) for some in parts]


class QwenVision(Vision):
    """Pictures and clips to embeddings. A family says what its weights are, and what is computed of a frame's patches."""

    text_name = staticmethod(text_name)
    encoder_name = staticmethod(encoder_name)
    has_patch_bias: ClassVar[bool] = False

    @classmethod
    def spec_of(cls, config: Mapping[str, Any]) -> EncoderSpec:
        """The encoder's numbers."""
        raise NotImplementedError

    def __init__(self, config: Mapping[str, Any], read: Read, *, device: torch.device, dtype: torch.dtype) -> None:
        self._spec, self._device = self.spec_of(config), device
        self._patches = PatchEmbedding(read, bias=self.has_patch_bias)
        self._tables: OrderedDict[tuple[int, int], Tables] = OrderedDict()

    def forward(self, x_FNE: Tensor, tables: Tables) -> Tensor:
        """Embeddings [F, S, width] of embedded patches, in the order of the tables."""
        for part in self.parts(tables):
            x_FNE = part(x_FNE)
        return x_FNE

    def parts(self, tables: Tables) -> list[Layer]:
        """forward() in parts that follow each other, of about the same work: a runner may do other things between them."""
        raise NotImplementedError

    @torch.inference_mode()
    def encode(self, inputs: Sequence[Mapping[str, Any]]) -> list[Tensor]:
        """`inputs` as media/families/_qwen.py makes them: `pixels`, bytes [frames, height, width, 3], where a clip has so many
        frames that they fill patches; `scale` and `shift` of each colour (see _pixels.py)."""
        out: dict[int, Tensor] = {}
        of_size: dict[tuple[int, int], list[int]] = {}
        for at, one in enumerate(inputs):
            _, height, width, _ = one["pixels"].shape
            of_size.setdefault((height // self._spec.patch_size, width // self._spec.patch_size), []).append(at)
        for (rows, columns), members in of_size.items():
            tables = self.tables(rows, columns)
            parts = [self._embedded(inputs[at], tables) for at in members]
            passes = torch.split(_joined(parts), max(1, MAX_PATCHES // (rows * columns)))
            y_FSX = _joined([self._repeated(x_FNE, tables) for x_FNE in passes])
            if tables.back_S is not None:
                y_FSX = y_FSX[:, tables.back_S]
            for at, part in zip(members, torch.split(y_FSX, [len(x_FNE) for x_FNE in parts]), strict=True):
                out[at] = part.flatten(0, 1)
        return [out[at] for at in range(len(inputs))]

    def _embedded(self, one: Mapping[str, Any], tables: Tables) -> Tensor:
        pixels, scale_3, shift_3 = (to_device(one[name], self._device) for name in ("pixels", "scale", "shift"))
        spec, deep = self._spec, 1 if len(pixels) == 1 else self._spec.num_frames
        side = spec.patch_size
        squares = (tables.rows // spec.merge, spec.merge, side, tables.columns // spec.merge, spec.merge, side, 3)
        # frames, depth, (square, patch, pixel) by row, the same by column, colour: to patches of colour, depth, row, column
        cut = pixels.view(-1, deep, *squares).permute(0, 2, 5, 3, 6, 8, 1, 4, 7)
        patches_FNX = cut.reshape(len(cut), tables.rows * tables.columns, -1)
        return self._patches(patches_FNX if tables.order_N is None else patches_FNX[:, tables.order_N], scale_3, shift_3)

    def _repeated(self, x_FNE: Tensor, tables: Tables) -> Tensor:
        for number, part in enumerate(self.parts(tables)):
            x_FNE = self.repeat(part, x_FNE, (tables.rows, tables.columns, number))
        return x_FNE

    def tables(self, rows: int, columns: int) -> Tables:
        """Of frames of so many patches."""
        if (found := self._tables.get((rows, columns))) is not None:
            self._tables.move_to_end((rows, columns))
            return found
        if len(self._tables) >= MAX_TABLES:
            self._tables.popitem(last=False)
        made = self._tables[rows, columns] = self._make_tables(rows, columns)
        return made

    def _make_tables(self, rows: int, columns: int) -> Tables:
        spec = self._spec
        places, order_N, back_S = patch_places(rows, columns, spec.merge), None, None
        windows: list[Windows] = []
        if spec.window:
            squares, shapes = window_order(rows // spec.merge, columns // spec.merge, spec.window)
            order = (squares[:, None] * spec.num_merged + np.arange(spec.num_merged)).reshape(-1)
            places, start = places[:, order], 0
            for count, num_squares in shapes:
                windows.append(Windows(start, count, num_squares * spec.num_merged))
                start = windows[-1].end
            order_N, back_S = (to_device(x, self._device) for x in (order, np.argsort(squares)))
        row_N, column_N = to_device(places, self._device)
        exponents = torch.arange(0, spec.head_dim // 2, 2, device=self._device).float() / (spec.head_dim // 2)
        freq = 1.0 / spec.theta**exponents
        angles_Nd = torch.cat((torch.outer(row_N.float(), freq), torch.outer(column_N.float(), freq)), dim=1)
        turns_N1d = torch.polar(torch.ones_like(angles_Nd), angles_Nd).unsqueeze(1)
        return Tables(rows, columns, turns_N1d, row_N, column_N, tuple(windows), order_N, back_S)

    def squares(self, x_FNE: Tensor) -> Tensor:
        """The patches of each square side by side."""
        return x_FNE.reshape(len(x_FNE), -1, self._spec.num_merged * x_FNE.shape[-1])


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(tuple(parts))
