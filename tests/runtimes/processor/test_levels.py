"""Files with more or fewer than eight bits: each level is the nearest of 256, each transparent one is white."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from arriero.errors import ArrieroError
from arriero.runtimes.processor.pictures import read_image

DEEP = np.array([0, 127, 128, 129, 255, 256, 0x12FF, 0x7FFF, 0x80FF, 0xFF7E, 0xFF7F, 0xFFFF], np.uint16)
NEAREST = np.round(DEEP / 257).astype(int)
GREY, COLOUR, GREY_ALPHA, ALPHA = 0, 2, 4, 6  # kinds of a PNG


def png(rows, bits, kind, transparent=None, interlaced=False):
    """A PNG of `rows` [h, w, c]; each pass of an interlaced one of a pixel's height is a row that skips pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    def packed(row):
        texts = "".join(format(level, f"0{bits}b") for level in row.ravel())
        texts += "0" * (-len(texts) % 8)
        return b"\0" + bytes(int(texts[at : at + 8], 2) for at in range(0, len(texts), 8))

    height, width = rows.shape[:2]
    passes = [rows[0][at::step] for at, step in ((0, 8), (4, 8), (2, 4), (1, 2))] if interlaced else list(rows)
    head = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, interlaced)
    clear = b"" if transparent is None else chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    data = zlib.compress(b"".join(packed(row) for row in passes if row.size))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + clear + chunk(b"IDAT", data) + chunk(b"IEND", b"")


BITS, COLOURS, PLANES, STRIPS, LENGTHS = 258, 262, 284, 273, 279  # tags of a TIFF
WHITE_IS_ZERO, BLACK_IS_ZERO, RED_GREEN_BLUE, INKS = 0, 1, 2, 5


def tiff(width, strips, tags, order="<"):
    """A TIFF of one row, not compressed; every value of a tag is a number of 32 bits."""
    values = {256: [width], 257: [1], 259: [1], 277: [len(tags[BITS])], 278: [1], **tags}
    start = 8 + 2 + 12 * (len(values) + 2) + 4
    beside = sum(4 * len(each) for each in values.values() if len(each) > 1) + 8 * len(strips) * (len(strips) > 1)
    lengths = [len(strip) for strip in strips]
    values |= {STRIPS: [start + beside + sum(lengths[:n]) for n in range(len(strips))], LENGTHS: lengths}
    entries, lists = b"", b""
    for tag, each in sorted(values.items()):
        content = struct.pack(f"{order}{len(each)}I", *each)
        if len(each) > 1:
            content, lists = struct.pack(f"{order}I", start + len(lists)), lists + content
        entries += struct.pack(f"{order}HHI", tag, 4, len(each)) + content
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(values))
    return head + entries + struct.pack(f"{order}I", 0) + lists + b"".join(strips)


def seen(data):
    return np.asarray(read_image(data))[0]


def colours(levels):
    """One row [1, w, 3] that has each level in each channel."""
    return np.stack([levels, levels[::-1], np.roll(levels, 1)], -1)[None]


def test_deep_grey_and_colours_are_rounded():
    expected = np.stack([NEAREST, NEAREST[::-1], np.roll(NEAREST, 1)], -1)
    np.testing.assert_array_equal(seen(png(DEEP[None, :, None], 16, GREY)), NEAREST[:, None] + [0, 0, 0])
    np.testing.assert_array_equal(seen(png(colours(DEEP), 16, COLOUR)), expected)
    np.testing.assert_array_equal(seen(png(colours(DEEP), 16, COLOUR, interlaced=True)), expected)
    opaque = np.full((1, len(DEEP), 1), 0xFFFF, np.uint16)
    np.testing.assert_array_equal(seen(png(np.concatenate([colours(DEEP), opaque], -1), 16, ALPHA)), expected)
    grey = np.concatenate([DEEP[None, :, None], opaque], -1)
    np.testing.assert_array_equal(seen(png(grey, 16, GREY_ALPHA)), NEAREST[:, None] + [0, 0, 0])
    half = np.stack([np.zeros(2), [0x10FF, 0xF000]], -1).astype(np.uint16)[None]
    np.testing.assert_array_equal(seen(png(half, 16, GREY_ALPHA))[:, 0], [255 - 17, 255 - 239])


def test_an_opened_image_is_rounded_as_its_file_is():
    data = png(colours(DEEP), 16, COLOUR)
    np.testing.assert_array_equal(seen(Image.open(io.BytesIO(data))), seen(data))


@pytest.mark.parametrize("order", ["<", ">"])
def test_deep_colours_of_a_tiff_are_rounded(order):
    def stored(pixels, colours):
        samples = pixels.shape[2]
        strips = [pixels.astype(f"{order}u2").tobytes()]
        return tiff(len(DEEP), strips, {BITS: [16] * samples, COLOURS: [colours]}, order)

    expected = np.stack([NEAREST, NEAREST[::-1], np.roll(NEAREST, 1)], -1)
    np.testing.assert_array_equal(seen(stored(colours(DEEP), RED_GREEN_BLUE)), expected)
    inks = np.concatenate([colours(DEEP), np.zeros((1, len(DEEP), 1), np.uint16)], -1)
    np.testing.assert_array_equal(seen(stored(inks, INKS)), 255 - expected)


def test_compressed_deep_colours_of_a_tiff_are_rounded(tmp_path):
    av = pytest.importorskip("av", reason="writing the test's TIFF needs the package av")
    wide = np.tile(colours(DEEP), (4, 1, 1))
    with av.open(str(tmp_path / "a.tiff"), "w", format="image2") as file:
        stream = file.add_stream("tiff", rate=1)
        stream.width, stream.height, stream.pix_fmt = len(DEEP), 4, "rgb48le"
        for packet in [*stream.encode(av.VideoFrame.from_ndarray(wide, format="rgb48le")), *stream.encode()]:
            file.mux(packet)
    data = (tmp_path / "a.tiff").read_bytes()
    assert Image.open(io.BytesIO(data)).tile[0].codec_name == "libtiff"
    np.testing.assert_array_equal(seen(data)[:, 0], NEAREST)
    np.testing.assert_array_equal(seen(tmp_path / "a.tiff")[:, 1], NEAREST[::-1])


def test_white_of_a_grey_tiff_is_white_whatever_its_bits_and_its_order():
    twelve = tiff(2, [bytes([0xFF, 0xF0, 0x00])], {BITS: [12], COLOURS: [BLACK_IS_ZERO]})
    np.testing.assert_array_equal(seen(twelve), [[255] * 3, [0] * 3])
    for bits, levels in ((8, "B"), (16, "H")):
        strips = [struct.pack(f"<2{levels}", 0, (1 << bits) - 1)]
        turned = tiff(2, strips, {BITS: [bits], COLOURS: [WHITE_IS_ZERO]})
        np.testing.assert_array_equal(seen(turned), [[255] * 3, [0] * 3])
        opened = Image.open(io.BytesIO(turned))
        opened.load()
        np.testing.assert_array_equal(seen(opened), [[255] * 3, [0] * 3])
        np.testing.assert_array_equal(
            seen(tiff(2, strips, {BITS: [bits], COLOURS: [BLACK_IS_ZERO]})), [[0] * 3, [255] * 3]
        )


def test_planes_that_pillow_misreads_are_refused():
    red, green, blue = (plane.tobytes() for plane in np.moveaxis(colours(DEEP), -1, 0).astype("<u2"))
    with pytest.raises(ArrieroError, match=r"a TIFF with each colour in a plane of its own.*Save it as PNG"):
        read_image(tiff(len(DEEP), [red, green, blue], {BITS: [16] * 3, COLOURS: [RED_GREEN_BLUE], PLANES: [2]}))
    with pytest.raises(ArrieroError, match="in a plane of its own"):
        read_image(tiff(2, [b"\0\xff"], {BITS: [8], COLOURS: [WHITE_IS_ZERO], PLANES: [2]}))
    plain = tiff(1, [b"\1", b"\2", b"\3"], {BITS: [8] * 3, COLOURS: [RED_GREEN_BLUE], PLANES: [2]})
    np.testing.assert_array_equal(seen(plain), [[1, 2, 3]])


# --- transparent levels


def test_a_transparent_colour_of_sixteen_bits_is_compared_with_all_of_them():
    row = np.array([[[0x1234] * 3, [0x1256] * 3, [0x0012] * 3, [0x1234, 0x1234, 0]]], np.uint16)
    dark = [18, 18, 18]
    deep = png(row, 16, COLOUR, (0x1234,) * 3)
    np.testing.assert_array_equal(seen(deep), [[255] * 3, dark, [0] * 3, [18, 18, 0]])
    np.testing.assert_array_equal(seen(png(row, 16, COLOUR, (0x12,) * 3)), [dark, dark, [255] * 3, [18, 18, 0]])
    grey = png(row[..., :1], 16, GREY, (0x1234,))
    np.testing.assert_array_equal(seen(grey)[:, 0], [255, 18, 0, 255])
    opened = Image.open(io.BytesIO(deep))
    opened.load()
    with pytest.raises(ArrieroError, match=r"the transparent colour .* has more bits than its pixels.*Give the path"):
        read_image(opened)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_transparent_level_of_few_bits_is_white(bits):
    most = (1 << bits) - 1
    row = np.arange(most + 1)[None, :, None]
    for clear in {0, 1, most}:
        expected = np.round(np.arange(most + 1) * (255 / most)).astype(int)
        expected[clear] = 255
        np.testing.assert_array_equal(seen(png(row, bits, GREY, (clear,)))[:, 0], expected)


def test_bits_beyond_those_of_a_level_do_not_count():
    np.testing.assert_array_equal(seen(png(np.array([[[1], [2]]]), 2, GREY, (0x0F01,)))[:, 0], [255, 170])
    row = np.array([[[1, 2, 3], [4, 5, 6]]])
    np.testing.assert_array_equal(seen(png(row, 8, COLOUR, (0x101, 2, 3))), [[255] * 3, [4, 5, 6]])
