"""The README's first screen, word for word, in a bare environment: it ends in an answer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILT = (
    ".venv",
    ".git",
    "bundles",
    "build",
    "*.egg-info",
    "__pycache__",
    ".pytest_cache",
    ".mypy_cache",
    ".ruff_cache",
)
REGISTRY = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", "wheels", "jinja2"]


def test_the_first_screen_ends_in_an_answer(tmp_path):
    python = shutil.which("python3.11")
    if python is None:
        pytest.skip("needs python3.11 on the path, as the README says")
    if subprocess.run(REGISTRY, cwd=tmp_path, capture_output=True).returncode:
        pytest.skip("needs a package registry: pip reaches none")
    shutil.copytree(ROOT, tmp_path / "arriero", ignore=shutil.ignore_patterns(*BUILT))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    screen = re.search(r"```sh\n(.*?)```", readme, re.S)
    assert readme[: screen.end()].count("\n") < 24
    # nothing of the environment that the tests run in
    bare = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV", "PYTHONHOME")}
    bare["PIP_COMPILE"] = "0"  # Python compiles the modules that it imports, pip every one
    done = subprocess.run(
        ["bash", "-eu", "-c", screen.group(1)], cwd=tmp_path / "arriero", env=bare, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.rstrip().splitlines()[-1].strip() == "42"


def test_the_quickstart_installs_as_the_first_screen_does():
    screens = [
        re.search(r"```sh\n(.*?)```", path.read_text(encoding="utf-8"), re.S).group(1)
        for path in (ROOT / "README.md", ROOT / "docs" / "quickstart.md")
    ]
    assert screens[0].startswith(screens[1])
