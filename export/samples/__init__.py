"""Sample sets: embedded, JSONL files, folders of images."""
