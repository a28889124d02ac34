"""Which schemes of gate_up and down one of ONNX Runtime's nodes takes together."""

from __future__ import annotations

from arriero.errors import ArrieroError
from arriero.graphs.stored.channels import ByteScheme, linear_name
from arriero.profiles.schemes import Exact, IntBlock, Scheme


def check_pair(first: Scheme, second: Scheme, down: str) -> None:
    """Refuse schemes of a layer's gate_up and of its `down` that no single kernel takes."""
    expected = "both exact, both of one kind, or both block-wise with one block and accuracy_level"
    if isinstance(first, ByteScheme):
        alike = isinstance(second, ByteScheme) and linear_name(first) == linear_name(second)
        expected = f"{first.description} for both"
    elif isinstance(first, IntBlock) and isinstance(second, IntBlock):
        alike = (first.block, first.accuracy_level) == (second.block, second.accuracy_level)
    else:
        alike = isinstance(first, Exact) and isinstance(second, Exact)
    if not alike:
        raise ArrieroError(
            "the profile gives gate_up and down of one layer's experts schemes that no single kernel takes",
            where=down,
            expected=expected,
            remedy="Give both the same scheme, or keep both exact",
        )
