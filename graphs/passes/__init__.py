"""Graph passes, one verb per file."""
