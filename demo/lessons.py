"""Scenes and questions about them as rows of tokens, drawn by processes of their own and handed over in shared memory.

A row is one picture and what fits beside it. Either the picture comes first, and then short conversations about it follow that do
not see each other (`part` says which tokens belong together), so that the picture is read once for all of them; or one
conversation, whose first question comes before the picture. Both are what a server makes of a chat: the tokens that the chat
template puts around messages, and a newline between picture and text.

Owns the form of rows. Knows the tokenizer and the template; no torch, no network.
"""

import multiprocessing
import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from demo.scenes import COLOUR_NAMES, KINDS, MAX_THINGS, SHAPES, Question, draw_scene, eye_view, questions
from streamserve.text.model import TextModel, load_text_model

MARK = "\ue000"  # where the picture stands in a text
MAX_ANSWERS = 24  # of a row
SYSTEMS = (None, "You are a helpful assistant.", "You answer questions about pictures.", "Be brief.")  # None: the template's own
SYSTEM_SHARES = (0.85, 0.07, 0.04, 0.04)
SHARE_TEXT_FIRST, SHARE_LONGER, SHARE_WORDLESS = 0.3, 0.25, 0.02
NOTHING = -1


@dataclass(frozen=True, slots=True)
class Form:
    """What rows have in common."""

    image_size: int = 160
    patch_size: int = 16
    num_text: int = 180  # tokens beside the picture

    @property
    def side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.side**2

    @property
    def length(self) -> int:
        return self.num_patches + self.num_text

    @property
    def row(self) -> np.dtype[Any]:
        """`start`: where the picture's places begin. `label`: the token that is to come next, where an answer says it; `answer`
        counts those of a row, `kinds` says what they are. `things`: shape, colour, x, y, radius of each."""
        size, length = self.image_size, self.length
        return np.dtype(
            [
                ("picture", np.uint8, (size, size, 3)),
                ("ids", np.int32, (length,)),
                ("position", np.int16, (length,)),
                ("part", np.int8, (length,)),
                ("label", np.int32, (length,)),
                ("answer", np.int8, (length,)),
                ("kinds", np.int8, (MAX_ANSWERS,)),
                ("start", np.int16),
                ("system", np.int8),
                ("ground", np.int8),
                ("things", np.float32, (MAX_THINGS, 5)),
            ]
        )


class Script:
    """What the chat template puts around what is said."""

    def __init__(self, text: TextModel) -> None:
        self.encode = lru_cache(maxsize=200_000)(lambda words: tuple(text.tokenizer.encode(words, add_special_tokens=False)))

        def rendered(*messages: tuple[str, str]) -> list[str]:
            ids = text.encode_chat([{"role": role, "content": content} for role, content in messages])
            return text.tokenizer.decode(ids, skip_special_tokens=False).split(MARK)

        before, self.after_question, self.after_answer, end = rendered(("user", MARK), ("assistant", MARK), ("user", MARK))
        if end != self.after_question:
            raise SystemExit("the chat template of this model does not put one turn behind the other")
        heads = [before if s is None else rendered(("system", s), ("user", MARK))[0] for s in SYSTEMS]
        self.heads = [self.encode(head) for head in heads]
        self.end = self.encode(self.after_answer)[:1]


class _Writer:
    """Fills one row, up to its end."""

    def __init__(self, row: Any, form: Form, script: Script) -> None:
        self._row, self._form, self._script = row, form, script
        self.at = 0
        self.num_answers = 0

    def put(self, ids: tuple[int, ...], part: int, position: int) -> None:
        here = slice(self.at, self.at + len(ids))
        self._row["ids"][here] = ids
        self._row["part"][here] = part
        self._row["position"][here] = np.arange(position, position + len(ids))
        self.at += len(ids)

    def picture(self, position: int) -> None:
        count = self._form.num_patches
        self._row["start"] = self.at
        self._row["part"][self.at : self.at + count] = 0
        self._row["position"][self.at : self.at + count] = np.arange(position, position + count)
        self.at += count

    def answer(self, ids: tuple[int, ...], kind: str, part: int, position: int) -> None:
        """The token before says the first of them."""
        self._row["label"][self.at - 1 : self.at - 1 + len(ids)] = ids
        self._row["answer"][self.at - 1 : self.at - 1 + len(ids)] = self.num_answers
        self._row["kinds"][self.num_answers] = KINDS.index(kind)
        self.num_answers += 1
        self.put(ids, part, position)

    def fits(self, count: int, num_answers: int) -> bool:
        return self.at + count <= self._form.length and self.num_answers + num_answers <= MAX_ANSWERS


def write_row(row: Any, form: Form, script: Script, rng: Random) -> None:
    """A scene, its picture and conversations about it into a row."""
    scene = draw_scene(rng)
    row["picture"] = np.asarray(eye_view(scene.picture, form.image_size))
    for name in ("part", "label", "answer", "kinds", "things"):
        row[name] = NOTHING
    row["ids"] = row["position"] = 0
    row["ground"] = COLOUR_NAMES.index(scene.background)
    for at, thing in enumerate(scene.things):
        shape = len(SHAPES) if thing.text else SHAPES.index(thing.shape)
        row["things"][at] = (shape, COLOUR_NAMES.index(thing.colour), thing.x, thing.y, thing.radius)
    system = rng.choices(range(len(SYSTEMS)), SYSTEM_SHARES)[0]
    row["system"] = system
    asked = questions(scene, rng)
    encode, writer = script.encode, _Writer(row, form, script)
    position = len(script.heads[system])
    if rng.random() < SHARE_TEXT_FIRST:
        question = next(asked)
        writer.put(encode(f"{question.text}\n"), 0, position)
        writer.picture(position + writer.at)
        writer.put(encode(script.after_question), 0, position + writer.at)
        while True:
            answer = encode(question.answer) + script.end
            if not writer.fits(len(answer), 1):
                break
            writer.answer(answer, question.kind, 0, position + writer.at)
            question = next(asked)
            turn = encode(script.after_answer + question.text + script.after_question)[1:]
            if not writer.fits(len(turn), 1):
                break
            writer.put(turn, 0, position + writer.at)
        return
    writer.picture(position)
    position += form.num_patches
    part = 0
    while True:
        part += 1
        turns = [next(asked) for _ in range(rng.choice((2, 2, 3)) if rng.random() < SHARE_LONGER else 1)]
        pieces = list(_pieces(turns, script, rng))
        if not writer.fits(sum(len(ids) for _, ids in pieces), len(turns)):
            break
        at = position
        for kind, ids in pieces:
            if kind:
                writer.answer(ids, kind, part, at)
            else:
                writer.put(ids, part, at)
            at += len(ids)


def _pieces(turns: list[Question], script: Script, rng: Random) -> Iterator[tuple[str, tuple[int, ...]]]:
    """What follows the picture: tokens, and of which kind of answer they are."""
    for number, question in enumerate(turns):
        if number:
            yield "", script.encode(script.after_answer + question.text + script.after_question)[1:]
        elif question.kind == "describe" and rng.random() < SHARE_WORDLESS * len(KINDS):
            yield "", script.encode(script.after_question)  # a picture without a word
        else:
            yield "", script.encode("\n" + question.text + script.after_question)
        yield question.kind, script.encode(question.answer) + script.end


def _work(model: Path, form: Form, seed: str, memory: str, num_rows: int, free: Any, full: Any) -> None:
    """A process: fill the slots that are free, until there is none more to come."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    script = Script(load_text_model(model))
    shared = SharedMemory(memory)
    try:
        for slot, number in iter(free.get, None):
            rows = _slot(shared, slot, num_rows, form)
            rng = Random(f"{seed} {number}")
            for row in rows:
                write_row(row, form, script, rng)
            del rows, row
            full.put((slot, number))
    finally:
        shared.close()


def _slot(shared: SharedMemory, slot: int, num_rows: int, form: Form) -> NDArray[Any]:
    return np.ndarray((num_rows,), form.row, buffer=shared.buf, offset=slot * num_rows * form.row.itemsize)


class Lessons:
    """Rows without end, drawn ahead by several processes. What block n holds follows from the seed and n."""

    def __init__(self, model: Path, form: Form, seed: str, *, num_workers: int, block: int = 64, ahead: int = 8) -> None:
        context = multiprocessing.get_context("spawn")
        self._form, self.block = form, block
        num_slots = ahead * num_workers
        self._shared = SharedMemory(create=True, size=num_slots * block * form.row.itemsize)
        self._free, self._full = context.Queue(), context.Queue()
        self._next = 0
        for slot in range(num_slots):
            self._hand_out(slot)
        arguments = (model, form, seed, self._shared.name, block, self._free, self._full)
        self._workers = [context.Process(target=_work, args=arguments, daemon=True) for _ in range(num_workers)]
        for worker in self._workers:
            worker.start()

    def _hand_out(self, slot: int) -> None:
        self._free.put((slot, self._next))
        self._next += 1

    def take(self, most: int, *, wait: bool) -> Iterator[NDArray[Any]]:
        """Up to so many blocks that are ready; each is to be copied before the next is asked for. `wait`: exactly so many."""
        for _ in range(most):
            while True:
                if not wait and self._full.empty():
                    return
                try:
                    slot, _ = self._full.get(timeout=5)
                    break
                except Exception:
                    if not all(worker.is_alive() for worker in self._workers):
                        raise RuntimeError("a process that draws scenes has ended") from None
            yield _slot(self._shared, slot, self.block, self._form)
            self._hand_out(slot)

    def close(self) -> None:
        """End the processes."""
        for worker in self._workers:
            worker.terminate()
        for worker in self._workers:
            worker.join()
        for queue in (self._free, self._full):
            queue.cancel_join_thread()
            queue.close()
        self._shared.close()
        self._shared.unlink()


def rows_of(form: Form, script: Script, seed: str, count: int) -> NDArray[Any]:
    """Rows that this process makes itself."""
    rows = np.zeros(count, form.row)
    rng = Random(seed)
    for row in rows:
        write_row(row, form, script, rng)
    return rows
