"""Reads a configuration file: a flat mapping, sections by concern name, or both."""

from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import yaml


def read_yaml(path: str, sections: Container[str]) -> Iterator[tuple[str | None, str, Any]]:
    """Yields `(section or None, key, value)` for every value of the file.

    Raises:
        ValueError: if the file is missing, not YAML or not a mapping, naming it.
    """
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: not YAML: {error}") from None
    if content is None:
        return
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: must be a mapping, it is a {type(content).__name__}")
    for key, value in content.items():
        if key in sections and isinstance(value, dict):
            yield from ((key, str(inner), inner_value) for inner, inner_value in value.items())
        else:
            yield None, str(key), value
