"""A seeded part of the function-calling leaderboard; the whole is `python -m tests.long.function_calls`."""

from __future__ import annotations

from pathlib import Path

import pytest

import arriero

pytest.importorskip("llguidance", reason="needs llguidance: pip install 'arriero[structured]'")
pytest.importorskip("jsonschema", reason="needs jsonschema, which judges arguments")

from tests.long.function_calls import SETS, run
from tests.long.released_package import NotFetchedError


def test_every_call_that_is_asked_for_is_valid(workshop: Path) -> None:
    session = arriero.load(workshop / "bundles" / "fp32", threads=2, batch=4)
    try:
        results = list(run(session, 4, 4, seed=7))
    except NotFetchedError as error:
        pytest.skip(str(error))
    assert [(name, asked) for name, asked, _ in results] == [(name, 4) for name in SETS]
    assert [wrong for _, _, wrong in results] == [[]] * len(SETS)
