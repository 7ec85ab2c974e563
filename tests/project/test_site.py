"""The site is built from README, docs/ and the notebooks, and every link in it leads somewhere."""

import subprocess
import sys
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest

from lrpet.paths import PROJECT

pytestmark = pytest.mark.slow


class Page(HTMLParser):
    """What a page links to or loads, and the names within it that others link to."""

    def __init__(self, path):
        super().__init__()
        self.links, self.names = [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.names |= {given[name] for name in ("id", "name") if given.get(name)}
        self.links += [(tag, given[name]) for name in ("href", "src") if given.get(name)]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("myst_nb", reason="the packages of requirements-site.lock are not installed")
    place = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-c", "docs", "-q", "-W", ".", place]
    done = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return {path: Page(path) for path in place.rglob("*.html")}, place


def test_every_page_and_notebook_is_there_and_every_link_leads_somewhere(site):
    pages, place = site
    wanted = ["README.md", *(f"docs/{path.name}" for path in (PROJECT / "docs").glob("*.md"))]
    wanted += [f"notebooks/{path.name}" for path in (PROJECT / "notebooks").glob("*.ipynb")]
    for name in wanted:
        assert (place / name).with_suffix(".html") in pages
    for path, page in pages.items():
        for _, link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or not parts.path + parts.fragment:
                continue
            target = path.parent / unquote(parts.path) if parts.path else path
            assert target.exists(), (path, link)
            if parts.fragment and target.suffix == ".html" and page is not None:
                assert unquote(parts.fragment) in pages[target.resolve()].names, (path, link)


def test_the_site_loads_nothing_from_elsewhere(site):
    for path, page in site[0].items():
        loaded = [link for tag, link in page.links if tag in ("script", "link", "img", "iframe")]
        assert not [link for link in loaded if urlsplit(link).netloc], path


def test_formulas_need_no_script(site):
    text = (site[1] / "notebooks" / "00_method.html").read_text(encoding="utf-8")
    assert "<math" in text and "MathJax" not in text
