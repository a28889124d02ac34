"""What calibration will take of memory and disk, from the checkpoint's shapes and the samples' sizes.

Legend: S tokens of the longest sample, T tokens of all samples, H hidden, F the widest inner width, K input and N
output features of a matrix, P patches of an image tile.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from arriero.export.proof.decoded_memory import decoded_memory
from arriero.graphs.config import ModelConfig, VisionConfig
from arriero.graphs.names import HEAD
from arriero.graphs.sources.weight_source import WeightSource
from arriero.profiles.gptq import ROWS as GPTQ_ROWS
from arriero.profiles.groups import is_layer_matrix
from arriero.profiles.moments import ROWS
from arriero.profiles.recipe import Profile
from arriero.profiles.schemes import IntBlock
from arriero.runtimes.cpu import usable_cores

# From runs on small models, as `benchmarks/plan_accuracy.py` makes them.
REFERENCE_MEMORY = 336 << 20  # Python with torch and its mapped weights, after a graph was traced,
TRACED_LAYER = 2_900_000  # and what is left of each of its layers
LINEAR_MEMORY, LINEAR_BYTES = 96 << 20, 32  # what the libraries of linear algebra keep: at most, and of a moment
LOOPS = 64 << 20  # what compiles the loops of rounding, and they
LEFT_LATER = 0.6  # of what rounding leaves, once another stage has run
FACTORING = 3.3  # of second moments in float64, beside themselves: in GPTQ's order, inverted, halves on their way
ROUND_BYTES = 14  # of a number in a matrix: read, in float32, rounded, packed
PIECE_BYTES = 10  # of a number in the rows that one thread rounds at a time
EXPERT_BYTES = 6  # of a number in an expert on its way from 16 bits to float32
SQUARE = 16  # bytes per pair of tokens: the attention's mask on its way from positions to float32
HEAD_SLICE = 1 << 24  # numbers of the head that are rounded together
EMBEDDED_TOKENS = 256  # words of a long embedded sample; its mean is 66 with the embedded model's tokenizer

Size = tuple[int, int]  # of a sample: tokens, image tiles


def embedded_size(vision: VisionConfig | None) -> Size:
    """The most that an embedded sample may be; its pictures are four frames of 64 pixels, or one image of 128."""
    tiles = 0 if vision is None else 20 if vision.image_size < 64 else 5 if vision.image_size < 128 else 4
    return EMBEDDED_TOKENS + tiles * (0 if vision is None else vision.tokens_per_tile), tiles


def calibration_memory(
    config: ModelConfig, used: Sequence[WeightSource], sizes: Sequence[Size], second: bool, whole: bool, head: int = 0
) -> int:
    """Bytes that calibration holds at most: a sample's step, an expert at work, or a layer's moments and one matrix.

    `second`: whether a profile rounds by gptq, so that second moments are kept and matrices are rounded. `whole`:
    whether whole layers are run, experts and all. `head`: what rounding the head takes, as `head_memory` says.
    """
    layers = [info for info in used if is_layer_matrix(info.name)]
    text = config.text
    matrices = 4 * max((_layer_matrices(layers, layer) for layer in range(len(text.layers))), default=0)
    expert = EXPERT_BYTES * 3 * text.hidden_size * text.expert_ffn if text.moe_layers else 0
    tokens, tiles = (max((size[n] for size in sizes), default=0) for n in (0, 1))
    inner = max(text.expert_ffn, text.dense_ffn, text.heads * text.head_dim)
    step = 4 * tokens * (8 * text.hidden_size + 6 * inner) + SQUARE * tokens**2
    rows = 4 * min(ROWS, sum(size[0] for size in sizes)) * (2 * text.hidden_size + 4 * text.expert_ffn)
    walk = max(matrices + step, expert + rows)
    if second:
        moments = max((8 * _layer_moments(layers, layer) for layer in range(len(text.layers))), default=0)
        own = 8 * (text.hidden_size**2 + text.expert_ffn**2) if text.moe_layers else 0
        alone = max((_rounding_memory(*_features(info)) for info in layers if len(info.shape) == 2), default=0)
        stacked = max((_rounding_memory(*_features(info)) for info in layers if len(info.shape) > 2), default=0)
        walk = max(moments + walk, moments + alone, own + rows, own + stacked, head) + rounding_leaves(used)
    tower = 0
    if config.vision is not None:  # and its widest matrix in float32
        tower = tower_activations(config.vision, tiles) + 4 * config.vision.hidden_size * config.vision.ffn
    embedding, afterwards = decoded_memory(used, whole)
    return process_memory(config) + max(embedding + tower, afterwards + walk)


def process_memory(config: ModelConfig) -> int:
    """What the process of a build holds before a stage begins."""
    return REFERENCE_MEMORY + TRACED_LAYER * config.layers


def rounding_leaves(used: Iterable[WeightSource]) -> int:
    """Bytes that stay in a process which rounded by gptq, as the next stage begins; `LEFT_LATER` of them to its end."""
    widest = max((_features(info)[1] for info in used if is_layer_matrix(info.name)), default=0)
    return LOOPS + min(LINEAR_MEMORY, LINEAR_BYTES * widest**2)


def _rounding_memory(outputs: int, inputs: int) -> int:
    """Bytes that a matrix takes to be rounded beside its second moments: they are factored, then rows are rounded."""
    numbers = outputs * inputs
    at_once = min(outputs, usable_cores() * GPTQ_ROWS)
    rounding = 4 * inputs**2 + ROUND_BYTES * numbers + PIECE_BYTES * at_once * inputs
    return int(max(8 * FACTORING * inputs**2 + 4 * numbers, rounding))


def head_schemes(profiles: Iterable[Profile], used: Sequence[WeightSource]) -> list[IntBlock]:
    """What the forms of `profiles` that round the head by what it reads make of it, a scheme of each."""
    names = [info.name for info in used]
    schemes = [form.assign(names).get(HEAD) for profile in profiles for form in profile.forms]
    return [scheme for scheme in schemes if isinstance(scheme, IntBlock) and scheme.calibrates]


def head_memory(profiles: Iterable[Profile], used: Sequence[WeightSource]) -> int:
    """Bytes that rounding the head takes, 0 where it is not: moments, a slice of rows, all codes and their copy."""
    schemes = head_schemes(profiles, used)
    if not schemes:
        return 0
    outputs, inputs = next(info.shape for info in used if info.name == HEAD)
    codes = 2 * max(scheme.calibrated_bytes((outputs, inputs)) for scheme in schemes)
    return 8 * inputs**2 + _rounding_memory(min(outputs, HEAD_SLICE // inputs), inputs) + codes


def walk_disk(config: ModelConfig, sizes: Sequence[Size], calibrates: bool) -> int:
    """Bytes of the hidden states before and after a layer, and of what its experts read.

    Calibration keeps what their down_proj reads, too.
    """
    text = config.text
    routed = (text.hidden_size + calibrates * text.expert_ffn) * text.experts_per_token if text.moe_layers else 0
    return 4 * sum(size[0] for size in sizes) * (2 * text.hidden_size + routed)


def roundings_disk(profiles: Iterable[Profile], used: Iterable[WeightSource]) -> int:
    """Bytes of the calibrated integers and scales, which lie in their stage until the bundle is written."""
    infos = {info.name: info for info in used}
    return sum(
        scheme.calibrated_bytes(infos[name].shape)
        for profile in profiles
        for form in profile.forms
        for name, scheme in form.assign(infos).items()
    )


def _features(info: WeightSource) -> tuple[int, int]:
    """N and K of a matrix, or of one expert's."""
    return (info.shape[0], info.shape[1]) if len(info.shape) == 2 else (info.shape[2], info.shape[1])


def _layer_matrices(layers: Iterable[WeightSource], layer: int) -> int:
    """Elements of the matrices of one layer that every token reads."""
    matrices = (info for info in layers if f".layers.{layer}." in info.name and len(info.shape) == 2)
    return sum(outputs * inputs for outputs, inputs in map(_features, matrices))


def _layer_moments(layers: Iterable[WeightSource], layer: int) -> int:
    """Elements of the second moments of one layer's inputs; matrices with one input share theirs."""
    shared: Mapping[str, int] = {
        info.name.replace(".k_proj", ".q_proj").replace(".v_proj", ".q_proj").replace(".up_proj", ".gate_proj"): (
            _features(info)[1] ** 2
        )
        for info in layers
        if f".layers.{layer}." in info.name and len(info.shape) == 2
    }
    return sum(shared.values())


def tower_activations(vision: VisionConfig, tiles: int) -> int:
    """Bytes of the activations of one layer of the vision tower over so many tiles."""
    patches = vision.grid**2 + 1
    return 4 * tiles * patches * (8 * vision.hidden_size + 3 * vision.ffn)
