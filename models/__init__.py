"""The embedded model: its tokenizer, its checkpoint layout and its training, from generated data alone."""
