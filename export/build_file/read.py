"""Reads a build file: YAML with line numbers, checked against the schema, every mistake reported at once."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from arriero.errors import ArrieroError, MachineLacks, Problems
from arriero.export.build_file.schema import EMBEDDED, BuildConfig, nearest

Key = tuple[str | int, ...]

START = "Start from the example build.yaml of the repository"

# What pydantic found, and what we say was expected instead.
EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "tuple_type": "a list, as in [a, b]",
    "dict_type": "a mapping of `key: value` lines",
    "model_type": "a mapping of `key: value` lines",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "too_short": "at least one entry",
    "literal_error": "{expected}",
}


def load_build(path: str | Path) -> BuildConfig:
    """Read and check the build file at `path`.

    Raises `ArrieroError` when it cannot be read, otherwise `Problems` with everything that is wrong in it
    (`MachineLacks` when the only thing wrong is that the model is not on this machine).
    """
    file = Path(path)
    document = _Document(file)
    problems = document.problems
    build = None
    try:
        build = BuildConfig.model_validate(document.data, context={"folder": file.absolute().parent})
    except ValidationError as error:
        found = [dict(one) for one in error.errors(include_url=False)]
        # a list whose entries are all wrong counts as empty, which is not what is wrong with it
        problems += [document.translate(one) for one in found if one["type"] != "too_short" or not one["input"]]
    problems += _cross_checks(document)
    if len(problems) == 1 and isinstance(problems[0], MachineLacks):
        raise problems[0]
    if problems or build is None:
        raise Problems(f"{file} has mistakes", sorted(problems, key=_line))
    return build


class _Document:
    """A YAML file as plain `data`, the line of every key in it, and the problems found on the way."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.lines: dict[Key, int] = {(): 1}
        self.problems: list[ArrieroError] = []
        node = self._compose()
        self.data = self._plain(node, (), ())

    def where(self, key: Key) -> str:
        """Name a key as `file:line: dotted.key[0]`, on the line of its nearest parent that is in the file."""
        known = key
        while known not in self.lines:
            known = known[:-1]
        dotted = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).lstrip(".")
        return f"{self.file}:{self.lines[known]}" + (f": {dotted}" if dotted else "")

    def translate(self, found: dict[str, Any]) -> ArrieroError:
        """Say one pydantic error in our words, with its line."""
        key, kind, value, context = found["loc"], found["type"], found["input"], found.get("ctx", {})
        where = self.where(key)
        if kind == "arriero" and value is not None:
            error = MachineLacks if context["machine"] else ArrieroError
            return error(context["what"], where=where, expected=context["expected"], remedy=context["remedy"])
        if kind == "missing":
            return ArrieroError("is missing", where=where, remedy=_field(key).description)
        if kind == "extra_forbidden":
            known = list(_section(key[:-1]).model_fields)
            expected = f"one of {', '.join(known)}"
            return ArrieroError("unknown key", where=where, expected=expected, remedy=nearest(str(key[-1]), known))
        expected = EXPECTED[kind].format(**context) if kind in EXPECTED else found["msg"]
        if value is None:
            expected = context.get("expected") or expected
            return ArrieroError("has no value", where=where, expected=expected, remedy="Give one, or remove the key")
        known = expected.replace("'", "").replace(" or ", ", ").split(", ")
        remedy = nearest(str(value), known) if kind == "literal_error" else None
        if value in known:
            remedy = "Write it without quotes"
        shown = repr(value) if len(repr(value)) < 60 else repr(value)[:57] + "..."
        return ArrieroError(f"{shown} is not valid", where=where, expected=expected, remedy=remedy)

    def _compose(self) -> Node:
        try:
            text = self.file.read_text("utf-8-sig")
        except FileNotFoundError:
            found = sorted(p.name for p in self.file.absolute().parent.glob("*.yaml"))
            remedy = f"The folder holds {', '.join(found)}" if found else "Write a build.yaml, or give its path"
            raise ArrieroError("there is no such build file", where=str(self.file), remedy=remedy) from None
        except IsADirectoryError:
            remedy = f"Give the file, such as {self.file / 'build.yaml'}"
            raise ArrieroError("is a folder, not a build file", where=str(self.file), remedy=remedy) from None
        except UnicodeDecodeError as error:
            what = f"is not UTF-8 text (byte {error.start})"
            raise ArrieroError(what, where=str(self.file), remedy="Save it as UTF-8") from None
        except OSError as error:
            raise ArrieroError(f"cannot be read ({error.strerror})", where=str(self.file)) from None
        try:
            node = YAML().compose(text)
        except MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            source = text.splitlines()[line - 1] if line <= len(text.splitlines()) else ""
            remedy = (
                "YAML indents with spaces: replace the tab" if "\t" in source else "Correct this line or the one above"
            )
            what = f"is not YAML: {error.problem}" + (f" ({error.context})" if error.context else "")
            raise ArrieroError(what, where=f"{self.file}:{line}", remedy=remedy) from None
        except (YAMLError, RecursionError) as error:
            what = f"is not YAML: {str(error).splitlines()[0]}"
            raise ArrieroError(what, where=str(self.file), remedy=START) from None
        if not isinstance(node, MappingNode):
            what = "is empty" if node is None else "is not a mapping at its top"
            raise ArrieroError(what, where=f"{self.file}:1", expected="`key: value` lines", remedy=START)
        return node

    def _plain(self, node: Node, key: Key, inside: tuple[Node, ...]) -> Any:
        """Turn a YAML node into plain Python, noting lines, doubled keys and what YAML allows but we do not."""
        if any(node is outer for outer in inside):
            self.problems.append(ArrieroError("an alias contains itself", where=self.where(key)))
            return None
        if isinstance(node, ScalarNode):
            return self._scalar(node, key)
        if isinstance(node, SequenceNode):
            for number, item in enumerate(node.value):
                self.lines[(*key, number)] = item.start_mark.line + 1
            return [self._plain(item, (*key, n), (*inside, node)) for n, item in enumerate(node.value)]
        result: dict[str, Any] = {}
        for name_node, value in node.value:
            line = name_node.start_mark.line + 1
            if not isinstance(name_node, ScalarNode):
                where = f"{self.file}:{line}"
                self.problems.append(ArrieroError("a list or mapping cannot be a key", where=where, expected="text"))
                continue
            name = name_node.value
            if name in result:
                where = f"{self.file}:{line}: {name}"
                first = self.lines[(*key, name)]
                self.problems.append(
                    ArrieroError(f"is there twice, first on line {first}", where=where, remedy="Remove one of the two")
                )
                continue
            self.lines[(*key, name)] = line
            result[name] = self._plain(value, (*key, name), (*inside, node))
        return result

    def _scalar(self, node: ScalarNode, key: Key) -> Any:
        text: str = node.value
        try:
            text.encode()
            return self._value(text, str(node.tag).rpartition(":")[2], key)
        except UnicodeEncodeError:
            self.problems.append(ArrieroError("holds half of a surrogate pair", where=self.where(key), expected="text"))
            return text.encode(errors="replace").decode()
        except ValueError:  # of a number that is none, as in `!!int many`: the schema says what belongs there
            return text

    def _value(self, text: str, tag: str, key: Key) -> Any:
        match tag:
            case "null":
                return None
            case "bool":
                return text.lower() == "true"
            case "int":
                return int(text.replace("_", ""), 10 if text.lstrip("+-0").isdigit() else 0) if text.strip("0") else 0
            case "float":
                return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
            case "str" | "timestamp":
                return text
            case _:
                self.problems.append(ArrieroError(f"the YAML tag {tag} has no meaning here", where=self.where(key)))
                return text


def _cross_checks(document: _Document) -> Iterator[ArrieroError]:
    """Find what no single field shows; looks at the raw data, so that it speaks even when fields are wrong."""
    data = document.data
    names: dict[str, int] = {}
    for number, target in enumerate(_list(data.get("targets"))):
        name = _dict(target).get("name")
        if isinstance(name, str):
            # Folders on macOS and Windows do not tell upper from lower case.
            first = names.setdefault(name.casefold(), number)
            if first != number:
                what = f"{name!r} is also the name of targets[{first}]"
                where = document.where(("targets", number, "name"))
                yield ArrieroError(what, where=where, expected="one name per target", remedy="Rename one of them")
    parity = _dict(data.get("parity"))
    yield from _unknown_thresholds(document, _dict(parity.get("thresholds")))
    defaults = BuildConfig.model_fields
    calibration = defaults["calibration"].default.model_dump() | _dict(data.get("calibration"))
    cases = defaults["parity"].default.cases.model_dump() | _dict(parity.get("cases"))
    same = "also the calibration's, so the report would test on what it was tuned to"
    if calibration["set"] != EMBEDDED and _path(document, calibration["set"]) == _path(document, cases["set"]):
        where = document.where(("parity", "cases", "set"))
        remedy = "Split it in two files, or take `embedded` for one"
        yield ArrieroError(f"this set is {same}", where=where, expected="another set", remedy=remedy)
    elif (calibration["set"], calibration["seed"]) == (cases["set"], cases["seed"]) == (EMBEDDED, cases["seed"]):
        where = document.where(("parity", "cases", "seed"))
        remedy = "Change one of the two seeds"
        yield ArrieroError(f"seed {cases['seed']} is {same}", where=where, expected="another seed", remedy=remedy)


def _unknown_thresholds(document: _Document, thresholds: dict[str, Any]) -> Iterator[ArrieroError]:
    if not thresholds:
        return
    from arriero.runtimes.proof.rows import check_thresholds

    for name in thresholds:
        try:
            check_thresholds({name: 0.0})
        except ArrieroError as error:
            where = document.where(("parity", "thresholds", name))
            yield ArrieroError(error.what, where=where, expected=error.expected, remedy=error.remedy)


def _section(key: Key) -> type[BaseModel]:
    """The model class that describes the mapping at `key`."""
    root: type[BaseModel] = BuildConfig
    return functools.reduce(_step, key, root)


def _step(model: type[BaseModel], part: str | int) -> type[BaseModel]:
    if isinstance(part, int):
        return model
    annotation = model.model_fields[part].annotation
    return next(t for t in (annotation, *get_args(annotation)) if isinstance(t, type) and issubclass(t, BaseModel))


def _field(key: Key) -> Any:
    return _section(key[:-1]).model_fields[str(key[-1])]


def _line(problem: ArrieroError) -> int:
    parts = (problem.where or "").split(":")
    return next((int(part) for part in parts if part.isdigit()), 0)


def _path(document: _Document, text: Any) -> Path:
    return (document.file.absolute().parent / str(text)).resolve()


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
