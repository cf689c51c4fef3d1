"""The pages for users of Megatron-LM list what the code does: every flag without effect or refused, every default."""

import re

from megatron_ext.config.command_line.flag_table import flags_of
from megatron_ext.config.megatron_lm.megatron_defaults import KEPT, TAKEN
from megatron_ext.config.run_config import RunConfig
from tests.unit.docs.links import ROOT
from tests.unit.docs.megatron_flag_page import PAGE, page


def test_the_page_of_megatrons_flags_is_what_its_generator_writes() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m tests.unit.docs.megatron_flag_page"


def rows(heading: str) -> dict[str, list[str]]:
    """The cells of the table under a heading of docs/migration.md, by the flag in the first cell."""
    text = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
    section = text.split(f"\n{heading}\n")[1].split("\n#")[0]
    cells = [re.split(r" \| ", line.strip("| ")) for line in section.splitlines() if line.startswith("| `")]
    return {row[0].strip("`"): [cell.strip("`") for cell in row[1:]] for row in cells}


def test_the_migration_page_lists_every_default_that_differs_from_megatrons() -> None:
    flag_of = {flag.field: flag for flag in flags_of(RunConfig)}
    taken = {field: value for values in TAKEN.values() for field, value in values.items()}
    expected = {flag_of[f].name: [str(v), str(flag_of[f].default)] for f, v in taken.items()}
    assert rows("### Taken by `--defaults megatron`") == expected
    kept = {
        flag_of[field].name: [theirs, _default(flag_of[field].default), why]
        for field, (theirs, why) in KEPT.items()
    }
    assert rows("### Not taken") == kept


def _default(value: object) -> str:
    return " ".join(value) if isinstance(value, tuple) else str(value)
