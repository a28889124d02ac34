"""PDF documents as pictures of their pages, drawn on white at the size that Llama 4 sees."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from arriero.errors import ArrieroError, MachineLacks
from arriero.runtimes.broken_package import importing
from arriero.runtimes.processor.images import Tiler
from arriero.traits import install

if TYPE_CHECKING:
    from pypdfium2 import PdfDocument

LONG_SIDE = 4 * Tiler.size  # pixels: a page fills the longest side of the square that the most tiles make
MOST_PAGES = 1024  # that may be taken of a document
NO_FILE, ENCRYPTED = 2, 4  # PDFium's numbers for why it opens no document
_pdfium = threading.Lock()  # the library may be in one call at a time


def read_document(
    path: str | os.PathLike[str], pages: Sequence[int] | None = None, most: int = MOST_PAGES
) -> list[Image.Image]:
    """Give the pages of a PDF as RGB pictures: those whose numbers, from 1, are in `pages`, or all.

    Raises ArrieroError for more than `most`, for pages that are not there, and for a file that cannot be read.
    """
    name, most = str(path), min(most, MOST_PAGES)
    with _pdfium, _opened(path) as document:
        count = len(document)
        numbers = range(1, count + 1) if pages is None else _checked(pages, count, name)
        if len(numbers) > most:
            what = f"{'the document has' if pages is None else 'pages names'} {len(numbers):,} pages"
            remedy = "Name fewer as `pages`, or build the bundle with a larger `context`"
            raise ArrieroError(what, where=name, expected=f"at most {most:,} pictures together", remedy=remedy)
        return [_drawn(document, number, name) for number in numbers]


def _checked(pages: Any, count: int, name: str) -> Sequence[int]:
    whole = isinstance(pages, Sequence) and all(type(number) is int for number in pages)
    if not whole or not pages or not all(1 <= number <= count for number in pages):
        raise ArrieroError(f"pages is {pages!r:.60}", where=name, expected=f"a list of numbers from 1 to {count}")
    return list(pages)


@contextmanager
def _opened(path: Any) -> Iterator[PdfDocument]:
    remedy = f"Install it with `{install('documents')}`, or pass the pages as images"
    absent = MachineLacks("reading a PDF needs the package pypdfium2", where=str(path), remedy=remedy)
    with importing("pypdfium2", absent=absent):
        import pypdfium2
    if not (isinstance(path, str | os.PathLike) and Path(path).is_file()):
        raise ArrieroError("there is no such document", where=str(path), remedy="Check the path")
    # For a document without pages PDFium gives no reason, and the last one stays: that there is no file called "".
    pypdfium2.raw.FPDF_LoadDocument(b"", None)
    try:
        document = pypdfium2.PdfDocument(Path(path))
    except pypdfium2.PdfiumError as error:
        what, remedy = f"this is not a readable PDF ({error})", "Check that the file is complete and is a PDF"
        if error.err_code == ENCRYPTED:
            what, remedy = "the document is encrypted", "Save a copy without a password"
        elif error.err_code == NO_FILE:
            what, remedy = "the document has no pages", "Show one that has"
        raise ArrieroError(what, where=str(path), expected="a PDF of at least one page", remedy=remedy) from None
    try:
        document.init_forms()  # without it what is filled into a form is not drawn
        yield document
    finally:
        document.close()


def _drawn(document: PdfDocument, number: int, name: str) -> Image.Image:
    import pypdfium2

    try:
        page = document[number - 1]
        picture: Image.Image = page.render(scale=LONG_SIDE / max(page.get_size())).to_pil()
    except (pypdfium2.PdfiumError, ArithmeticError, ValueError) as error:
        what = f"page {number} cannot be drawn ({error})"
        raise ArrieroError(what, where=name, remedy="Get a complete copy of the file") from None
    return picture.convert("RGB")
