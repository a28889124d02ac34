"""What keys and values take: of a target's cache, and of a context of any length."""

from __future__ import annotations

from typing import Any

from arriero.export.build_file.schema import Target
from arriero.graphs.config import TextConfig
from arriero.profiles.kv_cache import ITEM_BYTES, CacheType
from arriero.profiles.recipe import Profile
from arriero.profiles.schemes import Exact, Half
from arriero.traits import TRAITS

CONTEXTS = {"8k": 1 << 13, "128k": 1 << 17, "1M": 1 << 20, "10M": 10 << 20}
CACHE_BYTES = {**ITEM_BYTES, "bfloat16": 2}  # of a number in a cache of keys and values


def kv_bytes(text: TextConfig, tokens: int, item_bytes: int) -> int:
    """Bytes of the KV cache of one sequence of `tokens`; a chunked layer never holds more than its chunk."""
    slots = sum(min(tokens, text.chunk) if layer.chunked else tokens for layer in text.layers)
    return 2 * text.kv_heads * text.head_dim * item_bytes * slots


def cache_type(target: Target, profile: Profile) -> str:
    """The type of the target's keys and values: on GPUs as the profile computes, elsewhere as its graphs keep them."""
    formats = [rule.scheme.format for rule in profile.rules if isinstance(rule.scheme, Half)]
    return formats[0] if TRAITS[target.backend].compiles_for == "gpu" and formats else graph_cache(target, profile)


def graph_cache(target: Target, profile: Profile) -> CacheType:
    """The type of keys and values in the target's graphs: what it asks for.

    One that asks for none has float16 where the backend keeps it and the profile rounds weights anyway.
    """
    rounds = not all(rule.scheme.keeps_codes or isinstance(rule.scheme, Exact | Half) for rule in profile.rules)
    return target.kv_cache or ("float16" if rounds and "float16" in TRAITS[target.backend].cache_types else "float32")


def cache_bytes(target: Target, profile: Profile) -> int:
    """Bytes of one number in the target's cache of keys and values."""
    return CACHE_BYTES[cache_type(target, profile)]


def price_context(text: TextConfig, label: str, tokens: int) -> dict[str, Any]:
    """What a context of so many tokens costs: bytes of one sequence's cache, in each type of cache."""
    prices = {dtype: kv_bytes(text, tokens, size) for dtype, size in ITEM_BYTES.items()}
    return {"context": label, "tokens": tokens, **prices, "within_model": tokens <= text.max_positions}
