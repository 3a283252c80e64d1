"""Train an EAGLE-3 head for a Llama-like model on nothing but what the model itself says.

    python demo/train_eagle.py OUT [--model MODEL] [--generate-s 50] [--train-s 140]

Three stages, the first two bounded in time: conversations that the model makes up, questions too, with the streams that the head
reads kept beside their tokens; training on these; how often guesses are right in conversations that were not trained on. OUT
becomes a folder in the layout in which such heads are published, for `--speculative eagle=OUT`. README.md says what to expect.

The head is trained as it is used (training-time test, arXiv 2503.01840): its second pass reads the states of its first one in
the place of the model's stream, and so on, at every place of a text at once. The model's own distribution is what it is to match.

Owns the recipe. The model is computed here in plain torch, thousands of conversations at once and all at the same place, which a
server never does; formats, tokenizer and template are StreamServe's.

Shape letters: see kernels/ops.py; besides N texts, L their tokens, M places of a text that are trained on, X 3 * E, W tokens that
the head can guess.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from streamserve.default_model import find_default_model
from streamserve.models.checkpoint import open_checkpoint
from streamserve.models.spec import ModelSpec
from streamserve.text.model import TextModel, load_text_model

TEMPERATURES = (0.0, 0.0, 0.3, 0.7)  # of answers, each for as many conversations
QUESTION_TEMPERATURE, MIN_P = 0.9, 0.05  # a small model's unlikely tokens lead nowhere
QUESTION_LEN = (4, 96)  # tokens of a question, at least and at most
STEP_WEIGHT = 0.8  # of a pass's loss, to that of the one before
HELD_OUT = ((0.0, 0.0), (0.7, 0.7))  # name and temperature
MAX_GUESSES = 5
STARTED = time.perf_counter()


def say(words: str) -> None:
    """A line of the log, with the seconds since the start."""
    print(f"{time.perf_counter() - STARTED:7.1f} s  {words}", flush=True)


def rms_norm(x: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), weight_E, eps)


def rope_tables(spec: ModelSpec, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, [length, D]."""
    freq, factor = spec.inv_freq()
    angles = torch.arange(length, dtype=torch.float32)[:, None] * torch.tensor(freq, dtype=torch.float32)
    angles = torch.cat((angles, angles), -1)
    return (angles.cos() * factor).to(device), (angles.sin() * factor).to(device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE on the last dimension; cos and sin broadcast to x."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


# --- the model


class Target:
    """The model, for many texts that are all at the same place. The stream is float32, products are in `dtype`."""

    def __init__(self, path: Path, num_rows: int, length: int, device: torch.device) -> None:
        checkpoint = open_checkpoint(path)
        self.spec = spec = checkpoint.spec
        if spec.qkv_bias or spec.qk_norm or spec.o_bias or spec.mlp_bias or spec.sliding_window:
            raise SystemExit(f"{path}: this recipe is for networks like Llama's, without biases, norms of heads and windows")
        self.device = device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.layers_shown = (2, spec.num_layers // 2, spec.num_layers - 3)

        def read(*names: str) -> Tensor:
            return torch.cat([checkpoint.tensor(f"{name}.weight") for name in names]).to(device, self.dtype)

        self.embedding_VE = read("model.embed_tokens")
        self.head_VE = self.embedding_VE if spec.tie_embeddings else read("lm_head")
        self.norm_E = checkpoint.tensor("model.norm.weight").float().to(device)
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
        self._cos, self._sin = rope_tables(spec, length, device)
        shape = (spec.num_layers, num_rows, spec.num_kv_heads, length, spec.head_dim)
        self._keys, self._values = (torch.empty(shape, dtype=self.dtype, device=device) for _ in range(2))

    def step(self, tokens_N: Tensor, at: int) -> tuple[Tensor, Tensor]:
        """One more token of every text: the streams that a head reads, and the last one behind its norm."""
        spec, count = self.spec, len(tokens_N)
        heads, kv, dim, dtype = spec.num_heads, spec.num_kv_heads, spec.head_dim, self.dtype
        x_NE = F.embedding(tokens_N, self.embedding_VE).float()
        cos, sin = self._cos[at].to(dtype), self._sin[at].to(dtype)
        shown: list[Tensor] = []
        for i, (norm_E, qkv, out, mlp_norm_E, gate_up, down) in enumerate(self._layers):
            if i in self.layers_shown:
                shown.append(x_NE.to(dtype))
            read = F.linear(rms_norm(x_NE, norm_E, spec.rms_norm_eps).to(dtype), qkv).view(count, heads + 2 * kv, dim)
            turned = rotate(read[:, : heads + kv], cos, sin)
            self._keys[i, :count, :, at], self._values[i, :count, :, at] = turned[:, heads:], read[:, heads + kv :]
            # The heads of a group stand where a text's tokens would: all of them may see everything.
            q_NKGD = turned[:, :heads].reshape(count, kv, heads // kv, dim)
            keys, values = self._keys[i, :count, :, : at + 1], self._values[i, :count, :, : at + 1]
            mixed = F.scaled_dot_product_attention(q_NKGD, keys, values)
            x_NE = x_NE + F.linear(mixed.reshape(count, heads * dim), out)
            gate, up = F.linear(rms_norm(x_NE, mlp_norm_E, spec.rms_norm_eps).to(dtype), gate_up).chunk(2, -1)
            x_NE = x_NE + F.linear(F.silu(gate) * up, down)
        return torch.cat(shown, -1), rms_norm(x_NE, self.norm_E, spec.rms_norm_eps).to(dtype)

    def logits(self, states: Tensor) -> Tensor:
        """Of what `step` gives."""
        return F.linear(states, self.head_VE).float()


# --- conversations


class Script:
    """What a template puts around what people and the model say, as one machine: a state per conversation.

    In states 0 and `answering` a token is sampled; an end of turn leads to the next state, anything else stays. The other states
    have one token each.
    """

    def __init__(self, text: TextModel, spec: ModelSpec) -> None:
        word = text.tokenizer.encode("Hello")[-1]

        def encoded(*roles: str) -> list[int]:
            return list(text.encode_chat([{"role": role, "content": "Hello"} for role in roles]))

        one, two = encoded("user"), encoded("user", "assistant", "user")
        places = [i for i, token in enumerate(two) if token == word]
        if len(places) != 3 or one.count(word) != 1:
            raise SystemExit("the chat template of this model does not put one turn behind the other")
        self.beginning = two[: places[0]]
        after_question, after_answer = two[places[0] + 1 : places[1]], two[places[1] + 1 : places[2]]
        self.ends = sorted(spec.eos_token_ids)
        self.end = after_answer[0]
        if self.end not in spec.eos_token_ids or after_question[0] != self.end:
            raise SystemExit("turns of this model's chat template do not end with the token that ends an answer")
        self.answering = len(after_question)
        self.forced = [-1, *after_question[1:], -1, *after_answer[1:]]
        special = {i for i in range(spec.vocab_size) if text.tokenizer.is_special(i)}
        self.banned = sorted(special - spec.eos_token_ids)


@dataclass(frozen=True, slots=True)
class Texts:
    """Conversations, [N, L], and what the model computed at every token."""

    tokens: Tensor  # int64
    is_answer: Tensor  # bool: sampled by the model, in an answer
    shown: Tensor  # [N, L, X]
    states: Tensor  # [N, L, E]: logits of the next token

    @staticmethod
    def room(target: Target, num_texts: int, length: int) -> "Texts":
        hidden, device = target.spec.hidden_size, target.device
        return Texts(
            torch.empty(num_texts, length, dtype=torch.int64, device=device),
            torch.empty(num_texts, length, dtype=torch.bool, device=device),
            torch.empty(num_texts, length, len(target.layers_shown) * hidden, dtype=target.dtype, device=device),
            torch.empty(num_texts, length, hidden, dtype=target.dtype, device=device),
        )

    def part(self, which: "slice | Tensor") -> "Texts":
        return Texts(self.tokens[which], self.is_answer[which], self.shown[which], self.states[which])


@torch.inference_mode()
def converse(target: Target, script: Script, out: Texts, temperatures_N: Tensor, min_p: float) -> None:
    """Fill `out` with conversations, whose answers are sampled at these temperatures."""
    count, length = out.tokens.shape
    device = target.device
    forced_S = torch.tensor(script.forced, device=device)
    banned = torch.tensor(script.banned, dtype=torch.int64, device=device)
    ends = torch.tensor(script.ends, device=device)
    num_states = len(script.forced)
    tokens_N = torch.full((count,), script.beginning[0], device=device)
    state_N = torch.zeros(count, dtype=torch.int64, device=device)
    since_N = torch.zeros(count, dtype=torch.int64, device=device)  # tokens of this turn
    is_answer_N = torch.zeros(count, dtype=torch.bool, device=device)
    for at in range(length):
        out.tokens[:, at], out.is_answer[:, at] = tokens_N, is_answer_N
        out.shown[:, at], out.states[:, at] = target.step(tokens_N, at)
        if at + 1 < len(script.beginning):
            tokens_N = torch.full((count,), script.beginning[at + 1], device=device)
            continue
        is_question_N, is_answer_N = state_N == 0, state_N == script.answering
        logits_NV = target.logits(out.states[:, at])
        logits_NV[:, banned] = -math.inf
        logits_NV[:, ends] = logits_NV[:, ends].masked_fill((is_question_N & (since_N < QUESTION_LEN[0]))[:, None], -math.inf)
        warmth_N = torch.where(is_question_N, QUESTION_TEMPERATURE, temperatures_N)
        floor_N = torch.where(is_question_N, math.log(MIN_P), math.log(min_p) if min_p else -math.inf)
        least_N = logits_NV.amax(-1) + torch.where(warmth_N > 0, warmth_N * floor_N, 0.0)
        logits_NV.masked_fill_(logits_NV < least_N[:, None], -math.inf)
        # Gumbel's trick; at temperature 0 it is the best token.
        noise_NV = torch.empty_like(logits_NV).exponential_().clamp_(min=1e-30).log_()
        sampled_N = (logits_NV - warmth_N[:, None] * noise_NV).argmax(-1)
        sampled_N = torch.where(is_question_N & (since_N >= QUESTION_LEN[1]), script.end, sampled_N)
        is_sampled_N = is_question_N | is_answer_N
        tokens_N = torch.where(is_sampled_N, sampled_N, forced_S[state_N])
        moves_N = ~is_sampled_N | (tokens_N[:, None] == ends).any(-1)
        since_N = torch.where(moves_N, 0, since_N + 1)
        state_N = torch.where(moves_N, (state_N + 1) % num_states, state_N)


# --- the head


def _normal(rows: int, columns: int, scale: float) -> nn.Parameter:
    return nn.Parameter(torch.randn(rows, columns) * scale)


class Head(nn.Module):
    """The network that models/eagle.py reads, as a function of whole texts. `norm_before_residual` holds."""

    def __init__(self, target: Target, token_ids_W: Tensor, spread_X: Tensor, max_len: int) -> None:
        super().__init__()
        self.spec = spec = target.spec
        hidden, inner, dim = spec.hidden_size, spec.intermediate_size, spec.head_dim
        q, kv, read = spec.num_heads * dim, spec.num_kv_heads * dim, len(spread_X)
        self._embedding_VE = target.embedding_VE
        self._cos, self._sin = rope_tables(spec, max_len, target.device)
        self.token_ids_W = token_ids_W
        # What the streams vary by differs a thousandfold between places and layers; it is multiplied into fc at the end.
        self.spread_X = spread_X
        self.fc = _normal(hidden, read, read**-0.5)
        self.q_proj = _normal(q, 2 * hidden, (2 * hidden) ** -0.5)
        self.k_proj = _normal(kv, 2 * hidden, (2 * hidden) ** -0.5)
        self.v_proj = _normal(kv, 2 * hidden, (2 * hidden) ** -0.5)
        self.o_proj = _normal(hidden, q, q**-0.5)
        self.gate_proj, self.up_proj = _normal(inner, hidden, hidden**-0.5), _normal(inner, hidden, hidden**-0.5)
        self.down_proj = _normal(hidden, inner, inner**-0.5)
        self.input_norm, self.hidden_norm, self.mlp_norm = (nn.Parameter(torch.ones(hidden)) for _ in range(3))
        self.norm = nn.Parameter(target.norm_E.clone())
        self.lm_head = nn.Parameter(target.head_VE[token_ids_W].float())
        self.to(target.device)

    def features(self, shown: Tensor) -> Tensor:
        """The streams of the model as one."""
        return F.linear(shown / self.spread_X.to(shown.dtype), self.fc)

    def first_passes(self, shown_NMX: Tensor, tokens_NM: Tensor, count: int) -> Iterator[Tensor]:
        """States of `count` passes. Place m of the first one is the pair of what the model showed at token m with token m + 1;
        that of the next ones, the state of the pass before at m - 1 with it: the guess of a chain that began further left."""
        spec, eps = self.spec, self.spec.rms_norm_eps
        num_texts, length = tokens_NM.shape
        heads, kv, dim = spec.num_heads, spec.num_kv_heads, spec.head_dim
        embeds = rms_norm(F.embedding(tokens_NM, self._embedding_VE).float(), self.input_norm, eps)
        cos, sin = self._cos[:length], self._sin[:length]
        place = torch.arange(length, device=tokens_NM.device)
        behind = place[:, None] - place  # how far a key is behind a query
        keys: list[Tensor] = []
        values: list[Tensor] = []
        x = self.features(shown_NMX)
        for number in range(count):
            normed = rms_norm(x, self.hidden_norm, eps)
            both = torch.cat((embeds, normed), -1)

            def split(weight: Tensor, num: int, both: Tensor = both) -> Tensor:
                return F.linear(both, weight).view(num_texts, length, num, dim).transpose(1, 2)

            q = rotate(split(self.q_proj, heads), cos, sin)
            keys.append(rotate(split(self.k_proj, kv), cos, sin).repeat_interleave(heads // kv, 1))
            values.append(split(self.v_proj, kv).repeat_interleave(heads // kv, 1))
            # Of what the model showed: all that its chain began with. Of each later pass: the chain's own place in it.
            seen = [behind >= number, *(behind == number - i for i in range(1, number + 1))]
            v_all = torch.cat(values, 2)
            mask = torch.zeros(length, (number + 1) * length, dtype=v_all.dtype, device=x.device)
            mask.masked_fill_(~torch.cat(seen, -1), -math.inf)
            mixed = F.scaled_dot_product_attention(q.to(v_all.dtype), torch.cat(keys, 2).to(v_all.dtype), v_all, attn_mask=mask)
            x = normed + F.linear(mixed.transpose(1, 2).reshape(num_texts, length, heads * dim), self.o_proj)
            read = rms_norm(x, self.mlp_norm, eps)
            x = x + F.linear(F.silu(F.linear(read, self.gate_proj)) * F.linear(read, self.up_proj), self.down_proj)
            yield x
            x = F.pad(x[:, :-1], (0, 0, 1, 0))

    def logits(self, states: Tensor) -> Tensor:
        """Of the tokens it can guess."""
        return F.linear(rms_norm(states, self.norm, self.spec.rms_norm_eps), self.lm_head).float()

    def save(self, folder: Path, target: Target) -> None:
        """As published heads are; float16."""
        folder.mkdir(parents=True, exist_ok=True)
        spec, ids = self.spec, self.token_ids_W.cpu()
        is_known = torch.zeros(spec.vocab_size, dtype=torch.bool)
        is_known[ids] = True
        layer = "midlayer."
        weights = {
            "fc.weight": self.fc / self.spread_X,
            **{f"{layer}self_attn.{part}_proj.weight": getattr(self, f"{part}_proj") for part in "qkvo"},
            **{f"{layer}mlp.{part}_proj.weight": getattr(self, f"{part}_proj") for part in ("gate", "up", "down")},
            f"{layer}input_layernorm.weight": self.input_norm,
            f"{layer}hidden_norm.weight": self.hidden_norm,
            f"{layer}post_attention_layernorm.weight": self.mlp_norm,
            "norm.weight": self.norm,
            "lm_head.weight": self.lm_head,
        }
        held = {name: weight.detach().half().cpu().contiguous() for name, weight in weights.items()}
        save_file({**held, "d2t": ids - torch.arange(len(ids)), "t2d": is_known}, folder / "model.safetensors")
        config: dict[str, Any] = {
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            "hidden_act": "silu",
            "hidden_size": spec.hidden_size,
            "intermediate_size": spec.intermediate_size,
            "num_hidden_layers": 1,
            "num_attention_heads": spec.num_heads,
            "num_key_value_heads": spec.num_kv_heads,
            "head_dim": spec.head_dim,
            "vocab_size": spec.vocab_size,
            "draft_vocab_size": len(ids),
            "max_position_embeddings": spec.max_position_embeddings,
            "rms_norm_eps": spec.rms_norm_eps,
            "rope_theta": spec.rope.theta,
            "tie_word_embeddings": False,
            "norm_before_residual": True,
            "eagle_aux_hidden_state_layer_ids": list(target.layers_shown),
            "torch_dtype": "float16",
        }
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def train(head: Head, target: Target, texts: Texts, args: argparse.Namespace) -> None:
    """For `args.train_s` seconds."""
    device = target.device
    optimiser = torch.optim.AdamW(
        head.parameters(), lr=args.rate, betas=(0.9, 0.95), weight_decay=0.01, fused=device.type == "cuda"
    )
    head_WE = target.head_VE[head.token_ids_W]
    num_texts = len(texts.tokens)
    begun, step, told = time.perf_counter(), 0, 0.0
    order = torch.randperm(num_texts, device=device)
    sums = torch.zeros(args.passes, 3, device=device)  # of loss, guesses that are the model's best, places
    while True:
        now = time.perf_counter() - begun
        share = now / args.train_s
        if share >= 1.0 or (args.steps and step >= args.steps):
            break
        if (step + 1) * args.batch % num_texts < args.batch:
            order = torch.randperm(num_texts, device=device)
        first = step * args.batch % num_texts
        texts_now = texts.part(order[first : first + args.batch])
        rate = args.rate * min(1.0, (step + 1) / args.warmup) * (0.5 + 0.5 * math.cos(math.pi * share))
        for group in optimiser.param_groups:
            group["lr"] = rate
        with torch.no_grad():
            # What follows token m + 1 is guessed at place m.
            aim_NMW = F.linear(texts_now.states[:, 1:-1], head_WE).float()
            best_NM = aim_NMW.argmax(-1)
            aim_NMW = aim_NMW.softmax(-1)
            is_asked_NM = texts_now.is_answer[:, 2:].float()
        total = torch.zeros((), device=device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            for number, states in enumerate(head.first_passes(texts_now.shown[:, :-2], texts_now.tokens[:, 1:-1], args.passes)):
                log_NMW = head.logits(states).log_softmax(-1)
                loss_NM = -(aim_NMW * log_NMW).sum(-1)
                loss = (loss_NM * is_asked_NM).sum() / is_asked_NM.sum().clamp(min=1)
                total = total + STEP_WEIGHT**number * loss
                with torch.no_grad():
                    is_right = ((log_NMW.argmax(-1) == best_NM) * is_asked_NM).sum()
                    sums[number] += torch.stack((loss.detach() * is_asked_NM.sum(), is_right, is_asked_NM.sum()))
        optimiser.zero_grad(set_to_none=True)
        torch.autograd.backward(total)
        nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimiser.step()
        step += 1
        if now - told >= args.train_s / 15 or step == 1:
            means = (sums[:, :2] / sums[:, 2:].clamp(min=1)).tolist()
            sums.zero_()
            told = now
            words = ", ".join(f"{loss:.3f} / {right:.1%}" for loss, right in means)
            say(f"step {step} ({share:.0%}), loss and right per pass: {words}")
    say(f"{step} steps of {args.batch} texts: {step * args.batch / num_texts:.1f} times all of them")


# --- how good it is


def _coupled(states_PE: Tensor, tokens_P: Tensor, target: Target, temperature: float) -> Tensor:
    """A random number that would have given each of these tokens: the sampler's rule is the inverse distribution function."""
    probs_PV = (target.logits(states_PE).double() / temperature).softmax(-1)
    upto_P = probs_PV.cumsum(-1).gather(-1, tokens_P[:, None])[:, 0]
    return upto_P - probs_PV.gather(-1, tokens_P[:, None])[:, 0] * torch.rand_like(upto_P)


@torch.inference_mode()
def judge(head: Head, target: Target, texts: Texts, temperature: float) -> list[float]:
    """Of the chains that begin in answers: how often guess 1, 2, ... is right, given that all before it are."""
    asked, right = [0] * MAX_GUESSES, [0] * MAX_GUESSES
    for first in range(0, len(texts.tokens), 8):
        part = texts.part(slice(first, first + 8))
        following = part.tokens[:, 2:]
        is_asked = part.is_answer[:, 2:]
        place = torch.arange(following.shape[1], device=target.device)
        numbers = torch.empty(0)
        if temperature:
            chunks = zip(
                torch.split(part.states[:, 1:-1].flatten(0, 1), 1024), torch.split(following.flatten(), 1024), strict=True
            )
            numbers = torch.cat([_coupled(states, tokens, target, temperature) for states, tokens in chunks])
        is_alive = is_asked
        states_of = head.first_passes(part.shown[:, :-2].float(), part.tokens[:, 1:-1], MAX_GUESSES)
        for number, states in enumerate(states_of):
            if number:  # place m is where the chain's next guess is, that was at m - 1
                is_alive = F.pad(is_alive[:, :-1], (1, 0)) & is_asked & (place >= number)
            logits = head.logits(states)
            if temperature:
                upto = (logits.flatten(0, 1).double() / temperature).softmax(-1).cumsum(-1)
                chosen = torch.searchsorted(upto, numbers[:, None]).clamp(max=upto.shape[-1] - 1).view(following.shape)
            else:
                chosen = logits.argmax(-1)
            asked[number] += int(is_alive.sum())
            is_alive = is_alive & (head.token_ids_W[chosen] == following)
            right[number] += int(is_alive.sum())
    return [good / max(1, all_) for good, all_ in zip(right, asked, strict=True)]


def tell(rates: list[float], name: str) -> str:
    """Rates in words, and what chains of one to five guesses bring."""
    lengths, alive, total = [], 1.0, 0.0
    for rate in rates:
        alive *= rate
        total += alive
        lengths.append(total)
    places = " ".join(f"{rate:.3f}" for rate in rates)
    return f"{name}: right, given those before: {places}; guesses accepted of 1 to 5: {' '.join(f'{n:.2f}' for n in lengths)}"


def vocabulary(texts: Texts, script: Script, size: int, spec: ModelSpec) -> Tensor:
    """The most frequent tokens of answers, in order of their numbers: a random number then means about the same in both."""
    counts = torch.bincount(texts.tokens[texts.is_answer], minlength=spec.vocab_size)
    counts[script.ends] = counts.sum()
    chosen = counts.topk(min(size, spec.vocab_size)).indices.sort().values
    say(f"{len(chosen)} tokens to guess, {float(counts[chosen].sum() / counts.sum()):.2%} of what answers say")
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, help="GGUF file or folder; else the default model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rows", type=int, default=2048, help="conversations at once")
    parser.add_argument("--waves", type=int, default=12, help="times so many conversations, at most")
    parser.add_argument("--length", type=int, default=514, help="tokens of a conversation")
    parser.add_argument("--held-out", type=int, default=256, help="conversations to judge by, at each temperature")
    parser.add_argument("--generate-s", type=float, default=50)
    parser.add_argument("--train-s", type=float, default=140)
    parser.add_argument("--steps", type=int, default=0, help="stop training after so many, if not 0")
    parser.add_argument("--batch", type=int, default=32, help="conversations of a step")
    parser.add_argument("--passes", type=int, default=3, help="how far ahead it is trained")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=100, help="steps")
    parser.add_argument("--tokens", type=int, default=4096, help="how many it can guess")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cuda.enable_cudnn_sdp(False)  # plans anew for every length
    device = torch.device(args.device)
    path = args.model or find_default_model()
    target = Target(path, max(args.rows, len(HELD_OUT) * args.held_out), args.length, device)
    text = load_text_model(path)
    script = Script(text, target.spec)
    say(f"{path.name} on {device}; streams before layers {', '.join(map(str, target.layers_shown))}")

    held = Texts.room(target, len(HELD_OUT) * args.held_out, args.length)
    warmth = torch.tensor([temperature for _, temperature in HELD_OUT], device=device).repeat_interleave(args.held_out)
    converse(target, script, held, warmth, min_p=0.0)
    say(f"{len(held.tokens)} conversations held out")

    begun = time.perf_counter()
    texts = Texts.room(target, args.waves * args.rows, args.length)
    warmth = torch.tensor(TEMPERATURES, device=device)[torch.arange(args.rows, device=device) % len(TEMPERATURES)]
    num_waves, took = 0, 0.0
    while num_waves < args.waves and time.perf_counter() - begun + took <= args.generate_s:
        at = time.perf_counter()
        part = slice(num_waves * args.rows, (num_waves + 1) * args.rows)
        converse(target, script, texts.part(part), warmth, MIN_P)
        if device.type == "cuda":
            torch.cuda.synchronize()
        num_waves, took = num_waves + 1, time.perf_counter() - at
        if num_waves == 1:
            say(f"{took:.1f} s for the first {args.rows} conversations")
            for row in range(2):
                say(repr(text.tokenizer.decode(texts.tokens[row].tolist(), skip_special_tokens=False))[:1500])
    texts = texts.part(slice(0, num_waves * args.rows))
    num_answers = int(texts.is_answer.sum())
    say(f"{len(texts.tokens)} conversations, {texts.tokens.numel()} tokens, {num_answers} of them in answers")

    ids = vocabulary(texts, script, args.tokens, target.spec)
    sample = texts.shown[:: max(1, len(texts.shown) // 64), len(script.beginning) :].float().flatten(0, 1)
    spread = sample.pow(2).mean(0).sqrt().clamp(min=1e-3)
    head = Head(target, ids, spread, args.length)
    say(f"head of {sum(weight.numel() for weight in head.parameters()) / 1e6:.1f} million weights")
    train(head, target, texts, args)
    head.save(args.out, target)
    say(f"{args.out}: {(args.out / 'model.safetensors').stat().st_size / 1e6:.1f} MB")
    for number, (name, temperature) in enumerate(HELD_OUT):
        judged = held.part(slice(number * args.held_out, (number + 1) * args.held_out))
        say(tell(judge(head, target, judged, temperature), f"temperature {name:g}"))


if __name__ == "__main__":
    main()
