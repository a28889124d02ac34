"""The generated families: repeatable, split cleanly, right by construction, and drawn as told."""

from __future__ import annotations

import re

import numpy as np
import pytest

from arriero.errors import ArrieroError
from arriero.profiles.data import FAMILIES, IMAGE_FAMILIES, make
from arriero.profiles.data.scenes import COLOURS, PLACES, SHAPES, Thing, render


@pytest.mark.parametrize("family", FAMILIES)
def test_the_same_seed_gives_the_same_samples_and_another_does_not(family):
    first, again, other = (make(family, 5, seed) for seed in (3, 3, 4))
    for left, right in zip(first, again, strict=True):
        assert left.turns == right.turns
        assert left.prompt == right.prompt
        assert all(np.array_equal(a, b) for a, b in zip(left.images, right.images, strict=True))
    assert [(s.prompt, s.answer) for s in first] != [(s.prompt, s.answer) for s in other] or family in IMAGE_FAMILIES
    if family in IMAGE_FAMILIES:
        assert any(not np.array_equal(a.images[0], b.images[0]) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_splits_are_different_streams(family):
    trained, held_out = make(family, 20, 1, "train"), make(family, 20, 1)
    shown = [
        [(str(s.prompt), *(image.tobytes() for image in s.images)) for s in split] for split in (trained, held_out)
    ]
    assert shown[0] != shown[1]


def test_arithmetic_and_sorting_answers_are_right():
    for sample in make("arithmetic", 50, 5, "train"):
        for turn in sample.turns:
            a, sign, b = re.fullmatch(r"What is (\d+) ([+-]) (\d+)\?", turn.question).groups()
            assert int(turn.answer) == (int(a) + int(b) if sign == "+" else int(a) - int(b))
    for sample in make("sorting", 50, 5, "train"):
        for turn in sample.turns:
            digits = re.findall(r"\d", turn.question)
            assert turn.answer.split() == sorted(digits, reverse="high to low" in turn.question)


def test_recall_asks_for_a_note_that_lies_a_chunk_back():
    for sample in make("recall", 30, 6):
        lines = sample.shown[0].splitlines()
        key = re.fullmatch(r"Notes on (\w+)\?", sample.turns[0].question).group(1)
        assert [line for line in lines if line.startswith(f"{key} ")] == [sample.answer]
        after = lines[lines.index(sample.answer) :]
        # a token per word and one per line end, then at least ten of question, header and key before the value
        assert sum(len(line.split()) + 1 for line in after) + 10 > 128


def test_scenes_are_drawn_where_and_in_the_colour_they_are_told():
    for shape in SHAPES:
        for colour, rgb in COLOURS.items():
            for cell, place in enumerate(PLACES):
                thing = Thing(shape, colour, (cell % 3 + 0.5) / 3, (cell // 3 + 0.5) / 3, 0.12)
                image = render([thing], (255, 255, 255))
                rows, columns = np.nonzero(np.abs(image.astype(int) - rgb).sum(-1) < 10)
                assert thing.place == place
                assert len(rows) > 20
                assert abs(rows.mean() / 64 - thing.y) < 0.04
                assert abs(columns.mean() / 64 - thing.x) < 0.03


def test_movement_is_the_way_the_colour_centre_moves():
    for sample in make("video", 20, 8):
        frames = [image.astype(int) for image in sample.images]
        ground = frames[0][0, 0]
        centres = [np.argwhere(np.abs(f - ground).sum(-1) > 60).mean(0) for f in (frames[0], frames[-1])]
        down, right = centres[1] - centres[0]
        way = ("right" if right > 0 else "left") if abs(right) > abs(down) else "down" if down > 0 else "up"
        assert way == sample.answer


def test_an_unknown_family_is_refused():
    with pytest.raises(ArrieroError, match="no task family 'poetry'"):
        make("poetry", 1, 1)
