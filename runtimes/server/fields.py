"""The fields of a request's body, each read once with the type that it must have; what nobody read is refused."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from difflib import get_close_matches
from typing import Any

from arriero.runtimes.server.errors import RefusalError


class Fields:
    """A JSON object that is read field by field."""

    def __init__(self, body: Any, where: str = "") -> None:
        """Read `body`, which stands at `where` in the request."""
        self._where = where
        if not isinstance(body, dict):
            raise RefusalError(
                400, f"{where or 'The body'} is {_kind(body)}; expected a JSON object.", param=where or None
            )
        self._left: dict[str, Any] = dict(body)
        self._known: list[str] = []

    def path(self, name: str) -> str:
        """Where the field `name` stands."""
        return f"{self._where}.{name}" if self._where else name

    def take(self, name: str, default: Any = None) -> Any:
        """The value of the field, whatever it is; `default` where it is missing or null."""
        self._known.append(name)
        value = self._left.pop(name, None)
        return default if value is None else value

    def text(self, name: str, default: str | None = None) -> str | None:
        """A string."""
        return self._typed(name, default, str, "a string")

    def required_text(self, name: str) -> str:
        """A string that must be there."""
        value = self.text(name)
        if value is None:
            raise self.refusal(name, "is missing; expected a string")
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        return bool(self._typed(name, default, bool, "true or false"))

    def number(self, name: str, default: float | None = None) -> float | None:
        """A finite number."""
        value = self._typed(name, default, int | float, "a number")
        if value is not None and not math.isfinite(value):
            raise self.refusal(name, f"is {value}; expected a finite number")
        return value

    def integer(
        self, name: str, default: int | None = None, least: int | None = None, most: int | None = None
    ) -> int | None:
        """A whole number from `least` to `most`."""
        value = self._typed(name, default, int, "a whole number")
        if value is not None and ((least is not None and value < least) or (most is not None and value > most)):
            expected = f"from {least} to {most}" if most is not None else f"of at least {least}"
            raise self.refusal(name, f"is {value}; expected a whole number {expected}")
        return value

    def items(self, name: str) -> list[Any] | None:
        """A list."""
        return self._typed(name, None, list, "a list")

    def fields(self, name: str) -> Fields | None:
        """An object."""
        value = self.take(name)
        return None if value is None else Fields(value, self.path(name))

    def ignore(self, names: Collection[str]) -> None:
        """Let these fields be there: they change nothing of an answer."""
        for name in names:
            self.take(name)

    def refuse_others(self) -> None:
        """Refuse fields that nobody has read."""
        for name, value in self._left.items():
            if value is not None:
                nearest = get_close_matches(name, self._known, n=1, cutoff=0.6)
                hint = f" Did you mean {nearest[0]}?" if nearest else ""
                raise self.refusal(name, f"is not known here.{hint}", "unknown_parameter")

    def refusal(self, name: str, problem: str, code: str | None = None) -> RefusalError:
        """What to raise for a field that cannot be used."""
        sentence = problem if problem.endswith((".", "?")) else f"{problem}."
        return RefusalError(400, f"{self.path(name)} {sentence}", param=self.path(name), code=code)

    def _typed(self, name: str, default: Any, kind: Any, expected: str) -> Any:
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.refusal(name, f"is {_kind(value)}; expected {expected}")
        return value


def _kind(value: Any) -> str:
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list):
        return "a list"
    return f"{value!r:.60}"
