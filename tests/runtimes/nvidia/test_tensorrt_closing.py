"""A session over TensorRT that is closed while it is used: steps in flight end first, later ones are refused."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from arriero.errors import ArrieroError
from arriero.runtimes.processor.processor import Prompt
from arriero.runtimes.session import Session
from tests.tensorrt.bench import CONTEXT, draw, equal

pytestmark = pytest.mark.usefixtures("one_thread")
PRODUCTS = ["tensorrt_10", "tensorrt_rtx_1"]
NO_PROCESSOR: Any = None  # prompts are encoded already


class Gate:
    """A backend's `forward` that waits, once it has the GPU's results queued up to it, until it is let go on."""

    def __init__(self, backend: Any) -> None:
        self.entered, self.go = threading.Event(), threading.Event()
        self.real, backend.forward = backend.forward, self

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        self.entered.set()
        assert self.go.wait(60)
        return self.real(*arguments, **named)


@pytest.mark.parametrize("product", PRODUCTS)
def test_a_step_in_flight_ends_before_a_session_that_another_thread_closes(bench, product):
    one = bench(product)
    backend = one.open()
    session = Session(backend, NO_PROCESSOR, CONTEXT, 1)
    ids = draw(1, 9)[0]
    expected = session.logits(ids).logits[0, -1]
    state = session.prefill(Prompt(ids[:-1]))
    gate, got = Gate(backend), []
    stepper = threading.Thread(target=lambda: got.append(session.decode(state, int(ids[-1]))))
    closer = threading.Thread(target=session.close)
    stepper.start()
    assert gate.entered.wait(60)
    closer.start()
    assert one.cuda.held["memory"] > 0
    closer.join(0.2)
    assert closer.is_alive()  # it waits for the step
    assert one.cuda.held["memory"] > 0
    gate.go.set()
    stepper.join(60)
    closer.join(60)
    equal(got[0], expected)
    assert one.cuda.held == {"memory": 0, "pinned": 0, "handles": 0}
    with pytest.raises(ArrieroError, match="the session is closed"):
        session.decode(state, 5)


@pytest.mark.parametrize("use", ["snapshot", "restore"])
def test_a_cache_of_a_closed_session_is_refused(bench, use):
    one = bench("tensorrt_10")
    session = Session(one.open(), NO_PROCESSOR, CONTEXT, 1)
    cache = session.prefill(Prompt(draw(1, 9)[0])).cache
    snapshot = cache.snapshot(0)
    session.close()
    calls = {
        "snapshot": lambda: cache.snapshot(0),
        "restore": lambda: cache.restore(0, snapshot),
    }
    with pytest.raises(ArrieroError, match="the session is closed"):
        calls[use]()


def test_the_stand_in_faults_where_memory_is_used_after_it_was_given_back(bench):
    """Else the tests above would prove nothing: without the engine between them, the step meets what is gone."""
    one = bench("tensorrt_10")
    backend = one.open()
    memory = backend.device.pinned(16)
    numbers = memory.array((4,), np.float32)
    numbers[:] = 1
    where = backend.device.memory(16).address
    backend.close()
    assert np.isnan(numbers).all()
    with pytest.raises(AssertionError, match="not memory of the GPU, or freed"):
        one.cuda.view(where, 16)


def test_a_vision_engine_of_another_build_joins_no_open_backend(bench):
    one = bench("tensorrt_10")
    backend = one.open()
    (one.folder / "vision.engine").write_bytes((one.folder / "vision.engine").read_bytes() + b" ")
    with pytest.raises(ArrieroError, match=r"changed or replaced while it was open: vision\.engine"):
        backend.vision(np.zeros((1, 3, 32, 32), np.float32))
