"""Where the `arriero` command begins, before anything is loaded: what cuts it short ends it in one sentence.

A package that is missing, a full disk and Ctrl-C may strike while the command's own libraries are still being imported.
"""

from __future__ import annotations

import errno
import io
import signal
import sys
from types import FrameType
from typing import NoReturn

from arriero.errors import ArrieroError, MachineLacks

STOPPED = 130
# What brings a module that a device needs; all others are for building.
EXTRAS = {
    **dict.fromkeys(("rich", "typer"), "arriero"),
    "onnxruntime": "arriero[onnxruntime]",
    **dict.fromkeys(("tvm", "tvm_ffi"), "arriero[tvm]"),
    **dict.fromkeys(("tensorrt", "cuda"), "arriero[tensorrt]"),
    "tensorrt_rtx": "arriero[tensorrt-rtx]",
    "av": "arriero[video]",
}


def main() -> None:
    """Run the command line."""
    stops: list[int] = []

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        stops.append(number)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # and not where it is ignored, as under nohup
        signal.signal(signal.SIGINT, stop)
    for stream in (sys.stdout, sys.stderr):  # a terminal of few characters shows what it can
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        from arriero.export.cli.app import main as command

        command()
    except BaseException as error:
        # A library that is interrupted while it loads may raise anything.
        if stops and not (isinstance(error, SystemExit) and not error.code):
            print("stopped; a build or a calibration goes on from here with the same command", file=sys.stderr)
            sys.exit(STOPPED)
        lack = _what_lacks(error)
        if lack is None:
            raise
        print(f"error: {lack}", file=sys.stderr)
        sys.exit(lack.exit_code)


def _what_lacks(error: BaseException) -> ArrieroError | None:
    """What the machine lacks when `error` says so; None for any other."""
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("arriero"):
        name = (error.name or "").partition(".")[0]
        remedy = f"Install what the command needs with `pip install '{EXTRAS.get(name, 'arriero[export]')}'`"
        return MachineLacks(f"the package {name} is not installed", remedy=remedy)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MachineLacks("the disk is full", where=error.filename, remedy="Free some space and try again")
    return None


if __name__ == "__main__":
    main()
