"""Train eyes for a Llama-like model that has none: an encoder and a projector in LLaVA's layout, on scenes that it draws itself.

    python demo/train_eyes.py OUT [--model MODEL] [--look-s 60] [--train-s 330] [--seed 0]

The language model stays as it is. Two stages, each bounded in time. In the first one the encoder learns to see alone: which
shape and colour each patch shows, how many there are of each, where things are seen from each other; and its output is drawn to
the language model's own embeddings of these words, so that the model finds something it knows. In the second one questions about
pictures are answered through the frozen model, and what answers cost teaches the eyes. OUT becomes a folder with config.json,
preprocessor_config.json and model.safetensors (float16); README.md says what to expect.

Owns the recipe. The language model is computed here in plain torch; formats, tokenizer and template are StreamServe's.

Shape letters: see kernels/ops.py; besides N rows, L their tokens, C tokens of what stands before them, P patches, X the encoder's
width, O things of a scene.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from demo.lessons import MAX_ANSWERS, Form, Lessons, Script
from demo.scenes import COLOUR_NAMES, KINDS, MAX_THINGS, SHAPES
from streamserve.default_model import find_default_model
from streamserve.models.checkpoint import open_checkpoint
from streamserve.models.spec import ModelSpec
from streamserve.text.model import TextModel, load_text_model

STARTED = time.perf_counter()
NUM_SHAPES, NUM_COLOURS = len(SHAPES) + 1, len(COLOUR_NAMES)  # of shapes one more: text
LOOK_WEIGHT = 0.3  # of what the first stage teaches, at the beginning of the second one; it goes down to 0
ROOM_BEFORE = 40  # tokens of the longest system prompt, and what makes masks a multiple of 8 wide
IMAGE_TOKEN = "<empty_output>"  # in the model's vocabulary, and never in a chat


def say(words: str) -> None:
    """A line of the log, with the seconds since the start."""
    print(f"{time.perf_counter() - STARTED:7.1f} s  {words}", flush=True)


# --- the eyes, named as transformers' LlavaForConditionalGeneration names a SigLIP encoder and its projector


class _Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x_NPX: Tensor) -> Tensor:
        def split(y: Tensor) -> Tensor:
            return y.view(*y.shape[:2], self.num_heads, -1).transpose(1, 2)

        q, k, v = split(self.q_proj(x_NPX)), split(self.k_proj(x_NPX)), split(self.v_proj(x_NPX))
        mixed: Tensor = self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return mixed


class _MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return y


class _Layer(nn.Module):
    def __init__(self, width: int, num_heads: int, spread: float) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.self_attn, self.mlp = _Attention(width, num_heads), _MLP(width)
        for linear in (self.self_attn.out_proj, self.mlp.fc2):
            nn.init.normal_(linear.weight, std=spread)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        y: Tensor = x + self.mlp(self.layer_norm2(x))
        return y


class _Embeddings(nn.Module):
    def __init__(self, form: Form, width: int) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(3, width, form.patch_size, form.patch_size)
        self.position_embedding = nn.Embedding(form.num_patches, width)
        nn.init.normal_(self.position_embedding.weight, std=0.02)

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        x: Tensor = self.patch_embedding(pixels_NCHW).flatten(2).transpose(1, 2)
        return x.float() + self.position_embedding.weight  # the stream is float32, whatever products are


class _Encoder(nn.Module):
    def __init__(self, width: int, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(width, num_heads, 0.02 / math.sqrt(2 * num_layers)) for _ in range(num_layers))


class _Tower(nn.Module):
    def __init__(self, form: Form, width: int, num_layers: int, num_heads: int) -> None:
        super().__init__()
        self.embeddings, self.encoder = _Embeddings(form, width), _Encoder(width, num_layers, num_heads)
        self.post_layernorm = nn.LayerNorm(width, eps=1e-6)  # part of the layout; a projector reads what comes before it


class _Projector(nn.Module):
    def __init__(self, width: int, out_size: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(width, out_size), nn.Linear(out_size, out_size)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear_2(F.gelu(self.linear_1(x)))
        return y


def _run(layer: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = layer(x)
    return y


class Eyes(nn.Module):
    """Pictures to what stands in the language model's stream in their places."""

    def __init__(self, form: Form, out_size: int, *, width: int = 256, num_layers: int = 8, num_heads: int = 8) -> None:
        super().__init__()
        self.form, self.width, self.num_heads, self.num_layers = form, width, num_heads, num_layers
        self.vision_tower = _Tower(form, width, num_layers, num_heads)
        self.multi_modal_projector = _Projector(width, out_size)
        self.run_layer: Callable[[nn.Module, Tensor], Tensor] = _run

    def see(self, pictures_NHWC: Tensor) -> Tensor:
        """Pixels of 0 to 255 to what the encoder's last layer gives, [N, P, X]."""
        x: Tensor = self.vision_tower.embeddings(pictures_NHWC.permute(0, 3, 1, 2).float() / 127.5 - 1.0)
        for layer in self.vision_tower.encoder.layers:
            x = self.run_layer(layer, x)
        return x

    def tell(self, seen_NPX: Tensor) -> Tensor:
        """What is seen, in the language model's stream: [N, P, E]."""
        told: Tensor = self.multi_modal_projector(seen_NPX)
        return told

    def weights(self) -> dict[str, Tensor]:
        """By the names in the file; float16."""
        return {name: weight.detach().half().cpu().contiguous() for name, weight in self.state_dict().items()}

    def save(self, folder: Path, spec: ModelSpec, image_token: int) -> None:
        """The folder of a vision model, but for the language model's weights."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self.weights(), folder / "model.safetensors", {"format": "pt"})
        form = self.form
        config: dict[str, Any] = {
            "architectures": ["LlavaForConditionalGeneration"],
            "model_type": "llava",
            "image_token_index": image_token,
            "image_seq_length": form.num_patches,
            "projector_hidden_act": "gelu",
            "multimodal_projector_bias": True,
            "vision_feature_layer": -1,
            "vision_feature_select_strategy": "full",
            "tie_word_embeddings": spec.tie_embeddings,
            "dtype": "float16",
            "vision_config": {
                "model_type": "siglip_vision_model",
                "hidden_size": self.width,
                "intermediate_size": 4 * self.width,
                "num_hidden_layers": self.num_layers,
                "num_attention_heads": self.num_heads,
                "num_channels": 3,
                "image_size": form.image_size,
                "patch_size": form.patch_size,
                "hidden_act": "gelu_pytorch_tanh",
                "layer_norm_eps": 1e-6,
                "vision_use_head": False,
            },
            "text_config": {
                "model_type": "llama",
                "hidden_size": spec.hidden_size,
                "intermediate_size": spec.intermediate_size,
                "num_hidden_layers": spec.num_layers,
                "num_attention_heads": spec.num_heads,
                "num_key_value_heads": spec.num_kv_heads,
                "head_dim": spec.head_dim,
                "vocab_size": spec.vocab_size,
                "max_position_embeddings": spec.max_position_embeddings,
                "rms_norm_eps": spec.rms_norm_eps,
                "rope_theta": spec.rope.theta,
                "hidden_act": "silu",
                "tie_word_embeddings": spec.tie_embeddings,
            },
        }
        processor = {
            "image_processor_type": "SiglipImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"height": form.image_size, "width": form.image_size},
            "resample": 3,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_std": [0.5, 0.5, 0.5],
        }
        for name, content in (("config", config), ("preprocessor_config", processor)):
            (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


# --- the language model


def rms_norm(x: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight_E, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on the last dimension; cos and sin broadcast to x."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def decoder_layer(
    x_NLE: Tensor,
    weights: tuple[Tensor, ...],
    keys_KCD: Tensor,
    values_KCD: Tensor,
    mask: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: tuple[int, int],
    eps: float,
) -> Tensor:
    """One layer, behind tokens whose keys and values are known. The heads of a group stand where more tokens would: `mask` has as
    many rows."""
    norm_E, qkv, out, mlp_norm_E, gate_up, down = weights
    num, length = x_NLE.shape[:2]
    num_heads, num_kv = heads
    dtype = qkv.dtype
    read = F.linear(rms_norm(x_NLE, norm_E, eps).to(dtype), qkv).view(num, length, num_heads + 2 * num_kv, -1).transpose(1, 2)
    turned = rotate(read[:, : num_heads + num_kv].float(), cos, sin).to(dtype)
    keys = torch.cat((keys_KCD.expand(num, -1, -1, -1), turned[:, num_heads:]), 2)
    values = torch.cat((values_KCD.expand(num, -1, -1, -1), read[:, num_heads + num_kv :]), 2)
    queries = turned[:, :num_heads].reshape(num, num_kv, num_heads // num_kv * length, -1)
    mixed = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask).reshape(num, num_heads, length, -1)
    x_NLE = x_NLE + F.linear(mixed.transpose(1, 2).reshape(num, length, -1), out)
    gate, up = F.linear(rms_norm(x_NLE, mlp_norm_E, eps).to(dtype), gate_up).chunk(2, -1)
    return x_NLE + F.linear(F.silu(gate) * up, down)


class Reader:
    """The frozen language model, for rows that begin behind one of a few system prompts. The stream is float32."""

    def __init__(self, path: Path, heads: list[tuple[int, ...]], length: int, device: torch.device) -> None:
        checkpoint = open_checkpoint(path)
        self.spec = spec = checkpoint.spec
        if spec.qkv_bias or spec.qk_norm or spec.o_bias or spec.mlp_bias or spec.sliding_window:
            raise SystemExit(f"{path}: this recipe is for networks like Llama's, without biases, norms of heads and windows")
        self.device = device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        num_heads, eps = (spec.num_heads, spec.num_kv_heads), spec.rms_norm_eps

        def run(x_NLE: Tensor, weights: Any, keys: Tensor, values: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
            return decoder_layer(x_NLE, weights, keys, values, mask, cos, sin, num_heads, eps)

        self._run: Callable[..., Tensor] = run

        def read(*names: str) -> Tensor:
            return torch.cat([checkpoint.tensor(f"{name}.weight") for name in names]).to(device, self.dtype)

        self.embedding_VE = read("model.embed_tokens")
        self._head_VE = self.embedding_VE if spec.tie_embeddings else read("lm_head")
        self._norm_E = checkpoint.tensor("model.norm.weight").float().to(device)
        self._layers = []
        for i in range(spec.num_layers):
            at = f"model.layers.{i}."
            self._layers.append(
                (
                    checkpoint.tensor(f"{at}input_layernorm.weight").float().to(device),
                    read(*(f"{at}self_attn.{part}_proj" for part in "qkv")),
                    read(f"{at}self_attn.o_proj"),
                    checkpoint.tensor(f"{at}post_attention_layernorm.weight").float().to(device),
                    read(f"{at}mlp.gate_proj", f"{at}mlp.up_proj"),
                    read(f"{at}mlp.down_proj"),
                )
            )
        freq, factor = spec.inv_freq()
        room = ROOM_BEFORE + length
        angles = torch.arange(room, dtype=torch.float32)[:, None] * torch.tensor(freq, dtype=torch.float32)
        angles = torch.cat((angles, angles), -1)
        self._cos, self._sin = (angles.cos() * factor).to(device), (angles.sin() * factor).to(device)
        self._before = [self._read_head(head) for head in heads]
        self.lengths_before = [len(head) for head in heads]

    def compile(self, kernel: str) -> None:
        """One layer, for all of them, with this attention."""
        run = torch.compile(self._run, dynamic=False)

        def run_with(*arguments: Any) -> Tensor:
            with sdpa_kernel([getattr(SDPBackend, kernel), SDPBackend.MATH], set_priority=True):
                return run(*arguments)

        self._run = run_with

    @torch.no_grad()
    def _read_head(self, ids: tuple[int, ...]) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of a system prompt in each layer, with room behind them."""
        spec = self.spec
        heads, kv, eps = spec.num_heads, spec.num_kv_heads, spec.rms_norm_eps
        count = len(ids)
        assert count <= ROOM_BEFORE
        x = F.embedding(torch.tensor([ids], device=self.device), self.embedding_VE).float()
        cos, sin = self._cos[:count], self._sin[:count]
        causal = torch.ones(count, count, dtype=torch.bool, device=self.device).tril().repeat(heads // kv, 1)
        nothing = torch.empty(kv, 0, spec.head_dim, dtype=self.dtype, device=self.device)
        out = []
        for weights in self._layers:
            read = (
                F.linear(rms_norm(x, weights[0], eps).to(self.dtype), weights[1]).view(count, heads + 2 * kv, -1).transpose(0, 1)
            )
            keys = rotate(read[heads : heads + kv].float(), cos, sin).to(self.dtype)
            room = (0, 0, 0, ROOM_BEFORE - count)
            out.append((F.pad(keys, room), F.pad(read[heads + kv :], room)))
            x = decoder_layer(x, weights, nothing, nothing, causal, cos, sin, (heads, kv), eps)
        return out

    def states(self, x_NLE: Tensor, position_NL: Tensor, part_NL: Tensor, system: int) -> Tensor:
        """Of rows behind one system prompt: the stream behind the last norm. A token sees what is before it in its own part and
        in part 0."""
        length = x_NLE.shape[1]
        is_same = (part_NL[:, None, :] == part_NL[:, :, None]) | (part_NL[:, None, :] == 0)
        sees = is_same & torch.ones(length, length, dtype=torch.bool, device=self.device).tril()
        before = (torch.arange(ROOM_BEFORE, device=self.device) < self.lengths_before[system]).expand(len(x_NLE), length, -1)
        mask = torch.zeros(len(x_NLE), 1, length, ROOM_BEFORE + length, dtype=self.dtype, device=self.device)
        mask.masked_fill_(~torch.cat((before, sees), -1)[:, None], -math.inf)
        mask = mask.repeat(1, 1, self.spec.num_heads // self.spec.num_kv_heads, 1)
        cos, sin = self._cos[position_NL][:, None], self._sin[position_NL][:, None]
        x = x_NLE
        for weights, (keys, values) in zip(self._layers, self._before[system], strict=True):
            x = self._run(x, weights, keys, values, mask, cos, sin)
        return rms_norm(x, self._norm_E, self.spec.rms_norm_eps).to(self.dtype)

    def logits(self, states: Tensor) -> Tensor:
        return F.linear(states, self._head_VE).float()


# --- rows on the device


class Rows:
    """Rows to train on, the newest ones; filled anew in turn."""

    def __init__(self, form: Form, capacity: int, device: torch.device) -> None:
        self._device = device
        self.count = self._at = self.total = 0
        self._fields: dict[str, Tensor] = {}
        for name in form.row.names or ():
            kind, shape = form.row[name].base, form.row[name].shape
            like = torch.from_numpy(np.zeros(0, kind)).dtype
            self._fields[name] = torch.zeros((capacity, *shape), dtype=like, device=device)
        self._capacity = capacity

    def add(self, rows: NDArray[Any]) -> None:
        """A block; the capacity is a multiple of its length."""
        for name, field in self._fields.items():
            field[self._at : self._at + len(rows)] = torch.from_numpy(np.ascontiguousarray(rows[name])).to(self._device)
        self._at = (self._at + len(rows)) % self._capacity
        self.total += len(rows)
        self.count = min(self._capacity, self.total)

    def part(self, which: Tensor) -> dict[str, Tensor]:
        return {name: field[which] for name, field in self._fields.items()}

    def some(self, count: int) -> dict[str, Tensor]:
        return self.part(torch.randint(self.count, (count,), device=self._device))


# --- what the first stage teaches


class Teacher(nn.Module):
    """Heads that ask the encoder what it sees; they are thrown away."""

    def __init__(self, eyes: Eyes, reader: Reader, text: TextModel) -> None:
        super().__init__()
        width = eyes.width
        self._form = eyes.form
        self.norm = nn.LayerNorm(width)
        self.patch = nn.Linear(width, NUM_SHAPES + 1 + NUM_COLOURS)
        self.pool = nn.Linear(width, 256)
        self.whole = nn.Linear(256, (NUM_SHAPES + NUM_COLOURS + 1) * (MAX_THINGS + 1) + NUM_COLOURS + NUM_SHAPES * NUM_COLOURS)
        self.ask = nn.Embedding(NUM_SHAPES * NUM_COLOURS, 64)
        self.apart = nn.Sequential(nn.Linear(width + 64, 256), nn.GELU(), nn.Linear(256, 2))

        def words(*names: str) -> Tensor:
            return torch.stack([reader.embedding_VE[text.tokenizer.encode(f" {name}")].float().mean(0) for name in names])

        shapes, colours = words(*SHAPES, "word", "background"), words(*COLOUR_NAMES)
        self.size = float(shapes.pow(2).mean().sqrt())
        self._shape_words, self._colour_words = shapes, colours

    def _on_patches(self, rows: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Shape and colour that each patch shows, and the patch in which each thing's centre is."""
        side = self._form.side
        things = rows["things"]
        shape, colour, x, y, radius = things.unbind(-1)
        grid = (torch.arange(side, device=things.device) + 0.5) / side
        dy = grid.view(1, side, 1, 1) - y[:, None, None, :]
        dx = grid.view(1, 1, side, 1) - x[:, None, None, :]
        distance = (dx.square() + dy.square()).sqrt() - 0.7 * radius[:, None, None, :]
        distance = distance.masked_fill(shape[:, None, None, :] < 0, 9.0).flatten(1, 2)
        centre = (y * side).long().clamp(0, side - 1) * side + (x * side).long().clamp(0, side - 1)
        is_centre = (torch.arange(side * side, device=things.device)[None, :, None] == centre[:, None, :]) & (
            shape[:, None, :] >= 0
        )
        distance = distance.masked_fill(is_centre, -9.0)
        nearest, which = distance.min(-1)
        is_ground = nearest > 0.0
        shape_NP = shape.long().gather(1, which).masked_fill(is_ground, NUM_SHAPES)
        colour_NP = torch.where(is_ground, rows["ground"].long()[:, None], colour.long().gather(1, which).clamp(min=0))
        return shape_NP, colour_NP, centre

    def loss(self, eyes: Eyes, rows: dict[str, Tensor], seen_NPX: Tensor, *, with_words: bool) -> tuple[Tensor, Tensor]:
        """And figures: how often patches and counts are right, how far off places are."""
        shape_NP, colour_NP, centre_NO = self._on_patches(rows)
        x = self.norm(seen_NPX)
        shapes, colours = self.patch(x).float().split((NUM_SHAPES + 1, NUM_COLOURS), -1)
        # Most patches show the ground.
        weight_NP = torch.where(shape_NP < NUM_SHAPES, 1.0, 0.15)
        patch = F.cross_entropy(shapes.flatten(0, 1), shape_NP.flatten(), reduction="none")
        patch = patch + F.cross_entropy(colours.flatten(0, 1), colour_NP.flatten(), reduction="none")
        total = (patch * weight_NP.flatten()).sum() / weight_NP.sum()

        shape_NO, colour_NO = rows["things"][..., 0].long(), rows["things"][..., 1].long()
        is_there = shape_NO >= 0
        shape_1 = F.one_hot(shape_NO.clamp(min=0), NUM_SHAPES) * is_there[..., None]
        colour_1 = F.one_hot(colour_NO.clamp(min=0), NUM_COLOURS) * is_there[..., None]
        counts = torch.cat((shape_1.sum(1), colour_1.sum(1), is_there.sum(1, keepdim=True)), -1)
        pair_NO = (shape_NO * NUM_COLOURS + colour_NO).clamp(min=0)
        pairs = (F.one_hot(pair_NO, NUM_SHAPES * NUM_COLOURS) * is_there[..., None]).amax(1).float()
        pooled = F.gelu(self.pool(x)).mean(1)
        whole = self.whole(pooled).float()
        cut = counts.shape[1] * (MAX_THINGS + 1)
        counted = whole[:, :cut].unflatten(-1, (counts.shape[1], MAX_THINGS + 1))
        count_loss = F.cross_entropy(counted.flatten(0, 1), counts.flatten(), reduction="none").view(counts.shape)
        weight = torch.where(counts > 0, 1.0, 0.15)
        total = total + (count_loss * weight).sum() / weight.sum()
        total = total + F.cross_entropy(whole[:, cut : cut + NUM_COLOURS], rows["ground"].long())
        total = total + 10.0 * F.binary_cross_entropy_with_logits(whole[:, cut + NUM_COLOURS :], pairs)

        # From the patch of one thing: how far away each other one is.
        at_NOX = x.gather(1, centre_NO[..., None].expand(-1, -1, x.shape[-1]))
        asked_NO = self.ask(pair_NO)
        num = pair_NO.shape[1]
        both = torch.cat((at_NOX[:, :, None].expand(-1, -1, num, -1), asked_NO[:, None].expand(-1, num, -1, -1)), -1)
        told = self.apart(both).float()
        places = rows["things"][..., 2:4]
        truth = places[:, None] - places[:, :, None]
        is_alone = (pair_NO[:, None] == pair_NO[:, :, None]).sum(-1) == 1
        is_asked = is_there[:, :, None] & (is_there & is_alone)[:, None]
        error = (told - truth).abs().sum(-1) * is_asked
        apart = error.sum() / is_asked.sum().clamp(min=1)
        total = total + 4.0 * apart
        if with_words:
            # Words of a shape and its colour in one place are their sum; the model tells them apart.
            wanted = self._shape_words[shape_NP] + self._colour_words[colour_NP]
            off = (eyes.tell(seen_NPX).float() - wanted).div(self.size).square().mean(-1)
            total = total + (off * weight_NP).sum() / weight_NP.sum()
        with torch.no_grad():
            is_thing = shape_NP < NUM_SHAPES
            patch_right = ((shapes.argmax(-1) == shape_NP) & (colours.argmax(-1) == colour_NP) & is_thing).sum() / is_thing.sum()
            count_right = (counted.argmax(-1) == counts)[counts > 0].float().mean()
            figures = torch.stack((patch_right, count_right, apart.detach()))
        return total, figures


# --- training


class Course:
    """Everything that the two stages share."""

    def __init__(
        self, args: argparse.Namespace, form: Form, lessons: Lessons, eyes: Eyes, reader: Reader, text: TextModel
    ) -> None:
        self.args, self.lessons, self.eyes, self.reader = args, lessons, eyes, reader
        self.device = reader.device
        capacity = max(args.capacity // lessons.block, 1) * lessons.block
        self.rows = Rows(form, capacity, self.device)
        self.teacher = Teacher(eyes, reader, text).to(self.device)
        self.places = torch.arange(form.num_patches, device=self.device)

    def noisy(self, pictures_NHWC: Tensor) -> Tensor:
        """Pictures of the world have been through a file or two."""
        strength = 6.0 * torch.rand(len(pictures_NHWC), 1, 1, 1, device=self.device)
        return (pictures_NHWC + strength * torch.randn(pictures_NHWC.shape, device=self.device)).clamp_(0, 255)

    def autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def fetch(self, blocks: int) -> None:
        """New rows, as they are ready."""
        for block in self.lessons.take(blocks, wait=self.rows.total == 0):
            self.rows.add(block)

    def steps(self, seconds: float, rate: float, parameters: list[nn.Parameter]) -> Iterator[tuple[float, torch.optim.Optimizer]]:
        """The share of the time that is over, before each step; the rate goes up, then down to 0."""
        args = self.args
        decays = [p for p in parameters if p.ndim > 1]
        others = [p for p in parameters if p.ndim <= 1]
        groups = [{"params": decays, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
        optimiser = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98), fused=self.device.type == "cuda")
        begun, step = time.perf_counter(), 0
        while True:
            share = (time.perf_counter() - begun) / seconds if not args.steps else step / args.steps
            if share >= 1.0:
                break
            for group in optimiser.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / args.warmup) * (0.5 + 0.5 * math.cos(math.pi * share))
            yield share, optimiser
            step += 1
            if step == 1 and not args.steps:
                begun = time.perf_counter()  # the first step compiles

    def look(self) -> None:
        """The first stage."""
        args, teacher = self.args, self.teacher
        # Eyes that begin with what they learned before wait until the heads have learned to ask.
        waits = bool(args.start)
        parameters = [*([] if waits else self.eyes.parameters()), *teacher.parameters()]
        figures, told, count = torch.zeros(4, device=self.device), -1.0, 0
        for share, optimiser in self.steps(args.look_s, args.look_rate, parameters):
            self.fetch(3)
            rows = self.rows.some(args.look_batch)
            with self.autocast():
                with torch.set_grad_enabled(not waits):
                    features = self.eyes.see(self.noisy(rows["picture"]))
                loss, seen = teacher.loss(self.eyes, rows, features, with_words=not waits)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimiser.step()
            figures += torch.cat((loss.detach()[None], seen))
            count += 1
            if share - told >= 0.12:
                mean, told = (figures / count).tolist(), share
                figures.zero_()
                say(
                    f"{share:4.0%} looking: loss {mean[0]:.3f}, patches {mean[1]:.1%}, counts {mean[2]:.1%}, "
                    f"off by {mean[3]:.3f}; {count} steps, {self.rows.total} rows"
                )
                count = 0

    def told(self, rows: dict[str, Tensor], seen_NPX: Tensor) -> Tensor:
        """The rows' embeddings, with the pictures in their places: [N, L, E]."""
        x = F.embedding(rows["ids"].long(), self.reader.embedding_VE).float()
        where = rows["start"].long()[:, None] + self.places
        return x.scatter(1, where[..., None].expand(-1, -1, x.shape[-1]), self.eyes.tell(seen_NPX).float())

    def answers(self, rows: dict[str, Tensor], system: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of every token that an answer is to say: loss, whether it is the model's best, and the answer as row * MAX_ANSWERS +
        number. And what the encoder saw."""
        with self.autocast():
            seen = self.eyes.see(rows["picture"])
            x = self.told(rows, seen)
        states = self.reader.states(x, rows["position"].long(), rows["part"], system)
        is_said = rows["label"] >= 0
        logits = self.reader.logits(states[is_said])
        wanted = rows["label"][is_said].long()
        losses = F.cross_entropy(logits, wanted, reduction="none")
        number = torch.arange(len(is_said), device=self.device)[:, None] * MAX_ANSWERS + rows["answer"]
        return losses, logits.detach().argmax(-1) == wanted, number[is_said], seen

    def train(self) -> None:
        """The second stage."""
        args, teacher = self.args, self.teacher
        mine = [*self.eyes.parameters()]
        parameters = [*mine, *teacher.parameters()]
        num_systems = len(self.reader.lengths_before)
        sums, told, count = torch.zeros(len(KINDS) + 1, 2, device=self.device), -1.0, 0
        needs = torch.ones(len(KINDS) + 1, device=self.device)  # what each kind of question counts; the last is of no answer
        for share, optimiser in self.steps(args.train_s, args.rate, parameters):
            self.fetch(1)
            system = torch.randint(num_systems, ()).item() if count % 6 == 5 else 0
            rows = self.rows.some(args.batch)
            self._shift(rows, int(system))
            rows["picture"] = self.noisy(rows["picture"])
            losses, is_right, number, seen = self.answers(rows, int(system))
            # Long answers count for more than short ones, but not by as much as they have more tokens.
            sizes = torch.zeros(args.batch * MAX_ANSWERS, device=self.device).index_add_(0, number, torch.ones_like(losses))
            weights = sizes[number].rsqrt() * needs[rows["kinds"].flatten().long()[number]]
            loss = (losses * weights).sum() / weights.sum()
            weight = LOOK_WEIGHT * (1.0 - share)
            with self.autocast():
                loss = loss + weight * teacher.loss(self.eyes, rows, seen, with_words=False)[0]
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            norm = nn.utils.clip_grad_norm_(mine, 1.0)
            optimiser.step()
            with torch.no_grad():
                sums[-1] += torch.stack((losses.mean(), norm))
                self._add_right(sums, rows, is_right, number)
            count += 1
            if share - told >= 0.04:
                told = share
                mean = sums[-1] / count
                words = _rates(sums)
                # What is answered wrong more often counts for more.
                wrong = 1.0 - sums[:-1, 0] / sums[:-1, 1].clamp(min=1)
                needs[:-1] = (wrong / wrong.mean()).clamp(0.1, 4.0).sqrt()
                say(f"{share:4.0%} loss {mean[0]:.3f}, slope {mean[1]:.2f}; {words}; {count} steps since, {self.rows.total} rows")
                sums.zero_()
                count = 0

    def _shift(self, rows: dict[str, Tensor], system: int) -> None:
        """Rows were written behind some system prompt; let them stand behind this one."""
        lengths = torch.tensor(self.reader.lengths_before, device=self.device)
        rows["position"] = rows["position"] + (lengths[system] - lengths[rows["system"].long()])[:, None] * (rows["part"] >= 0)

    def _add_right(self, sums: Tensor, rows: dict[str, Tensor], is_right: Tensor, number: Tensor) -> None:
        """To the sums of each kind: answers that are right from the first token to the last, and all."""
        kinds = rows["kinds"].flatten().long()
        whole = torch.ones(len(kinds), device=self.device).scatter_reduce_(0, number, is_right.float(), "amin")
        asked = kinds >= 0
        sums.index_add_(0, kinds[asked], torch.stack((whole[asked], torch.ones_like(whole[asked])), -1))

    def judge(self, held: Rows) -> str:
        """How many answers are right, word for word."""
        sums = torch.zeros(len(KINDS) + 1, 2, device=self.device)
        for first in range(0, held.count - self.args.batch + 1, self.args.batch):
            rows = held.part(torch.arange(first, first + self.args.batch, device=self.device))
            self._shift(rows, 0)
            losses, is_right, number, _ = self.answers(rows, 0)
            sums[-1] += torch.stack((losses.detach().mean(), torch.ones((), device=self.device)))
            self._add_right(sums, rows, is_right, number)
            del losses
        return f"loss {float(sums[-1, 0] / sums[-1, 1]):.4f}; {_rates(sums)}"


def _rates(sums: Tensor) -> str:
    shares = (sums[:, 0] / sums[:, 1].clamp(min=1)).tolist()
    return " ".join(f"{kind} {share:.1%}" for kind, share in zip(KINDS, shares, strict=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, help="GGUF file or folder; else the default model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=12, help="processes that draw")
    parser.add_argument("--capacity", type=int, default=200_000, help="rows kept on the device, 80 KB each")
    parser.add_argument("--held-out", type=int, default=2048, help="rows to judge by")
    parser.add_argument("--look-s", type=float, default=60)
    parser.add_argument("--train-s", type=float, default=330)
    parser.add_argument("--steps", type=int, default=0, help="of each stage, instead of the seconds, if not 0")
    parser.add_argument("--look-batch", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64, help="rows of a step, each with several answers")
    parser.add_argument("--look-rate", type=float, default=1e-3)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=150, help="steps")
    parser.add_argument("--start", type=Path, help="model.safetensors to begin with")
    parser.add_argument("--attention", default="EFFICIENT_ATTENTION", help="one of torch.nn.attention.SDPBackend")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    path, form = args.model or find_default_model(), Form()
    lessons = Lessons(path, form, f"train {args.seed}", num_workers=args.workers)
    held_lessons = Lessons(path, form, f"held out {args.seed}", num_workers=min(4, args.workers))
    try:
        device = torch.device(args.device)
        text = load_text_model(path)
        reader = Reader(path, Script(text).heads, form.length, device)
        eyes = Eyes(form, reader.spec.hidden_size).to(device)
        if args.start:
            say(str(eyes.load_state_dict(load_file(args.start), strict=False)))
        if device.type == "cuda" and not args.eager:
            reader.compile(args.attention)
            eyes.run_layer = torch.compile(_run, dynamic=False)
        num_weights = sum(weight.numel() for weight in eyes.parameters())
        say(f"{path.name} on {device}; eyes of {num_weights / 1e6:.2f} million weights")
        course = Course(args, form, lessons, eyes, reader, text)
        held = Rows(form, args.held_out, device)
        for block in held_lessons.take(args.held_out // held_lessons.block, wait=True):
            held.add(block)
        held_lessons.close()
        say(f"{held.count} rows held out")
        image_token = text.tokenizer.encode(IMAGE_TOKEN, add_special_tokens=False)
        assert len(image_token) == 1
        if args.look_s:
            course.look()
            eyes.save(args.out / "looked", reader.spec, image_token[0])
        if args.train_s:
            course.train()
        eyes.save(args.out, reader.spec, image_token[0])
        say(f"{args.out}: {(args.out / 'model.safetensors').stat().st_size / 1e6:.1f} MB")
        eyes.load_state_dict(load_file(args.out / "model.safetensors"), strict=False)  # as rounded
        say(f"held out: {course.judge(held)}")
    finally:
        lessons.close()


if __name__ == "__main__":
    main()
