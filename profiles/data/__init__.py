"""Generated task families: what the embedded model learns, is calibrated on, and is judged by.

`make(family, count, seed, split)` draws samples; `score(sample, text)` judges an answer. The `train` and the `held-out`
split never share a text prompt: a prompt belongs to one of them by its checksum.
"""

from arriero.profiles.data.families import FAMILIES, IMAGE_FAMILIES, TEXT_FAMILIES, accuracy, make, score
from arriero.profiles.data.sample import Sample, Turn

__all__ = ["FAMILIES", "IMAGE_FAMILIES", "TEXT_FAMILIES", "Sample", "Turn", "accuracy", "make", "score"]
