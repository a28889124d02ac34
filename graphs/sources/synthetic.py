"""Synthetic models: a released Llama 4 at its true shapes, drawn from a seed when it is read; nothing is stored.

`synthetic://scout?layers=4&seed=0` is the first four layers of Scout. It is as fast and as large as the real model;
what it answers is noise. Its tokenizer is the embedded model's, a small one, for which the vocabulary has room.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from arriero.errors import ArrieroError, MachineLacks, nearest
from arriero.graphs.config import ModelConfig
from arriero.graphs.names import expected_tensors
from arriero.graphs.sources.drawn_weight import DRAWING, drawn_weight
from arriero.graphs.sources.layout import Layout
from arriero.graphs.sources.llama4_defaults import default_side_files
from arriero.graphs.sources.released_configs import RELEASED, released_config
from arriero.graphs.sources.spread import spread_of
from arriero.strict_json import read_json_object

SCHEME = "synthetic://"
LAYOUT = "synthetic"
EMBEDDED_MODEL = Path(__file__).parents[2] / "models" / "chasqui"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
WHOLE_IDS = ("boi_token_index", "eoi_token_index", "image_token_index")
TEXT_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True)
class SyntheticModel:
    """A released model's name, how many of its layers, and the seed of its tensors."""

    name: str
    layers: int
    seed: int

    @classmethod
    def parse(cls, url: str) -> SyntheticModel:
        """The model of a URL; all layers and seed 0 where it does not say. Raises ArrieroError."""

        def refuse(what: str, remedy: str | None = None) -> NoReturn:
            expected = f"{SCHEME}NAME?layers=N&seed=N, with NAME one of {', '.join(RELEASED)}"
            raise ArrieroError(what, expected=expected, remedy=remedy or f"For example {SCHEME}scout?layers=4&seed=0")

        if not url.startswith(SCHEME):
            refuse(f"{url!r} is malformed")
        name, mark, query = url.removeprefix(SCHEME).partition("?")
        if name not in RELEASED:
            refuse(f"there is no synthetic model {name!r}", nearest(name, RELEASED))
        most = released_config(name)["text_config"]["num_hidden_layers"]
        values = {"layers": most, "seed": 0}
        written: set[str] = set()
        for entry in query.split("&") if mark else ():
            key, _, value = entry.partition("=")
            if key not in values:
                refuse(f"{url} has the unknown key {key!r}", nearest(key, values))
            if key in written:
                refuse(f"{url} has the key {key!r} twice")
            if not re.fullmatch(r"[0-9]{1,18}", value):
                refuse(f"{url}: {key} is {value!r}, not a whole number")
            written.add(key)
            values[key] = int(value)
        if not 1 <= values["layers"] <= most:
            refuse(f"{url}: there are no {values['layers']} layers in {name}", f"Give 1 to {most}")
        return cls(name, **values)

    def __str__(self) -> str:
        return f"{SCHEME}{self.name}?layers={self.layers}&seed={self.seed}"

    def config(self) -> dict[str, Any]:
        """Its config.json, with the token ids of the embedded model's tokenizer."""
        config, embedded = released_config(self.name), read_json_object(_embedded("config.json"), "Fetch it again")
        text = config["text_config"]
        text["num_hidden_layers"] = self.layers
        text["no_rope_layers"] = text["no_rope_layers"][: self.layers]
        if "moe_layers" in text:
            text["moe_layers"] = [layer for layer in text["moe_layers"] if layer < self.layers]
        text |= {key: embedded["text_config"][key] for key in TEXT_IDS}
        return config | {key: embedded[key] for key in WHOLE_IDS}


def open_synthetic(model: SyntheticModel) -> Layout:
    """The layout of a synthetic model, whose tensors are drawn when they are read."""
    url, config = str(model), model.config()
    parsed = ModelConfig.from_dict(config, url)
    tensors = {
        name: drawn_weight(name, shape, *spread_of(name, shape, parsed), model.seed, url)
        for name, shape in expected_tensors(parsed).items()
    }
    # Everything that decides a number is among these texts, as there are no files for the checkpoint's hash.
    made = {
        "config.json": json.dumps(config, indent=1),
        "synthetic.json": json.dumps({"model": url, "drawing": DRAWING}),
        **default_side_files(config["vision_config"]),
        **{name: _embedded(name).read_text(encoding="utf-8") for name in TOKENIZER},
    }
    return Layout(LAYOUT, config, dict(tensors), [], None, made)


def _embedded(name: str) -> Path:
    file = EMBEDDED_MODEL / name
    if not file.is_file():
        what = "a synthetic model takes its tokenizer from the embedded model, which is not there"
        raise MachineLacks(what, where=str(file), remedy="Run from a checkout of the repository, which has the file")
    return file
