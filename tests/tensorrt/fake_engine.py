"""Engines for the recorded TensorRT modules that compute with the PyTorch reference, from the memory that is bound.

A "plan" names a part of a checkpoint. Its execution reads inputs and caches from the addresses that were set, in the
layout that `<part>.json` promises, runs the reference, and writes outputs and new keys and values there: so a wrong
address, shape, slot, order or leftover shows in the results. What TensorRT leaves undefined is a fault.

Legend: B batch, S new tokens, K key/value heads, C slots of a buffer, D head dimension, H hidden, L logits wanted.
"""

from __future__ import annotations

import itertools
import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from arriero.graphs.model import Llama4
from arriero.runtimes import tensorrt, tensorrt_rtx
from arriero.runtimes.nvidia import products
from arriero.runtimes.nvidia.engine_signature import TYPES
from tests.tensorrt.fake_cuda import FakeCuda
from tests.tensorrt.recorder import Recorder

WORDS = {"FLOAT": torch.float32, "FLOAT16": torch.float16, "BFLOAT16": torch.bfloat16}


def signature(
    model: Llama4, part: str, batch: int, context: int, cache: str = "FLOAT", fixed: bool = False, tokens: int = 64
) -> dict[str, Any]:
    """The `<part>.json` of an engine for at most `batch` rows, `context` slots and `tokens` tokens of one row.

    `fixed`: the cache's buffers have all their slots from the start.
    """
    text, vision = model.config.text, model.config.vision
    hidden, layers = text.hidden_size, text.layers
    if part == "vision":
        assert vision is not None
        side = (vision.channels, vision.image_size, vision.image_size)
        inputs = [tensor("pixel_values", "FLOAT", ["tiles", *side])]
        outputs = [tensor("image_features", "FLOAT", ["features", hidden])]
        ranges = {"pixel_values": [[1, *side], [1, *side], [3, *side]]}
        return {"inputs": inputs, "outputs": outputs, "profiles": [{"name": "tiles", "ranges": ranges}]}
    if part == "embed":
        inputs = [tensor("input_ids", "INT64", ["batch", "seq"])]
        ranges = {"input_ids": [[1, 1], [1, 1], [batch, tokens]]}
        if not model.config.text_only:
            inputs.append(tensor("image_features", "FLOAT", ["features", hidden]))
            ranges["image_features"] = [[0, hidden], [0, hidden], [tokens, hidden]]
        outputs = [tensor("inputs_embeds", "FLOAT", ["batch", "seq", hidden])]
        return {"inputs": inputs, "outputs": outputs, "profiles": [{"name": "prefill", "ranges": ranges}]}
    inputs = [
        tensor("inputs_embeds", "FLOAT", ["batch", "seq", hidden]),
        tensor("positions", "INT64", ["batch", "seq"]),
        tensor("logits_index", "INT64", ["wanted"]),
    ]
    outputs = [tensor("logits", "FLOAT", ["batch", "wanted", text.vocab_size])]
    most = {"chunk_capacity": min(text.chunk, context), "global_capacity": context}
    for number, layer in enumerate(layers):
        capacity: int | str = "chunk_capacity" if layer.chunked else "global_capacity"
        if fixed:
            capacity = most[str(capacity)]
        for kind in ("key", "value"):
            shape = ["batch", text.kv_heads, capacity, text.head_dim]
            inputs.append(tensor(f"past_{kind}.{number}", cache, shape))
            outputs.append(tensor(f"present_{kind}.{number}", cache, shape))
        outputs.append(tensor(f"hidden.{number}", "FLOAT", ["batch", "seq", hidden]))
        if layer.moe:
            outputs.append(tensor(f"expert_id.{number}", "INT64", ["tokens", text.experts_per_token]))
    profiles = []
    for name, rows, steps in (("decode", batch, 1), ("prefill", 1, tokens)):
        ends = [{"batch": 1, "seq": 1, "wanted": 1}, {"batch": rows, "seq": steps, "wanted": steps} | most]
        ends[0] |= dict.fromkeys(most, 1)
        ranges = {
            one["name"]: [
                [size if isinstance(size, int) else end[size] for size in one["shape"]]
                for end in (ends[0], ends[1], ends[1])
            ]
            for one in inputs
        }
        profiles.append({"name": name, "ranges": ranges})
    return {"inputs": inputs, "outputs": outputs, "profiles": profiles}


def tensor(name: str, dtype: str, shape: list[int | str]) -> dict[str, Any]:
    """One entry of a signature."""
    return {"name": name, "dtype": dtype, "shape": shape}


def write_engine(folder: Path, part: str, described: dict[str, Any]) -> None:
    """Write a plan and its signature into a bundle's folder."""
    (folder / f"{part}.json").write_text(json.dumps(described))
    (folder / f"{part}.engine").write_bytes(json.dumps({"part": part, **described}).encode())


class FakeTensorRt:
    """The module of one recorded version (`module`), whose engines compute with `model` on the GPU `cuda`."""

    def __init__(self, product: str, cuda: FakeCuda, model: Llama4) -> None:
        self.recorder = Recorder(product)
        self.module = self.recorder.module
        self.cuda, self.model = cuda, model
        self.capturable = True
        self.fitting = True  # kept kernels are of this GPU
        self.capture_works = True
        self.while_capturing: Callable[[], object] = lambda: None
        self.executions = 0
        self.streamable = 0
        answer = self.recorder.answer
        answer("Runtime.deserialize_cuda_engine", self._deserialize)
        answer("ICudaEngine.num_io_tensors", lambda engine: len(engine.__dict__["plan"].tensors))
        answer("ICudaEngine.get_tensor_name", lambda engine, index: list(engine.__dict__["plan"].tensors)[index])
        answer("ICudaEngine.get_tensor_mode", self._mode)
        answer("ICudaEngine.get_tensor_dtype", self._dtype)
        answer("ICudaEngine.num_optimization_profiles", lambda engine: len(engine.__dict__["plan"].profiles))
        answer("ICudaEngine.get_weight_streaming_automatic_budget", lambda engine: self.streamable // 2)
        answer("ICudaEngine.create_execution_context", self._context)
        for name in ("set_optimization_profile_async", "set_input_shape", "get_tensor_shape", "set_tensor_address"):
            self._forward(name)
        self._forward("execute_async_v3")
        if "rtx" in product:
            answer("IExecutionContext.is_stream_capturable", lambda context, stream: self.capturable)
            answer("IRuntimeConfig.get_runtime_cache", lambda config: config.__dict__.get("cache"))
            answer("IRuntimeConfig.set_runtime_cache", self._share)
            answer("IRuntimeCache.serialize", self._kernels)
            answer("IRuntimeCache.deserialize", lambda cache, blob: self.fitting)

    def install(self, monkeypatch: pytest.MonkeyPatch, cache: Path) -> products.Product:
        """Let the backends find this module and its GPU, and keep kernels in `cache`; gives the product."""
        product = tensorrt_rtx.PRODUCT if "rtx" in self.recorder.title else tensorrt.PRODUCT
        monkeypatch.setenv("ARRIERO_CACHE", str(cache))
        monkeypatch.setattr(products, "import_module", dict.fromkeys(product.modules, self.module).__getitem__)
        for module in (products, tensorrt):
            monkeypatch.setattr(module, "load_cuda", lambda extra: self.cuda.runtime)
        return product

    def _forward(self, name: str) -> None:
        def call(context: Any, **arguments: Any) -> Any:
            return getattr(context.__dict__["state"], name)(**arguments)

        self.recorder.answer(f"IExecutionContext.{name}", call)

    def _deserialize(self, runtime: Any, serialized_engine: Any) -> Any:
        try:
            plan = json.loads(bytes(memoryview(serialized_engine)))
        except ValueError:
            logger = runtime.__dict__["_given"]["logger"]
            logger.log(
                self.module.ILogger.Severity.ERROR, "Serialization assertion magicTagRead == kPLAN_MAGIC failed.\n"
            )
            return None
        engine = self.recorder.make("ICudaEngine")
        engine.__dict__["plan"] = _Plan(plan)
        return engine

    def _mode(self, engine: Any, name: str) -> Any:
        modes = self.module.TensorIOMode
        return modes.INPUT if name in engine.__dict__["plan"].inputs else modes.OUTPUT

    def _dtype(self, engine: Any, name: str) -> Any:
        return getattr(self.module.DataType, TYPES[engine.__dict__["plan"].tensors[name]["dtype"]][0])

    def _context(self, engine: Any, strategy: Any = None, runtime_config: Any = None) -> Any:
        context = self.recorder.make("IExecutionContext")
        context.__dict__["state"] = _State(self, engine.__dict__["plan"])
        return context

    def _share(self, config: Any, cache: Any = None) -> bool:
        config.__dict__["cache"] = cache
        return True

    def _kernels(self, cache: Any) -> Any:
        memory = self.recorder.make("IHostMemory")
        memory.extend(b"kernels for this GPU")
        return memory


class _Plan:
    def __init__(self, raw: dict[str, Any]) -> None:
        self.part = raw["part"]
        self.inputs = {one["name"]: one for one in raw["inputs"]}
        self.outputs = {one["name"]: one for one in raw["outputs"]}
        self.tensors = self.inputs | self.outputs
        self.profiles = raw["profiles"]


class _State:
    """What TensorRT keeps in an execution context."""

    def __init__(self, owner: FakeTensorRt, plan: _Plan) -> None:
        self.owner, self.plan = owner, plan
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.ran: list[dict[str, tuple[int, ...]]] = []
        self.busy = threading.Lock()

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        self.profile = profile_index
        self.shapes.clear()
        return profile_index < len(self.plan.profiles)

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if self.profile is None or name not in self.plan.inputs:
            return False
        least, _, most = self.plan.profiles[self.profile]["ranges"][name]
        fits = len(shape) == len(least) and all(a <= n <= b for a, n, b in zip(least, shape, most, strict=True))
        if fits:
            self.shapes[name] = tuple(shape)
        return fits

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if name in self.shapes:
            return self.shapes[name]
        axes: dict[str, int] = {}
        for given, shape in self.shapes.items():
            pairs = zip(self.plan.inputs[given]["shape"], shape, strict=True)
            for axis, size in ((axis, size) for axis, size in pairs if isinstance(axis, str)):
                assert axes.setdefault(axis, size) == size, f"{axis} is {axes[axis]} and {size}"
        if "batch" in axes:
            axes["tokens"] = axes["batch"] * axes["seq"]
        if "tiles" in axes:
            vision = self.owner.model.config.vision
            assert vision is not None
            axes["features"] = axes["tiles"] * vision.tokens_per_tile
        return tuple(size if isinstance(size, int) else _size(size, axes) for size in self.plan.tensors[name]["shape"])

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return name in self.plan.tensors and memory != 0

    def execute_async_v3(self, stream_handle: int) -> bool:
        cuda = self.owner.cuda
        lacking = (self.plan.inputs.keys() - self.shapes.keys()) | (self.plan.tensors.keys() - self.addresses.keys())
        if lacking or stream_handle == 0:
            cuda.faults.append(f"executed without {sorted(lacking)} on stream {stream_handle}")
            return False
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        for name in self.plan.outputs:
            kind, _, number = name.partition(".")
            # a layer may read its neighbour's output where it lies, while it writes its own
            if number and addresses[name] == addresses.get(f"{kind}.{int(number) + 1}"):
                cuda.faults.append(f"{name} and the next layer's share memory")
        places = {name: (addresses[name], self.get_tensor_shape(name)) for name in self.plan.tensors}
        if cuda.is_capturing(stream_handle):
            if shapes not in self.ran:
                cuda.faults.append("captured before these shapes ran once")
            if not self.owner.capture_works:
                return False
            self.owner.while_capturing()
        self.ran.append(shapes)

        def work() -> None:
            if not self.busy.acquire(blocking=False):
                cuda.faults.append("one context runs twice at a time")
                return
            with torch.inference_mode():
                self.owner.executions += 1
                _Run(self.owner, self.plan, places).compute()
            self.busy.release()

        return cuda.enqueue(stream_handle, work)


def _size(told: str, axes: dict[str, int]) -> int:
    """A dynamic size, which may be a product such as `seq*batch`; -1 while it is not settled."""
    factors = [int(one) if one.strip().isdigit() else axes.get(one.strip(), -1) for one in told.split("*")]
    return -1 if -1 in factors else math.prod(factors)


class _Run:
    """One execution: the memory behind each input and output."""

    def __init__(self, owner: FakeTensorRt, plan: _Plan, places: dict[str, tuple[int, tuple[int, ...]]]) -> None:
        self.owner, self.plan, self.places = owner, plan, places

    def compute(self) -> None:
        model = self.owner.model
        if self.plan.part == "vision":
            self.write("image_features", model.image_features(self.read("pixel_values")))
        elif self.plan.part == "embed":
            hidden = model.config.text.hidden_size
            features = self.read("image_features") if "image_features" in self.plan.inputs else torch.zeros(0, hidden)
            self.write("inputs_embeds", model.embed(self.read("input_ids"), features))
        else:
            self.step(model)

    def step(self, model: Llama4) -> None:
        layers = model.config.text.layers
        positions = self.read("positions")  # [B, S]
        pasts = [(self.read(f"past_key.{i}"), self.read(f"past_value.{i}")) for i in range(len(layers))]
        for number, pair in enumerate(pasts):
            if not all(bool(torch.isfinite(one).all()) for one in pair):
                self.owner.cuda.faults.append(f"the cache of layer {number} holds what is no number")
        chunk = model.config.text.chunk
        found = model.language_model(
            self.read("inputs_embeds"),
            positions,
            self.past_positions(positions, chunk, self.slots(layers, True)),
            self.past_positions(positions, 0, self.slots(layers, False)),
            self.read("logits_index"),
            [tuple(torch.nan_to_num(one) for one in pair) for pair in pasts],
        )
        steps = positions.shape[1]
        ids = iter(found.expert_ids)
        for number, layer in enumerate(layers):
            slots = positions % chunk if layer.chunked else positions
            for kind, past, present in zip(("key", "value"), pasts[number], found.present[number], strict=True):
                self.scatter(f"{kind}.{number}", past.shape, present[:, :, present.shape[2] - steps :], slots)
            self.write(f"hidden.{number}", found.hiddens[number])
            if layer.moe:
                self.write(f"expert_id.{number}", next(ids))
        self.write("logits", found.logits)

    def slots(self, layers: Any, chunked: bool) -> int:
        """C of one class of layers; 0 when there are none."""
        numbers = (number for number, layer in enumerate(layers) if layer.chunked == chunked)
        return next((self.places[f"past_key.{number}"][1][2] for number in numbers), 0)

    @staticmethod
    def past_positions(positions: torch.Tensor, chunk: int, slots: int) -> torch.Tensor:
        """Which token lies in each slot [B, C], -1 where none that the step may see does."""
        first = positions[:, :1]  # [B, 1]
        held = first % chunk if chunk else first
        slot = torch.arange(slots)[None]
        return torch.where(slot < held, first - held + slot, -1)

    def scatter(self, name: str, shape: Any, new: torch.Tensor, slots: torch.Tensor) -> None:
        """Write the new keys or values [B, K, S, D] into their slots [B, S] of the present, and touch no other."""
        address, present_shape = self.places[f"present_{name}"]
        assert (address, present_shape) == self.places[f"past_{name}"] == (address, tuple(shape)), (
            f"{name} is not in place"
        )
        buffer = self.tensor(f"present_{name}")
        for row, step in itertools.product(range(slots.shape[0]), range(slots.shape[1])):
            slot = int(slots[row, step])
            assert slot < present_shape[2], f"{name}: slot {slot} is beyond the buffer's {present_shape[2]}"
            buffer[row, :, slot] = new[row, :, step].to(buffer.dtype)

    def memory(self, name: str) -> NDArray[Any]:
        address, shape = self.places[name]
        kind = np.dtype(TYPES[self.plan.tensors[name]["dtype"]][1])
        nbytes = int(np.prod(shape)) * kind.itemsize
        return self.owner.cuda.view(address, nbytes).view(kind).reshape(shape)

    def tensor(self, name: str) -> torch.Tensor:
        """The memory of an input or output itself."""
        raw = torch.from_numpy(self.memory(name))
        return raw.view(torch.bfloat16) if self.plan.tensors[name]["dtype"] == "BFLOAT16" else raw

    def read(self, name: str) -> torch.Tensor:
        """A copy of an input, in f32 if it is a floating one."""
        found = self.tensor(name).clone()
        return found.float() if found.is_floating_point() else found

    def write(self, name: str, value: torch.Tensor) -> None:
        target = self.tensor(name)
        assert target.shape == value.shape, (
            f"{name} is {tuple(value.shape)} and was given room for {tuple(target.shape)}"
        )
        target.copy_(value)
