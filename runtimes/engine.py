"""The one thread that owns a session's backend: whatever steps its graphs or touches its caches runs there, in turn.

Callers hand over requests, which a `Scheduler` answers together, or one step at a time to wait for; the scheduler's
turns and those steps alternate. Any number of callers share a session, whatever threads they come from, and none leaves
anything behind: TVM keeps a pool of workers for each thread that ever ran a graph. Closing runs on the same thread,
after the step in flight, so that no step meets a backend that is going away.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from contextvars import Context, copy_context
from ctypes import py_object, pythonapi
from dataclasses import replace
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

from arriero.errors import ArrieroError
from arriero.runtimes.backend import Backend
from arriero.runtimes.draft_model import DraftModel
from arriero.runtimes.request import Request
from arriero.runtimes.scheduler import EngineLimits, Scheduler, Stats

Result = TypeVar("Result")
LINGER_S = 10.0  # how long closing waits at most for the system to end a thread that is done
NO_LIMITS = EngineLimits()
Task = tuple["Future[Any]", Context, Callable[[], Any]]


class Engine:
    """A backend, the thread that owns it, and the requests that are answered there."""

    def __init__(self, backend: Backend, limits: EngineLimits = NO_LIMITS, draft: Backend | None = None) -> None:
        """Start the thread; it ends with `close`, or when nobody holds the engine any more.

        The thread owns `draft` too, a smaller model of the same tokens, which drafts what `limits` let it.
        """
        self._backend: Backend | None = backend
        self._draft = None if draft is None else DraftModel(draft, backend.spec, limits.rows, limits.context)
        self._scheduler = Scheduler(backend.spec, limits, self._draft)
        self._closing = threading.Lock()
        self._process = os.getpid()
        self._owner = _Owner()
        # without a reference to the engine on its side, the thread keeps no session alive that an app has dropped
        weakref.finalize(self, self._owner.tasks.put, None).atexit = False
        _engines.add(self)
        self._owner.start()

    @property
    def backend(self) -> Backend:
        """What the thread owns; `ArrieroError` once it is closed, and in a process that was forked since."""
        self._check_process()
        if self._backend is None:
            raise _closed()
        return self._backend

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise ArrieroError(
                "the session was opened before this process was forked",
                expected="a session of this process: the threads that run its steps stayed behind",
                remedy="Load bundles after the fork only, or start the process by spawn",
            )

    @property
    def stats(self) -> Stats:
        """What was done and what waits, as it stands."""
        return replace(self._scheduler.stats)

    def submit(self, request: Request) -> None:
        """Have `request` answered, together with those that came before and come after; its outbox has the rest."""
        _ = self.backend
        self._owner.submit(partial(self._admit, request))

    def check_waiting(self) -> None:
        """Refuse to wait for an outbox where nothing can come: in a forked process, and on the owning thread itself."""
        self._check_process()
        if threading.current_thread() is self._owner:
            raise ArrieroError(
                "an answer is waited for on the engine's own thread",
                expected="a thread of the app: this one has to compute the answer",
                remedy="Call the session outside of functions that it calls itself, such as logits_processor",
            )

    def _admit(self, request: Request) -> None:
        idle = self._scheduler.idle
        self._scheduler.add(request)
        if idle:
            self._owner.submit(self._turn)

    def _turn(self) -> None:
        """The scheduler's next steps, and its turn after whatever was asked meanwhile."""
        if self._backend is None:
            return  # `_end` has told everybody
        try:
            self._scheduler.turn(self._backend)
        except BaseException as error:  # of no one request: nobody may wait for ever
            self._scheduler.fail(error)
        if not self._scheduler.idle:
            try:
                self._owner.submit(self._turn)
            except ArrieroError as closed:
                self._scheduler.fail(closed)

    def run(self, work: Callable[[Backend], Result]) -> Result:
        """Give what `work` gives on the owning thread, after what was asked before; raises what it raises.

        The caller's context variables hold there too. A caller that is interrupted leaves at once: what it asked for
        is done without it where it has begun, else dropped.
        """
        backend = self.backend

        def step() -> Result:
            return work(self.backend)  # closed meanwhile: refused, not run

        if threading.current_thread() is self._owner:  # a finaliser that Python runs there: nobody else would
            return work(backend)
        future = self._owner.submit(step)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise
        finally:
            del future  # an error that it holds would hold it in turn, and with it the step's arrays

    def close(self) -> None:
        """Free the backend once the step in flight is done, and end the thread; later steps are refused."""
        if self._process != os.getpid():
            return  # the parent's, and so is what it holds
        with self._closing:
            backend, self._backend = self._backend, None
        if backend is None:
            return
        if threading.current_thread() is self._owner or not self._owner.is_alive():
            self._end(backend)
            return
        closing = self._owner.submit(partial(self._end, backend))
        self._owner.stop()
        closing.result()

    def _end(self, backend: Backend) -> None:
        self._scheduler.fail(_closed())
        backend.close()
        if self._draft is not None:
            self._draft.close()


class _Owner(threading.Thread):
    """A thread that does what is put into its queue, until it finds None there."""

    def __init__(self) -> None:
        super().__init__(name="arriero-engine", daemon=True)  # waiting for steps must not keep a process alive
        self.tasks: SimpleQueue[Task | None] = SimpleQueue()
        self._stopped = False
        self._lock = threading.Lock()

    def submit(self, work: Callable[[], Result]) -> Future[Result]:
        """Queue `work` with the caller's context; `ArrieroError` once the thread was stopped."""
        future: Future[Result] = Future()
        with self._lock:
            if self._stopped:
                raise _closed()
            self.tasks.put((future, copy_context(), work))
        return future

    def stop(self) -> None:
        """End the thread after what is queued, and wait for that."""
        with self._lock:
            self._stopped = True
        self.tasks.put(None)
        self.join()
        # For Python it is over; the system's thread still waits for the workers that its backend gave it.
        end = time.monotonic() + LINGER_S
        while os.path.exists(f"/proc/self/task/{self.native_id}") and time.monotonic() < end:
            time.sleep(0.001)

    def run(self) -> None:
        while (task := self.tasks.get()) is not None:
            _do(*task)
            del task  # nothing of a step outlives it here


def _closed() -> ArrieroError:
    return ArrieroError("the session is closed", remedy="Load the bundle again")


def _do(future: Future[Any], context: Context, work: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(context.run(work))
    except BaseException as error:
        future.set_exception(error)
    finally:
        del future, context, work  # the error's traceback holds this frame


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _finish() -> None:
    """Let no step run on while the process is taken down around it."""
    for engine in list(_engines):
        if engine._process == os.getpid():
            engine._owner.stop()


def _keep_inherited() -> None:
    """In a forked process, never destroy what the parent's threads still run: it would wait for threads it lacks."""
    for engine in list(_engines):
        if engine._backend is not None:
            pythonapi.Py_IncRef(py_object(engine._backend))
            pythonapi.Py_IncRef(py_object(engine._draft))


atexit.register(_finish)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_keep_inherited)
