"""The pages: every link leads somewhere, and the first screen stays one."""

import re

import pytest

from lrpet.paths import PROJECT

PAGES = [
    PROJECT / name
    for name in (
        "README.md",
        "REPRODUCING.md",
        "DEVIATIONS.md",
        "results/README.md",
        "figures/README.md",
        "notebooks/README.md",
    )
]
PAGES += sorted((PROJECT / "docs").glob("*.md"))


def anchors(text):
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(PROJECT).as_posix())
def test_every_link_leads_to_something(page):
    text = page.read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_the_first_screen_is_short():
    before, found, _ = (PROJECT / "README.md").read_text(encoding="utf-8").partition("\n## Reference\n")
    assert found and len(before.split()) <= 600
