"""One engine of a bundle: its plan, its weights, and as many execution contexts as threads use at once."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arriero.errors import ArrieroError
from arriero.runtimes.nvidia.cuda import Device
from arriero.runtimes.nvidia.device_cache import NO_CACHE, CacheBindings
from arriero.runtimes.nvidia.engine_context import Context
from arriero.runtimes.nvidia.engine_signature import REBUILD, TYPES, Signature
from arriero.runtimes.nvidia.products import Product, listen

DECODE = "decode"  # the profile whose steps become CUDA graphs


class Engine:
    """The plan `<part>.engine` of a bundle on a GPU; several threads may run it at once, each in its own context."""

    def __init__(self, bundle: Path, part: str, product: Product, trt: Any, device: Device) -> None:
        """Load `part` with the module `trt`. Raises ArrieroError with what TensorRT says against the plan."""
        self.signature = Signature.read(bundle / f"{part}.json")
        self._path = bundle / f"{part}.engine"
        self._product, self._trt, self._device = product, trt, device
        self._lock = threading.Lock()
        self._idle: list[tuple[int, Context]] = []
        self._last: tuple[Any, int] = (None, 0)
        self._logger = listen(trt)
        self._logger.errors.clear()
        if not self._path.is_file():
            raise ArrieroError("the engine is missing from the bundle", where=str(self._path), remedy=REBUILD)
        runtime = trt.Runtime(self._logger)
        # mapped, so that a large plan is not held by the host beside the GPU; empty files cannot be mapped
        plan = np.memmap(self._path, np.uint8, "r") if self._path.stat().st_size else np.zeros(0, np.uint8)
        self._engine = runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise self._refused("the plan")
        self._runtime = runtime  # TensorRT wants it to outlive the engine
        self._check_signature()
        if (most := self.signature.weights_on_gpu) is not None:
            # the other weights are streamed from the host, as are those that TensorRT finds no room for now
            automatic = self._engine.get_weight_streaming_automatic_budget()
            self._engine.weight_streaming_budget_v2 = min(most, automatic)
        self._config = product.configure(trt, self._engine, self._path)

    def run(
        self,
        feeds: Mapping[str, NDArray[Any]],
        outputs: tuple[str, ...],
        bindings: CacheBindings = NO_CACHE,
        record: bool = True,
    ) -> dict[str, NDArray[Any]]:
        """Run one step and give `outputs` by name; what `bindings` names lies on the GPU.

        A step whose shapes no profile takes is refused. A decode step that comes again unchanged becomes a CUDA graph,
        unless `record` is false.
        """
        number = self._choose(feeds, bindings)
        context = self._borrow(number, bindings)
        record = record and self.signature.profiles[number].name == DECODE
        try:
            results = context.run(feeds, bindings, outputs, record)
        except BaseException:
            context.close()  # nobody knows what state it is in
            raise
        with self._lock:
            self._idle.append((number, context))
        return results

    def _choose(self, feeds: Mapping[str, NDArray[Any]], bindings: CacheBindings) -> int:
        """The profile for a step; a step like the last one takes the same."""
        step = (bindings, *(array.shape for array in feeds.values()))
        last, number = self._last
        if step != last:
            shapes = {name: array.shape for name, array in feeds.items()}
            number = self.signature.choose(shapes | {name: shape for name, (_, shape) in bindings.inputs.items()})
            self._last = step, number
        return number

    def _borrow(self, number: int, bindings: CacheBindings) -> Context:
        """An idle context of profile `number`, best one that ran over the same cache; else a new one."""
        with self._lock:
            idle = [entry for entry in self._idle if entry[0] == number]
            if idle:
                chosen = next((entry for entry in idle if entry[1].bound_to(bindings)), idle[-1])
                self._idle.remove(chosen)
                return chosen[1]
            made = self._product.new_context(self._trt, self._engine, self._config)
        if made is None:
            raise self._refused("one more execution context: the GPU may be full")
        stream = self._device.stream()
        try:
            return Context(made, self.signature, number, stream, self._product.capturable, self._refused)
        except BaseException:
            stream.close()
            raise

    def _check_signature(self) -> None:
        """Refuse a plan whose inputs and outputs are not those of `<part>.json`."""
        modes = self._trt.TensorIOMode
        names = [self._engine.get_tensor_name(number) for number in range(self._engine.num_io_tensors)]
        in_plan = {
            kind: {name for name in names if self._engine.get_tensor_mode(name) == mode}
            for kind, mode in (("inputs", modes.INPUT), ("outputs", modes.OUTPUT))
        }
        for kind, described in (("inputs", self.signature.inputs), ("outputs", self.signature.outputs)):
            if odd := sorted(in_plan[kind] ^ described.keys()):
                raise self._mixed(f"{kind} differ ({', '.join(odd[:4])})")
            for name, tensor in described.items():
                dtype = self._engine.get_tensor_dtype(name)
                if dtype != getattr(self._trt.DataType, TYPES[tensor.dtype][0]):
                    raise self._mixed(f"{name} is {dtype.name}, not {tensor.dtype}")
        if self._engine.num_optimization_profiles != len(self.signature.profiles):
            raise self._mixed(f"the plan has {self._engine.num_optimization_profiles} profiles")

    def _mixed(self, what: str) -> ArrieroError:
        remedy = f"The bundle mixes files of two builds. {REBUILD}"
        return ArrieroError(
            f"the plan does not fit {self._path.stem}.json: {what}", where=str(self._path), remedy=remedy
        )

    def _refused(self, what: str) -> ArrieroError:
        """The error for what TensorRT did not take, with its own last words."""
        # the first error is the reason, the later ones follow from it
        said = f": {self._logger.errors[0]}" if self._logger.errors else ""
        self._logger.errors.clear()
        version = getattr(self._trt, "__version__", "")
        what = f"{self._product.title} {version} does not take {what}{said}"
        return ArrieroError(what, where=str(self._path), remedy=REBUILD)

    def close(self) -> None:
        """Give back contexts, engine and runtime."""
        with self._lock:
            for _, context in self._idle:
                context.close()
            self._idle.clear()
        if self._engine is not None:
            self._product.put_away(self._config, self._path)
        self._config = None
        self._engine = None
        self._runtime = None
