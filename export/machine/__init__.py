"""This machine: memory, disk, and what it has and lacks."""
