"""A network that guesses on a GPU: what a step with its guesses costs, and that a model guesses what it would say itself.

    python bench/drafters_gpu.py --model FOLDER --drafter FOLDER [--load-format dummy] [--drafts 4] [--output 192] [-- FLAGS]

`--drafter` names a smaller model, or it is eagle=FOLDER, mtp (of a checkpoint that has such layers), none, or eagle: then a head
is made up for the model, in the layout of published ones.

One engine in this process. Batches of several sizes without guesses, then with every guess verified: milliseconds of a step (the
median between two deltas of the same stream), tokens that a row brought, the share of guesses that were right, and the speed-up
that is left of them. With made-up weights (dummy: a config.json, and a tokenizer's files) two models agree on nothing: then only
the times of steps mean something. A head follows every step, wanted or not: what that costs is the step without guesses beside
that of a run with `--drafter none`.

Where both folders are the same, the model guesses for itself, at temperature 0 and 1: exit code 1 if fewer than 95 % of its
guesses are right. They are not all, since a token that is computed beside others may differ in its last bits, which made-up
weights, whose logits lie close together, feel most.

A line of JSON for each figure; the last says how long all took, the start included.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))

from bench.load import random_tokens
from bench.server import config_of, random_range
from bench.synthetic import Timed, tell
from streamserve import log, process
from streamserve.build import Built, build
from streamserve.engine.step_costs import StepCosts
from streamserve.messages import GenerateRequest, SamplingParams
from streamserve.models.decoder import layer_weights
from streamserve.models.eagle import ARCHITECTURE
from streamserve.models.spec import Traits, read_spec

PROMPT_LEN, BATCHES = 128, (1, 4, 16)
HEAD_VOCAB = 32_000  # of published heads
HEAD_KEYS = {
    *("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
    *("max_position_embeddings", "rms_norm_eps", "rope_theta"),
}
LEAST_RIGHT = 0.95  # of its own guesses


@dataclass(frozen=True, slots=True)
class Found:
    """Of one run: `step_ms` of its steps, tokens a second behind the first token, tokens of a row, share of right guesses."""

    step_ms: float
    tok_s: float
    tokens_per_row: float
    right: float


class Bench:
    """One engine, and runs on it."""

    def __init__(self, built: Built, tokens: range) -> None:
        # A server has no switch for what is switched here between runs.
        self._built, self._scheduler = built, built.engine._scheduler
        speculation = self._scheduler._speculation
        self._speculation = speculation
        self._tokens = tokens
        self._rng = Random(7)
        self._num_requests = 0

    @property
    def guesses_nothing(self) -> bool:
        return self._speculation is None

    async def run(self, batch: int, num_output: int, *, guesses: bool, temperature: float = 0.0) -> Found:
        """So many requests at once, with prompts that no other has. `guesses`: every row has some."""
        if self._speculation is not None:
            self._speculation.costs = StepCosts.free()
        self._scheduler._speculation = self._speculation if guesses else None
        self._built.cache.flush()
        params = SamplingParams(temperature=temperature, max_new_tokens=num_output, ignore_eos=True)
        mailboxes = []
        for _ in range(batch):
            self._num_requests += 1
            prompt = tuple(random_tokens(self._rng, PROMPT_LEN, self._tokens))
            mailboxes.append(await self._built.engine.submit(GenerateRequest(str(self._num_requests), prompt, params)))
        timed = [Timed() for _ in mailboxes]
        await asyncio.gather(*(one.read(mailbox) for one, mailbox in zip(timed, mailboxes, strict=True)))
        for one in timed:
            if one.num_tokens != num_output:
                raise SystemExit(f"an answer has {one.num_tokens} tokens, not {num_output}: {one.last.error}")
        times = [after - before for one in timed for before, after in zip(one.times_s, one.times_s[1:], strict=False)]
        num_accepted, num_drafted = sum(one.last.num_accepted for one in timed), sum(one.last.num_drafted for one in timed)
        num_further = batch * (num_output - 1)
        return Found(
            1000 * statistics.median(times),
            sum((num_output - 1) / (one.times_s[-1] - one.times_s[0]) for one in timed),
            num_further / (num_further - num_accepted),
            num_accepted / max(1, num_drafted),
        )


async def measure(bench: Bench, built: Built, args: argparse.Namespace, *, is_own: bool) -> int:
    """All of it. Returns the exit code. `is_own`: the model guesses for itself."""
    code = 0
    engine = asyncio.create_task(built.engine.run())
    try:
        for guesses in (False, True):  # whatever is compiled late is by now
            await bench.run(1, 32, guesses=guesses)
        for batch in args.batches:
            plain = await bench.run(batch, args.output, guesses=False)
            if bench.guesses_nothing:
                tell(batch=batch, plain_step_ms=plain.step_ms)
                continue
            for temperature in (0.0, 1.0):
                found = await bench.run(batch, args.output, guesses=True, temperature=temperature)
                is_right = {"bound": LEAST_RIGHT, "holds": found.right >= LEAST_RIGHT} if is_own else {}
                code |= is_own and found.right < LEAST_RIGHT
                tell(
                    batch=batch,
                    temperature=temperature,
                    plain_step_ms=plain.step_ms,
                    step_ms=found.step_ms,
                    tokens_per_row=found.tokens_per_row,
                    right=found.right,
                    speedup=found.tok_s / plain.tok_s,
                    **is_right,
                )
    finally:
        engine.cancel()
        with suppress(asyncio.CancelledError):
            await engine
    return code


def asked_for(drafter: str, drafts: int, model: Path, folder: Path) -> str:
    """The setting. A head that is made up goes into `folder`."""
    if drafter == "none":
        return drafter
    if drafter == "eagle":
        make_up_head(model, folder)
        return f"eagle={folder},{drafts}"
    return f"{drafter},{drafts}" if drafter == "mtp" or drafter.startswith("eagle=") else f"draft_model={drafter},{drafts}"


def make_up_head(model: Path, folder: Path) -> None:
    """An EAGLE-3 head with the model's numbers, as published ones have them."""
    config = json.loads((model / "config.json").read_text())
    config = {key: value for key, value in config.items() if key in HEAD_KEYS}
    config |= {"model_type": "llama", "architectures": [ARCHITECTURE], "num_hidden_layers": 1, "tie_word_embeddings": False}
    config["draft_vocab_size"] = min(HEAD_VOCAB, config["vocab_size"])
    spec = read_spec(config, Traits())
    hidden, vocab = spec.hidden_size, config["draft_vocab_size"]
    shapes = {
        **layer_weights(spec, "midlayer.", input_size=2 * hidden),
        "midlayer.hidden_norm.weight": (hidden,),
        "fc.weight": (hidden, 3 * hidden),
        "norm.weight": (hidden,),
        "lm_head.weight": (vocab, hidden),
    }
    made = {name: torch.empty(shape, dtype=torch.bfloat16).normal_(std=shape[-1] ** -0.5) for name, shape in shapes.items()}
    save_file({**made, "d2t": torch.zeros(vocab, dtype=torch.int64)}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def main(arguments: Sequence[str]) -> int:
    """Build, measure."""
    own, flags = list(arguments), []
    if "--" in own:
        at = own.index("--")
        own, flags = own[:at], own[at + 1 :]
    parser = argparse.ArgumentParser("drafters_gpu.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", required=True)
    parser.add_argument("--drafter", required=True, help="who guesses: see above")
    parser.add_argument("--load-format", choices=("auto", "dummy"), default="dummy", help="of both")
    parser.add_argument("--drafts", type=int, default=4)
    parser.add_argument("--output", type=int, default=192, help="tokens of an answer")
    parser.add_argument("--batches", type=lambda text: tuple(int(part) for part in text.split(",")), default=BATCHES)
    args = parser.parse_args(own)
    log.configure("warning", "console")
    started_s = time.perf_counter()
    with TemporaryDirectory() as folder:
        speculative = asked_for(args.drafter, args.drafts, Path(args.model), Path(folder))
        built = build(config_of(args.model, ["--load-format", args.load_format, "--speculative", speculative, *flags]))
    process.settle()
    tell(what="ready", seconds=time.perf_counter() - started_s)
    try:
        is_own = Path(args.model).resolve() == Path(args.drafter).resolve()
        code = asyncio.run(measure(Bench(built, random_range(args.model)), built, args, is_own=is_own))
    finally:
        built.close()
    tell(what="end", seconds=time.perf_counter() - started_s)
    return code


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
