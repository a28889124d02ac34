"""The tensor ledger: every tensor of a checkpoint is consumed exactly once, or named in an error."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from arriero.errors import ArrieroError, Problems
from arriero.graphs.sources.weight_source import WeightSource

FLOAT_DTYPES = ("BF16", "F16", "F32")


def check_ledger(
    sources: Iterable[WeightSource], expected: Mapping[str, tuple[int, ...]], allowed_extra: Sequence[str] = ()
) -> None:
    """Raise `Problems` unless the tensors are exactly `expected` (name -> shape) in a float dtype we read.

    Names that fully match a regular expression of `allowed_extra` may be there besides. Findings that differ only in
    the layer number share one line.
    """
    findings: dict[tuple[str, str, str], list[str]] = {}

    def note(what: str, want: str, remedy: str, name: str) -> None:
        findings.setdefault((what, want, remedy), []).append(name)

    seen: set[str] = set()
    for source in sources:
        if source.name in seen:
            note("is there twice", "each tensor once", "Remove one of the two copies", source.name)
            continue
        seen.add(source.name)
        if source.name not in expected:
            if not any(re.fullmatch(pattern, source.name) for pattern in allowed_extra):
                note("is unknown to the config", "", "Is config.json the one of these weights?", source.name)
            continue
        if source.dtype.startswith("F8_"):
            remedy = "Is its scale missing, or quantization_config in config.json? Download them together"
            note(f"is stored as {source.dtype}", " or ".join(FLOAT_DTYPES), remedy, source.name)
        elif source.dtype not in FLOAT_DTYPES:
            note(f"is stored as {source.dtype}", " or ".join(FLOAT_DTYPES), "Use the bf16 checkpoint", source.name)
        if source.shape != tuple(expected[source.name]):
            want = f"{list(expected[source.name])}"
            remedy = "config.json and the weights are of different models"
            note(f"has shape {list(source.shape)}", want, remedy, source.name)
    for name in expected:
        if name not in seen:
            note("is missing", "", "Is a shard missing, or config.json of another model?", name)
    problems = [
        ArrieroError(what, where=where, expected=want or None, remedy=remedy)
        for (what, want, remedy), names in findings.items()
        for where in group_names(names)
    ]
    if problems:
        raise Problems("the checkpoint's tensors are not those of its config", problems)


def group_names(names: Iterable[str]) -> list[str]:
    """Fold names that differ in their first number only: `layers.{0-2,7}.x (4 tensors)`; order of first appearance."""
    groups: dict[str, list[int]] = {}
    for name in names:
        number = re.search(r"\d+", name)
        pattern = name if number is None else f"{name[: number.start()]}\0{name[number.end() :]}"
        groups.setdefault(pattern, []).extend([int(number.group())] if number else [])
    return [_show_group(pattern, sorted(numbers)) for pattern, numbers in groups.items()]


def _show_group(pattern: str, numbers: list[int]) -> str:
    if len(numbers) < 2:
        return pattern.replace("\0", str(numbers[0])) if numbers else pattern
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number <= runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    shown = ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return f"{pattern.replace(chr(0), '{' + shown + '}')} ({len(numbers)} tensors)"
