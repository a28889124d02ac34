"""A stand-in for NVIDIA's Python modules: it takes what the recorded signatures take, refuses the rest, notes calls.

It computes nothing: what a call gives is set with `answer`, else it is an empty value of the recorded return type. What
it proves is that a program calls what exists in one version, with the right names, counts, enums and kinds of objects;
not that the real library, or a GPU, would do what the caller hopes.
"""

from __future__ import annotations

import ast
import enum
import functools
import inspect
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from tests.tensorrt.reached import REFRESH

SIGNATURES = Path(__file__).parent / "signatures"
PRODUCTS = ("tensorrt_10", "tensorrt_11", "tensorrt_rtx_1")
# Types of Python's own that signatures name, and what pybind11 takes for one of them or turns into it.
PLAIN = {"bool": bool, "str": (str, bytes), "tuple": tuple, "list": list}
CONVERTED = {"Dims": (tuple, list)}


class Refused(TypeError):
    """A call that the recorded version does not take."""


class Absent(AttributeError):
    """A name that the recorded version does not have, as far as it is recorded."""

    def __init__(self, message: str) -> None:
        super().__init__(f"{message}. What the sources reach since it was recorded is added by `{REFRESH}`")


@dataclass(frozen=True)
class Call:
    """One call: `Class.method`, `Class.property=` or `function`; the object, and the arguments by name."""

    name: str
    on: Any
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Form:
    """One signature: argument name -> (type, whether it may be left out), and the type that comes back."""

    text: str
    arguments: dict[str, tuple[str | None, bool]]
    returns: str | None

    @classmethod
    @functools.cache
    def parse(cls, text: str) -> Form:
        """Read `(name: type=..., ..) -> type`."""
        function = ast.parse(f"def f{text}: ...").body[0]
        assert isinstance(function, ast.FunctionDef)
        required = len(function.args.args) - len(function.args.defaults)
        arguments = {
            argument.arg: (ast.unparse(argument.annotation) if argument.annotation else None, number >= required)
            for number, argument in enumerate(function.args.args)
        }
        return cls(text, arguments, ast.unparse(function.returns) if function.returns else None)

    def bind(self, given: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Any] | str:
        """The arguments by name, or what is wrong with their names and count."""
        if len(given) > len(self.arguments):
            return f"{len(given)} arguments are too many"
        bound = dict(zip(self.arguments, given, strict=False))
        for name, value in named.items():
            if name not in self.arguments:
                return f"there is no argument {name!r}"
            if name in bound:
                return f"{name!r} is given twice"
            bound[name] = value
        missing = [name for name, (_, optional) in self.arguments.items() if not optional and name not in bound]
        return f"{', '.join(missing)} missing" if missing else bound


class Recorder:
    """The module of one recorded version (`module`), and every call that was made on it (`calls`)."""

    def __init__(self, name: str) -> None:
        """Read `signatures/<name>.json`."""
        self.recorded = json.loads((SIGNATURES / f"{name}.json").read_text())
        self.functions: dict[str, list[str]] = self.recorded.get("functions", {})
        self.version: str = self.recorded["version"]
        self.title = f"{name.rpartition('_')[0]} {self.version}"
        self.calls: list[Call] = []
        self.answers: dict[str, Any] = {}
        self.types: dict[str, type] = {}
        self.module = self._module(name)

    def answer(self, name: str, value: Any) -> None:
        """Let `Class.method`, `Class.property` or `function` give `value`, or what it gives when called.

        A function gets the object (for a module's function nothing) and the arguments by name.
        """
        owner, _, member = name.rpartition(".")
        if owner:
            described = self._classes[owner]
            known = [*described.get("methods", ()), *described.get("properties", ())]
            assert member in known, f"{name} is not in {self.title}"
        else:
            assert member in self.functions, f"{name} is not in {self.title}"
        self.answers[name] = value

    def make(self, class_name: str) -> Any:
        """An object of a recorded class, as the library would give it."""
        cls = self.types[class_name]
        return cls.__new__(cls)

    def named(self, name: str) -> list[Call]:
        """The calls of one name, in order."""
        return [call for call in self.calls if call.name == name]

    def members(self, class_name: str, kind: str) -> dict[str, Any]:
        """Methods or properties of a class and its bases."""
        found: dict[str, Any] = {}
        described = self._classes.get(class_name, {})
        for base in described.get("bases", ()):
            found |= self.members(base, kind)
        return found | described.get(kind, {})

    # --- building the module

    def _module(self, name: str) -> ModuleType:
        module = _Module(name.rpartition("_")[0])
        module.__dict__["_title"] = self.title
        module.__dict__["__version__"] = self.version
        for enum_name, members in self.recorded["enums"].items():
            self.types[enum_name] = self._enum(enum_name, members)
        for class_name in self._classes:
            self._class(class_name)
        module.__dict__.update(self.types)
        for function, forms in self.functions.items():
            module.__dict__[function] = functools.partial(self._call, function, forms, None)
        return module

    def _enum(self, name: str, members: str) -> type:
        entries = (entry.partition("=") for entry in members.split())
        made = _Enum(name, [(member, int(number)) for member, _, number in entries])
        made._title = self.title  # type: ignore[attr-defined]
        return made

    def _class(self, name: str) -> type:
        if name in self.types:
            return self.types[name]
        described = self._classes[name]
        bases = tuple(self._class(base) for base in described.get("bases", ()) if base in self._classes)
        if name == "IHostMemory":
            bases = (_Object, bytearray)  # the real one offers its memory as a buffer
        body: dict[str, Any] = {"_recorder": self, "_class": name}
        for method, forms in described.get("methods", {}).items():
            body[method] = self._method(f"{name}.{method}", forms)
        for member, (reads, writes) in described.get("properties", {}).items():
            body[member] = self._property(name, member, reads, writes)
        if name == "Dims":
            body |= {"__len__": lambda s: len(s.sizes), "__getitem__": lambda s, i: s.sizes[i], "sizes": ()}
        for inner, members in described.get("enums", {}).items():
            body[inner] = self._enum(inner, members)
        if init := described.get("init"):
            body["__init__"] = self._init(name, init)
        cls = type(name, bases or (_Object,), body)
        self.types[name] = cls
        return cls

    @property
    def _classes(self) -> dict[str, Any]:
        classes: dict[str, Any] = self.recorded.get("classes", {})
        return classes

    def _init(self, name: str, forms: Sequence[str]) -> Callable[..., None]:
        def init(this: Any, *given: Any, **named: Any) -> None:
            if forms == ["(self, /, *args, **kwargs)"]:
                raise Refused(f"{self.title}: {name} has no constructor")
            bound = self._bind(name, forms, given, named)[0]
            this.__dict__["_given"] = bound
            if name == "Dims":
                this.__dict__["sizes"] = tuple(map(int, bound.get("shape", ())))
            self.calls.append(Call(name, this, bound))

        return init

    def _method(self, name: str, forms: Sequence[str]) -> Callable[..., Any]:
        def method(this: Any, *given: Any, **named: Any) -> Any:
            return self._call(name, forms, this, *given, **named)

        return method

    def _property(self, owner: str, name: str, reads: str | None, writes: str | None) -> property:
        full = f"{owner}.{name}"

        def get(this: Any) -> Any:
            if name in this.__dict__:
                return this.__dict__[name]
            if full in self.answers:
                value = self.answers[full]
                return value(this) if callable(value) else value
            return self._empty(reads)

        def put(this: Any, value: Any) -> None:
            assert writes is not None
            if wrong := self._wrong(value, writes):
                raise Refused(f"{self.title}: {full} takes {writes}: {wrong}")
            self.calls.append(Call(f"{full}=", this, {"value": value}))
            this.__dict__[name] = value

        return property(get if reads or not writes else None, put if writes else None)

    # --- calls

    def _call(self, name: str, forms: Sequence[str], this: Any, /, *given: Any, **named: Any) -> Any:
        bound, form = self._bind(name, forms, given, named)
        self.calls.append(Call(name, this, bound))
        if name in self.answers:
            value = self.answers[name]
            if not callable(value):
                return value
            return value(**bound) if this is None else value(this, **bound)
        return self._empty(form.returns)

    def _bind(
        self, name: str, forms: Sequence[str], given: tuple[Any, ...], named: Mapping[str, Any]
    ) -> tuple[dict[str, Any], Form]:
        problems = []
        for text in forms:
            form = Form.parse(text)
            bound = form.bind(given, named)
            if isinstance(bound, str):
                problems.append(f"{text}: {bound}")
                continue
            wrong = {
                argument: found
                for argument, value in bound.items()
                if (found := self._wrong(value, *form.arguments[argument]))
            }
            if not wrong:
                return bound, form
            problems.append(f"{text}: " + "; ".join(f"{argument} {found}" for argument, found in wrong.items()))
        raise Refused(f"{self.title}: {name} does not take this call. " + " | ".join(problems))

    def _wrong(self, value: Any, kind: str | None, optional: bool = False) -> str | None:
        """What makes `value` no `kind`; None when it is one."""
        if kind is None or kind == "object" or (value is None and optional):
            return None
        described = f"is {value!r} ({type(value).__name__}), not {kind}"
        if kind == "SupportsInt":
            return None if _is_integer(value) else described
        if kind == "Buffer":
            return None if _is_buffer(value) else described
        if kind.startswith("Sequence["):
            if not isinstance(value, list | tuple | np.ndarray):
                return described
            element = kind.removeprefix("Sequence[")[:-1]
            return next((f"holds one that {wrong}" for one in value if (wrong := self._wrong(one, element))), None)
        if kind in PLAIN:
            return None if isinstance(value, PLAIN[kind]) else described
        if isinstance(value, CONVERTED.get(kind, ())):
            return None
        recorded = self._type(kind)  # of a type that is not recorded there is no object
        return None if recorded and isinstance(value, recorded) else described

    def _type(self, kind: str) -> type | None:
        owner, _, inner = kind.rpartition(".")
        found = getattr(self.types.get(owner), inner, None) if owner else self.types.get(kind)
        return found if isinstance(found, type) else None

    def _empty(self, kind: str | None) -> Any:
        plain = {"int": 0, "bool": True, "str": ""}
        if kind in plain:
            return plain[kind]
        recorded = self._type(kind) if kind else None
        if recorded is None:
            return None
        return next(iter(recorded)) if issubclass(recorded, enum.Enum) else recorded.__new__(recorded)


class _Module(ModuleType):
    def __getattr__(self, name: str) -> Any:
        raise Absent(f"{self.__dict__.get('_title')} has no {name}")


class _EnumType(enum.EnumMeta):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        raise Absent(f"{getattr(cls, '_title', '')} has no {cls.__name__}.{name}")


class _Enum(enum.Enum, metaclass=_EnumType):
    """Like pybind11's enums: numbers only when asked."""

    def __int__(self) -> int:
        return int(self.value)

    __index__ = __int__


class _Object:
    """Base of all recorded classes: unknown attributes are refused, on reading and on writing."""

    _recorder: Recorder
    _class: str

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "_class" in vars(cls):
            return
        # a class of the caller's: what it overrides must exist, with as many arguments
        known = cls._recorder.members(cls._class, "methods")
        for name, function in vars(cls).items():
            if name.startswith("_") or not inspect.isfunction(function):
                continue
            if name not in known:
                raise Absent(f"{cls._recorder.title}: {cls._class} has no method {name} to override")
            wanted = len(Form.parse(known[name][0]).arguments)
            takes = len(inspect.signature(function).parameters) - 1
            if takes != wanted:
                raise Refused(
                    f"{cls._recorder.title}: {cls._class}.{name} takes {known[name][0]}, not {takes} arguments"
                )

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise Absent(f"{self._recorder.title}: {self._class} has no {name}")

    def __setattr__(self, name: str, value: Any) -> None:
        member = getattr(type(self), name, None)
        if isinstance(member, property):
            if member.fset is None:
                raise Absent(f"{self._recorder.title}: {self._class}.{name} cannot be set")
            member.fset(self, value)
        elif "_class" in vars(type(self)):
            raise Absent(f"{self._recorder.title}: {self._class} has no {name} to set")
        else:
            object.__setattr__(self, name, value)


def _is_integer(value: Any) -> bool:
    if isinstance(value, float | np.floating):
        return False
    try:
        operator.index(value)
    except TypeError:
        # CUDA's handles are numbers only through int()
        return type(value).__name__.startswith("cuda") and hasattr(value, "__int__")
    return True


def _is_buffer(value: Any) -> bool:
    try:
        memoryview(value)
    except TypeError:
        return False
    return True
