"""What a disk may do to a file while nobody looks."""

from __future__ import annotations

from pathlib import Path


def flip(path: Path, offset: int) -> None:
    """Change one bit of the byte at `offset`, counted from the end where negative; the size stays."""
    content = bytearray(path.read_bytes())
    content[offset] ^= 1
    path.write_bytes(content)
