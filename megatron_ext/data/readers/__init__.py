"""Reads raw text: finds the files and divides them into chunks (`sources`), divides chunks into lines (`lines`) and
parses lines into documents (`documents`).

A chunk is the unit of work of one worker process. Chunks depend on the input alone, not on the number of workers, so
a run can be resumed with another number of workers.
"""

from megatron_ext.data.readers.documents import Batch, Reject, Text, iter_documents, read_chunk
from megatron_ext.data.readers.sources import Chunk, TextSource, expand_inputs, plan_chunks

__all__ = [
    "Batch",
    "Chunk",
    "Reject",
    "Text",
    "TextSource",
    "expand_inputs",
    "iter_documents",
    "plan_chunks",
    "read_chunk",
]
