"""How many entries the lists of a request may have that become its prompt, counted before any of them is looked at."""

from __future__ import annotations

from collections.abc import Sized

from arriero.runtimes.server.errors import RefusalError


class EntryLimit:
    """The entries of one request's lists, against a context: each message, part or tool is a token at least."""

    def __init__(self, context: int) -> None:
        """Let there be at most `context` entries in all lists together."""
        self._context, self._count = context, 0

    def take(self, entries: Sized, where: str) -> None:
        """Count the `entries` of the list at `where`. Raises RefusalError where they are too many for the context."""
        self._count += len(entries)
        if self._count > self._context:
            message = (
                f"{where} brings the entries of the request to {self._count:,}; expected at most {self._context:,}, "
                "the tokens of the context: each is one at least."
            )
            raise RefusalError(400, message, param=where, code="context_length_exceeded")
