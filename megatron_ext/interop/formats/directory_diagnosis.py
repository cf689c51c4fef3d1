"""What a directory holds from which no model can be read, and what to do about it: each in one line."""

from collections.abc import Iterable
from pathlib import Path

from megatron_ext.training.checkpoint.checkpoint_files import TRACKER

_LFS = b"version https://git-lfs"

_SAVE = "load it with transformers and save it with save_pretrained()"
_FORMATS: tuple[tuple[str, str], ...] = (
    (
        "adapter_config.json",
        "a peft adapter, not a model; merge it into its base model with peft (merge_and_unload()) and save that",
    ),
    (
        "*.gguf",
        "a model in the format of llama.cpp; load it with transformers (from_pretrained(..., gguf_file=...)) "
        "and save it dequantized with save_pretrained()",
    ),
    (
        "consolidated*.safetensors",
        "the model in its maker's own format; take the files that are in Hugging Face's, or convert it with "
        "transformers' conversion script",
    ),
    ("consolidated*.pth", "the model in Meta's format; convert it with transformers' conversion script"),
    (
        "model.*.safetensors",
        f"a variant, which is not read; {_SAVE}, or rename it to model.safetensors",
    ),
    ("model.*.safetensors.index.json", f"a variant, which is not read; {_SAVE}"),
    ("*.bin", f"pickled weights, which are not read; {_SAVE}"),
    ("*.pt", "pickled weights, which are not read; save them as a Hugging Face directory"),
    ("*.pth", "pickled weights, which are not read; save them as a Hugging Face directory"),
    ("*.h5", f"TensorFlow's weights, which are not read; {_SAVE}"),
    ("*.msgpack", f"Flax's weights, which are not read; {_SAVE}"),
    ("model_index.json", "a pipeline of diffusers, not a language model"),
    (TRACKER, "a checkpoint, not a Hugging Face directory; load it with --load"),
    ("checksums.json", "a checkpoint, not a Hugging Face directory; load it with --load"),
    (
        "*.safetensors",
        "weights under another name; rename them to model.safetensors where they are the whole model",
    ),
)
"""Files -> what they are, in the order in which they tell most."""

_QUANTIZED = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes",
    ".weight_scale": "FP8 or compressed-tensors",
    ".weight_scale_inv": "FP8",
    ".weight_packed": "compressed-tensors",
}


def what_is_there(folder: Path) -> str | None:
    """Names a file of another format, and what to do; None where there is nothing of the kind."""
    for pattern, meaning in _FORMATS:
        found = sorted(path.name for path in folder.glob(pattern))
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            return f"it holds {found[0]}{more}: {meaning}"
    for below in sorted(path for path in folder.glob("*/*") if path.name == "config.json"):
        return f"{below.parent} has one"
    for below in sorted(folder.glob("snapshots/*/config.json")):
        return f"it is a cache of the hub; the model is {below.parent}"
    return None


def check_no_pointer(path: Path) -> None:
    """Raises `ValueError` where a file's content stayed behind in git's large file storage."""
    with open(path, "rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise ValueError(
                f"{path}: a pointer of git-lfs, not the file itself; fetch the files with `git lfs pull`"
            )


def describe_missing(path: Path) -> str:
    """Why a file that should be there is not."""
    if path.is_symlink():
        return f"{path.name} is a link to a file that is missing"
    return f"{path.name} is missing"


def other_names(names: Iterable[str], wanted: Iterable[str]) -> str | None:
    """How the tensors of files differ as a whole from those that a model needs; None where they do not.

    Args:
        names: the files' tensors.
        wanted: the model's.
    """
    found, needed = set(names), list(wanted)
    for ending, method in _QUANTIZED.items():
        if any(name.endswith(ending) for name in found):
            return (
                f"the weights are quantized ({method}: tensors ...{ending}) and cannot be imported; save them "
                "dequantized with transformers (model.dequantize(), then save_pretrained())"
            )
    if any(".lora_A." in name for name in found):
        return "the weights are a peft adapter's; merge it into its base model with peft (merge_and_unload())"
    prefixes = {name.removesuffix(needed[0]) for name in found if name.endswith(f".{needed[0]}")}
    for prefix in sorted(prefixes):
        if sum(prefix + name in found for name in needed) > len(needed) // 2:
            return (
                f"all tensors are named {prefix}...: a part of a larger model; "
                "save the language model alone, as a causal model, with transformers"
            )
    bare = [name.removeprefix("model.") for name in needed]
    if sum(name in found for name in bare) > len(needed) // 2:
        return (
            "the tensors' names lack the beginning model.: saved from the model without its head; "
            "load it as a causal model in transformers and save that with save_pretrained()"
        )
    return None
