"""One small multimodal build, made once by the real command and read by every test that needs a whole bundle."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from arriero.export.machine.versions import installed_versions
from arriero.export.pipeline.sources import source_hash
from arriero.export.pipeline.stages import key_of
from arriero.profiles.recipe import shipped
from arriero.runtimes.user_cache import VARIABLE
from arriero.traits import SHARED_PACKAGES
from tests.command import arriero, write_build
from tests.machines.machine_class import describe_machine
from tests.shared import WORKER, locked, made_once
from tests.small import small_scout

UNUSED = 7 * 24 * 3600  # seconds

if WORKER:  # the workers share the cores; threads of linear algebra beyond that would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put whole builds, the slowest tests, first: else one worker ends the run with them while the others wait.

    The slowest of all begins: it waits for nothing that others make.
    """
    here = Path(__file__).parent
    items.sort(key=lambda item: (item.path.name != "test_first_screen.py", item.path.parent != here))


def pytest_report_header() -> str:
    """The line that says on which class of machine the tests run."""
    return describe_machine()


@pytest.fixture(scope="session", autouse=True)
def libraries_are_no_garbage() -> Iterator[None]:
    """A build collects garbage before each stage; what was loaded before the first test is left out of that.

    To look through it each time took a fifth of the processor time of the processes that run the tests.
    """
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def what_builds_keep(request: pytest.FixtureRequest) -> Iterator[None]:
    """The user's cache: graphs and kernels are made once for all processes of the tests, a minute for each build."""
    folder = request.config.cache.mkdir("kept")
    with mock.patch.dict(os.environ, {VARIABLE: str(folder)}):
        yield


def kept_folder(cache: pytest.Cache, what: str, version: str) -> Path:
    """The folder of what is kept for later runs too, of one version of its sources; those long unused are removed."""
    folder = cache.mkdir(f"{what}-{version}")
    folder.touch()
    for other in folder.parent.glob(f"{what}-*"):
        with contextlib.suppress(FileNotFoundError):  # the other processes of this run do so too
            if time.time() - other.stat().st_mtime > UNUSED:
                shutil.rmtree(other, ignore_errors=True)
    return folder


@pytest.fixture(scope="session", autouse=True)
def each_model_traced_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """What the exporter makes of a model is kept by its configuration and dtypes: ten seconds or more of each trace.

    It knows nothing of weights, and nothing else of a checkpoint.
    """
    import onnx_ir as ir
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    from arriero.graphs import trace

    export = trace._export
    version = key_of(source_hash("graphs/trace.py"), installed_versions(SHARED_PACKAGES))
    kept = kept_folder(request.config.cache, "traces", version)

    def remembered(module: Any, arguments: Any, shapes: Any, names: Any) -> ir.Model:
        parameters = [(name, str(one.dtype), list(one.shape)) for name, one in module.named_parameters()]
        described = repr((type(module).__name__, module.model.config, names))
        file = kept / f"{key_of(described, {'parameters': parameters})}.onnx"
        with locked(file):
            if not file.exists():
                model = export(module, arguments, shapes, names)
                for name, value in model.graph.initializers.items():  # none of them has a value: it is a meta tensor
                    value.const_value = ir.ExternalTensor("none", 0, 0, value.dtype, shape=value.shape, name=name)
                ClearMetadataAndDocStringPass()(model)
                ir.save(model, file.with_suffix(".partial"))
                file.with_suffix(".partial").rename(file)
        return ir.load(file)

    with mock.patch.object(trace, "_export", remembered):
        yield


@pytest.fixture(scope="session", autouse=True)
def kernels_compiled_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """Kernels of one version of their sources are compiled once for each architecture: half a minute each."""
    from arriero.export.compile import build_kernels

    compiled = build_kernels.build_kernels
    version = source_hash("export/compile/kernels", "export/compile/build_kernels.py")
    kept = kept_folder(request.config.cache, "objects", version[:12])

    def copied(architecture: str, out: Path) -> None:
        compiler = key_of(architecture, build_kernels.describe_compiler(architecture))
        file = kept / f"{architecture}-{compiler}.o"
        with locked(file):
            if not file.exists():
                compiled(architecture, file)
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, out)

    with mock.patch.object(build_kernels, "build_kernels", copied):
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: toys are too small for more, and beside other work a second thread costs seconds."""
    import torch  # not before the workers have set how many threads it has

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `scout` (checkpoint), `build.yaml` and `bundles/fp32`, `bundles/int8`. Read-only."""
    return made_once(tmp_path_factory, "workshop", make_workshop)


def make_workshop(folder: Path) -> None:
    """See `workshop`."""
    small_scout(folder / "scout")
    # The shipped profile but for its thresholds: random routers are undecided, and rounding turns their choices.
    rounded = shipped()["int8"].read_text().replace("router_agreement: 0.99", "router_agreement: 0.8")
    (folder / "int8.yaml").write_text(rounded)
    write_build(
        folder / "build.yaml", Path("scout"), profiles=workshop_profiles(folder), samples=8, answers="generated"
    )
    built = arriero("build", folder / "build.yaml")
    assert built.code == 0, built.err


@pytest.fixture(scope="session")
def tvm_workshop(workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `bundles/fp32` and `bundles/int8` of the workshop's `scout`, compiled for this machine.

    Keys and values are in float32, as other backends have them that they are compared with.
    """
    pytest.importorskip("tvm", reason="needs apache-tvm: pip install 'arriero[tvm]'")

    def make(folder: Path) -> None:
        profiles = workshop_profiles(workshop)
        file = write_build(folder / "build.yaml", workshop / "scout", profiles=profiles, samples=8, backend="tvm")
        file.write_text(file.read_text().replace("context:", "kv_cache: float32, context:"))
        built = arriero("build", file)
        assert built.code == 0, built.err

    return made_once(tmp_path_factory, "tvm-workshop", make)


def workshop_profiles(workshop: Path) -> tuple[str, str]:
    """The profiles of the workshop's targets, as any build file may name them."""
    return "fp32", str(workshop / "int8.yaml")
