"""TVM's side: lowered graphs imported into Relax."""
