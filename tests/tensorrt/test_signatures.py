"""The recorded signatures against what is installed: the data were read from real bindings, and still are theirs."""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from arriero.errors import MachineLacks
from arriero.export.compile.nvidia.driver import open_driver
from arriero.runtimes import tensorrt_rtx
from arriero.runtimes.nvidia import cuda
from arriero.runtimes.nvidia.engine_signature import TYPES
from tests.tensorrt.reached import REFRESH, cut, what_we_reach
from tests.tensorrt.record_signatures import WHEELS, record
from tests.tensorrt.recorder import PRODUCTS, SIGNATURES, Form

RUNTIMES = Path(cuda.__file__).parent
NAMES = sorted(path.stem for path in SIGNATURES.glob("*.json"))


def read(name: str) -> dict:
    return json.loads((SIGNATURES / f"{name}.json").read_text())


def test_every_version_is_recorded():
    assert set(NAMES) == set(WHEELS)
    assert {name: read(name)["version"] for name in NAMES} == {name: wheel[1] for name, wheel in WHEELS.items()}


@pytest.mark.parametrize("name", NAMES)
def test_every_form_can_be_read(name):
    recorded = read(name)
    forms = []
    for section in (recorded, recorded.get("plugin", {})):
        forms += [form for forms in section.get("functions", {}).values() for form in forms]
        for described in section.get("classes", {}).values():
            forms += described.get("init", [])
            forms += [form for forms in described.get("methods", {}).values() for form in forms]
    assert len(forms) > 20
    for form in forms:
        Form.parse(form)


@pytest.mark.parametrize("name", PRODUCTS)
def test_every_type_of_a_signature_is_one_of_tensorrts(name):
    known = {entry.partition("=")[0] for entry in read(name)["enums"]["DataType"].split()}
    assert {word for word, _ in TYPES.values()} <= known


def test_the_installed_cuda_package_is_called_as_recorded():
    """Whatever version of the range is installed: the functions that we call take what they took."""
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings: pip install cuda-bindings")
    called = set(re.findall(r'"(cuda[A-Z]\w+)"', (RUNTIMES / "cuda.py").read_text()))
    called |= set(re.findall(r"runtime\.(cuda[A-Z]\w+)\(", (RUNTIMES / "cuda.py").read_text()))
    functions = {name for name in called if name in read("cuda_13")["functions"]}
    assert len(functions) >= 20
    for name in functions:
        expected = {tuple(Form.parse(read(major)["functions"][name][0]).arguments) for major in ("cuda_12", "cuda_13")}
        assert expected == {tuple(inspect.signature(getattr(runtime, name)).parameters)}, name
    for name in called - functions:  # attributes, kinds and errors
        assert any(hasattr(getattr(runtime, enum), name) for enum in read("cuda_13")["enums"]), name


def test_a_machine_without_driver_is_told_so_by_cuda_itself():
    pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings: pip install cuda-bindings")
    if open_driver() is not None:
        pytest.skip("needs a machine without NVIDIA's driver")
    with pytest.raises(
        MachineLacks, match=r"cudaGetDeviceCount failed: .*cudaErrorInsufficientDriver.*NVIDIA's driver"
    ):
        cuda.Device(cuda.load_cuda())


@pytest.fixture
def rtx():
    try:
        return tensorrt_rtx.PRODUCT.load()
    except MachineLacks as lack:
        pytest.skip(f"needs TensorRT for RTX: {lack}")


def test_the_installed_rtx_has_the_recorded_signatures(rtx):
    recorded = read("tensorrt_rtx_1")
    if rtx.__version__ != recorded["version"]:
        pytest.skip(f"needs TensorRT for RTX {recorded['version']}")
    assert cut(record(rtx, rtx.__version__), what_we_reach()) == recorded, f"Run: {REFRESH} tensorrt_rtx_1"


SCRIPT = """
import sys
from pathlib import Path
from arriero.runtimes import tensorrt_rtx
from arriero.runtimes.nvidia.engine import Engine
product = tensorrt_rtx.PRODUCT
try:
    Engine(Path(sys.argv[1]), "text", product, product.load(), None)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_the_installed_rtx_refuses_what_is_no_plan_in_its_own_words(rtx, tmp_path):
    """The real library, loaded as the backend loads it: its runtime, our logger, a mapped file, the reason."""
    (tmp_path / "text.engine").write_bytes(b"no plan at all" * 100)
    signature = {"inputs": [], "outputs": [], "profiles": [{"name": "decode", "ranges": {}}]}
    (tmp_path / "text.json").write_text(json.dumps(signature))
    # a process of its own: the library keeps the first logger that a process gives it
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, check=True)
    words = r"ArrieroError .*text\.engine: TensorRT for RTX 1\.\S+ does not take the plan: .*magicTag.*arriero build"
    assert re.match(words, done.stdout), done
