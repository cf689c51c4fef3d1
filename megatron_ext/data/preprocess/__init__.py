"""Turns raw text into indexed datasets; used by `tools/preprocess_data.py`.

The input is divided into chunks. A worker process tokenizes one chunk at a time and writes the result as a shard; the
parent process appends the shards to the datasets. The modules:

preprocess           one run: plan, tokenize, publish, write the manifest; the tool calls `Preprocessor`
scheduler            gives chunks of the input to workers and appends the shards they write, in order
worker_pool          the worker processes, which run any kind of task
encoding, gigatoken  turn text into ids: with gigatoken if it gives the same ids, otherwise with the tokenizer itself
shards               write the files of one chunk
assembly             appends shards to the growing datasets; writes the index
work_directory       the directory of an unfinished run: lock, plan, resumption, publication
preprocess_progress  the progress bar and the progress lines
"""
