"""The script of a first run on a GPU, as far as it goes without one: a driver that is missing, steps that fail."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from arriero.export.build_file.read import load_build
from tests.benchmarks.bare_packages import link_bare_packages

FOLDER = Path(__file__).parents[2] / "benchmarks"
SCRIPT = FOLDER / "first_gpu_run.sh"
STEPS = [
    *("memcheck", "racecheck", "check-odd", "check-long", "check-released"),
    *("probes", "decode", "prefill", "profiles", "build"),
    *("runtime-fp16", "runtime-gpu-int4"),
]


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def run(tmp_path: Path, python: Path, **environment: str) -> tuple[int, str]:
    """The exit code, and what `steps.txt` says."""
    own = {"PYTHON": str(python), "PATH": f"{tmp_path}:{os.environ['PATH']}", **environment}
    done = subprocess.run([SCRIPT, tmp_path / "out"], env=own, capture_output=True, text=True)
    steps = (tmp_path / "out" / "steps.txt").read_text()
    assert sorted(done.stdout.splitlines()) == sorted(steps.splitlines())  # some steps run at once
    return done.returncode, steps


def test_a_bare_machine_is_told_that_it_has_no_driver(tmp_path):
    """With numpy and ml_dtypes for packages, and nothing of ours."""
    link_bare_packages(tmp_path)
    python = program(tmp_path / "bare", f'exec "{sys.executable}" -S "$@"')
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1")
        pytest.skip("this machine has a driver")
    code, steps = run(tmp_path, python, PYTHONPATH=str(tmp_path))
    assert code == 1
    assert re.fullmatch(r"driver: .*there is no NVIDIA driver: .*\n", steps)


def test_a_step_that_fails_does_not_stop_the_others(tmp_path):
    """A Python that knows a GPU and notes what it is asked; the sanitizer is missing, the probes fail."""
    python = program(
        tmp_path / "python",
        f'[ "$1" = -c ] && echo sm_90 && exit; echo "$@" >>"{tmp_path}/asked"\n'
        'case "$*" in *8192*8192*) echo out of memory; exit 3;; esac',
    )
    program(tmp_path / "ncu", f'echo "$@" >>"{tmp_path}/asked"')
    code, steps = run(tmp_path, python)
    assert code == 1
    lines = dict(line.split(": ", 1) for line in steps.splitlines())
    # the checks run at once, in any order
    assert list(lines)[:2] == ["driver", "compile"]
    assert set(list(lines)[2:7]) == set(STEPS[:5])
    assert list(lines)[7:] == STEPS[5:]
    assert lines["driver"] == "done, it is sm_90"
    assert lines["memcheck"] == lines["racecheck"] == "not run, compute-sanitizer is not installed"
    assert re.fullmatch(r"failed with 3 after \d+ s: out of memory", lines["probes"])
    failed = {"driver", "memcheck", "racecheck", "probes"}
    assert all(re.fullmatch(r"done in \d+ s", line) for name, line in lines.items() if name not in failed)
    asked = (tmp_path / "asked").read_text()
    assert f"--code {tmp_path}/out/code" in asked
    assert len(list((tmp_path / "out").glob("*.log"))) == len(STEPS) + 3


def test_code_that_was_carried_along_is_not_compiled(tmp_path):
    python = program(tmp_path / "python", f'[ "$1" = -c ] && echo sm_90 && exit; echo "$@" >>"{tmp_path}/asked"')
    _, steps = run(tmp_path, python, CODE="elsewhere")
    assert "compile" not in steps
    assert "--code elsewhere --out" in (tmp_path / "asked").read_text()


def test_the_steps_have_thirty_minutes_in_all_and_less_than_ten_each():
    script = SCRIPT.read_text()
    limits = {name: int(limit) for name, limit in re.findall(r'^ *step "?([\w-]+)\S* (\d+) ', script, re.MULTILINE)}
    assert set(limits) == {"memcheck", "racecheck", "check-", "compile", *STEPS[5:-2], "runtime-"}
    assert max(limits.values()) < 600
    assert sum(limits.values()) + limits["runtime-"] <= 1800  # of two bundles
    assert "\nTOTAL=${TOTAL:-1800}\n" in script


def test_steps_that_the_time_has_no_room_for_are_left_out(tmp_path):
    python = program(tmp_path / "python", '[ "$1" = -c ] && echo sm_90 && exit; exit 0')
    code, steps = run(tmp_path, python, TOTAL="0")
    assert code == 1
    lines = dict(line.split(": ", 1) for line in steps.splitlines())
    assert {lines[name] for name in STEPS} == {"left out, the time is over"}


def test_the_kernels_options_are_the_commands(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    command = importlib.import_module("gpu_kernels")
    script = SCRIPT.read_text()
    lists = dict(re.findall(r"^([A-Z]+)=\((--.*)\)$", script, re.MULTILINE))
    calls = re.findall(r'"\$\{KERNELS\[@\]\}" ([^&\n]*)', script)
    assert len(calls) == 7
    for call in calls:
        words = re.sub(r'"\$\{(\w+)\[@\]\}"', lambda match: lists[match[1]], call).replace('"$cases"', "odd").split()
        command.parse(words)


def test_the_build_file_is_one():
    build = load_build(FOLDER / "first_gpu_run.yaml")
    assert [target.name for target in build.targets] == ["fp16", "gpu-int4"]
