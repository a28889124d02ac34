"""A profile's selectors: which tensors an entry of `keep` or `rules` takes, stored how, and why.

`match` names a group of tensors, or several, as in `match: [shared_expert, mlp]`; what groups cannot say, it says by a
tensor's whole name or by `re:` and a pattern of whole names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, StrictBool, StringConstraints, field_validator, model_validator
from typing_extensions import override

from arriero.errors import ArrieroError, nearest
from arriero.profiles.groups import GROUPS, group_of
from arriero.profiles.schemes import Exact, Record, Scheme
from arriero.profiles.validate import refusal

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
PATTERN = "re:"


@dataclass(frozen=True)
class Selector:
    """One match with its scheme and reason; `may_be_idle`: a checkpoint without such a tensor is no mistake."""

    match: str
    scheme: Scheme
    reason: str
    may_be_idle: bool

    def takes(self, tensor: str) -> bool:
        """Whether this selector takes `tensor`."""
        if self.match in GROUPS:
            return group_of(tensor) == self.match
        if self.match.startswith(PATTERN):
            return bool(re.fullmatch(self.match.removeprefix(PATTERN), tensor))
        return self.match == tensor


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class Entry(Record):
    """What entries of `keep` and `rules` have in common."""

    match: Annotated[tuple[Text, ...], BeforeValidator(_listed), Field(min_length=1)]
    optional: StrictBool = False

    @field_validator("match")
    @classmethod
    def _can_match(cls, match: tuple[str, ...]) -> tuple[str, ...]:
        for one in match:
            if one.startswith(PATTERN):
                try:
                    re.compile(one.removeprefix(PATTERN))
                except re.error as error:
                    raise refusal(ArrieroError(f"`{one}` is not a regular expression: {error}")) from error
            elif "." not in one and one not in GROUPS:  # the name of every tensor has a dot
                expected = f"one of {', '.join(GROUPS)}; or a tensor's whole name; or `{PATTERN}` and a pattern"
                what = f"`{one}` is no group of tensors"
                raise refusal(ArrieroError(what, expected=expected, remedy=nearest(one, GROUPS)))
        return match

    @property
    def selectors(self) -> list[Selector]:
        """One selector per match."""
        raise NotImplementedError


class Keep(Entry):
    """Tensors that stay exact. Groups that most profiles keep bring a reason of their own; the others need one."""

    reason: Text | None = None

    @model_validator(mode="after")
    def _has_a_reason(self) -> Keep:
        without = [one for one in self.match if one not in GROUPS or GROUPS[one].exact_because is None]
        if self.reason is None and without:
            known = ", ".join(name for name, group in GROUPS.items() if group.exact_because)
            what = f"has no reason to keep {', '.join(without)}"
            raise refusal(ArrieroError(what, expected=f"a `reason`, which only {known} can do without"))
        return self

    @property
    @override
    def selectors(self) -> list[Selector]:
        return [
            Selector(one, Exact(), self.reason or GROUPS[one].exact_because or "", self.optional or one in GROUPS)
            for one in self.match
        ]


class Rule(Entry):
    """Tensors that are stored in `scheme`, and the reason."""

    scheme: Scheme
    reason: Text

    @property
    @override
    def selectors(self) -> list[Selector]:
        return [Selector(one, self.scheme, self.reason, self.optional or one in GROUPS) for one in self.match]
