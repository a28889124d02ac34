"""Bundles in, sessions out."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib import import_module
from numbers import Integral
from pathlib import Path

from arriero.errors import ArrieroError
from arriero.runtimes.backend import Backend, BackendOptions, MemoryCap, ModelSpec
from arriero.runtimes.bundle_memory import bundle_bytes, planned_tokens, token_bytes
from arriero.runtimes.integrity import check_proven, open_manifest
from arriero.runtimes.machine_fit import check_machine
from arriero.runtimes.manifest import Manifest
from arriero.runtimes.memory import available_memory
from arriero.runtimes.processor.processor import Processor
from arriero.runtimes.scheduler import EngineLimits
from arriero.runtimes.session import Session
from arriero.sizes import parse_bytes
from arriero.traits import MOST_DRAFTED, TRAITS

DEFAULT_OPTIONS = BackendOptions()
MOST_PREFIXES = 1 << 30  # bytes of the prefix cache, where a caller names no other


def load(
    bundle: str | os.PathLike[str],
    threads: int | None = None,
    verify: bool = False,
    allow_unproven: bool = False,
    adapter: str | None = None,
    batch: int | None = None,
    prefix_cache: int | None = None,
    memory: int | str | None = None,
    speculate: int = 0,
    draft: str | os.PathLike[str] | None = None,
    context: int | None = None,
) -> Session:
    """Open a bundle directory and give a `Session` that answers from it.

    The manifest and the files are checked first; with `verify` every file is hashed, however large the bundle.
    A bundle that its build could not prove is refused unless `allow_unproven`: nobody has measured what it computes.
    `threads` None uses every core this process may run on. `adapter` names the bundle's adapter that answers where a
    call names none; None is the model itself. `batch` sequences are decoded at once, as many as the bundle was built
    for when None; engines for a GPU take no more than that. `prefix_cache` is how many bytes may hold what was read
    before, so that prompts which begin alike are not read twice: an eighth of the free memory when None, at most 1 GiB;
    0 for none, as under a cap. `memory`, a size such as "16GiB", is the most that the process may take: experts are
    then read as they are needed, and those used last are kept. With `speculate` up to so many tokens of an answer are
    drafted from what the prompt and it have said, and checked in one step: the tokens are those that would be chosen
    without. `draft`, a smaller bundle with the same tokenizer, drafts them instead; `memory` has room for both.
    `context` is the most tokens of a sequence, prompt and answer together, where that is to be less than the bundle was
    built for: a cap sets memory aside for it. Raises `ArrieroError` with what is wrong and what to do.
    """
    for name, folder in (("bundle", bundle), ("draft", draft)):
        if not isinstance(folder, str | os.PathLike) and (name, folder) != ("draft", None):
            raise ArrieroError(f"{name} is {folder!r:.60}", expected="the path of a bundle directory")
    _check_whole("prefix_cache", prefix_cache)
    _check_whole("batch", batch)
    _check_whole("context", context)
    limit = None if memory is None else parse_bytes(memory)
    manifest = limit_context(open_manifest(Path(bundle), verify or None), context)
    drafting = None if draft is None else open_manifest(Path(draft), verify or None)
    if prefix_cache is None:
        most = 0 if limit is not None else MOST_PREFIXES
        prefix_cache = min((available_memory() or most) // 8, most)
    rows = batch or manifest.target.batch
    cap = None
    if limit is not None:
        beside = prefix_cache if drafting is None else prefix_cache + bundle_bytes(drafting, planned_tokens(manifest))
        cap = MemoryCap(limit - beside, manifest.target.context, rows)
    options = BackendOptions(threads, memory=cap)
    for one in (manifest, drafting):
        if one is not None and not allow_unproven:
            check_proven(one)
    return open_session(manifest, options, adapter, batch, prefix_cache, speculate=speculate, draft=drafting)


def open_session(
    manifest: Manifest,
    options: BackendOptions = DEFAULT_OPTIONS,
    adapter: str | None = None,
    batch: int | None = None,
    prefix_cache: int = 0,
    tokens: int | None = None,
    speculate: int = 0,
    draft: Manifest | None = None,
) -> Session:
    """Give a session over a bundle that is what its manifest says, proven or not yet. Raises as `check_machine`.

    `tokens` are held at once at most; None is those whose keys and values the free memory has room for. The bundle
    `draft` drafts the answers.
    """
    check_batch(manifest, batch)
    whole = isinstance(speculate, Integral) and not isinstance(speculate, bool)
    if not (whole and 0 <= speculate <= MOST_DRAFTED):
        raise ArrieroError(f"speculate is {speculate!r:.60}", expected=f"0, or up to {MOST_DRAFTED} tokens")
    check_machine(manifest)
    processor = Processor(manifest.bundle / "tokenizer", manifest.model)
    target = manifest.target
    per_token = token_bytes(manifest)
    rows = batch or target.batch
    if draft is not None:
        check_draft(draft, processor, speculate, rows)
        per_token += token_bytes(draft)
    backend = open_bundle_backend(manifest, options)
    drafting = None if draft is None else _open_draft(draft, options, backend)
    if options.memory is not None:  # which has set them aside
        tokens = rows * target.context
    elif tokens is None:
        # what was planned for must always fit; more is admitted as far as the memory goes that is free now
        free = available_memory()
        tokens = None if free is None or not per_token else max(free // per_token, planned_tokens(manifest))
    limits = EngineLimits(rows, target.context, tokens, prefix_cache, speculate)
    return Session(
        backend,
        processor,
        target.context,
        rows,
        tuple(manifest.adapters),
        adapter,
        limits,
        manifest.chain.artifact,
        drafting,
    )


def check_draft(draft: Manifest, processor: Processor, speculate: int, rows: int) -> None:
    """Refuse a bundle that cannot draft for `rows` answers to prompts of `processor`, or is not asked for a token."""
    if not speculate:
        what, remedy = "a draft bundle is given and speculate is 0", "Set speculate, to 4 for instance"
        raise ArrieroError(what, expected=f"up to {MOST_DRAFTED} tokens to draft", remedy=remedy)
    check_batch(draft, rows)
    check_machine(draft)
    processor.check_same_tokens(Processor(draft.bundle / "tokenizer", draft.model))


def _open_draft(draft: Manifest, options: BackendOptions, backend: Backend) -> Backend:
    """Give the backend of the bundle that drafts; `backend` is closed where it cannot be opened."""
    try:
        return open_bundle_backend(draft, replace(options, memory=None))
    except BaseException:
        backend.close()
        raise


def _check_whole(name: str, value: object) -> None:
    """Refuse what is neither None nor a whole number."""
    if value is not None and (not isinstance(value, Integral) or isinstance(value, bool)):
        raise ArrieroError(f"{name} is {value!r:.60}", expected="a whole number")


def limit_context(manifest: Manifest, context: int | None) -> Manifest:
    """The manifest of a bundle whose sequences have at most `context` tokens; as it is where that is None."""
    target = manifest.target
    if context is None:
        return manifest
    if not 1 <= context <= target.context:
        raise ArrieroError(
            f"context is {context}",
            where=str(manifest.bundle),
            expected=f"1 to {target.context} tokens, which the bundle was built for",
            remedy=f"Build the target with `context: {context}`" if context > 0 else None,
        )
    return replace(manifest, target=replace(target, context=context))


def check_batch(manifest: Manifest, batch: int | None) -> None:
    """Refuse to decode `batch` sequences at once where that is none, or more than the bundle's engines take."""
    most = manifest.target.batch
    if batch is not None and batch < 1:
        raise ArrieroError(f"batch is {batch}", expected="at least 1")
    if batch is not None and batch > most and TRAITS[manifest.target.backend].compiles_for == "gpu":
        raise ArrieroError(
            f"batch is {batch}",
            where=str(manifest.bundle),
            expected=f"at most {most}, which the engines were built for",
            remedy=f"Build the target with `batch: {batch}`",
        )


def open_bundle_backend(manifest: Manifest, options: BackendOptions = DEFAULT_OPTIONS) -> Backend:
    """Give the backend of a bundle that is what its manifest says; code that changes from now on is refused."""
    options = replace(options, sha256={name: record.sha256 for name, record in manifest.files.items()})
    return open_backend(manifest.target.backend, manifest.bundle, manifest.model, options)


def open_backend(name: str, folder: Path, spec: ModelSpec, options: BackendOptions = DEFAULT_OPTIONS) -> Backend:
    """Give the backend `name` (a key of `TRAITS`) over the graphs and weights in `folder`."""
    traits = TRAITS[name]
    if options.memory is not None and traits.no_cap is not None:
        capped = ", ".join(other for other, one in TRAITS.items() if one.no_cap is None)
        remedy = f"Leave `memory` out, or build a target with the backend {capped}"
        raise ArrieroError(f"{name} keeps to no cap on memory: {traits.no_cap}", where=str(folder), remedy=remedy)
    # By name, so that an app needs the libraries of its own backend only.
    backend: Backend = import_module(f"arriero.runtimes.{traits.module}").open_backend(folder, spec, options)
    return backend
