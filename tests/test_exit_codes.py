"""Exit codes: what is unexpected shares its code with no meaning, and a full disk is the machine's lack, everywhere."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from arriero.errors import UNEXPECTED, is_full
from arriero.export import __main__ as command
from arriero.export.cli.app import app
from arriero.profiles.reserved_array import create_array
from tests.stopping import COMMAND

READ, API = "arriero.export.build_file.read.load_build", "arriero.runtimes.api.load"
SHOW = "arriero.export.cli.show_profiles"
# Every command with arguments that are right as far as they go, and the function in which its work begins.
COMMANDS = {
    "plan": (["build.yaml"], READ),
    "build": (["build.yaml"], READ),
    "calibrate": (["build.yaml"], READ),
    "parity": (["bundle"], "arriero.export.proof.prove.prove_bundle"),
    "run": (["bundle", "Hello"], API),
    "chat": (["bundle"], API),
    "serve": (["bundle"], "arriero.runtimes.server.serve.open_bundles"),
    "trace": (["bundle", "Hello"], API),
    "push": (["bundle", "store"], "arriero.export.store.push.push_bundle"),
    "pull": (["store", "bundle"], "arriero.export.store.pull.pull_bundle"),
    "inspect": (["bundle"], "arriero.export.cli.show_bundle.describe_bundle"),
    "doctor": ([], "arriero.export.machine.doctor.diagnose"),
    "compare": (["bundle", "--against", "."], "arriero.export.proof.compare.compare_bundles"),
    "schema": ([], "arriero.export.build_file.schema.json_schema"),
    "profiles list": ([], f"{SHOW}.list_profiles"),
    "profiles show": (["int4"], f"{SHOW}.open_profile"),
    "profiles explain": (["int4", "a"], f"{SHOW}.open_profile"),
    "profiles diff": (["int4", "int8"], f"{SHOW}.open_profile"),
}
RAISED = {
    UNEXPECTED: [
        ZeroDivisionError("a fault"),
        OSError(errno.EBADF, "odd"),
        RuntimeError("[/x]"),
        FileNotFoundError(2, "x"),
    ],
    3: [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Quota exceeded", "file"),
        OSError("6400 requested and 1024 written"),  # as numpy says it
        MemoryError(),
    ],
    2: [PermissionError(errno.EACCES, "Permission denied", "/root/file")],
}


def every_command() -> Iterator[str]:
    import typer

    for name, one in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        yield from [f"{name} {inner}" for inner in one.commands] if hasattr(one, "commands") else [name]


def test_every_command_is_here() -> None:
    assert set(every_command()) == set(COMMANDS)


@pytest.mark.parametrize(("code", "error"), [(code, one) for code, listed in RAISED.items() for one in listed])
@pytest.mark.parametrize("name", COMMANDS)
def test_what_an_error_makes_each_command_return(
    name: str, code: int, error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    arguments, function = COMMANDS[name]
    monkeypatch.setattr(function, fail)
    monkeypatch.setattr(sys, "argv", ["arriero", *name.split(), *arguments])
    with pytest.raises(SystemExit) as left:
        command.main()
    assert left.value.code == code
    told = capsys.readouterr().err
    assert ("Traceback" in told) == (code == UNEXPECTED)
    assert told.rstrip().splitlines()[-1].startswith("error: ")


def test_no_meaning_has_the_code_of_the_unexpected() -> None:
    assert UNEXPECTED not in (0, 1, 2, 3, command.STOPPED, 141)


def test_whoever_reads_the_output_may_go_away() -> None:
    """`arriero schema | head -1` is no failed parity."""
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([*COMMAND, "schema"], stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


def test_an_array_that_the_disk_has_no_room_for_is_an_error_and_no_signal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    array = create_array(tmp_path / "whole.npy", "float32", (3, 4))
    array[:] = 1
    assert os.stat(tmp_path / "whole.npy").st_blocks * 512 >= array.nbytes

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left") as caught:
        create_array(tmp_path / "more.npy", "float32", (3, 4))
    assert is_full(caught.value)
