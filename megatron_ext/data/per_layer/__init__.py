"""Per-layer ids, `per_layer_ids = table[token_ids]`, the machinery of `tools/preprocess_per_layer_data.py`.

vocab      the per-layer vocabulary and the strategies
table      the table from token ids to per-layer ids, and its file
ids        the ids of a whole dataset, written as a dataset aligned with it
alignment  whether a per-layer dataset belongs to a main one
"""
