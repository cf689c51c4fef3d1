"""Raw text to indexed datasets, the machinery of `tools/preprocess_data.py`.

run             one run: plan, tokenize, publish, describe; `Preprocessor` is what the tool calls
scheduler       gives chunks of the input to workers and their shards to the assembly, in order
worker_pool     worker processes whose death is noticed at once; knows nothing of text
encoding        text to ids: gigatoken where it is proven equal, else the tokenizer itself
shards          what a worker writes for one chunk
assembly        appends shards to the growing datasets; writes the index
work_directory  where an unfinished run lives: lock, plan, resumption, publication by rename
progress        the bar and the progress lines
"""
