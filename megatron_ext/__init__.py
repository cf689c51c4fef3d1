"""Megatron-core, extended: per-layer embeddings, neuro-plastic layers and progressive growth on the real engine."""

import warnings

from megatron_ext.platform import engine_imports, openmp_waiting

engine_imports.install()
openmp_waiting.install()

# What the engine says about itself and no user can act on: that optional parts are missing (`--transformer-impl`
# chooses), that it calls torch functions by older names, that it looks at gradients of views, that with
# another attention than ours recomputing it is of no use.
for _message in (
    r"(Transformer Engine and Apex are|Apex is) not installed",
    r"`torch\.distributed\.(reduce_scatter|all_gather_into)_tensor` is deprecated",
    r"The \.grad attribute of a Tensor that is not a leaf Tensor is being accessed",
    r"If you are using transformer_engine as the transformer implementation, the core_attn is",
):
    warnings.filterwarnings("ignore", message=_message)


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
