"""Carries an imported model's configuration and small files through checkpoints, so that an export can restore them.

The import writes them into the directory of checkpoints, `save`, and into the checkpoint's run_config.json:

    {save}/hugging_face/            unchanged copies of the small files beside the weights
    run_config.json, `hugging_face`
        config                      content of config.json
        generation_config           content of generation_config.json, or null
        eos_token_ids               ids that end a generated text, as transformers reads them from these two files
        folder, files               path of {save}/hugging_face/ and the names of the files in it

A run that starts from an imported model copies this section into its checkpoints, unless it changes the tokenizer
(see `training.checkpoint`). `tokenizer_files` handles the tokenizer's own files.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from megatron_ext.interop.formats.configs.hf_defaults import DEFAULTS
from megatron_ext.interop.formats.hf_files import CONFIG, INDEX, read_object
from megatron_ext.interop.formats.tokenizer.tokenizer_files import FILES
from megatron_ext.training.checkpoint.checkpointer import IMPORTED

FOLDER = "hugging_face"
GENERATION_CONFIG = "generation_config.json"

_CHAT_TEMPLATE, _CHAT_TEMPLATES = "chat_template.jinja", "additional_chat_templates"
_TOKENIZER_CONFIG = "tokenizer_config.json"
_WEIGHTS = (
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".ggml",
    ".h5",
    ".msgpack",
    ".onnx",
    ".npz",
)
_CODE = (".py", ".pyc", ".sh", ".so", ".ipynb")
_LARGEST = 32 * 2**20


@dataclass(frozen=True, kw_only=True)
class Imported:
    """Content of an imported directory other than its tensors and its tokenizer."""

    config: dict[str, Any]
    """Content of config.json."""

    generation_config: dict[str, Any] | None = None
    """Content of generation_config.json, or None."""

    eos_token_ids: tuple[int, ...] = ()
    """Token ids that end a generated text."""

    folder: str | None = None
    """Directory that holds `files`, or None."""

    files: tuple[str, ...] = ()
    """Names of the small files that an export restores."""

    is_trained: bool = False
    """Whether the model has been trained since the import; set by `of_run`, not stored."""

    @classmethod
    def read(cls, model_dir: str | Path, config: dict[str, Any]) -> tuple["Imported", list[str]]:
        """Reads a Hugging Face directory; also returns the names of the files that an import does not keep.

        Raises:
            ValueError: generation_config.json is not JSON, or its `eos_token_id` is not an id or a list of ids.
        """
        path = Path(model_dir, GENERATION_CONFIG)
        generation = read_object(path, "") if path.is_file() else None
        files, left = _sort_files(Path(model_dir))
        ids = _eos_token_ids(config, generation or {}, path)
        imported = cls(
            config=config,
            generation_config=generation,
            eos_token_ids=ids,
            folder=str(model_dir),
            files=tuple(files),
        )
        return imported, left

    @classmethod
    def of_run(cls, *run_configs: Mapping[str, Any]) -> "Imported | None":
        """Reads the section `hugging_face` of the first run configuration that has it; returns None if none has it."""
        for run_config in run_configs:
            section = run_config.get(IMPORTED)
            if section is not None and "config" in section:
                lists = {name: tuple(section[name]) for name in ("eos_token_ids", "files")}
                return cls(**{**section, **lists}, is_trained="training" in run_config)
            if section is not None:  # older checkpoints keep only the content of config.json
                return cls(config=section, is_trained="training" in run_config)
        return None

    def as_json(self) -> dict[str, Any]:
        """Returns the section `hugging_face` for run_config.json; `of_run` reads it."""
        return {name: value for name, value in asdict(self).items() if name != "is_trained"}

    def copy_files(self, save: Path) -> None:
        """Copies the files to `save`/hugging_face."""
        if self.files:
            (save / FOLDER).mkdir()
        for name in self.files:
            _copy(Path(self.folder or "", name), save / FOLDER / name)

    def placed(self, save: str | Path) -> "Imported":
        """Returns a copy whose `folder` is `save`/hugging_face, where `copy_files` puts the files."""
        return replace(self, folder=os.path.abspath(Path(save, FOLDER)) if self.files else None)

    def write_files(self, target: Path, tokenizer_dir: Path | None) -> list[str]:
        """Writes generation_config.json, the small files and the chat template into an exported directory.

        Args:
            target: the exported directory; the tokenizer's files are already in it.
            tokenizer_dir: directory that the tokenizer's files came from, or None.

        Returns:
            Messages for the user.
        """
        # The checkpoint may have been moved since the import, so look beside its tokenizer as well.
        places = [Path(self.folder)] if self.folder is not None else []
        places += [tokenizer_dir.parent / FOLDER] if tokenizer_dir is not None else []
        kept, gone = [], []
        if self.generation_config is not None:
            text = json.dumps(self.generation_config, indent=2, ensure_ascii=False)
            (target / GENERATION_CONFIG).write_text(text + "\n", encoding="utf-8")
            kept.append(GENERATION_CONFIG)
        for name in self.files:
            source = next((place / name for place in places if (place / name).exists()), None)
            if source is None:
                gone.append(name)
            elif not (target / name).exists():
                _copy(source, target / name)
                kept.append(name)
        if tokenizer_dir is not None:
            _keep_chat_template(tokenizer_dir, target)
        messages = [f"files kept as imported: {', '.join(kept)}"] if kept else []
        if gone:
            messages.append(f"files not written, because {self.folder} no longer exists: {', '.join(gone)}")
        return messages


def _sort_files(folder: Path) -> tuple[list[str], list[str]]:
    """Returns the names of the small files that an import keeps, and the names of the files that it does not keep."""
    of_others = {CONFIG, GENERATION_CONFIG, *FILES} - {_CHAT_TEMPLATE}
    read = _weights_read(folder)
    kept, left = [], []
    for path in sorted(folder.iterdir()):
        name = path.name
        if name.startswith(".") or name in of_others or name in read or name.endswith(".index.json"):
            continue
        is_kept = path.is_file() and path.suffix not in _WEIGHTS + _CODE and path.stat().st_size <= _LARGEST
        if is_kept or (name == _CHAT_TEMPLATES and path.is_dir()):
            kept.append(name)
        else:
            left.append(f"{name}/" if path.is_dir() else name)
    return kept, left


def _weights_read(folder: Path) -> set[str]:
    if (folder / INDEX).is_file():
        return set(map(str, read_object(folder / INDEX, "").get("weight_map", {}).values()))
    return {"model.safetensors"}


def _eos_token_ids(config: Mapping[str, Any], generation: Mapping[str, Any], path: Path) -> tuple[int, ...]:
    of_model = config.get("eos_token_id", DEFAULTS[config["model_type"]].eos_token)
    found = generation.get("eos_token_id", of_model)
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ValueError(f"{path}: eos_token_id {found}: must be an id or a list of ids")
    return tuple(ids)


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        shutil.copyfile(source, target)


def _keep_chat_template(tokenizer_dir: Path, target: Path) -> None:
    """Copies the chat template from the imported tokenizer_config.json into the exported file, which lacks it."""
    before, after = tokenizer_dir / _TOKENIZER_CONFIG, target / _TOKENIZER_CONFIG
    if not (before.is_file() and after.is_file()) or (target / _CHAT_TEMPLATE).exists():
        return
    template, content = read_object(before, "").get("chat_template"), read_object(after, "")
    if template is not None and "chat_template" not in content:
        text = json.dumps({**content, "chat_template": template}, indent=2, ensure_ascii=False)
        after.write_text(text + "\n", encoding="utf-8")


def left_behind(names: Iterable[str]) -> list[str]:
    """Returns a list with one message that names the files that are not imported; an empty list without such files."""
    listed = ", ".join(names)
    return [f"files not imported: {listed}"] if listed else []
