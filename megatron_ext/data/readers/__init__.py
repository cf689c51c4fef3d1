"""Raw text in: which files, cut into chunks (`sources`), cut into lines (`lines`), parsed into documents
(`documents`).

A chunk is what one worker process handles at a time. The cut depends on the input alone, never on the number of
workers, so that a run can be resumed with another number.
"""

from megatron_ext.data.readers.documents import Batch, Reject, iter_documents, read_chunk
from megatron_ext.data.readers.sources import Chunk, TextSource, expand_inputs, plan_chunks

__all__ = [
    "Batch",
    "Chunk",
    "Reject",
    "TextSource",
    "expand_inputs",
    "iter_documents",
    "plan_chunks",
    "read_chunk",
]
