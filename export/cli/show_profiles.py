"""What profiles say, for people and machines: the list, one in full, why a tensor is stored so, two compared."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arriero.errors import ArrieroError
from arriero.export.cli.tables import print_rows, print_wrapped
from arriero.profiles.groups import GROUPS, group_of
from arriero.profiles.recipe import Profile, load_profile, shipped
from arriero.profiles.selectors import Entry

if TYPE_CHECKING:
    from rich.console import Console

INDENT = 12  # of what a profile says besides its selectors


def list_profiles() -> list[dict[str, Any]]:
    """Every shipped profile: name, version, description, whether it calibrates."""
    profiles = [load_profile(name) for name in shipped()]
    return [
        {
            "name": profile.name,
            "version": profile.version,
            "description": profile.description,
            "calibrates": profile.calibration is not None,
        }
        for profile in profiles
    ]


def describe_profile(profile: Profile) -> dict[str, Any]:
    """A profile as JSON values, each selector of `keep` and `rules` with its scheme and reason."""
    entries: dict[str, Sequence[Entry]] = {"keep": profile.keep, "rules": profile.rules}
    return profile.model_dump(mode="json") | {
        part: [
            {"match": one.match, "scheme": one.scheme.model_dump(mode="json"), "reason": one.reason}
            for entry in listed
            for one in entry.selectors
        ]
        for part, listed in entries.items()
    }


def explain(profile: Profile, tensor: str) -> dict[str, Any]:
    """The group of `tensor`, the selector of `profile` that decides it, why, and the later ones that would match too.

    Raises ArrieroError when no selector does.
    """
    takers = [selector for selector in profile.selectors if selector.takes(tensor)]
    if not takers:
        raise ArrieroError(
            f"no selector of profile `{profile.name}` decides this tensor",
            where=tensor,
            expected="a tensor's whole name, such as language_model.model.layers.0.self_attn.q_proj.weight",
        )
    first, group = takers[0], group_of(tensor)
    return {
        "profile": profile.name,
        "tensor": tensor,
        "group": f"{group}: {GROUPS[group].holds}" if group else "none",
        "stored": first.scheme.description,
        "selector": first.match,
        "reason": " ".join(first.reason.split()),
        "overruled": [selector.match for selector in takers[1:]],
    }


def diff(left: Profile, right: Profile) -> list[dict[str, str | None]]:
    """What differs: thresholds, calibration, and each selector's scheme; the side that lacks it is None."""
    a, b = _facts(left), _facts(right)
    return [
        {"what": what, "left": a.get(what), "right": b.get(what)}
        for what in dict.fromkeys([*a, *b])
        if a.get(what) != b.get(what)
    ]


def show_profile(profile: Profile, console: Console) -> None:
    """Print a profile with every selector's reason."""
    print_wrapped(console, f"{profile.name} version {profile.version}: {profile.description}", style="bold")
    limits = ", ".join(f"{name} {value:g}" for name, value in profile.thresholds.items())
    print_wrapped(console, limits or "none", INDENT, "thresholds")
    if profile.calibration is not None:
        rule = profile.calibration
        damping = "" if rule.damping is None else f"damping {rule.damping:g}; "
        sentence = f"{damping}experts below {rule.minimum_tokens} tokens: {rule.below}. {rule.reason}"
        print_wrapped(console, sentence, INDENT, "calibration")
    if profile.choose is not None:
        candidates = "; ".join(candidate.description for candidate in profile.choose.candidates)
        sentence = f"within {profile.choose.budget:g} of bf16 among: {candidates}. {profile.choose.reason}"
        print_wrapped(console, sentence, INDENT, "choose")
    rows = [
        (selector.match, selector.scheme.description, " ".join(selector.reason.split()))
        for selector in profile.selectors
    ]
    print_rows(console, ("selector", "stored", "reason"), rows)


def show_rows(rows: list[dict[str, Any]], console: Console) -> None:
    """Print dictionaries of the same keys as a table."""
    if rows:
        print_rows(console, list(rows[0]), [[_cell(value) for value in row.values()] for row in rows])


def open_profile(name: str) -> Profile:
    """A shipped profile, one from a file, or the one that a published bundle's manifest names."""
    manifest = Path(name) / "manifest.json"
    if not manifest.is_file():
        return load_profile(name)
    from arriero.runtimes.manifest import Manifest

    return load_profile(Manifest.read(Path(name)).target.profile)


def _facts(profile: Profile) -> dict[str, str]:
    facts = {"version": str(profile.version), "description": profile.description}
    facts |= {f"thresholds.{name}": f"{value:g}" for name, value in profile.thresholds.items()}
    if profile.calibration is not None:
        settings = profile.calibration.model_dump(exclude_none=True)
        facts |= {f"calibration.{name}": str(value) for name, value in settings.items()}
    if profile.choose is not None:
        facts["choose.budget"] = f"{profile.choose.budget:g}"
        facts["choose.candidates"] = "; ".join(candidate.description for candidate in profile.choose.candidates)
    for selector in profile.selectors:
        facts[selector.match] = f"{selector.scheme.description}: {' '.join(selector.reason.split())}"
    return facts


def _cell(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "–", True: "yes", False: "no"}[value]
    return str(value)
