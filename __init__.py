"""Arriero: Llama 4 mixture-of-experts checkpoints to proven edge bundles, and the runtime that serves them."""

from arriero.errors import ArrieroError, BelowThreshold, MachineLacks, Problems
from arriero.runtimes.api import load
from arriero.runtimes.chat_session import Chat
from arriero.runtimes.forced_calls import ForcedCalls
from arriero.runtimes.generation import Generation, TokenLogprobs
from arriero.runtimes.processor.tool_calls import ToolCall, parse_tool_calls
from arriero.runtimes.sampling import Sampling
from arriero.runtimes.session import Session
from arriero.runtimes.stream import Stream
from arriero.version import __version__

__all__ = [
    "ArrieroError",
    "BelowThreshold",
    "Chat",
    "ForcedCalls",
    "Generation",
    "MachineLacks",
    "Problems",
    "Sampling",
    "Session",
    "Stream",
    "TokenLogprobs",
    "ToolCall",
    "__version__",
    "load",
    "parse_tool_calls",
]
