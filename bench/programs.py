"""Programs that share their examples: GSM8K, eight examples before each question, as one batch of a program.

    python bench/programs.py [--questions 64] [--shots 8] [--rounds 3] [--threads N] [--skip NAME] [--json OUT] [--quick]

The same program (greedy, at most 256 tokens, until "Question") on a CPU with the default model:

    cache         an engine as it comes: all prefixes forgotten before each round
    no cache      the same with disable_radix_cache, in turns with the first; its texts must be the same
    transformers  generate() on the dequantised weights, left padded: float32 with all questions together and with 16, then
                  bfloat16 the faster way; each once, the fastest counts. Same tokens as prompts, and it stops at the same text

Needs ../shared/data/gsm8k_test.jsonl, or --data. --quick tries everything with four questions and few tokens: its times say
nothing.
"""

import argparse
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import streamserve as sgl
from bench.machine import processor
from streamserve import process
from streamserve.default_model import find_default_model
from streamserve.text.model import load_text_model

DATA = Path(__file__).parents[2] / "shared" / "data" / "gsm8k_test.jsonl"
STOP = "Question"
WANTED = {"no cache": 2.5, "transformers": 4.0}  # times slower than the first, at least
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True, slots=True)
class Task:
    """The examples, as they stand before each question; the questions; and the numbers that answer them."""

    examples: str
    questions: list[str]
    numbers: list[str]
    max_tokens: int

    def prompts(self) -> list[str]:
        """As the program writes them."""
        return [f"{self.examples}Question: {question}\nAnswer:" for question in self.questions]


@dataclass(frozen=True, slots=True)
class Ran:
    """One run: what it took and what came out."""

    seconds: float
    texts: list[str]
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int


@sgl.function
def few_shot(s: Any, examples: str, question: str, max_tokens: int) -> None:
    """The program."""
    s += examples
    s += "Question: " + question + "\nAnswer:" + sgl.gen("answer", max_tokens=max_tokens, stop=STOP)


def task_of(path: Path, shots: int, questions: int, max_tokens: int) -> Task:
    """The first lines of the file are the examples, those behind them the questions."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[: shots + questions]]
    examples = "".join(f"Question: {line['question']}\nAnswer: {line['answer']}\n\n" for line in lines[:shots])
    asked = lines[shots:]
    numbers = [line["answer"].split("####")[1].strip().replace(",", "") for line in asked]
    return Task(examples, [line["question"] for line in asked], numbers, max_tokens)


def ours(engine: sgl.Engine, task: Task, *, keeps: bool) -> Ran:
    """The program's batch on an engine that knows no prefix. `keeps`: it will keep those it meets."""
    engine.flush_cache(timeout=60)
    sgl.global_config.enable_precache_with_tracing = keeps  # else computing the examples ahead would be for nothing
    items = [{"examples": task.examples, "question": question, "max_tokens": task.max_tokens} for question in task.questions]
    started = time.perf_counter()
    states = few_shot.run_batch(items, backend=engine, temperature=0)
    texts = [state["answer"] for state in states]
    seconds = time.perf_counter() - started
    metas = [state.get_meta_info("answer") for state in states]
    prompt, cached, output = (sum(meta[f"{kind}_tokens"] for meta in metas) for kind in ("prompt", "cached", "completion"))
    return Ran(seconds, texts, prompt, cached, output)


class Transformers:
    """generate() of a batch, with our tokens."""

    def __init__(self, threads: int, dtype: str) -> None:
        os.environ.setdefault("TQDM_DISABLE", "1")
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        logging.set_verbosity_error()  # type: ignore[no-untyped-call]
        torch.set_num_threads(threads)
        path = find_default_model()
        self.torch = torch
        self.tokenizer = load_text_model(path).tokenizer
        self.model: Any = AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=getattr(torch, dtype))
        self.model.train(False)
        assert all(weight.dtype == getattr(torch, dtype) for weight in self.model.parameters()), "they are dequantised"

    def run(self, task: Task, batch: int) -> Ran:
        """All questions, so many together."""
        ids = [self.tokenizer.encode(prompt) for prompt in task.prompts()]
        found: list[list[int]] = []
        started = time.perf_counter()
        for at in range(0, len(ids), batch):
            found += self._together(ids[at : at + batch], task.max_tokens)
        texts = [self.tokenizer.decode(tokens, skip_special_tokens=True).split(STOP)[0] for tokens in found]
        seconds = time.perf_counter() - started
        return Ran(seconds, texts, sum(map(len, ids)), 0, sum(map(len, found)))

    def _together(self, ids: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
        torch, longest = self.torch, max(map(len, ids))
        eos = sorted(self.tokenizer.eos_token_ids)
        given = torch.full((len(ids), longest), eos[0])
        mask = torch.zeros_like(given)
        for row, tokens in enumerate(ids):
            given[row, longest - len(tokens) :] = torch.tensor(tokens)
            mask[row, longest - len(tokens) :] = 1
        with torch.inference_mode():
            out = self.model.generate(
                given,
                attention_mask=mask,
                max_new_tokens=max_tokens,
                do_sample=False,
                eos_token_id=eos,
                pad_token_id=eos[0],
                stopping_criteria=[self._has_stopped],
            )
        return [_until_any(tokens, eos) for tokens in out[:, longest:].tolist()]

    def _has_stopped(self, given: Any, scores: Any, **_: Any) -> Any:
        """Of each row, whether its last tokens hold the stop string."""
        texts = [self.tokenizer.decode(tokens, skip_special_tokens=False) for tokens in given[:, -4:].tolist()]
        return self.torch.tensor([STOP in text for text in texts])


def _until_any(tokens: Sequence[int], ends: Sequence[int]) -> list[int]:
    return list(tokens[: next((at for at, token in enumerate(tokens) if token in ends), len(tokens))])


def right(task: Task, ran: Ran) -> int:
    """Answers whose last number is the right one."""
    last = [(re.findall(r"-?\d[\d,]*\.?\d*", text) or [""])[-1].replace(",", "").rstrip(".") for text in ran.texts]
    return sum(found == number for found, number in zip(last, task.numbers, strict=True))


def best_of_transformers(task: Task, threads: int, batches: Sequence[int], dtypes: Sequence[str]) -> tuple[str, Ran]:
    """The fastest way, and its name. All sizes in the first type; in the others the size that was fastest there."""
    found: list[tuple[str, Ran]] = []
    for dtype in dtypes:
        if found:
            batches = [batches[min(range(len(batches)), key=lambda at: found[at][1].seconds)]]
        model = Transformers(threads, dtype)
        model.run(Task(task.examples[-200:], task.questions[:2], task.numbers[:2], 4), 2)  # warm-up
        for batch in batches:
            ran = model.run(task, batch)
            found.append((f"{dtype}, {batch} together", ran))
            print(f"  transformers ({found[-1][0]}): {ran.seconds:.1f} s", flush=True)
        del model
    return min(found, key=lambda one: one[1].seconds)


def table(task: Task, runs: dict[str, list[Ran]]) -> str:
    """A line for each way: medians, and how much longer it took than the first."""
    first = statistics.median(ran.seconds for ran in runs["cache"])
    lines = [f"{'':14}{'seconds':>22}{'questions/s':>13}{'prompt tok':>12}{'cached':>9}{'output tok':>12}{'right':>7}   slower"]
    for name, all_runs in runs.items():
        ran, times = all_runs[0], sorted(ran.seconds for ran in all_runs)
        median = statistics.median(times)
        lines.append(
            f"{name:14}{f'{median:.2f} ({times[0]:.2f}-{times[-1]:.2f})':>22}{len(task.questions) / median:>13.2f}"
            f"{ran.prompt_tokens:>12,}{ran.cached_tokens / ran.prompt_tokens:>9.0%}{ran.output_tokens:>12,}"
            f"{right(task, ran):>7}   {median / first:.2f}x"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=64)
    parser.add_argument("--shots", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--batch", type=int, action="append", help="questions that transformers gets together; repeatable")
    parser.add_argument("--skip", action="append", default=[], choices=("no cache", "transformers"))
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="four questions, few tokens, one round")
    args = parser.parse_args()
    if args.quick:
        args.questions, args.max_tokens, args.rounds, args.batch = 4, min(args.max_tokens, 24), 1, args.batch or [4]
    task = task_of(args.data, args.shots, args.questions, args.max_tokens)
    batches = args.batch or sorted({min(size, args.questions) for size in (16, 64)})
    print(f"{processor()}, {args.threads} of {os.cpu_count()} threads, load {os.getloadavg()[0]:.2f}")
    print(f"{args.questions} questions, {args.shots} examples, at most {args.max_tokens} tokens")

    runs: dict[str, list[Ran]] = {"cache": [], "no cache": []}
    engines = {name: sgl.Engine(device="cpu", threads=args.threads, disable_radix_cache=name == "no cache") for name in runs}
    process.settle()
    for name in args.skip:
        runs.pop(name, None)
    for name in runs:
        ours(engines[name], Task(task.examples[-200:], task.questions[:2], task.numbers[:2], 4), keeps=name == "cache")  # warm-up
    for number in range(args.rounds):
        for name in runs:
            runs[name].append(ours(engines[name], task, keeps=name == "cache"))
            print(f"  round {number + 1}, {name}: {runs[name][-1].seconds:.2f} s", flush=True)
    for engine in engines.values():
        engine.shutdown()
    notes: dict[str, str] = {}
    if "transformers" not in args.skip:
        notes["transformers"], ran = best_of_transformers(task, args.threads, batches, DTYPES[:1] if args.quick else DTYPES)
        runs["transformers"] = [ran]
    print(f"\n{table(task, runs)}")
    if args.json:
        args.json.write_text(json.dumps({"processor": processor(), "threads": args.threads, "notes": notes, **_plain(runs)}))
    return _judge(runs, notes, is_quick=args.quick)


def _plain(runs: dict[str, list[Ran]]) -> dict[str, Any]:
    return {"runs": {name: [asdict(ran) for ran in all_runs] for name, all_runs in runs.items()}}


def _judge(runs: dict[str, list[Ran]], notes: dict[str, str], *, is_quick: bool) -> int:
    """Says what holds; 1 when something does not. Times of a quick run are not looked at."""
    texts = runs["cache"][0].texts
    is_good = all(ran.texts == texts for ran in runs["cache"])
    for name, all_runs in runs.items():
        same = sum(one == other for one, other in zip(texts, all_runs[0].texts, strict=True))
        if name == "no cache":
            is_good &= all(ran.texts == texts for ran in all_runs)
        if name != "cache":
            print(f"{name}{f' ({notes[name]})' if name in notes else ''}: {same} of {len(texts)} texts are the same")
            pace = _median(all_runs) / _median(runs["cache"])
            if not is_quick:
                print(f"  {pace:.2f}x as long; wanted is {WANTED[name]}x: {'yes' if pace >= WANTED[name] else 'NO'}")
                is_good &= pace >= WANTED[name]
    print("all is as wanted" if is_good else "NOT all is as wanted")
    return 0 if is_good else 1


def _median(runs: Sequence[Ran]) -> float:
    return statistics.median(ran.seconds for ran in runs)


if __name__ == "__main__":
    sys.exit(main())
