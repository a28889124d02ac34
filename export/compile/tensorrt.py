"""Compiles for TensorRT and TensorRT for RTX: each lowered graph to one engine, for prompts and decoding alike.

An engine holds its weights itself, so the files that the graph was lowered into go when it is built: the bundle has
every weight once, in a file that the runtime maps. (Engines without weights, refitted at load, need a GPU even where
they are only compiled.) Where a budget has no room for all weights, the text engine, which has most of them, is built
to stream the rest from the host.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import onnx_ir as ir

from arriero.errors import ArrieroError, MachineLacks
from arriero.export.compile import Device, MemoryBudget, Watch, no_watch
from arriero.export.compile.nvidia.engine_shapes import settle_capacities, signature
from arriero.export.compile.nvidia.gpus import Gpu
from arriero.export.compile.nvidia.tensorrt_api import TENSORRT, Api, load
from arriero.graphs.stored.expert_plugins import DOMAIN
from arriero.profiles.journal import Journal, Region
from arriero.runtimes.cpu import architecture
from arriero.runtimes.manifest import Compiled
from arriero.runtimes.nvidia.products import listen

STEPS = 100  # of which a graph's progress is reported
TIMINGS = "timings.bin"
STREAMED = "text"  # the last of the parts


def compile_graphs(
    folder: Path,
    parts: Sequence[str],
    device: Device,
    watch: Watch = no_watch,
    *,
    api: Api | None = None,
    plugins: Callable[[str], Plugins] | None = None,
) -> Compiled:
    """Compile `<part>.onnx` of each of `parts` in `folder` for the device's GPU, within the memory budget that it has.

    Leaves `<part>.engine` and `<part>.json` (see `engine_shapes.signature`) in the place of each graph and its weights.
    `api` may stand in for the installed product, `plugins` for `cuda.plugin.register_plugins`, which makes our own
    nodes known and is called if a graph has any. Raises ArrieroError naming graph and node that the product refuses,
    MachineLacks where it is not installed or needs the GPU itself.
    """
    gpu, limits, memory = device.gpu, device.limits, device.memory
    assert gpu is not None
    assert limits is not None
    product = api or load(TENSORRT)
    product.check_here(gpu)
    log = listen(product.module)
    journal = Journal(folder)
    inside: Plugins | None = None
    for number, part in enumerate(parts):
        path = folder / f"{part}.onnx"
        model = ir.load(path)
        settle_capacities(model, limits)
        ir.save(model, path)
        if inside is None and any(node.domain == DOMAIN for node in model.graph):
            inside = (plugins or _register)(str(gpu))
        described = signature(model, limits, part)
        step = _step(watch, part)
        if part == STREAMED and memory is not None and memory.weights is not None:
            others = sum((folder / f"{other}.engine").stat().st_size for other in parts[:number])
            described["weights_on_gpu"] = max(0, memory.weights - others)
        plan = build_engine(product, log, path, described, gpu, memory, journal, step)
        if inside is not None:
            described["plugins"] = inside.hashes
        _write(folder / f"{part}.engine", plan)
        (folder / f"{part}.json").write_text(json.dumps(described, indent=1) + "\n")
        path.unlink()
        _drop_weights(model, folder)
    journal.forget(TIMINGS)
    (folder / TIMINGS).unlink(missing_ok=True)
    hashes = inside.hashes if inside else {}
    return Compiled({product.product: product.version}, arch=architecture(), gpu=str(gpu), plugins=hashes)


class Plugins(Protocol):
    """What was compiled for our own nodes: name of each kernel -> sha256 of its code, once the engine is built."""

    @property
    def hashes(self) -> dict[str, str]:
        """Name -> sha256."""


def _register(gpu: str) -> Plugins:
    # By name and late: it needs nvcc, and only graphs with our own nodes need it.
    plugin: Any = import_module("arriero.export.compile.cuda.plugin")
    made: Plugins = plugin.register_plugins(gpu)
    return made


def build_engine(
    api: Api,
    log: Any,
    path: Path,
    described: Mapping[str, Any],
    gpu: Gpu,
    memory: MemoryBudget | None,
    journal: Journal,
    step: Callable[[int, int], None],
) -> Any:
    """The serialized engine of the graph at `path`, as `described`. Raises ArrieroError with what is wrong.

    How fast kernels ran is kept in the journal's folder for further engines.
    """
    trt, timings = api.module, journal.folder / TIMINGS
    log.errors.clear()
    log.layers.clear()
    builder = trt.Builder(log)
    network = builder.create_network(api.network_flags)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(path)):
        raise _refused(api, path, [parser.get_error(number) for number in range(parser.num_errors)])
    config = builder.create_builder_config()
    api.aim(config, gpu)
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default: it would round the router's inputs to 10 bits
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # an engine can say what it consists of
    if memory is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, memory.scratch)
    if "weights_on_gpu" in described:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    cache = None
    if api.keeps_timings:
        cache = config.create_timing_cache(timings.read_bytes() if journal.holds(TIMINGS) else b"")
        config.set_timing_cache(cache, False)
    for profile in described["profiles"]:
        shapes = builder.create_optimization_profile()
        for name, (least, usual, most) in profile["ranges"].items():
            shapes.set_shape(name, least, usual, most)
        config.add_optimization_profile(shapes)
    config.progress_monitor = monitor(trt, step)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise _unbuilt(api, path, gpu, memory, log.errors)
    if cache is not None:
        _write(timings, config.get_timing_cache().serialize())
        journal.keep(TIMINGS, Region.whole(journal.folder, TIMINGS))
    return plan


def monitor(trt: Any, step: Callable[[int, int], None]) -> Any:
    """A progress monitor that tells `step` how much of the build is behind, of STEPS.

    The outermost phase counts a few steps of very different length; each is filled by the phases inside it.
    """

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.outer, self.total, self.done = "", 1, 0
            self.inner: dict[str, int] = {}

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.outer, self.total, self.done = name, max(1, steps), 0
            elif parent == self.outer:
                self.inner[name] = max(1, steps)

        def step_complete(self, name: str, number: int) -> bool:
            if name == self.outer:
                self.done = number + 1
                step(STEPS * self.done // self.total, STEPS)
            elif name in self.inner:
                part = (number + 1) / self.inner[name]
                step(int(STEPS * min(self.done + part, self.total) / self.total), STEPS)
            return True

        def phase_finish(self, name: str) -> None:
            self.inner.pop(name, None)

    return Monitor()


def _refused(api: Api, path: Path, errors: Sequence[Any]) -> ArrieroError:
    """What the parser says of the first node that it does not take."""
    first = errors[0]
    what = next(iter(str(first.desc()).strip().splitlines()[::-1]), "no reason given")
    for line in str(first.desc()).splitlines():
        if "Error Code" in line or "Assertion" in line or "not found" in line:
            what = line.strip()
            break
    return ArrieroError(
        f"{api.description} does not take the graph ({what})",
        where=f"{path}: node {first.node_name() or '?'} ({first.node_operator() or '?'})",
        remedy="Build again; if it stays so, report it together with this sentence",
    )


def _unbuilt(api: Api, path: Path, gpu: Gpu, memory: MemoryBudget | None, errors: Sequence[str]) -> ArrieroError:
    text = errors[-1] if errors else "no reason given"
    if ("out of memory" in text.lower() or "OutOfMemory" in text) and memory is not None:
        return ArrieroError(
            f"the engine needs more scratch space than the {memory.scratch} bytes that are left to it ({text})",
            where=str(path),
            remedy="Raise budgets.gpu_memory, or choose a smaller profile, context or batch",
        )
    if "out of memory" in text.lower() or "OutOfMemory" in text:
        return MachineLacks(
            f"{api.description} ran out of memory while it built the engine ({text})",
            where=str(path),
            remedy="Free some and run the same command again: the build goes on where it stopped",
        )
    return ArrieroError(
        f"{api.description} builds no engine for {gpu} ({text})",
        where=str(path),
        remedy="Choose another profile or GPU; if it ought to work, report it together with this sentence",
    )


def _step(watch: Watch, part: str) -> Callable[[int, int], None]:
    """What reports a part's progress in STEPS, each step once."""
    reported = -1

    def step(done: int, total: int) -> None:
        nonlocal reported
        now = done * STEPS // total
        if now > reported:
            reported = now
            watch(f"compile {part}", now, STEPS, "%")

    step(0, STEPS)
    return step


def _write(path: Path, memory: Any) -> None:
    with path.open("wb") as file:
        file.write(memory)


def _drop_weights(model: ir.Model, folder: Path) -> None:
    """Delete the files that hold the graph's weights and nothing else's: the engine has them now."""
    values = (value.const_value for value in model.graph.initializers.values())
    for location in {value.location for value in values if isinstance(value, ir.ExternalTensor)}:
        (folder / location).unlink(missing_ok=True)
    weights = folder / "weights"
    if weights.is_dir() and not any(weights.iterdir()):
        weights.rmdir()
