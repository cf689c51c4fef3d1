"""Per-layer ids, `per_layer_ids = table[token_ids]`; used by `tools/preprocess_per_layer_data.py` and training.

per_layer_vocab  the per-layer vocabulary and the strategies
per_layer_table  the table from token ids to per-layer ids, and its file
per_layer_ids    writes the ids of a whole dataset, as a dataset aligned with it
alignment        checks that a per-layer dataset belongs to a main one
"""
