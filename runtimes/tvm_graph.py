"""One compiled graph of a bundle, and what runs it: TVM's virtual machine and its pool of threads."""

from __future__ import annotations

import ctypes
import functools
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from arriero.errors import ArrieroError, MachineLacks
from arriero.runtimes.backend import Between, StepGivenUp
from arriero.runtimes.broken_package import does_not_load, naming_broken_packages
from arriero.runtimes.cpu import usable_cores
from arriero.runtimes.memory_cap import RecordSize
from arriero.runtimes.private_library import PrivateLibrary
from arriero.runtimes.weight_files import WeightFiles
from arriero.traits import install

CPU = 1, 0  # DLPack's device type and number
# Of libraries: takes the address of what is called between parts of a step, some milliseconds of work each, and gives
# the seconds in which it need not be called again.
BETWEEN_PARTS = "arriero_between_parts"
# A function of a library: of the address of a function, which it calls while the threads of the pool stay at hand.
WITH_CREW = "arriero_with_crew"
FEW = ("step", "token")  # functions of the text graph that give the logits of few tokens
NAIVE, POOLED = 1, 2  # allocators: what keeps the memory of every size that was asked for is not for a cap
Machine = Callable[[str], Any]  # of TVM: gives each function of a library, ready to run
Feeds = Mapping[str, Any]  # what a graph takes, by name: arrays, or arguments that were made of some


class CompiledGraph:
    """One library and its signature; `bind` gives it weights as they lie in the bundle then, `open` loads it."""

    def __init__(self, bundle: Path, part: str, threads: int, sha256: Mapping[str, str]) -> None:
        self._ffi, self._path, self._threads = load_runtime(), bundle / f"{part}.so", threads
        with self._refusal():
            signature = json.loads((bundle / f"{part}.json").read_text())
            self._code = PrivateLibrary(self._path, sha256.get(self._path.name))
            self.inputs, self.outputs = signature["inputs"], signature["outputs"]
            self.weights, self.experts = signature["weights"], signature["experts"]
            self.packs: bool = signature["packs"]
            # the tokens from which on `prompt` is there for a step; bundles from before it do not say it
            self.many: float = signature.get("many") or math.inf
            # the function for a step of one token of one row; bundles from before `token` do not say it
            self.for_a_token: str = signature.get("for_a_token", "step")
            # whether nothing in a step of few tokens calls TVM's pool but our kernels; older bundles do not say it
            self._one_pool: bool = signature.get("crew", False)
            # of keys and values; bundles from before they could be narrower do not say it
            self.cache = np.dtype(signature.get("cache") or "float32")
        self.library: Any = None
        self._machine: Machine | None = None
        # a second one, for a step while one of the first is left: a machine can run but one
        self._meanwhile: Machine | None = None
        self._crew: Callable[[int | None], object] | None = None

    def sizes(self) -> list[RecordSize]:
        """The layers' experts."""
        return [RecordSize(len(entry["records"]), entry["bytes"]) for entry in self.experts]

    def bind(self, weights: WeightFiles) -> None:
        """Take the weights, and the tables of experts."""
        with self._refusal():
            self._weights = weights  # the tables hold addresses of its memory
            self.tables = [weights.table(entry) for entry in self.experts]
            self._arrays = [weights.weight(entry) for entry in self.weights]

    def open(self, allocator: int) -> None:
        """Load the library and hand it its weights, unless that is done."""
        if self._machine is not None:
            return
        ffi = self._ffi
        with self._refusal():
            # TVM's own `load_module` would keep it for as long as the process runs
            load = ffi.get_global_func("ffi.Module.load_from_file.so")
            self.library = self._code.open(lambda path: load(path, "so"))
            machine = self._new_machine(allocator)
        self._parts = ffi.from_dlpack(np.zeros(self._threads, np.uint8))
        self._operands = [ffi.from_dlpack(array) for array in (*self.tables, *self._arrays)]
        self._machine = machine

    def _new_machine(self, allocator: int) -> Machine:
        machine = self.library["vm_load_executable"]()
        machine["vm_initialization"](*CPU, allocator)
        return functools.cache(machine.__getitem__)  # which makes a new object of a function whenever it is asked

    def keep_crew(self) -> None:
        """From now on all threads stay with a step of few tokens, unless such steps call TVM's pool themselves."""
        if self._one_pool and self._threads > 1:
            self._crew = self.library.get_function(WITH_CREW, True)

    def as_arguments(self, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """The arrays as TVM takes them, whose memory they share: what a step takes again need be made but once."""
        return {name: self._ffi.from_dlpack(array) for name, array in arrays.items()}

    def run(self, feeds: Feeds, function: str = "main") -> list[np.ndarray]:
        """Give the outputs of `function` over `feeds`, arrays or such arguments by input name, in order."""
        ffi = self._ffi
        use_threads(self._threads)
        taken = [self._parts if name == "threads" else feeds[name] for name in self.inputs]
        arguments = [ffi.from_dlpack(one) if isinstance(one, np.ndarray) else one for one in taken]
        assert self._machine is not None
        compute = functools.partial(self._machine(function), *arguments, *self._operands)
        crew = self._crew if function in FEW else None
        results = compute() if crew is None else _with_crew(crew, compute)
        return [np.from_dlpack(item) for item in (results if isinstance(results, ffi.Array) else [results])]

    @contextmanager
    def left_between_parts(self, between: Between) -> Iterator[None]:
        """Have a step in the block call `between` between its parts; the steps that it takes call nothing."""
        if self._meanwhile is None:
            self._meanwhile = self._new_machine(POOLED)

        def leave() -> float | None:
            self._machine, self._meanwhile = self._meanwhile, self._machine
            try:
                return between()
            finally:
                self._machine, self._meanwhile = self._meanwhile, self._machine

        with self.left_for(leave):
            yield

    @contextmanager
    def left_for(self, between: Between) -> Iterator[None]:
        """Have the library call `between` between parts of its steps in the block; those from before may not do so.

        Raises StepGivenUp behind a step that computed nothing more because `between` gave less than 0. The library does
        not fail there: of an error TVM's runtime would read all symbols of the process.
        """
        if not self.library.implements_function(BETWEEN_PARTS, True):
            yield
            return
        tell = self.library.get_function(BETWEEN_PARTS, True)
        seconds = 0.0

        def call() -> float:
            nonlocal seconds
            seconds = between() or 0.0
            return seconds

        function = ctypes.CFUNCTYPE(ctypes.c_double)(call)
        tell(_address(function))
        try:
            yield
        finally:
            tell(0)
        if seconds < 0:
            raise StepGivenUp

    @contextmanager
    def _refusal(self) -> Iterator[None]:
        """Make one of our errors of what goes wrong in the block."""
        try:
            yield
        except ArrieroError:
            raise
        except Exception as error:
            raise ArrieroError(
                f"TVM's runtime refuses the library: {(str(error).splitlines() or [repr(error)])[0]}",
                where=str(self._path),
                remedy="Rebuild the bundle with `arriero build`",
            ) from error


def _with_crew(crew: Callable[[int | None], object], compute: Callable[[], Any]) -> Any:
    """What `compute` gives, with all threads at hand for its operators: each would else call them by itself."""
    given, raised = list[Any](), list[BaseException]()

    def work() -> None:
        try:
            given.append(compute())
        except BaseException as error:  # none may pass through the library
            raised.append(error)

    function = ctypes.CFUNCTYPE(None)(work)
    crew(_address(function))
    if raised:
        raise raised[0]
    return given[0]


def _address(function: Any) -> int | None:
    """Of a function of `ctypes`, which has to be kept for as long as a library knows it."""
    return ctypes.cast(function, ctypes.c_void_p).value


_configured = threading.local()


def use_threads(threads: int) -> None:
    """Let the calling thread's next run use `threads` threads; TVM keeps a pool of workers per calling thread."""
    if getattr(_configured, "threads", None) != threads:
        import tvm_ffi

        tvm_ffi.get_global_func("runtime.config_threadpool")(1, threads)
        _configured.threads = threads


def load_runtime() -> Any:
    """The module `tvm_ffi` with TVM's runtime library loaded.

    Raises MachineLacks with the package that is missing or does not load.
    """
    package = find_spec("tvm")
    if package is None or find_spec("tvm_ffi") is None:
        missing = "apache-tvm" if package is None else "apache-tvm-ffi"
        raise MachineLacks(f"the package {missing} is not installed", remedy=f"Install it with `{install('tvm')}`")
    # The pool would otherwise pin its threads to cores, which on an edge device are the app's cores too.
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    # And on x86 it would use every second core only, taking the others for hyper-threads.
    os.environ.setdefault("TVM_NUM_THREADS", str(usable_cores()))
    # Between a step's operators workers look for the next task rather than sleep, but not for the 300,000 looks of
    # TVM's own choice: a fifth of a second of every core after every answer, minutes where others compute, and as long
    # until the threads of a session that is closed have ended.
    os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "1000")
    with naming_broken_packages(), _unseen("torch"):
        import tvm_ffi

    if tvm_ffi.get_global_func("runtime.config_threadpool", allow_missing=True) is None:
        folders = [Path(place) / "lib" for place in package.submodule_search_locations or ()]
        try:
            tvm_ffi.libinfo.load_lib_ctypes("tvm", "tvm_runtime", "RTLD_GLOBAL", extra_lib_paths=folders)
        except Exception as error:  # what it raises is no part of its interface
            raise does_not_load("tvm", error) from error
    return tvm_ffi


@contextmanager
def _unseen(package: str) -> Iterator[None]:
    """Hide an installed package that is not loaded yet: `tvm_ffi` imports PyTorch only because it is there."""
    hide = package not in sys.modules
    if hide:
        sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        if hide:
            del sys.modules[package]
