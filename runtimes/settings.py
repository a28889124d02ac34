"""The settings of an answer as keyword arguments, spelled out once: how tokens are chosen, and when the answer ends."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Integral
from typing import Any

from arriero.errors import ArrieroError
from arriero.runtimes.sampling import Sampling, SamplingSettings


class Settings(SamplingSettings, total=False):
    """What `Session.generate` and `generate_batch` take by name: `sampling`, or its fields one by one, and the limits.

    `max_tokens` None fills the context. An answer ends before a `stop` text, and soon after `cancel` is set.
    """

    sampling: Sampling
    max_tokens: int | None
    stop: str | Sequence[str]
    cancel: threading.Event | None


@dataclass(frozen=True)
class Limits:
    """When the caller wants an answer to end: after `max_tokens`, before a `stop` text, or once `cancel` is set."""

    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    cancel: threading.Event | None = None

    def __post_init__(self) -> None:
        most = self.max_tokens
        if most is not None and not (isinstance(most, Integral) and most >= 1):
            raise ArrieroError(f"max_tokens is {most!r}", expected="a whole number of at least 1")
        for text in self.stop:
            if not isinstance(text, str):
                raise ArrieroError(f"a stop text is {text!r}", expected="text")
            if not text:
                raise ArrieroError("a stop text is empty", expected="at least one character")


def read_settings(settings: Settings) -> tuple[Sampling, Limits]:
    """Give the two records that `settings` spell. Raises `ArrieroError` for an unknown, doubled or impossible one."""
    known = Settings.__annotations__
    for name in settings:
        if name not in known:
            nearest = get_close_matches(name, known, n=1, cutoff=0.4)
            remedy = f"Did you mean {nearest[0]}?" if nearest else "Leave it out"
            raise ArrieroError(f"there is no setting {name}", expected=f"one of {', '.join(known)}", remedy=remedy)
    sampled = SamplingSettings.__annotations__
    fields: dict[str, Any] = {name: value for name, value in settings.items() if name in sampled}
    sampling = settings.get("sampling")
    if "sampling" not in settings:
        sampling = Sampling(**fields)
    elif not isinstance(sampling, Sampling):
        raise ArrieroError(f"sampling is {sampling!r}", expected="a `Sampling`")
    elif fields:
        raise ArrieroError(
            f"{', '.join(fields)} and sampling both say how to choose a token",
            remedy=f"Leave sampling out, or put {', '.join(fields)} into it",
        )
    stop = settings.get("stop", ())
    stops = (stop,) if isinstance(stop, str) or not isinstance(stop, Iterable) else tuple(stop)
    return sampling, Limits(settings.get("max_tokens"), stops, settings.get("cancel"))
