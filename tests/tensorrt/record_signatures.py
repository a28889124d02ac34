"""Writes `signatures/*.json`: how what our code reaches of a library is called, read from its real Python bindings.

    python -m tests.tensorrt.record_signatures [NAME ..]

NAME is a key of `WHEELS`; without one all are written. pip downloads the wheels into a temporary folder, and they are
imported there, TensorRT's over empty stand-ins for its libraries: pybind11 keeps every signature in its docstrings, so
that nothing but the import is needed, and no GPU. Needs `gcc`, `nm` and `readelf`.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.tensorrt.reached import ROOT, cut, what_we_reach

HERE = Path(__file__).parent / "signatures"
# Name of the file written -> distribution and version, and the module to import.
WHEELS = {
    "tensorrt_10": ("tensorrt_cu13_bindings", "10.16.1.11", "tensorrt_bindings"),
    "tensorrt_11": ("tensorrt_cu13_bindings", "11.4.0.106", "tensorrt_bindings"),
    "tensorrt_rtx_1": ("tensorrt_rtx_cu13_bindings", "1.7.1.116", "tensorrt_rtx_bindings"),
    "cuda_12": ("cuda_bindings", "12.9.7", "cuda.bindings.runtime"),
    "cuda_13": ("cuda_bindings", "13.0.3", "cuda.bindings.runtime"),
}
HELPERS = ("cuda_pathfinder",)
LIBRARY = re.compile(r"\[(lib(?:nv|tensorrt)\w*\.so\.\d+)\]")
SYMBOLS = re.compile(r" U (\w*(?:INTERNAL|PluginRegistry|initLibNvInferPlugins|getNvOnnxParserVersion))$", re.MULTILINE)
OVERLOAD = re.compile(r"^\d+\. ", re.MULTILINE)


def main(names: list[str]) -> None:
    """Record versions, each in a process of its own: two majors cannot be imported together."""
    for name in names or WHEELS:
        distribution, version, module = WHEELS[name]
        with tempfile.TemporaryDirectory() as folder:
            download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
            subprocess.run([*download, f"{distribution}=={version}", *HELPERS], check=True)
            for wheel in Path(folder).glob("*.whl"):
                zipfile.ZipFile(wheel).extractall(folder)
            stand_in(Path(folder))
            one = [sys.executable, "-m", __spec__.name, "--one", name, folder, module, version]
            subprocess.run(one, check=True, cwd=ROOT)


def stand_in(folder: Path) -> None:
    """Put an empty library in the place of each that the bindings link to."""
    for bindings in folder.glob("tensorrt*_bindings/tensorrt*.so"):
        needs = subprocess.run(["readelf", "-d", bindings], capture_output=True, text=True, check=True).stdout
        symbols = subprocess.run(["nm", "-D", bindings], capture_output=True, text=True, check=True).stdout
        source = folder / "stand_in.c"
        source.write_text("".join(f"void* {name}() {{ return 0; }}\n" for name in SYMBOLS.findall(symbols)))
        for library in LIBRARY.findall(needs):
            target = bindings.parent / library
            subprocess.run(["gcc", "-shared", "-fPIC", f"-Wl,-soname,{library}", source, "-o", target], check=True)


def record(module: ModuleType, version: str) -> dict[str, Any]:
    """All enums, classes and functions of a module, each signature as one line of Python."""
    enums: dict[str, str] = {}
    classes: dict[str, Any] = {}
    functions: dict[str, list[str]] = {}
    for name, thing in sorted(vars(module).items()):
        if name.startswith("_") or (isinstance(thing, type) and thing.__name__ != name):
            continue
        if isinstance(thing, type) and hasattr(thing, "__members__"):
            enums[name] = _members(thing)
        elif isinstance(thing, ModuleType):
            continue
        elif isinstance(thing, type):
            classes[name] = describe_class(thing)
        elif callable(thing) and (found := signatures(thing)):
            functions[name] = found
    parts = {"enums": enums, "functions": functions, "classes": classes}
    return {"version": version} | {key: part for key, part in parts.items() if part}


def _members(enum: Any) -> str:
    """`NAME=number` for each member."""
    return " ".join(f"{name}={int(member)}" for name, member in enum.__members__.items())


def describe_class(thing: type) -> dict[str, Any]:
    """Bases, constructors, methods, properties (type read, type written) and nested enums of one class."""
    bases = [base.__name__ for base in thing.__bases__ if base.__name__ not in ("object", "pybind11_object")]
    methods, properties, enums = {}, {}, {}
    for name, member in sorted(vars(thing).items()):
        if isinstance(member, type) and hasattr(member, "__members__"):
            enums[name] = _members(member)
        elif name.startswith("_") and name != "__init__":
            continue
        elif isinstance(member, property):
            properties[name] = [_returns(member.fget), _takes(member.fset)]
        elif callable(member) or isinstance(member, staticmethod | classmethod):
            methods[name] = signatures(getattr(thing, name))
    methods = {name: forms for name, forms in methods.items() if forms}
    constructors = methods.pop("__init__", None)
    parts = {"bases": bases, "init": constructors, "methods": methods, "properties": properties, "enums": enums}
    return {key: value for key, value in parts.items() if value}


def signatures(function: Any) -> list[str]:
    """The forms in which a function may be called, each `(name: type = ..., ..) -> type`; `self` left out."""
    documented = inspect.getdoc(function) or ""
    name = getattr(function, "__name__", "")
    if "Overloaded function." in documented:
        forms = [form.split("\n")[0] for form in OVERLOAD.split(documented)[1:]]
    elif documented.startswith(f"{name}("):
        forms = [documented.split("\n")[0]]
    else:
        forms = []
    if forms and "->" in forms[0]:
        return [_tidy(form[form.index("(") :]) for form in forms]
    try:
        plain = inspect.signature(function)
    except (TypeError, ValueError):
        return []
    parameters = [p.replace(annotation=_plain(p.annotation), default=p.default) for p in plain.parameters.values()]
    return [_tidy(str(inspect.Signature(parameters)))]


def _plain(annotation: Any) -> Any:
    return annotation if isinstance(annotation, str) else inspect.Parameter.empty


def _tidy(form: str) -> str:
    """One signature with short type names, and every default as `...`."""
    short = re.sub(r"= <[^>]*>", "= ...", form)
    short = re.sub(r"(?:\w+::)+(\w+)", r"\1", short)
    short = re.sub(r"\w+<[^>]*>", "Any", short)  # a C++ template that pybind11 has no name for
    short = re.sub(r"\b(?:tensorrt\w*|typing\w*|collections|abc|numpy|np)\.(?=[\w])", "", short)
    short = re.sub(r"\b(?:tensorrt\w*|abc|collections)\.(?=[\w])", "", short)
    short = re.sub(r"'(\w+)'", r"\1", short)
    if re.search(r" = [^,()]+, \w+: [^=,]+(,|\))", short):
        # A default before an argument without one can never be left out by position: such a form has none.
        short = re.sub(r" = [^,()]+(?=,)", "", short)
    short = re.sub(r"\b(in|is|from)(?=: )", r"\1_", short)  # words of Python's own cannot be given by name anyway
    try:
        parsed = ast.parse(f"def f{short}: ...").body[0]
    except SyntaxError:
        raise SystemExit(f"cannot read the signature {form!r} (as {short!r})") from None
    assert isinstance(parsed, ast.FunctionDef)
    arguments = parsed.args
    arguments.defaults = [ast.Constant(...) for _ in arguments.defaults]
    arguments.args = [argument for argument in arguments.args if argument.arg != "self"]
    returns = f" -> {ast.unparse(parsed.returns)}" if parsed.returns else ""
    return f"({ast.unparse(arguments)}){returns}"


def _returns(getter: Any) -> str | None:
    told = (getattr(getter, "__doc__", None) or "").strip().split("\n")[0]
    return _tidy(told).partition(" -> ")[2] if told.startswith("(") and "->" in told else None


def _takes(setter: Any) -> str | None:
    told = (getattr(setter, "__doc__", None) or "").strip().split("\n")[0]
    if not told.startswith("(") or "->" not in told:
        return None
    parsed = ast.parse(f"def f{_tidy(told)}: ...").body[0]
    assert isinstance(parsed, ast.FunctionDef)
    annotation = parsed.args.args[-1].annotation
    return ast.unparse(annotation) if annotation else None


def record_one(name: str, folder: str, module: str, version: str) -> None:
    """Import one module from `folder` and write its file."""
    sys.path.insert(0, folder)
    loaded = importlib.import_module(module)
    found = record(loaded, version)
    if module == "tensorrt_bindings":
        sys.modules["tensorrt"] = loaded  # as the package calls it
        found["plugin"] = record(importlib.import_module(f"{module}.plugin"), version)
    kept = cut(found, what_we_reach())
    (HERE / f"{name}.json").write_text(as_text(kept) + "\n")
    print(name, {key: len(value) for key, value in kept.items() if key != "version"})


def as_text(part: Any, depth: int = 0) -> str:
    """JSON with a line for each name, and all its forms in that line."""
    if not isinstance(part, dict) or not part:
        return json.dumps(part)
    margin = " " * (depth + 1)
    lines = (f"{margin}{json.dumps(name)}: {as_text(inside, depth + 1)}" for name, inside in part.items())
    return "{\n" + ",\n".join(lines) + "\n" + " " * depth + "}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        record_one(*sys.argv[2:6])
    else:
        main(sys.argv[1:])
