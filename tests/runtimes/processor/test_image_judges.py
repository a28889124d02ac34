"""Tiles beside Meta's preprocessing and Hugging Face's image processor: 200 sizes, every kind of pixels.

Meta's resizes with Pillow, as we do: the same grey levels, all of them. Hugging Face's resizes with torch, whose
weights have 16 bits where Pillow's have 22: a level may differ by one, and the last test shows that nothing else
does it.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from arriero.runtimes.processor.images import Tiler
from arriero.runtimes.processor.pictures import read_image
from tests.runtimes.processor.test_images import photo
from tests.torchvision_parts import is_there, stand_in

MODES = ["RGB", "L", "1", "P", "CMYK", "YCbCr", "HSV", "LA", "RGBA", "RGBX"]
TILER = Tiler()


def drawn(number):
    """The picture of a number: its sides are as often small as large, and every second is not of RGB."""
    draw = random.Random(number)
    height, width = (round(2 ** draw.uniform(0, 10.9)) for _ in range(2))
    mode = MODES[number // 2 % len(MODES)] if number % 2 else "RGB"
    image = Image.fromarray(photo(height, width, number)).convert(mode)
    if image.mode == "RGBA":
        alpha = np.random.default_rng(number).integers(0, 256, (height, width), np.uint8)
        image.putalpha(Image.fromarray(alpha))
    return image


def levels(tiles):
    """The bytes that normalised tiles were made of."""
    return np.searchsorted(TILER._levels[0], tiles)


@pytest.fixture(scope="module")
def metas():
    """Meta's steps from a picture to tiles, as its `ChatFormat` takes them."""
    pytest.importorskip("llama_models", reason="needs llama-models")
    with stand_in():
        from llama_models.llama4.chat_format import convert_image_to_rgb
        from llama_models.llama4.preprocess import ResizeNormalizeImageTransform, VariableSizeImageTransform
    cut, whole = VariableSizeImageTransform(TILER.size), ResizeNormalizeImageTransform(TILER.size, TILER.size)

    def tiles(image):
        image = convert_image_to_rgb(image)
        parts, ratio = cut(image, TILER.max_patches)
        if len(parts) > 1:
            parts = torch.cat([parts, whole(image)[None]])
        return parts.numpy(), ratio

    return tiles


@pytest.fixture(scope="module")
def hugging_faces():
    """Hugging Face's processor, which needs torchvision."""
    if not is_there():
        pytest.skip("needs torchvision, of any build: pip install --no-deps torchvision")
    from transformers.models.llama4.image_processing_llama4 import Llama4ImageProcessor

    return Llama4ImageProcessor()


@pytest.mark.parametrize("start", range(0, 200, 20))
def test_grey_levels_are_those_of_metas_preprocessing(metas, start):
    for number in range(start, start + 20):
        image = drawn(number)
        tiles = TILER.tile(read_image(image))
        expected, ratio = metas(image)
        assert (tiles.rows, tiles.columns) == ratio, image
        np.testing.assert_array_equal(levels(tiles.pixel_values), np.rint((expected * 0.5 + 0.5) * 255), str(image))


@pytest.mark.parametrize("start", range(0, 200, 20))
def test_grey_levels_are_those_of_hugging_faces_processor_to_one(hugging_faces, start):
    for number in range(start, start + 20):
        image = drawn(number)
        tiles = TILER.tile(read_image(image))
        expected = hugging_faces(images=image, return_tensors="pt")
        assert expected["aspect_ratios"].tolist() == [[tiles.rows, tiles.columns]], image
        pixels = expected["pixel_values"].float().numpy()
        assert np.isin(pixels, TILER._levels).all()  # normalised by the same steps
        assert np.abs(levels(tiles.pixel_values) - levels(pixels)).max() <= 1, image


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P", "L"])
def test_what_is_transparent_is_seen_as_hugging_faces_processor_sees_it(hugging_faces, mode):
    image = Image.fromarray(photo(336, 336)).convert(mode)
    if mode in ("P", "L"):
        image.info["transparency"] = 100
    else:
        image.putalpha(Image.fromarray(np.random.default_rng(1).integers(0, 256, (336, 336), np.uint8)))
    pixels = hugging_faces(images=image, return_tensors="pt")["pixel_values"].float().numpy()
    np.testing.assert_array_equal(TILER.tile(read_image(image)).pixel_values, pixels)


def test_no_level_differs_where_nothing_is_resized(hugging_faces):
    image = Image.fromarray(photo(672, 1008))
    pixels = hugging_faces(images=image, return_tensors="pt")["pixel_values"].float().numpy()
    np.testing.assert_array_equal(TILER.tile(read_image(image)).pixel_values[:-1], pixels[:-1])


# --- where the one level comes from


def hat(size, target):
    """For each of `target` places: the first of `size` pixels that count for it, and the share of each."""
    scale = max(size / target, 1.0)
    for place in range(target):
        center = size / target * (place + 0.5)
        first, end = max(int(center - scale + 0.5), 0), min(int(center + scale + 0.5), size)
        weights = np.maximum(1 - np.abs((np.arange(first, end) - center + 0.5) / scale), 0)
        yield first, weights / weights.sum()


def resized_rows(pixels, target, bits):
    """Rows resized in whole numbers, the weights rounded to so many bits; to what fits 16 where it is None."""
    weights = list(hat(len(pixels), target))
    if bits is None:
        top = max(share.max() for _, share in weights)
        bits = next(b for b in range(23) if int(0.5 + top * (1 << (b + 1))) >= 1 << 15)
    rows = np.empty((target, *pixels.shape[1:]), np.uint8)
    for place, (first, share) in enumerate(weights):
        whole = np.floor(share * (1 << bits) + 0.5).astype(np.int64)
        total = np.tensordot(whole, pixels[first : first + len(whole)].astype(np.int64), 1)
        rows[place] = np.clip((total + (1 << (bits - 1))) >> bits, 0, 255)
    return rows


def resized(pixels, height, width, bits):
    """Columns first, then rows; a side that stays is left alone."""
    if pixels.shape[1] != width:
        pixels = resized_rows(pixels.swapaxes(0, 1), width, bits).swapaxes(0, 1)
    return pixels if len(pixels) == height else resized_rows(pixels, height, bits)


def test_torch_and_pillow_differ_by_the_bits_of_their_weights_and_nothing_else():
    draw, differing = random.Random(3), 0
    for number in range(60):
        height, width, new_height, new_width = (int(2 ** draw.uniform(0, 9)) for _ in range(4))
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        torchs = torch.nn.functional.interpolate(image, (new_height, new_width), mode="bilinear", antialias=True)
        torchs = torchs[0].permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(torchs, resized(pixels, new_height, new_width, None))
        pillows = np.asarray(Image.fromarray(pixels).resize((new_width, new_height), Image.Resampling.BILINEAR))
        # Pillow takes rows or columns first, whichever is less work
        either = [resized(pixels, new_height, new_width, 22)]
        either.append(resized(pixels.swapaxes(0, 1), new_width, new_height, 22).swapaxes(0, 1))
        assert any(np.array_equal(pillows, one) for one in either), pixels.shape
        differing += not np.array_equal(torchs, pillows)
    assert differing > 10
