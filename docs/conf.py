"""The site: README, docs/ and the notebooks as they are committed, built by scripts/site.sh."""

from pathlib import Path

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.addnodes import pending_xref

PROJECT = Path(__file__).resolve().parent.parent
project, root_doc = "lrpet", "README"
extensions = ["myst_nb"]
include_patterns = [
    "README.md",
    "REPRODUCING.md",
    "DEVIATIONS.md",
    "docs/**.md",
    "notebooks/**",
    "*/README.md",
]
include_patterns += ["results/*/tables/*.md"]
exclude_patterns = ["**/.ipynb_checkpoints"]
html_theme = "furo"
html_title = "lrpet"
html_copy_source = False
nb_execution_mode = "off"  # shown as committed, with their outputs
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header", "mystnb.unknown_mime_type", "toc.not_included"]


def add_contents(app, page, source):
    """List the pages and the notebooks beside every page; README itself stays free of it."""
    if page == root_doc:
        listed = "docs/*\nREPRODUCING\nDEVIATIONS\nnotebooks/*\nfigures/README\nresults/README"
        source[0] += f"\n\n```{{toctree}}\n:hidden:\n:glob:\n\n{listed}\n```\n"


def show_folders(app, doctree):
    """Leave a link to a folder of the code as its text: the site holds pages, not code."""
    page = Path(doctree["source"]).parent
    for link in list(doctree.findall(pending_xref)):
        if (page / link.get("reftarget", "")).is_dir():
            link.replace_self(link.children)


def visit_math(self, node):
    """Write a formula as MathML, which a browser draws without a script and without the network."""
    block = node.tagname == "math_block"
    self.body.append(tex2mathml(node.astext(), as_block=block))
    raise SkipNode


def setup(app):
    """Tell Sphinx of the functions above."""
    app.connect("source-read", add_contents)
    app.connect("doctree-read", show_folders)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))


html_math_renderer = "mathml"
