"""The real command line inside the test's own process: arguments in; exit code, standard output and error out."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from arriero.export.cli.app import main
from arriero.runtimes.manifest import file_sha256

BUILD = """\
version: 1
model: {model}
modalities: [{modalities}]
output: {output}
targets:
{targets}
calibration: {{samples: {samples}, seed: 11}}
parity: {{cases: {{samples: {samples}, seed: 29}}, answers: {answers}, thresholds: {thresholds}}}
"""


@dataclass(frozen=True)
class Result:
    """What a run of the command gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output as JSON."""
        return json.loads(self.out)


def arriero(*arguments: str | Path, stdin: str = "") -> Result:
    """Run the command; what it does not turn into an exit code (a traceback for users) is raised."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    given = ["arriero", *map(str, arguments)]
    with (
        mock.patch.object(sys, "argv", given),
        mock.patch.object(sys, "stdin", io.StringIO(stdin)),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else int(left.code is not None)
    return Result(code, out.getvalue(), err.getvalue())


def write_build(
    file: Path,
    model: Path | str,
    modalities: str = "text, image",
    profiles: tuple[str, ...] = ("fp32",),
    samples: int = 4,
    thresholds: str = "{}",
    output: str = "bundles",
    backend: str = "onnxruntime",
    answers: str = "forced",
) -> Path:
    """Write a build file with one target per profile (a shipped one, or a file), named after it.

    Answers are forced unless said: random models never end one, and generating 64 tokens a case takes longest of all.
    """
    targets = "\n".join(
        f"  - {{name: {Path(profile).stem}, backend: {backend}, profile: {profile}, context: 1024, batch: 2}}"
        for profile in profiles
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        BUILD.format(
            model=model,
            modalities=modalities,
            output=output,
            targets=targets,
            samples=samples,
            answers=answers,
            thresholds=thresholds,
        )
    )
    return file


def contents(folder: Path) -> dict[str, str]:
    """The sha256 of every file in a folder, by its path."""
    return {
        file.relative_to(folder).as_posix(): file_sha256(file) for file in sorted(folder.rglob("*")) if file.is_file()
    }
