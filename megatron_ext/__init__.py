"""Megatron-core, extended: per-layer embeddings, neuro-plastic layers and progressive growth on the real engine."""

import functools
import logging
import warnings

from megatron_ext.platform import engine_imports, openmp_waiting

engine_imports.install()
openmp_waiting.install()

# What the engine says about itself and no user can act on: that optional parts are missing (`--transformer-impl`
# chooses), that it calls torch functions by older names, that it looks at gradients of views, that with
# another attention than ours recomputing it is of no use; from 0.18 that a process alone has no rank yet, from 0.19
# that it imports a model of its own that is experimental.
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


# From 0.19 the same of its log, by module and first words: docs/engines.md says what becomes of `GPTModel`; checkpoints
# keep the file that `load_common` reads, because every earlier version needs it.
for _module, _words in (
    ("models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
    ("dist_checkpointing.strategies.common", "load_common is deprecated"),
):
    logging.getLogger(f"megatron.core.{_module}").addFilter(functools.partial(_begins_otherwise, _words))

# torch's CUDA build says it on a machine with the CUDA toolkit and no GPU; the run's own line names its device.
_no_cuda = functools.partial(_begins_otherwise, "No CUDA runtime is found")
logging.getLogger("torch.utils.cpp_extension").addFilter(_no_cuda)


def __getattr__(name: str) -> str:
    """`__version__`, from the metadata of the installed package: pyproject.toml is the one place that states it."""
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("megatron-ext")
        except PackageNotFoundError:
            raise AttributeError(
                "megatron-ext is not installed, so it has no __version__: pip install ."
            ) from None
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
