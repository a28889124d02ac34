"""A profile as data: which tensor is stored in which scheme, why, and the thresholds the result must meet."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from arriero.errors import ArrieroError, Problems
from arriero.profiles.quantize import check_block

SHIPPED = Path(__file__).parent
OVER_NAIVE = "kl_over_naive"
LAYER_MATRIX = re.compile(r"language_model\.model\.layers\.\d+\.(self_attn|feed_forward)\.(?!router).+")
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Exact(_Record):
    """The tensor's values stay exact: stored as float32, or in the checkpoint's own dtype where a kernel reads it."""

    kind: Literal["exact"] = "exact"


class IntBlock(_Record):
    """Block-wise symmetric integers along the input features, one float32 scale per block.

    `accuracy_level` is ONNX Runtime's: 4 rounds activations to int8 as well, 0 keeps them in float32. `rounding` says
    how the integers are found: each value to its nearest, or by GPTQ on the inputs that calibration saw.
    """

    kind: Literal["int_block"]
    bits: Literal[4, 8]
    block: Literal[16, 32, 64, 128, 256]
    accuracy_level: Literal[0, 4]
    rounding: Literal["nearest", "gptq"] = "nearest"

    @property
    def label(self) -> str:
        """The scheme in the manifest's weight table; the bits of a value are the first number in it."""
        return f"int{self.bits} block {self.block}" + ("" if self.rounding == "nearest" else f" {self.rounding}")


Scheme = Annotated[Exact | IntBlock, Field(discriminator="kind")]


class _Selector(_Record):
    match: Text
    reason: Text
    optional: bool = False

    @field_validator("match")
    @classmethod
    def _compiles(cls, value: str) -> str:
        if value.startswith("re:"):
            try:
                re.compile(value[3:])
            except re.error as error:
                raise ValueError(f"`{value}` is not a regular expression: {error}") from error
        return value

    def hits(self, name: str) -> bool:
        """Whether this selector takes the whole of `name`: a `re:` pattern, or the name itself."""
        return bool(re.fullmatch(self.match[3:], name)) if self.match.startswith("re:") else self.match == name


class Keep(_Selector):
    """Tensors that stay exact, and the reason."""


class Rule(_Selector):
    """Tensors that are stored in `scheme`, and the reason."""

    scheme: Scheme


class Calibration(_Record):
    """How a profile's GPTQ roundings are found, and what happens to an expert that too few tokens reached.

    `below` is the rule for experts with fewer than `minimum_tokens`: `nearest` gives them scales from their weights
    alone and lists them, `stop` ends the build with their list.
    """

    damping: float = Field(gt=0, le=1)
    minimum_tokens: int = Field(ge=1)
    below: Literal["nearest", "stop"]
    reason: Text


class Profile(_Record):
    """One profile. `keep` is asked before `rules`, each in order, and the first selector that matches wins.

    A profile that calibrates must set the threshold `kl_over_naive`, below 1: its logits' KL over that of its own naive
    form, in which every integer is the nearest one and every scale the block's largest magnitude.
    """

    name: Text
    version: int = Field(ge=1)
    description: Text
    thresholds: dict[str, float]
    keep: list[Keep] = []
    rules: list[Rule] = []
    calibration: Calibration | None = None

    @model_validator(mode="after")
    def _calibrates_or_not(self) -> Self:
        uses = any(isinstance(rule.scheme, IntBlock) and rule.scheme.rounding != "nearest" for rule in self.rules)
        if uses and self.calibration is None:
            raise ValueError("a rule rounds by gptq, so the profile needs a `calibration` section")
        if not uses and self.calibration is not None:
            raise ValueError("no rule rounds by gptq, so the `calibration` section would do nothing")
        if uses and not 0 < self.thresholds.get(OVER_NAIVE, 1) < 1:
            raise ValueError(f"a profile that calibrates must beat its naive form: set thresholds.{OVER_NAIVE} below 1")
        return self

    def naive(self) -> Profile:
        """This profile without calibration: the same tensors, bits and blocks, each value rounded to its nearest."""
        rules = [
            rule.model_copy(update={"scheme": rule.scheme.model_copy(update={"rounding": "nearest"})})
            if isinstance(rule.scheme, IntBlock)
            else rule
            for rule in self.rules
        ]
        return self.model_copy(update={"rules": rules, "calibration": None})

    @property
    def selectors(self) -> list[Keep | Rule]:
        """`keep`, then `rules`: the order in which they are asked."""
        return [*self.keep, *self.rules]

    def assign(self, names: Iterable[str]) -> dict[str, Scheme]:
        """Give the scheme of every tensor in `names`; raise Problems for idle selectors and undecided tensors."""
        selectors = self.selectors
        idle = set(range(len(selectors)))
        assigned: dict[str, Scheme] = {}
        problems: list[ArrieroError] = []
        for name in names:
            hits = [position for position, selector in enumerate(selectors) if selector.hits(name)]
            idle.difference_update(hits)
            if not hits:
                problems.append(
                    ArrieroError(
                        "no selector of the profile decides this tensor",
                        where=name,
                        remedy=f"Name it under `keep` or `rules` of profile `{self.name}`",
                    )
                )
                continue
            first = selectors[hits[0]]
            assigned[name] = first.scheme if isinstance(first, Rule) else Exact()
        problems += [
            ArrieroError(
                f"selector `{selectors[position].match}` matches no tensor",
                where=f"profile {self.name}",
                remedy="Correct it, or mark it `optional: true` and say so in its reason",
            )
            for position in sorted(idle)
            if not selectors[position].optional
        ]
        if problems:
            raise Problems(f"profile `{self.name}` does not fit this checkpoint", problems)
        return assigned


def check_shapes(profile: Profile, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse, all at once and before anything runs, what `profile` asks of these tensors and cannot be done.

    A matrix is [N, K], a stack of experts [E, K, N]; K must divide into blocks. Calibration sees the decoder's layers.
    """
    problems: list[ArrieroError] = []
    for name, scheme in profile.assign(shapes).items():
        if not isinstance(scheme, IntBlock):
            continue
        shape = shapes[name]
        if len(shape) < 2:
            problems.append(ArrieroError("a vector has no blocks", where=name, remedy="Put it under `keep`"))
            continue
        try:
            check_block(shape[1], scheme.block, name)
        except ArrieroError as error:
            problems.append(error)
        if scheme.rounding == "gptq" and not LAYER_MATRIX.fullmatch(name):
            problems.append(
                ArrieroError(
                    "calibration sees no inputs of this tensor",
                    where=name,
                    expected="gptq for matrices of the text decoder's layers only",
                    remedy="Give it `rounding: nearest`, or put it under `keep`",
                )
            )
    if problems:
        raise Problems(f"profile `{profile.name}` does not fit this checkpoint", problems)


def shipped() -> dict[str, Path]:
    """The profiles that come with the package, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def load_profile(name_or_path: str | Path) -> Profile:
    """Read a shipped profile by its name, or any profile by its path; all mistakes in it are listed at once."""
    path = shipped().get(str(name_or_path), Path(name_or_path))
    if not path.is_file():
        raise ArrieroError(
            f"there is no profile `{name_or_path}`",
            expected=f"one of {', '.join(shipped())}, or the path of a YAML file",
        )
    try:
        data: Any = YAML(typ="safe").load(path)
    except (YAMLError, UnicodeDecodeError) as error:
        raise ArrieroError(f"is not readable as YAML: {error}", where=str(path)) from error
    try:
        return Profile.model_validate(data)
    except ValidationError as error:
        raise Problems(
            f"profile {path} is not valid",
            [
                ArrieroError(problem["msg"], where=".".join(map(str, problem["loc"])) or str(path))
                for problem in error.errors()
            ],
        ) from error
