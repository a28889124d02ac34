"""Scenes of coloured shapes on a three-by-three layout, and their rendering with Pillow."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "cross", "diamond")
COLOURS = {
    "red": (214, 40, 40),
    "green": (44, 160, 60),
    "blue": (40, 80, 210),
    "yellow": (240, 210, 40),
    "purple": (140, 50, 170),
    "orange": (245, 130, 20),
}
PLACES = ("top left", "top", "top right", "left", "centre", "right", "bottom left", "bottom", "bottom right")
TILE = 64
OVERSAMPLING = 4
SIZES = ((1, 1), (1, 2), (2, 1), (2, 2))  # in tiles, (rows, columns)


@dataclass(frozen=True)
class Thing:
    """One object: a shape of a colour, its centre and half width as fractions of the image side."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        """Colour and shape, as questions say it."""
        return f"{self.colour} {self.shape}"

    @property
    def place(self) -> str:
        """The cell of the three-by-three layout in which the centre lies."""
        return PLACES[min(int(self.y * 3), 2) * 3 + min(int(self.x * 3), 2)]


def draw_things(rng: np.random.Generator, count: int, repeat: bool = True) -> list[Thing]:
    """`count` things in different cells, in reading order; without `repeat`, no shape and no colour comes twice."""
    cells = sorted(int(cell) for cell in rng.permutation(9)[:count])
    shapes = rng.choice(SHAPES, count, replace=repeat)
    colours = rng.choice(list(COLOURS), count, replace=repeat)
    return [
        Thing(
            str(shape),
            str(colour),
            (cell % 3 + 0.5 + rng.uniform(-0.12, 0.12)) / 3,
            (cell // 3 + 0.5 + rng.uniform(-0.12, 0.12)) / 3,
            rng.uniform(0.105, 0.15),
        )
        for cell, shape, colour in zip(cells, shapes, colours, strict=True)
    ]


def background(rng: np.random.Generator) -> tuple[int, int, int]:
    """A light or a dark grey."""
    level = int(rng.integers(215, 256) if rng.random() < 0.6 else rng.integers(0, 40))
    return (level, level, level)


def pick_size(rng: np.random.Generator) -> tuple[int, int]:
    """Height and width in pixels: one tile mostly, sometimes two or four."""
    rows, columns = SIZES[int(rng.choice(len(SIZES), p=[0.85, 0.05, 0.05, 0.05]))]
    return rows * TILE, columns * TILE


def render(things: list[Thing], ground: tuple[int, int, int], height: int = TILE, width: int = TILE) -> np.ndarray:
    """The scene as a uint8 image [height, width, 3], anti-aliased by oversampling."""
    canvas = Image.new("RGB", (width * OVERSAMPLING, height * OVERSAMPLING), ground)
    pen = ImageDraw.Draw(canvas)
    side = min(canvas.size)
    for thing in things:
        draw_thing(pen, thing, thing.x * canvas.width, thing.y * canvas.height, thing.radius * side)
    return np.asarray(canvas.reduce(OVERSAMPLING))


def draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, x: float, y: float, r: float) -> None:
    """Put one thing on the canvas, centre (x, y) and half width r in canvas pixels."""
    colour = COLOURS[thing.colour]
    if thing.shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), colour)
    elif thing.shape == "square":
        pen.rectangle((x - 0.85 * r, y - 0.85 * r, x + 0.85 * r, y + 0.85 * r), colour)
    elif thing.shape == "triangle":
        pen.polygon([(x, y - r), (x - r, y + 0.8 * r), (x + r, y + 0.8 * r)], colour)
    elif thing.shape == "cross":
        arm = 0.32 * r
        pen.rectangle((x - arm, y - r, x + arm, y + r), colour)
        pen.rectangle((x - r, y - arm, x + r, y + arm), colour)
    else:
        pen.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], colour)
