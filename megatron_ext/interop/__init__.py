"""Imports Llama-like models from Hugging Face's format, and exports models to it; see docs/interop.md."""

from megatron_ext.interop.hf_export import export_checkpoint, export_hf
from megatron_ext.interop.hf_import import HuggingFaceModel, import_checkpoint, load_hf
from megatron_ext.interop.live_model_weights import base_state, load_into

__all__ = [
    "HuggingFaceModel",
    "base_state",
    "export_checkpoint",
    "export_hf",
    "import_checkpoint",
    "load_hf",
    "load_into",
]
