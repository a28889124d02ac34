"""What Meta's preprocessing takes of torchvision, on Pillow's pictures: there torchvision only calls Pillow.

For machines where no torchvision is built for the torch that they have; `python -m tests.long.judge_images` compares
with the real one.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from PIL import Image


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


@contextmanager
def stand_in() -> Iterator[None]:
    """While it lasts, `import torchvision.transforms` gives the above where there is no torchvision."""
    if find_spec("torchvision") is not None:
        yield
        return
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
