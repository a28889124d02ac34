"""The errors users see: what was wrong, where, what was expected, what to do; and the exit code of each kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

UNEXPECTED = 70  # the exit code of what no error here stands for: a fault of ours, EX_SOFTWARE of sysexits.h
STOPPED = 130  # the exit code of what Ctrl-C or SIGTERM ended
HOW_TO_GO_ON = "stopped; a build or a calibration goes on from here with the same command"


class ArrieroError(Exception):
    """A user's mistake, told in full. `exit_code` is what the command returns for it."""

    exit_code = 2

    def __init__(
        self, what: str, *, where: str | None = None, expected: str | None = None, remedy: str | None = None
    ) -> None:
        """Hold one problem: `what` was wrong, `where` (file:key or tensor name), `expected`, and the `remedy`."""
        self.what, self.where, self.expected, self.remedy = what, where, expected, remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        text = f"{self.where}: {self.what}" if self.where else self.what
        if self.expected:
            text += f"; expected {self.expected}"
        if self.remedy:
            text += f". {self.remedy}"
        return text if text.endswith((".", "?", "!")) else text + "."


class MachineLacks(ArrieroError):
    """The machine lacks something: memory, disk, a library, an instruction set, the network."""

    exit_code = 3


class BelowThreshold(ArrieroError):
    """A parity or quality row is below its threshold."""

    exit_code = 1


class Problems(ArrieroError):
    """Several problems found in one go, listed together."""

    def __init__(self, headline: str, problems: Sequence[ArrieroError]) -> None:
        """Hold `problems` (at least one) under `headline`."""
        self.headline, self.problems = headline, list(problems)
        if all(isinstance(problem, MachineLacks) for problem in self.problems):
            self.exit_code = MachineLacks.exit_code
        super().__init__(headline)

    def __reduce__(self) -> tuple[type[Problems], tuple[str, list[ArrieroError]]]:
        return type(self), (self.headline, self.problems)

    def __str__(self) -> str:
        lines = "\n".join(f"  {number}. {problem}" for number, problem in enumerate(self.problems, 1))
        return f"{self.headline}: {len(self.problems)} problem{'s' * (len(self.problems) != 1)}\n{lines}"


def raise_together(problems: Sequence[ArrieroError], headline: str) -> None:
    """Raise a single problem as it is, several as `Problems` under `headline`; nothing where there are none."""
    if problems:
        raise problems[0] if len(problems) == 1 else Problems(headline, problems)


def placed(error: ArrieroError, place: str) -> ArrieroError:
    """The single problem `error` with `place` before its own."""
    kind = MachineLacks if isinstance(error, MachineLacks) else ArrieroError
    where = f"{place}: {error.where}" if error.where else place
    return kind(error.what, where=where, expected=error.expected, remedy=error.remedy)


def sentence_of(error: BaseException) -> str:
    """What an error says, or what it is called where it says nothing."""
    if isinstance(error, KeyboardInterrupt):
        return HOW_TO_GO_ON
    return str(error) or type(error).__name__


def exit_code_of(error: BaseException) -> int:
    """The exit code of a command that `error` ended."""
    if isinstance(error, KeyboardInterrupt):
        return STOPPED
    return error.exit_code if isinstance(error, ArrieroError) else UNEXPECTED


def is_full(error: BaseException) -> bool:
    """Whether an error says that the disk is full, as the system does, or numpy, which forgets the number."""
    import errno

    if not isinstance(error, OSError):
        return False
    return error.errno in (errno.ENOSPC, errno.EDQUOT) or (
        error.errno is None and " requested and " in str(error) and str(error).endswith(" written")
    )


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The sentence that suggests the closest of the `known` words, or None when none is close."""
    import difflib

    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"Did you mean {close[0]!r}?" if close else None
