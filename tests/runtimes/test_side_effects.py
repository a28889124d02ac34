"""What loading a bundle and answering leaves on the user's device: no file, and no connection to anywhere."""

from __future__ import annotations

import os
import re
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from arriero.runtimes.load_onnxruntime import TELEMETRY, load_onnxruntime
from docs.rooms import sources

SCRIPT = """
import sys, arriero
with arriero.load(sys.argv[1], threads=1) as session:
    print(len(session.generate("What is 17 + 25?", max_tokens=3).token_ids))
"""
# An app's import of ONNX Runtime, and the millisecond in which its telemetry was turned off.
LATE = """
import time, onnxruntime
turn_off = onnxruntime.disable_telemetry_events
onnxruntime.disable_telemetry_events = lambda: (turn_off(), print(time.time_ns() // 1_000_000))
"""
# What a library may take for a machine of tests, where it would behave otherwise than on a user's.
TEST_MACHINE = re.compile(r"^(CI|.*_CI|GITHUB_.*|BUILD_.*|TF_BUILD|ORT_.*|XDG_.*)$")


def answer(command: list[str], bundle: Path, home: Path, script: str = SCRIPT) -> subprocess.CompletedProcess[str]:
    """Ask the bundle in a process of its own, as a user with the empty folder `home` would."""
    home.mkdir()
    environment = {name: value for name, value in os.environ.items() if not TEST_MACHINE.match(name)}
    return subprocess.run(
        [*command, sys.executable, "-c", script, str(bundle)],
        capture_output=True,
        text=True,
        env={**environment, "HOME": str(home)},
        check=True,
    )


@pytest.mark.parametrize("backend", ["onnxruntime", "tvm"])
def test_an_answer_writes_no_file(request: pytest.FixtureRequest, tmp_path: Path, backend: str) -> None:
    folder = request.getfixturevalue("workshop" if backend == "onnxruntime" else "tvm_workshop")
    assert answer([], folder / "bundles" / "fp32", tmp_path / "home").stdout.strip() == "3"
    assert [path for path in (tmp_path / "home").rglob("*") if path.is_file()] == []


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace, Debian's package of that name")
def test_an_answer_connects_to_nothing(workshop: Path, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    command = ["strace", "-f", "-e", "trace=connect,sendto,sendmsg", "-o", str(calls)]
    answer(command, workshop / "bundles" / "fp32", tmp_path / "home")
    reached = [line for line in calls.read_text().splitlines() if re.search(r"AF_INET6?\b", line)]
    assert reached == []


def test_where_an_app_imports_onnx_runtime_first_it_is_said_once_and_nothing_more_is_noted(
    workshop: Path, tmp_path: Path
) -> None:
    answered = answer([], workshop / "bundles" / "fp32", tmp_path / "home", f"{LATE}{SCRIPT * 2}")
    off, *answers = map(int, answered.stdout.split())
    assert answers == [3, 3]
    assert answered.stderr.count("RuntimeWarning: onnxruntime was imported before its telemetry") == 1
    notes = list((tmp_path / "home").rglob("onnxruntime.db"))
    for path in notes:  # a build of its library that has no telemetry leaves none
        with sqlite3.connect(path) as base:
            noted = base.execute("SELECT timestamp, payload FROM events").fetchall()
        assert all(time <= off for time, _ in noted), noted  # the import's, and no session's


def test_a_late_opt_out_is_the_librarys_own_and_the_environments_word_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    late = SimpleNamespace(disable_telemetry_events=lambda: calls.append("off"))
    monkeypatch.setitem(sys.modules, "onnxruntime", late)
    monkeypatch.setenv(TELEMETRY, "0")
    assert load_onnxruntime() is late
    assert (calls, os.environ[TELEMETRY]) == ([], "0")
    monkeypatch.delenv(TELEMETRY)
    with pytest.warns(RuntimeWarning, match=rf"Set {TELEMETRY}=1 before"):
        load_onnxruntime()
    load_onnxruntime()
    assert (calls, os.environ[TELEMETRY]) == (["off"], "1")


def test_nothing_else_imports_onnx_runtime() -> None:
    """The variable counts when the library is loaded: a second place could come first."""
    root = Path(__file__).parents[2]
    importers = {
        source
        for folder in ("export", "graphs", "profiles", "runtimes")
        for source in sources(folder)
        for line in (root / source).read_text().splitlines()
        if re.match(r"\s*(import onnxruntime|from onnxruntime)\b", line)
    }
    assert importers == {"runtimes/onnxruntime.py"}  # for types alone
    assert "if TYPE_CHECKING:\n    import onnxruntime\n" in (root / "runtimes" / "onnxruntime.py").read_text()
