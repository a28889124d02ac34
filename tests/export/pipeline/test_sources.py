"""A stage's key follows the sources that can change its result, and no others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from arriero.export.build_file.read import load_build
from arriero.export.pipeline import sources
from arriero.export.pipeline.sources import PACKAGE, closure, source_hash
from arriero.export.pipeline.stage_keys import stage_inputs
from arriero.export.pipeline.stages import key_of
from arriero.graphs.checkpoint import Checkpoint
from arriero.profiles.recipe import load_profile
from tests.command import write_build
from tests.small import small_scout

Keys = Callable[..., dict[str, str]]
TARGETS = ("fp32", "int4")


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Keys]:
    """The stages' keys of a build file, with the package's sources as they are, or one of them `edited`."""
    copy = tmp_path / "arriero"
    copy.mkdir()
    for folder in ("export", "graphs", "profiles", "runtimes", "errors.py", "version.py"):
        (copy / folder).symlink_to(PACKAGE / folder)
    checkpoint = Checkpoint.open(small_scout(tmp_path / "scout"))
    file = write_build(tmp_path / "build.yaml", Path("scout"), profiles=TARGETS, backend="tvm", answers="generated")
    build = load_build(file)
    profiles = {target.profile: load_profile(target.profile) for target in build.targets}
    read = Path.read_bytes

    def keys(edited: str | None = None) -> dict[str, str]:
        source_hash.cache_clear()
        monkeypatch.setattr(Path, "read_bytes", lambda path: read(path) + b"#" * (path == PACKAGE / (edited or "")))
        inputs = stage_inputs(build, checkpoint, "content", profiles)
        return {name: key_of(name, values) for name, values in inputs.items()}

    yield keys
    source_hash.cache_clear()


def changed(keys: Keys, edited: str) -> set[str]:
    """The stages that another text of the file `edited` sends to work again."""
    assert (PACKAGE / edited).is_file()
    before, after = keys(), keys(edited)
    return {name for name, key in after.items() if before[name] != key}


@pytest.mark.parametrize(
    "edited",
    [
        "runtimes/proof/page.html.jinja",
        "runtimes/proof/style.html.jinja",
        "runtimes/proof/plots.py",
        "runtimes/proof/pages.py",
        "export/machine/doctor.py",
        "export/cli/app.py",
        "export/cli/show_plan.py",
        "export/pipeline/plan.py",
    ],
)
def test_what_is_only_shown_changes_no_key(keys: Keys, edited: str) -> None:
    assert not changed(keys, edited)


def test_another_gptq_calibrates_anew_and_traces_nothing(keys: Keys) -> None:
    assert changed(keys, "profiles/gptq.py") == {"calibrate", "lower-int4", "rtn-int4", "parity-int4"}


@pytest.mark.parametrize(
    ("edited", "stages"),
    [
        ("export/compile/kernels/attention.h", {"kernels", "lower", "rtn", "parity"}),
        ("export/compile/relax/ops.py", {"lower", "rtn", "parity"}),
        ("graphs/lower/onnxruntime.py", set()),
        ("graphs/trace.py", {"graph", "lower", "rtn", "parity"}),
        ("export/proof/write_record.py", {"reference", "rtn", "parity"}),
        ("graphs/model.py", {"graph", "calibrate", "reference", "lower", "rtn", "parity"}),
        ("graphs/sources/gguf.py", {"graph", "calibrate", "reference", "lower", "rtn", "parity"}),
        (
            "graphs/sources/quantized/compressed_tensors.py",
            {"graph", "calibrate", "reference", "lower", "rtn", "parity"},
        ),
        ("runtimes/tvm.py", {"rtn", "parity"}),
        ("runtimes/proof/tally.py", {"reference", "rtn", "parity"}),
        ("runtimes/onnxruntime.py", set()),
    ],
)
def test_an_edit_reaches_the_stages_that_depend_on_it(keys: Keys, edited: str, stages: set[str]) -> None:
    assert {name.partition("-")[0] for name in changed(keys, edited)} == stages


def test_imports_for_types_alone_and_of_others_do_not_count() -> None:
    assert "runtimes/session.py" not in closure(("export/proof/walk_layers.py",))  # imported for types alone
    assert all((PACKAGE / name).is_file() for name in closure(("export/__main__.py",)))
    assert {"graphs/config.py", "errors.py"} <= closure(("graphs/trace.py",))


def test_a_folder_brings_what_its_modules_compile() -> None:
    assert {"export/compile/cuda/decode.h", "export/compile/cuda/experts.cu"} <= closure(("export/compile/cuda",))
    assert sources.path_of("numpy") is None
