"""Data: from raw text to what a training step reads.

readers/      raw text in: files, lines, documents
tokenizers/   text to ids and back
preprocess/   raw text to indexed datasets (tools/preprocess_data.py)
per_layer/    per-layer vocabularies and ids (tools/preprocess_per_layer_data.py)
indexed  manifest           the files of a dataset: index, and what made it
verify  rewrite  console    the rest of the tools: full verification; merge, split, shuffle; their bar
gpt_dataset  blends  samplers  sample_ids   what training reads, in which order, under which names
unigram       the simplest model to beat
corpus        real text that is on every machine
"""
