"""Checkpoints as they lie on disk: a file per layout, each giving a `WeightSource` per tensor."""
