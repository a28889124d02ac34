"""Calls of functions that an answer must be, as JSON schema of Llama 4's JSON dialect."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arriero.errors import ArrieroError

NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}


@dataclass(frozen=True)
class ForcedCalls:
    """An answer is a call of one of `functions`, or `most` calls at most where that is more than one.

    A function is a mapping with its name, and its parameters as a JSON schema; without them it takes none.
    """

    functions: Sequence[Mapping[str, Any]]
    most: int = 1

    def __post_init__(self) -> None:
        named = all(isinstance(one, Mapping) and isinstance(one.get("name"), str) for one in self.functions)
        if not self.functions or not named:
            what, expected = f"calls has the functions {self.functions!r:.60}", "mappings with name and parameters"
            raise ArrieroError(what, expected=expected)

    @property
    def schema(self) -> dict[str, Any]:
        """The schema of the JSON dialect: one object, or a list of them where several may come."""
        call = {"anyOf": [_call_schema(one["name"], one.get("parameters")) for one in self.functions]}
        if self.most == 1:
            return call
        calls = {"type": "array", "items": call, "minItems": 1, "maxItems": self.most}
        return {"anyOf": [*call["anyOf"], calls]}


def _call_schema(name: str, parameters: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": {
            "type": {"const": "function"},
            "name": {"const": name},
            "parameters": parameters or NO_PARAMETERS,
        },
        "required": ["type", "name", "parameters"],
        "additionalProperties": False,
    }
