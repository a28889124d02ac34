"""Lowerings that other processes do: what they tell reaches whoever watches the build."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from arriero.export.build_file.read import load_build
from arriero.export.compile import no_watch
from arriero.export.machine.jobs import Told
from arriero.export.pipeline.build import Build
from arriero.export.pipeline.lower_ahead import Lowerings, LowerJob
from tests.command import write_build
from tests.small import small_scout


def elsewhere(function: Callable[[Any], Iterator[Any]], job: LowerJob) -> Callable[[], Iterator[Any]]:
    """A worker's part: its build is a copy that nobody watches."""

    def lower(folder: Path) -> set[str]:
        worker.build.tell("weights/text.bin: it is made again")
        return {"text.onnx"}

    worker = SimpleNamespace(build=SimpleNamespace(tell=pickle.loads(pickle.dumps(Told()))), lower=lower)
    return lambda: function(LowerJob(worker, job.folder))  # type: ignore[arg-type]


def test_what_a_worker_tells_is_told_by_the_build(tmp_path: Path) -> None:
    told: list[str] = []
    target: Any = SimpleNamespace(
        build=SimpleNamespace(tell=told.append), target=SimpleNamespace(name="a", backend="onnxruntime")
    )
    assert Lowerings(elsewhere).files(target, tmp_path) == {"text.onnx"}
    assert told == ["weights/text.bin: it is made again"]


def test_a_build_that_is_sent_keeps_what_it_would_tell(tmp_path: Path) -> None:
    small_scout(tmp_path / "scout", vision=False)
    file = write_build(tmp_path / "build.yaml", Path("scout"), "text")
    build = Build(load_build(file), str(file), no_watch, tell=print)
    sent = pickle.loads(pickle.dumps(build))
    sent.tell("something")
    assert sent.tell == ["something"]
    assert pickle.loads(pickle.dumps(build)).tell == []
