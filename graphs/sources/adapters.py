"""LoRA adapters of PEFT merged into the weights they were trained for, as rows are read.

Source of the formulas: PEFT's `LoraLayer` and `ParamWrapper`. Of a matrix W [N, K] it learned A [r, K] and B [N, r]:
the sum is W + scaling * B A, in float32. Of a stack of experts W [E, K, N] it learned A and B for all experts in one,
with rank axes of another order: A is expert by expert [E, r, ..], B rank by rank [.., r, E]. Which of K and N is A's
depends on PEFT's version and is told by the shapes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from arriero.errors import ArrieroError, Problems
from arriero.graphs.names import canonical_name
from arriero.graphs.sources.adapter_config import AdapterConfig
from arriero.graphs.sources.finite import EXPONENTS, check_finite, first_nonfinite
from arriero.graphs.sources.made_weight import MadeWeight
from arriero.graphs.sources.safetensors_files import open_safetensors
from arriero.graphs.sources.weight_source import WeightSource

FACTOR = re.compile(r"(?P<module>.+?)(?P<nested>(?:\.base_layer)*)\.lora_(?P<side>[AB])(?:\.\w+)?\.weight")
WEIGHTS = "adapter_model.safetensors"
OTHER = "The adapter was trained on another model: take that one as `model`"
Floats = NDArray[np.float32]


@dataclass
class Pair:
    """What an adapter learned of one weight: its factors, and the module that it is of."""

    module: str
    factors: dict[str, WeightSource] = field(default_factory=dict)

    @property
    def stored(self) -> str:
        """Where it stands, for errors."""
        return next(iter(self.factors.values())).stored


@dataclass(frozen=True)
class Delta:
    """What is added to a tensor: rows of a matrix, or experts of a stack."""

    a: Floats  # of a matrix [r, K]; of a stack [E, r, K or N]
    b: Floats  # of a matrix [N, r]; of a stack [E, N or K, r]
    scaling: np.float32
    turned: bool = False  # of a stack: A has N, B has K

    def rows(self, start: int, stop: int) -> Floats:
        """The sum's second part [n, K], or [n, K, N] of experts."""
        if self.a.ndim == 2:
            return (self.b[start:stop] @ self.a) * self.scaling
        product = self.b[start:stop] @ self.a[start:stop]
        return (product if self.turned else product.transpose(0, 2, 1)) * self.scaling


@dataclass(frozen=True)
class Adapter:
    """What the adapter in `folder` makes of a model: sums by tensor, and tensors that it has as a whole."""

    folder: Path
    deltas: tuple[tuple[str, Delta], ...]
    whole: dict[str, WeightSource]
    files: tuple[Path, ...]

    @classmethod
    def read(cls, tensors: Mapping[str, WeightSource], folder: Path) -> Adapter:
        """Read `folder` for the model of `tensors`, whose shapes say what it is of.

        Raises `Problems` for what the model does not have, and for an adapter that is no plain LoRA.
        """
        config = AdapterConfig.read(folder)
        stored, weights = open_safetensors(folder, WEIGHTS)
        problems: list[ArrieroError] = []
        pairs: dict[str, Pair] = {}
        whole: dict[str, WeightSource] = {}
        for name, source in stored.items():
            raw = name.removeprefix("base_model.model.")
            match = FACTOR.fullmatch(raw)
            base = tensors.get(canonical_name(raw))
            if match is not None:
                key = match["module"] + match["nested"]
                pairs.setdefault(key, Pair(match["module"])).factors[match["side"]] = source
            elif base is not None and base.shape == source.shape:
                whole[base.name] = source
            else:
                what = "is no factor of a LoRA, and the model has no weight of this name and shape"
                problems.append(ArrieroError(what, where=source.stored, remedy=OTHER))
        deltas = []
        for pair in pairs.values():
            try:
                deltas.append(_delta(tensors, pair, config))
            except ArrieroError as error:
                problems.append(error)
        if problems:
            raise Problems(f"the adapter {folder} does not fit the model", problems)
        return cls(folder, tuple(deltas), whole, (config.path, *weights))

    def merge(self, merged: dict[str, WeightSource]) -> None:
        """Add it to the tensors of `merged`, in place."""
        for name, source in self.whole.items():
            # Made, not in its place: its file is the adapter's, of which no bundle may take the rest.
            merged[name] = MadeWeight(name, source.shape, source.dtype, source.stored, source.form, source.rows)
        for name, delta in self.deltas:
            merged[name] = _added(merged[name], delta)


def merge_adapters(
    tensors: Mapping[str, WeightSource], folders: Iterable[Path]
) -> tuple[dict[str, WeightSource], list[Path]]:
    """`tensors` with the adapters in `folders` added, one after another, and the adapters' files.

    Raises as `Adapter.read` does.
    """
    merged, files = dict(tensors), list[Path]()
    for folder in folders:
        adapter = Adapter.read(merged, folder)
        adapter.merge(merged)
        files += adapter.files
    return merged, files


def _delta(tensors: Mapping[str, WeightSource], pair: Pair, config: AdapterConfig) -> tuple[str, Delta]:
    """The tensor that a pair is of, and what it adds to it."""
    if set(pair.factors) != {"A", "B"}:
        raise ArrieroError("has one factor of two", where=pair.stored, expected="lora_A and lora_B")
    a, b = (_factor(pair.factors[side]) for side in "AB")
    if pair.module.endswith(".experts"):
        return _of_experts(tensors, pair, a, b, config)
    name = canonical_name(f"{pair.module}.weight")
    if name not in tensors:
        raise ArrieroError(f"the model has no {name}", where=pair.stored, remedy=OTHER)
    if len(tensors[name].shape) != 2 or (b.shape[0], a.shape[1]) != tensors[name].shape or a.shape[0] != b.shape[1]:
        _refuse_shapes(pair, tensors[name])
    return name, Delta(a, b, config.scaling(pair.module, a.shape[0]))


def _factor(source: WeightSource) -> Floats:
    """A factor in float32. Raises ArrieroError for what is no matrix of finite numbers."""
    if len(source.shape) != 2 or source.dtype not in EXPONENTS:
        what = f"is stored as {source.dtype} {list(source.shape)}"
        raise ArrieroError(what, where=source.stored, expected="lora_A and lora_B as matrices of floats")
    check_finite(source, 0, first_nonfinite(source.rows(0, source.shape[0]), source.dtype))
    return source.float32(0, source.shape[0])


def _of_experts(
    tensors: Mapping[str, WeightSource], pair: Pair, a: Floats, b: Floats, config: AdapterConfig
) -> tuple[str, Delta]:
    """The stack that factors [r*E, x] and [y, r*E] are of, and what they add to it."""
    stem = canonical_name(pair.module)
    stacks = {name: tensors[name] for leaf in ("gate_up_proj", "down_proj") if (name := f"{stem}.{leaf}") in tensors}
    if not stacks:
        raise ArrieroError(f"the model has no {stem}", where=pair.stored, remedy=OTHER)
    own = (a.shape[1], b.shape[0])
    for name, stack in stacks.items():
        experts, inputs, outputs = stack.shape
        if sorted(own) != sorted((inputs, outputs)) or a.shape[0] != b.shape[1] or a.shape[0] % experts:
            continue
        rank = a.shape[0] // experts
        turned = own == (outputs, inputs) if inputs != outputs else config.turns_stacks(pair.stored)
        by_expert = b.reshape(b.shape[0], rank, experts).transpose(2, 0, 1)  # [E, y, r]
        scaling = config.scaling(f"{pair.module}.{name.rpartition('.')[2]}", rank)
        return name, Delta(a.reshape(experts, rank, -1), np.ascontiguousarray(by_expert), scaling, turned)
    _refuse_shapes(pair, *stacks.values())


def _refuse_shapes(pair: Pair, *weights: WeightSource) -> NoReturn:
    shapes = [list(source.shape) for source in (pair.factors["A"], pair.factors["B"])]
    expected = " or ".join(f"{weight.name} {list(weight.shape)}" for weight in weights)
    what = f"has factors of shapes {shapes[0]} and {shapes[1]}"
    raise ArrieroError(what, where=pair.stored, expected=f"those of {expected}", remedy=OTHER)


def _added(base: WeightSource, delta: Delta) -> MadeWeight:
    plain = base.form == base.dtype.lower()
    form = "f32" if plain else f"{base.form} with an adapter"

    def make(start: int, stop: int) -> Floats:
        return base.float32(start, stop) + delta.rows(start, stop)

    return MadeWeight(base.name, base.shape, "F32", base.stored, form, make)
