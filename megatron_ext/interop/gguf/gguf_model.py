"""Opens a GGUF model in the form that an import reads: a directory of small Hugging Face files, and the tensors."""

import atexit
import json
import shutil
import tempfile
from pathlib import Path

from megatron_ext.interop.gguf.gguf_config import read_gguf_config
from megatron_ext.interop.gguf.gguf_metadata import GGUFMetadata
from megatron_ext.interop.gguf.gguf_tensors import GGUFTensors
from megatron_ext.interop.gguf.gguf_tokenizer import write_gguf_tokenizer


def open_gguf(path: str | Path) -> tuple[Path, GGUFTensors]:
    """Opens a GGUF model.

    Returns:
        A temporary directory with the model's config.json and tokenizer files, and the tensors. The directory is
        removed when the process ends.

    Raises:
        FileNotFoundError: a file of a split model is missing.
        ValueError: the file is damaged, or the model, its tokenizer or the type of a tensor is not supported.
    """
    metadata = GGUFMetadata(path)
    tensors = GGUFTensors(metadata)
    config = read_gguf_config(metadata, tensors)
    folder = Path(tempfile.mkdtemp(prefix="megatron_ext_gguf_"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    write_gguf_tokenizer(metadata, folder)
    return folder, tensors
