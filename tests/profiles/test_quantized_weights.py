"""Calibrated roundings written one expert at a time and read back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from arriero.profiles.journal import FILE
from arriero.profiles.quantize import Quantized, dequantize, quantize
from arriero.profiles.quantized_weights import NOTES, QuantizedWeights, RoundingRecord
from arriero.profiles.schemes import IntBlock
from tests.flip import flip

SCHEME = IntBlock(kind="int_block", bits=4, block=16, accuracy_level=4, rounding="gptq")


def rounded(seed: int) -> Quantized:
    weight = np.random.default_rng(seed).standard_normal((6, 32)).astype(np.float32)
    return quantize(weight, bits=4, block=16, name="w")


def test_a_matrix_and_a_stack_come_back(tmp_path: Path) -> None:
    store = QuantizedWeights(tmp_path / "new")
    assert "w" not in store
    assert store.notes() == []
    store.write("w", None, 0, rounded(0), RoundingRecord("w", None, "gptq", 9, 1.5, 0.3))
    for expert in (0, 2, 1):
        store.write("e", expert, 3, rounded(expert), RoundingRecord("e", expert, "gptq", 9, 1.5, 0.3))
    assert "w" in store
    assert "e" in store
    np.testing.assert_array_equal(dequantize(store.read("w", SCHEME)), dequantize(rounded(0)))
    stack = dequantize(store.read("e", SCHEME))
    for expert in range(3):
        np.testing.assert_array_equal(stack[expert], dequantize(rounded(expert)))


def test_writing_again_replaces_and_the_last_note_counts(tmp_path: Path) -> None:
    store = QuantizedWeights(tmp_path)
    for seed in (1, 2):
        store.write("e", 0, 2, rounded(seed), RoundingRecord("e", 0, "gptq", seed, 1.0, None))
    np.testing.assert_array_equal(dequantize(store.read("e", SCHEME))[0], dequantize(rounded(2)))
    assert [note.tokens for note in store.notes()] == [2]


def test_settled_notes_do_not_tell_how_often_a_run_was_cut_short(tmp_path: Path) -> None:
    """Nor do they tell of a line that a full disk tore."""
    once, torn = QuantizedWeights(tmp_path / "once"), QuantizedWeights(tmp_path / "torn")
    for store, runs in ((once, ((1, 2, 3),)), (torn, ((1, 2), (2, 3), (3,)))):
        for tensors in runs:
            for number in tensors:
                note = RoundingRecord(f"w{number}", None, "gptq", number, 1.0, None)
                store.write(note.tensor, None, 0, rounded(number), note)
            if store is torn:
                with (store.folder / FILE).open("a") as journal:
                    journal.write('{"tensor": "w9", "exp')
        store.settle()
    assert (once.folder / NOTES).read_bytes() == (torn.folder / NOTES).read_bytes()
    assert [note.tensor for note in torn.notes()] == ["w1", "w2", "w3"]
    assert sorted(path.name for path in torn.folder.iterdir()) == sorted({*once.files(), FILE})
    (torn.folder / FILE).unlink()  # as the stage does that is finished
    assert QuantizedWeights(torn.folder).notes() == once.notes()


@pytest.mark.parametrize("at", [64, -1])
def test_an_expert_that_was_changed_since_is_written_again(tmp_path: Path, at: int) -> None:
    """In the header of its stack's file, on which all of them depend, or in the last one's integers."""
    once, store, told = QuantizedWeights(tmp_path / "once"), QuantizedWeights(tmp_path / "store"), list[str]()
    notes = [RoundingRecord("e", expert, "gptq", expert, 1.0, None) for expert in range(3)]
    for made in (once, store):
        for expert in range(3):
            made.write("e", expert, 3, rounded(expert), notes[expert])
    flip(store.folder / "e.packed.npy", at)
    again = QuantizedWeights(store.folder, told.append)
    left = again.check()
    assert left == ({("e", 0), ("e", 1)} if at < 0 else set())
    assert len(told) == 3 - len(left)
    for expert in {0, 1, 2} - {number for _, number in left}:
        again.write("e", expert, 3, rounded(expert), notes[expert])
    for made in (once, again):
        made.settle()
    for file in once.files():
        assert (once.folder / file).read_bytes() == (again.folder / file).read_bytes()
