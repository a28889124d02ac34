"""Writes the reference record: the PyTorch reference runs once over all parity cases, layer by layer.

All cases go through a layer before the next one is read, so that memory holds one layer and one case. What a layer
gives is on disk before its successor begins, and a killed run goes on there. What was changed since then is made again,
from the embeddings on.
Legend: C cases, T fed tokens of all cases, S of one, H hidden, V vocabulary.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from arriero.export.proof.decoded_memory import logit_groups
from arriero.export.proof.reference_answer import forced_ids, generate_answer
from arriero.export.proof.walk_layers import ROUTER, Walk
from arriero.profiles.journal import Region, Tell, keep_silent
from arriero.profiles.moments import check_finite
from arriero.profiles.reserved_array import create_array
from arriero.runtimes.manifest import file_sha256
from arriero.runtimes.proof.logits import DRAWN, HEAD, WHOLE_VOCABULARY, keep_logits
from arriero.runtimes.proof.parity import top_tokens
from arriero.runtimes.proof.parity_case import ParityCase, map_pictures
from arriero.runtimes.proof.record import FILE, FORMAT, SAMPLED, label, layer_name
from arriero.runtimes.proof.sketch import BUCKETS, SketchedArray, seeded_features
from arriero.runtimes.session import Session
from arriero.thresholds import AnswerMode

Watch = Callable[[str, int, int, str], None]
SEED = 1  # of sketches, features and drawn ids; it names them, and hides nothing
STEP = "reference record"
EMBEDDED, ANSWERED = "embeddings", "logits"  # the first and the last of the pieces that are kept
DTYPES = dict(zip(SAMPLED, (np.int32, np.float32, np.int32, np.float32, np.float64, np.float64), strict=True))


@dataclass(frozen=True)
class Origin:
    """What a record says of where it comes from."""

    checkpoint: str  # content hash
    modalities: Sequence[str]
    answers: AnswerMode
    set: Mapping[str, Any]  # as `samples.cases.describe_set` gives it
    tools: Mapping[str, str]


def write_record(
    reference: Session,
    cases: Sequence[ParityCase],
    origin: Origin,
    folder: Path,
    watch: Watch,
    tell: Tell = keep_silent,
) -> set[str]:
    """Fill `folder` with the record of `cases`, from where a killed run left it; give the names of its files.

    `tell` is given a sentence for what that run left and has to be made again.
    Raises ArrieroError naming layer and case when the reference itself gives what is not finite.
    """
    walk = Walk(reference, cases, folder, second=False, what="parity case", tell=tell)
    return _Writer(walk, origin, folder, watch).run()


class _Writer:
    """One record in the making."""

    def __init__(self, walk: Walk, origin: Origin, folder: Path, watch: Watch) -> None:
        self.walk, self.origin, self.folder, self.watch = walk, origin, folder, watch
        self.session, self.cases = walk.session, walk.samples
        self.layers = len(walk.text.layers)
        self.pictures: set[str] = set()

    def run(self) -> set[str]:
        """Write everything that is not there yet, `record.json` last; give the names of all of the record's files."""
        pieces: list[tuple[str, Callable[[], None]]] = [(EMBEDDED, self._embed)]
        pieces += [(layer_name(layer), partial(self._layer, layer)) for layer in range(self.layers)]
        pieces.append((ANSWERED, self._logits))
        journal = self.walk.journal
        start = next((number for number, (piece, _) in enumerate(pieces) if not journal.holds(piece)), len(pieces))
        if 0 < start < len(pieces) and not self.walk.has_hidden(start - 1):
            start = 0
        for number, (piece, make) in enumerate(pieces):
            if number >= start:
                journal.forget(piece)
                make()
            if number:
                self.walk.drop_hidden(number - 1)
        return self._describe([piece for piece, _ in pieces])

    def _save(self, name: str, array: NDArray) -> str:
        np.save(self.folder / f"{name}.npy", array)
        return f"{name}.npy"

    def _keep(self, piece: str, files: Iterable[str], note: Any = None) -> None:
        """Note in the journal that `files` are all of `piece`."""
        self.walk.journal.keep(piece, *(Region.whole(self.folder, file) for file in files), note=note)

    def _sketch(self, kind: str, number: int, array: NDArray) -> NDArray[np.float64]:
        """A row [BUCKETS + 1] of a sketch's file."""
        made = SketchedArray.of(array, SEED, label(kind, number))
        return np.append(made.sums, made.squared_norm)

    def _embed(self) -> None:
        """The hidden states that go into layer 0, and what is kept of pixels, image features and embeddings."""
        hidden, token = self.walk.text.hidden_size, self.session.spec.image_token_id
        kept = {kind: np.zeros((len(self.cases), BUCKETS + 1)) for kind in ("pixels", "features", "embeddings")}
        shown: list[dict[str, Any]] = []

        def seen(number: int, ids: NDArray, pixels: NDArray | None, features: NDArray) -> None:
            if pixels is not None:
                check_finite(features, "image features", self.cases[number].name, self.walk.what)
                kept["pixels"][number] = self._sketch("pixels", number, pixels)
                kept["features"][number] = self._sketch("features", number, features)
            count = 0 if token is None else int(np.sum(ids == token))
            stand_in = seeded_features(SEED, label("seeded features", number), count, hidden)
            embeds = self.session.backend.embed(ids[None], stand_in)
            kept["embeddings"][number] = self._sketch("embeddings", number, embeds)
            shown.append({"tiles": [] if pixels is None else list(pixels.shape), "features": len(features)})

        self.walk.embed(lambda done, total: self.watch(f"{STEP}: embed cases", done, total, "cases"), seen)
        self._keep(EMBEDDED, [self._save(f"{kind}.sketch", rows) for kind, rows in kept.items()], shown)

    def _layer(self, layer: int) -> None:
        """One layer over all cases: expert ids and margins of a MoE layer, and a sketch of what follows."""
        sketches, ids, margins = np.empty((len(self.cases), BUCKETS + 1)), [], []
        step = f"{STEP}: layer {layer} ({layer + 1} of {self.layers})"
        for one in self.walk.steps(layer, lambda done, total: self.watch(step, done, total, "cases and experts")):
            if ROUTER in one.seen:
                chosen, margin = one.choices(self.walk.text.experts_per_token)
                ids.append(chosen.astype(np.int32))
                margins += [] if margin is None else [margin]
        hidden = np.load(self.walk.hidden_file(layer + 1), mmap_mode="r")
        for number, case in enumerate(self.cases):
            after = np.array(hidden[slice(*self.walk.bounds[number : number + 2])])
            check_finite(after, f"layer {layer}", case.name, self.walk.what)
            sketches[number] = self._sketch(layer_name(layer), number, after[None])
        arrays: dict[str, NDArray] = {"sketch": sketches}
        for name, pieces in (("expert_ids", ids), ("margins", margins)):
            if pieces:  # a dense layer has no experts, and a router that takes all of them no margins
                arrays[name] = np.concatenate(pieces)
        self._keep(
            layer_name(layer), [self._save(f"{layer_name(layer)}.{name}", array) for name, array in arrays.items()]
        )

    def _logits(self) -> None:
        """The last norm and the head over all cases: what is kept of the logits, and greedy top tokens."""
        self.walk.forget_routed()
        vocabulary, tokens = self.session.spec.vocab_size, self.walk.tokens
        widths = dict(zip(SAMPLED, (HEAD, HEAD, DRAWN, DRAWN, None, None), strict=True))
        shapes = {name: (tokens,) if width is None else (tokens, width) for name, width in widths.items()}
        whole = vocabulary <= WHOLE_VOCABULARY
        if whole:
            shapes = {"logits": (tokens, vocabulary)}
        files = {
            name: create_array(self.folder / f"{name}.npy", np.float32 if whole else DTYPES[name], shape)
            for name, shape in shapes.items()
        }
        hidden = np.load(self.walk.hidden_file(self.layers), mmap_mode="r")
        sketches, tops = np.empty((len(self.cases), BUCKETS + 1)), np.empty(tokens, np.int32)
        forced: list[NDArray] = []
        self.watch(f"{STEP}: logits", 0, len(self.cases), "cases")
        for number, case, logits in self._read_logits(hidden):
            rows = slice(*self.walk.bounds[number : number + 2])
            check_finite(logits, "logits", case.name, self.walk.what)
            sketches[number] = self._sketch("logits", number, logits)
            kept = keep_logits(logits, SEED, label("logits", number))
            for name, file in files.items():
                file[rows] = logits if whole else getattr(kept, name)
            tops[rows] = top_tokens(logits, self.session.spec.image_token_id)
            forced.append(forced_ids(self.walk.ids(number), self.walk.answers[number], logits[-1], self.session.spec))
            del logits, kept  # what one holds of the other too, before the next are made
            self.watch(f"{STEP}: logits", number + 1, len(self.cases), "cases")
        for file in files.values():
            file.flush()
        arrays: dict[str, NDArray] = {
            "logits.sketch": sketches,
            "forced_ids": np.concatenate(forced).astype(np.int32),
            "top_tokens": tops,
        }
        saved = [self._save(name, array) for name, array in arrays.items()]
        self._keep(ANSWERED, [*saved, *(f"{name}.npy" for name in files)])

    def _read_logits(self, hidden: NDArray) -> Iterator[tuple[int, ParityCase, NDArray[np.float32]]]:
        """Number, case and logits [S, V] of each case; those of a group of `logit_groups` go through the head together,
        so that it is read once for them.
        """
        bounds = self.walk.bounds
        for group in logit_groups(np.diff(bounds).tolist(), self.walk.text):
            logits = self.walk.logits(np.array(hidden[bounds[group.start] : bounds[group.stop]]))
            for number in group:
                own = slice(*(bounds[number : number + 2] - bounds[group.start]))
                yield number, self.cases[number], logits[own]
            del logits  # gone before its successor is made

    def _describe(self, pieces: Sequence[str]) -> set[str]:
        """Pictures, generated answers, and `record.json` over all of it and the arrays of `pieces`."""
        closes, kept = bool(self.session.spec.eos_token_ids), self.walk.journal.entries
        shown = kept[EMBEDDED].note
        entries = []
        self.watch(f"{STEP}: answers", 0, len(self.cases), "cases")
        for number, case in enumerate(self.cases):
            fed, prompt = len(self.walk.ids(number)), self.walk.prompts[number]
            answered = closes and len(self.walk.answers[number]) > 0
            entries.append(
                {
                    "name": case.name,
                    "family": case.family,
                    "prompt": map_pictures(case.prompt, self._picture),
                    "images": [self._picture(image) for image in case.images],
                    "answer": case.answer,
                    "scorer": case.scorer,
                    "prompt_tokens": len(prompt.input_ids),
                    "tokens": fed,
                    "forced": fed + answered,
                    **shown[number],
                    **self._answer(number),
                }
            )
            self.watch(f"{STEP}: answers", number + 1, len(self.cases), "cases")
        names = sorted({region.file for piece in pieces for region in kept[piece].regions} | self.pictures)
        files = {}
        for number, name in enumerate(names):
            self.watch(f"{STEP}: hash files", number, len(names), "files")
            files[name] = {"bytes": (self.folder / name).stat().st_size, "sha256": file_sha256(self.folder / name)}
        data = {
            "format": FORMAT,
            "model": self.session.spec.entry(),
            "seed": SEED,
            **asdict(self.origin),
            "cases": entries,
            "files": files,
        }
        (self.folder / FILE).write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return {FILE, *files}

    def _answer(self, number: int) -> dict[str, Any]:
        """What the reference answers, where answers are generated."""
        if self.origin.answers == "forced":
            return {}
        case = self.cases[number]
        prompt = self.session.encode(case.prompt, list(case.images))
        ids, text = generate_answer(self.session, prompt, len(self.walk.answers[number]))
        return {"generated_ids": ids, "generated_text": text}

    def _picture(self, picture: Any) -> str:
        """Store a picture or video and give its name: a user's own file as it is, an array as lossless PNG."""
        folder = self.folder / "pictures"
        folder.mkdir(exist_ok=True)
        scratch = folder / "new.partial"
        if isinstance(picture, np.ndarray):
            Image.fromarray(picture).save(scratch, "PNG")
            suffix = ".png"
        else:
            shutil.copyfile(picture, scratch)
            suffix = Path(picture).suffix.lower()
        name = f"{file_sha256(scratch)[:32]}{suffix}"
        scratch.replace(folder / name)
        self.pictures.add(f"pictures/{name}")
        return f"pictures/{name}"
