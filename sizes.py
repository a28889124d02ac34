"""Bytes as people write and read them."""

from __future__ import annotations

import re

from arriero.errors import ArrieroError

UNITS = {"B": 1} | {
    f"{prefix}{infix}B": base**power
    for power, prefix in enumerate("KMGTP", 1)
    for infix, base in (("", 1000), ("i", 1024))
}
SMALLEST_BUDGET = 1 << 20


def parse_bytes(value: int | str) -> int:
    """Read a size: `8GiB` (2^30), `8 GB` (10^9), or a plain number of bytes. Raises `ArrieroError` without `where`."""
    remedy = "Write a number and a unit: B, KB, MB, GB, TB (powers of 1000) or KiB, MiB, GiB, TiB (powers of 1024)"
    units = {unit.lower(): factor for unit, factor in UNITS.items()}
    if isinstance(value, int) and not isinstance(value, bool):
        size: float = value
    else:
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", str(value))
        unit = match.group(2).lower() if match else ""
        if isinstance(value, bool) or match is None or (unit and unit not in units):
            raise ArrieroError(f"{value!r} is not a size", expected="a size such as 8GiB", remedy=remedy)
        size = float(match.group(1)) * (units[unit] if unit else 1)
    if size < SMALLEST_BUDGET:
        what = f"{value} is less than {human_bytes(SMALLEST_BUDGET)}; is the unit missing?"
        raise ArrieroError(what, expected="a size such as 8GiB", remedy=remedy)
    return int(size)


def human_bytes(count: float) -> str:
    """Show bytes in the largest binary unit that leaves at least 1: 1536 -> `1.5 KiB`; three significant digits."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(count) < 1023.5 or unit == "TiB":
            break
        count /= 1024
    if unit == "B" or abs(count) >= 100:
        return f"{count:,.0f} {unit}"
    return f"{count:.3g} {unit}"
