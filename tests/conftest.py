"""One small multimodal build, made once by the real command and read by every test that needs a whole bundle."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from arriero.profiles.recipe import shipped
from tests.command import arriero, write_build
from tests.machines.machine_class import describe_machine
from tests.shared import WORKER, kept_kernels, made_once
from tests.small import small_scout

if WORKER:  # the workers share the cores; threads of linear algebra beyond that would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put whole builds, the slowest tests, first: else one worker ends the run with them while the others wait."""
    items.sort(key=lambda item: item.path.parent != Path(__file__).parent)


def pytest_report_header() -> str:
    """The line that says on which class of machine the tests run."""
    return describe_machine()


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
    write_build(folder / "build.yaml", Path("scout"), profiles=workshop_profiles(folder), samples=8)
    built = arriero("build", folder / "build.yaml")
    assert built.code == 0, built.err


@pytest.fixture(scope="session")
def tvm_workshop(request: pytest.FixtureRequest, workshop: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `bundles/fp32` and `bundles/int8` of the workshop's `scout`, compiled for this machine."""
    pytest.importorskip("tvm", reason="needs apache-tvm: pip install 'arriero[tvm]'")

    def make(folder: Path) -> None:
        profiles = workshop_profiles(workshop)
        file = write_build(folder / "build.yaml", workshop / "scout", profiles=profiles, samples=8, backend="tvm")
        with kept_kernels(request.config.cache, folder / "bundles" / ".work"):
            built = arriero("build", file)
        assert built.code == 0, built.err

    return made_once(tmp_path_factory, "tvm-workshop", make)


def workshop_profiles(workshop: Path) -> tuple[str, str]:
    """The profiles of the workshop's targets, as any build file may name them."""
    return "fp32", str(workshop / "int8.yaml")
