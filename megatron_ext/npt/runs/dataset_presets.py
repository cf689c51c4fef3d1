"""Dataset presets: named blends of local datasets. They are defined in a YAML file such as

    small: corpora/wikitext_text_document
    medium:
      - 0.7 corpora/wikitext_text_document
      - 0.3 corpora/books_text_document

The value of a preset has the format of `--data-path`: path prefixes of indexed datasets, or alternating weights and
prefixes, written as one text or as a list of texts. Paths are relative to the current directory.
Source: docs/design/npt_sequential.md.
"""

from dataclasses import replace
from pathlib import Path

from megatron_ext.config.command_line.yaml_file import load_yaml
from megatron_ext.config.groups.data_config import DataConfig, is_number


def with_preset(data: DataConfig, preset: str | None, presets_file: str) -> DataConfig:
    """Returns the data configuration with the preset's datasets; a configuration that names datasets stays unchanged.

    Args:
        data: the run's data configuration.
        preset: value of `--dataset-preset`, or None.
        presets_file: value of `--dataset-presets-file`.

    Raises:
        FileNotFoundError: the file or a dataset of the preset does not exist.
        ValueError: the file is not a YAML file of presets, or it has no preset of that name.
    """
    if preset is None or data.data_path or data.train_data_path:
        return data
    blend = read_preset(preset, presets_file)
    for prefix in blend:
        if not is_number(prefix) and not Path(f"{prefix}.idx").is_file():
            raise FileNotFoundError(
                f"--dataset-preset {preset}: {prefix}.idx does not exist; create it with tools/preprocess_data.py, "
                f"or name your own dataset in {presets_file}"
            )
    return replace(data, data_path=blend)


def read_preset(preset: str, presets_file: str) -> tuple[str, ...]:
    """Returns a preset's blend in the format of `--data-path`; raises the same errors as `with_preset`."""
    try:
        content = load_yaml(presets_file, "--dataset-presets-file ")
    except OSError as error:
        raise FileNotFoundError(f"--dataset-presets-file {presets_file}: {error.strerror}") from None
    if not isinstance(content, dict) or preset not in content:
        known = ", ".join(map(str, content)) if isinstance(content, dict) else "none"
        raise ValueError(f"--dataset-preset {preset}: {presets_file} has no such preset (available: {known})")
    blend = _words(content[preset])
    if not any(not is_number(word) for word in blend):
        raise ValueError(f"--dataset-preset {preset}: {presets_file} names no dataset for this preset")
    return blend


def _words(entry: object) -> tuple[str, ...]:
    """Splits a preset into weights and prefixes. `entry` is a text, or a list of texts and (weight, prefix) pairs."""
    if isinstance(entry, list):
        return tuple(word for part in entry for word in _words(part))
    return tuple(str(entry).split()) if entry is not None else ()
