"""What the doctor finds: one thing of this machine, whether it is there, and how to get it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One finding: `status` is ok or missing; `needed_for` says what stops without it (nothing: it is optional)."""

    name: str
    status: str
    found: str
    needed_for: tuple[str, ...]
    remedy: str | None = None


def status(ok: bool) -> str:
    """The word for whether a thing is there."""
    return "ok" if ok else "missing"
