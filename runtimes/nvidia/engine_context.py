"""One execution context of an engine: memory for inputs and outputs, a stream, and a CUDA graph of the last step.

A step copies its inputs into pinned memory, queues copy, execution and copy back on the stream, and waits. When the
same step (shapes and addresses) comes a second time, it is recorded as a graph, and from then on one launch does it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arriero.errors import ArrieroError
from arriero.runtimes.nvidia.cuda import Graph, Memory, Pinned, Stream
from arriero.runtimes.nvidia.device_cache import CacheBindings
from arriero.runtimes.nvidia.engine_signature import Shape, Signature, Tensor

Capturable = Callable[[Any, int], bool]  # of a TensorRT context and a stream
Refused = Callable[[str], ArrieroError]


class Context:
    """One context with one profile; one thread at a time may use it."""

    def __init__(
        self, made: Any, signature: Signature, profile: int, stream: Stream, capturable: Capturable, refused: Refused
    ) -> None:
        """Use the TensorRT context `made` with profile number `profile`.

        `capturable` tells whether its next step can be recorded, `refused` makes an error of what TensorRT did not
        take. Raises ArrieroError when that is the profile.
        """
        self._made, self._signature, self._stream = made, signature, stream
        self._device = stream.device
        self._capturable, self._refused = capturable, refused
        self._shapes: dict[str, Shape] = {}
        self._output_shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._memory: dict[str, Memory] = {}
        self._pinned: dict[str, Pinned] = {}
        self._asked: Any = None  # the last step, for which what follows is set
        self._bindings: CacheBindings | None = None
        self._step: Any = None
        self._results: dict[str, Shape] = {}
        self._last: Any = None  # the step that ran last
        self._recorded: tuple[Any, Graph] | None = None
        self.graphs_refused: str | None = None
        if not made.set_optimization_profile_async(profile, int(stream)):
            raise self._refused(f"profile {profile}")
        stream.wait()

    def bound_to(self, bindings: CacheBindings) -> bool:
        """Whether the last step used just these bindings: then its graph may serve again."""
        return self._bindings is bindings or all(
            self._addresses.get(name) == address for name, (address, _) in bindings.inputs.items()
        )

    def run(
        self, feeds: Mapping[str, NDArray[Any]], bindings: CacheBindings, requested: tuple[str, ...], record: bool
    ) -> dict[str, NDArray[Any]]:
        """Run one step and give the outputs `requested`.

        `feeds` are the inputs from the host; what `bindings` names lies on the GPU. With `record` a step that comes
        again becomes a graph.
        """
        inputs, outputs = self._signature.inputs, self._signature.outputs
        arrays = {name: np.ascontiguousarray(array, inputs[name].numpy) for name, array in feeds.items()}
        asked = (bindings, requested, *(array.shape for array in arrays.values()))
        if asked != self._asked:
            # a step that is asked for as the last one was needs none of this, and there are hundreds of names in it
            self._asked = None
            self._step, self._results = self._bind(arrays, bindings, requested)
            self._asked, self._bindings = asked, bindings
        for name, array in arrays.items():
            self._pinned[name].array(array.shape, array.dtype)[...] = array
        self._do(self._step, arrays, self._results, record)
        self._last = self._step
        self._stream.wait()
        return {
            name: outputs[name].read(self._pinned[name].array(shape, outputs[name].numpy))
            for name, shape in self._results.items()
        }

    def _bind(
        self, arrays: Mapping[str, NDArray[Any]], bindings: CacheBindings, requested: tuple[str, ...]
    ) -> tuple[Any, dict[str, Shape]]:
        """Set every shape and address of a step; gives its key among other steps, and the shapes of `requested`."""
        for name, array in arrays.items():
            self._set_shape(name, array.shape)
        for name, (_, shape) in bindings.inputs.items():
            self._set_shape(name, shape)
        outputs = self._signature.outputs
        results = {name: self._output_shape(outputs[name]) for name in requested}
        self._bind_addresses(arrays, bindings, requested)
        for name, array in arrays.items():
            self._pin(name, array.nbytes)
        for name, shape in results.items():
            self._pin(name, outputs[name].nbytes(shape))
        pinned = tuple((name, self._pinned[name].address) for name in (*arrays, *results))
        return (tuple(self._shapes.items()), tuple(self._addresses.items()), pinned, requested), results

    def _do(self, step: Any, arrays: Mapping[str, NDArray[Any]], results: Mapping[str, Shape], record: bool) -> None:
        def queue() -> None:
            for name, array in arrays.items():
                self._stream.to_device(self._addresses[name], self._pinned[name], array.nbytes)
            if not self._made.execute_async_v3(int(self._stream)):
                raise self._refused("the step")
            for name, shape in results.items():
                nbytes = self._signature.outputs[name].nbytes(shape)
                self._stream.to_host(self._pinned[name], self._addresses[name], nbytes)

        if self._recorded is not None:
            known, graph = self._recorded
            if known == step:
                graph.launch(self._stream)
                return
            # the context is set to other shapes or addresses now: what was recorded holds no longer
            graph.close()
            self._recorded = None
        # TensorRT wants one execution with the shapes of a step before it is recorded
        if record and step == self._last and self.graphs_refused is None:
            graph_made = self._record(queue)
            if graph_made is not None:
                self._recorded = (step, graph_made)
                graph_made.launch(self._stream)
                return
        queue()

    def _record(self, queue: Callable[[], None]) -> Graph | None:
        if not self._capturable(self._made, int(self._stream)):
            return None  # not yet: kernels for these shapes may still be on their way
        try:
            return self._stream.capture(queue)
        except ArrieroError as error:
            self.graphs_refused = str(error)
            # steps stay right without graphs, only slower to start: say so once, and go on
            warnings.warn(f"decoding runs without CUDA graphs: {error}", RuntimeWarning, stacklevel=2)
            return None

    def _set_shape(self, name: str, shape: Shape) -> None:
        if self._shapes.get(name) != shape:
            if not self._made.set_input_shape(name, shape):
                raise self._refused(f"{list(shape)} as shape of {name}")
            self._shapes[name] = shape
            self._output_shapes.clear()

    def _output_shape(self, tensor: Tensor) -> Shape:
        if tensor.name not in self._output_shapes:
            shape = tuple(int(size) for size in self._made.get_tensor_shape(tensor.name))
            if any(size < 0 for size in shape):
                raise self._refused(f"the inputs' shapes: {tensor.name} would be {list(shape)}")
            self._output_shapes[tensor.name] = shape
        return self._output_shapes[tensor.name]

    def _bind_addresses(
        self, arrays: Mapping[str, NDArray[Any]], bindings: CacheBindings, requested: tuple[str, ...]
    ) -> None:
        """Give every input and output its address."""
        addresses = {name: address for name, (address, _) in bindings.inputs.items()} | bindings.outputs
        for name, array in arrays.items():
            addresses[name] = self._room(name, array.nbytes)
        rooms: dict[str, str] = {}
        sizes: dict[str, int] = {}
        seen: dict[str, int] = {}
        for name, tensor in self._signature.outputs.items():
            if name in bindings.outputs:
                continue
            rooms[name] = name
            if name not in requested:
                # TensorRT wants an address for captures that nobody asked for. Two buffers in turn are enough for all
                # layers: whatever reads layer i's has been read before layer i + 1's is complete, which i + 2 needs.
                kind = name.partition(".")[0]
                seen[kind] = seen.get(kind, 0) + 1
                rooms[name] = f"{kind}.unread{seen[kind] % 2}"
            nbytes = tensor.nbytes(self._output_shape(tensor))
            sizes[rooms[name]] = max(sizes.get(rooms[name], 0), nbytes)
        addresses |= {name: self._room(room, sizes[room]) for name, room in rooms.items()}
        for name, address in addresses.items():
            if self._addresses.get(name) != address:
                if not self._made.set_tensor_address(name, address):
                    raise self._refused(f"an address for {name}")
                self._addresses[name] = address

    def _room(self, name: str, nbytes: int) -> int:
        held = self._memory.get(name)
        if held is None or held.nbytes < nbytes:
            if held is not None:
                held.free()
            self._memory[name] = self._device.memory(nbytes)
        return self._memory[name].address

    def _pin(self, name: str, nbytes: int) -> None:
        held = self._pinned.get(name)
        if held is None or held.nbytes < nbytes:
            if held is not None:
                held.free()
            self._pinned[name] = self._device.pinned(nbytes)

    def close(self) -> None:
        """Give back the graph, the memory and the stream, once what may still be queued is done."""
        self._stream.settle()
        if self._recorded is not None:
            self._recorded[1].close()
            self._recorded = None
        for memory in (*self._memory.values(), *self._pinned.values()):
            memory.free()
        self._made = None
        self._stream.close()
