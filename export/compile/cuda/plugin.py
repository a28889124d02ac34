"""The expert dispatch as two TensorRT plugins, `arriero::ExpertGateUp` and `arriero::ExpertDown`, compiled ahead.

TensorRT takes a plugin's one kernel into the engine, so that running it needs neither Python nor this package. Each
plugin offers two tactics, its decode and its prefill kernel, both right for every shape; TensorRT times them in each
optimisation profile. Networks are strongly typed, so types follow the inputs; eight-bit activations are codes in
float16, so that TensorRT's rules for INT8 tensors never apply. A node's only attribute is `form`, a key of
`launch.FORMS`; TensorRT hands a plugin its attributes in an order of its own, so there had better be one.

Legend: T tokens, k experts per token, E experts, H hidden, F expert width, J blocks of a row.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

from arriero.errors import ArrieroError, MachineLacks
from arriero.export.compile.cuda.build_cuda_kernels import Blob, build_kernel
from arriero.export.compile.cuda.launch import SHAPES, Kernel, Op, activations_of, check_sizes
from arriero.graphs.stored.expert_plugins import BITS, DOMAIN, DOWN, GATE_UP
from arriero.graphs.stored.mma_layout import row_words
from arriero.runtimes.broken_package import naming_broken_packages
from arriero.traits import install

TACTICS = dict(enumerate(SHAPES, 1))  # TensorRT wants them positive
TYPES = {"f16": "FP16", "bf16": "BF16"}  # activation types, as TensorRT's combinations name them


class Plugins:
    """What was compiled into engines for `gpu`. One at a time is in force: TensorRT's registry is the process's."""

    def __init__(self, gpu: str) -> None:
        """Compile for `gpu`, such as "sm_89"."""
        self.gpu = gpu
        self._blobs: dict[Kernel, Blob] = {}
        self._lock = threading.Lock()

    def blob(self, kernel: Kernel) -> Blob:
        """The compiled kernel, compiled once."""
        with self._lock:
            if kernel not in self._blobs:
                self._blobs[kernel] = build_kernel(kernel, self.gpu)
            return self._blobs[kernel]

    @property
    def hashes(self) -> dict[str, str]:
        """Kernel name -> SHA-256 of its code, of all that TensorRT asked for: the manifest's `plugins`."""
        return {kernel.name: blob.sha256 for kernel, blob in sorted(self._blobs.items(), key=lambda item: item[0].name)}


_in_force: Plugins | None = None
_registered = False


def register_plugins(gpu: str) -> Plugins:
    """Make both plugins known to TensorRT, their kernels compiled for `gpu` from now on; may be called again.

    Raises MachineLacks where TensorRT's Python package is not installed, or is too old for compiled plugins.
    """
    global _in_force, _registered
    if not _registered:
        trt, trtp = _import_tensorrt()
        _register_gate_up(trt, trtp)
        _register_down(trt, trtp)
        _registered = True
    _in_force = Plugins(gpu)
    return _in_force


def _import_tensorrt() -> tuple[ModuleType, ModuleType]:
    with naming_broken_packages():
        try:
            import tensorrt
            import tensorrt.plugin
        except ModuleNotFoundError as error:
            what, remedy = f"TensorRT cannot be imported: {error}", f"Install it: `{install('tensorrt')}`"
            raise MachineLacks(what, remedy=remedy) from None
    if not hasattr(tensorrt, "QuickPluginCreationRequest"):
        raise MachineLacks(
            f"TensorRT {tensorrt.__version__} has no plugins compiled ahead of time",
            expected="TensorRT 10.16 or newer",
            remedy="Update it: `pip install --upgrade tensorrt`",
        )
    return tensorrt, tensorrt.plugin


def _register_gate_up(trt: ModuleType, trtp: Any) -> None:
    """inner [T*k, F] of x [T, H], expert_id i32 [T, k], score f32 [T, k], gate_up [E, 2F, row], scales f32."""
    plugin, typed = f"{DOMAIN}::{GATE_UP}", partial(_typed, trtp)

    @trtp.register(plugin)
    @typed(trtp.TensorDesc)
    def describe(x: Any, expert_id: Any, score: Any, gate_up: Any, scales: Any, form: str) -> Any:
        tokens, choices = expert_id.shape_expr
        # 2F is halved, not F read from scales: exact weights have none
        return trtp.from_shape_expr((tokens * choices, gate_up.shape_expr[1] // 2), x.dtype)

    @trtp.autotune(plugin)
    @typed(list[trtp.AutoTuneCombination])
    def tune(x: Any, expert_id: Any, score: Any, gate_up: Any, scales: Any, form: str, outputs: Any) -> Any:
        return [_combination(trt, trtp, GATE_UP, x, expert_id, gate_up, scales, form, score=score)]

    @trtp.aot_impl(plugin)
    @typed(tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs])
    def compiled(
        x: Any, expert_id: Any, score: Any, gate_up: Any, scales: Any, form: str, outputs: Any, tactic: int
    ) -> Any:
        hidden, ffn = _constant(x, 1, "x"), _constant(gate_up, 1, "gate_up") // 2
        return _launch(trt, trtp, "gate_up", x, expert_id, gate_up, scales, form, hidden, ffn, tactic)


def _register_down(trt: ModuleType, trtp: Any) -> None:
    """y [T, H] of inner [T*k, F], expert_id i32 [T, k], down [E, H, row], scales f32."""
    plugin, typed = f"{DOMAIN}::{DOWN}", partial(_typed, trtp)

    @trtp.register(plugin)
    @typed(trtp.TensorDesc)
    def describe(inner: Any, expert_id: Any, down: Any, scales: Any, form: str) -> Any:
        return trtp.from_shape_expr((expert_id.shape_expr[0], down.shape_expr[1]), inner.dtype)

    @trtp.autotune(plugin)
    @typed(list[trtp.AutoTuneCombination])
    def tune(inner: Any, expert_id: Any, down: Any, scales: Any, form: str, outputs: Any) -> Any:
        return [_combination(trt, trtp, DOWN, inner, expert_id, down, scales, form)]

    @trtp.aot_impl(plugin)
    @typed(tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs])
    def compiled(inner: Any, expert_id: Any, down: Any, scales: Any, form: str, outputs: Any, tactic: int) -> Any:
        ffn, hidden = _constant(inner, 1, "inner"), _constant(down, 1, "down")
        return _launch(trt, trtp, "down", inner, expert_id, down, scales, form, hidden, ffn, tactic)


def _typed(trtp: Any, result: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Annotate a function as TensorRT reads it, with TensorRT's classes: what is nothing else is a tensor."""

    def annotate(function: Callable[..., Any]) -> Callable[..., Any]:
        kinds = {"form": str, "tactic": int, "outputs": tuple[trtp.TensorDesc], "return": result}
        names = [*inspect.signature(function).parameters, "return"]
        function.__annotations__ = {name: kinds.get(name, trtp.TensorDesc) for name in names}
        return function

    return annotate


def _combination(
    trt: ModuleType,
    trtp: Any,
    node: str,
    x: Any,
    expert_id: Any,
    weights: Any,
    scales: Any,
    form: str,
    score: Any = None,
) -> Any:
    """The one combination of types that the kernels read, all arrays row-major, with both tactics."""
    form = form.rstrip("\0")
    activation = TYPES[_activation(trt, x.dtype, form, node)]
    stored = activation if form == "exact" else "INT32"
    kinds = {
        "FP32": trt.DataType.FLOAT,
        "FP16": trt.DataType.HALF,
        "BF16": trt.DataType.BF16,
        "INT32": trt.DataType.INT32,
    }
    routed = {"expert_id": (expert_id, "INT32"), **({"score": (score, "FP32")} if score is not None else {})}
    inputs = {**routed, f"{form} weights": (weights, stored), "scales": (scales, "FP32")}
    for name, (tensor, kind) in inputs.items():
        if tensor.dtype != kinds[kind]:
            expected = str(kinds[kind]).removeprefix("DataType.")
            raise ArrieroError(
                f"the type of {name} is {str(tensor.dtype).removeprefix('DataType.')}", where=node, expected=expected
            )
    types = [activation, *(kind for _, kind in inputs.values()), activation]
    return trtp.AutoTuneCombination(", ".join(types), "LINEAR", list(TACTICS))


def _activation(trt: ModuleType, dtype: Any, form: str, node: str) -> str:
    """The activation type `dtype`, if it is one that `form` has kernels for."""
    types = {"f16": trt.DataType.HALF, "bf16": trt.DataType.BF16}
    taken = {types[name]: name for name in activations_of(form, node)}
    if dtype not in taken:
        refused, *expected = (str(kind).removeprefix("DataType.") for kind in (dtype, *taken))
        raise ArrieroError(
            f"the type of its activations is {refused}", where=node, expected=f"{' or '.join(expected)} beside {form}"
        )
    return taken[dtype]


def _launch(
    trt: ModuleType,
    trtp: Any,
    op: Op,
    x: Any,
    expert_id: Any,
    weights: Any,
    scales: Any,
    form: str,
    hidden: int,
    ffn: int,
    tactic: int,
) -> tuple[str, str, Any, Any]:
    """Name, PTX, launch parameters and scalar arguments of the kernel of `op` that `tactic` is."""
    node = GATE_UP if op == "gate_up" else DOWN
    form = form.rstrip("\0")  # a parser may count the string's end in
    activation = _activation(trt, x.dtype, form, node)
    experts, choices = _constant(weights, 0, "the weights"), _constant(expert_id, 1, "expert_id")
    features = hidden if op == "gate_up" else ffn
    # scales are [E, N, J], or have fewer axes where there are no blocks
    block = features // _constant(scales, 2, "scales") if scales.ndim == 3 else 0
    check_sizes(op, form, experts, hidden, ffn, block, node)
    outputs = 2 * ffn if op == "gate_up" else hidden
    row = features if form == "exact" else row_words(BITS[form], features)
    _check_shape(node, f"{form} weights", weights, [experts, outputs, row])
    if form != "exact":
        _check_shape(node, "scales", scales, [experts, outputs, *([features // block] if block else [])])
    if _in_force is None:
        raise RuntimeError("register_plugins was not called")
    # Where TensorRT asks without having set a tactic, it gets the kernel that is good at most shapes.
    kernel = Kernel(op, TACTICS.get(tactic, "prefill"), activation, form)
    tokens = expert_id.shape_expr[0]
    launch = trtp.KernelLaunchParams()
    launch.grid_x, launch.grid_y = kernel.grid(tokens, choices, experts, hidden, ffn)
    launch.block_x = kernel.threads
    scalars = trtp.SymIntExprs.from_tuple(
        [trtp.SymInt32(value) for value in (tokens, choices, experts, hidden, ffn, block)]
    )
    return kernel.name, _in_force.blob(kernel).ptx, launch, scalars


def _constant(tensor: Any, axis: int, name: str) -> int:
    size = tensor.shape_expr[axis]
    if not size.is_constant:
        raise ArrieroError(
            f"the size of {name} along axis {axis} is not known when the engine is built",
            where=DOMAIN,
            expected="only the number of tokens to vary",
            remedy="Give the weights as constants, and x with a fixed last axis",
        )
    return int(size.constant_value())


def _check_shape(node: str, name: str, tensor: Any, expected: list[int]) -> None:
    """Refuse what the kernels would read past the end of."""
    sizes = [_constant(tensor, axis, name) for axis in range(tensor.ndim)]
    if sizes != expected:
        raise ArrieroError(f"the shape of {name} is {sizes}", where=node, expected=str(expected))
