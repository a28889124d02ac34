"""Where a store's objects lie: in a folder, or behind any URL that fsspec opens; each is written whole.

What comes out of a store is checked by whoever asked for it: a name says what is read, never what it holds.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from arriero.errors import ArrieroError, MachineLacks, is_full, sentence_of
from arriero.runtimes.broken_package import importing
from arriero.traits import install

INCOMING = "incoming"  # of a folder, where objects are while they are being written
ABANDONED = 3600.0  # seconds after which nobody is writing one any more
HERE = ("file://", "local://")
AGAIN = "Check the address, the network and the credentials, and run the command again: what has arrived stays"


class ObjectStore(Protocol):
    """Objects by name; folders in a name are set off by slashes."""

    def read(self, name: str, most: int) -> bytes:
        """The first `most` bytes (at least 1) of an object. Raises ArrieroError where there is none."""
        ...

    def size(self, name: str) -> int | None:
        """The bytes of an object; None where there is none."""
        ...

    def write(self, name: str, content: bytes) -> None:
        """Make `content` the object `name`."""
        ...

    def names(self, folder: str) -> list[str]:
        """What lies in `folder`, sorted; nothing where there is no such folder."""
        ...

    def place(self, name: str) -> str:
        """Where an object lies, for people."""
        ...


def open_store(address: str) -> ObjectStore:
    """The store at a path or URL. Raises ArrieroError or MachineLacks where it cannot be opened."""
    for scheme in HERE:
        if address.startswith(scheme):
            return FolderStore(Path(address.removeprefix(scheme)))
    return UrlStore(address) if "://" in address or "::" in address else FolderStore(Path(address))


class FolderStore:
    """Objects as the files of a folder, each put there by a rename."""

    def __init__(self, root: Path) -> None:
        """Take the objects under `root`, which the first one that is written makes."""
        self.root = root

    def read(self, name: str, most: int) -> bytes:
        """See `ObjectStore`."""
        path = self.root / name
        if not path.is_file():  # a pipe would be waited for
            raise _absent(self.place(name))
        with path.open("rb") as file:
            return file.read(most)

    def size(self, name: str) -> int | None:
        """See `ObjectStore`."""
        path = self.root / name
        return path.stat().st_size if path.is_file() else None

    def write(self, name: str, content: bytes) -> None:
        """See `ObjectStore`."""
        path, incoming = self.root / name, self.root / INCOMING
        for folder in (incoming, path.parent):
            folder.mkdir(parents=True, exist_ok=True)
        descriptor, scratch = tempfile.mkstemp(dir=incoming)
        try:
            with open(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(descriptor)
            os.chmod(scratch, 0o644)
            os.replace(scratch, path)
        except BaseException:
            Path(scratch).unlink(missing_ok=True)
            raise
        self._clear(incoming)

    def names(self, folder: str) -> list[str]:
        """See `ObjectStore`."""
        path = self.root / folder
        return sorted(os.listdir(path)) if path.is_dir() else []

    def place(self, name: str) -> str:
        """See `ObjectStore`."""
        return str(self.root / name)

    def _clear(self, incoming: Path) -> None:
        """Delete what pushes that were killed had begun to write."""
        for entry in incoming.iterdir():
            with contextlib.suppress(OSError):  # another push may have been faster
                if time.time() - entry.stat().st_mtime > ABANDONED:
                    entry.unlink()


class UrlStore:
    """Objects behind a URL, as fsspec reads and writes them."""

    def __init__(self, url: str) -> None:
        """Open `url`; credentials and options are those that the URL's own fsspec package finds."""
        remedy = f"Install it with `{install('store')}`, or give a folder"
        with importing("fsspec", absent=MachineLacks("the package fsspec is not installed", where=url, remedy=remedy)):
            import fsspec
        self.url = url.rstrip("/")
        with _answers(url):
            try:
                # what an earlier listing said of the store may no longer hold
                self._files, path = fsspec.url_to_fs(self.url, skip_instance_cache=True)
                self._files.invalidate_cache()
            except ImportError as error:
                what = f"its protocol needs another package ({sentence_of(error)})"
                raise MachineLacks(what, where=url, remedy="Install it with pip") from None
            except ValueError as error:
                remedy = "Give a folder, or a URL of a protocol that fsspec knows"
                raise ArrieroError(f"is no store ({sentence_of(error)})", where=url, remedy=remedy) from None
        self._root = str(path).rstrip("/")

    def read(self, name: str, most: int) -> bytes:
        """See `ObjectStore`."""
        with _answers(self.place(name)):
            content: bytes = self._files.cat_file(self._path(name), start=0, end=most)
        return content[:most]  # a server that knows no ranges sends all of it

    def size(self, name: str) -> int | None:
        """See `ObjectStore`."""
        with _answers(self.place(name)):
            try:
                entry: dict[str, Any] = self._files.info(self._path(name))
            except FileNotFoundError:
                return None
        return entry["size"] if entry["type"] == "file" else None

    def write(self, name: str, content: bytes) -> None:
        """See `ObjectStore`."""
        path = self._path(name)
        with _answers(self.place(name)):
            try:
                self._files.pipe_file(path, content)
            except FileNotFoundError:  # the folders of some file systems have to be made
                self._files.makedirs(path.rpartition("/")[0], exist_ok=True)
                self._files.pipe_file(path, content)

    def names(self, folder: str) -> list[str]:
        """See `ObjectStore`."""
        with _answers(self.place(folder)):
            try:
                entries: list[str] = self._files.ls(self._path(folder), detail=False)
            except FileNotFoundError:
                return []
        return sorted({entry.rstrip("/").rpartition("/")[2] for entry in entries})

    def place(self, name: str) -> str:
        """See `ObjectStore`."""
        return f"{self.url}/{name}"

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"


def _absent(where: str) -> ArrieroError:
    return ArrieroError("is not in the store", where=where, remedy="Check the address, or push the bundle again")


@contextlib.contextmanager
def _answers(where: str) -> Iterator[None]:
    """Within the block, what a store's package raises becomes an error at `where`."""
    try:
        yield
    except (ArrieroError, MemoryError):
        raise
    except FileNotFoundError:
        raise _absent(where) from None
    except PermissionError as error:
        remedy = "Check the credentials, and what they may read and write"
        raise ArrieroError(f"the store refuses it ({sentence_of(error)})", where=where, remedy=remedy) from error
    except Exception as error:  # each package has errors of its own
        if is_full(error):
            raise
        raise MachineLacks(f"the store does not answer ({sentence_of(error)})", where=where, remedy=AGAIN) from error
