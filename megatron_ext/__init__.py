"""Megatron-core, extended by per-layer embeddings, neuro-plastic transformers and progressive growth."""

import functools
import logging
import warnings

from megatron_ext.platform import engine_imports
from megatron_ext.platform.process import openmp_waiting

engine_imports.install()
openmp_waiting.install()

# Warnings of the engine on which no user can act: an optional part is missing (`--transformer-impl` chooses), torch
# functions are called by old names, the gradient of a view is read, and recomputation of attention is of no use with
# an attention other than ours; from 0.18, a single process has no rank yet; from 0.19, the engine imports an
# experimental model.
for _message in (
    r"(Transformer Engine and Apex are|Apex is) not installed",
    r"`torch\.distributed\.(reduce_scatter|all_gather_into)_tensor` is deprecated",
    r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed",
    r"If you are using transformer_engine as the transformer implementation, the core_attn is",
    r"Could not determine (rank|world size) from torch\.distributed",
    r"MimoModelConfig is experimental",
):
    warnings.filterwarnings("ignore", message=_message)


def _begins_otherwise(words: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(words)


# Deprecation messages in the engine's log from 0.19 on, by module and first words. docs/engines.md describes the
# future of `GPTModel`; our checkpoints keep the file that `load_common` reads, because every earlier version needs
# it.
for _module, _words in (
    ("models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
    ("dist_checkpointing.strategies.common", "load_common is deprecated"),
):
    logging.getLogger(f"megatron.core.{_module}").addFilter(functools.partial(_begins_otherwise, _words))

# torch's CUDA build logs this on a machine with the CUDA toolkit and no GPU; the run itself prints its device.
_no_cuda = functools.partial(_begins_otherwise, "No CUDA runtime is found")
logging.getLogger("torch.utils.cpp_extension").addFilter(_no_cuda)


def __getattr__(name: str) -> str:
    """Returns `__version__`, read from the metadata of the installed package; the version is set in pyproject.toml
    only.
    """
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("megatron-ext")
        except PackageNotFoundError:
            raise AttributeError(
                "megatron-ext is not installed, so it has no __version__: pip install ."
            ) from None
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
