"""What the judges of images take of torchvision: the real one, or where there is none, the few steps on Pillow's
pictures that Meta's preprocessing needs; there torchvision only calls Pillow.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFile

OPERATORS = torch.library.Library("torchvision", "FRAGMENT")  # what is declared goes with it


class Compose:
    def __init__(self, steps: list[Callable[[Any], Any]]) -> None:
        self.steps = steps

    def __call__(self, image: Any) -> Any:
        for step in self.steps:
            image = step(image)
        return image


class Resize:
    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        return resize(image, self.size)


class ToTensor:
    def __call__(self, image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)


class Normalize:
    def __init__(self, mean: Any, std: Any, inplace: bool = False) -> None:
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return image.sub_(self.mean).div_(self.std)


def resize(image: Image.Image, size: tuple[int, int], interpolation: int = Image.Resampling.BILINEAR) -> Image.Image:
    return image.resize((size[1], size[0]), interpolation)


def is_there() -> bool:
    """Whether torchvision can be imported; afterwards it can, of whatever build it is.

    One for CUDA does not load its operators beside a torch for processors. The judges use none of them, so the two that
    have to be declared are declared.
    """
    package = find_spec("torchvision")
    if package is None or "torchvision" in sys.modules:
        return package is not None
    assert package.origin is not None
    try:
        torch.ops.load_library(str(next(Path(package.origin).parent.glob("_C*.so"))))
    except OSError:
        for name in ("nms", "qnms"):
            OPERATORS.define(f"{name}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
    return True


@contextmanager
def stand_in() -> Iterator[None]:
    """While it lasts, `import torchvision.transforms` gives the above where there is no torchvision.

    Meta's module has Pillow take truncated pictures, for the whole process; afterwards it does not.
    """
    truncated = ImageFile.LOAD_TRUNCATED_IMAGES
    try:
        with nullcontext() if is_there() else _replaced():
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = truncated


@contextmanager
def _replaced() -> Iterator[None]:
    names = ("torchvision", "torchvision.transforms", "torchvision.transforms.functional")
    package, transforms, functional = (types.ModuleType(name) for name in names)
    package.transforms, transforms.functional, functional.resize = transforms, functional, resize
    transforms.InterpolationMode = types.SimpleNamespace(BILINEAR=Image.Resampling.BILINEAR)
    for step in (Compose, Resize, ToTensor, Normalize):
        setattr(transforms, step.__name__, step)
    sys.modules.update(zip(names, (package, transforms, functional), strict=True))
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]
