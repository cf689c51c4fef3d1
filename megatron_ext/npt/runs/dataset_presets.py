"""Dataset presets: names for blends of local indexed datasets, kept in a YAML file.

    small: corpora/wikitext_text_document
    medium:
      - 0.7 corpora/wikitext_text_document
      - 0.3 corpora/books_text_document

Each name stands for what `--data-path` would be given: prefixes, or weights and prefixes in turn, one entry or a list
of them. Paths count from the current directory, as on the command line. Source: document 000.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from megatron_ext.config.groups.data_config import DataConfig, is_number


def with_preset(data: DataConfig, preset: str | None, presets_file: str) -> DataConfig:
    """The data configuration with a preset's blend, unless it names data of its own.

    Args:
        data: the run's.
        preset: `--dataset-preset`, None for none.
        presets_file: `--dataset-presets-file`.

    Raises:
        FileNotFoundError: the file is not there, or a dataset of the preset is not.
        ValueError: the file is no YAML of presets, or has none of that name.
    """
    if preset is None or data.data_path or data.train_data_path:
        return data
    blend = read_preset(preset, presets_file)
    for prefix in blend:
        if not is_number(prefix) and not Path(f"{prefix}.idx").is_file():
            raise FileNotFoundError(
                f"--dataset-preset {preset}: {prefix}.idx is not there; make it with tools/preprocess_data.py, "
                f"or name yours in {presets_file}"
            )
    return replace(data, data_path=blend)


def read_preset(preset: str, presets_file: str) -> tuple[str, ...]:
    """The blend that a preset stands for, as `--data-path` takes it; raises as `with_preset` does."""
    try:
        content = yaml.safe_load(Path(presets_file).read_text(encoding="utf-8"))
    except OSError as error:
        raise FileNotFoundError(f"--dataset-presets-file {presets_file}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--dataset-presets-file {presets_file}: not YAML: {error}") from None
    if not isinstance(content, dict) or preset not in content:
        known = ", ".join(map(str, content)) if isinstance(content, dict) else "none"
        raise ValueError(f"--dataset-preset {preset}: {presets_file} has no such preset (there: {known})")
    blend = _words(content[preset])
    if not any(not is_number(word) for word in blend):
        raise ValueError(f"--dataset-preset {preset}: {presets_file} names no dataset for it")
    return blend


def _words(entry: Any) -> tuple[str, ...]:
    """The words of an entry: a text, or a list of texts and of weight, prefix pairs."""
    if isinstance(entry, list):
        return tuple(word for part in entry for word in _words(part))
    return tuple(str(entry).split()) if entry is not None else ()
