"""A backend behind a pipe does what it does in the process; what it refuses comes through as a sentence."""

from __future__ import annotations

import io

import numpy as np
import pytest

from arriero.errors import ArrieroError
from arriero.export.proof.emulate import EmulatedBackend
from arriero.export.proof.reference import TorchBackend
from arriero.runtimes.onnxruntime import OrtBackend
from arriero.runtimes.remote import Server, read_message, write_message
from tests.runtimes.conftest import CHUNK
from tests.toys import make_scout_toy


def over_the_wire(server, call, arrays=None):
    """One call as bytes there and back."""
    there, back = io.BytesIO(), io.BytesIO()
    write_message(there, {"dropped": [], **call}, arrays or {})
    there.seek(0)
    write_message(back, *server.answer(*read_message(there)))
    back.seek(0)
    return read_message(back)


def test_steps_over_the_wire_equal_steps_in_the_process(toy):
    server = Server(toy)
    number = over_the_wire(server, {"do": "new_cache", "batch": 2, "capacity": 20})[0]["cache"]
    other = toy.new_cache(1, 20)
    ids = np.arange(6)[None]
    empty = np.zeros((0, toy.spec.hidden_size), np.float32)
    _, embedded = over_the_wire(server, {"do": "embed"}, {"input_ids": ids, "image_features": empty})
    positions, index = np.arange(6)[None], np.array([0, 5])
    call = {"do": "forward", "cache": number, "start": 1, "stop": 2, "captures": True}
    arguments = {"inputs_embeds": embedded["inputs_embeds"], "positions": positions, "logits_index": index}
    arguments["adapters"] = np.array([0])
    _, outputs = over_the_wire(server, call, arguments)
    expected = toy.forward(toy.embed(ids, empty), positions, other, index, captures=True)
    assert np.array_equal(outputs["logits"], expected.logits)
    assert np.array_equal(outputs["expert_id.0"], expected.expert_ids[0])
    assert np.array_equal(outputs["hidden.1"], expected.hiddens[1])
    assert server.caches[number].lengths.tolist() == [0, 6]
    over_the_wire(server, {"do": "copy_row", "cache": number, "source": 1, "target": 0})
    assert server.caches[number].lengths.tolist() == [6, 6]


def test_experts_are_forced_over_the_wire(tmp_path, monkeypatch):
    """From the backend on this side to the one on the other; PyTorch's takes expert ids and needs no build."""
    there = TorchBackend(make_scout_toy(tmp_path, 3, vision=False))
    server, here = Server(there), EmulatedBackend.__new__(EmulatedBackend)
    here.spec, here._dropped = there.spec, []
    monkeypatch.setattr(here, "ask", lambda call, arrays=None: over_the_wire(server, call, arrays), raising=False)
    ids, steps = np.arange(3, 9)[None], np.arange(6)
    chosen = {layer: (steps[None, :, None] + layer) % 4 for layer in range(4)}
    embeds = there.embed(ids, np.zeros((0, there.spec.hidden_size), np.float32))
    caches = here.new_cache(1, 20), there.new_cache(1, 20)
    got, expected = (
        backend.forward_forced(embeds, steps[None], cache, steps, chosen)
        for backend, cache in zip((here, there), caches, strict=True)
    )
    assert np.array_equal(got, expected)
    assert caches[0].lengths.tolist() == [6]
    free = there.forward(embeds, steps[None], there.new_cache(1, 20), steps).logits
    assert not np.array_equal(got, free)


def test_rows_are_cut_saved_and_restored_over_the_wire(bundle, toy):
    """The store's own bytes arrive, and come back into another row."""
    server = Server(OrtBackend(bundle, toy.spec, threads=1))
    number = over_the_wire(server, {"do": "new_cache", "batch": 2, "capacity": 20})[0]["cache"]
    store = server.caches[number].store
    for buffer in (*store.keys, *store.values):
        buffer[...] = np.random.default_rng(0).standard_normal(buffer.shape)
    store.lengths[1] = 11
    over_the_wire(server, {"do": "truncate", "cache": number, "row": 1, "length": 10})
    assert store.lengths.tolist() == [0, 10]
    reply, arrays = over_the_wire(server, {"do": "snapshot", "cache": number, "row": 1, "start": 0})
    assert reply == {"length": 10}
    assert {name: array.shape[1] for name, array in arrays.items()} == {
        f"{kind}.{layer}": slots for layer, slots in ((0, 10 % CHUNK), (1, 10)) for kind in ("key", "value")
    }
    over_the_wire(server, {"do": "restore", "cache": number, "row": 0, "length": 10}, arrays)
    assert store.lengths.tolist() == [10, 10]
    for layer, slots in ((0, 10 % CHUNK), (1, 10)):
        for buffer in (store.keys[layer], store.values[layer]):
            assert np.array_equal(buffer[0, :, :slots], buffer[1, :, :slots])
            assert not np.array_equal(buffer[0], buffer[1])
    with pytest.raises(ArrieroError, match="overwritten"):
        over_the_wire(server, {"do": "truncate", "cache": number, "row": 1, "length": 7})


def test_dropped_caches_are_let_go(toy):
    server = Server(toy)
    first = over_the_wire(server, {"do": "new_cache", "batch": 1, "capacity": 4})[0]["cache"]
    second = over_the_wire(server, {"do": "new_cache", "batch": 1, "capacity": 4, "dropped": [first]})[0]["cache"]
    assert first != second
    assert list(server.caches) == [second]


def test_a_closed_pipe_ends_the_conversation():
    with pytest.raises(EOFError):
        read_message(io.BytesIO(b""))
