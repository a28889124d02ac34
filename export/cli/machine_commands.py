"""`arriero doctor`: what this machine can do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from arriero.errors import ArrieroError
from arriero.export.cli.options import Json, err, out, print_json

USUAL = Path("build.yaml")


def doctor(
    build_file: Annotated[
        Path | None, typer.Argument(help="Look at the backends of this build file; build.yaml where there is one.")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="Look at what this backend needs only.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Look at every backend there is.")] = False,
    as_json: Json = False,
) -> None:
    """Say what this machine has and lacks for each backend, and how to get it; exit code 3 if no build is possible.

    It looks at the backends that the build file names; without one, at those that are installed. Where only a runtime
    is installed, as on a device, it says which bundles run here, and the exit code is 3 if none does.
    """
    from arriero.export.cli.show_diagnosis import show_diagnosis
    from arriero.export.machine.doctor import diagnose, installed_backends
    from arriero.traits import BACKENDS

    named = BACKENDS if everything else _named_backends(build_file) or installed_backends()
    diagnosis = diagnose(Path.cwd(), backend, named)
    if as_json:
        print_json(diagnosis.to_json())
    else:
        show_diagnosis(diagnosis, out)
    raise typer.Exit(diagnosis.exit_code(backend))


def _named_backends(build_file: Path | None) -> tuple[str, ...]:
    """The backends of a build file; none where there is no file, or on a device, which reads none."""
    if build_file is None and not USUAL.is_file():
        return ()
    try:
        from arriero.export.build_file.read import load_build

        targets = load_build(build_file or USUAL).targets
    except ModuleNotFoundError:
        return ()
    except ArrieroError as error:
        if build_file is not None:
            raise
        err.print(f"{USUAL} is not looked at: {error}", markup=False, highlight=False, soft_wrap=True)
        return ()
    return tuple(dict.fromkeys(target.backend for target in targets))
