"""The reference record: what the PyTorch reference says of every parity case, in a folder that any machine can read.

`record.json` names the checkpoint, the model, the mode of answers, the tools, the cases, and every other file with its
sha256; the sha256 of `record.json` itself is the record's hash. Arrays are .npy files over all cases, one after
another, and pictures lie in `pictures/`. `docs/parity.md` says how exact each figure is that is measured against it.
Legend: C cases, T fed tokens of all cases, S of one, F forced ids of all cases, V vocabulary, k experts per token,
K and N as in `logits.py`.

    forced_ids i32 [F]   top_tokens i32 [T]   layer-NNN.expert_ids i32 [T, k]   layer-NNN.margins f32 [T]
    logits f32 [T, V], or head_ids, head_logits [T, K], drawn_ids, drawn_logits [T, N], log_sum, rest_log_sum f64 [T]
    {embeddings, pixels, features, logits, layer-NNN}.sketch f64 [C, BUCKETS + 1]: sums, then the squared norm
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self, cast

import numpy as np
from numpy.typing import NDArray

from arriero.errors import ArrieroError, Problems
from arriero.runtimes.backend import ModelSpec
from arriero.runtimes.inside import climbs_out, leads_out
from arriero.runtimes.manifest import file_sha256
from arriero.runtimes.proof.cases import ReferenceCase
from arriero.runtimes.proof.logits import SampledLogits, WholeLogits
from arriero.runtimes.proof.parity_case import ParityCase, map_pictures
from arriero.runtimes.proof.sketch import SketchedArray
from arriero.strict_json import read_json_object
from arriero.thresholds import AnswerMode

FORMAT = 2
FILE = "record.json"
KEYS = ("format", "checkpoint", "model", "modalities", "answers", "seed", "set", "tools", "cases", "files")
SAMPLED = ("head_ids", "head_logits", "drawn_ids", "drawn_logits", "log_sum", "rest_log_sum")
_AGAIN = "Copy the record again, or write it anew with `arriero build`"


def label(kind: str, case: int) -> str:
    """Names what is drawn for an array of case number `case`."""
    return f"{kind} of case {case}"


def layer_name(layer: int) -> str:
    """What the files of a layer are called."""
    return f"layer-{layer:03}"


@dataclass(frozen=True)
class ReferenceRecord:
    """A record whose files were checked; iterating gives its cases. `hash` is the sha256 of its `record.json`."""

    folder: Path
    hash: str
    spec: ModelSpec
    answers: AnswerMode
    data: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Self:
        """Read the record in `folder` and hash its files. Raises ArrieroError, or Problems with every damaged file."""
        path = folder / FILE
        if not path.is_file():
            raise ArrieroError(
                "there is no reference record",
                where=str(folder),
                expected=f"a folder with {FILE}",
                remedy="Give the folder that a build published as `reference-...`, or the `reference` of a bundle",
            )
        data = read_json_object(path, _AGAIN)
        if data.get("format") != FORMAT or not all(key in data for key in KEYS):
            raise ArrieroError(
                f"the record has format {data.get('format')!r}",
                where=str(path),
                expected=f"format {FORMAT}",
                remedy=_AGAIN,
            )
        files, cases = data["files"], data["cases"]
        sound = isinstance(files, dict) and all(isinstance(f, dict) and "sha256" in f for f in files.values())
        if not sound or not isinstance(cases, list) or not all(isinstance(case, dict) for case in cases):
            raise ArrieroError("the record's files and cases are malformed", where=str(path), remedy=_AGAIN)
        problems = [problem for name in data["files"] if (problem := _damage(folder, name, data["files"][name]))]
        if problems:
            raise Problems(f"{folder}: the reference record is damaged", problems)
        spec = ModelSpec.parse(data["model"], f"{path}:model")
        return cls(folder, file_sha256(path), spec, cast(AnswerMode, data["answers"]), data)

    def __len__(self) -> int:
        return len(self.data["cases"])

    def __iter__(self) -> Iterator[ReferenceCase]:
        for number in range(len(self)):
            yield self.case(number)

    @property
    def checkpoint(self) -> str:
        """The content hash of the checkpoint that the record was made from."""
        return str(self.data["checkpoint"])

    def labels(self) -> dict[str, str]:
        """What names the record in a report."""
        made = self.data["set"]
        return {"held-out prompts": made["set"], "seed": str(made["seed"]), "reference record": self.hash}

    def case(self, number: int) -> ReferenceCase:
        """Case `number`; its arrays are mapped, not read."""
        entry, seed = self.data["cases"][number], int(self.data["seed"])
        fed, forced = (self._rows(key, number) for key in ("tokens", "forced"))
        length, hidden = int(entry["tokens"]), self.spec.hidden_size
        layers = range(len(self.spec.layers))
        moe = [layer for layer in layers if self.spec.layers[layer].ffn == "moe"]

        def sketched(kind: str, *shape: int) -> SketchedArray:
            kept = self._array(f"{kind}.sketch")[number]
            return SketchedArray(shape, kept[:-1], float(kept[-1]), seed, label(kind, number))

        tiles = entry["tiles"]
        return ReferenceCase(
            case=self._parity_case(entry),
            prompt_tokens=int(entry["prompt_tokens"]),
            forced_ids=self._array("forced_ids")[forced].astype(np.int64),
            top_tokens=self._array("top_tokens")[fed].astype(np.int64),
            logits=self._logits(fed, number, sketched("logits", length, self.spec.vocab_size)),
            embeddings=sketched("embeddings", 1, length, hidden),
            feature_seed=(seed, label("seeded features", number)),
            pixels=sketched("pixels", *tiles) if tiles else None,
            features=sketched("features", int(entry["features"]), hidden) if tiles else None,
            hiddens={layer: sketched(layer_name(layer), 1, length, hidden) for layer in layers},
            expert_ids={layer: self._array(f"{layer_name(layer)}.expert_ids")[fed] for layer in moe},
            margins={
                layer: self._array(f"{layer_name(layer)}.margins")[fed]
                for layer in moe
                if f"{layer_name(layer)}.margins.npy" in self.data["files"]
            },
            generated_ids=entry.get("generated_ids", ()),
            generated_text=entry.get("generated_text", ""),
        )

    def tokens_per_expert(self) -> dict[str, tuple[int, ...]]:
        """How many of the cases' tokens reached each expert, by MoE layer."""
        counts = {
            str(layer): np.bincount(
                self._array(f"{layer_name(layer)}.expert_ids").ravel(), minlength=self.spec.num_local_experts
            )
            for layer, one in enumerate(self.spec.layers)
            if one.ffn == "moe"
        }
        return {layer: tuple(int(count) for count in reached) for layer, reached in counts.items()}

    def _parity_case(self, entry: Mapping[str, Any]) -> ParityCase:
        prompt = map_pictures(entry["prompt"], self._picture)
        images = tuple(self._picture(name) for name in entry["images"])
        return ParityCase(entry["name"], entry["family"], prompt, images, entry["answer"], entry["scorer"])

    def _picture(self, name: str) -> str:
        if name not in self.data["files"]:  # whose names were checked, so that no path leads out of the record
            raise ArrieroError(f"the record holds no picture {name!r}", where=str(self.folder / FILE), remedy=_AGAIN)
        return str(self.folder / name)

    def _logits(self, rows: slice, number: int, sketched: SketchedArray) -> WholeLogits | SampledLogits:
        if "logits.npy" in self.data["files"]:
            return WholeLogits(self._array("logits")[rows])
        kept = {name: self._array(name)[rows] for name in SAMPLED}
        return SampledLogits(self.spec.vocab_size, **kept, sketched=sketched)

    @cached_property
    def _arrays(self) -> dict[str, NDArray]:
        return {}

    def _array(self, name: str) -> NDArray:
        if name not in self._arrays:
            path = self.folder / f"{name}.npy"
            try:
                self._arrays[name] = np.load(path, mmap_mode="r", allow_pickle=False)
            except Exception as error:  # numpy's parser raises whatever a stranger's header makes it
                what = f"holds no array ({error or type(error).__name__})"
                raise ArrieroError(what, where=str(path), remedy=_AGAIN) from None
        return self._arrays[name]

    @cached_property
    def _bounds(self) -> dict[str, NDArray]:
        return {
            key: np.cumsum([0, *(entry[key] for entry in self.data["cases"])], dtype=np.int64)
            for key in ("tokens", "forced")
        }

    def _rows(self, key: str, number: int) -> slice:
        return slice(int(self._bounds[key][number]), int(self._bounds[key][number + 1]))


def _damage(folder: Path, name: str, entry: Mapping[str, Any]) -> ArrieroError | None:
    path = folder / name
    if climbs_out(name) or leads_out(path, folder):
        return ArrieroError(f"{name!r} points outside the record", where=str(folder / FILE), remedy=_AGAIN)
    if not path.is_file():
        return ArrieroError("the file is missing from the record", where=name, remedy=_AGAIN)
    if file_sha256(path) != entry["sha256"]:
        what = "the file's content was changed or damaged"
        return ArrieroError(what, where=name, expected=f"{entry['sha256'][:12]}... that {FILE} says", remedy=_AGAIN)
    return None
