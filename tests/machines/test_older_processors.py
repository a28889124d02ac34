"""What must hold on every x86-64 machine class, on processors older than this one: its newer features are hidden."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from arriero.export.compile import build_kernels
from arriero.runtimes.cpu import cpu_features
from tests.machines.hidden import MACHINES, OlderMachine, older_machine_or_skip

TESTS = Path(__file__).parents[1]
# Each class with the level of our kernels there, and with the processor that `cpu: native` compiles for.
CHOSEN = {
    "AVX2": ("avx2", "x86-64-v3"),
    "AVX-512 without VNNI": ("avx2", "x86-64-v3"),
    "AVX-512 VNNI": ("avx512vnni", "x86-64-v4-vnni"),
}
NEEDS = {"AVX2": "avx2", "AVX-512 without VNNI": "avx512f", "AVX-512 VNNI": "avx512_vnni"}


def machine(name: str, folder: Path) -> OlderMachine:
    """Such a machine, on a processor that has what it has."""
    if NEEDS[name] not in cpu_features():
        pytest.skip(f"needs a processor with {NEEDS[name]}")
    return older_machine_or_skip(name, folder)


def run_tests(file: str, words: str, name: str, folder: Path) -> str:
    """Run the tests of `file`, wherever it lies, that -k's `words` name, on such a machine; pytest's closing line."""
    on, hidden = machine(name, folder), tuple(MACHINES[name].split(","))
    if not any(feature.startswith(hidden) for feature in cpu_features()):
        pytest.skip(f"needs a newer processor than {name}: this one is of that class, and {file} runs on it as it is")
    (path,) = TESTS.rglob(file)
    done = on.run(sys.executable, "-m", "pytest", "-q", str(path), "-k", words, cwd=TESTS.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()[-1]


@pytest.mark.parametrize("name", MACHINES)
def test_integer_products_are_exact_on(name: str, tmp_path: Path) -> None:
    assert run_tests("test_integer_products.py", "exact", name, tmp_path).startswith("2 passed")


@pytest.mark.parametrize(
    ("file", "words"),
    [
        ("test_lower_tensorrt.py", "static_eight_bits and scout"),
        ("test_lower_eight_bits.py", "what_the_scheme_says and scout"),
        ("test_lower_onnxruntime.py", "int8_differs and scout"),
    ],
)
def test_lowered_graphs_compute_on_avx2_what_their_scheme_says(file: str, words: str, tmp_path: Path) -> None:
    assert " passed" in run_tests(file, words, "AVX2", tmp_path)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of our kernels, every level of x86-64 in it."""
    path = tmp_path_factory.mktemp("kernels") / "kernels.so"
    build_kernels.build_kernels("x86_64", path.with_suffix(".o"))
    build_kernels.link_shared(path.with_suffix(".o"), path)
    return path


@pytest.mark.parametrize("name", MACHINES)
def test_kernels_and_compiler_choose_the_level_of(name: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    script = f"""
from pathlib import Path
from tests.call_kernels import Kernels
from arriero.export.compile.cpus import native
print(Kernels(Path({str(request.getfixturevalue("kernels"))!r})).level(), native())
"""
    done = machine(name, tmp_path).run(sys.executable, "-c", script, cwd=TESTS.parent)
    assert done.returncode == 0, done.stderr
    assert tuple(done.stdout.split()) == CHOSEN[name]
