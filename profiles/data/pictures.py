"""Image and video families: shape, colour, count, position, description, several images, movement."""

from __future__ import annotations

from collections import Counter

import numpy as np

from arriero.profiles.data.sample import Part, Sample, Turn
from arriero.profiles.data.scenes import (
    COLOURS,
    PLACES,
    SHAPES,
    Thing,
    background,
    draw_things,
    pick_size,
    render,
)

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
MOVES = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
FRAMES = 4


def questions(kind: str, things: list[Thing], rng: np.random.Generator) -> list[Turn]:
    """Every unambiguous question of a kind (shape, colour, count, position) about a scene, shuffled."""
    shapes = Counter(thing.shape for thing in things)
    colours = Counter(thing.colour for thing in things)
    names = Counter(thing.name for thing in things)
    turns: list[Turn] = []
    if kind == "shape":
        turns = [Turn(f"What shape is {t.colour}?", t.shape) for t in things if colours[t.colour] == 1]
    elif kind == "colour":
        turns = [Turn(f"What colour is the {t.shape}?", t.colour) for t in things if shapes[t.shape] == 1]
    elif kind == "position":
        turns = [Turn(f"Where is the {t.name}?", t.place) for t in things if names[t.name] == 1]
    elif kind == "count":
        turns = [Turn("How many shapes are there?", NUMBERS[len(things)])]
        turns += [Turn(f"How many shapes are {c}?", NUMBERS[colours[c]]) for c in [str(rng.choice(list(COLOURS)))]]
        turns += [Turn(f"How many are a {s}?", NUMBERS[shapes[s]]) for s in [str(rng.choice(SHAPES))]]
    return [turns[int(index)] for index in rng.permutation(len(turns))]


def about_scene(kind: str, rng: np.random.Generator, train: bool) -> Sample:
    """One image of up to five things; training asks several kinds of questions about it."""
    while True:
        things = draw_things(rng, int(rng.integers(1, 6)), repeat=kind == "count" or rng.random() < 0.5)
        turns = questions(kind, things, rng)[:2]
        if train:
            others = [other for other in ("shape", "colour", "position", "count") if other != kind]
            turns += [turn for other in others for turn in questions(other, things, rng)[:2]]
        if turns and questions(kind, things, rng):
            return Sample(kind, (render(things, background(rng), *pick_size(rng)),), tuple(turns))


def shape(rng: np.random.Generator, train: bool) -> Sample:
    """What shape is the thing of this colour."""
    return about_scene("shape", rng, train)


def colour(rng: np.random.Generator, train: bool) -> Sample:
    """What colour is the thing of this shape."""
    return about_scene("colour", rng, train)


def count(rng: np.random.Generator, train: bool) -> Sample:
    """How many things, of all, of a colour, of a shape."""
    return about_scene("count", rng, train)


def position(rng: np.random.Generator, train: bool) -> Sample:
    """Where a named thing is, on a three-by-three layout."""
    return about_scene("position", rng, train)


def describe(rng: np.random.Generator, train: bool) -> Sample:
    """A sentence naming one to three things and their places in reading order."""
    things = draw_things(rng, int(rng.integers(1, 4)))
    description = " and ".join(f"a {thing.name} at the {thing.place}" for thing in things)
    picture = render(things, background(rng), *pick_size(rng))
    return Sample("describe", (picture,), (Turn("Describe the image.", description + "."),))


def several(rng: np.random.Generator, train: bool) -> Sample:
    """Two to four images of one thing each: what is in the n-th, and which one shows a given thing."""
    total = int(rng.integers(2, 5))
    things = [draw_things(rng, 1)[0] for _ in range(total)]
    shown: list[Part] = []
    for number, thing in enumerate(things, 1):
        shown += [f"Image {number}: ", render([thing], background(rng)), "\n"]
    turns = [Turn(f"What is in image {n}?", f"a {thing.name}") for n, thing in enumerate(things, 1)]
    names = Counter(thing.name for thing in things)
    turns += [Turn(f"Which image shows a {t.name}?", str(n)) for n, t in enumerate(things, 1) if names[t.name] == 1]
    return Sample("several", tuple(shown), tuple(turns[int(i)] for i in rng.permutation(len(turns)))[:5])


def video(rng: np.random.Generator, train: bool) -> Sample:
    """Four frames of one moving thing: which way does it move."""
    way = str(rng.choice(list(MOVES)))
    dx, dy = MOVES[way]
    thing = draw_things(rng, 1)[0]
    start, end = rng.uniform(0.15, 0.4), rng.uniform(0.6, 0.85)
    across = rng.uniform(0.2, 0.8)
    ground = background(rng)
    frames: list[Part] = []
    for step in np.linspace(start, end, FRAMES):
        x = step if dx > 0 else 1 - step if dx < 0 else across
        y = step if dy > 0 else 1 - step if dy < 0 else across
        frames.append(render([Thing(thing.shape, thing.colour, float(x), float(y), thing.radius)], ground))
    return Sample(
        "video", tuple(frames), (Turn("Which way does it move?", way), Turn("What moves?", f"a {thing.name}"))
    )


__all__ = ["PLACES", "colour", "count", "describe", "position", "several", "shape", "video"]
