"""The plugins through TensorRT's own Python code, of both majors: shapes, types, launches, arguments; no engine.

The bindings are a heavy download, and of two majors only one can be installed: what is not installed is looked for in
the folders of $ARRIERO_TENSORRT_BINDINGS, unpacked wheels separated by colons.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from arriero.errors import MachineLacks
from arriero.export.compile.cuda.build_cuda_kernels import find_nvcc
from arriero.export.compile.cuda.launch import SCALARS, SHAPES, Kernel

PROBE = Path(__file__).parents[2] / "tensorrt_probe.py"
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
SYMBOLS = (
    "createInferBuilder_INTERNAL createInferRefitter_INTERNAL createInferRuntime_INTERNAL getPluginRegistry "
    "createNvOnnxParserRefitter_INTERNAL createNvOnnxParser_INTERNAL getBuilderPluginRegistry initLibNvInferPlugins "
    "getNvOnnxParserVersion"
).split()
TYPES = {"f16": "HALF", "bf16": "BF16"}
TOKENS, EXPERTS, HIDDEN, FFN = 150, 6, 256, 192
GROUPS = {"int8": 64, "fp8": 64, "int4": 128}  # weights in 16 words

# op, form, activation, experts per token, block, whether the kernels are compiled
WALKS = [
    ("gate_up", "int4", "f16", 1, 64, True),
    ("down", "fp8", "f16", 2, 0, True),
    ("gate_up", "int8", "f16", 1, 0, True),
    ("gate_up", "exact", "bf16", 2, 0, False),
    ("gate_up", "fp8", "f16", 1, 0, False),
    ("down", "exact", "f16", 1, 0, False),
    ("down", "int8", "f16", 1, 0, False),
    ("down", "int4", "bf16", 1, 32, False),
    ("down", "int4", "f16", 3, 32, False),
]


def folders() -> dict[int, Path]:
    """Major -> a folder with its bindings."""
    found = {}
    spec = importlib.util.find_spec("tensorrt_bindings")
    places = [Path(spec.origin).parents[1]] if spec and spec.origin else []
    places += map(Path, filter(None, os.environ.get("ARRIERO_TENSORRT_BINDINGS", "").split(":")))
    for place in places:
        version = re.search(r'^__version__ = "(\d+)', (place / "tensorrt_bindings/__init__.py").read_text(), re.M)
        found.setdefault(int(version[1]), place)
    return found


@pytest.fixture(scope="module", params=[10, 11])
def probe(request, tmp_path_factory):
    """Asks TensorRT of one major."""
    major = request.param
    if major not in folders():
        pytest.skip(
            f"needs TensorRT {major}'s bindings: pip install 'tensorrt_cu13_bindings=={major}.*', "
            "or its unpacked wheel's folder in $ARRIERO_TENSORRT_BINDINGS"
        )
    stubs = tmp_path_factory.mktemp("stubs")
    source = "".join(f"void* {symbol}() {{ return 0; }}\n" for symbol in SYMBOLS)
    for library in LIBRARIES:
        name = f"lib{library}.so.{major}"
        command = ["gcc", "-x", "c", "-shared", "-fPIC", f"-Wl,-soname,{name}", "-", "-o", str(stubs / name)]
        subprocess.run(command, input=source, text=True, check=True)

    def ask(requests: list[dict]) -> list[dict]:
        done = subprocess.run(
            [sys.executable, str(PROBE), str(folders()[major])],
            input=json.dumps(requests),
            capture_output=True,
            text=True,
            env={**os.environ, "LD_LIBRARY_PATH": str(stubs)},
        )
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout.splitlines()[-1])
        assert answer["version"].startswith(f"{major}.")
        return answer["answers"]

    return ask


def inputs(op: str, form: str, activation: str, choices: int, block: int) -> list[list]:
    """Shapes and types of a node's inputs; the number of tokens, negative, may vary."""
    outputs, features = (2 * FFN, HIDDEN) if op == "gate_up" else (HIDDEN, FFN)
    kind = TYPES[activation]
    row, stored = (features, kind) if form == "exact" else (-(-features // GROUPS[form]) * 16, "INT32")
    scales = [1] if form == "exact" else [EXPERTS, outputs, *([features // block] if block else [])]
    x = [-TOKENS, HIDDEN] if op == "gate_up" else [-TOKENS * choices, FFN]
    routed = [[[-TOKENS, choices], "INT32"], *([[[-TOKENS, choices], "FLOAT"]] if op == "gate_up" else [])]
    return [[x, kind], *routed, [[EXPERTS, outputs, row], stored], [scales, "FLOAT"]]


def request(op: str, form: str, activation: str, choices: int, block: int, compiles: bool) -> dict:
    node = {"gate_up": "ExpertGateUp", "down": "ExpertDown"}[op]
    return {"op": node, "form": form, "inputs": inputs(op, form, activation, choices, block), "compiles": compiles}


def test_tensorrt_is_told_what_the_kernels_expect(probe):
    try:
        find_nvcc()
        walks = WALKS
    except MachineLacks:
        walks = [walk for walk in WALKS if not walk[-1]]
    answers = probe([request(*walk) for walk in walks])
    for (op, form, activation, choices, block, compiles), told in zip(walks, answers, strict=True):
        assert "error" not in told, told
        given = inputs(op, form, activation, choices, block)
        width = FFN if op == "gate_up" else HIDDEN
        rows = TOKENS * choices if op == "gate_up" else TOKENS
        assert told["output"] == [f"DataType.{TYPES[activation]}", [rows, width]]
        assert told["types"] == [f"DataType.{kind}" for _, kind in given] + [f"DataType.{TYPES[activation]}"]
        assert told["formats"] == ["TensorFormat.LINEAR"]
        assert len(told["tactics"]) == len(SHAPES)
        for shape, tactic in zip(SHAPES, told["tactics"], strict=True):
            kernel = Kernel(op, shape, activation, form)
            x, y = kernel.grid(TOKENS, choices, EXPERTS, HIDDEN, FFN)
            assert tactic["kernel"] == kernel.name
            # the emulation hands arrays over in this order, and gets right results
            assert tuple(told["names"]) == kernel.arrays
            assert tactic["launch"] == {
                "grid_x": x,
                "grid_y": y,
                "grid_z": 1,
                "block_x": kernel.threads,
                "block_y": 1,
                "block_z": 1,
                "shared_mem": 0,
            }
            sizes = {
                "tokens": TOKENS,
                "choices": choices,
                "experts": EXPERTS,
                "hidden": HIDDEN,
                "ffn": FFN,
                "block": block,
            }
            assert tactic["scalars"] == [sizes[name] for name in SCALARS]
            if not compiles:
                assert tactic["ptx"] == f"{kernel.name} for sm_89"
                continue
            # TensorRT passes the inputs, then the scalars, then the result
            entry = re.search(rf"\.visible \.entry {kernel.name}\(([^)]*)\)", tactic["ptx"])
            parameters = re.findall(r"\.param \.(\w+)", entry[1])
            assert parameters == ["u64"] * len(given) + ["u32"] * len(tactic["scalars"]) + ["u64"]
            assert told["hashes"][kernel.name] == hashlib.sha256(tactic["ptx"].encode()).hexdigest()
        assert len(told["hashes"]) == len(SHAPES)


def changed(base: dict, place: int, sizes: list[int] | None = None, kind: str | None = None) -> dict:
    """The request with another shape or type of one input."""
    made = json.loads(json.dumps(base))
    made["inputs"][place] = [sizes or made["inputs"][place][0], kind or made["inputs"][place][1]]
    return made


def test_what_the_kernels_do_not_compute_is_refused(probe):
    gate_up, down = request("gate_up", "int8", "f16", 1, 0, False), request("down", "int4", "f16", 1, 32, False)
    refusals = [
        (
            changed(gate_up, 0, kind="FLOAT"),
            "ExpertGateUp: the type of its activations is FLOAT; expected HALF beside int8.",
        ),
        (
            changed(gate_up, 0, kind="BF16"),
            "ExpertGateUp: the type of its activations is BF16; expected HALF beside int8.",
        ),
        (
            changed(down, 0, kind="INT8"),
            "ExpertDown: the type of its activations is INT8; expected HALF or BF16 beside int4.",
        ),
        (changed(gate_up, 1, kind="INT64"), "ExpertGateUp: the type of expert_id is INT64; expected INT32."),
        (changed(gate_up, 3, kind="INT8"), "ExpertGateUp: the type of int8 weights is INT8; expected INT32."),
        (changed(gate_up, 2, kind="HALF"), "ExpertGateUp: the type of score is HALF; expected FLOAT."),
        (changed(gate_up, 0, [-TOKENS, -HIDDEN]), "arriero: the size of x along axis 1 is not known"),
        (changed(gate_up, 0, [-TOKENS, 40]), "ExpertGateUp: the hidden size is 40; expected a multiple of 16."),
        (changed(down, 3, [EXPERTS, HIDDEN, 12]), "ExpertDown: blocks of 16 weights per scale; expected one of 32"),
        (
            changed(gate_up, 3, [EXPERTS, 2 * FFN, HIDDEN]),
            "ExpertGateUp: the shape of int8 weights is [6, 384, 256]; exp",
        ),
        (changed(gate_up, 4, [EXPERTS, FFN]), "ExpertGateUp: the shape of scales is [6, 192]; expected [6, 384]."),
        ({**down, "form": "fp4"}, "ExpertDown: there is no CUDA kernel for weights in 'fp4'; expected exact, int8"),
        ({**down, "form": "int8"}, "ExpertDown: a block of 32; expected 0: int8 has none"),
    ]
    for (_, message), told in zip(refusals, probe([asked for asked, _ in refusals]), strict=True):
        assert told.get("error", "no refusal").startswith(message)


def test_without_tensorrt_the_remedy_is_told(monkeypatch):
    from arriero.export.compile.cuda.plugin import register_plugins

    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MachineLacks, match=r"TensorRT cannot be imported.*pip install 'arriero\[tensorrt\]'"):
        register_plugins("sm_89")


def test_a_tensorrt_without_compiled_plugins_is_refused(monkeypatch, tmp_path):
    from arriero.export.compile.cuda.plugin import register_plugins

    package = tmp_path / "tensorrt"
    (package / "plugin").mkdir(parents=True)
    (package / "__init__.py").write_text('__version__ = "10.3.0"\n')
    (package / "plugin" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("tensorrt", "tensorrt.plugin"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(MachineLacks, match=r"TensorRT 10\.3\.0 has no plugins compiled ahead of time"):
        register_plugins("sm_89")
    for name in ("tensorrt", "tensorrt.plugin"):
        sys.modules.pop(name, None)


def test_importing_the_plugins_needs_no_tensorrt():
    heavy = "{'tensorrt', 'torch', 'onnx'}"
    script = f"import sys, arriero.export.compile.cuda.plugin; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
