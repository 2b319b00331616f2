"""The documentation names files and functions that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
LINK = re.compile(r"\[[^\]]*\]\((?!https?:)([^)\s]*)\)")
# A step of a reading list: 1. [`file`](path) `name`: …
STEP = re.compile(r"^\d+\. \[`[^`]+`\]\((?P<path>[^)]+)\) `(?P<name>\w+)`", re.MULTILINE)
READING_LISTS = {
    "The path of a token from launch/infer.py to the inner product",
    "The path of an expert from source file to group file",
}


def anchors(page: Path) -> set[str]:
    """The fragments that headings of a page can be linked by, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return {heading.replace(" ", "-") for heading in plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings_that_exist(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        path, _, fragment = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not fragment or fragment in anchors(linked), target


@pytest.mark.parametrize("title", sorted(READING_LISTS))
def test_reading_list_names_what_its_files_define(title):
    page = ROOT / "docs" / "how-it-works.md"
    section = page.read_text(encoding="utf-8").partition(f"## {title}\n")[2].partition("\n## ")[0]
    steps = list(STEP.finditer(section))

    assert 1 <= len(steps) <= 10
    assert len(steps) == len(re.findall(r"^\d+\. ", section, re.MULTILINE))
    for step in steps:
        source = (page.parent / step["path"]).read_text(encoding="utf-8")
        assert re.search(
            rf"^\s*(def|class|from \S+ import) {step['name']}\b", source, re.MULTILINE
        ), step[0]
