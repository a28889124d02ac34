"""An adapter's adapter_config.json, as far as it decides what is added to the model; all else is refused by name."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arriero.errors import ArrieroError, Problems
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
TURNS_SINCE = (0, 21)  # the version of PEFT since which A of a stack [E, K, N] has N


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
        for key, plain in PLAIN.items():
            if key in data and not any(data[key] == one and type(data[key]) is type(one) for one in plain):
                what, expected = f"is {data[key]!r}"[:100], f"{plain[0]!r}: a plain LoRA"
                problems.append(ArrieroError(what, where=f"{path}:{key}", expected=expected, remedy=MERGE))
        for key in ("rank_pattern", "alpha_pattern"):
            entries = data.get(key) or {}
            numbers = isinstance(entries, Mapping) and all(_is_number(value) for value in entries.values())
            if not numbers or not all(_is_pattern(entry) for entry in entries):
                problems.append(ArrieroError("is malformed", where=f"{path}:{key}", expected="pattern -> number"))
        for key in ("r", "lora_alpha"):
            if not _is_number(data.get(key)):
                problems.append(
                    ArrieroError(f"is {data.get(key)!r}", where=f"{path}:{key}", expected="a number above 0")
                )
        if problems:
            raise Problems(f"the adapter {folder} cannot be honoured", problems)
        version = re.match(r"(\d+)\.(\d+)", str(data.get("peft_version")))
        return cls(
            path,
            int(data["r"]),
            float(data["lora_alpha"]),
            data.get("use_rslora") is True,
            data.get("rank_pattern") or {},
            data.get("alpha_pattern") or {},
            None if version is None else tuple(map(int, version.groups())),
        )

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


def _of(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that the end of a module's name matches, as PEFT looks it up."""
    found = (value for pattern, value in patterns.items() if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", module))
    return next(found, default)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True
