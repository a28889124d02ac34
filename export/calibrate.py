"""Stage `calibrate`: what the reference's layers and experts really see, and the roundings that follow from it.

Layer by layer: run all samples through it, count and measure the inputs of each matrix and each expert, round its
matrices for every profile that calibrates, forget the inputs. A killed stage goes on after its last finished layer.
Legend: E experts, n tokens of one expert, H hidden, F expert width, K input features, N output features.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arriero.errors import ArrieroError
from arriero.export.observe import LayerInputs, Routed, Walk
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.names import EXPERTS_DOWN, EXPERTS_GATE_UP
from arriero.profiles.calibrate import gptq, output_error
from arriero.profiles.observe import Moments, check_finite
from arriero.profiles.quantize import dequantize, quantize
from arriero.profiles.recipe import IntBlock, Profile, Scheme
from arriero.profiles.roundings import Note, Roundings

Watch = Callable[[str, int, int, str], None]
Matrix = tuple[str, int | None, Callable[[], NDArray[np.float32]], Moments]  # tensor, expert, weight [N, K], its inputs


class Calibration:
    """One calibration at work in `folder`; `profiles` are those that calibrate, by the name of their sub-folder."""

    def __init__(
        self, walk: Walk, checkpoint: Checkpoint, profiles: Mapping[str, Profile], folder: Path, watch: Watch
    ) -> None:
        self.walk, self.checkpoint, self.profiles, self.folder, self.watch = walk, checkpoint, profiles, folder, watch
        self.schemes = {key: profile.assign(checkpoint.tensors) for key, profile in profiles.items()}
        self.roundings = {key: Roundings(folder / key) for key in profiles}

    def run(self) -> None:
        """Write roundings, `coverage.json` (MoE layer -> tokens per expert), `ranges.json` (tensor -> tokens, absmax)
        and `cache.json` (each layer's range of keys and values).

        Raises ArrieroError for activations that are not finite (layer, expert, sample), and for experts that too few
        tokens reached where a profile says `below: stop`.
        """
        layers = range(len(self.walk.text.layers))
        for layer in layers[self._resume() :]:
            self._layer(layer)
        found = [json.loads(self._record(layer).read_text()) for layer in layers]
        coverage = {layer: one["coverage"] for layer, one in enumerate(found) if one["coverage"] is not None}
        (self.folder / "coverage.json").write_text(json.dumps(coverage))
        ranges = {tensor: entry for one in found for tensor, entry in one["ranges"].items()}
        (self.folder / "ranges.json").write_text(json.dumps(ranges))
        (self.folder / "cache.json").write_text(json.dumps([one["cache"] for one in found]))
        for left in (*self.folder.glob("hidden-*"), *self.folder.glob("routed.*")):
            left.unlink()

    def _resume(self) -> int:
        """The first layer to do: the one after the last that is done, or 0, the samples embedded."""
        start = 0
        while self._record(start).is_file():
            start += 1
        if start == len(self.walk.text.layers) or self.walk.hidden_file(start).is_file():
            return start
        self.walk.embed(lambda done, total: self.watch("calibrate: embed samples", done, total, "samples"))
        return 0

    def _record(self, layer: int) -> Path:
        """What a finished layer leaves; the hidden states after it are there before it appears."""
        return self.folder / f"layer-{layer:03}.json"

    def _layer(self, layer: int) -> None:
        step = f"calibrate: layer {layer}"
        inputs = self.walk.observe(layer, lambda at, total: self.watch(step, at, total, "samples"))
        coverage = inputs.routed.counts(self.walk.text.experts) if inputs.routed else None
        self._refuse_thin(layer, coverage)
        ranges: dict[str, Any] = {}
        matrices = len(inputs.moments) + (2 * self.walk.text.experts if inputs.routed else 0)
        for number, (tensor, expert, weight, seen) in enumerate(self._matrices(inputs), 1):
            entry = {"tokens": seen.count, "largest": float(seen.largest.max(initial=0))}
            if expert is None:
                ranges[tensor] = entry
            else:
                ranges.setdefault(tensor, []).append(entry)
            for key, profile in self.profiles.items():
                scheme = self.schemes[key].get(tensor)
                if isinstance(scheme, IntBlock) and scheme.rounding == "gptq":
                    self._round(self.roundings[key], profile, scheme, tensor, expert, weight(), seen)
            self.watch(f"{step}, matrices", number, matrices, "matrices")
        partial = self._record(layer).with_suffix(".partial")
        partial.write_text(json.dumps({"coverage": coverage, "ranges": ranges, "cache": inputs.cache.to_json()}))
        partial.replace(self._record(layer))
        self.walk.hidden_file(layer).unlink()

    def _matrices(self, inputs: LayerInputs) -> Iterator[Matrix]:
        for tensor, seen in inputs.moments.items():
            yield tensor, None, partial(self.checkpoint.read_float32, tensor), seen
        if inputs.routed is not None:
            yield from self._experts(inputs.layer, inputs.routed)

    def _experts(self, layer: int, routed: Routed) -> Iterator[Matrix]:
        """Both matrices of each expert, with the moments of what really goes into them; one expert at a time."""
        gate_up, down = (name.format(layer=layer) for name in (EXPERTS_GATE_UP, EXPERTS_DOWN))
        for expert in range(self.walk.text.experts):
            first = self._expert_weight(gate_up, expert)
            inputs, inners = (Moments(n, self.walk.second) for n in (first.shape[1], first.shape[0] // 2))
            for rows, samples in routed.of(expert):
                check_finite(rows, f"layer {layer}, expert {expert}, input", samples)
                inputs.add(rows)
                inner = _activation(rows @ first.T)
                check_finite(inner, f"layer {layer}, expert {expert}, input of down_proj", samples)
                inners.add(inner)
            yield gate_up, expert, partial(_same, first), inputs
            del first
            yield down, expert, partial(self._expert_weight, down, expert), inners

    def _expert_weight(self, tensor: str, expert: int) -> NDArray[np.float32]:
        """[N, K] of one expert."""
        return np.ascontiguousarray(self.checkpoint.read_float32(tensor, expert, expert + 1)[0].T)

    def _round(
        self,
        roundings: Roundings,
        profile: Profile,
        scheme: Scheme,
        tensor: str,
        expert: int | None,
        weight: NDArray[np.float32],
        seen: Moments,
    ) -> None:
        assert isinstance(scheme, IntBlock)
        assert profile.calibration is not None
        experts = self.walk.text.experts
        shape = {"bits": scheme.bits, "block": scheme.block}
        plain = quantize(weight, **shape, name=tensor)
        rounded, rounding, gain = plain, "nearest", None
        if seen.count >= profile.calibration.minimum_tokens:
            found = gptq(weight, seen.moment, **shape, damping=profile.calibration.damping, name=tensor)
            errors = [output_error(weight, dequantize(one), seen.moment) for one in (found, plain)]
            gain = errors[0] / errors[1] if errors[1] > 0 else None
            if errors[0] <= errors[1]:  # a matrix whose rounding was better left alone is left alone
                rounded, rounding = found, "gptq"
        largest = float(seen.largest.max(initial=0))
        roundings.write(tensor, expert, experts, rounded, Note(tensor, expert, rounding, seen.count, largest, gain))

    def _refuse_thin(self, layer: int, coverage: list[int] | None) -> None:
        for profile in self.profiles.values():
            rule = profile.calibration
            thin = [n for n, count in enumerate(coverage or ()) if rule is not None and count < rule.minimum_tokens]
            if rule is not None and rule.below == "stop" and thin:
                shown = ", ".join(f"{expert} ({coverage[expert]})" for expert in thin) if coverage else ""
                raise ArrieroError(
                    f"too few calibration tokens reached experts {shown}",
                    where=f"layer {layer}",
                    expected=f"at least {rule.minimum_tokens} for each, as profile `{profile.name}` says",
                    remedy="Raise calibration.samples, or let the profile fall back with `below: nearest`",
                )


def fallbacks(profile: Profile, notes: Sequence[Note]) -> list[dict[str, Any]]:
    """The experts that too few tokens reached, as the manifest lists them: layer, expert, tokens, rule."""
    if profile.calibration is None:
        return []
    found = {
        (int(note.tensor.split(".layers.")[1].split(".")[0]), note.expert): note.tokens
        for note in notes
        if note.expert is not None and note.tokens < profile.calibration.minimum_tokens
    }
    rule = profile.calibration.below
    return [
        {"layer": layer, "expert": expert, "tokens": found[layer, expert], "rule": rule}
        for layer, expert in sorted(found)
    ]


def _same(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    return weight


def _activation(gate_up: NDArray[np.float32]) -> NDArray[np.float32]:
    """silu(gate) * up of [n, 2F] with halves gate|up: [n, F]."""
    gate, up = np.split(gate_up, 2, -1)
    with np.errstate(over="ignore"):  # exp(-gate) may overflow to inf, which makes the quotient the 0 it should be
        return gate / (1 + np.exp(-gate)) * up
