"""Traces the torch reference into the canonical ONNX graphs, with the weights left where they are: in the checkpoint.

The model is traced on the meta device, so that no weight is ever read; the initialisers of the result are symbolic: a
canonical name, a dtype and a shape. Legend: B batch, S new tokens, Pc and Pg past slots of chunked
and global layers, L slots that get logits, M image features, n tiles, T tokens (B*S), H hidden, V vocabulary.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import Sequential
from onnx_ir.passes import common as tidy
from onnxscript.optimizer import fold_constants
from torch import Tensor, nn
from torch.export import Dim

from arriero.graphs import functions
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.config import ModelConfig
from arriero.graphs.model import Llama4
from arriero.graphs.passes.canonicalize_shape_sources import canonicalize_shape_sources
from arriero.graphs.sources.weight_source import WeightSource

DTYPES = {"BF16": ir.DataType.BFLOAT16, "F16": ir.DataType.FLOAT16, "F32": ir.DataType.FLOAT}
TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
FOLD_LIMIT = 64 * 1024  # elements; rotary tables fold, nothing near the size of a weight does


class _Text(nn.Module):
    def __init__(self, model: Llama4) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        inputs_embeds: Tensor,
        positions: Tensor,
        chunk_past_positions: Tensor,
        global_past_positions: Tensor,
        logits_index: Tensor,
        past: list[Tensor],
    ) -> tuple[Tensor, ...]:
        pairs = list(zip(past[0::2], past[1::2], strict=True))
        step = self.model.language_model(
            inputs_embeds, positions, chunk_past_positions, global_past_positions, logits_index, pairs
        )
        outputs, ids = [step.logits], iter(step.expert_ids)
        for layer, present, hidden in zip(self.model.config.text.layers, step.present, step.hiddens, strict=True):
            outputs += [*present, hidden, *([next(ids)] if layer.moe else [])]
        return tuple(outputs)


class _Vision(nn.Module):
    def __init__(self, model: Llama4) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model.image_features(pixel_values)


class _Embed(nn.Module):
    def __init__(self, model: Llama4) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, image_features: Tensor) -> Tensor:
        return self.model.embed(input_ids, image_features)


def text_signature(config: ModelConfig) -> tuple[list[str], list[str]]:
    """Names of the text graph's inputs and outputs, in order."""
    layers = config.text.layers
    inputs = ["inputs_embeds", "positions", "chunk_past_positions", "global_past_positions", "logits_index"]
    inputs += [f"{kind}.{i}" for i in range(len(layers)) for kind in ("past_key", "past_value")]
    outputs = ["logits"]
    for i, layer in enumerate(layers):
        outputs += [f"present_key.{i}", f"present_value.{i}", f"hidden.{i}", *([f"expert_id.{i}"] if layer.moe else [])]
    return inputs, outputs


def trace_text(config: ModelConfig, checkpoint: Checkpoint, path: Path) -> ir.Model:
    """Trace one step of the text decoder to `path` (`text.onnx`) and give the model; its weights are symbolic.

    Inputs: `inputs_embeds` f32 [B, S, H], `positions` i64 [B, S], `chunk_past_positions` i64 [B, Pc],
    `global_past_positions` i64 [B, Pg], `logits_index` i64 [L], per layer `past_key.{i}`, `past_value.{i}` f32
    [B, K, P, D]. Outputs: `logits` f32 [B, L, V], per layer `present_key.{i}`, `present_value.{i}`, `hidden.{i}` f32
    [B, S, H], and on MoE layers `expert_id.{i}` i64 [T, k].
    """
    text = config.text
    batch, new, chunk_past, global_past, logits = 2, 3, 5, 7, 2
    dims = {name: Dim(name) for name in ("batch", "seq", "chunk_past", "global_past", "logits")}
    past, past_dims = [], []
    for layer in text.layers:
        slots, slots_dim = (chunk_past, "chunk_past") if layer.chunked else (global_past, "global_past")
        # Two tensors, not one twice: the exporter takes an argument given twice for one input.
        past += [torch.empty(batch, text.kv_heads, slots, text.head_dim, device="meta") for _ in range(2)]
        past_dims += [{0: dims["batch"], 2: dims[slots_dim]}] * 2
    arguments = (
        torch.empty(batch, new, text.hidden_size, device="meta"),
        *(torch.empty(batch, slots, dtype=torch.int64, device="meta") for slots in (new, chunk_past, global_past)),
        torch.empty(logits, dtype=torch.int64, device="meta"),
        past,
    )
    shapes = (
        {0: dims["batch"], 1: dims["seq"]},
        {0: dims["batch"], 1: dims["seq"]},
        {0: dims["batch"], 1: dims["chunk_past"]},
        {0: dims["batch"], 1: dims["global_past"]},
        {0: dims["logits"]},
        past_dims,
    )
    model = _export(_Text(_meta_model(config, checkpoint)), arguments, shapes, text_signature(config))
    _name_layers(model, config)
    return _finish(model, checkpoint, path)


def trace_vision(config: ModelConfig, checkpoint: Checkpoint, path: Path) -> ir.Model:
    """Trace the vision tower and projector: `pixel_values` f32 [n, c, h, w] -> `image_features` f32 [n*tokens, H]."""
    vision = config.vision
    assert vision is not None
    pixels = torch.empty(3, vision.channels, vision.image_size, vision.image_size, device="meta")
    names = (["pixel_values"], ["image_features"])
    model = _export(_Vision(_meta_model(config, checkpoint)), (pixels,), ({0: Dim("tiles")},), names)
    return _finish(model, checkpoint, path)


def trace_embed(config: ModelConfig, checkpoint: Checkpoint, path: Path) -> ir.Model:
    """Trace the embedding merge: `input_ids` i64 [B, S], `image_features` f32 [M, H] -> `inputs_embeds` [B, S, H]."""
    ids = torch.empty(2, 3, dtype=torch.int64, device="meta")
    features = torch.empty(4, config.text.hidden_size, device="meta")
    shapes = ({0: Dim("batch"), 1: Dim("seq")}, {0: Dim("features")})
    names = (["input_ids", "image_features"], ["inputs_embeds"])
    model = _export(_Embed(_meta_model(config, checkpoint)), (ids, features), shapes, names)
    return _finish(model, checkpoint, path)


def _meta_model(config: ModelConfig, checkpoint: Checkpoint) -> Llama4:
    """The reference without weights, each parameter in the dtype that the checkpoint stores it in."""
    with torch.device("meta"):
        model = Llama4(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        dtype = TORCH_DTYPES[checkpoint.tensors[name].dtype]
        owner, _, leaf = name.rpartition(".")
        narrow = nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device="meta"), requires_grad=False)
        setattr(model.get_submodule(owner), leaf, narrow)
    return model.eval()


def _export(module: nn.Module, arguments: tuple, shapes: tuple, names: tuple[list[str], list[str]]) -> ir.Model:
    table: dict[Callable[..., Any], Callable[..., Any]] = {
        torch.ops.arriero.expert_dispatch.default: functions.expert_dispatch,
        torch.ops.arriero.cached_attention.default: functions.translate_attention,
        torch.ops.aten.floor_divide.default: functions.translate_floor_divide,
    }
    with torch.device("meta"), torch.no_grad(), _quiet():
        program = torch.onnx.export(
            module,
            arguments,
            dynamo=True,
            opset_version=functions.OPSET,
            dynamic_shapes=shapes,
            input_names=names[0],
            output_names=names[1],
            custom_translation_table=table,
            optimize=False,  # folding on meta weights fails, and would pull transposed weights into the proto
            verbose=False,
        )
    assert program is not None
    return program.model


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter warns about its own internals; none of it is a finding about the model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(logging.NOTSET)


def _name_layers(model: ir.Model, config: ModelConfig) -> None:
    """Name each custom node after its layer; the trace keeps the layers' order."""
    attentions = [node for node in model.graph if node.op_type == functions.CACHED_ATTENTION]
    dispatches = [node for node in model.graph if node.op_type == functions.EXPERT_DISPATCH]
    for index, node in enumerate(attentions):
        node.name = f"layers.{index}.{functions.CACHED_ATTENTION}"
    for index, node in zip(config.text.moe_layers, dispatches, strict=False):
        node.name = f"layers.{index}.{functions.EXPERT_DISPATCH}"


def _finish(model: ir.Model, checkpoint: Checkpoint, path: Path) -> ir.Model:
    """Tidy, make every weight symbolic, add the function bodies that are used, and save."""
    for value in list(model.graph.initializers.values()):
        value.name = str(value.name).removeprefix("model.")
        value.const_value = None  # a weight without values is what constant folding leaves alone
    fold_constants(model, input_size_limit=FOLD_LIMIT, output_size_limit=FOLD_LIMIT)
    passes = (
        tidy.IdentityEliminationPass(),
        tidy.CommonSubexpressionEliminationPass(),
        tidy.RemoveUnusedNodesPass(),
        tidy.RemoveUnusedOpsetsPass(),
        tidy.ClearMetadataAndDocStringPass(),
    )
    Sequential(*passes)(model)
    canonicalize_shape_sources(model)
    path.parent.mkdir(parents=True, exist_ok=True)
    for value in model.graph.initializers.values():
        if value.const_value is None:
            value.const_value = symbolic_weight(checkpoint.source(str(value.name)), path.parent)
    functions.add_functions(model)
    ir.save(model, path)
    return model


def symbolic_weight(source: WeightSource, folder: Path) -> ir.ExternalTensor:
    """A tensor of the checkpoint as an initialiser that says its name and nothing of where it is stored.

    The name stands as the location of external data: who lowers the graph asks the checkpoint for it, and a plain
    runtime finds it once `write_weights` has put the tensors there.
    """
    return ir.ExternalTensor(
        location=source.name,
        offset=0,
        length=source.nbytes,
        dtype=DTYPES[source.dtype],
        shape=ir.Shape(source.shape),
        name=source.name,
        base_dir=folder,
    )


def write_weights(model: ir.Model, checkpoint: Checkpoint, folder: Path) -> None:
    """Write each weight of a canonical graph in `folder` into a file of its name, so that a plain runtime runs it."""
    for name, value in model.graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor) and not (folder / name).exists():
            checkpoint.read(name).tofile(folder / name)
