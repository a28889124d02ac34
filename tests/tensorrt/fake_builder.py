"""Lets a recorded TensorRT module build: the parser reads inputs and outputs of a graph, the builder checks profiles.

What comes out is a plan that `fake_engine` runs with the PyTorch reference, so that a lowering, a compiler and the
runtime can be driven together through the very calls of one version. Nothing of the graph inside is looked at: whether
the product takes its operators is what a real parser and builder tell.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx

from tests.tensorrt.fake_engine import FakeTensorRt, tensor

PARTS = {"inputs_embeds": "text", "pixel_values": "vision", "input_ids": "embed"}


class Building:
    """What a recorded module was asked to build; `refuse` lets its parser or its builder fail with these words."""

    def __init__(self, engines: FakeTensorRt) -> None:
        self.trt, self.recorder = engines, engines.recorder
        self.refuse: dict[str, str] = {}
        self.profiles: list[list[dict[str, Any]]] = []
        answer = self.recorder.answer
        answer("OnnxParser.parse_from_file", self._parse)
        answer("OnnxParser.num_errors", lambda parser: int("parser" in self.refuse))
        answer("OnnxParser.get_error", lambda parser, index: self.recorder.make("ParserError"))
        answer("ParserError.desc", lambda error: self.refuse["parser"])
        answer("ParserError.node_name", "layers.0.odd")
        answer("ParserError.node_operator", "Odd")
        answer("IOptimizationProfile.set_shape", self._set_shape)
        answer("IBuilderConfig.add_optimization_profile", self._add_profile)
        answer("IBuilderConfig.set_timing_cache", self._keep_cache)
        answer("IBuilderConfig.get_timing_cache", lambda config: config.__dict__.get("cache"))
        answer("ITimingCache.serialize", lambda cache: self._memory(b"timings"))
        answer("Builder.create_network", self._network)
        answer("Builder.build_serialized_network", self._build)

    def _network(self, builder: Any, flags: int) -> Any:
        strongly = 1 << int(self.trt.module.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        assert flags & strongly, "10.16 keeps the types of the graph only in a strongly typed network"
        network = self.recorder.make("INetworkDefinition")
        network.__dict__["logger"] = builder.__dict__["_given"]["logger"]
        return network

    def _parse(self, parser: Any, model: str) -> bool:
        if "parser" in self.refuse:
            return False
        graph = onnx.load(model, load_external_data=False).graph
        weights = {one.name for one in graph.initializer}
        network = parser.__dict__["_given"]["network"]
        network.__dict__["inputs"] = [_described(one) for one in graph.input if one.name not in weights]
        network.__dict__["outputs"] = [_described(one) for one in graph.output]
        assert Path(model).is_file()
        return True

    def _set_shape(self, profile: Any, input: str, min: Any, opt: Any, max: Any) -> None:
        ends = [list(map(int, shape)) for shape in (min, opt, max)]
        assert all(a <= b <= c for a, b, c in zip(*ends, strict=True)), f"{input}: {ends} does not rise"
        profile.__dict__.setdefault("ranges", {})[input] = ends

    def _add_profile(self, config: Any, profile: Any) -> int:
        profiles: list[Any] = config.__dict__.setdefault("profiles", [])
        profiles.append(profile)
        return len(profiles) - 1

    def _keep_cache(self, config: Any, cache: Any, ignore_mismatch: bool) -> bool:
        config.__dict__["cache"] = cache
        return True

    def _build(self, builder: Any, network: Any, config: Any) -> Any:
        if "builder" in self.refuse:
            severity = self.trt.module.ILogger.Severity
            network.__dict__["logger"].log(severity.ERROR, self.refuse["builder"])
            return None
        inputs, outputs = network.__dict__["inputs"], network.__dict__["outputs"]
        profiles = [profile.__dict__["ranges"] for profile in config.__dict__["profiles"]]
        for ranges in profiles:
            for one in inputs:
                fixed = all(isinstance(size, int) for size in one["shape"])
                assert fixed or one["name"] in ranges, f"a profile has no range for {one['name']}"
                for shape in ranges.get(one["name"], ()):
                    pairs = zip(one["shape"], shape, strict=True)
                    assert all(size == given for size, given in pairs if isinstance(size, int)), one["name"]
        self._tell(config)
        self.profiles.append(profiles)
        part = next(PARTS[one["name"]] for one in inputs if one["name"] in PARTS)
        named = [{"name": str(number), "ranges": ranges} for number, ranges in enumerate(profiles)]
        plan = {"part": part, "inputs": inputs, "outputs": outputs, "profiles": named}
        return self._memory(json.dumps(plan).encode())

    def _tell(self, config: Any) -> None:
        """Tell a progress monitor what a build tells it: phases with steps, some inside others."""
        monitor = config.progress_monitor
        if monitor is not None:
            monitor.phase_start("Building Engine", None, 2)
            monitor.phase_start("Tactic Selection", "Building Engine", 3)
            for number in range(3):
                assert monitor.step_complete("Tactic Selection", number) is True
            monitor.phase_finish("Tactic Selection")
            for number in range(2):
                assert monitor.step_complete("Building Engine", number) is True
            monitor.phase_finish("Building Engine")

    def _memory(self, content: bytes) -> Any:
        memory = self.recorder.make("IHostMemory")
        memory.extend(content)
        return memory


def _described(value: onnx.ValueInfoProto) -> dict[str, Any]:
    kind = value.type.tensor_type
    shape = [size.dim_value if size.HasField("dim_value") else size.dim_param for size in kind.shape.dim]
    return tensor(value.name, onnx.TensorProto.DataType.Name(kind.elem_type), shape)
