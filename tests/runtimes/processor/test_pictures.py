"""Pictures and frames become bytes as a viewer shows them, or are refused; none changes silently on the way in."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from arriero.errors import ArrieroError
from arriero.runtimes.processor.pictures import MOST_PIXELS, read_image
from arriero.runtimes.processor.video import read_video

RAMP = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4


def stored(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def pixels(image):
    return np.asarray(read_image(image))


def grey(levels):
    return np.repeat(levels[..., None], 3, -1)


def test_sixteen_bit_grey_is_scaled_and_not_cut_off():
    levels = RAMP.astype(np.uint16) * 257
    deep = Image.fromarray(levels)
    for kind in ("PNG", "TIFF"):
        np.testing.assert_array_equal(pixels(stored(deep, kind)), grey(RAMP))
    np.testing.assert_array_equal(pixels(deep), grey(RAMP))
    assert pixels(stored(Image.fromarray(np.full((2, 2), 255, np.uint16)))).max() == 1


def transparent():
    image = Image.new("RGBA", (3, 1))
    image.putdata([(255, 0, 0, 255), (0, 0, 255, 0), (0, 0, 0, 128)])
    return image


SEEN = [[255, 0, 0], [255, 255, 255], [127, 127, 127]]


def test_transparency_is_seen_on_white_as_in_metas_preprocessing():
    image = transparent()
    np.testing.assert_allclose(pixels(stored(image))[0], SEEN, atol=1)
    np.testing.assert_allclose(pixels(image)[0], SEEN, atol=1)
    by_meta = Image.new("RGB", image.size, (255, 255, 255))
    by_meta.paste(image, mask=image.split()[3])
    np.testing.assert_allclose(pixels(image), np.asarray(by_meta), atol=1)
    for form in (stored(image, "WEBP", lossless=True, exact=True), stored(image, "TIFF")):
        np.testing.assert_allclose(pixels(form)[0], SEEN, atol=1)
    half = Image.new("LA", (1, 1), (0, 128))
    np.testing.assert_allclose(pixels(stored(half))[0], [[127] * 3], atol=1)
    np.testing.assert_allclose(pixels(image.convert("RGBa"))[0], SEEN, atol=2)


def test_a_transparent_colour_of_a_palette_or_of_a_plain_picture_is_white():
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putdata([0, 1])
    np.testing.assert_array_equal(pixels(stored(palette, transparency=1))[0], [[255, 0, 0], [255] * 3])
    np.testing.assert_array_equal(pixels(stored(palette, "GIF", transparency=1))[0], [[255, 0, 0], [255] * 3])
    plain = Image.new("RGB", (2, 1), (9, 9, 9))
    plain.putpixel((0, 0), (1, 2, 3))
    np.testing.assert_array_equal(pixels(stored(plain, transparency=(1, 2, 3)))[0], [[255] * 3, [9] * 3])
    faint = Image.new("L", (1, 1), 7)
    assert pixels(stored(faint, transparency=7)).min() == 255


def test_other_kinds_of_pixels_are_converted():
    assert pixels(stored(Image.new("1", (2, 2), 1))).min() == 255
    np.testing.assert_array_equal(pixels(Image.new("CMYK", (1, 1), (0, 0, 0, 0)))[0], [[255] * 3])
    red = Image.new("RGB", (8, 8), (200, 30, 30))
    np.testing.assert_allclose(pixels(stored(red.convert("CMYK"), "JPEG"))[0, 0], [200, 30, 30], atol=6)
    np.testing.assert_allclose(pixels(red.convert("YCbCr"))[0, 0], [200, 30, 30], atol=3)


@pytest.mark.parametrize("mode", ["F", "I", "LAB"])
def test_pixels_without_one_meaning_in_bytes_are_refused(mode):
    with pytest.raises(ArrieroError, match=f"pixels of the kind {mode}.*8-bit or 16-bit"):
        read_image(stored(Image.new(mode, (2, 2)), "TIFF"))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_moving_pictures_and_pages_are_refused_as_images(kind, tmp_path):
    first, second = (Image.new("RGB", (4, 4), colour) for colour in ("red", "blue"))
    moving = stored(first, kind, save_all=True, append_images=[second])
    with pytest.raises(ArrieroError, match=r"holds 2 frames or pages.*as a video"):
        read_image(moving)
    path = tmp_path / f"a.{kind.lower()}"
    path.write_bytes(moving)
    with pytest.raises(ArrieroError, match=r"a\.\w+: the image holds 2"):
        read_image(path)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_an_opened_image_of_several_frames_is_refused_and_one_frame_of_it_taken(kind, tmp_path):
    first, second = (Image.new("RGB", (16, 16), colour) for colour in ("red", "blue"))
    for several in (True, False):
        path = tmp_path / f"{several}.{kind.lower()}"
        path.write_bytes(stored(first, kind, save_all=True, append_images=[second] * several))
        for loaded in (False, True):
            with Image.open(path) as opened:
                if loaded:
                    opened.load()
                if several:
                    with pytest.raises(ArrieroError, match=r"the image: the image holds 2 frames.*image\.copy\(\)"):
                        read_image(opened)
                    opened.seek(1)
                    assert pixels(opened.copy())[8, 8, 2] > 200
                else:
                    assert pixels(opened)[8, 8, 0] > 200
    assert pixels(opened)[8, 8, 0] > 200  # loaded, its file closed


def test_a_gif_can_be_shown_as_a_video(tmp_path):
    pytest.importorskip("av", reason="needs the package av")
    shades = [Image.new("L", (16, 16), shade) for shade in (10, 110, 210)]
    (tmp_path / "a.gif").write_bytes(stored(shades[0], "GIF", save_all=True, append_images=shades[1:], duration=100))
    frames = read_video(tmp_path / "a.gif", 3)
    np.testing.assert_allclose([np.asarray(frame).mean() for frame in frames], [10, 110, 210], atol=3)


def test_a_small_file_of_many_pixels_is_refused_before_it_is_decoded():
    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    width = height = 10_000  # 100 M pixels
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")  # decoded, it would be corrupt
    with pytest.raises(ArrieroError, match=r"10,000 by 10,000 pixels; expected at most 67,108,864"):
        read_image(bomb)
    with pytest.raises(ArrieroError, match="pixels"):
        read_image(np.broadcast_to(np.uint8(0), (1, MOST_PIXELS + 1, 3)))


# --- moving


def film(path, frames, pix_fmt="yuv420p", codec="mpeg4", **settings):
    av = pytest.importorskip("av", reason="writing the test's video needs the package av")
    with av.open(str(path), "w") as video:
        stream = video.add_stream(codec, rate=10)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = pix_fmt
        for name, value in settings.items():
            setattr(stream.codec_context, name, value)
        kind = "rgba" if frames[0].shape[2] == 4 else "rgb24"
        for pixels in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format=kind)):
                video.mux(packet)
        for packet in stream.encode():
            video.mux(packet)


def halves():
    """A frame that is light on its left."""
    frame = np.full((32, 64, 3), 20, np.uint8)
    frame[:, :32] = 220
    return frame


ONE = 1 << 16
TURNS = {  # the matrix of a track's header, its size, and the side on which a player shows what was left
    "straight": ((ONE, 0, 0, ONE), (64, 32), "left"),
    "clockwise": ((0, ONE, -ONE, 0), (32, 64), "top"),
    "upside_down": ((-ONE, 0, 0, -ONE), (64, 32), "right"),
    "anticlockwise": ((0, -ONE, ONE, 0), (32, 64), "bottom"),
}


@pytest.mark.parametrize(("matrix", "size", "side"), TURNS.values(), ids=TURNS.keys())
def test_a_video_that_a_player_turns_is_turned(tmp_path, matrix, size, side):
    path = tmp_path / "a.mp4"
    film(path, [halves()] * 3)
    content = path.read_bytes()
    straight = struct.pack(">9i", ONE, 0, 0, 0, ONE, 0, 0, 0, 1 << 30)
    turned = struct.pack(">9i", matrix[0], matrix[1], 0, matrix[2], matrix[3], 0, 0, 0, 1 << 30)
    place = content.index(straight, content.index(b"tkhd"))
    path.write_bytes(content[:place] + turned + content[place + 36 :])
    (frame,) = read_video(path, 1)
    assert frame.size == size
    pixels = np.asarray(frame)
    sides = {"left": pixels[:, :16], "top": pixels[:16], "right": pixels[:, -16:], "bottom": pixels[-16:]}
    opposite = {"left": "right", "top": "bottom", "right": "left", "bottom": "top"}[side]
    assert sides[side].mean() > 180 > 60 > sides[opposite].mean()


def test_frames_of_ten_bits_keep_their_levels(tmp_path):
    film(tmp_path / "a.mkv", [halves()], "yuv420p10le", "ffv1")
    (frame,) = read_video(tmp_path / "a.mkv", 1)
    assert np.asarray(frame)[16, 8].mean() == pytest.approx(220, abs=3)
    assert np.asarray(frame)[16, 56].mean() == pytest.approx(20, abs=3)


def test_transparent_frames_are_seen_on_white(tmp_path):
    clear = np.zeros((16, 16, 4), np.uint8)
    film(tmp_path / "a.mkv", [clear], "bgra", "ffv1")
    (frame,) = read_video(tmp_path / "a.mkv", 1)
    assert np.asarray(frame).min() == 255


def test_pixels_that_are_no_squares_are_made_squares(tmp_path):
    from fractions import Fraction

    film(tmp_path / "a.mkv", [halves()], sample_aspect_ratio=Fraction(2, 1))
    (frame,) = read_video(tmp_path / "a.mkv", 1)
    assert frame.size == (128, 32)


def test_videos_are_bounded(tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    film(path, [halves()] * 6)
    with pytest.raises(ArrieroError, match=r"num_frames is 1,000,000,000; expected at most 1,024"):
        read_video(path, 10**9)
    with pytest.raises(ArrieroError, match="num_frames is 5; expected at most 4"):
        read_video(path, 5, most=4)
    monkeypatch.setattr("arriero.runtimes.processor.video.MOST_DECODED", 5)
    with pytest.raises(ArrieroError, match="more than 5 frames"):
        read_video(path, 1)


def test_frames_beyond_the_context_are_refused_before_they_are_read(processor):
    class Endless:
        def __iter__(self):
            while True:
                yield Image.new("RGB", (28, 28))

    entry = {"type": "video", "frames": Endless()}
    with pytest.raises(ArrieroError, match="the video has more than 16 frames"):
        processor.encode([{"role": "user", "content": [entry]}], context=64)
    with pytest.raises(ArrieroError, match="at least 68 tokens"):
        processor.encode("a", [Image.new("RGB", (28, 28))] * 17, context=64)
