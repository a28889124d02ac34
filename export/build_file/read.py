"""Reads a build file: YAML with line numbers, checked against the schema, every mistake reported at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from arriero.errors import ArrieroError
from arriero.export.build_file.schema import EMBEDDED, BuildConfig
from arriero.profiles.validate import validated
from arriero.profiles.yaml_document import Document

START = "Start from the example build.yaml of the repository"


def load_build(path: str | Path) -> BuildConfig:
    """Read and check the build file at `path`.

    Raises `ArrieroError` when it cannot be read, otherwise `Problems` with everything that is wrong in it
    (`MachineLacks` when the only thing wrong is that the model is not on this machine).
    """
    file = Path(path)
    document = Document(file, "build file", START)
    build = validated(document, BuildConfig, {"folder": file.absolute().parent})
    document.problems += _cross_checks(document)
    document.raise_problems()
    assert build is not None  # or there were problems
    return build


def _cross_checks(document: Document) -> Iterator[ArrieroError]:
    """Find what no single field shows; looks at the raw data, so that it speaks even when fields are wrong."""
    data = document.data
    names: dict[str, int] = {}
    for number, target in enumerate(_list(data.get("targets"))):
        name = _dict(target).get("name")
        if isinstance(name, str):
            # Folders on macOS and Windows do not tell upper from lower case.
            first = names.setdefault(name.casefold(), number)
            if first != number:
                what = f"{name!r} is also the name of targets[{first}]"
                where = document.where(("targets", number, "name"))
                yield ArrieroError(what, where=where, expected="one name per target", remedy="Rename one of them")
    parity = _dict(data.get("parity"))
    defaults = BuildConfig.model_fields
    calibration = defaults["calibration"].default.model_dump() | _dict(data.get("calibration"))
    cases = defaults["parity"].default.cases.model_dump() | _dict(parity.get("cases"))
    same = "also the calibration's, so the report would test on what it was tuned to"
    if calibration["set"] != EMBEDDED and _path(document, calibration["set"]) == _path(document, cases["set"]):
        where = document.where(("parity", "cases", "set"))
        remedy = "Split it in two files, or take `embedded` for one"
        yield ArrieroError(f"this set is {same}", where=where, expected="another set", remedy=remedy)
    elif (calibration["set"], calibration["seed"]) == (cases["set"], cases["seed"]) == (EMBEDDED, cases["seed"]):
        where = document.where(("parity", "cases", "seed"))
        remedy = "Change one of the two seeds"
        yield ArrieroError(f"seed {cases['seed']} is {same}", where=where, expected="another seed", remedy=remedy)


def _path(document: Document, text: Any) -> Path:
    return Path(os.path.realpath(document.file.absolute().parent / str(text)))  # links may go in a circle


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
