"""Hugging Face's layout: config.json beside safetensors files, matrices plain or quantised by a library we know."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from arriero.errors import ArrieroError, raise_together
from arriero.graphs.names import canonical_name
from arriero.graphs.sources import quantized
from arriero.graphs.sources.fuse_experts import fuse_experts
from arriero.graphs.sources.layout import Layout
from arriero.graphs.sources.safetensors_files import open_safetensors
from arriero.graphs.sources.safetensors_header import REDOWNLOAD
from arriero.graphs.sources.weight_source import WeightSource
from arriero.strict_json import read_json_object

MODEL_TYPES = ("llama4", "llama4_text")
SETTINGS = ("quantization_config", "compression_config")  # the second is the name of early compressed-tensors
MODELOPT = "hf_quant_config.json"
HELPERS = ("codecs", "modules")
# What wrappers put before every name, and the tool that does.
WRAPPERS = {
    "base_model.model.": "PEFT",
    "module.": "DistributedDataParallel",
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
}


def open_folder(folder: Path) -> Layout:
    """The checkpoint in `folder`, every header proven sound.

    Raises `ArrieroError` for what makes reading pointless, `Problems` with every contradiction between the files.
    """
    config = read_config(folder)
    stored, files = open_safetensors(folder)
    _refuse_wrapped(stored)
    quantised = next(_settings(folder, config), None)
    if quantised is not None:
        settings, where = quantised
        stored = _decoder(settings, where).decode_tensors(settings, stored, where)
    plain = {key: value for key, value in config.items() if key not in SETTINGS}
    if isinstance(plain.get("text_config"), Mapping):
        plain["text_config"] = {key: value for key, value in plain["text_config"].items() if key not in SETTINGS}
    extra = [folder / MODELOPT] if (folder / MODELOPT).is_file() else []
    return Layout("Hugging Face", plain, fuse_experts(_canonical(stored)), [*extra, *files], folder)


def read_config(folder: Path) -> dict[str, Any]:
    """Read `folder`/config.json, refusing what is not a Llama 4."""
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            base = read_json_object(folder / "adapter_config.json", REDOWNLOAD).get("base_model_name_or_path")
            raise ArrieroError(
                f"is an adapter, not a model; its base is {base or 'not named'}",
                where=str(folder),
                expected="the folder of a checkpoint",
                remedy=f"Write the base model under `model` and this folder under `adapters: [{folder}]`",
            )
        remedy = f"Download {path.name} from the model's page into {folder}"
        raise ArrieroError("is missing", where=str(path), remedy=remedy)
    config = read_json_object(path, REDOWNLOAD)
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        stated = f"model_type is {model_type!r}" if "model_type" in config else "model_type is missing"
        remedy = "Arriero exports Llama 4 checkpoints only; no other architecture is approximated"
        raise ArrieroError(stated, where=f"{path}:model_type", expected="llama4 or llama4_text", remedy=remedy)
    return config


def _settings(folder: Path, config: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], str]]:
    """What says how the weights are quantised, and where it stands; config.json comes first."""
    sections = {"": config, "text_config.": config.get("text_config")}
    for prefix, section in sections.items():
        for key in SETTINGS:
            settings = section.get(key) if isinstance(section, Mapping) else None
            if settings is None:
                continue
            where = f"{folder / 'config.json'}:{prefix}{key}"
            if not isinstance(settings, Mapping):
                raise ArrieroError(
                    f"is a {type(settings).__name__}", where=where, expected="an object", remedy=REDOWNLOAD
                )
            yield settings, where
    if (folder / MODELOPT).is_file():
        yield {"quant_method": "modelopt", **read_json_object(folder / MODELOPT, REDOWNLOAD)}, str(folder / MODELOPT)


def _decoder(settings: Mapping[str, Any], where: str) -> Any:
    """The module that reads the library's format, by the name that the library gives itself."""
    method = settings.get("quant_method", "compressed-tensors" if "config_groups" in settings else None)
    known = sorted(module.name for module in pkgutil.iter_modules(quantized.__path__) if module.name not in HELPERS)
    file = str(method).replace("-", "_")
    module = next((name for name in known if file == name or file.startswith(f"{name}_")), None)
    if module is None:
        raise ArrieroError(
            f"quant_method is {method!r}" if "quant_method" in settings else "quant_method is missing",
            where=where,
            expected=f"one of {', '.join(name.replace('_', '-') for name in known)}",
            remedy="Use another release of the model; or if the key is a left-over beside plain weights, remove it",
        )
    return import_module(f"{quantized.__name__}.{module}")


def _refuse_wrapped(stored: Mapping[str, WeightSource]) -> None:
    for prefix, tool in WRAPPERS.items():
        if stored and all(name.startswith(prefix) for name in stored):
            first = next(iter(stored.values()))
            raise ArrieroError(
                f"every tensor's name begins with `{prefix}`, which {tool} adds",
                where=first.stored,
                expected=first.name.removeprefix(prefix),
                remedy="Save the model that is inside the wrapper; for an adapter, write it under `adapters`",
            )


def _canonical(stored: Mapping[str, WeightSource]) -> dict[str, WeightSource]:
    """The tensors by their canonical names. Raises an error where two have one."""
    named: dict[str, WeightSource] = {}
    problems = []
    for raw, source in stored.items():
        name = canonical_name(raw)
        if name in named:
            what = f"is stored twice, first as {named[name].stored}"
            problems.append(ArrieroError(what, where=source.stored, remedy="Remove one of the two files or names"))
        named[name] = replace(source, name=name)  # type: ignore[type-var]
    raise_together(problems, "the checkpoint holds tensors twice")
    return named
