"""Files of the kinds that are taken are opened, and no other decoder of Pillow's is reached, nor a program by it."""

import io

import pytest
from PIL import Image

from arriero.errors import ArrieroError
from arriero.export.samples.image_folder import read_folder
from arriero.runtimes.processor.picture_file import FORMATS, SUFFIXES
from arriero.runtimes.processor.pictures import read_image
from tests.runtimes.conftest import EPS
from tests.runtimes.processor.test_pictures import stored


def test_postscript_starts_no_program(ghostscript, tmp_path, processor):
    with pytest.raises(OSError, match=r"."):
        Image.open(io.BytesIO(EPS)).load()
    assert ghostscript.exists()  # so the test would see it
    ghostscript.unlink()
    (tmp_path / "pictures").mkdir()
    path = tmp_path / "pictures" / "a.png"
    path.write_bytes(EPS)
    (case,) = read_folder(path.parent)
    entry = {"type": "image", "path": str(path)}
    for ask in (
        lambda: read_image(EPS),
        lambda: read_image(path),
        lambda: read_image(str(path)),
        lambda: processor.encode("a", EPS),
        lambda: processor.encode([{"role": "user", "content": [entry]}]),
        lambda: processor.encode(case.prompt, list(case.images)),
    ):
        with pytest.raises(ArrieroError, match=r"not a readable image.*expected a picture in one of PNG, JPEG, .*TGA"):
            ask()
    assert not ghostscript.exists()


def test_an_opened_image_of_another_kind_starts_no_program(ghostscript):
    with pytest.raises(ArrieroError, match=r"the image: the file is EPS; expected a picture in one of PNG.*Load it"):
        read_image(Image.open(io.BytesIO(EPS)))
    assert not ghostscript.exists()


SAVED = {kind: stored(Image.new("RGB", (16, 16), (200, 100, 50)), kind) for kind in FORMATS}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_kind_that_is_taken_is_read(kind, tmp_path):
    assert read_image(SAVED[kind]).getpixel((8, 8)) == pytest.approx((200, 100, 50), abs=12)
    for suffix in FORMATS[kind]:
        (tmp_path / f"a{suffix}").write_bytes(SAVED[kind])
        assert read_image(tmp_path / f"a{suffix}").size == (16, 16)


def test_a_folder_takes_the_files_that_are_read_and_passes_none_over(tmp_path):
    for suffix in SUFFIXES:
        (tmp_path / f"a{suffix.upper()}").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no picture")
    assert sorted(case.name for case in read_folder(tmp_path)) == sorted(f"a{suffix.upper()}" for suffix in SUFFIXES)
    (tmp_path / "b.HEIC").write_bytes(b"")
    with pytest.raises(ArrieroError, match=r"not taken: b\.HEIC; expected .*\.avif.*Convert"):
        read_folder(tmp_path)
