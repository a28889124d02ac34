"""A folder of images as a set of prompts: each is asked to be described, and no answer is known."""

from __future__ import annotations

from pathlib import Path

from arriero.errors import ArrieroError
from arriero.runtimes.inside import leads_out
from arriero.runtimes.processor.picture_file import SUFFIXES
from arriero.runtimes.proof.parity_case import ParityCase

QUESTION = "Describe the image."
UNREAD = (".dng", ".eps", ".heic", ".heif", ".jxl", ".psd", ".svg")  # pictures of kinds that are not taken


def read_folder(folder: Path) -> list[ParityCase]:
    """One case for each image directly in `folder`, in the order of names.

    Raises ArrieroError where there is none, and for images of kinds that are not taken.
    """
    entries = sorted(file for file in folder.iterdir() if file.is_file())
    if unread := [file.name for file in entries if file.suffix.lower() in UNREAD]:
        raise ArrieroError(
            f"images of this kind are not taken: {', '.join(unread[:5])}{', ..' if len(unread) > 5 else ''}",
            where=str(folder),
            expected=f"files with {', '.join(SUFFIXES)}",
            remedy="Convert them, for example to PNG, or take them out of the folder",
        )
    files = [file for file in entries if file.suffix.lower() in SUFFIXES]
    for file in files:
        if leads_out(file, folder):
            raise ArrieroError(
                "the image is a link that leaves the folder",
                where=str(file),
                expected=f"a file in {folder}",
                remedy="Copy the image into the folder",
            )
    if not files:
        raise ArrieroError(
            "the folder holds no images",
            where=str(folder),
            expected=f"files with {', '.join(SUFFIXES)} directly in it",
            remedy="Give the folder of the images themselves, or a JSONL file that names them",
        )
    return [ParityCase(file.name, "image", QUESTION, (str(file),)) for file in files]
