"""Turns raw text into indexed datasets; used by `tools/preprocess_data.py`.

preprocess           one run: plan, tokenize, publish, write the manifest; the tool calls `Preprocessor`
scheduler            gives chunks of the input to workers and appends the shards they write, in order
worker_pool          the worker processes; it knows nothing of text
encoding, gigatoken  text to ids: by gigatoken if its ids are the same, otherwise by the tokenizer itself
shards               the files that a worker writes for one chunk
assembly             appends shards to the growing datasets; writes the index
work_directory       the directory of an unfinished run: lock, plan, resumption, publication by rename
preprocess_progress  the progress bar and the progress lines
"""
