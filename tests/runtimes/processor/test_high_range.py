"""Pictures and videos of high dynamic range are refused, whichever way they say that they are."""

import io
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from arriero.errors import ArrieroError
from arriero.runtimes.processor.high_range import HIGH_RANGE, transfer_of
from arriero.runtimes.processor.pictures import read_image
from arriero.runtimes.processor.video import read_video
from tests.runtimes.processor.test_pictures import film, halves, stored

CURVES = [(16, "PQ"), (18, "HLG"), (1, None), (13, None), (14, None)]  # the last three: BT.709, sRGB, BT.2020
RED = Image.new("RGB", (16, 16), "red")


def check(data, curve):
    if curve is None:
        assert read_image(data).size == RED.size
        return
    for image in (data, Image.open(io.BytesIO(data))):
        with pytest.raises(ArrieroError, match=rf"the image is of high dynamic range \({curve}\); .*Tone-map it"):
            read_image(image)


@pytest.mark.parametrize(("transfer", "curve"), CURVES)
def test_a_png_that_names_its_curve(transfer, curve):
    data, body = stored(RED), b"cICP" + bytes([9, transfer, 0, 1])
    at = data.index(b"IDAT") - 4
    check(data[:at] + struct.pack(">I", 4) + body + struct.pack(">I", zlib.crc32(body)) + data[at:], curve)


@pytest.mark.parametrize(("transfer", "curve"), CURVES)
def test_an_avif_that_names_its_curve(transfer, curve):
    data = stored(RED, "AVIF")
    at = data.index(b"colrnclx") + 10
    check(data[:at] + struct.pack(">H", transfer) + data[at + 2 :], curve)


@pytest.mark.parametrize(("transfer", "curve"), CURVES)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_a_colour_profile_that_names_its_curve(kind, transfer, curve):
    tag = b"cicp" + bytes([0, 0, 0, 0, 9, transfer, 0, 1])
    profile = bytes(128) + struct.pack(">I4sII", 1, b"cicp", 144, len(tag)) + tag
    data = stored(RED, kind, icc_profile=profile)
    check(data, curve)
    if curve:
        loaded = Image.open(io.BytesIO(data))
        loaded.load()
        with pytest.raises(ArrieroError, match="high dynamic range"):
            read_image(loaded)


def test_only_the_primary_item_of_an_avif_counts():
    def box(kind, *parts):
        content = b"".join(parts)
        return struct.pack(">I4s", 8 + len(content), kind) + content

    def avif(primary, *associations):
        curves = [box(b"colr", b"nclx", struct.pack(">HHHB", 9, transfer, 9, 0)) for transfer in (16, 13)]
        rows = b"".join(struct.pack(">HBB", item, 1, 0x80 | number) for item, number in associations)
        owners = box(b"ipma", bytes(4), struct.pack(">I", len(associations)), rows)
        item = box(b"pitm", bytes(4), struct.pack(">H", primary))
        meta = box(b"meta", bytes(4), item, box(b"iprp", box(b"ipco", *curves), owners))
        file = io.BytesIO(box(b"ftyp", b"avif") + meta + box(b"mdat"))
        return transfer_of(SimpleNamespace(fp=file, format="AVIF", info={}))

    assert avif(1, (1, 2), (2, 1)) == 13
    assert avif(2, (1, 2), (2, 1)) == 16
    assert avif(3, (1, 2), (2, 1)) is None


@pytest.mark.parametrize("kind", ["PNG", "AVIF"])
def test_what_is_cut_short_or_nonsense_names_no_curve_and_ends(kind):
    data = stored(RED, kind)
    draw = np.random.default_rng(0)
    for number in range(200):
        damaged = bytearray(data[: draw.integers(len(data))] if number % 2 else data)
        for at in draw.integers(len(damaged), size=3) if damaged else ():
            damaged[at] = draw.integers(256)
        named = transfer_of(SimpleNamespace(fp=io.BytesIO(damaged), format=kind, info={}))
        assert named is None or 0 <= named < 1 << 16


@pytest.mark.parametrize(("transfer", "curve"), sorted(HIGH_RANGE.items()))
def test_a_video_that_names_its_curve(tmp_path, transfer, curve):
    film(tmp_path / "a.mkv", [halves()] * 2, "yuv420p10le", "ffv1", color_trc=transfer)
    with pytest.raises(ArrieroError, match=rf"a\.mkv: the video is of high dynamic range \({curve}\); .*Tone-map it"):
        read_video(tmp_path / "a.mkv", 1)
    film(tmp_path / "b.mkv", [halves()] * 2, "yuv420p10le", "ffv1", color_trc=1)
    assert len(read_video(tmp_path / "b.mkv", 1)) == 1
