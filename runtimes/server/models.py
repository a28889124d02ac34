"""The models that a server answers with, by the names that clients use: each bundle, and each of its adapters."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from arriero.runtimes.server.bundles import Bundle, Bundles
from arriero.runtimes.server.errors import RefusalError
from arriero.runtimes.session import Session


@dataclass(frozen=True)
class Model:
    """A bundle and the adapter to answer with; `name` is `BUNDLE`, or `BUNDLE:ADAPTER`."""

    name: str
    bundle: Bundle
    adapter: str | None

    @property
    def session(self) -> Session:
        """What answers; the bundle is in use and open."""
        assert self.bundle.session is not None
        return self.bundle.session

    @property
    def fingerprint(self) -> str:
        """What clients compare to see whether answers may differ."""
        return f"arriero-{self.bundle.identity[:12]}"


class Models:
    """The models by name."""

    def __init__(self, bundles: Bundles) -> None:
        """Serve `bundles` by name."""
        self._bundles, self._started = bundles, int(time.time())
        self._models: dict[str, Model] = {}
        for name, bundle in bundles.by_name.items():
            self._models[name] = Model(name, bundle, None)
            for adapter in bundle.adapters:
                self._models[f"{name}:{adapter}"] = Model(f"{name}:{adapter}", bundle, adapter)

    @property
    def has_default(self) -> bool:
        """Whether a request need not name a model."""
        return len(self._bundles.by_name) == 1

    def get(self, name: str | None) -> Model:
        """The model of that name; the only bundle's own where none is named."""
        if name is None and self.has_default:
            return next(iter(self._models.values()))
        if name not in self._models:
            said = "No model is named" if name is None else f"There is no model {name!r:.100}"
            message = f"{said}; expected one of {', '.join(self._models)}."
            raise RefusalError(404 if name else 400, message, param="model", code="model_not_found")
        return self._models[name]

    @property
    def names(self) -> list[str]:
        """The models' names."""
        return list(self._models)

    def entry(self, name: str) -> dict[str, Any]:
        """A model as the API lists it."""
        model = self.get(name)
        return {
            "id": model.name,
            "object": "model",
            "created": self._started,
            "owned_by": "arriero",
            "max_model_len": model.bundle.context,
        }

    def entries(self) -> dict[str, Any]:
        """All models as the API lists them."""
        return {"object": "list", "data": [self.entry(name) for name in self._models]}
