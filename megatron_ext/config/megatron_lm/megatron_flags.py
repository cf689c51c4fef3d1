"""Puts every flag of Megatron-LM's `megatron/training/arguments.py` that has no field here into one class.

    the same        a flag of ours, with the same meaning (not listed: the flags follow from the config groups)
    renamed         a flag of ours under another name; `RENAMED` below
    without effect  accepted, because what it asks for is so here anyway; `ignored_flags.py`
    refused         an error that says what to do instead; `refused_flags.py`

A flag of ours always comes first. `tests/unit/config/test_megatron_flags.py` has the list of all flags of Megatron-LM
0.16 to 0.19, and checks that each is in exactly one class.
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
"""Maps a flag to the words that replace it; the values that follow it stay."""


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
