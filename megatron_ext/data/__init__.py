"""Data: the steps from raw text to the samples that a training step reads.

Packages:

readers/      read raw text: files, lines, documents
tokenizers/   convert text to token ids and back
preprocess/   convert raw text to indexed datasets (tools/preprocess_data.py)
per_layer/    per-layer vocabularies and ids (tools/preprocess_per_layer_data.py)
indexed/      the files of a dataset: tokens, index and manifest
datasets/     choose the samples of a training run and their order: blends, splits, epochs, samplers
corpora/      a built-in corpus, tokenizer training, and the tools that verify, merge, split and shuffle datasets
files/        progress bars and optional packages
"""
