"""What an open bundle takes of a machine's memory, from its manifest: an estimate on the safe side."""

from __future__ import annotations

from arriero.runtimes.manifest import Manifest
from arriero.traits import TRAITS

EXACT = "exact"  # the scheme of weights that are not packed anew


def token_bytes(manifest: Manifest) -> int:
    """Keys and values of one token in every layer; chunked layers hold those of a chunk at most."""
    return sum(manifest.kv_bytes_per_token.get(layer.attention, 0) for layer in manifest.model.layers)


def planned_tokens(manifest: Manifest) -> int:
    """The tokens that the bundle was built to hold at once."""
    return manifest.target.batch * manifest.target.context


def session_bytes(manifest: Manifest, prefix_cache: int, draft: Manifest | None = None) -> int:
    """An open session's weights, keys and values of its planned tokens, prefixes, and what its backend takes besides.

    So does the bundle that drafts its answers, for the same tokens.
    """
    tokens = planned_tokens(manifest)
    beside = 0 if draft is None else bundle_bytes(draft, tokens)
    return bundle_bytes(manifest, tokens) + prefix_cache + beside


def weight_bytes(manifest: Manifest) -> int:
    """Bytes of the files that hold a bundle's weights."""
    files = {file for weight in manifest.weights.values() for file in weight.files}
    return sum(manifest.files[file].bytes for file in files)


def bundle_bytes(manifest: Manifest, tokens: int) -> int:
    """A bundle's weights, keys and values of so many tokens, and what its backend takes besides.

    A backend that does not map its weights copies them, and quantised ones a second time, packed.
    """
    takes = TRAITS[manifest.target.backend].footprint
    weights = weight_bytes(manifest)
    if not takes.maps_weights and any(weight.scheme != EXACT for weight in manifest.weights.values()):
        weights *= 2
    fixed = takes.runtime + takes.layer * len(manifest.model.layers) + takes.stays
    return weights + tokens * token_bytes(manifest) + fixed
