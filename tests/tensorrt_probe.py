"""Walks both plugins through TensorRT's own Python code, as a build does, and prints what TensorRT would be told.

    LD_LIBRARY_PATH=STUBS python tests/tensorrt_probe.py FOLDER < requests.json

FOLDER holds the bindings (`tensorrt_bindings`, from the wheel tensorrt_cu13_bindings), STUBS libraries that stand for
TensorRT's, which the bindings only need to be there. Dimensions are computed by `Number`, in the libraries' place.
"""

from __future__ import annotations

import importlib
import json
import sys
from operator import add, eq, floordiv, lt, mul, sub


def import_bindings(folder):
    """The bindings as `tensorrt`, as the package of this name does it."""
    sys.path.insert(0, folder)
    bindings = importlib.import_module("tensorrt_bindings")
    sys.modules["tensorrt"] = bindings
    return bindings


class Registry:
    """Stands for TensorRT's."""

    def __init__(self):
        self.creators = {}

    def register_creator(self, creator, namespace):
        assert namespace == creator.plugin_namespace
        self.creators[namespace, creator.name, creator.plugin_version] = creator

    def get_creator(self, name, version, namespace):
        return self.creators[namespace, name, version]


def main(folder):
    trt = import_bindings(folder)
    registry = Registry()
    trt.get_plugin_registry = lambda: registry

    class Number(trt.IDimensionExpr):
        """A dimension: `value` now, constant or not."""

        def is_constant(self):
            return self.constant

        def get_constant_value(self):
            assert self.constant
            return self.value

    def number(value, constant=True):
        made = Number.__new__(Number)  # its class cannot be made the usual way
        made.value, made.constant = value, constant
        return made

    operations = {
        trt.DimensionOperation.SUM: add,
        trt.DimensionOperation.SUB: sub,
        trt.DimensionOperation.PROD: mul,
        trt.DimensionOperation.FLOOR_DIV: floordiv,
        trt.DimensionOperation.CEIL_DIV: lambda a, b: -(-a // b),
        trt.DimensionOperation.EQUAL: eq,
        trt.DimensionOperation.LESS: lt,
        trt.DimensionOperation.MAX: max,
        trt.DimensionOperation.MIN: min,
    }

    class Arithmetic:
        def constant(self, value):
            return number(value)

        def operation(self, kind, first, second):
            return number(operations[kind](first.value, second.value), first.constant and second.constant)

    class Launch:
        pass

    class Scalars(dict):
        pass

    from arriero.errors import ArrieroError
    from arriero.export.compile.cuda import plugin as ours
    from arriero.export.compile.cuda.build_cuda_kernels import Blob, build_kernel

    def pretend(kernel, gpu):
        return Blob(kernel, gpu, f"{kernel.name} for {gpu}", f"hash of {kernel.name}")

    # what each symbol's C++ part would hold
    importlib.import_module("tensorrt.plugin")
    symbols = sys.modules["tensorrt.plugin._tensor"]

    def walk(op, form, inputs, compiles):
        """`inputs` are lists of sizes (a negative one may vary) and a type."""
        ours.build_kernel = build_kernel if compiles else pretend
        plugins = ours.register_plugins("sm_89")
        creator = registry.get_creator(op, "1", "arriero")
        attribute = form.encode()  # a field holds the address alone
        field = trt.PluginField("form", attribute, trt.PluginFieldType.CHAR)
        fields = trt.PluginFieldCollection([field])
        made = creator.create_plugin(
            op, "arriero", fields, trt.TensorRTPhase.BUILD, trt.QuickPluginCreationRequest.STRICT_AOT
        )
        types = [getattr(trt.DataType, kind) for _, kind in inputs]
        exprs = [[number(abs(size), size > 0) for size in sizes] for sizes, _ in inputs]
        (output_type,) = made.get_output_data_types(types, [len(sizes) for sizes, _ in inputs])
        made.get_output_shapes(exprs, [], Arithmetic())
        (output,) = made.output_descs
        shape = [size._expr.value for size in output.shape_expr]
        descs = []
        for sizes, kind in [*((e, t) for e, t in zip(exprs, types, strict=True)), (output.shape_expr, output_type)]:
            dynamic = trt.DynamicPluginTensorDesc()
            dynamic.desc = trt.PluginTensorDesc()
            values = trt.Dims([size.value if isinstance(size, Number) else size._expr.value for size in sizes])
            dynamic.desc.dims, dynamic.min, dynamic.opt, dynamic.max = values, values, values, values
            dynamic.desc.type, dynamic.desc.format = kind, trt.TensorFormat.LINEAR
            descs.append(dynamic)
        combinations = made.get_supported_format_combinations(descs, len(inputs))
        made.configure_plugin(descs[: len(inputs)], descs[len(inputs) :])
        tactics = sorted(made.get_valid_tactics())
        registered = sys.modules["tensorrt.plugin._lib"].QDP_REGISTRY[f"arriero::{op}"]
        told = {
            "names": registered.input_tensor_names,
            "output": [str(output_type), shape],
            "types": [str(c.type) for c in combinations],
            "formats": sorted({str(c.format) for c in combinations}),
            "tactics": [],
        }
        for tactic in tactics:
            made.set_tactic(tactic)
            launch, scalars = Launch(), Scalars()
            made.get_launch_params(exprs, descs, len(inputs), launch, scalars, Arithmetic())
            name, code = made.get_kernel([d.desc for d in descs[: len(inputs)]], [descs[-1].desc])
            told["tactics"].append(
                {
                    "launch": {key: value.number for key, value in vars(launch).items()},
                    "scalars": [scalars[i].number for i in range(scalars.nbSymExprs)],
                    "kernel": name,
                    "ptx": code.decode(),
                }
            )
        told["hashes"] = plugins.hashes
        return told

    original = symbols.SymExprImpl

    class Told(original):
        def __init__(self, expr):
            super().__init__(expr)
            self.number = expr._expr.value

    symbols.SymExprImpl = Told
    answers = []
    for request in json.load(sys.stdin):
        try:
            answers.append(walk(**request))
        except ArrieroError as error:
            answers.append({"error": str(error)})
    print(json.dumps({"version": trt.__version__, "answers": answers}))


if __name__ == "__main__":
    main(*sys.argv[1:])
