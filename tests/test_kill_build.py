"""A build that is killed over and over ends with the bytes of one that is left alone; `tests/long` does more of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.long.kill_build import run


@pytest.mark.parametrize("seed", [3])
def test_kills_at_any_moment_change_no_byte(tmp_path: Path, seed: int) -> None:
    struck = run(tmp_path, kills=2, seed=seed, per_output=2, tell=lambda line: None)
    assert sum(struck.values()) == 2
