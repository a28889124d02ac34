"""Completes a bundle whose build had no machine to prove it on: the reports, and the manifest that records them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from arriero.runtimes.manifest import FILE, REPORTS, FileRecord, Manifest, link, parity_digest, proof_path
from arriero.runtimes.proof.pages import write_html
from arriero.runtimes.proof.report import ParityReport, write_json, write_text


def complete_proof(manifest: Manifest, proofs: Mapping[str | None, ParityReport], folder: Path) -> None:
    """Write the reports and the manifest that says the bundle is proven into `folder`, the manifest last.

    `proofs` are the reports of the model itself, under None, and of each adapter. In the bundle's own folder that
    completes it. From another, for a bundle that cannot be written to, the files complete any copy of it. Raises
    ArrieroError where they cannot be written.
    """
    for adapter, report in proofs.items():
        place = folder / proof_path(adapter)
        place.mkdir(parents=True, exist_ok=True)
        write_json(report, place / "parity.json")
        write_html(report, place / "parity.html")
    entries = json.loads((manifest.bundle / FILE).read_text(encoding="utf-8"))
    names = [proof_path(adapter, name) for adapter in proofs for name in REPORTS]
    reports = {name: FileRecord.of(folder / name) for name in names}
    entries["files"] |= {name: record.entry() for name, record in reports.items()}
    entries["files"] = dict(sorted(entries["files"].items()))
    entries["chain"]["parity"] = link(manifest.chain.record, parity_digest({**manifest.files, **reports}))
    write_text(folder / FILE, json.dumps(entries, indent=1) + "\n")
