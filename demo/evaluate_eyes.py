"""How well a server sees: fresh scenes, questions about them over /v1/chat/completions, and which answers are right.

    python demo/evaluate_eyes.py --seed N [--scenes 500] [--url http://127.0.0.1:30000]

Without --url a server of the default model is started for it. Every scene is asked one question of each kind that it has an
answer to, at temperature 0; the picture goes as a PNG in a data URL, before the text or behind it. `judge` says what counts as
right: a description has to name everything that is there, nothing else, and how many of each.

Owns the judgement. Sees only what a client sees.
"""

import argparse
import asyncio
import base64
import io
import re
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import httpx
from PIL import Image

from demo.scenes import COLOUR_NAMES, KINDS, NUMBERS, SHAPES, Question, Scene, ask, draw_scene, plural

# What else people call the same thing.
_SAME = {
    **{str(number): name for number, name in enumerate(NUMBERS)},
    "grey": "gray", "violet": "purple", "ellipse": "oval", "rhombus": "diamond", "plus": "cross", "donut": "ring",
    "centre": "center", "middle": "center", "under": "below", "over": "above", "none": "zero", "an": "a",
}  # fmt: skip
_SHAPE_OF = {form: shape for shape in SHAPES for form in (shape, plural(shape))}
_SIDES = ("left", "right", "above", "below")
_FILLER = frozenset(("a", "the", "it", "says", "word", "number", "digit", "text", "is", "in", "this", "picture", "image"))
_BOUNDS = {"shape": 0.9, "colour": 0.9, "describe": 0.9, "count to four": 0.8, "where": 0.8, "relation": 0.8}


def _words(answer: str) -> list[str]:
    return [_SAME.get(word, word) for word in re.findall(r"[a-z0-9]+", answer.lower())]


def _named(words: Sequence[str], names: Sequence[str]) -> set[str]:
    return {word for word in words if word in names}


def judge(question: Question, answer: str) -> bool:
    """Whether an answer is right. Case, digits or words, and British or American spelling are free; hedging is wrong."""
    words, facts = _words(answer), question.facts
    match question.kind:
        case "describe":
            return _is_description(facts, answer)
        case "shape":
            return {_SHAPE_OF[word] for word in words if word in _SHAPE_OF} == {facts}
        case "colour" | "background":
            return _named(words, COLOUR_NAMES) == {facts}
        case "count":
            said = _named(words, NUMBERS) or ({"zero"} if "no" in words else set())
            return said == {NUMBERS[facts]}
        case "where":
            sides, one = facts
            said = _named(words, _SIDES)
            if not said or not said <= sides:
                return False
            before = words[: min(words.index(side) for side in said)]
            is_about_it = " ".join(words).startswith(f"the {one} ")
            return is_about_it or not any(word in _SHAPE_OF for word in before)  # "Left of it." is fine
        case "relation" | "exists":
            return _named(words, ("yes", "no")) == {"yes" if facts else "no"}
        case "read":
            if not facts:
                return "no" in words or "nothing" in words
            read = re.findall(r"[a-z0-9]+", answer.lower())
            return facts in read and all(word == facts or word in _FILLER for word in read)
        case "place":
            return _named(words, ("top", "bottom", "left", "right", "center")) == set(facts.split())
        case "beside":
            colour, shape = facts.split()
            is_only = {_SHAPE_OF[word] for word in words if word in _SHAPE_OF} == {shape}
            return is_only and _named(words, COLOUR_NAMES) <= {colour}
    raise AssertionError(question.kind)


def _is_description(scene: Scene, answer: str) -> bool:
    written = [text.lower() for text in re.findall(r'"([^"]*)"', answer)]
    if Counter(written) != Counter(thing.text for thing in scene.written):
        return False
    words = _words(re.sub(r'"[^"]*"( in [a-z]+)?', " ", answer))  # a text's colour is not asked for
    counts: Counter[tuple[str, str]] = Counter()
    numbers = {"a": 1, "the": 1, **{name: number for number, name in enumerate(NUMBERS)}}
    used = 0
    for number, colour, shape in zip(words, words[1:], words[2:], strict=False):
        if shape in _SHAPE_OF and colour in COLOUR_NAMES and number in numbers:
            counts[_SHAPE_OF[shape], colour] += numbers[number]
            used += 1
    grounds = {colour for colour, word in pairwise(words) if word == "background" and colour in COLOUR_NAMES}
    is_whole = used == sum(word in _SHAPE_OF for word in words)  # every shape that is named has a colour and a number
    return is_whole and grounds <= {scene.background} and counts == Counter((thing.shape, thing.colour) for thing in scene.shapes)


def exam(seed: int, number: int, kinds: Sequence[str]) -> tuple[Scene, list[Question]]:
    """A scene, and a question of each kind that it has an answer to."""
    rng = Random(f"exam {seed} {number}")
    scene = draw_scene(rng)
    return scene, [question for kind in kinds if (question := ask(scene, rng, kind)) is not None]


def data_url(picture: Image.Image) -> str:
    """As a PNG."""
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


@contextmanager
def _server(arguments: Sequence[str]) -> Iterator[str]:
    """A server of the default model; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "streamserve", "serve", "--port", str(port), *arguments]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise SystemExit(f"the server has ended: {' '.join(command)}")
            try:
                if httpx.get(f"{url}/ready", timeout=2).status_code == 200:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


async def _ask(client: httpx.AsyncClient, model: str, url: str, question: Question, is_text_first: bool) -> str:
    picture = {"type": "image_url", "image_url": {"url": url}}
    parts: list[dict[str, Any]] = [picture, {"type": "text", "text": question.text}]
    body = {
        "model": model,
        "messages": [{"role": "user", "content": parts[::-1] if is_text_first else parts}],
        "temperature": 0,
        "max_tokens": 80,
    }
    reply = await client.post("/v1/chat/completions", json=body)
    if reply.status_code != 200:
        raise SystemExit(f"status {reply.status_code}: {reply.text}")
    content: str = reply.json()["choices"][0]["message"]["content"]
    return content


async def _examine(url: str, args: argparse.Namespace, kinds: Sequence[str]) -> dict[str, list[bool]]:
    marks: dict[str, list[bool]] = {}
    numbers = iter(range(args.scenes))
    async with httpx.AsyncClient(base_url=url, timeout=120, trust_env=False) as client:
        model = (await client.get("/v1/models")).json()["data"][0]["id"]

        async def work() -> None:
            for number in numbers:
                scene, asked = exam(args.seed, number, kinds)
                picture = data_url(scene.picture)
                for question in asked:
                    answer = await _ask(
                        client, model, picture, question, args.order == "text" or (args.order == "both" and number % 2 == 1)
                    )
                    is_right = judge(question, answer)
                    kind = "count to four" if question.kind == "count" and question.facts <= 4 else question.kind
                    marks.setdefault("count, five and six" if kind == "count" else kind, []).append(is_right)
                    if args.show and not is_right:
                        print(f"scene {number}: {question.text} - {answer!r}; right is {question.answer!r}", flush=True)

        await asyncio.gather(*(work() for _ in range(args.concurrency)))
    return marks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seed", type=int, required=True, help="of the scenes; those that the eyes learned from have other seeds"
    )
    parser.add_argument("--scenes", type=int, default=500)
    parser.add_argument("--url", help="of a server that runs; else one is started")
    parser.add_argument("--kinds", help=f"only these, of {','.join(KINDS)}")
    parser.add_argument("--order", choices=("both", "picture", "text"), default="both", help="what comes first in a message")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--show", action="store_true", help="print what was wrong")
    parser.add_argument("serve", nargs="*", help="arguments for the server that is started, behind --")
    args = parser.parse_args()
    kinds = args.kinds.split(",") if args.kinds else KINDS
    if unknown := set(kinds) - set(KINDS):
        raise SystemExit(f"--kinds: {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    begun = time.perf_counter()
    if args.url:
        marks = asyncio.run(_examine(args.url, args, kinds))
    else:
        with _server(args.serve) as url:
            marks = asyncio.run(_examine(url, args, kinds))
    total = sum(len(row) for row in marks.values())
    print(f"{args.scenes} scenes of seed {args.seed}, {total} questions, {time.perf_counter() - begun:.0f} s")
    is_met = True
    for kind, row in sorted(marks.items()):
        share = sum(row) / len(row)
        bound = _BOUNDS.get(kind)
        is_met = is_met and (bound is None or share >= bound)
        wanted = "" if bound is None else f"  wanted {bound:.0%}: {'met' if share >= bound else 'MISSED'}"
        print(f"  {kind:20} {sum(row):5} of {len(row):5} right  {share:6.1%}{wanted}")
    raise SystemExit(0 if is_met else 1)


if __name__ == "__main__":
    main()
