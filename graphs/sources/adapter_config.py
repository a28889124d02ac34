"""An adapter's adapter_config.json, as far as it decides what is added to the model; all else is refused by name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from arriero.errors import ArrieroError, Problems
from arriero.graphs.config_section import Section
from arriero.strict_json import read_json_object

FILE = "adapter_config.json"
AGAIN = "Copy the adapter again, as PEFT's save_pretrained left it"
MERGE = "Merge it with PEFT (merge_and_unload) and take the merged model"
# Settings that make another sum than W + scaling * B A, with the values under which they do not.
PLAIN: dict[str, tuple[Any, ...]] = {
    "use_dora": (False,),
    "use_qalora": (False,),
    "use_bdlora": (False, None),
    "lora_bias": (False,),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "layer_replication": (None, []),
    "trainable_token_indices": (None, [], {}),
    "megatron_config": (None,),
    "velora_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
}
# Ways to begin a training that take the first factors out of the model's own weights, and PEFT does so again when it
# opens the adapter.
TAKEN_OUT = ("pissa", "corda", "olora", "loftq", "lora_ga")
# What is of training alone, and what the adapter's tensors say as well.
WITHOUT_EFFECT = frozenset(
    "peft_type peft_version base_model_name_or_path revision task_type auto_mapping inference_mode runtime_config "
    "target_modules target_parameters exclude_modules layers_to_transform layers_pattern modules_to_save "
    "ensure_weight_tying lora_dropout loftq_config eva_config corda_config lora_ga_config qalora_group_size "
    "megatron_core".split()
)
READ = frozenset(("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "init_lora_weights", *PLAIN))
TURNS_SINCE = (0, 21)  # the version of PEFT since which A of a stack [E, K, N] has N

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class AdapterConfig:
    """A LoRA's ranks and scalings. `rank_pattern` and `alpha_pattern`: patterns of module names -> values."""

    path: Path
    rank: int
    alpha: float
    by_root: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    version: tuple[int, ...] | None

    @classmethod
    def read(cls, folder: Path) -> AdapterConfig:
        """Read the file in `folder`. Raises `Problems` with every setting that is not honoured."""
        path = folder / FILE
        if not path.is_file():
            what = "is missing" if folder.is_dir() else "there is no such folder"
            where = path if folder.is_dir() else folder
            raise ArrieroError(what, where=str(where), expected="a folder that PEFT saved an adapter in", remedy=AGAIN)
        data, problems = read_json_object(path, AGAIN), list[ArrieroError]()
        if data.get("peft_type") != "LORA":
            what = f"is an adapter of type {data.get('peft_type')!r}"
            raise ArrieroError(what, where=f"{path}:peft_type", expected="LORA", remedy=MERGE)
        section = Section(data, str(path), problems, separator=":", remedy=AGAIN)
        _refuse_other_sums(section)
        version = data.get("peft_version")
        if not isinstance(version, str | None):
            section.refuse("peft_version", f"is {version!r}"[:100], "a text")
        number = re.match(r"(\d+)\.(\d+)", str(version))
        config = cls(
            path,
            section.positive("r", 8),
            section.number("lora_alpha", 8.0, above=0),
            section.boolean("use_rslora", False),
            _patterns(section, "rank_pattern", lambda entries, pattern: entries.positive(pattern, 8)),
            _patterns(section, "alpha_pattern", lambda entries, pattern: entries.number(pattern, 8.0, above=0)),
            None if number is None else tuple(map(int, number.groups())),
        )
        if problems:
            raise Problems(f"the adapter {folder} cannot be honoured", problems)
        return config

    def scaling(self, module: str, rank: int) -> np.float32:
        """What B A of `module` is multiplied by. Raises ArrieroError where its factors are of another rank."""
        stated, alpha = _of(self.rank_pattern, module, self.rank), _of(self.alpha_pattern, module, self.alpha)
        if stated != rank:
            what = f"the factors of {module} are of rank {rank}"
            raise ArrieroError(what, where=f"{self.path}:r", expected=f"rank {stated}", remedy=AGAIN)
        return np.float32(alpha / (math.sqrt(rank) if self.by_root else rank))

    def turns_stacks(self, stored: str) -> bool:
        """Whether A of a stack has the outputs, where the shapes do not tell. Raises ArrieroError if nothing does."""
        if self.version is None:
            what = "could be either way round, since the model's experts are as wide as they are high"
            raise ArrieroError(what, where=stored, expected=f"the peft_version that wrote it in {FILE}", remedy=MERGE)
        return self.version >= TURNS_SINCE


def _refuse_other_sums(section: Section) -> None:
    """Refuse what makes another sum than W + scaling * B A, and keys of which nothing is known but that they are set.

    PEFT warns of the latter and leaves them aside; a number alone switches nothing on.
    """
    for key, plain in PLAIN.items():
        value = section.data.get(key, plain[0])
        if not any(value == one and type(value) is type(one) for one in plain):
            section.refuse(key, f"is {value!r}"[:100], f"{plain[0]!r}: a plain LoRA", MERGE)
    begun = section.data.get("init_lora_weights", True)
    if not isinstance(begun, bool | str | None):
        section.refuse("init_lora_weights", f"is {begun!r}"[:100], "true, false or a name")
    elif str(begun).lower().startswith(TAKEN_OUT):
        section.refuse(
            "init_lora_weights", f"is {begun!r}, which changes the model's own weights", "a plain LoRA", MERGE
        )
    for key in sorted(section.data.keys() - READ - WITHOUT_EFFECT):
        value = section.data[key]
        if value and (value is True or not isinstance(value, int | float)):
            remedy = f"{MERGE}; or remove the key where it matters in training alone"
            section.refuse(key, f"is {value!r}"[:100], "a setting that is known", remedy)


def _patterns(section: Section, key: str, read: Callable[[Section, str], Number]) -> dict[str, Number]:
    """Patterns of module names and the number of each."""
    entries = section.section(key)
    for pattern in entries.data:
        try:
            re.compile(pattern)
        except re.error as error:
            entries.refuse(pattern, f"is no regular expression ({error})", "a pattern of module names")
    return {pattern: read(entries, pattern) for pattern in entries.data}


def _of(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that the end of a module's name matches, as PEFT looks it up."""
    found = (value for pattern, value in patterns.items() if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module))
    return next(found, default)
