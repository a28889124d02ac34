"""The stages `lower-*` as jobs: this process lowers one target at a time, a cluster's workers several.

A worker gets the build as it stands, without those who watch it; graph, calibration and kernels are finished by then.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from arriero.export.machine.jobs import Told, do_here
from arriero.traits import TRAITS

if TYPE_CHECKING:
    from arriero.export.machine.jobs import Submit
    from arriero.export.pipeline.target_build import TargetBuild

BUSY = "busy"  # a file that whoever writes into a stage's folder holds


@dataclass(frozen=True)
class LowerJob:
    """A target to be lowered into a folder."""

    target: TargetBuild
    folder: Path


@dataclass(frozen=True)
class Lowered:
    """The names of the files of a lowered target, and what the build was not told meanwhile."""

    files: set[str]
    told: Sequence[str]


def lower_target(job: LowerJob) -> Iterator[Lowered]:
    """Lower a target.

    Whoever does it holds the folder: a worker that is taken for dead may still be writing when its successor begins.
    """
    with (job.folder / BUSY).open("a") as busy:
        fcntl.flock(busy, fcntl.LOCK_EX)
        files = job.target.lower(job.folder)
        tell = job.target.build.tell
        yield Lowered(files, tell if isinstance(tell, Told) else ())


class Lowerings:
    """The lowerings of a build's targets, each asked of `submit` once."""

    def __init__(self, submit: Submit) -> None:
        self.submit = submit
        self._asked: dict[str, Callable[[], Iterator[Lowered]]] = {}

    def ask_ahead(self, targets: Sequence[TargetBuild]) -> None:
        """Have those of `targets` lowered by others for which nothing else is to be done before."""
        if self.submit is do_here:
            return
        for target in targets:
            if not target.is_lowered and target.may_be_lowered:
                try:
                    target.prepare_lowering()
                except Exception:  # the build remembers it, and the target's own turn ends with it
                    continue
                self._ask(target, target.lowering_folder)

    def files(self, target: TargetBuild, folder: Path) -> set[str]:
        """The names of the files of a target that is lowered now, or was asked for ahead, in its stage's `folder`."""
        self._ask(target, folder)
        (lowered,) = self._asked.pop(target.target.name)()
        for sentence in lowered.told:
            target.build.tell(sentence)
        return lowered.files

    def _ask(self, target: TargetBuild, folder: Path) -> None:
        name = target.target.name
        if name not in self._asked:
            # an engine is compiled on the GPU that it is for
            submit = do_here if TRAITS[target.target.backend].compiles_for == "gpu" else self.submit
            self._asked[name] = submit(lower_target, LowerJob(target, folder))
