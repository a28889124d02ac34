"""The thread that owns a session's backend: order, errors, closing, interruption, forks, and the end of a process."""

from __future__ import annotations

import contextvars
import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from arriero.errors import ArrieroError
from arriero.runtimes.engine import Engine
from arriero.runtimes.session import Session
from tests.runtimes.conftest import ToyBackend


class Strict(ToyBackend):
    """The toy, which notes every thread that calls it and faults when it is called after it was closed."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: set[int] = set()
        self.closed = False
        self.slow = 0.0

    def new_cache(self, batch, capacity):
        self._enter()
        return super().new_cache(batch, capacity)

    def forward(self, *arguments, **named):
        self._enter()
        time.sleep(self.slow)
        out = super().forward(*arguments, **named)
        self._enter()
        return out

    def close(self):
        self._enter()
        self.closed = True

    def _enter(self):
        assert not self.closed, "a step runs on a closed backend"
        self.threads.add(threading.get_ident())


@pytest.fixture
def strict():
    return Strict()


@pytest.fixture
def session(strict, processor):
    return Session(strict, processor, context=64, batch=3)


def owners():
    return [thread for thread in threading.enumerate() if thread.name == "arriero-engine"]


def test_all_steps_of_all_callers_run_on_one_thread_that_closing_ends(session, strict):
    before = len(owners()) - 1
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda text: session.generate(text, max_tokens=5), "abcdefgh"))
    session.generate_batch(["a", "b"], max_tokens=4)
    list(session.generate("x", stream=True, max_tokens=4))
    session.logits(np.arange(5))
    session.close()
    assert len(strict.threads) == 1
    assert threading.get_ident() not in strict.threads
    assert len(owners()) == before


def test_a_dropped_session_takes_its_thread_along(strict, processor):
    before = set(owners())
    session = Session(strict, processor, context=64)
    session.generate("hello", max_tokens=2)
    (owner,) = set(owners()) - before
    gone = weakref.ref(session.engine)
    del session
    gc.collect()
    owner.join(30)
    assert not owner.is_alive()
    assert gone() is None


def test_an_error_in_a_step_reaches_its_caller_and_harms_no_other(session, strict):
    real = strict.forward
    strict.forward = lambda *arguments, **named: 1 // 0
    with pytest.raises(ZeroDivisionError):
        session.generate("hello", max_tokens=2)
    strict.forward = real
    assert len(session.generate("hello", max_tokens=2).token_ids) == 2


def test_nothing_of_a_failed_step_is_kept(session, strict):
    """An error holds the frames that it went through, and they held the error."""
    kept = []

    def failing(*arguments, **named):
        kept.append(weakref.ref(arguments[2]))
        raise ArrieroError("no")

    strict.forward = failing
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(ArrieroError, match="no"):
            session.generate("hello", max_tokens=2)
        assert kept[0]() is None
    finally:
        gc.enable()


def test_a_session_closed_by_another_thread_ends_what_is_on_its_way_with_a_clear_error(session, strict):
    """The step in flight is waited for; `Strict` would fault if one ran afterwards."""
    strict.slow = 0.02
    outcomes = []

    def call(number):
        try:
            for _ in range(50):
                session.generate(f"prompt {number}", max_tokens=30)
        except BaseException as error:
            outcomes.append(error)

    callers = [threading.Thread(target=call, args=(number,)) for number in range(5)]
    for caller in callers:
        caller.start()
    time.sleep(0.2)
    closers = [threading.Thread(target=session.close) for _ in range(2)]
    for thread in closers:
        thread.start()
    for thread in (*closers, *callers):
        thread.join(60)
        assert not thread.is_alive()
    assert strict.closed
    assert [type(error) for error in outcomes] == [ArrieroError] * 5
    assert all("the session is closed" in str(error) for error in outcomes)


def test_a_stream_that_is_abandoned_half_way_holds_nobody_up(session):
    stream = session.generate("hello", stream=True, max_tokens=40)
    next(stream)
    assert len(session.generate("x", max_tokens=3).token_ids) == 3
    del stream
    session.close()


def test_context_variables_of_the_caller_hold_on_the_thread(strict):
    variable = contextvars.ContextVar("variable", default=0)
    engine = Engine(strict)
    variable.set(5)
    assert engine.run(lambda _: variable.get()) == 5
    engine.close()


def test_a_caller_on_the_owning_thread_is_served_at_once(strict):
    """A finaliser, which Python may run on any thread, would else wait for itself."""
    engine = Engine(strict)
    assert engine.run(lambda _: engine.run(lambda backend: backend.spec)) is strict.spec
    engine.run(lambda _: engine.close())
    assert strict.closed
    with pytest.raises(ArrieroError, match="the session is closed"):
        engine.run(lambda _: None)


def run(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A script in a process of its own; one that waits for ever is killed, and no machine is so busy as to need it."""
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600)


SLOW = """
import os, signal, sys, threading, time
import numpy as np
import atexit
session_of = []
atexit.register(lambda: [session.close() for session in session_of])  # runs after all that is registered later
sys.path.insert(0, {root!r})
from tests.runtimes.test_engine import Strict
from arriero.runtimes.session import Session
backend = Strict()
backend.slow = {slow}
session = Session(backend, None, context=4096)
ids = np.arange(40)
"""


def slow(seconds: float) -> str:
    return SLOW.format(root=str(Path(__file__).resolve().parents[2]), slow=seconds)


@pytest.mark.parametrize(
    "ending",
    [
        "",  # never closed
        "threading.Thread(target=session.logits, args=(ids,), daemon=True).start(); time.sleep(0.05)",
        "threading.Thread(target=lambda: [session.logits(ids) for _ in range(9)] and print('done')).start()",
        "sys.exit(0)",
        "1 / 0",
        "atexit.register(session.close)",
        "session_of.append(session)",
    ],
    ids=[
        "idle",
        "daemon caller in flight",
        "caller outlives the main thread",
        "exit",
        "error",
        "closed first",
        "closed last",
    ],
)
def test_a_process_ends_by_itself_whatever_its_session_does(ending):
    done = run(f"{slow(0.05)}\nsession.logits(ids)\n{ending}")
    assert done.returncode == ("1 / 0" in ending), done.stderr
    assert ("done" in done.stdout) == ("done" in ending)
    assert "Fatal" not in done.stderr


def test_a_caller_that_is_interrupted_leaves_at_once_and_the_session_stays_sound():
    done = run(
        f"""{slow(1.0)}
threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
signal.signal(signal.SIGINT, signal.default_int_handler)
started = time.monotonic()
try:
    for _ in range(100):
        session.logits(ids)
except KeyboardInterrupt:
    print("interrupted", time.monotonic() - started < 60)
backend.slow = 0
print(session.logits(ids).logits.shape)
session.close()
print(backend.closed)
"""
    )
    assert done.stdout.splitlines() == ["interrupted True", "(1, 40, 266)", "True"], done.stderr


FORKED = """
import os, sys, arriero
bundle = sys.argv[1]
session = arriero.load(bundle, threads=2)
alone = session.generate("Hello", max_tokens=3).token_ids
child = os.fork()
if child == 0:
    try:
        session.generate("Hello", max_tokens=3)
    except arriero.ArrieroError as error:
        print(error, flush=True)
    session.close()
    with arriero.load(bundle, threads=2) as own:
        print(own.generate("Hello", max_tokens=3).token_ids == alone, flush=True)
    sys.exit(7)  # by way of every destructor
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(session.generate("Hello", max_tokens=3).token_ids == alone)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system that forks")
@pytest.mark.parametrize("backend", ["onnxruntime", "tvm"])
def test_a_forked_child_is_refused_its_parents_session_has_its_own_and_ends(request, backend):
    workshop = request.getfixturevalue("workshop" if backend == "onnxruntime" else "tvm_workshop")
    done = run(FORKED, workshop / "bundles" / "int8")
    told, *rest = done.stdout.splitlines()
    assert "opened before this process was forked" in told, done.stderr
    assert rest == ["True", "7", "True"], done.stderr
