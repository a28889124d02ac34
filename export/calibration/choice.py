"""Which candidate each group of matrices gets: errors measured layer by layer, then the best choice under the budget.

A profile with a `choose` section is calibrated once per candidate, each in a sub-folder of its roundings. What is
chosen is linked from there; the sub-folders are none of the stage's files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from arriero.profiles.groups import layer_group
from arriero.profiles.knapsack import Option, choose
from arriero.profiles.quantized_weights import QuantizedWeights
from arriero.profiles.recipe import Profile
from arriero.profiles.schemes import Chosen
from arriero.runtimes.manifest import Choice, ChosenScheme
from arriero.runtimes.typed_json import decode
from arriero.strict_json import read_json_object

CHOICE = "choice.json"
Shapes = Mapping[str, tuple[int, ...]]


def open_groups(profile: Profile, tensors: Sequence[str]) -> dict[tuple[int, str], list[str]]:
    """The groups that `profile` leaves to choice: (layer, group) -> their tensors."""
    groups: dict[tuple[int, str], list[str]] = {}
    for tensor, scheme in profile.assign(tensors).items():
        if isinstance(scheme, Chosen):
            groups.setdefault(layer_group(tensor), []).append(tensor)
    return dict(sorted(groups.items()))


def decide(profile: Profile, shapes: Shapes, errors: Mapping[str, Sequence[float]], folder: Path) -> None:
    """Choose by `errors` ("layer kind" -> error of each candidate), keep the choice and its roundings in `folder`."""
    assert profile.choose is not None
    candidates = profile.choose.candidates
    groups = open_groups(profile, list(shapes))
    options = [
        [
            Option(sum(candidate.stored_bytes(shapes[tensor]) for tensor in tensors), error)
            for candidate, error in zip(candidates, errors[f"{layer} {kind}"], strict=True)
        ]
        for (layer, kind), tensors in groups.items()
    ]
    whole = sum(2 * math.prod(shapes[tensor]) for tensors in groups.values() for tensor in tensors)
    chosen = choose(options, int(profile.choose.budget * whole))
    kept, offered = (
        QuantizedWeights(folder),
        [QuantizedWeights(folder / str(number)) for number in range(len(candidates))],
    )
    for tensors, number in zip(groups.values(), chosen, strict=True):
        kept.adopt(offered[number], tensors)
    # what is calibrated without a choice is the same in every form
    given = {name for name, scheme in profile.assign(list(shapes)).items() if scheme.calibrates}
    kept.adopt(offered[0], given.difference(*groups.values()))
    rows = tuple(
        ChosenScheme(
            layer=layer,
            group=kind,
            scheme=candidates[number].label,
            candidate=number,
            bytes=option[number].bytes,
            errors={one.label: each.error for one, each in zip(candidates, option, strict=True)},
            tensors=tuple(tensors),
        )
        for ((layer, kind), tensors), option, number in zip(groups.items(), options, chosen, strict=True)
    )
    choice = Choice(profile.choose.budget, sum(row.bytes for row in rows) / whole, rows)
    partial = folder / f"{CHOICE}.partial"
    folder.mkdir(exist_ok=True)
    partial.write_text(json.dumps(asdict(choice)))
    partial.replace(folder / CHOICE)


def read_choice(folder: Path) -> Choice | None:
    """What was chosen for the profile whose roundings lie in `folder`; None where nothing was left to choice."""
    path = folder / CHOICE
    remedy = "Delete the folder and calibrate again"
    return decode(Choice, read_json_object(path, remedy), str(path), remedy) if path.is_file() else None


def decided(profile: Profile, folder: Path) -> Profile:
    """`profile` with the choice that calibration made in `folder`."""
    made = read_choice(folder)
    if made is None:
        return profile
    return profile.decide({tensor: row.candidate for row in made.groups for tensor in row.tensors})
