"""The script of `make gemma` with few steps: transformers gives our tools' text, and so does the imported model."""

import re
from pathlib import Path

from tests.integration.scripts.test_small_example import EXAMPLES, bash


def test_the_script_pretrains_exports_and_generates_the_same_text_three_times(tmp_path: Path) -> None:
    script = str(EXAMPLES / "gemma" / "quickstart.sh")
    changes = {"STEPS": "2", "CORPUS_BYTES": "300000", "QUICKSTART": str(tmp_path), "NEW_TOKENS": "8"}
    result = bash(script, str(tmp_path / "run"), **changes)
    assert result.returncode == 0, result.stdout + result.stderr
    texts = re.findall(r"^self\.assertEqual\(.*?(?=\n-{40}|\n== )", result.stdout, re.MULTILINE | re.DOTALL)
    assert len(texts) == 3 and len(texts[0]) > len("self.assertEqual(")
    assert texts[0] == texts[1] == texts[2]
    assert "\nGemma4ForCausalLM " in result.stdout
