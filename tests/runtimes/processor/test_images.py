"""Tiles against torch's antialiased bilinear, and against the canvas rules worked out another way."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from arriero.errors import ArrieroError
from arriero.runtimes.processor.images import Tiler
from arriero.runtimes.processor.pictures import read_image
from arriero.runtimes.processor.video import read_video
from tests.torchvision_parts import is_there


def photo(height, width, seed=0):
    """Make a picture with smooth parts, edges and noise."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [127 + 120 * np.sin(x / (3 + c) + y / (7 - c)) for c in range(3)]
    picture = np.stack(waves, -1)
    picture[height // 3 : height // 2, width // 4 : width // 2] = random.integers(0, 255, 3)
    return np.clip(picture + random.normal(0, 8, picture.shape), 0, 255).astype(np.uint8)


def expected_tiles(pixels, size, canvas, room):
    """Do in torch what the processor does after it has chosen its canvas [rows, columns] of tiles."""
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]

    def resized(height, width):
        return torch.nn.functional.interpolate(image, (height, width), mode="bilinear", antialias=True)

    def normal(x):
        x = x.to(torch.bfloat16) * (1 / 255)
        half = torch.full((3, 1, 1), 0.5, dtype=torch.bfloat16)
        return ((x - half) / half).float().numpy()

    rows, columns = canvas
    scale = min(room[0] / pixels.shape[0], room[1] / pixels.shape[1])
    by_width = room[1] / pixels.shape[1] < room[0] / pixels.shape[0]
    height = int(pixels.shape[0] * scale) if by_width else room[0]
    width = room[1] if by_width else int(pixels.shape[1] * scale)
    padded = torch.zeros(1, 3, rows * size, columns * size, dtype=torch.uint8)
    height, width = max(height, 1), max(width, 1)
    padded[:, :, :height, :width] = resized(height, width)
    tiles = [
        normal(padded[0, :, r * size : (r + 1) * size, c * size : (c + 1) * size])
        for r in range(rows)
        for c in range(columns)
    ]
    if len(tiles) > 1:
        tiles.append(normal(resized(size, size)[0]))
    return np.stack(tiles)


@pytest.mark.parametrize(
    ("height", "width", "canvas", "room"),
    [
        (28, 28, (1, 1), (28, 28)),  # fits as it is
        (10, 10, (1, 1), (28, 28)),  # enlarged to one tile
        (20, 50, (1, 2), (28, 50)),  # on a wide canvas, enlarged no further than one tile's height
        (56, 56, (2, 2), (56, 56)),
        (40, 45, (2, 2), (40, 45)),  # padded right and below, not enlarged
        (500, 300, (2, 2), (56, 56)),  # too large: shrunk as little as possible
        (300, 90, (4, 1), (112, 28)),
        (31, 113, (1, 4), (28, 112)),
        (1, 400, (1, 4), (28, 112)),
    ],
)
def test_tiles_are_those_of_the_reference_processor(height, width, canvas, room):
    pixels = photo(height, width)
    tiles = Tiler(size=28, max_patches=4).tile(read_image(pixels))
    assert (tiles.rows, tiles.columns) == canvas
    expected = expected_tiles(pixels, 28, canvas, room)
    assert tiles.pixel_values.dtype == np.float32
    assert tiles.pixel_values.shape == expected.shape
    # both resize bytes in fixed point with their own rounding: one grey level (2/255) and bfloat16's step apart
    assert np.abs(tiles.pixel_values - expected).max() <= 2 / 255 + 2**-7


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("size", [64, 336])
@pytest.mark.parametrize(("height", "width"), [(64, 64), (128, 64), (100, 37), (37, 300), (337, 672), (1000, 700)])
def test_tiles_are_those_of_hugging_faces_own_processor(height, width, size, largest):
    if not is_there():
        pytest.skip("needs torchvision, of any build: pip install --no-deps torchvision")
    from transformers.models.llama4.image_processing_llama4 import Llama4ImageProcessor

    pixels = photo(height, width)
    settings = {"size": {"height": size, "width": size}, "max_patches": 16, "resize_to_max_canvas": largest}
    expected = Llama4ImageProcessor(**settings)(images=Image.fromarray(pixels), return_tensors="pt")
    tiles = Tiler.parse({"image_processor_type": "Llama4ImageProcessor", **settings}, "test").tile(read_image(pixels))
    assert [[tiles.rows, tiles.columns]] == expected["aspect_ratios"].tolist()
    assert np.abs(tiles.pixel_values - expected["pixel_values"].float().numpy()).max() <= 2 / 255 + 2**-7


def test_equal_pixels_where_nothing_is_resized():
    pixels = photo(56, 84)
    tiles = Tiler(size=28, max_patches=6).tile(read_image(pixels))
    assert (tiles.rows, tiles.columns) == (2, 3)
    expected = expected_tiles(pixels, 28, (2, 3), (56, 84))
    assert np.array_equal(tiles.pixel_values[:-1], expected[:-1])


def test_channels_are_normalised_each_by_its_own_numbers():
    tiler = Tiler(size=4, max_patches=1, image_mean=(0.0, 0.5, 1.0), image_std=(1.0, 0.5, 0.25))
    values = tiler.tile(Image.new("RGB", (4, 4), (255, 255, 255))).pixel_values[0, :, 0, 0]
    np.testing.assert_allclose(values, [1.0, 1.0, 0.0], atol=2**-7)


def test_the_largest_canvas_when_asked():
    small = Image.new("RGB", (20, 20))
    assert Tiler(size=28, max_patches=4).tile(small).rows == 1
    largest = Tiler(size=28, max_patches=4, resize_to_max_canvas=True).tile(small)
    assert (largest.rows, largest.columns) == (2, 2)


def brute_canvas(height, width, size, most):
    """Work the canvas rule out over all grids: least enlarging, else least shrinking; then least area."""
    grids = [(r, c) for r in range(1, most + 1) for c in range(1, most + 1) if r * c <= most]
    scales = {grid: min(np.float32(grid[0] * size / height), np.float32(grid[1] * size / width)) for grid in grids}
    up = [s for s in scales.values() if s >= 1]
    best = min(up) if up else max(scales.values())
    near = [g for g in grids if scales[g] == best]
    area = min(r * c for r, c in near)
    return [g for g in near if g[0] * g[1] == area]


def test_canvas_choice_over_many_sizes():
    random = np.random.default_rng(2)
    tiler = Tiler(size=336, max_patches=16)
    for height, width in random.integers(1, 6000, (300, 2)).tolist():
        assert tiler._grid(height, width) in brute_canvas(height, width, 336, 16)


def test_every_kind_of_image_reads_the_same(tmp_path):
    pixels = photo(12, 9)
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    encoded = io.BytesIO()
    image.save(encoded, "PNG")
    for form in (pixels, image, tmp_path / "a.png", str(tmp_path / "a.png"), encoded.getvalue()):
        assert np.array_equal(np.asarray(read_image(form)), pixels)
    assert read_image(image.convert("L")).mode == "RGB"
    assert read_image(image.convert("RGBA")).mode == "RGB"
    turned = Image.fromarray(pixels)
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was held sideways
    turned.save(tmp_path / "turned.jpg", exif=exif, quality=100)
    assert read_image(tmp_path / "turned.jpg").size == (12, 9)


def test_broken_images_are_refused(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(photo(60, 60)).save(path)
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(ArrieroError, match=r"a\.png: the image is truncated or corrupt"):
        read_image(path)
    path.write_bytes(b"not a picture")
    with pytest.raises(ArrieroError, match="not a readable image"):
        read_image(path)
    with pytest.raises(ArrieroError, match="not a readable image"):
        read_image(path.read_bytes())
    with pytest.raises(ArrieroError, match="no such image file"):
        read_image(tmp_path / "b.png")
    with pytest.raises(ArrieroError, match="not a readable image"):
        read_image(tmp_path)
    for neither in (17, "a\0b"):
        with pytest.raises(ArrieroError, match="not a readable image"):
            read_image(neither)
    with pytest.raises(ArrieroError, match="the image is 0 by 5 pixels"):
        read_image(Image.new("RGB", (0, 5)))
    for array in (np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)):
        with pytest.raises(ArrieroError, match="an image array is"):
            read_image(array)


def write_video(path, frames):
    av = pytest.importorskip("av", reason="writing the test's video needs the package av")
    with av.open(str(path), "w") as video:
        stream = video.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for shade in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), shade * 10, np.uint8), format="rgb24")
            for packet in stream.encode(frame):
                video.mux(packet)
        for packet in stream.encode():
            video.mux(packet)


def test_video_frames_are_the_middles_of_equal_parts(tmp_path):
    path = tmp_path / "a.mp4"
    write_video(path, 20)
    frames = read_video(path, 4)
    shades = [int(np.asarray(frame).mean()) for frame in frames]
    np.testing.assert_allclose(shades, [20, 70, 120, 170], atol=5)  # frames 2, 7, 12, 17; lossy colour coding
    assert len(read_video(path, 50)) == 20
    for count in (0, "4", 1.5):
        with pytest.raises(ArrieroError, match=f"num_frames is {count!r}"):
            read_video(path, count)
    path.write_bytes(b"no video")
    with pytest.raises(ArrieroError, match="video cannot be decoded"):
        read_video(path, 4)
    with pytest.raises(ArrieroError, match="no such video file"):
        read_video(tmp_path / "b.mp4", 4)
