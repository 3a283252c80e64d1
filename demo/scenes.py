"""Scenes to learn seeing from: shapes, digits and words on plain ground, with questions about them and true answers.

Everything follows from a random number generator: the same seed draws the same scenes, as long as the fonts are the same. Owns
what a scene is, how it is drawn, and what may be asked of it; nothing here knows a model. evaluate_eyes.py judges answers,
train_eyes.py learns from them.

A question is only asked where it has one answer: "the circle" where there is one, "left of" where it plainly is.
"""

import colorsys
import glob
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from random import Random
from typing import Any

from PIL import Image, ImageDraw, ImageFont

# Hue in degrees, saturation and value: from, to. No two overlap, and each is what people would agree to call so.
COLOURS: dict[str, tuple[tuple[float, float], tuple[float, float], tuple[float, float]]] = {
    "red": ((-6, 6), (0.82, 1.0), (0.80, 1.0)),
    "orange": ((23, 40), (0.85, 1.0), (0.92, 1.0)),
    "yellow": ((50, 61), (0.75, 1.0), (0.92, 1.0)),
    "green": ((88, 150), (0.6, 1.0), (0.42, 1.0)),
    "cyan": ((174, 190), (0.65, 1.0), (0.85, 1.0)),
    "blue": ((206, 244), (0.7, 1.0), (0.5, 1.0)),
    "purple": ((266, 303), (0.55, 1.0), (0.42, 0.82)),
    "pink": ((320, 352), (0.22, 0.62), (0.93, 1.0)),
    "brown": ((0, 30), (0.6, 0.9), (0.35, 0.62)),
    "black": ((0, 360), (0.0, 0.2), (0.0, 0.1)),
    "gray": ((0, 360), (0.0, 0.05), (0.42, 0.68)),
    "white": ((0, 360), (0.0, 0.03), (0.96, 1.0)),
}
SHAPES = ("circle", "oval", "square", "rectangle", "triangle", "diamond", "star", "heart", "cross", "ring")
_WORD_LIST = """
red blue go stop yes no hi hello cat dog fish bird cow pig tree sun moon star sky sea car bus boat bike home door key book
cup tea milk egg cake apple ball hat shoe open exit up down left right on off hot cold new old big love time day night work
play eat run sale free help one two taxi bank hotel fire ice snow rain king queen zoo map box
"""
WORDS = tuple(_WORD_LIST.split())
NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
MAX_THINGS = 6
CLEAR = 0.13  # share of the picture from which on something is left of (right of, above, below) something else

# How the scenes of a lesson come: what is drawn, and how often.
PLANS = (("few", 0.36), ("many", 0.23), ("pair", 0.27), ("text", 0.14))
COLOUR_NAMES = tuple(COLOURS)


@dataclass(frozen=True, slots=True)
class Thing:
    """A shape, or something written (`text`). Place and size as shares of the picture: the centre, and the radius of the circle
    around it as a share of the shorter side."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float
    text: str = ""

    @property
    def name(self) -> str:
        """Without an article."""
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True, slots=True)
class Scene:
    """What is in a picture, and the picture."""

    background: str
    things: tuple[Thing, ...]
    picture: Image.Image = field(repr=False)

    @property
    def shapes(self) -> list[Thing]:
        return [thing for thing in self.things if not thing.text]

    @property
    def written(self) -> list[Thing]:
        return [thing for thing in self.things if thing.text]


@dataclass(frozen=True, slots=True)
class Question:
    """`kind`: see KINDS. `facts`: what the answer must say, for a judge that reads other wordings too."""

    kind: str
    text: str
    answer: str
    facts: Any = None


KINDS = ("describe", "shape", "colour", "count", "where", "relation", "exists", "read", "background", "place", "beside")


def draw_scene(rng: Random, plan: str | None = None) -> Scene:
    """A scene of a plan; of any if there is none."""
    if plan is None:
        plan = rng.choices([name for name, _ in PLANS], [share for _, share in PLANS])[0]
    short = rng.choice((160, 192, 224, 256, 320, 384))
    ratio = rng.choice((1.0, 1.0, 1.0, rng.uniform(0.78, 1.28)))
    width, height = (short, round(short / ratio)) if ratio < 1 else (round(short * ratio), short)
    background = rng.choices(("white", "black", "gray", rng.choice(COLOUR_NAMES)), (0.5, 0.1, 0.08, 0.32))[0]
    canvas = _Canvas(rng, width, height, background)
    if plan == "text":
        canvas.write()
        for _ in range(rng.choice((0, 0, 0, 1, 1, 2))):
            canvas.put(rng.choice(SHAPES), canvas.colour(), rng.uniform(0.07, 0.16))
    elif plan == "many":
        shape, colour = rng.choice(SHAPES), canvas.colour()
        same_colour, same_shape = rng.random() < 0.6, rng.random() < 0.85
        size = rng.uniform(0.07, 0.15)
        for _ in range(rng.choice((1, 2, 2, 3, 3, 4, 4, 5))):
            canvas.put(
                shape if same_shape else rng.choice(SHAPES),
                colour if same_colour else canvas.colour(),
                size * rng.uniform(0.85, 1.2),
            )
        for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
            other = shape if rng.random() < 0.35 else rng.choice(SHAPES)
            canvas.put(other, colour if rng.random() < 0.2 else canvas.colour(), size * rng.uniform(0.85, 1.2))
    elif plan == "pair":
        canvas.pair()
    else:
        count = rng.choice((1, 1, 2, 2, 2, 3, 3, 4))
        top = (0, 0.4, 0.24, 0.2, 0.17)[count]
        for _ in range(count):
            canvas.put(rng.choice(SHAPES), canvas.colour(), rng.uniform(max(0.08, top * 0.45), top))
    return canvas.finish()


def eye_view(picture: Image.Image, size: int) -> Image.Image:
    """The picture as the encoder gets it: squeezed into a square, as its image processor does."""
    return picture.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)


# --- drawing


def _rgb(rng: Random, name: str) -> tuple[int, int, int]:
    hue, saturation, value = (rng.uniform(*bounds) for bounds in COLOURS[name])
    if rng.random() < 0.3:  # the plain ones of paint programs
        plain = {"red": (0, 1, 1), "green": (120, 1, rng.choice((0.5, 1))), "blue": (240, 1, 1), "yellow": (60, 1, 1)}
        hue, saturation, value = plain.get(name, (hue, saturation, value))
        value = {"black": 0.0, "white": 1.0}.get(name, value)
        saturation = 0.0 if name in ("black", "white", "gray") else saturation
    red, green, blue = colorsys.hsv_to_rgb(hue % 360 / 360, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


class _Canvas:
    """A scene in the making. Coordinates are pixels."""

    def __init__(self, rng: Random, width: int, height: int, background: str) -> None:
        self._rng = rng
        self._background = background
        self._ground = _rgb(rng, background)
        self._image = Image.new("RGB", (width, height), self._ground)
        self._draw = ImageDraw.Draw(self._image)
        self._short = min(width, height)
        self._outlines = rng.choice((0.0, 0.0, 0.0, 1.0, 0.5))
        self._things: list[Thing] = []
        self._taken: list[tuple[float, float, float]] = []

    def colour(self) -> str:
        """One that shows on this ground."""
        pale = {"white": ("white",), "gray": ("gray",), "pink": ("pink", "white"), "brown": ("brown",), "black": ("black",)}
        hidden = {*pale.get(self._background, (self._background,))}
        return self._rng.choice([name for name in COLOUR_NAMES if name not in hidden])

    def put(self, shape: str, colour: str, radius: float, at: tuple[float, float] | None = None) -> bool:
        """A shape at a place (in shares of the picture) or wherever there is room; False: there is none."""
        r = radius * self._short
        place = self._room(r, r) if at is None else self._fits(at[0] * self._image.width, at[1] * self._image.height, r, r)
        if place is None or len(self._things) == MAX_THINGS:
            return False
        x, y = place
        fill = _rgb(self._rng, colour)
        line = None
        if self._rng.random() < self._outlines:
            line = (0, 0, 0) if sum(fill) > 200 and self._rng.random() < 0.6 else (fill[0] // 2, fill[1] // 2, fill[2] // 2)
        _draw_shape(self._draw, self._rng, shape, x, y, r, fill, line, self._ground)
        self._add(Thing(shape, colour, x / self._image.width, y / self._image.height, radius), r, r)
        return True

    def pair(self) -> None:
        """Two or three things that plainly stand beside or above each other."""
        rng = self._rng
        along, across = rng.uniform(0.12, 0.3), rng.uniform(0.2, 0.8)
        places = [(along, across), (1 - along + rng.uniform(-0.1, 0.05), across + rng.uniform(-0.15, 0.15))]
        rng.shuffle(places)
        if rng.random() < 0.5:
            places = [(y, x) for x, y in places]
        for at in places:
            at = min(0.86, max(0.14, at[0])), min(0.86, max(0.14, at[1]))
            self.put(rng.choice(SHAPES), self.colour(), rng.uniform(0.08, 0.14), at)
        if rng.random() < 0.35:
            self.put(rng.choice(SHAPES), self.colour(), rng.uniform(0.08, 0.14))

    def write(self) -> None:
        """A number or a word."""
        rng = self._rng
        if rng.random() < 0.5:
            text = str(rng.randrange(10)) if rng.random() < 0.7 else str(rng.randrange(10, 100))
        else:
            text = rng.choice(WORDS)
            text = rng.choice((text, text.upper(), text.capitalize()))
        size = round(self._short * rng.uniform(0.22, 0.6))
        path = rng.choice(font_paths())
        while True:
            font = _font(path, size)
            left, top, right, bottom = font.getbbox(text)
            if right - left < self._image.width * 0.86 and bottom - top < self._image.height * 0.6:
                break
            size = round(size * 0.85)
        half_x, half_y = (right - left) / 2, (bottom - top) / 2
        place = self._room(half_x, half_y)
        if place is None:
            return
        colour = self.colour()
        x, y = place
        self._draw.text((x - half_x - left, y - half_y - top), text, font=font, fill=_rgb(rng, colour))
        thing = Thing("text", colour, x / self._image.width, y / self._image.height, half_y / self._short, text.lower())
        self._add(thing, half_x, half_y)

    def finish(self) -> Scene:
        return Scene(self._background, tuple(self._things), self._image)

    def _add(self, thing: Thing, half_x: float, half_y: float) -> None:
        self._things.append(thing)
        self._taken.append((thing.x * self._image.width, thing.y * self._image.height, max(half_x, half_y)))

    def _room(self, half_x: float, half_y: float) -> tuple[float, float] | None:
        width, height = self._image.size
        for _ in range(40):
            x = self._rng.uniform(half_x + 2, max(half_x + 2, width - half_x - 2))
            y = self._rng.uniform(half_y + 2, max(half_y + 2, height - half_y - 2))
            if self._fits(x, y, half_x, half_y):
                return x, y
        return None

    def _fits(self, x: float, y: float, half_x: float, half_y: float) -> tuple[float, float] | None:
        size = max(half_x, half_y)
        gap = 0.02 * self._short
        clear = all(math.hypot(x - x1, y - y1) > size + size1 + gap for x1, y1, size1 in self._taken)
        return (x, y) if clear else None


def _draw_shape(
    draw: ImageDraw.ImageDraw,
    rng: Random,
    shape: str,
    x: float,
    y: float,
    r: float,
    fill: tuple[int, int, int],
    line: tuple[int, int, int] | None,
    ground: tuple[int, int, int],
) -> None:
    """Inside the circle of radius r around (x, y)."""
    width = max(1, round(r * rng.uniform(0.04, 0.1))) if line else 0
    if shape in ("circle", "ring"):
        r *= 0.92
        draw.ellipse((x - r, y - r, x + r, y + r), fill=fill, outline=line, width=width)
        if shape == "ring":
            hole = r * rng.uniform(0.45, 0.7)
            draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=ground, outline=line, width=width)
        return
    if shape == "oval":
        long, thin = r, r / rng.uniform(1.7, 2.2)
        half_x, half_y = (long, thin) if rng.random() < 0.6 else (thin, long)
        draw.ellipse((x - half_x, y - half_y, x + half_x, y + half_y), fill=fill, outline=line, width=width)
        return
    points = [(x + r * px, y + r * py) for px, py in _outline(rng, shape)]
    draw.polygon(points, fill=fill)
    if line:
        draw.line([*points, points[0], points[1]], fill=line, width=width, joint="curve")


def _outline(rng: Random, shape: str) -> list[tuple[float, float]]:
    """Corners inside the unit circle; y grows downwards."""
    turn = 0.0
    if shape == "square":
        side = 0.707
        corners = [(-side, -side), (side, -side), (side, side), (-side, side)]
        turn = rng.choice((0.0, rng.uniform(-10, 10)))
    elif shape == "rectangle":
        ratio = rng.uniform(1.7, 2.4)
        half_y = 1 / math.hypot(1, ratio)
        half_x = ratio * half_y
        corners = [(-half_x, -half_y), (half_x, -half_y), (half_x, half_y), (-half_x, half_y)]
        turn = rng.choice((0.0, 0.0, 90.0, 90.0, rng.uniform(-12, 12)))
    elif shape == "triangle":
        corners = [(math.sin(a), -math.cos(a)) for a in (0, 2 * math.pi / 3, 4 * math.pi / 3)]
        if rng.random() < 0.3:
            corners = [(0.0, -0.9), (0.8, 0.6), (-0.8, 0.6)]
        turn = rng.choice((0.0, 0.0, rng.uniform(-20, 20), rng.uniform(0, 360)))
    elif shape == "diamond":
        half_x = rng.uniform(0.62, 1.0)
        corners = [(0, -1), (half_x, 0), (0, 1), (-half_x, 0)]
    elif shape == "star":
        inner = rng.uniform(0.38, 0.5)
        corners = [
            (math.sin(k * math.pi / 5) * (inner if k % 2 else 1), -math.cos(k * math.pi / 5) * (inner if k % 2 else 1))
            for k in range(10)
        ]
        turn = rng.choice((0.0, 0.0, rng.uniform(0, 72)))
    elif shape == "cross":
        arm, thick = 0.95, rng.uniform(0.22, 0.36)
        corners = [
            (-thick, -arm), (thick, -arm), (thick, -thick), (arm, -thick), (arm, thick), (thick, thick),
            (thick, arm), (-thick, arm), (-thick, thick), (-arm, thick), (-arm, -thick), (-thick, -thick),
        ]  # fmt: skip
        turn = rng.choice((0.0, 0.0, 0.0, rng.uniform(-12, 12), 45.0))
    else:
        assert shape == "heart", shape
        corners = []
        for step in range(28):
            a = 2 * math.pi * step / 28
            px = 16 * math.sin(a) ** 3
            py = -(13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a))
            corners.append((px / 17.5, (py - 2.5) / 17.5))
        turn = rng.choice((0.0, 0.0, rng.uniform(-15, 15)))
    sin, cos = math.sin(math.radians(turn)), math.cos(math.radians(turn))
    return [(px * cos - py * sin, px * sin + py * cos) for px, py in corners]


@lru_cache(maxsize=1)
def font_paths() -> tuple[str, ...]:
    """Upright fonts of the system; an empty name stands for Pillow's own where there are none. EYES_FONTS names a folder to take
    instead."""
    folders = (
        [os.environ["EYES_FONTS"]] if "EYES_FONTS" in os.environ else ["/usr/share/fonts", "/Library/Fonts", "C:/Windows/Fonts"]
    )
    wanted = (
        "DejaVuSans",
        "DejaVuSerif",
        "DejaVuSansMono",
        "LiberationSans-",
        "LiberationSerif-",
        "LiberationMono-",
        "arial",
        "Arial",
    )
    found = sorted(path for folder in folders for path in glob.glob(f"{folder}/**/*.ttf", recursive=True))
    chosen = [
        path
        for path in found
        if os.path.basename(path).startswith(wanted) and not any(word in path for word in ("Italic", "Oblique", "ExtraLight"))
    ]
    return (*chosen, "")


@lru_cache(maxsize=512)
def _font(path: str, size: int) -> Any:
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)


# --- questions


def article(name: str) -> str:
    """A name with "a" or "an"."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(name: str) -> str:
    """Of a shape."""
    return f"{name}es" if name.endswith("s") else f"{name}s"


def _sentence(words: str) -> str:
    return f"{words[0].upper()}{words[1:]}."


def joined(parts: Sequence[str]) -> str:
    """Parts of an enumeration."""
    return " and ".join(parts) if len(parts) < 3 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def describe(scene: Scene) -> str:
    """Everything that is there, in an order that depends on nothing but what is there."""
    counts = Counter((thing.shape, thing.colour) for thing in scene.shapes)
    parts = []
    for shape, colour in sorted(counts, key=lambda key: (SHAPES.index(key[0]), COLOUR_NAMES.index(key[1]))):
        count = counts[shape, colour]
        parts.append(article(f"{colour} {shape}") if count == 1 else f"{NUMBERS[count]} {colour} {plural(shape)}")
    for thing in scene.written:
        what = "number" if thing.text.isdigit() else "word"
        parts.append(f'the {what} "{thing.text}" in {thing.colour}')
    return _sentence(f"{joined(parts) if parts else 'nothing'} on {article(scene.background)} background")


def questions(scene: Scene, rng: Random) -> Iterator[Question]:
    """One after the other without end, of kinds that suit the scene."""
    weights: dict[Any, float] = {_describe: 3, _background: 1, _exists: 2, _count: 4}
    if scene.shapes:
        weights |= {_shape: 1.5, _colour: 1.5, _place: 1.5}
    if len(scene.shapes) > 1:
        weights |= {_where: 5, _relation: 3.5, _beside: 0.7}
    if scene.written:
        weights |= {_read: 6}
    elif rng.random() < 0.2:
        weights |= {_read: 1}
    makers, shares = list(weights), list(weights.values())
    while True:
        question = rng.choices(makers, shares)[0](scene, rng)
        if question is not None:
            yield question


def ask(scene: Scene, rng: Random, kind: str) -> Question | None:
    """A question of one kind, if the scene has an answer to one."""
    maker = dict(zip(KINDS, _MAKERS, strict=True))[kind]
    for _ in range(12):
        if (question := maker(scene, rng)) is not None:
            return question
    return None


def _pick(rng: Random, *wordings: str) -> str:
    """One of the wordings, as people vary them."""
    text = rng.choice(wordings)
    if "picture" in text:
        text = text.replace("picture", rng.choice(("picture", "picture", "image", "image", "scene")))
    if "color" in text and rng.random() < 0.4:
        text = text.replace("color", "colour")
    if rng.random() < 0.06:
        text = text.lower()
    if rng.random() < 0.06:
        text = text.rstrip("?.")
    return text


def _describe(scene: Scene, rng: Random) -> Question:
    text = _pick(
        rng,
        "What is in this picture?", "What is in this picture?", "What's in this picture?", "What is in the picture?",
        "What do you see?", "What can you see in this picture?", "Describe this picture.", "Describe the picture.",
        "What does this picture show?", "What is shown in the picture?", "What do you see in this picture?",
        "Tell me what is in this picture.", "Which things are in this picture?", "What objects are in the picture?",
        "Please describe what you see.", "What is this?", "What are the shapes in this picture?",
        "Describe this picture in one sentence.", "What's this?", "Can you describe this picture?",
    )  # fmt: skip
    return Question("describe", text, describe(scene), scene)


def _unique(scene: Scene, rng: Random, by: str) -> Thing | None:
    """A shape that is the only one of its colour (or shape)."""
    counts = Counter(getattr(thing, by) for thing in scene.shapes)
    alone = [thing for thing in scene.shapes if counts[getattr(thing, by)] == 1]
    return rng.choice(alone) if alone else None


def _reference(scene: Scene, rng: Random, thing: Thing) -> str | None:
    """A name that only this thing goes by, without the article."""
    if sum(other.name == thing.name for other in scene.shapes) != 1:
        return None
    if rng.random() < 0.3 and sum(other.shape == thing.shape for other in scene.shapes) == 1:
        return thing.shape
    return thing.name


def _shape(scene: Scene, rng: Random) -> Question | None:
    if (thing := _unique(scene, rng, "colour")) is None:
        return None
    c = thing.colour
    wordings = [
        f"What shape is the {c} object?", f"Which shape is {c}?", f"What shape is {c}?", f"What is the {c} shape?",
        f"What is the {c} thing?", f"What shape is the {c} one?", f"What shape does the {c} object have?",
    ]  # fmt: skip
    if len(scene.things) == 1:
        wordings += [
            "What shape is this?",
            "What shape is in this picture?",
            "Which shape is in this picture?",
            "Which shape is it?",
        ]
    return Question("shape", _pick(rng, *wordings), _sentence(article(thing.shape)), thing.shape)


def _colour(scene: Scene, rng: Random) -> Question | None:
    if (thing := _unique(scene, rng, "shape")) is None:
        return None
    s = thing.shape
    wordings = [
        f"What color is the {s}?", f"What color is the {s}?", f"What is the color of the {s}?",
        f"Which color does the {s} have?", f"Which color is the {s}?",
    ]  # fmt: skip
    if len(scene.things) == 1:
        wordings += ["What color is the shape?", "What color is the object in this picture?", "What color is it?"]
    return Question("colour", _pick(rng, *wordings), _sentence(thing.colour), thing.colour)


def _count(scene: Scene, rng: Random) -> Question | None:
    shapes = scene.shapes
    way = rng.random()
    thing = rng.choice(shapes) if shapes else None
    colour = thing.colour if thing and rng.random() < 0.85 else rng.choice(COLOUR_NAMES)
    shape = thing.shape if thing and rng.random() < 0.85 else rng.choice(SHAPES)
    if way < 0.2:
        count, noun = len(shapes), "shapes" if scene.written else rng.choice(("shapes", "shapes", "objects", "things"))
    elif way < 0.5:
        count, noun = sum(t.shape == shape for t in shapes), plural(shape)
    elif way < 0.75:
        count = sum(t.colour == colour for t in shapes)
        noun = f"{colour} {'shapes' if scene.written else rng.choice(('shapes', 'objects'))}"
    else:
        count = sum(t.colour == colour and t.shape == shape for t in shapes)
        noun = f"{colour} {plural(shape)}"
    if count < 2 and rng.random() < 0.55:  # most things are alone
        return None
    text = _pick(
        rng,
        f"How many {noun} are there?", f"How many {noun} are there?", f"How many {noun} are in this picture?",
        f"How many {noun} do you see?", f"How many {noun} are in the picture?", f"Count the {noun}.",
        f"What is the number of {noun}?", f"How many {noun} can you see?", f"How many {noun}?",
    )  # fmt: skip
    return Question("count", text, _sentence(NUMBERS[count]), count)


_SIDES = {"left": "to the left of", "right": "to the right of", "above": "above", "below": "below"}


def _distances(first: Thing, second: Thing) -> dict[str, float]:
    """How far the first lies on each side of the second."""
    dx, dy = first.x - second.x, first.y - second.y
    return {"left": -dx, "right": dx, "above": -dy, "below": dy}


def _side(first: Thing, second: Thing) -> str | None:
    """Where the first is, seen from the second, where one side is the plain one."""
    near, far = sorted(abs(distance) for distance in _distances(first, second).values())[1::2]
    if far < 0.16 or near > 0.6 * far:
        return None
    return max(_distances(first, second).items(), key=lambda side: side[1])[0]


def _two(scene: Scene, rng: Random) -> tuple[Thing, Thing, str, str] | None:
    """Two shapes that can be told apart, and names of them."""
    if len(scene.shapes) < 2:
        return None
    first, second = rng.sample(scene.shapes, 2)
    one, two = _reference(scene, rng, first), _reference(scene, rng, second)
    return None if one is None or two is None else (first, second, one, two)


def _where(scene: Scene, rng: Random) -> Question | None:
    if (pair := _two(scene, rng)) is None or (side := _side(*pair[:2])) is None:
        return None
    first, second, one, two = pair
    text = _pick(
        rng,
        f"Where is the {one} relative to the {two}?", f"Where is the {one} relative to the {two}?",
        f"Where is the {one} in relation to the {two}?", f"Where is the {one} compared to the {two}?",
        f"On which side of the {two} is the {one}?", f"Where is the {one}, seen from the {two}?",
        f"What is the position of the {one} relative to the {two}?",
        f"Is the {one} left of, right of, above or below the {two}?",
    )  # fmt: skip
    true = {name for name, distance in _distances(first, second).items() if distance >= CLEAR}
    return Question("where", text, f"The {one} is {_SIDES[side]} the {two}.", (true, one))


def _relation(scene: Scene, rng: Random) -> Question | None:
    if (pair := _two(scene, rng)) is None:
        return None
    first, second, one, two = pair
    way = rng.choice(tuple(_SIDES))
    distance = _distances(first, second)[way]
    if abs(distance) < CLEAR:
        return None
    words = {
        "left": ("to the left of", "left of", "on the left of"),
        "right": ("to the right of", "right of", "on the right of"),
        "above": ("above", "above", "over"),
        "below": ("below", "below", "under"),
    }
    text = _pick(rng, f"Is the {one} {rng.choice(words[way])} the {two}?")
    return Question("relation", text, "Yes." if distance > 0 else "No.", distance > 0)


def _beside(scene: Scene, rng: Random) -> Question | None:
    if not scene.shapes or len(scene.shapes) > 3 or len(scene.shapes) < 2:
        return None
    second = rng.choice(scene.shapes)
    two = _reference(scene, rng, second)
    side = rng.choice(tuple(_SIDES))
    others = [thing for thing in scene.shapes if thing is not second]
    there = [thing for thing in others if _side(thing, second) == side]
    unclear = [thing for thing in others if _side(thing, second) is None]
    if two is None or len(there) != 1 or unclear:
        return None
    text = _pick(rng, f"What is {_SIDES[side]} the {two}?", f"Which shape is {_SIDES[side]} the {two}?")
    return Question("beside", text, _sentence(article(there[0].name)), there[0].name)


def _exists(scene: Scene, rng: Random) -> Question:
    shapes = scene.shapes
    wants = rng.random() < 0.5
    thing = rng.choice(shapes) if shapes else None
    way = rng.random()
    if way < 0.3:
        shape = thing.shape if wants and thing else rng.choice(SHAPES)
        what, holds = shape, any(t.shape == shape for t in shapes)
    elif way < 0.5:
        colour = thing.colour if wants and thing else rng.choice(COLOUR_NAMES)
        what, holds = (
            f"{colour} {rng.choice(('shape', 'object')) if not scene.written else 'shape'}",
            any(t.colour == colour for t in shapes),
        )
    else:
        colour, shape = (thing.colour, thing.shape) if wants and thing else (rng.choice(COLOUR_NAMES), rng.choice(SHAPES))
        if not wants and thing and rng.random() < 0.8:  # half right
            colour, shape = (thing.colour, shape) if rng.random() < 0.5 else (colour, rng.choice(shapes).shape)
        what, holds = f"{colour} {shape}", any(t.name == f"{colour} {shape}" for t in shapes)
    text = _pick(
        rng,
        f"Is there {article(what)}?", f"Is there {article(what)} in this picture?", f"Is there {article(what)} in the picture?",
        f"Do you see {article(what)}?", f"Can you see {article(what)}?", f"Does the picture show {article(what)}?",
    )  # fmt: skip
    return Question("exists", text, "Yes." if holds else "No.", holds)


def _read(scene: Scene, rng: Random) -> Question | None:
    if not scene.written:
        text = _pick(
            rng, "What does it say?", "Which word is in this picture?", "What is written in this picture?", "Read the text."
        )
        return Question("read", text, "There is no text.", "")
    thing = scene.written[0]
    wordings = [
        "What does it say?",
        "What is written in this picture?",
        "What is written there?",
        "Read the text.",
        "What does the text say?",
    ]
    if thing.text.isdigit():
        wordings += [
            "Which number is in this picture?",
            "What number is this?",
            "What number is in the picture?",
            "Which number is it?",
        ]
        if len(thing.text) == 1:
            wordings += ["Which digit is this?", "What digit is in this picture?"]
    else:
        wordings += [
            "Which word is in this picture?",
            "What word is this?",
            "What is the word?",
            "Which word is written in the picture?",
        ]
    return Question("read", _pick(rng, *wordings), f"{thing.text}.", thing.text)


def _background(scene: Scene, rng: Random) -> Question:
    text = _pick(
        rng,
        "What color is the background?", "What is the background color?", "Which color is the background?",
        "What is the color of the background?", "What color is behind the shapes?",
    )  # fmt: skip
    return Question("background", text, _sentence(scene.background), scene.background)


def _place(scene: Scene, rng: Random) -> Question | None:
    thing = rng.choice(scene.shapes) if scene.shapes else None
    if thing is None or (one := _reference(scene, rng, thing)) is None:
        return None
    where = []
    for at, low, high in ((thing.y, "top", "bottom"), (thing.x, "left", "right")):
        if 0.36 < at < 0.42 or 0.58 < at < 0.64:
            return None
        where.append(low if at <= 0.36 else high if at >= 0.64 else "")
    name = " ".join(word for word in where if word) or "center"
    text = _pick(
        rng, f"Where is the {one}?", f"Where in the picture is the {one}?", f"In which part of the picture is the {one}?"
    )
    answer = f"In the {name}." if name == "center" else f"At the {name}." if name in ("top", "bottom") else f"On the {name}."
    return Question("place", text, answer, name)


_MAKERS = (_describe, _shape, _colour, _count, _where, _relation, _exists, _read, _background, _place, _beside)
