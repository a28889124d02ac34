"""A YAML file as plain data, the line of every key in it, and every mistake of its text.

Values are read by the core schema of YAML 1.2: `yes` and `12:30` are text, `010` is ten. What could make a small file
large is bounded: its bytes, its nesting, and the values that its aliases expand to.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from arriero.errors import ArrieroError, MachineLacks, Problems

Key = tuple[str | int, ...]

MAX_BYTES = 1 << 18
MAX_DEPTH = 32
MAX_VALUES = 10_000  # after every alias is expanded

NULL = re.compile(r"(?:~|null|Null|NULL|)\Z")
BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
INT = re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z")
FLOAT = re.compile(
    r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
)


class _TooDeep(Exception):
    """Lists and mappings lie in each other beyond `MAX_DEPTH`, first on this line."""


class _CoreLoader(yaml.SafeLoader):
    """PyYAML's safe loader with the resolvers of the YAML 1.2 core schema, and bounded nesting."""

    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {}
    depth = 0

    def compose_node(self, parent: Node | None, index: Any) -> Node | None:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise _TooDeep(self.peek_event().start_mark.line + 1)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


for _tag, _pattern in (("null", NULL), ("bool", BOOL), ("int", INT), ("float", FLOAT)):
    _CoreLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, None)


class Document:
    """The YAML file `file` as plain `data`, its `problems`, and where each key of it stands.

    `kind` says what the file should be, `start` what to do where it is nothing of the kind. Raises ArrieroError when
    the file cannot be read at all.
    """

    def __init__(self, file: Path, kind: str, start: str) -> None:
        self.file, self.kind, self.start = file, kind, start
        self.lines: dict[Key, int] = {(): 1}
        self.problems: list[ArrieroError] = []
        self._values = 0
        self.data: dict[str, Any] = self._plain(self._compose(self._text()), (), ())

    def where(self, key: Key) -> str:
        """Name a key as `file:line: dotted.key[0]`, on the line of its nearest parent that is in the file."""
        known = key
        while known not in self.lines:
            known = known[:-1]
        dotted = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key).lstrip(".")
        return f"{self.file}:{self.lines[known]}" + (f": {dotted}" if dotted else "")

    def raise_problems(self) -> None:
        """Raise Problems with every problem, in the file's order; a lack of the machine alone as itself."""
        if len(self.problems) == 1 and isinstance(self.problems[0], MachineLacks):
            raise self.problems[0]
        if self.problems:
            raise Problems(f"{self.file} has mistakes", sorted(self.problems, key=self._line))

    def _line(self, problem: ArrieroError) -> int:
        line = (problem.where or "").removeprefix(f"{self.file}:").partition(":")[0]
        return int(line) if line.isdigit() else 0

    def _text(self) -> str:
        try:
            with self.file.open("rb") as stream:
                content = stream.read(MAX_BYTES + 1)
            if len(content) > MAX_BYTES:
                expected = f"a {self.kind} of at most {MAX_BYTES // 1024} KiB"
                raise ArrieroError("is too large", where=str(self.file), expected=expected, remedy=self.start)
            return content.decode("utf-8-sig")
        except FileNotFoundError:
            beside = sorted(path.name for path in self.file.absolute().parent.glob("*.yaml"))
            remedy = f"The folder holds {', '.join(beside)}" if beside else f"Write a {self.kind}, or give its path"
            raise ArrieroError(f"there is no such {self.kind}", where=str(self.file), remedy=remedy) from None
        except IsADirectoryError:
            remedy = f"Give the file, such as {self.file / 'build.yaml'}"
            raise ArrieroError(f"is a folder, not a {self.kind}", where=str(self.file), remedy=remedy) from None
        except UnicodeDecodeError as error:
            what = f"is not UTF-8 text (byte {error.start})"
            raise ArrieroError(what, where=str(self.file), remedy="Save it as UTF-8") from None
        except OSError as error:
            raise ArrieroError(f"cannot be read ({error.strerror})", where=str(self.file)) from None

    def _compose(self, text: str) -> MappingNode:
        try:
            node = yaml.compose(text, _CoreLoader)
        except _TooDeep as error:
            expected = f"at most {MAX_DEPTH} lists and mappings in each other"
            raise ArrieroError("nests too deep", where=f"{self.file}:{error}", expected=expected) from None
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            source = text.splitlines()[line - 1] if line <= len(text.splitlines()) else ""
            remedy = (
                "YAML indents with spaces: replace the tab" if "\t" in source else "Correct this line or the one above"
            )
            what = f"is not YAML: {error.problem}" + (f" ({error.context})" if error.context else "")
            raise ArrieroError(what, where=f"{self.file}:{line}", remedy=remedy) from None
        except yaml.YAMLError as error:
            what = f"is not YAML: {str(error).splitlines()[0]}"
            raise ArrieroError(what, where=str(self.file), remedy=self.start) from None
        if not isinstance(node, MappingNode):
            what = "is empty" if node is None else "is not a mapping at its top"
            raise ArrieroError(what, where=f"{self.file}:1", expected="`key: value` lines", remedy=self.start)
        return node

    def _plain(self, node: Node, key: Key, inside: tuple[Node, ...]) -> Any:
        """Turn a YAML node into plain Python, noting lines, doubled keys and what YAML allows but we do not."""
        if any(node is outer for outer in inside):
            self.problems.append(ArrieroError("an alias contains itself", where=self.where(key)))
            return None
        self._values += 1
        if self._values > MAX_VALUES:
            expected = f"at most {MAX_VALUES:,} values, those of aliases counted each time"
            raise ArrieroError("holds too many values", where=self.where(key[:1]), expected=expected)
        if isinstance(node, ScalarNode):
            return self._scalar(node, key)
        if isinstance(node, SequenceNode):
            for number, item in enumerate(node.value):
                self.lines[(*key, number)] = item.start_mark.line + 1
            return [self._plain(item, (*key, number), (*inside, node)) for number, item in enumerate(node.value)]
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
            if "\0" in text:  # which no path of a system may have
                self.problems.append(ArrieroError("holds the character U+0000", where=self.where(key), expected="text"))
                return text.replace("\0", "?")
            return self._value(text, str(node.tag), key)
        except UnicodeEncodeError:
            self.problems.append(ArrieroError("holds half of a surrogate pair", where=self.where(key), expected="text"))
            return text.encode(errors="replace").decode()
        except ValueError:  # of a number that is none, as in `!!int many`: the schema says what belongs there
            return text

    def _value(self, text: str, tag: str, key: Key) -> Any:
        match tag.removeprefix("tag:yaml.org,2002:"):
            case "null":
                return None
            case "bool":
                return text.lower() == "true" if BOOL.match(text) else text
            case "int":
                return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
            case "float":
                return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
            case "str":
                return text
            case unknown:
                what = f"the YAML tag {unknown} has no meaning in this file"
                self.problems.append(ArrieroError(what, where=self.where(key)))
                return text
