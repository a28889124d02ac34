"""Sizes in text, what is free on disk, and refusals by how much."""

import re

import pytest

from arriero.errors import ArrieroError, MachineLacks
from arriero.export.machine.budget import (
    check_budget,
    free_disk,
)
from arriero.sizes import human_bytes, parse_bytes

GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GiB", 8 * GIB),
        ("8 gib", 8 * GIB),
        ("2 GB", 2 * 10**9),
        ("1.5MiB", 3 << 19),
        ("3TB", 3 * 10**12),
        ("2000000", 2_000_000),
        (1 << 20, 1 << 20),
        ("2097152B", 2 << 20),
    ],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "8G", "-8GiB", "8GiBs", "8,5GiB", "1e9", True, "0x10", "8 Gi B"])
def test_no_sizes(text):
    with pytest.raises(ArrieroError, match=r"is not a size; expected a size such as 8GiB\. Write a number and a unit"):
        parse_bytes(text)


@pytest.mark.parametrize("text", [0, 8, "8", "1KB", -5])
def test_sizes_too_small_to_be_meant(text):
    with pytest.raises(ArrieroError, match=r"is less than 1 MiB; is the unit missing\?"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1,023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (1023.9 * 1024, "1 MiB"),
        (217.3 * GIB, "217 GiB"),
        (1 << 50, "1,024 TiB"),
        (-1536, "-1.5 KiB"),
    ],
)
def test_sizes_for_people(count, text):
    assert human_bytes(count) == text


def test_free_disk_of_a_folder_that_is_yet_to_be_made(tmp_path):
    assert free_disk(tmp_path / "a" / "b") > 0


def test_what_fits_passes():
    check_budget("memory", GIB, budget=GIB, available=GIB, where="b.yaml: budgets.host_memory")
    check_budget("memory", GIB, budget=None, available=None, where="b.yaml: budgets.host_memory")


def test_a_budget_that_is_too_small_says_by_how_much():
    with pytest.raises(ArrieroError) as caught:
        check_budget("memory", 3 * GIB, budget=GIB, available=0, where="b.yaml: budgets.host_memory")
    text = str(caught.value)
    assert text.startswith(
        "b.yaml: budgets.host_memory: the build needs about 3 GiB of memory, 2 GiB more than allowed"
    )
    assert "expected at most 1 GiB. Raise budgets.host_memory, or choose a smaller profile" in text
    assert caught.value.exit_code == 2


def test_a_machine_that_is_too_small():
    with pytest.raises(MachineLacks) as caught:
        check_budget("disk space", 3 * GIB, budget=None, available=GIB, where="b.yaml: budgets.disk", place="/data")
    assert re.match(
        r"/data has 1 GiB of disk space free, 2 GiB too little; expected about 3 GiB\. Free", str(caught.value)
    )
    assert caught.value.exit_code == 3
