"""A command that is cut short says so in one sentence: a package that is missing, Ctrl-C at any moment, a full disk."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from arriero.runtimes.user_cache import VARIABLE
from tests.command import write_build
from tests.stopping import COMMAND, interruptible

FULL = Path("/dev/full")


def without(package: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command where `package` cannot be imported."""
    code = f"import sys; sys.modules[{package!r}] = None; from arriero.export.__main__ import main; main()"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)


@pytest.mark.parametrize(("package", "verb"), [("typer", "--version"), ("rich", "doctor"), ("yaml", "plan")])
def test_a_missing_package_is_named_with_the_way_to_get_it(package, verb):
    refused = without(package, verb)
    assert (refused.returncode, refused.stdout) == (3, "")
    assert refused.stderr.count("\n") == 1
    assert f"{package} is not installed. Install" in refused.stderr
    assert f"pip install 'arriero{'[export]' * (package == 'yaml')}'" in refused.stderr


def test_a_missing_part_of_arriero_itself_is_no_missing_package():
    assert "Traceback" in without("arriero.export.cli.app", "--version").stderr


@pytest.mark.parametrize("raised", ["AttributeError('half a module')", "SystemExit(130)", "KeyboardInterrupt"])
def test_what_a_library_raises_when_it_is_interrupted_counts_as_stopped(raised):
    code = f"""
import signal
from arriero.export import __main__
from arriero.export.cli import app as cli

def interrupted():
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise {raised}

cli.main = interrupted
__main__.main()
"""
    with interruptible():
        stopped = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert stopped.returncode == 130
    assert stopped.stderr.startswith("stopped; a build")
    assert stopped.stderr.count("\n") == 1


def test_ctrl_c_in_a_build_says_that_it_goes_on(workshop, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, "")  # so that graphs are traced
    build_file = write_build(tmp_path / "build.yaml", workshop / "scout", "text")
    with interruptible():
        process = subprocess.Popen([*COMMAND, "build", str(build_file)], stderr=subprocess.PIPE, text=True)
    with process:
        while process.poll() is None and not list((tmp_path / "bundles" / ".work").glob("graph-*.partial")):
            time.sleep(0.002)
        process.send_signal(signal.SIGINT)
        told = process.stderr.read()
    assert process.returncode == 130
    assert "goes on from here" in told
    assert "Traceback" not in told


def test_a_command_that_ignores_ctrl_c_goes_on():
    """As nohup and a background shell start it."""
    code = """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
from arriero.export import __main__
from arriero.export.cli import app as cli

def interrupted():
    signal.raise_signal(signal.SIGINT)
    print("done")

cli.main = interrupted
__main__.main()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_an_answer_in_a_terminal_of_few_characters(workshop):
    asked = [
        "run",
        str(workshop / "bundles" / "fp32"),
        "Hello",
        "--temperature",
        "5",
        "--seed",
        "1",
        "--max-tokens",
        "40",
    ]
    wide, narrow = (
        subprocess.run([*COMMAND, *asked], capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding})
        for encoding in ("utf-8", "ascii")
    )
    assert narrow.returncode == 0, narrow.stderr
    assert not wide.stdout.isascii()
    assert narrow.stdout.decode("ascii") == wide.stdout.decode().encode("ascii", "replace").decode()


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full, which Linux has")
def test_a_full_disk_under_the_output(workshop):
    with FULL.open("w") as full:
        refused = subprocess.run([*COMMAND, "schema"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert (refused.returncode, "the disk is full" in refused.stderr) == (3, True)
    assert "Traceback" not in refused.stderr
