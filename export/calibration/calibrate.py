"""Stage `calibrate`: what the reference's layers and experts really see, and the roundings and scales that follow.

Layer by layer: run all samples through it, count and measure the inputs of each matrix and each expert, round its
matrices for every profile that calibrates (`round_matrices.py`), forget the inputs; at last the head (`round_head.py`).
A killed stage goes on after its last finished layer: the samples go through the next one again, and what was rounded of
it stays. What was changed since it was written is made again, from the embeddings on where nothing nearer is left.
Legend: K input features, N output features.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arriero.errors import ArrieroError
from arriero.export.calibration.choice import CHOICE, decide, open_groups
from arriero.export.calibration.round_head import round_head
from arriero.export.calibration.round_matrices import (
    ExpertJob,
    Form,
    Observed,
    Rounded,
    Rounder,
    round_expert,
)
from arriero.export.calibration.sensitivity import expert_errors, linear_error
from arriero.export.machine.jobs import Submit, do_here
from arriero.export.proof.routed_rows import Routed
from arriero.export.proof.walk_layers import LayerInputs, Walk
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.names import HEAD, expert_tensors
from arriero.profiles.journal import Region, Tell, keep_silent
from arriero.profiles.quantize import dequantize
from arriero.profiles.quantized_weights import QuantizedWeights, RoundingRecord
from arriero.profiles.recipe import Profile
from arriero.profiles.schemes import IntBlock, Static
from arriero.profiles.static_scales import fit_inputs
from arriero.profiles.stored_values import stored_values
from arriero.runtimes.manifest import Fallback

Watch = Callable[[str, int, int, str], None]


class Calibration:
    """One calibration at work in `folder`; `profiles` are those that calibrate, by the name of their sub-folder.

    `submit` has experts rounded. `tell` is given a sentence for what a killed run left and has to be made again.
    """

    def __init__(
        self,
        walk: Walk,
        checkpoint: Checkpoint,
        profiles: Mapping[str, Profile],
        folder: Path,
        watch: Watch,
        submit: Submit = do_here,
        tell: Tell = keep_silent,
    ) -> None:
        self.walk, self.checkpoint, self.folder, self.watch, self.submit = walk, checkpoint, folder, watch, submit
        self.choosing = {key: profile for key, profile in profiles.items() if profile.choose is not None}
        self.profiles = {
            f"{key}/{number}" if key in self.choosing else key: form
            for key, profile in profiles.items()
            for number, form in enumerate(profile.forms)
        }
        self.forms = {
            key: Form(profile.calibration, profile.assign(checkpoint.tensors)) for key, profile in self.profiles.items()
        }
        self.roundings = {key: QuantizedWeights(folder / key, tell) for key in self.profiles}
        # by a killed run
        self._rounded = {(key, *matrix) for key, one in self.roundings.items() for matrix in one.check()}

    def run(self) -> dict[str, tuple[int, ...]]:
        """Write roundings, `ranges.json` (tensor -> tokens, absmax) and `cache.json` (each layer's range of keys and
        values); give the tokens of each expert by MoE layer.

        Raises ArrieroError for activations that are not finite (layer, expert, sample), and for experts that too few
        tokens reached where a profile says `below: stop`.
        """
        layers = range(len(self.walk.text.layers))
        for layer in layers[self._resume() :]:
            self._layer(layer)
        self._head()
        records = [json.loads(self._record(layer).read_text()) for layer in layers]
        coverage = {str(layer): one["coverage"] for layer, one in enumerate(records) if one["coverage"] is not None}
        ranges = {tensor: entry for one in records for tensor, entry in one["ranges"].items()}
        (self.folder / "ranges.json").write_text(json.dumps(ranges))
        (self.folder / "cache.json").write_text(json.dumps([one["cache"] for one in records]))
        shapes = {name: info.shape for name, info in self.checkpoint.tensors.items()}
        for key, profile in self.choosing.items():
            errors = {group: error for one in records for group, error in one["errors"].get(key, {}).items()}
            decide(profile, shapes, errors, self.folder / key)
        for key in self._folders:
            QuantizedWeights(self.folder / key).settle()
        self.walk.drop_hidden(len(layers))
        self.walk.forget_routed()
        return {layer: tuple(counts) for layer, counts in coverage.items()}

    def files(self) -> set[str]:
        """The names of the files that a finished `run` leaves, relative to the folder."""
        names = {self._record(layer).name for layer in range(len(self.walk.text.layers))}
        for key in self._folders:
            names |= {f"{key}/{name}" for name in QuantizedWeights(self.folder / key).files()}
        names |= {f"{key}/{CHOICE}" for key in self.choosing}
        return names | {"ranges.json", "cache.json"}

    @property
    def _folders(self) -> set[str]:
        """The folder of each profile: one that chooses has its candidates' inside."""
        return {key.partition("/")[0] for key in self.profiles}

    def _resume(self) -> int:
        """The first layer to do: the first that is not done, or 0, the samples embedded."""
        layers = len(self.walk.text.layers)
        start = next((layer for layer in range(layers) if not self._is_done(layer)), layers)
        if self.walk.has_hidden(start) or (start == layers and not self._head_forms()):
            return start
        self.walk.embed(lambda done, total: self.watch("calibrate: embed samples", done, total, "samples"))
        return 0

    def _is_done(self, layer: int) -> bool:
        """Whether a killed run left the record of `layer` and all that was rounded of it as it wrote them."""
        return self.walk.journal.holds(self._record(layer).name) and self._roundings_of(layer) <= self._rounded

    def _roundings_of(self, layer: int) -> set[tuple[str, str, int | None]]:
        """Form, tensor and expert of each matrix of `layer` that some form rounds, or fits its inputs of."""
        stacks, experts = expert_tensors(layer), range(self.walk.text.experts)
        prefix = f"language_model.model.layers.{layer}."
        return {
            (key, tensor, expert)
            for key, form in self.forms.items()
            for tensor, scheme in form.schemes.items()
            if tensor.startswith(prefix) and isinstance(scheme, IntBlock | Static) and scheme.calibrates
            for expert in (experts if tensor in stacks else (None,))
        }

    def _record(self, layer: int) -> Path:
        """What a finished layer leaves; the hidden states after it are kept before it is."""
        return self.folder / f"layer-{layer:03}.json"

    def _step(self, layer: int) -> str:
        return f"calibrate: layer {layer} ({layer + 1} of {len(self.walk.text.layers)})"

    def _layer(self, layer: int) -> None:
        step = self._step(layer)
        self.walk.journal.forget(self._record(layer).name)
        inputs = self.walk.observe(layer, lambda at, total: self.watch(step, at, total, "samples and experts"))
        coverage = inputs.routed.counts(self.walk.text.experts) if inputs.routed else None
        self._refuse_thin(layer, coverage)
        ranges: dict[str, Any] = {}
        matrices = len(inputs.moments) + (2 * self.walk.text.experts if inputs.routed else 0)
        number = 0
        self.watch(f"{step}, matrices", number, matrices, "matrices")
        for one in self._results(inputs):
            if isinstance(one, Rounded):
                note = one.note
                self.roundings[one.form].write(note.tensor, note.expert, self.walk.text.experts, one.values, note)
                continue
            entry = {"tokens": one.tokens, "largest": one.largest}
            if one.expert is None:
                ranges[one.tensor] = entry
            else:
                ranges.setdefault(one.tensor, []).append(entry)
            number += 1
            self.watch(f"{step}, matrices", number, matrices, "matrices")
        for key in self.profiles:
            self._widen_thin(key, layer, ranges)
        errors = {key: self._errors(key, profile, inputs) for key, profile in self.choosing.items()}
        file, record = self._record(layer), {"coverage": coverage, "ranges": ranges, "cache": inputs.cache.to_json()}
        file.write_text(json.dumps(record | {"errors": errors}))
        self.walk.journal.keep(file.name, Region.whole(self.folder, file.name))
        self.walk.drop_hidden(layer)

    def _head_forms(self) -> dict[str, Form]:
        """The forms that round the head by what it reads, and have not done so yet."""
        return {
            key: form
            for key, form in self.forms.items()
            if HEAD in form.schemes and form.schemes[HEAD].calibrates and (key, HEAD, None) not in self._rounded
        }

    def _head(self) -> None:
        if forms := self._head_forms():
            for one in round_head(self.walk, forms, lambda at, total: self.watch("calibrate: head", at, total, "rows")):
                self.roundings[one.form].write(HEAD, None, 1, one.values, one.note)

    def _results(self, inputs: LayerInputs) -> Iterator[Rounded | Observed]:
        """What becomes of a layer's matrices: of those that all tokens read in this process, the experts' as jobs."""
        jobs = [] if inputs.routed is None else [*self._jobs(inputs.layer, inputs.routed)]
        results = [self.submit(round_expert, job) for job in jobs]
        rounder = Rounder(self.forms, self._rounded)
        while inputs.moments:  # none is held for longer than the matrices that read its inputs
            tensor = next(iter(inputs.moments))
            yield from rounder.round(
                tensor, None, partial(self.checkpoint.read_float32, tensor), inputs.moments.pop(tensor)
            )
        rounder.forget()
        for result in results:
            yield from result()

    def _jobs(self, layer: int, routed: Routed) -> Iterator[ExpertJob]:
        """What is to be done for each expert of a layer; every process is to see the rows that they read."""
        names = expert_tensors(layer)
        forms = {
            key: replace(form, schemes={name: form.schemes[name] for name in names}) for key, form in self.forms.items()
        }
        for expert in range(self.walk.text.experts):
            done = {one for one in self._rounded if one[1] in names and one[2] == expert}
            yield ExpertJob(layer, expert, self.checkpoint, routed.of(expert), forms, done, self.walk.second)

    def _weight(self, tensor: str, expert: int | None) -> NDArray[np.float32]:
        """A matrix [N, K], or that of one expert."""
        if expert is None:
            return self.checkpoint.read_float32(tensor)
        return self.checkpoint.read_expert(tensor, expert)

    def _widen_thin(self, key: str, layer: int, ranges: Mapping[str, Any]) -> None:
        """Give experts that too few tokens reached the widest range of inputs that an expert of `layer` saw."""
        for tensor in expert_tensors(layer):
            scheme = self.forms[key].schemes.get(tensor)
            if tensor not in ranges or not isinstance(scheme, Static) or not scheme.calibrates:
                continue
            widest = np.array([max(entry["largest"] for entry in ranges[tensor])], np.float32)
            features = self.checkpoint.tensors[tensor].shape[1]
            for expert, entry in enumerate(ranges[tensor]):
                if self.forms[key].too_little(entry["tokens"], entry["largest"]):
                    fitted = fit_inputs(np.repeat(widest, features), np.ones(features, np.float32), None, tensor)
                    note = RoundingRecord(tensor, expert, "widest", entry["tokens"], entry["largest"], None)
                    self.roundings[key].write(tensor, expert, len(ranges[tensor]), fitted, note)

    def _errors(self, key: str, profile: Profile, inputs: LayerInputs) -> dict[str, list[float]]:
        """The error that each candidate of a choosing profile makes in each group of this layer."""
        layer, errors = inputs.layer, {}
        forms = [partial(self._stored, f"{key}/{number}") for number in range(len(profile.forms))]
        groups = {
            kind: names for (at, kind), names in open_groups(profile, [*self.checkpoint.tensors]).items() if at == layer
        }
        for number, (where, tensors) in enumerate(groups.items()):
            self.watch(f"{self._step(layer)}, sensitivity", number, len(groups), "groups")
            if where == "experts":
                assert inputs.routed is not None
                errors[f"{layer} {where}"] = expert_errors(self.walk, layer, inputs.routed, self._weight, forms)
            else:
                errors[f"{layer} {where}"] = [
                    linear_error(self.walk, layer, {tensor: form(tensor, None) for tensor in tensors}) for form in forms
                ]
        return errors

    def _stored(self, form: str, tensor: str, expert: int | None) -> NDArray[np.float32]:
        """The values [N, K] that a matrix is stored as in one of the forms."""
        scheme = self.forms[form].schemes[tensor]
        if not isinstance(scheme, IntBlock) or not scheme.calibrates:
            return stored_values(self._weight(tensor, expert), scheme, name=tensor)
        held = self.roundings[form]
        if expert is None:
            return dequantize(held.read(tensor, scheme))
        return dequantize(held.read(tensor, scheme, expert, expert + 1))[0]

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
                    remedy="Raise calibration.samples, or let the profile fall back with another `below`",
                )


def fallbacks(profile: Profile, records: Sequence[RoundingRecord]) -> tuple[Fallback, ...]:
    """The experts that too few tokens reached, in order of layer and expert."""
    if profile.calibration is None:
        return ()
    least = profile.calibration.minimum_tokens
    thin = {
        (int(record.tensor.split(".layers.")[1].split(".")[0]), record.expert): record
        for record in records
        if record.expert is not None and (record.rounding == "widest" or record.tokens < least)
    }
    return tuple(
        Fallback(layer, expert, record.tokens, record.rounding) for (layer, expert), record in sorted(thin.items())
    )
