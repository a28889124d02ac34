"""Jobs on the workers of a Dask cluster: the bytes of a build alone, whoever dies on the way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import threadpoolctl

from arriero.errors import ArrieroError, MachineLacks, Problems
from arriero.export.machine.memory_watch import MemoryWatch
from arriero.export.pipeline.stages import WorkDir
from tests.command import arriero
from tests.long.kill_build import prepare, result

dask = pytest.importorskip("dask", reason="needs Dask: pip install 'arriero[cluster]'")
distributed = pytest.importorskip("distributed", reason="needs Dask: pip install 'arriero[cluster]'")
from tests.export.cluster import striking  # noqa: E402


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two worker processes, each with a scratch folder of its own."""
    tmp_path = tmp_path_factory.mktemp("cluster")
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": ":0"}
    with distributed.LocalCluster(**options, local_directory=str(tmp_path / "scratch")) as started:
        yield started


@pytest.fixture
def client(cluster: Any) -> Iterator[Any]:
    with distributed.Client(cluster, set_as_default=False) as connected:
        yield connected


@pytest.fixture
def ours(cluster: Any, tmp_path: Path) -> Iterator[Any]:
    """The cluster as a build has it, which holds `tmp_path`/out."""
    from arriero.export.cluster.dask_cluster import DaskCluster

    with WorkDir(tmp_path / "out").locked(), DaskCluster(cluster.scheduler_address, tmp_path / "out") as connected:
        yield connected


def test_a_build_has_the_same_bytes_though_a_worker_dies(tmp_path: Path, cluster: Any, client: Any) -> None:
    alone, shared = prepare(tmp_path / "alone"), tmp_path / "shared"
    built = arriero("build", alone)
    assert built.code == 0, built.err
    shutil.copytree(tmp_path / "alone", shared, ignore=shutil.ignore_patterns("bundles"), copy_function=os.link)
    marks = tmp_path / "marks"
    marks.mkdir()
    client.register_plugin(striking.Strike(marks, 1, 2, "fp32"))
    built = arriero("build", shared / "build.yaml", "--workers", cluster.scheduler_address)
    client.unregister_worker_plugin("strike")
    assert built.code == 0, built.err
    assert f"2 workers at {cluster.scheduler_address}" in built.err
    expected, made = result(tmp_path / "alone" / "bundles"), result(shared / "bundles")
    assert sorted(name for name in {*made, *expected} if made.get(name) != expected.get(name)) == []
    assert any(name.endswith("/roundings.jsonl") for name in made)
    for what, job in (("rounding", "round-1-2"), ("lowering", "lower-fp32")):
        died = (marks / f"died-{what}").read_text()
        tried = {path.name.rpartition("-")[2] for path in marks.glob(f"{job}-*")}
        assert died in tried
        assert len(tried) == 2  # the one that died, and the one that did it
    workers = {path.name.rpartition("-")[2] for path in marks.glob("*-*-*")}
    assert str(os.getpid()) not in workers
    assert {"lower-fp32", "lower-small4"} == {path.name.rpartition("-")[0] for path in marks.glob("lower-*")}


def test_a_job_has_the_threads_that_it_has_here(ours: Any) -> None:
    """Dask gives its workers one; how many there are decides how a sum is split."""
    for threads in (1, 2):
        vars(ours).pop("_terms", None)
        with threadpoolctl.threadpool_limits(threads):
            waiting = [ours.submit(striking.count_threads, number) for number in range(3)]
        assert [list(results()) for results in waiting] == [[threads]] * 3


def test_errors_arrive_as_they_were_raised(ours: Any) -> None:
    with pytest.raises(ArrieroError, match=r"here: is odd; expected even\. Add 1\.") as caught:
        list(ours.submit(striking.refuse, 1)())
    assert (caught.value.what, caught.value.remedy, caught.value.exit_code) == ("is odd", "Add 1", 2)
    with pytest.raises(Problems, match=r"several: 2 problems"):
        list(ours.submit(striking.refuse, 2)())


def test_a_job_that_kills_its_workers_ends_the_build(tmp_path: Path) -> None:
    from arriero.export.cluster.dask_cluster import DaskCluster

    options = {"n_workers": 1, "threads_per_worker": 1, "processes": True, "dashboard_address": ":0"}
    with (
        dask.config.set({"distributed.scheduler.allowed-failures": 0}),
        distributed.LocalCluster(**options, local_directory=str(tmp_path)) as frail,
        WorkDir(tmp_path / "out").locked(),
        DaskCluster(frail.scheduler_address, tmp_path / "out") as connected,
        pytest.raises(MachineLacks, match=r"workers died at one job"),
    ):
        list(connected.submit(striking.always_die, 0)())


def test_what_a_job_held_counts_as_its_stages(ours: Any) -> None:
    with MemoryWatch() as memory:
        list(ours.submit(striking.take_memory, 1 << 30)())
    assert memory.peak > 1 << 30


def test_a_job_keeps_to_the_memory_budget(ours: Any) -> None:
    ours.memory = 1 << 20
    with pytest.raises(ArrieroError, match=r"budgets\.host_memory: a worker's job held .* and was stopped"):
        list(ours.submit(striking.take_memory, 64 << 20)())


def test_a_worker_that_would_compute_other_bytes_is_refused(ours: Any, client: Any) -> None:
    client.run(striking.pretend_other_code)
    with pytest.raises(MachineLacks, match=r"worker .*would not compute the bytes .*code 0123456789ab in the place of"):
        list(ours.submit(striking.count_threads, 0)())
    client.run(striking.pretend_no_more)
    assert list(ours.submit(striking.count_threads, 0)())


def test_a_worker_that_does_not_see_the_files_is_refused(ours: Any, tmp_path: Path) -> None:
    _ = ours._terms
    (tmp_path / "out" / ".work" / "lock").write_text("another build's")
    with pytest.raises(ArrieroError, match=r"does not see the build's folder .*out; .*Mount it at the same path"):
        list(ours.submit(striking.count_threads, 0)())


def test_a_scheduler_that_goes_away_is_the_machines_lack(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from arriero.export.cluster.dask_cluster import DaskCluster

    monkeypatch.setattr("arriero.export.cluster.dask_cluster.PATIENCE", 20)
    file = tmp_path / "scheduler.json"
    command = [sys.executable, "-m"]
    options = ["--port", "0", "--no-dashboard", "--host", "127.0.0.1", "--scheduler-file", str(file)]
    scheduler = subprocess.Popen([*command, "distributed.cli.dask_scheduler", *options])
    options = ["--nthreads", "1", "--no-nanny", "--local-directory", str(tmp_path), "--death-timeout", "30"]
    options += ["--scheduler-file", str(file)]
    worker = subprocess.Popen([*command, "distributed.cli.dask_worker", *options])
    try:
        while not file.exists() or not file.read_text():
            time.sleep(0.1)
        address = json.loads(file.read_text())["address"]
        with WorkDir(tmp_path / "out").locked(), DaskCluster(address, tmp_path / "out") as connected:
            waiting = connected.submit(striking.wait_for, tmp_path / "never")
            scheduler.kill()
            with pytest.raises(MachineLacks, match=r"the scheduler is gone .*the build goes on where it stopped"):
                list(waiting())
    finally:
        for process in (scheduler, worker):
            process.kill()
            process.wait()


def test_a_file_that_a_worker_lacks_is_named_with_the_worker(ours: Any, tmp_path: Path) -> None:
    with pytest.raises(ArrieroError, match=r"worker .*: lacks a file .*gone.*Mount what the build reads"):
        list(ours.submit(striking.read, tmp_path / "gone")())


@pytest.mark.parametrize("address", ["localhost:8786", "tcp://", "tcp://host", "http://host:80", "tcp://host:x"])
def test_an_address_that_is_none_is_refused(workshop: Path, address: str) -> None:
    refused = arriero("build", workshop / "build.yaml", "--workers", address)
    assert (refused.code, "is no scheduler's address; expected tcp://HOST:PORT" in refused.err) == (2, True)


def test_a_scheduler_that_is_not_there_is_the_machines_lack(workshop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arriero.export.cluster.dask_cluster.PATIENCE", 1)
    for command in ("build", "calibrate"):
        lacking = arriero(command, workshop / "build.yaml", "--workers", "tcp://127.0.0.1:9")
        assert (lacking.code, "no scheduler of a Dask cluster answers" in lacking.err) == (3, True), lacking.err


def test_one_machine_imports_nothing_of_dask(workshop: Path) -> None:
    """A build that is up to date, and what a calibration imports."""
    script = (
        "import sys; import arriero, arriero.export.calibration.calibrate, arriero.export.cli.app\n"
        "from arriero.export.pipeline import build\n"
        "print(sorted({'dask', 'distributed'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
