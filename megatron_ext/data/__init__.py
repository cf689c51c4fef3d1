"""Everything about data, from raw text to the samples that a training step reads.

The packages, and what each does:

readers/      read raw text: files, lines, documents
tokenizers/   text to ids and back
preprocess/   raw text to indexed datasets (tools/preprocess_data.py)
per_layer/    per-layer vocabularies and ids (tools/preprocess_per_layer_data.py)
indexed/      the files of a dataset: tokens, index and manifest
datasets/     choose what training reads and in which order: blends, splits, epochs, samplers
corpora/      a built-in corpus, tokenizer training, and the tools that verify, merge, split and shuffle datasets
files/        progress bars and optional packages
"""
