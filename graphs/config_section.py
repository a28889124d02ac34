"""One section of a config.json, read key by key with the types that transformers takes; what is wrong is collected."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from arriero.errors import ArrieroError

REFETCH = "Take the file from the original checkpoint"
# Numbers that matter in training alone; transformers takes integers for some of them.
TRAINING = {
    "initializer_range": False,
    "router_aux_loss_coef": False,
    "router_jitter_noise": False,
    "norm_eps": False,  # the vision tower's norms have a fixed one
    "attention_dropout": True,
    "projector_dropout": True,
}
LIMIT = 1 << 40  # of a size: beyond it a config is no config


class Section:
    """The values at one place of a file, `where`; what is wrong with them goes to `problems`, with this `remedy`."""

    def __init__(
        self,
        data: Mapping[str, Any],
        where: str,
        problems: list[ArrieroError],
        separator: str = ".",
        remedy: str = REFETCH,
    ) -> None:
        self.data, self.where, self.problems, self.separator, self.remedy = data, where, problems, separator, remedy

    def refuse(self, key: str, what: str, expected: str, remedy: str | None = None) -> None:
        """Note that `key` has a value that cannot be honoured."""
        where = f"{self.where}{self.separator}{key}"
        self.problems.append(ArrieroError(what, where=where, expected=expected, remedy=remedy or self.remedy))

    def section(self, key: str, model_type: str | None = None) -> Section:
        """The section at `key`, empty where there is none; refused if it says that it is of another `model_type`."""
        value = self.data.get(key)
        if value is not None and not isinstance(value, Mapping):
            self.refuse(key, f"{_shown(value)} is not a section", "an object of settings")
            value = None
        inner = Section(value or {}, f"{self.where}{self.separator}{key}", self.problems, remedy=self.remedy)
        if model_type is not None:
            inner.must_be("model_type", model_type, (model_type,))
        return inner

    def is_null(self, key: str) -> bool:
        """Whether `key` is there and null."""
        return key in self.data and self.data[key] is None

    def number(self, key: str, default: float, above: float | None = None) -> float:
        """A finite number."""
        return self._number(key, default, above, None, integers=True)

    def real(self, key: str, default: float, at_least: float | None = None) -> float:
        """A finite number with a decimal point, as transformers wants it."""
        return self._number(key, default, None, at_least, integers=False)

    def _number(self, key: str, default: float, above: float | None, at_least: float | None, integers: bool) -> float:
        value = self.data.get(key, default)
        is_number = type(value) is float or (integers and type(value) is int and abs(value) < 1 << 53)
        fits = is_number and math.isfinite(value) and (above is None or value > above)
        if fits and (at_least is None or value >= at_least):
            return float(value)
        bound = "" if above is at_least is None else f" above {above}" if at_least is None else f" from {at_least}"
        kind = "a finite number" if integers else "a finite number with a decimal point"
        self.refuse(key, f"{_shown(value)} is not a number", kind + bound)
        return default

    def boolean(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.data.get(key, default)
        if not isinstance(value, bool):
            self.refuse(key, f"{_shown(value)} is neither true nor false", "true or false")
            return default
        return value

    def entries(self, key: str, kind: type[Any]) -> list[Any] | None:
        """The list at `key`, or None where it is null or missing."""
        value = self.data.get(key)
        if value is not None and not (isinstance(value, list) and all(type(entry) is kind for entry in value)):
            self.refuse(key, f"{_shown(value)} is not a list of {kind.__name__}", "an entry per layer")
            return None
        return value

    def token_ids(self, key: str, default: int | None, size: int | None = None) -> tuple[int, ...]:
        """One id or several, all below `size`; none where the key is null."""
        value = self.data.get(key, default)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(number) is int and 0 <= number < (size or LIMIT) for number in ids):
            below = f" below {size}, the vocabulary" if size else ""
            self.refuse(key, f"{_shown(value)} is no token id", f"a number, or a list of numbers{below}")
            return ()
        return tuple(ids)

    def token_id(self, key: str, default: int | None, size: int | None = None) -> int | None:
        """One id below `size`; None where the key is null."""
        if isinstance(self.data.get(key), list):
            self.refuse(key, f"{_shown(self.data[key])} is no token id", "one number")
            return None
        return next(iter(self.token_ids(key, default, size)), None)

    def positive(self, key: str, default: int, most: int = LIMIT) -> int:
        """A size from 1 to `most`."""
        value = self.data.get(key, default)
        if type(value) is not int or not 0 < value <= most:
            self.refuse(key, f"{_shown(value)} is not a size", f"a positive integer, at most {most:,}")
            return default
        return value

    def count(self, key: str, default: int) -> int:
        """A size that may be 0."""
        return 0 if self.data.get(key) == 0 and type(self.data[key]) is int else self.positive(key, default)

    def must_be(self, key: str, default: Any, allowed: tuple[Any, ...]) -> None:
        """Refuse all values but the `allowed` ones; `default` is what a missing key means."""
        value = self.data.get(key, default)
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
            self.refuse(key, f"{_shown(value)} is not something this model class computes", f"one of {allowed}")

    def refuse_unless_none(self, key: str, remedy: str) -> None:
        """Refuse a key that changes what the weights mean."""
        if self.data.get(key) is not None:
            self.refuse(key, "the weights are stored in a way that is not read", "no such key", remedy)

    def ignored_in_inference(self) -> None:
        """Check the types of what matters in training alone."""
        for key, integers in TRAINING.items():
            if key in self.data and not (type(self.data[key]) is float or (integers and type(self.data[key]) is int)):
                self.refuse(key, f"{_shown(self.data[key])} is not a number", "a number")
        for key in ("use_cache", "output_router_logits"):
            self.boolean(key, False)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
