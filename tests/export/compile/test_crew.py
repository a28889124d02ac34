"""Threads stay with a step of few tokens, and one token has a function of its own: the same bits, and errors pass."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm", reason="needs apache-tvm: pip install 'arriero[tvm]'")

from arriero.runtimes.tvm import TvmBackend
from arriero.runtimes.tvm_graph import WITH_CREW
from tests.export.compile.test_packed_rows import compiled

SLOTS = 60


@pytest.fixture(scope="module", params=["fp32", "int4"])
def backend(request: Any, tmp_path_factory: pytest.TempPathFactory, kernels: Path) -> TvmBackend:
    widths = {"intermediate_size": 64, "intermediate_size_mlp": 64}  # whole blocks of int4
    return compiled(tmp_path_factory.mktemp("crew"), kernels, request.param, attention_chunk_size=SLOTS, **widths)


def test_a_token_is_the_same_with_a_crew_and_without_by_either_function(backend: TvmBackend, monkeypatch: Any) -> None:
    """One row and three, the rows' tokens after a prompt; with other numbers of threads too."""
    graph = backend._graphs["text"]
    crew, taken, run = graph._crew, list[str](), graph.run
    assert (graph.for_a_token, crew is not None) == ("token", True)
    hidden = np.random.default_rng(0).standard_normal((3, SLOTS, backend.spec.hidden_size), np.float32)

    def note(feeds: Any, function: str = "main") -> list[np.ndarray]:
        taken.append(function)
        return run(feeds, function)

    monkeypatch.setattr(graph, "run", note)

    def answer(rows: int) -> list[np.ndarray]:
        cache, found = backend.new_cache(rows, SLOTS), []
        for row in range(rows):
            backend.forward(hidden[row : row + 1, :20], np.arange(20)[None], cache.rows(row, row + 1), np.array([19]))
        for at in range(20, SLOTS):
            step = backend.forward(hidden[:rows, at : at + 1], np.full((rows, 1), at), cache, np.array([0]))
            found.append(step.logits)
        return found

    for rows, function in ((1, "token"), (3, "step")):
        taken.clear()
        expected = answer(rows)
        assert set(taken) == {"prompt", function}
        monkeypatch.setattr(graph, "_crew", None)
        np.testing.assert_array_equal(answer(rows), expected)
        monkeypatch.setattr(graph, "for_a_token", "step")
        np.testing.assert_array_equal(answer(rows), expected)
        monkeypatch.setattr(graph, "_crew", crew)
        np.testing.assert_array_equal(answer(rows), expected)
        for threads in (3, 2):
            monkeypatch.setattr(graph, "_threads", threads)
            monkeypatch.setattr(graph, "_parts", graph._ffi.from_dlpack(np.zeros(threads, np.uint8)))
            np.testing.assert_array_equal(answer(rows), expected)
        monkeypatch.setattr(graph, "for_a_token", "token")


def test_what_goes_wrong_in_a_step_passes_through_the_crew(backend: TvmBackend, monkeypatch: Any) -> None:
    graph = backend._graphs["text"]
    cache = backend.new_cache(1, SLOTS)
    hidden = np.zeros((1, 1, backend.spec.hidden_size), np.float32)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(graph, "_machine", lambda _: fail)
        with pytest.raises(KeyboardInterrupt):
            backend.forward(hidden, np.array([[0]]), cache, np.array([0]))
    assert cache.lengths.tolist() == [0]
    assert np.isfinite(backend.forward(hidden, np.array([[0]]), cache, np.array([0])).logits).all()


def test_a_crew_calls_on_the_callers_thread_once_and_works_in_a_crew_as_it_is(backend: TvmBackend) -> None:
    call = backend._graphs["text"].library.get_function(WITH_CREW, True)
    seen = list[int]()

    def inner() -> None:
        seen.append(threading.get_ident())

    within = ctypes.CFUNCTYPE(None)(inner)

    def outer() -> None:
        inner()
        call(ctypes.cast(within, ctypes.c_void_p).value)
        inner()

    around = ctypes.CFUNCTYPE(None)(outer)
    call(ctypes.cast(around, ctypes.c_void_p).value)
    assert seen == 3 * [threading.get_ident()]
