"""The mean and standard deviation that each tensor of a synthetic model is drawn with, so that figures mean something.

Legend: H hidden, V vocabulary, E experts, L layers of a tower, K inputs of a matrix.

- A matrix has 1 / sqrt(K): what it gives is as large as what it takes. One that adds to the residual stream (`o_proj`,
  `down_proj`, the tower's `fc2`) has a further 1 / sqrt(2L), so that the 2L of them add up to one embedding. Gains are
  1, biases 0.
- A token's embedding has 1: of a one-hot input, K is 1. The tower's class and position embeddings have 1 / sqrt(3),
  which is the root mean square of pixels in [-1, 1] and so, after a matrix, of what they are added to.
- Router and head take rows of norm sqrt(H), as RMS norm makes them, so an entry of s / sqrt(H) gives logits with
  deviation s. The gap between the largest two of E standard normal numbers is about exponential with mean
  1 / sqrt(2 ln E), its median ln 2 / sqrt(2 ln E): s = 1.5 sqrt(2 ln E) / ln 2 makes a median margin of 1.5 logits.
- The head's logits make log-normal probabilities. Those of the tokens below the quantile p of V logits sum to a share
  Phi(z(p) - s) of the infinite sum, with Phi the normal distribution and z its quantiles, and all V typically to
  Phi(z(m) - s), as the largest logit lies at the quantile m = 2^(-1/V) by the median. 256 tokens, as many as a
  reference record keeps of a position, hold 99 % where Phi(z(1 - 256 / V) - s) is 1 % of Phi(z(m) - s).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from statistics import NormalDist

from arriero.graphs.config import ModelConfig
from arriero.graphs.names import EMBEDDING, HEAD, TEXT_PREFIX

MARGIN = 1.5  # logits between a router's first and second choice, by the median
LIKELY, MASS = 256, 0.99  # tokens, and the probability that they hold together
RESIDUAL = re.compile(r"\.(self_attn\.o_proj|(feed_forward|shared_expert|experts)\.down_proj|mlp\.fc2)(\.weight)?")
TOWER_LAYERS = "vision_model.model.layers."


def spread_of(name: str, shape: Sequence[int], config: ModelConfig) -> tuple[float, float]:
    """Mean and standard deviation of the tensor with this canonical name and shape."""
    if name.endswith("bias"):
        return 0.0, 0.0
    if name == EMBEDDING:
        return 0.0, 1.0
    if name.startswith("vision_model.") and name.endswith(("class_embedding", "positional_embedding_vlm")):
        return 0.0, 1 / math.sqrt(3)
    if len(shape) == 1:
        return 1.0, 0.0
    inputs = shape[1] if len(shape) == 3 else shape[-1]  # stacks of experts are [E, K, N], matrices [N, K]
    if name == HEAD:
        return 0.0, head_deviation(config.text.vocab_size) / math.sqrt(inputs)
    if name.endswith(".router.weight"):
        return 0.0, router_deviation(config.text.experts) / math.sqrt(inputs)
    return 0.0, 1 / math.sqrt(inputs * _residual_terms(name, config))


def router_deviation(experts: int) -> float:
    """The deviation of router logits whose median margin is `MARGIN`."""
    return MARGIN * math.sqrt(2 * math.log(experts)) / math.log(2)


def head_deviation(vocabulary: int) -> float:
    """The deviation of logits of which the `LIKELY` largest hold `MASS`; what the others hold falls as it grows."""
    normal = NormalDist()
    others, largest = normal.inv_cdf(1 - LIKELY / vocabulary), normal.inv_cdf(2 ** (-1 / vocabulary))
    low, high = 0.0, 16.0
    for _ in range(52):  # halvings, to the last bit
        middle = (low + high) / 2
        if normal.cdf(others - middle) > (1 - MASS) * normal.cdf(largest - middle):
            low = middle
        else:
            high = middle
    return high


def _residual_terms(name: str, config: ModelConfig) -> int:
    """How many matrices of a tower add to its residual stream where this one does, else 1."""
    if RESIDUAL.search(name) is None:
        return 1
    if name.startswith(TOWER_LAYERS):
        return 2 * config.vision.layers if config.vision is not None else 1
    return 2 * len(config.text.layers) if name.startswith(TEXT_PREFIX) else 1
