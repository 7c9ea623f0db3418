"""The documents say what the code does."""

import re
from pathlib import Path

from lbw_rl.training_runs.reference import reference

ROOT = Path(__file__).parent.parent


def test_the_signal_reference_is_the_generated_one():
    """docs/signals.md is what `python -m lbw_rl.training_runs.reference docs/signals.md` writes."""
    assert (ROOT / "docs/signals.md").read_text(encoding="utf-8") == reference()


def test_every_local_link_of_the_documents_leads_somewhere():
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    broken = [
        f"{document.name}: {target}"
        for document in documents
        for target in re.findall(r"\]\(([^)#\s]+)", document.read_text(encoding="utf-8"))
        if "://" not in target and not (document.parent / target).exists()
    ]
    assert not broken
