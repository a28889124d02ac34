"""`arriero push` and `pull`: bundles to and from a store that many machines share."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from arriero.errors import ArrieroError
from arriero.export.cli.options import BundleFolder, Json, err, out, print_json

if TYPE_CHECKING:
    from arriero.export.store.list_bundles import StoredVersion

Store = Annotated[
    str,
    typer.Argument(
        help="The store: a folder, or a URL that fsspec opens, such as s3://bucket/models, gs://.., sftp://host/path."
    ),
]
Name = Annotated[
    str | None, typer.Option(help="The bundle's name in the store; that of its folder here when left out.")
]


def push(bundle: BundleFolder, dest: Store, name: Name = None, as_json: Json = False) -> None:
    """Bring a bundle into a store, as the latest version of its name.

    Files travel in chunks of 64 MiB, and only those that the store lacks: of a fine-tune that changed attention, those
    of attention. The same command goes on where one was stopped. Versions that are there stay, whoever pushes what.

    arriero push bundles/portable-int8 /mnt/models

    arriero push bundles/portable-int8 s3://bucket/models --name assistant

    URLs need the extra `store`, and the package that fsspec names for the protocol (s3fs, gcsfs, ..), which finds its
    credentials itself.
    """
    from arriero.export.cli.progress import Progress
    from arriero.export.store.layout import SHOWN
    from arriero.export.store.objects import open_store
    from arriero.export.store.push import push_bundle
    from arriero.sizes import human_bytes

    with Progress(err) as watch:
        pushed = push_bundle(bundle, open_store(dest), watch, name)
    if as_json:
        print_json(asdict(pushed))
        return
    sent = f"{pushed.sent_chunks} of {pushed.chunks} chunks sent, {human_bytes(pushed.sent_bytes)}"
    whole = f"{pushed.name}, version {pushed.version[:SHOWN]}, {human_bytes(pushed.bytes)}"
    out.print(f"{whole}: {sent}", markup=False, highlight=False, soft_wrap=True)


def pull(
    source: Store,
    folder: Annotated[
        Path | None, typer.Argument(help="The bundle's folder here; left out, the store's versions are listed.")
    ] = None,
    name: Name = None,
    version: Annotated[
        str | None, typer.Option(help="The first digits of the version to take; the one pushed last if left out.")
    ] = None,
    over: Annotated[
        list[Path] | None,
        typer.Option(help="A bundle here whose chunks are used too; give the option again for more."),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash every file of a bundle that is there already, and mend it.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Bring a bundle out of a store into a folder, or list what the store holds.

    Only chunks that no bundle here has are fetched: those of the version that is in the folder, and of --over, are
    used. Every chunk and every file is hashed on its way, and the bundle appears, or takes the place of an older one,
    by one rename when all of it is right. The same command goes on where one was stopped.

    arriero pull s3://bucket/models

    arriero pull s3://bucket/models bundles/portable-int8

    arriero pull s3://bucket/models bundles/german --name assistant --version 3f2a90 --over bundles/portable-int8

    It needs neither PyTorch nor a runtime. A bundle that was proven here stays when the store has it unproven.
    """
    from arriero.export.cli.progress import Progress
    from arriero.export.store.layout import SHOWN
    from arriero.export.store.list_bundles import list_bundles
    from arriero.export.store.objects import open_store
    from arriero.export.store.pull import pull_bundle
    from arriero.sizes import human_bytes

    if folder is None:
        if version is not None or over or verify:
            what = "--version, --over and --verify belong to a bundle's folder"
            raise ArrieroError(what, remedy="Give the folder that the bundle goes to")
        listed = [one for one in list_bundles(open_store(source)) if name in (None, one.name)]
        if as_json:
            print_json([asdict(one) for one in listed])
        else:
            _show(listed, source)
        return
    with Progress(err) as watch:
        pulled = pull_bundle(open_store(source), folder, watch, name, version, over or (), verify)
    if as_json:
        print_json(asdict(pulled))
        return
    fetched = "is there already" if pulled.current else f"{human_bytes(pulled.fetched_bytes)} fetched"
    whole = f"{pulled.name}, version {pulled.version[:SHOWN]}, {human_bytes(pulled.bytes)}"
    out.print(f"{whole}: {fetched}", markup=False, highlight=False, soft_wrap=True)


def _show(listed: list[StoredVersion], source: str) -> None:
    from arriero.export.cli.tables import print_rows
    from arriero.export.store.layout import SHOWN
    from arriero.sizes import human_bytes

    header = ("bundle", "version", "size", "for", "profile", "proof")
    rows = [
        (
            one.name,
            one.version[:SHOWN] + (", latest" if one.latest else ""),
            *(
                (human_bytes(one.bytes), f"{one.backend} on {one.arch}", one.profile, "yes" if one.proven else "none")
                if one.problem is None
                else ("", "", "", one.problem)
            ),
        )
        for one in listed
    ]
    print_rows(out, header, rows, f"{len(rows)} versions in {source}")
