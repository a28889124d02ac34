"""Where the `arriero` command begins, before anything is loaded: what cuts it short ends it in one sentence.

A package that is missing, a full disk, Ctrl-C and SIGTERM may strike while the command's own libraries are still being
imported.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import traceback
from types import FrameType
from typing import NoReturn

from arriero.errors import HOW_TO_GO_ON, STOPPED, UNEXPECTED, ArrieroError, MachineLacks, is_full
from arriero.runtimes.broken_package import broken_package
from arriero.runtimes.cpu import usable_cores
from arriero.traits import extra_of, install

# What the system says of a path that a user gave, rather than of a fault of ours.
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)


def main() -> None:
    """Run the command line."""
    stops: list[int] = []

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        stops.append(number)
        raise KeyboardInterrupt

    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) is usual:  # and not where it is ignored, as Ctrl-C under nohup
            signal.signal(number, stop)
    # PyTorch and numpy count the machine's cores, whatever a container's quota leaves of them
    os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))
    for stream in (sys.stdout, sys.stderr):  # a terminal of few characters shows what it can
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        from arriero.export.cli.app import main as command

        command()
    except BaseException as error:
        # A library that is interrupted while it loads may raise anything.
        if stops and not (isinstance(error, SystemExit) and not error.code):
            print(HOW_TO_GO_ON, file=sys.stderr)
            sys.exit(STOPPED)
        lack = _what_lacks(error)
        if lack is None and isinstance(error, Exception):
            traceback.print_exc()
            what = f"this is a fault of arriero's ({type(error).__name__}); report it together with the lines above"
            print(f"error: {what}", file=sys.stderr)
            sys.exit(UNEXPECTED)
        if lack is None:
            raise
        print(f"error: {lack}", file=sys.stderr)
        sys.exit(lack.exit_code)


def _what_lacks(error: BaseException) -> ArrieroError | None:
    """What the machine lacks when `error` says so; None for any other."""
    broken = broken_package(error)
    if broken is not None:
        return broken
    if isinstance(error, ModuleNotFoundError) and not (error.name or "").startswith("arriero"):
        name = (error.name or "").partition(".")[0]
        remedy = f"Install what the command needs with `{install(extra_of(name))}`"
        return MachineLacks(f"the package {name} is not installed", remedy=remedy)
    if is_full(error):
        where = error.filename if isinstance(error, OSError) else None
        return MachineLacks("the disk is full", where=where, remedy="Free some space and try again")
    if isinstance(error, OSError) and error.errno in REFUSED and error.filename:
        what = f"cannot be read or written ({error.strerror})"
        return ArrieroError(what, where=str(error.filename), remedy="Choose another path, or change its owner or mode")
    if isinstance(error, MemoryError):
        return MachineLacks("the memory is full", remedy="Free some memory, or use a machine with more")
    return None


if __name__ == "__main__":
    main()
