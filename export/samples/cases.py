"""Samples of the named sets as what the stages take: calibration samples and parity cases are one thing."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arriero.errors import ArrieroError, MachineLacks, Problems, placed
from arriero.export.build_file.schema import EMBEDDED, Cases, Samples
from arriero.profiles.data import IMAGE_FAMILIES, TEXT_FAMILIES, Sample, make
from arriero.runtimes.manifest import SampleSet, file_sha256
from arriero.runtimes.proof.parity_case import ParityCase
from arriero.runtimes.proof.scorers import SAME_ANSWER

if TYPE_CHECKING:
    from arriero.runtimes.processor.processor import Processor

MODALITIES = ("text", "image", "video")


def draw_samples(modalities: Sequence[str], count: int, seed: int, split: str) -> list[Sample]:
    """`count` samples of the embedded families of `modalities`, spread evenly, in turn."""
    families = _families(modalities)
    share = -(-count // len(families))
    columns = [make(family, share, seed, split) for family in families]
    return [sample for row in zip(*columns, strict=True) for sample in row][:count]


def scored_counts(samples: Samples, modalities: Sequence[str]) -> Counter[str]:
    """How many samples with a known answer each family of `draw_cases` has; those of embedded sets are not drawn."""
    if samples.set != EMBEDDED:
        return Counter(case.family for case in draw_cases(samples, modalities) if case.scorer is not None)
    families = _families(modalities)
    return Counter(families[number % len(families)] for number in range(samples.samples or samples.usual))


def draw_cases(chosen: Samples, modalities: Sequence[str]) -> list[ParityCase]:
    """The samples that `chosen` names, in the set's order; parity cases are of the embedded sets' held-out split.

    Of a file or folder, the seed chooses which. Raises ArrieroError/Problems, with all its mistakes, for a set that
    cannot be read, that holds fewer samples than asked for, or that shows images to a build of text only.
    """
    if chosen.set == EMBEDDED:
        split = "held-out" if isinstance(chosen, Cases) else "train"
        samples = draw_samples(modalities, chosen.samples or chosen.usual, chosen.seed, split)
        return [_embedded_case(number, sample) for number, sample in enumerate(samples)]
    # Imported here: an embedded set needs neither Pillow nor the reader.
    from arriero.export.samples.data_files import read_cases

    held = read_cases(Path(chosen.set))
    if chosen.samples is not None and chosen.samples > len(held):
        raise ArrieroError(
            f"{chosen.samples} samples are wanted and the set holds {len(held)}",
            where=chosen.set,
            expected=f"at most {len(held)}",
            remedy="Lower `samples`, or leave it out to use them all",
        )
    numbers = np.random.default_rng(chosen.seed).permutation(len(held))[: chosen.samples]
    cases = [held[number] for number in sorted(numbers)]
    seeing = [case for case in cases if case.family != "text"] if "image" not in modalities else []
    if seeing:
        what = f"shows {'a video' if seeing[0].family == 'video' else 'an image'}, and the build takes in text only"
        remedy = "Write `modalities: [text, image]`, or take the samples with pictures out of the set"
        more = f" and {len(seeing) - 1} more" if len(seeing) > 1 else ""
        raise ArrieroError(what, where=f"{chosen.set}: {seeing[0].name}{more}", remedy=remedy)
    return cases


def _families(modalities: Sequence[str]) -> list[str]:
    return [*TEXT_FAMILIES, *(IMAGE_FAMILIES if "image" in modalities else ())]


def _embedded_case(number: int, sample: Sample) -> ParityCase:
    return ParityCase(
        name=f"{sample.family}-{number}",
        family=sample.family,
        prompt=sample.prompt,
        images=sample.images,
        answer=sample.answer,
        scorer=SAME_ANSWER,
    )


def describe_set(samples: Samples, cases: Sequence[ParityCase]) -> SampleSet:
    """What identifies drawn samples, wherever their files lie: set, seed, content hash, samples per modality."""
    counts = Counter(map(modality, cases))
    return SampleSet(
        set=samples.set if samples.set == EMBEDDED else Path(samples.set).name,
        seed=samples.seed,
        sha256=content_hash(cases),
        samples={kind: counts[kind] for kind in MODALITIES if counts[kind]},
    )


def modality(case: ParityCase) -> str:
    """`text`, `image` or `video`: what a case shows besides its words."""
    return "video" if case.family == "video" else "text" if case.family in ("text", *TEXT_FAMILIES) else "image"


def show_pictures(samples: Samples) -> bool:
    """Whether any of the samples of a build that takes in images shows one; those of embedded sets are not drawn."""
    if samples.set != EMBEDDED:
        return any(modality(case) != "text" for case in draw_cases(samples, ("text", "image")))
    # they are drawn from the families in turn, those of text first
    return (samples.samples or samples.usual) > len(TEXT_FAMILIES)


def content_hash(cases: Iterable[ParityCase]) -> str:
    """The sha256 over all that is asked, shown and answered: words, and the bytes of every image and video file."""
    known: dict[str, str] = {}
    digest = hashlib.sha256()
    for case in cases:
        asked = case.prompt if isinstance(case.prompt, str) else [_hashed(m, known) for m in case.prompt]
        shown = [_image_hash(image, known) for image in case.images]
        digest.update(json.dumps([asked, shown, case.answer]).encode() + b"\n")
    return digest.hexdigest()


def _hashed(message: Mapping[str, Any], known: dict[str, str]) -> dict[str, Any]:
    """A message with the content hash of each picture in the place of its path."""
    if isinstance(message["content"], str):
        return dict(message)
    entries = [
        {**entry, "path": _image_hash(entry["path"], known)} if "path" in entry else entry
        for entry in message["content"]
    ]
    return {**message, "content": entries}


def _image_hash(image: Any, known: dict[str, str]) -> str:
    if isinstance(image, np.ndarray):
        return hashlib.sha256(repr(image.shape).encode() + image.tobytes()).hexdigest()
    if image not in known:
        known[image] = file_sha256(Path(image))
    return known[image]


def shortening(samples: Samples) -> str:
    """What to do about one of `samples` that is too long for the model, or as a parity case for a target's context."""
    own = "take a set of your own" if samples.set == EMBEDDED else "shorten it"
    return f"Raise the context, or {own}" if isinstance(samples, Cases) else own.capitalize()


def encoded_sizes(
    cases: Sequence[ParityCase], processor: Processor, most_tokens: int, remedy: str = "Shorten it"
) -> list[tuple[int, int]]:
    """Tokens (prompt and answer) and image tiles of each case, as the model will read it.

    Raises Problems with every case that cannot be read: pictures that do not open, a chat template that refuses,
    placeholders without images, more than `most_tokens` tokens, for which `remedy` says what to do.
    """
    sizes, problems = [], []
    for case in cases:
        try:
            prompt = processor.encode(case.prompt, list(case.images))
        except ArrieroError as error:
            problems.append(placed(error, case.name))
            continue
        tokens = len(prompt.input_ids) + len(processor.tokenize(case.answer))
        if tokens > most_tokens:
            problems.append(
                ArrieroError(f"has {tokens} tokens", where=case.name, expected=f"at most {most_tokens}", remedy=remedy)
            )
        sizes.append((tokens, 0 if prompt.pixel_values is None else len(prompt.pixel_values)))
    if problems and all(isinstance(problem, MachineLacks) for problem in problems):
        raise problems[0]
    if problems:
        raise Problems("samples that the model cannot read", problems)
    return sizes
