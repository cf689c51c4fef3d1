"""Per-layer ids: a second id for each token, which selects rows of the per-layer embeddings of a PLE model.

`per_layer_ids = table[token_ids]`; used by `tools/preprocess_per_layer_data.py` and training. The modules:

strategies       names of the strategies
per_layer_vocab  builds a per-layer vocabulary and applies the strategies
per_layer_table  the table from token ids to per-layer ids, and its file
ngrams           numbers of n-grams of tokens, and the hash functions that map them to rows
per_layer_ids    computes the per-layer ids of a whole dataset and writes them as a second, aligned dataset
alignment        checks that a per-layer dataset belongs to a main dataset
"""
