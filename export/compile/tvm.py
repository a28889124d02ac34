"""Compiles for the TVM backend: each lowered graph to one shared library with our kernels linked in."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import onnx_ir as ir
import tvm
import tvm_ffi
from tvm import relax
from tvm.support import cc
from tvm.target import codegen

from arriero.errors import ArrieroError
from arriero.export.compile import Device, Watch, no_watch
from arriero.export.compile.build_kernels import find_compiler
from arriero.export.compile.cpus import LINUX_NAMES, NATIVE, Cpu, parse_cpu
from arriero.export.compile.relax.import_graph import ANY_ALIGNMENT, Imported, import_graph
from arriero.export.compile.relax.kernels import FEW_OUTPUTS
from arriero.export.compile.relax.share_rows import MANY, calls_threads, share_rows
from arriero.export.compile.relax.sort_shapes import sort_shapes
from arriero.export.compile.relax.take_early import take_early
from arriero.graphs.functions import ADD_LORA
from arriero.graphs.passes.replace_linear_with_kernel import LINEAR
from arriero.graphs.stored.panels import EXACT
from arriero.runtimes.manifest import Compiled

# What a step of one token of one row, on which no routing is forced, has of what others have any number of.
TOKEN = {"batch": 1, "seq": 1, "logits": 1, "rows": 1, "row_edges": 2, "forced_tokens": 0}


def compile_graphs(folder: Path, parts: Sequence[str], device: Device, watch: Watch = no_watch) -> Compiled:
    """Compile `<part>.onnx` of each of `parts` in `folder` for the device's processor, with its kernels linked in.

    Leaves `<part>.so` and `<part>.json` (the order of inputs, outputs, tables of experts and weights, the dtype of the
    caches, the tokens from which on a step is `prompt`'s, whether a row's sums are the same beside any others; the
    function for a single token, and whether nothing in it and in `step` calls threads but our kernels) in the place of
    each graph. Raises ArrieroError for a processor that LLVM does not know, MachineLacks without a linker for its
    architecture.
    """
    assert device.kernels is not None
    chosen = parse_cpu(device.cpu or NATIVE)
    target = llvm_target(chosen)
    link = cc.cross_compiler(find_compiler(chosen.arch))
    for number, part in enumerate(parts):
        watch("compile", number, len(parts), "graphs")
        path = folder / f"{part}.onnx"
        library = folder / f"{part}.so"
        try:
            imported = import_graph(path)
            with target, tvm.transform.PassContext(opt_level=3):
                pipeline = tvm.transform.Sequential([relax.get_default_pipeline(target), sort_shapes])
                module = fuse(imported.module)
                built = relax.build(module, target, relax_pipeline=pipeline)
            built.export_library(str(library), fcompile=link, addons=[str(device.kernels)])
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:  # TVM's own are of these
            raise ArrieroError(
                f"TVM {tvm.__version__} does not compile the graph ({(str(error).splitlines() or [repr(error)])[-1]})",
                where=str(path),
                remedy="Build again; if it stays so, report it together with this sentence",
            ) from error
        signature = _signature(imported)
        if "token" in module:
            signature |= {"for_a_token": "token", "crew": not calls_threads(module, "step")}
        (folder / f"{part}.json").write_text(json.dumps(signature, indent=1) + "\n")
        path.unlink()
    watch("compile", len(parts), len(parts), "graphs")
    known = (LINUX_NAMES.get(str(name)) for name in codegen.llvm_get_cpu_features(target))
    features = tuple(sorted(name for name in known if name))
    tools = {"apache-tvm": tvm.__version__, "apache-tvm-ffi": tvm_ffi.__version__}
    return Compiled(tools, str(chosen), chosen.arch, features)


def fuse(module: tvm.IRModule) -> tvm.IRModule:
    """The module with its entries, `main` and of text also `step`, `prompt` and `token`, and their operators fused.

    `step` gives the first output alone, so that no step pays for what only a proof looks at, nor for what its last
    layer makes of tokens that get no logits; `prompt` is the same for steps of many tokens, and `token` for one token
    of one row, whose memory is planned beforehand. Functions that are equal become one, so that layers of one class
    share all of theirs: what is left to generate does not grow with the number of layers.
    """
    fused = relax.get_pipeline("zero")(_with_step(module))
    entries = ["main"]
    if "step" in fused:
        fused["prompt"] = relax.utils.copy_with_new_vars(fused["step"]).with_attr("global_symbol", "prompt")
        entries.append("prompt")
    shared = share_rows(fused, entries)
    if "step" in shared:
        token = relax.utils.copy_with_new_vars(shared["step"])
        sizes = {size: TOKEN[size.name] for size in relax.analysis.defined_symbolic_vars(token) if size.name in TOKEN}
        shared["token"] = token.bind_symbolic_vars(sizes).with_attr("global_symbol", "token")
    return shared


def llvm_target(cpu: Cpu) -> tvm.target.Target:
    """The processor as TVM's target. Raises ArrieroError for one that LLVM does not know, or a feature."""
    generic = tvm.target.Target({"kind": "llvm", "mtriple": cpu.triple})
    known = [str(name) for name in codegen.llvm_get_cpu_archlist(generic)]
    if cpu.cpu not in known:
        raise ArrieroError(
            f"LLVM knows no {cpu.arch} processor {cpu.cpu!r}", where="cpu", expected=f"one of {', '.join(known)}"
        )
    target = tvm.target.Target(cpu.llvm)
    has = set(map(str, codegen.llvm_get_cpu_features(target)))
    if unknown := [name for name in cpu.features if name not in has]:  # LLVM would leave them out
        what = f"LLVM knows no feature {', '.join(f'+{name}' for name in unknown)} of {cpu.arch}"
        raise ArrieroError(what, where="cpu", expected="LLVM's names of features", remedy="Correct or remove it")
    return target


def _with_step(module: tvm.IRModule) -> tvm.IRModule:
    """Add `step`: `main` with its first output alone, which is computed for the tokens alone that it is of."""
    main = module["main"]
    *before, last = main.body.blocks
    *bindings, output = last.bindings
    if not isinstance(output.value, relax.Tuple):
        return module
    first = output.value.fields[0]
    result = relax.Var("first", first.ty)
    body = relax.SeqExpr([*before, relax.DataflowBlock([*bindings, relax.VarBinding(result, first)])], result)
    step = relax.Function(main.params, body, first.ty, attrs=main.attrs)
    module["step"] = relax.utils.copy_with_new_vars(take_early(step)).with_attr("global_symbol", "step")
    return relax.transform.DeadCodeElimination(["main", "step"])(module)


def _sums_alike(product: ir.Node) -> bool:
    """Whether a token's sums in a Linear or an AddLora have one order however many of its row are in the step."""
    if product.op_type == ADD_LORA:
        stack = product.inputs[4]  # [n+1, N, R]
        assert stack is not None
        assert stack.shape is not None
        return int(stack.shape.numpy()[1]) <= FEW_OUTPUTS
    packed = product.attributes["format"].as_string() != EXACT
    return packed or product.attributes["features"].as_int() <= FEW_OUTPUTS


def _signature(imported: Imported) -> dict[str, object]:
    values = {str(value.name): value for value in imported.graph.inputs}
    caches = {value.dtype for name, value in values.items() if name.startswith("past_") and value.dtype is not None}
    return {
        "inputs": imported.inputs,
        "cache": next((dtype.numpy().name for dtype in caches), None),
        "outputs": [value.name for value in imported.graph.outputs],
        "many": MANY if len(imported.graph.outputs) > 1 else None,
        "packs": all(_sums_alike(node) for node in imported.graph if node.op_type in (LINEAR, ADD_LORA)),
        "experts": [
            {
                "name": table.name,
                "layout": table.layout,
                "bytes": table.records[0].nbytes,
                "records": [[str(record.location), record.offset] for record in table.records],
            }
            for table in imported.tables
        ],
        "weights": [
            {
                "name": tensor.name,
                "file": str(tensor.location),
                "offset": tensor.offset,
                "dtype": tensor.dtype.name,
                "shape": list(tensor.shape.numpy()),
                "aligned": any(node.op_type not in ANY_ALIGNMENT for node in values[str(tensor.name)].consumers()),
            }
            for tensor in imported.weights
        ],
    }
