"""Assigns every flag of Megatron-LM's `megatron/training/arguments.py` to one of four classes.

    the same        this package has the flag, with the same meaning (not listed: it is a field of a config group)
    renamed         this package has the flag under another name; `RENAMED` below
    without effect  accepted, because it would change nothing here; `ignored_flags.py`
    refused         rejected with an error that says what to do instead; `refused_flags.py`

If a name is also a flag of this package, the package's meaning holds. `tests/unit/config/test_megatron_flags.py` has
the list of all flags of Megatron-LM 0.16 to 0.19, and checks that each is in exactly one class.
"""

from megatron_ext.config.megatron_lm.ignored_flags import IGNORED
from megatron_ext.config.megatron_lm.refused_flags import REFUSED, REFUSED_BEGINNINGS

RENAMED = {
    "--encoder-num-layers": ("--num-layers",),
    "--encoder-seq-length": ("--seq-length",),
    "--log-memory-to-tensorboard": ("--log-memory",),
    "--log-validation-ppl-to-tensorboard": ("--log-validation-ppl",),
    "--use-rotary-position-embeddings": ("--position-embedding-type", "rope"),
}
"""Maps a flag to the words that replace it; the values after the flag are kept."""


def why_refused(flag: str) -> str | None:
    """Returns what to do instead of a flag; None if the flag is not refused."""
    if flag in REFUSED:
        return REFUSED[flag]
    if flag in RENAMED or flag in IGNORED:
        return None
    return next((words for start, words in REFUSED_BEGINNINGS.items() if flag.startswith(start)), None)


def instead_of(flag: str) -> str | None:
    """Returns what to use instead of a Megatron-LM flag; None if Megatron-LM does not have this flag either.

    Args:
        flag: a flag with dashes that this command line does not have.
    """
    if flag in RENAMED:
        return f"use {' '.join(RENAMED[flag])}"
    if flag in IGNORED:
        return f"leave it out: {IGNORED[flag].reason}"
    return why_refused(flag)
