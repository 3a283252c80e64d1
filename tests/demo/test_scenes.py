"""Scenes show what they say they show, questions have the answers that they come with, and the judge knows right from wrong."""

import colorsys
from itertools import islice
from random import Random

import numpy as np
import pytest
from PIL import Image

from demo import scenes
from demo.evaluate_eyes import exam, judge
from demo.lessons import SYSTEMS, Form, Script, rows_of
from demo.scenes import COLOUR_NAMES, KINDS, SHAPES, Question, Scene, Thing, ask, describe, draw_scene, questions
from streamserve.default_model import find_default_model
from streamserve.text.model import load_text_model


def some_scenes(count: int) -> list[tuple[Random, Scene]]:
    drawn = []
    for number in range(count):
        rng = Random(number)
        drawn.append((rng, draw_scene(rng)))
    return drawn


def test_one_seed_draws_one_scene() -> None:
    (_, first), (_, again), (_, other) = some_scenes(1)[0], some_scenes(1)[0], some_scenes(2)[1]
    assert first.things == again.things and first.picture.tobytes() == again.picture.tobytes()
    assert first.things != other.things
    assert [q for q in islice(questions(first, Random(1)), 9)] == [q for q in islice(questions(first, Random(1)), 9)]


def test_things_have_their_colour_where_they_are_said_to_be_and_do_not_touch() -> None:
    """Of the shapes that cover their centre."""
    for _, scene in some_scenes(80):
        width, height = scene.picture.size
        for thing in scene.shapes:
            pixel = scene.picture.getpixel((min(width - 1, int(thing.x * width)), min(height - 1, int(thing.y * height))))
            named = scene.background if thing.shape == "ring" else thing.colour
            assert named in colours_of(pixel), (thing, pixel)
        for number, one in enumerate(scene.things):
            assert 0 < one.x < 1 and 0 < one.y < 1
            for two in scene.things[:number]:
                apart = np.hypot((one.x - two.x) * width, (one.y - two.y) * height)
                assert apart > (one.radius + two.radius) * min(width, height) or one.text or two.text


def colours_of(pixel: object) -> list[str]:
    """Names that fit a pixel, with room for rounding."""
    assert isinstance(pixel, tuple)
    hue, saturation, value = colorsys.rgb_to_hsv(*(part / 255 for part in pixel))
    fitting = []
    for name, ((low, high), (least, most), (dark, bright)) in scenes.COLOURS.items():
        is_hue = name in ("black", "white", "gray") or any(low - 2 <= hue * 360 + turn <= high + 2 for turn in (-360, 0))
        is_pure = name == "black" or least - 0.03 <= saturation <= most + 0.03
        if is_hue and is_pure and dark - 0.02 <= value <= bright + 0.02:
            fitting.append(name)
    return fitting


def test_every_answer_that_comes_with_a_question_is_judged_right() -> None:
    seen = set()
    for rng, scene in some_scenes(250):
        for question in islice(questions(scene, rng), 12):
            assert judge(question, question.answer), question
            seen.add(question.kind)
    assert seen == set(KINDS)


RED, BLUE = Thing("circle", "red", 0.2, 0.5, 0.1), Thing("square", "blue", 0.8, 0.5, 0.1)
NOTE = Thing("text", "red", 0.5, 0.5, 0.1, "star")


def scene_of(*things: Thing) -> Scene:
    return Scene("white", things, Image.new("RGB", (8, 8)))


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        ("A red circle and a blue square on a white background.", True),
        ("a blue square, and a red circle", True),
        ("There is 1 blue square and one red circle.", True),
        ("A red circle on a white background.", False),
        ("A red circle, a blue square and a green star.", False),
        ("A red circle and two blue squares.", False),
        ("A blue circle and a red square on a white background.", False),
        ("A circle and a blue square.", False),
        ("A red circle and a blue square on a black background.", False),
        ('A red circle, a blue square and the word "stop" in red.', False),
    ],
)
def test_a_description_names_all_that_is_there_and_nothing_else(answer: str, is_right: bool) -> None:
    assert judge(Question("describe", "?", "", scene_of(RED, BLUE)), answer) is is_right


def test_a_written_word_is_no_thing() -> None:
    question = Question("describe", "?", "", scene_of(RED, NOTE))
    assert describe(question.facts) == 'A red circle and the word "star" in red on a white background.'
    assert judge(question, 'A red circle and the word "star" in red on a white background.')
    assert not judge(question, "A red circle and a red star on a white background.")


@pytest.mark.parametrize(
    ("kind", "facts", "right", "wrong"),
    [
        ("shape", "circle", ["A circle.", "It is a red circle"], ["A square.", "A circle or a square", ""]),
        ("colour", "gray", ["Gray.", "grey"], ["Black.", "Gray or black."]),
        ("count", 2, ["Two.", "2", "There are 2 circles."], ["Three.", "2 or 3", "many"]),
        ("count", 0, ["Zero.", "None.", "There are no circles"], ["One.", ""]),
        (
            "where",
            ({"left"}, "circle"),
            ["Left.", "The circle is to the left of the square."],
            ["The square is left of it.", "Right."],
        ),
        ("where", ({"above", "left"}, "circle"), ["Above it.", "left", "Above and left."], ["Below or above.", "below", ""]),
        ("exists", True, ["Yes.", "yes, there is"], ["No.", "Yes and no."]),
        ("relation", False, ["No."], ["Yes.", "maybe"]),
        ("read", "stop", ["stop.", 'It says "STOP".'], ["shop", "stop go", ""]),
        ("read", "", ["There is no text."], ["stop"]),
        ("place", "top left", ["On the top left.", "At the left, top"], ["On the top.", "On the bottom left."]),
        ("place", "center", ["In the middle."], ["On the left."]),
        ("beside", "red circle", ["A red circle.", "The circle."], ["A blue circle.", "A red square.", "red"]),
    ],
)
def test_the_judge_is_fair_and_strict(kind: str, facts: object, right: list[str], wrong: list[str]) -> None:
    question = Question(kind, "?", "", facts)
    assert [judge(question, answer) for answer in right] == [True] * len(right)
    assert [judge(question, answer) for answer in wrong] == [False] * len(wrong)


def test_nothing_is_asked_that_has_no_one_answer() -> None:
    two_circles = scene_of(RED, Thing("circle", "blue", 0.7, 0.5, 0.1))
    across = scene_of(RED, Thing("square", "blue", 0.6, 0.9, 0.1))
    rng = Random(1)
    assert ask(two_circles, rng, "colour") is None  # which circle?
    assert ask(across, rng, "where") is None  # left and above alike
    assert ask(scene_of(), rng, "shape") is None
    for _ in range(20):
        question = ask(two_circles, rng, "where")
        assert question is not None and ("red circle" in question.text and "blue circle" in question.text)


def test_an_exam_is_new_with_a_new_seed_and_the_same_with_the_same() -> None:
    scene, asked = exam(5, 3, KINDS)
    again, same = exam(5, 3, KINDS)
    assert scene.picture.tobytes() == again.picture.tobytes() and [q.text for q in asked] == [q.text for q in same]
    assert exam(6, 3, KINDS)[0].picture.tobytes() != scene.picture.tobytes()
    assert len({question.kind for question in asked}) == len(asked) >= 4


def test_text_is_written_where_the_system_has_no_fonts(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    monkeypatch.setenv("EYES_FONTS", str(tmp_path))
    scenes.font_paths.cache_clear()
    try:
        scene = draw_scene(Random(3), "text")
    finally:
        scenes.font_paths.cache_clear()
    assert scene.written and len(scene.picture.getcolors(1 << 20) or ()) > 2


def test_rows_hold_what_a_server_makes_of_a_chat() -> None:
    """Picture or text first: the tokens around the places are those of the chat template."""
    text = load_text_model(find_default_model())
    form = Form(num_text=60)
    script = Script(text)
    ways = set()
    for row in rows_of(form, script, "test", 30):
        start, part = int(row["start"]), row["part"]
        first = np.flatnonzero(part == (0 if start else 1))
        if not len(first):
            continue
        ids = [int(id) for id in row["ids"][first]]
        if start:
            ids = ids[:start] + ids[start + form.num_patches :]
        said = text.tokenizer.decode(ids, skip_special_tokens=False)
        user, _, rest = said.partition("<|im_end|>\n<|im_start|>assistant\n")
        answer = rest.partition("<|im_end|>")[0]
        content = f"{user}\ue000" if start else f"\ue000{user}"
        system = [] if row["system"] == 0 else [{"role": "system", "content": SYSTEMS[row["system"]]}]
        wanted = text.encode_chat([*system, {"role": "user", "content": content}])
        mark = text.tokenizer.encode("\ue000", add_special_tokens=False)
        at = next(i for i in range(len(wanted)) if wanted[i : i + len(mark)] == mark)
        head = len(script.heads[row["system"]])
        assert list(script.heads[row["system"]]) == wanted[:head]
        places = [*wanted[head:at], *wanted[at + len(mark) :]]
        assert ids[: len(places)] == places and row["position"][start] == at
        says = text.tokenizer.encode(answer)
        assert answer and ids[len(places) : len(places) + len(says)] == says
        ways.add(start > 0)
    assert ways == {True, False}


def test_the_lists_are_what_the_drawing_knows() -> None:
    assert len(set(SHAPES)) == len(SHAPES) and len(set(COLOUR_NAMES)) == len(COLOUR_NAMES)
    for shape in SHAPES:
        for number in range(3):
            canvas = scenes._Canvas(Random(number), 96, 96, "white")
            assert canvas.put(shape, "blue", 0.3)
            drawn = np.asarray(canvas.finish().picture)
            assert (drawn != drawn[0, 0]).any(-1).mean() > 0.03
