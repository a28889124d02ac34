"""Pages of a PDF are pictures of one conversation; what cannot be read is named."""

import io
import sys
import threading

import numpy as np
import pytest
from PIL import Image

from arriero.errors import ArrieroError, MachineLacks
from arriero.runtimes.processor.documents import LONG_SIDE, read_document
from tests.runtimes.processor.test_processor import END, ONE, START, text_of

pypdfium2 = pytest.importorskip("pypdfium2", reason="needs the package pypdfium2")


def pdf(path, *bodies, box="0 0 200 100", trailer="", page=""):
    """Write a PDF by hand with a page for each body, in PDF's own drawing language."""
    pages = [f"{3 + 2 * n} 0 R" for n in range(len(bodies))]
    tree = f"<< /Type /Pages /Count {len(bodies)} /Kids [{' '.join(pages)}] >>"
    objects = ["<< /Type /Catalog /Pages 2 0 R >>", tree]
    for number, body in enumerate(bodies):
        objects.append(f"<< /Type /Page /Parent 2 0 R /MediaBox [{box}] {page} /Contents {4 + 2 * number} 0 R >>")
        objects.append(stream(body))
    return write(path, objects, trailer)


def stream(body, entries=""):
    return f"<< {entries} /Length {len(body)} >>\nstream\n{body}\nendstream"


def write(path, objects, trailer=""):
    content, places = b"%PDF-1.4\n", []
    for number, text in enumerate(objects, 1):
        places.append(len(content))
        content += f"{number} 0 obj\n{text}\nendobj\n".encode()
    table = "".join(f"{place:010} 00000 n \n" for place in places)
    end = f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n{table}trailer\n"
    end += f"<< /Size {len(objects) + 1} /Root 1 0 R {trailer} >>\nstartxref\n{len(content)}\n%%EOF\n"
    path.write_bytes(content + end.encode())
    return path


def filled(red, green, blue):
    return f"{red} {green} {blue} rg 0 0 100 100 re f"  # the left half


@pytest.fixture
def colours(tmp_path):
    return pdf(tmp_path / "a.pdf", filled(1, 0, 0), filled(0, 1, 0), filled(0, 0, 1))


def test_pages_are_drawn_on_white_at_the_size_that_the_model_sees(colours):
    pages = read_document(colours)
    assert [page.mode for page in pages] == ["RGB"] * 3
    assert [page.size for page in pages] == [(LONG_SIDE, LONG_SIDE // 2)] * 3
    half = LONG_SIDE // 2
    for page, colour in zip(pages, ([255, 0, 0], [0, 255, 0], [0, 0, 255]), strict=True):
        pixels = np.asarray(page)
        assert (pixels[:, : half - 2] == colour).all()
        assert (pixels[:, half + 2 :] == 255).all()


def test_a_page_that_a_reader_turns_is_turned(tmp_path):
    (page,) = read_document(pdf(tmp_path / "a.pdf", filled(1, 0, 0), page="/Rotate 90"))
    assert page.size == (LONG_SIDE // 2, LONG_SIDE)
    assert np.asarray(page)[: LONG_SIDE // 2 - 2, :, 1].max() == 0  # its left is on top now


def test_what_is_filled_into_a_form_is_drawn(tmp_path):
    widget = "/Type /Annot /Subtype /Widget /FT /Tx /T (a) /V (b) /F 4"
    objects = [
        "<< /Type /Catalog /Pages 2 0 R /AcroForm << /Fields [5 0 R] >> >>",
        "<< /Type /Pages /Count 1 /Kids [3 0 R] >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 100 100] /Contents 4 0 R /Annots [5 0 R] >>",
        stream(""),
        f"<< {widget} /Rect [10 10 90 90] /P 3 0 R /AP << /N 6 0 R >> >>",
        stream("1 0 0 rg 0 0 80 80 re f", "/Type /XObject /Subtype /Form /BBox [0 0 80 80]"),
    ]
    (page,) = read_document(write(tmp_path / "a.pdf", objects))
    assert page.getpixel((LONG_SIDE // 2, LONG_SIDE // 2)) == (255, 0, 0)


def test_pages_can_be_chosen(colours):
    assert [np.asarray(page)[5, 5].tolist() for page in read_document(colours, [3, 1])] == [[0, 0, 255], [255, 0, 0]]
    for pages in ([0], [4], [], "1", [True], 2, [1.0]):
        with pytest.raises(ArrieroError, match=r"a\.pdf: pages is .*a list of numbers from 1 to 3"):
            read_document(colours, pages)


def test_a_document_is_pictures_of_one_conversation(processor, colours):
    entries = [{"type": "document", "path": colours}, {"type": "text", "text": "what?"}, {"type": "image"}]
    prompt = processor.encode([{"role": "user", "content": entries}], [Image.new("RGB", (28, 28))])
    text = text_of(processor, prompt)
    assert text.count("<|image_start|>") == 4
    assert text.endswith(f"what?{ONE}{END}")
    assert text.startswith(START)
    chosen = processor.encode([{"role": "user", "content": [{**entries[0], "pages": [2]}]}])
    assert np.argmax(chosen.pixel_values[-1, :, 5, 5]) == 1  # the green page


def test_pages_beyond_the_context_are_refused_before_they_are_drawn(processor, colours, monkeypatch):
    monkeypatch.setattr("arriero.runtimes.processor.documents._drawn", None)
    entry = {"type": "document", "path": colours}
    with pytest.raises(ArrieroError, match=r"a\.pdf: the document has 3 pages; expected at most 2 pictures"):
        processor.encode([{"role": "user", "content": [entry]}], context=8)
    with pytest.raises(ArrieroError, match=r"pages names 3 pages"):
        processor.encode([{"role": "user", "content": [{**entry, "pages": [1, 1, 1]}]}], context=8)


def test_documents_that_cannot_be_read_are_refused(tmp_path):
    def refused(content, sentence):
        path = tmp_path / "b.pdf"
        path.write_bytes(content)
        with pytest.raises(ArrieroError, match=sentence):
            read_document(path)

    refused(b"no PDF", r"b\.pdf: this is not a readable PDF")
    refused(b"", "this is not a readable PDF")
    empty = io.BytesIO()
    pypdfium2.PdfDocument.new().save(empty)
    refused(empty.getvalue(), r"b\.pdf: the document has no pages; expected a PDF of at least one page")
    refused(pdf(tmp_path / "c.pdf").read_bytes(), "the document has no pages")
    secret = f"/Encrypt << /Filter /Standard /V 1 /R 2 /O <{'00' * 32}> /U <{'11' * 32}> /P -4 >> /ID [<00> <00>]"
    refused(
        pdf(tmp_path / "d.pdf", "", trailer=secret).read_bytes(), r"b\.pdf: the document is encrypted; .* Save a copy"
    )
    for path in (tmp_path / "missing.pdf", tmp_path, 5, None):
        with pytest.raises(ArrieroError, match="there is no such document"):
            read_document(path)


def test_a_page_as_long_as_a_ribbon_is_still_a_picture(tmp_path):
    (page,) = read_document(pdf(tmp_path / "a.pdf", "", box="0 0 14400 3"))
    assert page.size == (LONG_SIDE, 1)


def test_documents_are_read_by_several_threads(colours):
    results = []
    threads = [threading.Thread(target=lambda: results.append(len(read_document(colours)))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [3] * 8


def test_a_missing_library_is_named(colours, monkeypatch):
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    with pytest.raises(MachineLacks, match=r"needs the package pypdfium2.*arriero\[documents\]"):
        read_document(colours)
