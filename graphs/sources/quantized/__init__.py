"""How quantised checkpoints store a matrix: a file per library, called like its `quant_method` in config.json.

Each has `decode_tensors(settings, tensors, where)`: of the tensors as the files name them, those of the model, by the
same names without quantisation.
"""
