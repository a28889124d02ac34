"""The models that a server answers with, by the names that clients use: each bundle, and each of its adapters."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from arriero.runtimes.server.errors import RefusalError
from arriero.runtimes.session import Session


@dataclass(frozen=True)
class Model:
    """A session and the adapter to answer with; `name` is `BUNDLE`, or `BUNDLE:ADAPTER`."""

    name: str
    session: Session
    adapter: str | None

    @property
    def fingerprint(self) -> str:
        """What clients compare to see whether answers may differ."""
        return f"arriero-{self.session.identity[:12]}"


class Models:
    """The models by name."""

    def __init__(self, sessions: Mapping[str, Session]) -> None:
        """Serve the `sessions` of bundles by name."""
        self.sessions, self.started = dict(sessions), int(time.time())
        self._models: dict[str, Model] = {}
        for name, session in sessions.items():
            self._models[name] = Model(name, session, session.adapter)
            for adapter in session.adapters:
                self._models[f"{name}:{adapter}"] = Model(f"{name}:{adapter}", session, adapter)

    def get(self, name: str | None) -> Model:
        """The model of that name; the only bundle's own where none is named."""
        if name is None and len(self.sessions) == 1:
            return next(iter(self._models.values()))
        if name not in self._models:
            said = "No model is named" if name is None else f"There is no model {name!r:.100}"
            message = f"{said}; expected one of {', '.join(self._models)}."
            raise RefusalError(404 if name else 400, message, param="model", code="model_not_found")
        return self._models[name]

    def entry(self, name: str) -> dict[str, Any]:
        """A model as the API lists it."""
        model = self.get(name)
        return {
            "id": model.name,
            "object": "model",
            "created": self.started,
            "owned_by": "arriero",
            "max_model_len": model.session.context,
        }

    def entries(self) -> dict[str, Any]:
        """All models as the API lists them."""
        return {"object": "list", "data": [self.entry(name) for name in self._models]}

    def close(self) -> None:
        """Close every session."""
        for session in self.sessions.values():
            session.close()
