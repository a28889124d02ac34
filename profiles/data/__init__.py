"""Generated task families: what the embedded model learns, is calibrated on, and is judged by.

`make(family, count, seed, split)` draws samples; `score(sample, text)` judges an answer. The two splits draw from
different random streams; questions with few possible forms, sums above all, do come up in both.
"""

from arriero.profiles.data.families import FAMILIES, IMAGE_FAMILIES, TEXT_FAMILIES, accuracy, make, same_answer, score
from arriero.profiles.data.sample import Sample, Turn

__all__ = ["FAMILIES", "IMAGE_FAMILIES", "TEXT_FAMILIES", "Sample", "Turn", "accuracy", "make", "same_answer", "score"]
