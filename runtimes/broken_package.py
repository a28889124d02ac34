"""What is said of a package that is installed and does not load: its name, the reason, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import FrameType

from arriero.errors import MachineLacks
from arriero.traits import reinstall, reinstall_package

OURS = __name__.partition(".")[0]
# Of the libraries that a slim system lacks, the package of Debian and Ubuntu.
SYSTEM = {
    "libgomp.so.1": "libgomp1",
    "libstdc++.so.6": "libstdc++6",
    "libatomic.so.1": "libatomic1",
    "libz.so.1": "zlib1g",
    "libnuma.so.1": "libnuma1",
}
ABSENT_LIBRARY = re.compile(r"(lib[\w.+-]+\.so[.\d]*): cannot open shared object file")


@contextmanager
def naming_broken_packages() -> Iterator[None]:
    """Within the block, what a package raises while it is imported becomes the MachineLacks of `broken_package`."""
    try:
        yield
    except Exception as error:
        lack = broken_package(error)
        if lack is None:
            raise
        raise lack from error


@contextmanager
def importing(*names: str, absent: MachineLacks) -> Iterator[None]:
    """Within the block, which imports a package, `absent` is raised where one of the modules `names` is not there.

    Other packages may have modules around a package's own, so that there may be several. One that is there and does not
    load, or lacks a part, becomes the MachineLacks of `broken_package`.
    """
    with naming_broken_packages():
        try:
            yield
        except ModuleNotFoundError as error:
            if error.name not in names:
                raise
            raise absent from None


def broken_package(error: BaseException) -> MachineLacks | None:
    """What the machine lacks where an `import` of ours met a package that is there and raised `error`, else None.

    A package that is not there at all is no broken one.
    """
    if isinstance(error, MachineLacks) or not isinstance(error, Exception):
        return None
    module = _imported(error)
    if module is None or (isinstance(error, ModuleNotFoundError) and not _is_part(error.name, module)):
        return None
    return does_not_load(module, error)


def does_not_load(module: str, error: BaseException, extra: str | None = None) -> MachineLacks:
    """What is said of the package that brings `module`, which is there and raised `error` while it was loaded.

    `extra` is what of ours brings it, where the module is known by other names as well.
    """
    package, command = reinstall_package(module)
    if extra is not None:
        command = reinstall(extra)
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if library := ABSENT_LIBRARY.search(reason):
        name = library[1]
        how = f"`apt-get install {SYSTEM[name]}` on Debian or Ubuntu" if name in SYSTEM else "your system's packages"
        remedy = f"Install the library {name} ({how}); if {package} is to bring it, reinstall that: {command}"
    else:
        remedy = f"Reinstall it: {command}"
    return MachineLacks(f"the package {package} is installed and does not load: {reason}", remedy=remedy)


def _is_part(missing: str | None, module: str) -> bool:
    """Whether the module that is `missing` is a part of a package that is there."""
    return missing is not None and missing != module and missing.partition(".")[0] == module


def _imported(error: Exception) -> str | None:
    """The package of somebody else's whose import, asked for by the last of our functions in the way, raised."""
    frames: list[FrameType] = []
    step = error.__traceback__
    while step is not None:
        frames.append(step.tb_frame)
        step = step.tb_next
    ours = [number for number, frame in enumerate(frames) if _package(frame) == OURS]
    if not ours:
        return None
    # Python hides the frames of its import machinery, but not all of them
    after = [frame for frame in frames[ours[-1] + 1 :] if _package(frame) not in ("importlib", "_frozen_importlib")]
    if not after:
        return _loaded(error)
    return _package(after[0]) if after[0].f_code.co_name == "<module>" else None


def _loaded(error: Exception) -> str | None:
    """The package that an ImportError names, if it is somebody else's and there."""
    name = (error.name or "").partition(".")[0] if isinstance(error, ImportError) else ""
    try:
        return name if name and name != OURS and find_spec(name) is not None else None
    except ValueError:  # a module that somebody put among the loaded ones by hand
        return name


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
