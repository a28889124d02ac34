"""Every layout that people have, written by the library that writes it, read as that library reads it.

The judge of a value is the library that wrote the file: its own dequantisation, in float32 where it has one.
"""

from __future__ import annotations

import functools
import importlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arriero.errors import ArrieroError
from arriero.export.pipeline.ignored_files import ignored_files
from arriero.graphs.checkpoint import Checkpoint
from arriero.graphs.names import expected_tensors
from arriero.graphs.sources.ledger import check_ledger
from arriero.profiles.float8 import Float8, dequantize_float8
from arriero.profiles.quantize import dequantize
from arriero.runtimes.processor.chat_template import find_templates
from tests.layouts.spoil import MATRIX, spoiled
from tests.small import CHASQUI, cut_chasqui, small_scout

WRITERS = ("split_experts", "compressed_tensors", "bitsandbytes", "modelopt", "gguf", "meta")


def _kinds() -> list[Any]:
    """A case per writer and kind, skipped with what it needs where the writer's library is missing."""
    cases = []
    for name in WRITERS:
        try:
            module = importlib.import_module(f"tests.layouts.{name}")
        except ImportError as error:
            needs = pytest.mark.skip(reason=f"needs {error.name}, of the extra `test`")
            cases.append(pytest.param(name, "", marks=needs, id=name))
            continue
        kinds = getattr(module, "SCHEMES", None) or module.KINDS
        cases += [pytest.param(name, kind, id=f"{name}-{kind}") for kind in kinds]
    return cases


Written = tuple[Path, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all layouts are written of: trained weights, as few as have every kind of tensor."""
    return cut_chasqui(tmp_path_factory.mktemp("cut") / "chasqui", layers=2, experts=4)


@pytest.fixture(scope="module")
def written(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Written]:
    """The folder of each layout and what its library reads of it, written when it is first asked for."""

    @functools.cache
    def write(name: str, kind: str) -> Written:
        folder = tmp_path_factory.mktemp(name) / "c"
        return folder, importlib.import_module(f"tests.layouts.{name}").write(original, folder, kind, torch.bfloat16)

    return write


def _expert_stack(state: dict[str, torch.Tensor], name: str, experts: int) -> torch.Tensor:
    """A stack of experts [E, K, N] of what a library has one by one, or as stacks [E, N, K]."""
    stem, _, leaf = name.rpartition(".")
    matrices = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else ("down_proj",)

    def one(expert: int, matrix: str) -> torch.Tensor:
        single = f"{stem}.{expert}.{matrix}.weight"
        return state[single] if single in state else state[f"{stem}.{matrix}"][expert]

    return torch.stack([torch.cat([one(expert, each) for each in matrices]).T for expert in range(experts)])


@pytest.mark.parametrize(("name", "kind"), _kinds())
def test_values_are_the_librarys_own(written: Callable[[str, str], Written], name: str, kind: str) -> None:
    folder, state = written(name, kind)
    checkpoint = Checkpoint.open(folder)
    check_ledger(checkpoint.tensors.values(), expected_tensors(checkpoint.model_config()))
    for tensor, source in checkpoint.tensors.items():
        ours = torch.from_numpy(checkpoint.read_float32(tensor).copy())
        direct = (
            tensor in state and state[tensor].shape == ours.shape and not (name == "gguf" and ".experts." in tensor)
        )
        theirs = state[tensor] if direct else _expert_stack(state, tensor, source.shape[0])
        # Rounded once to the dtype that the library gives, exact products are what it has.
        assert torch.equal(ours.to(theirs.dtype), theirs), f"{tensor} ({source.form})"
        part = checkpoint.read_float32(tensor, 1, min(3, source.shape[0]))
        assert np.array_equal(part, ours.numpy()[1:3])


@pytest.mark.parametrize(("name", "kind"), _kinds())
def test_kept_codes_stand_for_the_same_values(written: Callable[[str, str], Written], name: str, kind: str) -> None:
    checkpoint = Checkpoint.open(written(name, kind)[0])
    held = {tensor: source for tensor, source in checkpoint.tensors.items() if source.codes is not None}
    assert {tensor: source.codes.form for tensor, source in held.items() if source.codes} == {
        tensor: form for tensor, form in checkpoint.quantised.items() if form is not None
    }
    for tensor, source in held.items():
        assert source.codes is not None
        for start, stop in ((0, source.shape[0]), (1, 2)):
            codes = source.codes.read(start, stop)
            values = dequantize_float8(codes) if isinstance(codes, Float8) else dequantize(codes)
            rows = checkpoint.read_float32(tensor, start, stop)
            narrow = np.float16 if source.codes.scales == "F16" else np.float32
            assert np.array_equal(codes.scales.astype(narrow), codes.scales)
            assert source.codes.scales == ("F16" if name == "gguf" else "F32")
            assert np.array_equal(values.transpose(0, 2, 1) if values.ndim == 3 else values, rows), tensor


# Which layouts keep their codes, by how many of the 18 quantised matrices and stacks of two layers.
KEPT = {
    ("compressed_tensors", "fp8-dynamic"): 18,
    ("compressed_tensors", "w4a16"): 18,
    ("compressed_tensors", "w4a16-channel"): 18,
    ("compressed_tensors", "w4a16-asymmetric"): 0,
    ("compressed_tensors", "nvfp4"): 0,
    ("modelopt", "fp8"): 18,
    ("gguf", "Q8_0"): 20,  # the embeddings and the head as well
    ("gguf", "Q4_0"): 20,
    ("gguf", "Q4_K"): 0,
    ("bitsandbytes", "nf4"): 0,
}


@pytest.mark.parametrize(("name", "kind"), [case for case in _kinds() if tuple(case.values) in KEPT])
def test_what_is_kept_and_what_is_rounded_anew(written: Callable[[str, str], Written], name: str, kind: str) -> None:
    quantised = Checkpoint.open(written(name, kind)[0]).quantised
    assert sum(form is not None for form in quantised.values()) == KEPT[name, kind]
    assert len(quantised) >= 18


@pytest.mark.parametrize(("name", "kind"), [("gguf", "Q8_0"), ("meta", "2")])
def test_layouts_without_a_config_give_the_same_model(
    original: Path, written: Callable[[str, str], Written], name: str, kind: str
) -> None:
    pytest.importorskip(f"tests.layouts.{name}", exc_type=ImportError)
    ours, theirs = (Checkpoint.open(folder).model_config() for folder in (written(name, kind)[0], original))
    assert ours.vision == theirs.vision
    assert ours.image_token_id == theirs.image_token_id
    assert ours.bos_token_id == theirs.bos_token_id
    assert set(theirs.eos_token_ids) <= set(ours.eos_token_ids)
    differing = {key for key, value in vars(ours.text).items() if value != getattr(theirs.text, key)}
    # Meta's file says no context, and neither format the width of dense layers where there are none.
    assert differing <= {"meta": {"max_positions", "dense_ffn"}, "gguf": {"dense_ffn"}}[name]


def test_inputs_in_activation_order_have_the_scales_of_their_own_group(tmp_path: Path, packed: Path) -> None:
    """The same values with every matrix's groups of scales the other way round, and `g_idx` saying so."""

    def reverse(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(".weight_scale")]:
            groups = tensors[name].shape[1]
            tensors[name] = tensors[name].flip(1).contiguous()
            order = groups - 1 - torch.arange(32 * groups, dtype=torch.int32) // 32
            tensors[name.replace("weight_scale", "weight_g_idx")] = order

    plain, ordered = Checkpoint.open(packed), Checkpoint.open(_edited(packed, tmp_path / "c", reverse))
    for name, source in ordered.tensors.items():
        assert np.array_equal(ordered.read_float32(name), plain.read_float32(name)), name
        assert source.form == plain.tensors[name].form or source.form == "int4 block 32 reordered"
    assert not any(form for form in ordered.quantised.values())  # our kernels' groups lie in order


@pytest.mark.parametrize(("name", "kind"), _kinds())
def test_nan_is_refused_where_values_are_made_and_where_codes_are_read(
    written: Callable[[str, str], Written], tmp_path: Path, name: str, kind: str
) -> None:
    parts = []
    for part, folder in spoiled(written(name, kind)[0], tmp_path):
        source = Checkpoint.open(folder).source(MATRIX)
        reads = [source.rows] if source.codes is None else [source.rows, source.codes.read]
        for read in reads:
            with pytest.raises(ArrieroError, match=r"layers.1.feed_forward.experts.* is NaN or infinite; expected"):
                read(0, source.shape[0])
        parts.append(part)
    assert parts


# --- bad input --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(written: Callable[[str, str], Written]) -> Path:
    return written("compressed_tensors", "w4a16")[0]


def _edited(source: Path, folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    from safetensors.torch import load_file, save_file

    folder.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = {name: value for file in source.glob("*.safetensors") for name, value in load_file(file).items()}
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    return folder


EXPERT = "language_model.model.layers.1.feed_forward.experts.3.up_proj"
BROKEN: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "an expert without its scale": (
        lambda t: t.pop(f"{EXPERT}.weight_scale"),
        r"weight_packed.*has no weight_scale|has no weight_scale, only weight_packed.*a scale with every weight",
    ),
    "a scale without its weight": (
        lambda t: t.pop(f"{EXPERT}.weight_packed"),
        r"has no weight, only weight_scale, weight_shape",
    ),
    "a scale of another shape": (
        lambda t: t.update({f"{EXPERT}.weight_scale": t[f"{EXPERT}.weight_scale"][:, :2].clone()}),
        r"weight_scale has shape \[128, 2\]; expected \[128, 8\]",
    ),
    "a missing expert": (
        lambda t: [t.pop(name) for name in [*t] if name.startswith(f"{EXPERT}.")],
        r"experts.3.up_proj.weight is missing",
    ),
    "mixed schemes in one layer": (
        lambda t: (
            [t.pop(name) for name in [*t] if name.startswith(f"{EXPERT}.")],
            t.update({f"{EXPERT}.weight": torch.zeros(128, 256, dtype=torch.bfloat16)}),
        ),
        r"is stored as bf16; expected int4 block 32.*stored alike",
    ),
    "nan in a scale": (
        lambda t: t[f"{EXPERT}.weight_scale"].fill_(float("nan")),
        r"is NaN or infinite",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_quantised_checkpoint_is_refused_by_name(tmp_path: Path, packed: Path, case: str) -> None:
    edit, message = BROKEN[case]
    folder = _edited(packed, tmp_path / "c", edit)
    with pytest.raises(ArrieroError) as caught:
        _read_all(folder)
    text = str(caught.value)
    assert re.search(message, text, re.DOTALL), text
    assert "layers.1.feed_forward.experts" in text


def _read_all(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    for name in checkpoint.tensors:
        checkpoint.read(name)


def _with_settings(source: Path, folder: Path, settings: Any) -> Path:
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return folder


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"quant_method": "gptq"},
            "quant_method is 'gptq'; expected one of bitsandbytes, compressed-tensors, modelopt",
        ),
        ({}, "quant_method is missing"),
        ("fp8", "quantization_config: is a str; expected an object"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, "quant_algo is 'W4A8_AWQ'; expected FP8 or NVFP4"),
        ({"quant_method": "compressed-tensors"}, "holds no config_groups"),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 2, "type": "int"}}}},
            "stores weights as 2-bit int; expected float-quantized",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}}},
                "transform_config": {"config_groups": {"R1": {}}},
            },
            "rotates weights",
        ),
    ],
)
def test_a_quantisation_that_is_not_read_is_refused_with_those_that_are(
    tmp_path: Path, settings: Any, message: str
) -> None:
    with pytest.raises(ArrieroError) as caught:
        Checkpoint.open(_with_settings(CHASQUI, tmp_path / "c", settings))
    assert message in str(caught.value)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
def test_wrapped_names_are_refused_with_the_tool_that_wrapped_them(tmp_path: Path, prefix: str) -> None:
    def wrap(tensors: dict[str, torch.Tensor]) -> None:
        for name in [*tensors]:
            tensors[prefix + name] = tensors.pop(name)

    tools = {"module.": "DistributedDataParallel", "_orig_mod.": "torch.compile", "base_model.model.": "PEFT"}
    with pytest.raises(ArrieroError, match=rf"begins with `{re.escape(prefix)}`, which {tools[prefix]} adds"):
        Checkpoint.open(_edited(CHASQUI, tmp_path / "c", wrap))


@pytest.mark.parametrize("prefix", ["", "model."])
def test_names_without_the_language_models_prefix_are_read(tmp_path: Path, prefix: str) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for name in [*tensors]:
            inner = name.removeprefix("language_model.")
            inner = f"language_model.{inner.removeprefix('model.')}" if prefix and inner.startswith("model.") else inner
            tensors[inner if inner.startswith("lm_head") else prefix + inner] = tensors.pop(name)

    renamed = Checkpoint.open(_edited(CHASQUI, tmp_path / "c", rename))
    assert set(renamed.tensors) == set(Checkpoint.open(CHASQUI).tensors)


def test_a_pickle_that_carries_code_is_refused_and_nothing_of_it_runs(
    written: Callable[[str, str], Written], tmp_path: Path
) -> None:
    shutil.copytree(written("meta", "1")[0], tmp_path / "c")
    witness = tmp_path / "ran"

    class Bomb:
        def __reduce__(self) -> Any:
            return (Path.touch, (witness,))

    torch.save({"norm.weight": Bomb()}, tmp_path / "c" / "consolidated.00.pth")
    with pytest.raises(ArrieroError, match=r"consolidated.00.pth: .*code that a file brings is never run"):
        Checkpoint.open(tmp_path / "c")
    assert not witness.exists()


def test_a_missing_rank_and_metas_own_quantisation_are_refused(
    written: Callable[[str, str], Written], tmp_path: Path
) -> None:
    shutil.copytree(written("meta", "2")[0], tmp_path / "c")
    (tmp_path / "c" / "fp8_scales_0.pt").touch()
    with pytest.raises(ArrieroError, match=r"quantised in Meta's own way \(fp8_scales_0.pt\)"):
        Checkpoint.open(tmp_path / "c")
    (tmp_path / "c" / "fp8_scales_0.pt").unlink()
    (tmp_path / "c" / "consolidated.00.pth").unlink()
    with pytest.raises(ArrieroError, match=r"consolidated.00.pth: is missing"):
        Checkpoint.open(tmp_path / "c")


def test_gguf_files_that_are_not_whole_or_of_another_model_are_refused(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="needs the package gguf")
    file = tmp_path / "c" / "model.gguf"
    file.parent.mkdir()
    writer = gguf.GGUFWriter(file, "qwen3moe")
    writer.add_block_count(1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ArrieroError, match=r"architecture 'qwen3moe'; expected llama4"):
        Checkpoint.open(file)
    file.write_bytes(b"GGUF" + bytes(20))
    with pytest.raises(ArrieroError, match=r"model.gguf: is no sound GGUF file"):
        Checkpoint.open(file)
    (file.parent / "other.gguf").write_bytes(file.read_bytes())
    with pytest.raises(ArrieroError, match=r"holds 2 models: model.gguf, other.gguf; expected one. Name the file"):
        Checkpoint.open(file.parent)


@pytest.mark.parametrize("own", [False, True])
def test_a_gguf_files_templates_with_names_are_those_of_its_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: bool
) -> None:
    """Unless the folder has any of its own: templates of two sources do not belong together."""
    layout = pytest.importorskip("tests.layouts.gguf", exc_type=ImportError)
    add, names = layout.gguf.GGUFWriter.add_chat_template, ("default", "tool_use", "rag")

    def add_several(writer: Any, text: str) -> None:
        add(writer, [{"name": name, "template": f"{name} of the file"} for name in names])

    monkeypatch.setattr(layout.gguf.GGUFWriter, "add_chat_template", add_several)
    small_scout(tmp_path / "model", vision=False)
    layout.write(tmp_path / "model", tmp_path / "c", "F16")
    if own:
        (tmp_path / "c" / "chat_template.json").write_text('{"chat_template": "own"}')
    checkpoint = Checkpoint.open(tmp_path / "c")
    texts = {name: source.text for name, source in find_templates(checkpoint.side_folder, {}, {}).items()}
    assert texts == ({"default": "own"} if own else {name: f"{name} of the file" for name in ("default", "tool_use")})
    told = [sentence.partition(":")[0] for sentence in ignored_files(checkpoint.side_folder)]
    assert told == ([] if own else ["the chat templates rag are ignored"])
