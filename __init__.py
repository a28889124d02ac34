"""Arriero: Llama 4 mixture-of-experts checkpoints to proven edge bundles, and the runtime that serves them."""

from arriero.errors import ArrieroError, BelowThreshold, MachineLacks, Problems
from arriero.runtimes.api import load
from arriero.version import __version__

__all__ = ["ArrieroError", "BelowThreshold", "MachineLacks", "Problems", "__version__", "load"]
