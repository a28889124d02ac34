"""How a server opens a bundle's folder, and what it knows of the bundle before."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from arriero.errors import ArrieroError
from arriero.runtimes.api import MOST_PREFIXES, check_batch, limit_context, load, open_session
from arriero.runtimes.backend import BackendOptions, MemoryCap
from arriero.runtimes.bundle_memory import bundle_bytes, planned_tokens, session_bytes
from arriero.runtimes.integrity import check_proven, open_manifest
from arriero.runtimes.machine_fit import check_machine
from arriero.runtimes.manifest import Manifest
from arriero.runtimes.server.bundles import Bundle
from arriero.runtimes.session import Session
from arriero.traits import TRAITS

ROWS = 8  # answers that are decoded at once, where the bundle may have any number


@dataclass(frozen=True)
class BundleSource:
    """A bundle's folder and how it is to be opened; see `load`."""

    folder: Path
    threads: int | None
    batch: int | None
    prefix_cache: int | None
    memory: int | None
    speculate: int
    draft: Path | None = None
    context: int | None = None

    def at_once(self) -> Bundle:
        """The bundle, to be opened as `load` does."""
        manifest = limit_context(Manifest.read(self.folder), self.context)
        draft = None if self.draft is None else Manifest.read(self.draft)
        prefixes = MOST_PREFIXES if self.prefix_cache is None else self.prefix_cache
        rows = self._rows(manifest)
        opener = partial(
            load,
            self.folder,
            self.threads,
            batch=rows,
            prefix_cache=self.prefix_cache,
            speculate=self.speculate,
            draft=self.draft,
            context=self.context,
        )
        return self._bundle(manifest, session_bytes(manifest, prefixes, draft), opener)

    def on_demand(self, room: int) -> Bundle:
        """The bundle, checked now and opened later, within `room`.

        One that is larger keeps below the process' cap, experts read as they are needed, where its backend can.
        """
        manifest = self._open_manifest()
        check_proven(manifest)
        check_batch(manifest, self.batch)
        check_machine(manifest)
        draft = self._open_draft()
        prefixes = min(room // 8, MOST_PREFIXES) if self.prefix_cache is None else self.prefix_cache
        nbytes, capped = session_bytes(manifest, prefixes, draft), False
        if nbytes > room and TRAITS[manifest.target.backend].no_cap is None:
            nbytes, capped, prefixes = room, True, self.prefix_cache or 0
        return self._bundle(manifest, nbytes, partial(self._open, manifest.chain.artifact, prefixes, capped))

    def _open(self, identity: str, prefixes: int, capped: bool) -> Session:
        manifest = self._open_manifest()
        if manifest.chain.artifact != identity:
            what = "the bundle was replaced since the server was started"
            raise ArrieroError(what, where=str(self.folder), remedy="Start the server again")
        rows, draft = self._rows(manifest), self._open_draft()
        cap = None
        if capped:
            assert self.memory is not None
            beside = prefixes if draft is None else prefixes + bundle_bytes(draft, planned_tokens(manifest))
            cap = MemoryCap(self.memory - beside, manifest.target.context, rows or manifest.target.batch)
        options = BackendOptions(self.threads, memory=cap)
        return open_session(manifest, options, None, rows, prefixes, planned_tokens(manifest), self.speculate, draft)

    def _open_manifest(self) -> Manifest:
        return limit_context(open_manifest(self.folder), self.context)

    def _open_draft(self) -> Manifest | None:
        if self.draft is None:
            return None
        draft = open_manifest(self.draft)
        check_proven(draft)
        return draft

    def _rows(self, manifest: Manifest) -> int | None:
        target = manifest.target
        any_rows = TRAITS[target.backend].compiles_for != "gpu"
        return max(ROWS, target.batch) if self.batch is None and any_rows else self.batch

    def _bundle(self, manifest: Manifest, nbytes: int, opener: partial[Session]) -> Bundle:
        name, target = self.folder.resolve().name, manifest.target
        return Bundle(name, target.context, tuple(manifest.adapters), manifest.chain.artifact, nbytes, opener)
