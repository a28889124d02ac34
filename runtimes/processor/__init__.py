"""From messages and images to token ids and tiles, and back to text."""
