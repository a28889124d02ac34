"""A profile as data: which tensor is stored in which scheme, why, and the thresholds the result must meet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, StrictFloat, StrictInt, model_validator

from arriero.errors import ArrieroError, Problems
from arriero.profiles.groups import is_head, is_layer_matrix, is_table
from arriero.profiles.schemes import AsStored, Candidate, Chosen, Exact, Fp8, Half, IntBlock, Record, Scheme, Static
from arriero.profiles.selectors import Keep, Rule, Selector, Text
from arriero.profiles.validate import refusal, validated
from arriero.profiles.yaml_document import Document
from arriero.thresholds import OVER_RTN, check_name


def check_metric(name: str) -> str:
    """Refuse, within pydantic, a threshold on what is no metric."""
    try:
        check_name(name)
    except ArrieroError as error:
        raise refusal(error) from None
    return name


SHIPPED = Path(__file__).parent
MetricName = Annotated[str, AfterValidator(check_metric)]
Thresholds = dict[MetricName, Annotated[StrictFloat, Field(allow_inf_nan=False)]]


class Calibration(Record):
    """How a profile's roundings and activation scales are found, and what becomes of an expert that few tokens reached.

    `below` is the rule for experts with fewer than `minimum_tokens`: `stop` ends the build with their list; the others
    list them in the bundle. `nearest`, for gptq, gives them scales from their weights alone; `widest`, for static
    activation scales, gives them the widest range that any expert of their layer saw. `damping` is GPTQ's.
    """

    damping: Annotated[StrictFloat, Field(gt=0, le=1)] | None = None
    minimum_tokens: StrictInt = Field(ge=1)
    below: Literal["nearest", "widest", "stop"]
    reason: Text


class Choose(Record):
    """Schemes that the build picks from for every tensor under a rule of kind `chosen`, a group of a layer at a time.

    Groups are those of `groups.py`: a layer's attention, its shared expert or MLP, and its experts. Their matrices
    together take at most `budget` of what they take in bf16.
    """

    budget: StrictFloat = Field(gt=0, le=2)
    candidates: list[Candidate] = Field(min_length=2)
    reason: Text


class Profile(Record):
    """One profile. `keep` is asked before `rules`, each in order, and the first selector that matches wins.

    A profile that calibrates must set the threshold `kl_over_rtn`, below 1: its logits' KL over that of its own rtn
    form, in which every integer is the nearest one and every scale the block's largest magnitude.
    """

    name: Text
    version: StrictInt = Field(ge=1)
    description: Text
    thresholds: Thresholds
    keep: list[Keep] = Field(default_factory=list)
    rules: list[Rule] = Field(default_factory=list)
    calibration: Calibration | None = None
    choose: Choose | None = None

    @model_validator(mode="after")
    def _calibrates_or_not(self) -> Self:
        rule, schemes = self.calibration, self._schemes
        if (self.choose is not None) != any(isinstance(scheme, Chosen) for scheme in schemes):
            raise ValueError("rules of kind `chosen` and a section `choose` need each other")
        if self.choose is not None and not any(candidate.calibrates for candidate in self.choose.candidates):
            raise ValueError("no candidate of `choose` rounds by gptq, so the profile could not beat its RTN baseline")
        uses = any(scheme.calibrates for scheme in schemes)
        if uses and rule is None:
            raise ValueError("a rule needs to see activations, so the profile needs a `calibration` section")
        if not uses and rule is not None:
            raise ValueError("no rule needs to see activations, so the `calibration` section would do nothing")
        if uses and not 0 < self.thresholds.get(OVER_RTN, 1) < 1:
            raise ValueError(f"a profile that calibrates must beat its RTN baseline: set thresholds.{OVER_RTN} below 1")
        if rule is None:
            return self
        static = any(isinstance(scheme, Static) and scheme.calibrates for scheme in schemes)
        if self.rounds_by_gptq != (rule.damping is not None):
            raise ValueError("calibration.damping is gptq's: give it where a rule rounds by gptq, and nowhere else")
        if (rule.below == "nearest" and static) or (rule.below == "widest" and self.rounds_by_gptq):
            raise ValueError("calibration.below: `nearest` is a rule for gptq only, `widest` for static scales only")
        return self

    @property
    def _schemes(self) -> list[Scheme]:
        return [*(rule.scheme for rule in self.rules), *(self.choose.candidates if self.choose else ())]

    @property
    def rounds_by_gptq(self) -> bool:
        """Whether calibration has to take second moments of the inputs."""
        return any(isinstance(scheme, IntBlock) and scheme.calibrates for scheme in self._schemes)

    @property
    def forms(self) -> list[Profile]:
        """The profiles that this one may turn out to be: one per candidate where it leaves a choice, else itself."""
        if self.choose is None:
            return [self]
        return [self._with_rules(partial(_settled, candidate)) for candidate in self.choose.candidates]

    def decide(self, choice: Mapping[str, int]) -> Profile:
        """This profile with the choice made: tensor -> number of its candidate, for every tensor under `chosen`."""
        if self.choose is None:
            return self
        made = [
            Rule(match=(tensor,), reason=self.choose.reason, scheme=self.choose.candidates[number])
            for tensor, number in choice.items()
        ]
        rest = [rule for rule in self.rules if not isinstance(rule.scheme, Chosen)]
        return self.model_copy(update={"rules": [*made, *rest], "choose": None})

    def fitted(self, quantised: Mapping[str, tuple[int, int] | None], names: Iterable[str]) -> Profile:
        """This profile with every rule of kind `as_stored` made the rules of the tensors `names` that it takes.

        `quantised` maps those that the checkpoint quantises to the form of their codes, None where no scheme holds it.
        Raises Problems for tensors that are to keep codes which the checkpoint does not hold.
        """
        taken = {name: next((one for one in self.selectors if one.takes(name)), None) for name in names}
        made, problems = [], []
        for name, selector in taken.items():
            scheme = None if selector is None else selector.scheme
            form = quantised.get(name)
            if isinstance(scheme, AsStored):
                own = scheme.held(form) if name in quantised else Exact()
                made.append(Rule(match=(name,), reason=selector.reason if selector else "", scheme=own))
            elif isinstance(scheme, IntBlock | Fp8) and scheme.rounding == "stored":
                asked = (scheme.bits, scheme.block) if isinstance(scheme, IntBlock) else (8, 0)
                if form != asked:
                    what = f"profile `{self.name}` keeps its codes, and the checkpoint has none of {scheme.label}"
                    remedy = "Take `kind: as_stored`, which keeps what there is"
                    problems.append(ArrieroError(what, where=name, remedy=remedy))
        if problems:
            raise Problems(f"profile `{self.name}` does not fit this checkpoint", problems)
        rest = [rule for rule in self.rules if not isinstance(rule.scheme, AsStored)]
        return self.model_copy(update={"rules": [*made, *rest]}) if made else self

    def rtn_baseline(self) -> Profile:
        """This profile without calibration: the same tensors stored the same way, each scheme in its RTN baseline."""
        return self._with_rules(lambda rule: rule.scheme.rtn_baseline()).model_copy(update={"calibration": None})

    def _with_rules(self, scheme: Callable[[Rule], Scheme]) -> Profile:
        rules = [rule.model_copy(update={"scheme": scheme(rule)}) for rule in self.rules]
        return self.model_copy(update={"rules": rules, "choose": None})

    @property
    def selectors(self) -> list[Selector]:
        """One per match, those of `keep`, then those of `rules`: the order in which they are asked."""
        return [selector for entry in (*self.keep, *self.rules) for selector in entry.selectors]

    def assign(self, names: Iterable[str]) -> dict[str, Scheme]:
        """Give the scheme of every tensor in `names`; raise Problems for idle selectors and undecided tensors."""
        selectors = self.selectors
        idle = {number for number, selector in enumerate(selectors) if not selector.may_be_idle}
        assigned: dict[str, Scheme] = {}
        problems: list[ArrieroError] = []
        for name in names:
            takers = [number for number, selector in enumerate(selectors) if selector.takes(name)]
            idle.difference_update(takers)
            if takers:
                assigned[name] = selectors[takers[0]].scheme
                continue
            remedy = f"Name it, or its group, under `keep` or `rules` of profile `{self.name}`"
            problems.append(ArrieroError("no selector of the profile decides this tensor", where=name, remedy=remedy))
        problems += [
            ArrieroError(
                f"selector `{selectors[number].match}` matches no tensor",
                where=f"profile {self.name}",
                remedy="Correct it, or mark it `optional: true` and say so in its reason",
            )
            for number in sorted(idle)
        ]
        if problems:
            raise Problems(f"profile `{self.name}` does not fit this checkpoint", problems)
        return assigned


def _settled(candidate: Scheme, rule: Rule) -> Scheme:
    return candidate if isinstance(rule.scheme, Chosen) else rule.scheme


def check_shapes(profile: Profile, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse, all at once and before anything runs, what `profile` asks of these tensors and cannot be done.

    A matrix is [N, K], a stack of experts [E, K, N]; K must divide into blocks. Calibration sees the decoder's layers
    and, for gptq, the head.
    """
    problems: list[ArrieroError] = []
    assigned = [pair for form in profile.forms for pair in form.assign(shapes).items()]
    for name, scheme in dict.fromkeys(assigned):
        if isinstance(scheme, Exact | Half):
            continue
        if len(shapes[name]) < 2:
            problems.append(ArrieroError("a vector cannot be quantised", where=name, remedy="Put it under `keep`"))
            continue
        if is_table(name):
            what = "it is a table that is read row by row, and no kernel reads it quantised"
            problems.append(ArrieroError(what, where=name, remedy="Put it under `keep`"))
        try:
            scheme.check(shapes[name], name)
        except ArrieroError as error:
            problems.append(error)
        if scheme.calibrates and not is_layer_matrix(name) and not (is_head(name) and isinstance(scheme, IntBlock)):
            problems.append(
                ArrieroError(
                    "calibration sees no inputs of this tensor",
                    where=name,
                    expected=f"{scheme.label} for matrices of the text decoder's layers, and gptq for the head, only",
                    remedy="Give it a scheme that needs no calibration, or put it under `keep`",
                )
            )
    if profile.choose is not None and not problems:
        problems += _check_budget(profile, profile.choose, shapes)
    if problems:
        raise Problems(f"profile `{profile.name}` does not fit this checkpoint", problems)


def _check_budget(profile: Profile, choose: Choose, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[ArrieroError]:
    names = [name for name, scheme in profile.assign(shapes).items() if isinstance(scheme, Chosen)]
    least = min(sum(scheme.stored_bytes(shapes[name]) for name in names) for scheme in choose.candidates)
    whole = sum(2 * math.prod(shapes[name]) for name in names)
    if least > choose.budget * whole:
        yield ArrieroError(
            f"even the smallest candidate takes {least / whole:.3f} of bf16",
            where=f"profile {profile.name}: choose.budget",
            expected=f"at most {choose.budget:g}",
            remedy="Raise the budget, or add a smaller candidate",
        )


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
    document = Document(path, "profile", "Start from a shipped one: `arriero profiles show int8`")
    profile = validated(document, Profile)
    document.raise_problems()
    assert profile is not None  # or there were problems
    return profile
