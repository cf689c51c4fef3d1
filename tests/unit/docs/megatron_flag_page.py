"""Writes docs/megatron_lm_flags.md from the tables in `megatron_ext/config/megatron_lm`; a test compares the two.

python -m tests.unit.docs.megatron_flag_page
"""

from collections.abc import Iterable

from megatron_ext.config.command_line.flag_table import flags_of
from megatron_ext.config.megatron_lm.ignored_flags import IGNORED
from megatron_ext.config.megatron_lm.megatron_flags import RENAMED
from megatron_ext.config.megatron_lm.refused_flags import REFUSED, REFUSED_BEGINNINGS
from megatron_ext.config.run_config import RunConfig
from tests.unit.docs.links import ROOT

PAGE = ROOT / "docs" / "megatron_lm_flags.md"
FACTS = ROOT / "tests" / "unit" / "config" / "megatron_lm_flags.tsv"
_INTRODUCTION = """\
# Megatron-LM's flags

What becomes of each flag of Megatron-LM's `pretrain_gpt.py` in a training run here. Flags that are missing on this page
have the same name and meaning here; `--help` lists them. The flags are those of Megatron-LM 0.16.1 to 0.19.0 and its
main branch of August 2026 (`megatron/training/arguments.py`), and some older ones that scripts still have.
`tests/unit/config/test_megatron_flags.py` checks that each is in exactly one table, or the same here.

This page is generated from `megatron_ext/config/megatron_lm` by `python -m tests.unit.docs.megatron_flag_page`.
[Coming from Megatron-LM](megatron_lm.md) says how to use it.
"""


def page() -> str:
    """Returns the text of the page."""
    renamed = [f"| `{name}` | `{' '.join(words)}` |" for name, words in RENAMED.items()]
    without_effect = {
        " ".join([name, *([_alternatives(each.harmless)] if each.harmless else [])]): each.reason
        for name, each in IGNORED.items()
    }
    refused = {**REFUSED, **{f"{start}*": words for start, words in REFUSED_BEGINNINGS.items()}}
    return "\n".join(
        [
            _INTRODUCTION,
            *_section("Under another name", "The flag is replaced.", "Megatron-LM | here", renamed),
            *_section(
                "Without effect",
                "The flag is accepted, and one line on standard error names it. Of a flag with values, only those "
                "shown are accepted; any other is an error.",
                "why | flags",
                _by_reason(without_effect),
            ),
            *_section(
                "Refused",
                "All refused flags of a command line are named in one error, with these words. `*` stands for any "
                "ending.",
                "what to do | flags",
                _by_reason(refused),
            ),
            *_section(
                "Values that only Megatron-LM has",
                "The flag is the same; a value in this table is an error that names the values here.",
                "flag | values",
                _other_values(),
            ),
        ]
    )


def _other_values() -> list[str]:
    """Returns one row per flag of ours for which Megatron-LM has further values, without those that have no effect."""
    ours = {name: flag.choices for flag in flags_of(RunConfig) for name in flag.names if flag.choices}
    rows = []
    for line in FACTS.read_text(encoding="utf-8").splitlines():
        name, *_, choices, _, _ = line.split("\t") if not line.startswith("#") else (line, "", "", "")
        harmless = IGNORED[name].harmless if name in IGNORED else ()
        others = [value for value in choices.split(",") if value not in (*ours.get(name, ()), *harmless)]
        if name in ours and choices and others:
            rows.append(f"| `{name}` | {', '.join(f'`{value}`' for value in others)} |")
    return rows


def _alternatives(values: Iterable[str]) -> str:
    return "|".join(values)


def _section(title: str, text: str, columns: str, rows: Iterable[str]) -> list[str]:
    return [f"## {title}", "", text, "", f"| {columns} |", "|---|---|", *rows, ""]


def _by_reason(reasons: dict[str, str]) -> list[str]:
    """Returns one row per reason, with all flags that have it."""
    rows: dict[str, list[str]] = {}
    for flag, reason in reasons.items():
        rows.setdefault(reason, []).append("`" + flag.replace("|", "\\|") + "`")
    return [f"| {reason} | {', '.join(flags)} |" for reason, flags in rows.items()]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
