"""Each GPU kernel of a step by itself: time, bytes or FLOPs, and their share of what this card can do.

    python bench/kernels.py [--models llama8b,qwen06b] [--ops embed,norm,gemv,decode,drafted,prompt,write,silu,linear,sampling]
                            [--json OUT]

Times are medians of replays of a graph that holds several launches one behind the other; weights and KV are read from memory,
each launch its own, more than the cache holds; activations are where the kernel before leaves them, in the cache. Prompts are
launched one by one, as a server does. `share` is of the copy bandwidth or of the 8192^3 product, whichever bounds the kernel,
both measured in the same run. `library` is the time of torch's own operation for the same, where there is one. For `gemv`
that is the product alone: norm, residual and gate come on top of it. Attention of long prompts is timed with the library that
serving uses, and by our kernel. Kernels are compiled beforehand, by several processes.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.gpu_timing import call_us, cold_copies, launch_us, need_gpu
from bench.machine import machine, shown

EPS = 1e-5
PAGE_SIZE = 16
LIBRARY_LEN = 8192  # chunks of this length are a library's business when served
BF16 = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Shape:
    """Numbers of a model, as kernels.ops.NetworkShape has them."""

    name: str
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    qk_norm: bool
    num_layers: int
    sliding_window: int | None = None
    window_layers: frozenset[int] | None = None

    @property
    def attended(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def joined(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


MODELS = {
    "llama8b": Shape("llama8b", 4096, 14336, 32, 8, 128, 128256, False, 32),
    "qwen06b": Shape("qwen06b", 1024, 3072, 16, 8, 128, 151936, True, 28),
}


@dataclass(frozen=True, slots=True)
class Timing:
    """One line of the table. Work is bytes moved or FLOPs."""

    op: str
    case: str
    time_us: float
    num_bytes: float = 0
    flops: float = 0
    library_us: float | None = None

    def line(self, ceilings: dict[str, Any]) -> str:
        """For people. Bound by what takes longer at the card's best."""
        memory_us = self.num_bytes / ceilings["copy_tb_s"] / 1e6
        product_us = self.flops / ceilings["product_tflop_s"] / 1e6
        if memory_us >= product_us:
            work = f"{self.num_bytes / 1e6:10.2f} MB {self.num_bytes / self.time_us / 1e6:7.2f} TB/s   "
        else:
            work = f"{self.flops / 1e9:10.2f} GF {self.flops / self.time_us / 1e6:7.1f} TFLOP/s"
        share = f"{max(memory_us, product_us) / self.time_us:6.1%}"
        library = "" if self.library_us is None else f"   library {self.library_us:.1f} us, x{self.library_us / self.time_us:.2f}"
        return f"{self.op:20}{self.case:34}{self.time_us:10.1f} us {work} {share}{library}"


class Meter:
    """Times what an operation launches."""

    def launch(self, launches: Sequence[Callable[[], object]]) -> float:
        """See gpu_timing.launch_us."""
        return launch_us(launches)

    def call(self, run: Callable[[], object]) -> float:
        """See gpu_timing.call_us."""
        return call_us(run)


class Once(Meter):
    """Runs once instead, every `parts`-th, so that its kernels are in the compiler's cache. The times are made up."""

    def __init__(self, part: int, parts: int) -> None:
        self._part, self._turns = part, cycle(range(parts))

    def launch(self, launches: Sequence[Callable[[], object]]) -> float:
        return self.call(launches[0])

    def call(self, run: Callable[[], object]) -> float:
        if next(self._turns) == self._part:
            run()
        return 1.0


def random(*size: int) -> Tensor:
    """Normal numbers, bfloat16."""
    return torch.randn(size, device="cuda", dtype=BF16)


def paged(shape: Shape, rows: list[tuple[int, int]], num_layers: int) -> Any:
    """StepInputs for rows (tokens in KV before, new tokens): decode rows, of one new token, first. Pages in random order."""
    from streamserve.kernels.ops import PromptRow, StepInputs

    counts = [-(-(before + new) // PAGE_SIZE) for before, new in rows]
    pages = torch.randperm(sum(counts), dtype=torch.int32)
    table = torch.zeros(len(rows), max(counts), dtype=torch.int32)
    at = 0
    for slot, count in enumerate(counts):
        table[slot, :count] = pages[at : at + count]
        at += count
    num_decode = sum(new == 1 for _, new in rows)
    prompts, first = [], num_decode
    for slot, (before, new) in enumerate(rows[num_decode:], num_decode):
        prompts.append(PromptRow(slot, first, new, before))
        first += new
    positions = torch.cat([torch.arange(before, before + new) for before, new in rows])
    slots = torch.cat([torch.full((new,), slot) for slot, (_, new) in enumerate(rows)])
    size = (num_layers, sum(counts), shape.num_kv_heads, PAGE_SIZE, shape.head_dim)
    return StepInputs(
        num_decode=num_decode,
        prompts=tuple(prompts),
        tokens_T=torch.zeros(first, dtype=torch.int32, device="cuda"),
        positions_T=positions.int().cuda(),
        slots_T=slots.int().cuda(),
        prompt_starts=torch.tensor([*(row.first for row in prompts), first], dtype=torch.int32, device="cuda"),
        page_table_SP=table.cuda(),
        logit_rows_R=torch.arange(num_decode, dtype=torch.int32, device="cuda"),
        logit_slots_R=torch.arange(num_decode, dtype=torch.int32, device="cuda"),
        k=random(*size),
        v=random(*size),
    )


def rope_of(shape: Shape, max_len: int) -> Tensor:
    from streamserve.kernels.impl.triton_rope import rope_table

    freq = [10_000 ** (-2 * i / shape.head_dim) for i in range(shape.head_dim // 2)]
    return rope_table(freq, 1.0, max_len, torch.device("cuda"))


def head_norms(shape: Shape) -> tuple[Tensor | None, Tensor | None]:
    return (random(shape.head_dim), random(shape.head_dim)) if shape.qk_norm else (None, None)


def embed(shape: Shape, pdl: bool, meter: Meter) -> Iterator[Timing]:
    """Rows of the embedding."""
    from streamserve.kernels.impl.triton_norm import embed as rows_of

    table = random(shape.vocab_size, shape.hidden_size)
    for rows in (1, 64, 256, 2048, 8192):
        tokens = [torch.randint(shape.vocab_size, (rows,), dtype=torch.int32, device="cuda") for _ in range(10)]
        launches = [lambda t=t: rows_of(t, table, pdl=pdl) for t in tokens]
        yield Timing("embed", f"{rows} rows", meter.launch(launches), num_bytes=4 * rows * shape.hidden_size)


def gemv(shape: Shape, pdl: bool, meter: Meter) -> Iterator[Timing]:
    """Products of one to sixteen rows, with what is fused into them."""
    from bench.gemv_sweep import MODELS as PRODUCTS
    from bench.gemv_sweep import Inputs, launcher

    for product in PRODUCTS[shape.name]:
        copies = cold_copies(product.num_bytes)
        weights = random(copies, product.rows, product.columns)
        parts = [weights[i % copies] for i in range(max(copies, 6))]
        for rows in (1, 2, 4, 8, 16):
            inputs = Inputs.of(product, rows, weights.device)
            yield Timing(
                f"gemv {product.name}",
                f"{product.rows} x {product.columns}, {rows} rows",
                meter.launch([launcher(product, w, inputs, None, pdl) for w in parts]),
                num_bytes=product.num_bytes,
                flops=product.num_bytes * rows,
                library_us=meter.launch([lambda w=w, x=inputs.x: F.linear(x, w) for w in parts]),  # type: ignore[misc]
            )


def decode(shape: Shape, pdl: bool, meter: Meter) -> Iterator[Timing]:
    """Attention of decode rows, with the norm, RoPE and KV write of the new tokens."""
    from streamserve.kernels.impl.triton_decode_attention import DecodeAttention

    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    attention = DecodeAttention(shape, max_rows=256, num_sms=num_sms, device=torch.device("cuda"))  # type: ignore[arg-type]
    cos_sin, (q_norm, k_norm) = rope_of(shape, 32_800), head_norms(shape)
    for rows, context in ((1, 128), (1, 1024), (1, 32_768), (8, 1024), (64, 640), (256, 640)):
        num_bytes = rows * context * shape.num_kv_heads * shape.head_dim * 4
        layers = min(shape.num_layers, cold_copies(num_bytes))
        inputs = paged(shape, [(context - 1, 1)] * rows, layers)
        qkv, out = random(rows, shape.joined), random(rows, shape.attended)

        def attend(layer: int, inputs: Any = inputs, qkv: Tensor = qkv, out: Tensor = out) -> None:
            attention.attend(qkv, inputs, layer, cos_sin, q_norm, k_norm, EPS, out, pdl=pdl)

        yield Timing(
            "decode attention",
            f"{rows} rows x {context} tokens",
            meter.launch([lambda i=i: attend(i % layers) for i in range(max(layers, 6))]),  # type: ignore[misc]  # noqa: B023
            num_bytes=num_bytes,
            flops=num_bytes * shape.num_heads / shape.num_kv_heads,
        )


def drafted(shape: Shape, pdl: bool, meter: Meter) -> Iterator[Timing]:
    """The same of a token and guesses behind it in each row: all in one launch, and K and V written by a launch before."""
    from streamserve.kernels.impl.triton_decode_attention import DecodeAttention
    from streamserve.kernels.impl.triton_drafted_attention import DraftedAttention

    num_sms = torch.cuda.get_device_properties(0).multi_processor_count
    sizes: dict[str, Any] = {"max_rows": 256, "num_sms": num_sms, "device": torch.device("cuda")}
    kinds = {"drafted attention": DraftedAttention(shape, **sizes), "drafted, in two": DecodeAttention(shape, **sizes)}  # type: ignore[arg-type]
    cos_sin, (q_norm, k_norm) = rope_of(shape, 32_800), head_norms(shape)
    for rows, new, context in (
        (1, 5, 128),
        (1, 5, 1024),
        (1, 13, 1024),
        (1, 5, 32_768),
        (4, 5, 1024),
        (16, 5, 1024),
        (32, 3, 640),
    ):
        num_bytes = rows * context * shape.num_kv_heads * shape.head_dim * 4
        layers = min(shape.num_layers, cold_copies(num_bytes))
        inputs = replace(paged(shape, [(context - new, new)] * rows, layers), num_decode=rows * new, prompts=(), is_drafted=True)
        qkv, out = random(rows * new, shape.joined), random(rows * new, shape.attended)
        for op, attention in kinds.items():

            def attend(
                layer: int, attention: Any = attention, inputs: Any = inputs, qkv: Tensor = qkv, out: Tensor = out
            ) -> None:
                attention.attend(qkv, inputs, layer, cos_sin, q_norm, k_norm, EPS, out, pdl=pdl)

            yield Timing(
                op,
                f"{rows} rows x {new} of {context} tokens",
                meter.launch([lambda i=i, run=attend: run(i % layers) for i in range(max(layers, 6))]),  # type: ignore[misc]  # noqa: B023
                num_bytes=num_bytes,
                flops=num_bytes * new * shape.num_heads / shape.num_kv_heads,
            )


def prompt(shape: Shape, pdl: bool, meter: Meter) -> Iterator[Timing]:
    """Attention of a prompt's chunk over what is cached of it and itself; the library's is given the keys in one piece."""
    from streamserve.kernels.impl.triton_prompt_attention import PromptAttention

    served = PromptAttention(shape, device=torch.device("cuda"))  # type: ignore[arg-type]
    own = PromptAttention(shape, device=torch.device("cuda"), long_prompts="triton")  # type: ignore[arg-type]
    group = shape.num_heads // shape.num_kv_heads
    for rows in ([(0, 128)], [(0, 2048)], [(6144, 2048)], [(0, 8192)], [(24_576, 8192)], [(0, 512)] * 16):
        inputs = paged(shape, rows, 1)
        tokens = sum(new for _, new in rows)
        qkv, out = random(tokens, shape.joined), random(tokens, shape.attended)
        before, new = rows[0]
        library_us = None
        if before == 0:
            q = random(len(rows), shape.num_heads, new, shape.head_dim)
            k, v = (random(len(rows), shape.num_kv_heads, new, shape.head_dim) for _ in range(2))
            kr, vr = (t.repeat_interleave(group, 1) for t in (k, v))
            with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True):
                library_us = meter.call(lambda q=q, k=kr, v=vr: F.scaled_dot_product_attention(q, k, v, is_causal=True))  # type: ignore[misc]
        for op, attention in (("prompt attention", served), *((("prompt, our kernel", own),) if new == LIBRARY_LEN else ())):

            def attend(
                attention: PromptAttention = attention, inputs: Any = inputs, qkv: Tensor = qkv, out: Tensor = out
            ) -> None:
                attention.attend(qkv, inputs, 0, out)

            yield Timing(
                op,
                f"{len(rows)} x {new} tokens after {before}",
                meter.call(attend),
                num_bytes=2 * tokens * (shape.joined + shape.attended),
                flops=len(rows) * 4 * shape.attended * new * (before + (new + 1) / 2),
                library_us=library_us,
            )


def norm(shape: Shape, pdl: bool, meter: Meter) -> Iterator[Timing]:
    """Residual addition and RMSNorm."""
    from streamserve.kernels.impl.triton_norm import add_rms_norm

    weight = random(shape.hidden_size)
    for rows in (1, 64, 256, 2048, 8192):
        x, delta = random(rows, shape.hidden_size), random(rows, shape.hidden_size) * 2**-6
        yield Timing(
            "add_rms_norm",
            f"{rows} rows",
            meter.launch([lambda x=x, delta=delta: add_rms_norm(x, delta, weight, EPS, pdl=pdl)] * 10),  # type: ignore[misc]
            num_bytes=4 * x.nbytes,
        )


def write(shape: Shape, pdl: bool, meter: Meter) -> Iterator[Timing]:
    """Norm and RoPE of a prompt's queries and keys, and its keys and values into their pages."""
    from streamserve.kernels.impl.triton_rope import write_prompt

    cos_sin, (q_norm, k_norm) = rope_of(shape, 8192), head_norms(shape)
    for tokens in (128, 2048, 8192):
        inputs, qkv = paged(shape, [(0, tokens)], 1), random(tokens, shape.joined)
        kv_bytes = 2 * tokens * shape.num_kv_heads * shape.head_dim * 2

        def run(inputs: Any = inputs, qkv: Tensor = qkv) -> None:
            write_prompt(qkv, inputs, 0, cos_sin, q_norm, k_norm, EPS, shape)

        yield Timing("write_prompt", f"{tokens} tokens", meter.launch([run] * 10), num_bytes=2 * qkv.nbytes + kv_bytes // 2)


def silu(shape: Shape, pdl: bool, meter: Meter) -> Iterator[Timing]:
    """silu(gate) * up."""
    from streamserve.kernels.impl.triton_mlp import silu_mul

    for rows in (64, 256, 2048, 8192):
        x = random(rows, 2 * shape.intermediate_size)
        launches = [lambda x=x: silu_mul(x, pdl=pdl)] * 10
        yield Timing("silu_mul", f"{rows} rows", meter.launch(launches), num_bytes=1.5 * x.nbytes)


def linear(shape: Shape, pdl: bool, meter: Meter) -> Iterator[Timing]:
    """The product of --deterministic, beside the library's."""
    from streamserve.kernels.impl.triton_linear import linear as product

    weight_bytes = 2 * shape.joined * shape.hidden_size
    weights = random(cold_copies(weight_bytes), shape.joined, shape.hidden_size)
    parts = [weights[i % len(weights)] for i in range(max(len(weights), 6))]
    for rows in (1, 64, 256, 2048, 8192):
        x = random(rows, shape.hidden_size)
        yield Timing(
            "linear",
            f"{shape.joined} x {shape.hidden_size}, {rows} rows",
            meter.launch([lambda w=w, x=x: product(x, w, None) for w in parts]),  # type: ignore[misc]
            num_bytes=weight_bytes + x.nbytes + 2 * rows * shape.joined,
            flops=weight_bytes * rows,
            library_us=meter.launch([lambda w=w, x=x: F.linear(x, w) for w in parts]),  # type: ignore[misc]
        )


def sampling(shape: Shape, pdl: bool, meter: Meter) -> Iterator[Timing]:
    """A token per row: the largest, a random one, a random one of the most likely."""
    from streamserve.kernels.impl.triton_sampling import NUM_WORDS, SamplingKernels, words
    from streamserve.messages import SamplingParams

    vocab = shape.vocab_size
    for rows in (1, 64, 256):
        kernels = SamplingKernels(vocab, rows, torch.device("cuda"), pdl=pdl)
        logits = 3 * torch.randn(rows, vocab, device="cuda")
        slots = torch.arange(rows, dtype=torch.int32, device="cuda")
        out, last = torch.empty_like(slots), torch.empty_like(slots)
        for case, asked in (
            ("greedy", SamplingParams(temperature=0.0)),
            ("temperature 1", SamplingParams()),
            ("top-p 0.95, top-k 50", SamplingParams(top_p=0.95, top_k=50)),
        ):
            state = torch.tensor([words(asked, seed, 0, vocab) for seed in range(rows)], dtype=torch.int32, device="cuda")
            assert state.shape[1] == NUM_WORDS
            has_threshold = "top" in case

            def choose(state: Tensor = state, has_threshold: bool = has_threshold, kernels: SamplingKernels = kernels) -> None:
                limits = kernels.thresholds(logits, slots, state) if has_threshold else None  # noqa: B023
                kernels.choose(logits, slots, state, out, last, limits)  # noqa: B023

            yield Timing("sampling", f"{rows} rows, {case}", meter.launch([choose] * 6), num_bytes=logits.nbytes)


OPS: dict[str, Callable[[Shape, bool, Meter], Iterable[Timing]]] = {
    "embed": embed,
    "norm": norm,
    "gemv": gemv,
    "decode": decode,
    "drafted": drafted,
    "prompt": prompt,
    "write": write,
    "silu": silu,
    "linear": linear,
    "sampling": sampling,
}


def supports_pdl() -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability() >= (9, 0)


def compile_beforehand(models: Sequence[str], ops: Sequence[str]) -> None:
    """Run all cases once, by processes side by side: one after the other, kernels would take minutes to compile."""
    started_s = time.perf_counter()
    most = [op for op in ops if op not in ("gemv", "sampling")]
    shares = [(group, parts) for group, parts in ((["gemv"], 3), (["sampling"], 2), (most, 2)) if set(group) & set(ops)]
    commands = [
        [sys.executable, __file__, "--models", model, "--ops", ",".join(group), "--once", f"{part}/{parts}"]
        for model in models
        for group, parts in shares
        for part in range(parts)
    ]
    running = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) for command in commands]
    for process, command in zip(running, commands, strict=True):
        said = process.communicate()[1]
        if process.returncode != 0:
            print(f"could not compile beforehand: {' '.join(command[2:])}\n{said[-800:]}", flush=True)
    print(f"compiled after {time.perf_counter() - started_s:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--ops", default=",".join(OPS))
    parser.add_argument("--json", metavar="OUT")
    parser.add_argument("--once", metavar="PART/PARTS", help="only run that share of the cases, to compile them")
    args = parser.parse_args()
    models, ops = args.models.split(","), args.ops.split(",")
    for word, known in ((set(models) - {*MODELS}, MODELS), (set(ops) - {*OPS}, OPS)):
        if word:
            parser.error(f"unknown: {', '.join(sorted(word))}; there are {', '.join(known)}")
    need_gpu()
    if args.once:
        once = Once(*map(int, args.once.split("/")))
        for name in models:
            for op in ops:
                for _ in OPS[op](MODELS[name], supports_pdl(), once):
                    pass
        torch.cuda.synchronize()
        return
    compile_beforehand(models, ops)
    found = machine()
    print(shown(found), flush=True)
    meter, timings = Meter(), dict[str, list[dict[str, Any]]]()
    for name in models:
        print(f"\n{name}, bfloat16; share of the ceiling that bounds the kernel", flush=True)
        for op in ops:
            for timing in OPS[op](MODELS[name], supports_pdl(), meter):
                print(timing.line(found), flush=True)
                timings.setdefault(name, []).append(asdict(timing))
            torch.cuda.empty_cache()
    if args.json:
        Path(args.json).write_text(json.dumps({"machine": found, "timings": timings}, indent=1))


if __name__ == "__main__":
    main()
