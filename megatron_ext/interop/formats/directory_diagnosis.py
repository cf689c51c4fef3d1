"""Explains in one line why a directory cannot be imported, and what to do about it."""

from collections.abc import Iterable
from pathlib import Path

from megatron_ext.training.checkpoint.checkpoint_files import CHECKSUMS, TRACKER, find_checkpoint

_LFS = b"version https://git-lfs"

_SAVE = "load the model with transformers and save it with save_pretrained()"
_FORMATS: tuple[tuple[str, str], ...] = (
    (
        "adapter_config.json",
        "a peft adapter, not a model; merge it into its base model with peft (merge_and_unload()) and "
        "save the result",
    ),
    (
        "*.gguf",
        "a model in the format of llama.cpp; to import it, give the path of the file itself",
    ),
    (
        "consolidated*.safetensors",
        "a model in its publisher's own format; download it in Hugging Face's format, or convert it with "
        "transformers' conversion script",
    ),
    ("consolidated*.pth", "a model in Meta's format; convert it with transformers' conversion script"),
    (
        "model.*.safetensors",
        f"weights of a variant such as fp16, which are not read; {_SAVE}, or rename the file to model.safetensors",
    ),
    ("model.*.safetensors.index.json", f"weights of a variant such as fp16, which are not read; {_SAVE}"),
    ("*.bin", f"pickled weights, which are not read; {_SAVE}"),
    ("*.pt", "pickled weights, which are not read; save them as a Hugging Face directory"),
    ("*.pth", "pickled weights, which are not read; save them as a Hugging Face directory"),
    ("*.h5", f"TensorFlow weights, which are not read; {_SAVE}"),
    ("*.msgpack", f"Flax weights, which are not read; {_SAVE}"),
    ("model_index.json", "a diffusers pipeline, not a language model"),
    (
        "*.safetensors",
        "weights under another name; rename the file to model.safetensors if it holds the whole model",
    ),
)
"""Pairs of a file pattern and a message that names the kind of file and gives advice; the first match is reported."""

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
    """Returns text for the user: which unsupported file the directory holds and what to do, or where the model is.

    Returns None if no such file or model is found.
    """
    if any((folder / name).is_file() for name in (TRACKER, CHECKSUMS, ".metadata")):
        return _checkpoint(folder)
    for pattern, meaning in _FORMATS:
        found = sorted(path.name for path in folder.glob(pattern))
        if found:
            more = f" and {len(found) - 1} more" if len(found) > 1 else ""
            return f"it holds {found[0]}{more}: {meaning}"
    for below in sorted(path for path in folder.glob("*/*") if path.name == "config.json"):
        return f"{below.parent} has one"
    for below in sorted(folder.glob("snapshots/*/config.json")):
        return f"it is a cache of the Hugging Face hub; the model is in {below.parent}"
    return None


def _checkpoint(folder: Path) -> str:
    """Returns text for the user about a directory of checkpoints."""
    try:
        found = find_checkpoint(str(folder))
    except ValueError as error:  # a checkpoint of another program, or an incomplete one
        return str(error)
    if found is None:
        return "it holds no complete checkpoint of this package"
    return "it holds a checkpoint of this package; load it with --load"


def check_no_pointer(path: Path) -> None:
    """Raises `ValueError` if a file is a git-lfs pointer instead of its content."""
    with open(path, "rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise ValueError(
                f"{path}: is a git-lfs pointer, not the file itself; fetch the content with `git lfs pull`"
            )


def describe_missing(path: Path) -> str:
    """Returns text saying that a file is missing, or that it is a link to a missing file."""
    if path.is_symlink():
        return f"{path.name} is a link to a missing file"
    return f"{path.name} is missing"


def other_names(names: Iterable[str], wanted: Iterable[str]) -> str | None:
    """Recognizes tensor names that differ systematically from the expected ones (quantized, with a prefix, and so on).

    Args:
        names: names of the tensors in the files.
        wanted: names of the tensors that the model requires.

    Returns:
        Text that describes the files and gives advice; None if the names match no known case.
    """
    found, needed = set(names), list(wanted)
    for ending, method in _QUANTIZED.items():
        if any(name.endswith(ending) for name in found):
            return (
                f"the weights are quantized ({method}: tensors ...{ending}) and cannot be imported; save them "
                "dequantized with transformers (model.dequantize(), then save_pretrained())"
            )
    if any(".lora_A." in name for name in found):
        return "the weights are a peft adapter; merge it into its base model with peft (merge_and_unload())"
    prefixes = {name.removesuffix(needed[0]) for name in found if name.endswith(f".{needed[0]}")}
    for prefix in sorted(prefixes):
        if sum(prefix + name in found for name in needed) > len(needed) // 2:
            return (
                f"all tensor names begin with '{prefix}', so the language model is part of a larger "
                "model; save the language model alone with transformers, as a causal model"
            )
    bare = [name.removeprefix("model.") for name in needed]
    if sum(name in found for name in bare) > len(needed) // 2:
        return (
            "the tensor names lack the prefix 'model.', so the model was saved without its head; "
            "load it as a causal model in transformers and save it with save_pretrained()"
        )
    return None
