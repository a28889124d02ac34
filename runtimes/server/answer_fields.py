"""What a request says of its answers: how many, how their tokens are chosen, when they end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from arriero.runtimes.server.fields import Fields
from arriero.runtimes.server.models import Model, Models
from arriero.runtimes.server.options import ServerOptions
from arriero.runtimes.settings import Settings

# What clients send that says nothing of an answer's text.
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "verbosity")
MOST_TOP_LOGPROBS, MOST_STOPS, MOST_BIASES = 20, 16, 10_000


@dataclass(frozen=True)
class AnswerFields:
    """The fields that all ways to ask have in common."""

    model: Model
    settings: Settings
    count: int
    stream: bool
    include_usage: bool

    def settings_of(self, number: int) -> Settings:
        """The settings of answer `number`: each draws by a seed of its own, so that they differ and repeat."""
        seed = self.settings.get("seed")
        if seed is None or number == 0:
            return self.settings
        return {**self.settings, "seed": seed + number}


def read_answer_fields(
    fields: Fields, models: Models, options: ServerOptions, default_tokens: int | None
) -> AnswerFields:
    """Read them; `default_tokens` is how long an answer may be where the request does not say."""
    model = models.get(fields.text("model"))
    settings = read_sampling(fields, model)
    settings["max_tokens"] = read_most_tokens(fields, ("max_tokens", "max_completion_tokens"), options, default_tokens)
    stream = fields.flag("stream")
    include_usage = read_stream_options(fields, stream)
    count = fields.integer("n", 1, least=1, most=options.most_answers)
    fields.ignore(IGNORED)
    return AnswerFields(model, settings, count or 1, stream, include_usage)


def read_sampling(fields: Fields, model: Model) -> Settings:
    """How an answer's tokens are chosen, and the texts that end it."""
    settings: Settings = {
        "temperature": fields.number("temperature", 1.0) or 0.0,
        "top_p": fields.number("top_p"),
        "top_k": fields.integer("top_k", least=1),
        "min_p": fields.number("min_p"),
        "repetition_penalty": fields.number("repetition_penalty", 1.0) or 0.0,
        "presence_penalty": fields.number("presence_penalty", 0.0) or 0.0,
        "frequency_penalty": fields.number("frequency_penalty", 0.0) or 0.0,
        "seed": fields.integer("seed"),
        "logit_bias": _bias(fields),
        "stop": read_stops(fields, "stop"),
        "adapter": model.adapter,
    }
    if settings["seed"] is not None and settings["seed"] < 0:
        settings["seed"] += 1 << 63  # others draw by any whole number
    return settings


def read_most_tokens(
    fields: Fields, names: Sequence[str], options: ServerOptions, default: int | None = None
) -> int | None:
    """How long an answer may be: the least that the fields `names` and `options` say; None is what fits the context."""
    asked = [limit for name in names if (limit := fields.integer(name, least=1)) is not None]
    if not asked and default is not None:
        asked = [default]
    return min([*asked, *([] if options.most_tokens is None else [options.most_tokens])], default=None)


def read_stream_options(fields: Fields, stream: bool) -> bool:
    """Whether the stream tells the usage."""
    said = fields.fields("stream_options")
    if said is None:
        return False
    if not stream:
        raise fields.refusal("stream_options", "goes with stream only")
    include_usage = said.flag("include_usage")
    said.ignore(("include_obfuscation",))
    said.refuse_others()
    return include_usage


def _bias(fields: Fields) -> dict[int, float] | None:
    said: Any = fields.take("logit_bias")
    if said is None:
        return None
    if not isinstance(said, dict):
        raise fields.refusal("logit_bias", "is no object; expected numbers by token id")
    if len(said) > MOST_BIASES:
        raise fields.refusal("logit_bias", f"holds {len(said):,} entries; expected at most {MOST_BIASES:,}")
    bias: dict[int, float] = {}
    for token, value in said.items():
        if not token.isdecimal() or len(token) > 9 or isinstance(value, bool) or not isinstance(value, int | float):
            raise fields.refusal(
                "logit_bias", f"has the entry {token!r:.20}: {value!r:.20}; expected numbers by token id"
            )
        bias[int(token)] = float(value)
    return bias


def read_stops(fields: Fields, name: str) -> tuple[str, ...]:
    """The texts of the field `name` that end an answer."""
    said: Any = fields.take(name, ())
    stops = (said,) if isinstance(said, str) else said
    if isinstance(stops, list) and len(stops) > MOST_STOPS:
        raise fields.refusal(name, f"holds {len(stops):,} texts; expected at most {MOST_STOPS}")
    if not isinstance(stops, list | tuple) or not all(isinstance(text, str) and text for text in stops):
        raise fields.refusal(name, "is no text; expected a string or a list of strings")
    return tuple(stops)
