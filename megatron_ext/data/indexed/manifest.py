"""The manifest of a dataset, `PREFIX.json`: which tool, inputs and tokenizer made the dataset, and its checksums.

Every training run calls `check_dataset` when it starts; this takes constant time, whatever the size of the dataset.
`tools/data.py verify` checks everything, checksums included. If a dataset has no manifest (Megatron-LM writes none),
checks that need one are skipped. A manifest records no date or time, so equal inputs give equal manifests.
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_ext.config.groups.tokenizer_config import tokenizer_flags
from megatron_ext.data.indexed.indexed_files import Index, bin_path, idx_path, open_index
from megatron_ext.data.tokenizers.tokenizer import Tokenizer, in_words

FORMAT = "megatron_ext.dataset/1"
PREPENDED_BOS = "prepended_bos"
"""Key in a manifest's `tokenizer` entry: the token id put before every document; absent if there is no such id."""
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_READ_BYTES = 1 << 18


def manifest_path(prefix: str) -> str:
    """Returns the path of a dataset's manifest."""
    return f"{prefix}.json"


@contextlib.contextmanager
def write_atomically(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path in the same directory; renames it to `path` on success, removes it on any failure.

    Creates the directory if it is missing. A killed process leaves only files that end in `.tmp`. Every writer keeps
    its temporary file locked while it writes; the next writer of the same path removes the temporary files that are
    not locked.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(target)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        try:
            yield temporary
            os.replace(temporary, target)
        except OSError as error:
            if error.errno not in _DISK_FULL or error.filename is not None:
                raise
            raise OSError(
                error.errno, error.strerror, str(target.parent)
            ) from None  # the error of `write` does not contain the file's name
        finally:
            temporary.unlink(missing_ok=True)


def _remove_leftovers(target: Path) -> None:
    """Removes temporary files left behind by killed writers of `target`: TARGET.PID.tmp and TARGET.PID.NAME.tmp."""
    for leftover in target.parent.glob(f"{glob.escape(target.name)}.*[0-9].tmp"):
        with (
            contextlib.suppress(OSError),
            leftover.open("rb") as held,
        ):  # a writer has locked the file, or it has disappeared
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for path in target.parent.glob(f"{glob.escape(leftover.stem)}.*tmp"):
                path.unlink(missing_ok=True)


def sha256_of(path: str | Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal; reads the file in chunks."""
    digest = hashlib.sha256()
    # One buffer for all reads: allocating memory costs more than the hash.
    block = memoryview(bytearray(_READ_BYTES))
    with open(path, "rb", buffering=0) as stream:
        while size := stream.readinto(block):
            digest.update(block[:size])
    return digest.hexdigest()


def tool_version() -> str:
    """Returns the version of the installed package, or "unknown" in a checkout that is not installed."""
    try:
        return importlib.metadata.version("megatron-ext")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def write_manifest(
    prefix: str,
    *,
    tool: str,
    tokenizer: dict[str, Any] | None,
    inputs: list[str],
    extra: dict[str, Any] | None = None,
) -> None:
    """Writes `PREFIX.json` for a finished `PREFIX.bin` and `PREFIX.idx`; the file is written atomically.

    Args:
        prefix: path of the dataset without `.bin` or `.idx`.
        tool: name of the command that made the dataset.
        tokenizer: `Tokenizer.describe()` of the tokenizer that made the dataset; None if not known.
        inputs: the files the data was made from, in order; "-" is standard input.
        extra: more top-level keys, for example the per-layer strategy.

    Raises:
        ValueError: `extra` would replace one of the manifest's own keys, or `.bin` and `.idx` contradict each other.
    """
    index = open_index(prefix)
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "tool": tool,
        "tool_version": tool_version(),
        "tokenizer": tokenizer,
        "inputs": [
            {"path": path, "bytes": os.path.getsize(path) if os.path.isfile(path) else None}
            for path in inputs
        ],
        "counts": {
            "documents": index.num_documents,
            "sequences": index.num_sequences,
            "tokens": index.num_tokens,
        },
        "dtype": index.dtype.name,
        "sizes": {"bin": os.path.getsize(bin_path(prefix)), "idx": os.path.getsize(idx_path(prefix))},
        "checksums": {"bin": sha256_of(bin_path(prefix)), "idx": sha256_of(idx_path(prefix))},
    }
    clash = sorted(manifest.keys() & (extra or {}).keys())
    if clash:
        raise ValueError(f"extra manifest keys {clash} would replace the manifest's own")
    manifest.update(extra or {})
    with write_atomically(manifest_path(prefix)) as temporary:
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        # Python holds the bytes of a path that is not UTF-8 as lone surrogates; in JSON they are the escapes \udcXX.
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_manifest(prefix: str) -> dict[str, Any] | None:
    """Returns the manifest of a dataset, or None if it has none.

    Raises:
        ValueError: the file is not a manifest.
    """
    path = manifest_path(prefix)
    if not os.path.isfile(path):
        return None
    try:
        manifest = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is not a dataset manifest (format {FORMAT})")
    return manifest


def begin_of_documents(prefixes: Iterable[str]) -> list[int] | None:
    """Returns `[id]` if every document begins with the token `id`, `[]` if none does; None if unknown or mixed.

    Args:
        prefixes: paths of the datasets without `.bin` or `.idx`.
    """
    described = [(manifest or {}).get("tokenizer") for manifest in map(read_manifest, prefixes)]
    begins = {one.get(PREPENDED_BOS) for one in described if one is not None}
    if None in described or len(begins) != 1:
        return None
    return [bos for bos in begins if bos is not None]


def check_dataset(prefix: str, tokenizer: Tokenizer | str | None = None) -> Index:
    """Opens a dataset after checks in constant time: its files must have consistent sizes, and its tokenizer must be
    the run's.

    Args:
        prefix: path of the dataset without `.bin` or `.idx`.
        tokenizer: the run's tokenizer or its fingerprint; compared with the manifest's tokenizer if that is known.

    Returns:
        The opened index.

    Raises:
        FileNotFoundError: `.bin` or `.idx` is missing.
        ValueError: a file's size contradicts the index or the manifest, or the tokenizers differ.
    """
    index = open_index(prefix)
    manifest = read_manifest(prefix)
    if manifest is None:
        return index
    for name, path in (("bin", bin_path(prefix)), ("idx", idx_path(prefix))):
        recorded, actual = manifest["sizes"][name], os.path.getsize(path)
        if recorded != actual:
            raise ValueError(f"{path} is {actual} bytes, but {manifest_path(prefix)} recorded {recorded}")
    made_with = manifest.get("tokenizer") or {}
    ours = tokenizer.fingerprint() if isinstance(tokenizer, Tokenizer) else tokenizer
    if ours is not None and made_with.get("fingerprint") not in (None, ours):
        run_tokenizer = ours
        if isinstance(tokenizer, Tokenizer):
            run_tokenizer = in_words({**tokenizer.describe(), "files": tokenizer.files})
        raise ValueError(
            f"{prefix} was made with the tokenizer {in_words(made_with)}, but this run uses {run_tokenizer}; "
            + _remedy(made_with, tokenizer)
        )
    return index


def _remedy(made_with: Mapping[str, Any], tokenizer: Tokenizer | str | None) -> str:
    """Returns advice for a dataset that was made with another tokenizer."""
    again = "tokenize the text again with the tokenizer of this run (tools/preprocess_data.py)"
    flags = tokenizer_flags(str(made_with.get("class")))
    flags = flags and f"{flags} {made_with.get('flags', '')}".rstrip()
    # A run can choose another tokenizer with flags; a tool uses the checkpoint's tokenizer, given as a fingerprint.
    return (
        f"pass the dataset's ({flags}), or {again}" if flags and isinstance(tokenizer, Tokenizer) else again
    )
