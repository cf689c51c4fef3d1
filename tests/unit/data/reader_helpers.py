"""Raw text files, and everything that the readers make of them."""

import json
from typing import Any

from megatron_ext.data.readers import expand_inputs, plan_chunks, read_chunk


def write(path: Any, content: Any) -> Any:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def json_lines(*texts: Any, key: Any = "text") -> Any:
    return "".join(json.dumps({key: text}) + "\n" for text in texts)


def read_all(config: Any, chunk_bytes: Any = 1 << 20) -> Any:
    """Every document and every reject `(source, line, offset, reason)` of a configuration."""
    documents: list[Any] = []
    rejects: list[Any] = []
    first: dict[int, int] = {}
    for chunk in plan_chunks(expand_inputs(config), chunk_bytes, config.max_line_bytes):
        before = first.get(chunk.source_index, 0)
        if chunk.first_line is not None:
            assert chunk.first_line == before
        for batch in read_chunk(chunk, config.json_keys, config.max_line_bytes):
            documents += zip(*batch.texts, strict=True)
            rejects += [(chunk.source.path, before + r.line, r.offset, r.reason) for r in batch.rejects]
            first[chunk.source_index] = first.get(chunk.source_index, 0) + batch.lines
    return documents, rejects
