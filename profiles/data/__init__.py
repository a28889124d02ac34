"""Generated task families: what the embedded model learns, is calibrated on, and is judged by.

`make(family, count, seed, split)` draws samples. The two splits draw from different random streams; questions with few
possible forms, sums above all, do come up in both.
"""

from arriero.profiles.data.families import FAMILIES, IMAGE_FAMILIES, TEXT_FAMILIES, make
from arriero.profiles.data.sample import Sample, Turn

__all__ = ["FAMILIES", "IMAGE_FAMILIES", "TEXT_FAMILIES", "Sample", "Turn", "make"]
