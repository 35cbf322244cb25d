"""The book: notebooks as they were committed, the pages of ``docs/`` and the API, as HTML.

pip install ".[docs]" && sphinx-build -W -c docs . build/book      # then open build/book/docs/index.html
"""

import re
from pathlib import Path

import jupyter_server_mathjax

import potara_lite

project = "potara_lite"
author = copyright = "the potara_lite developers"
release = potara_lite.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
root_doc = "docs/index"
include_patterns = [
    "README.md",
    "docs/**",
    "notebooks/**",
    "benchmarks/README.md",
    "benchmarks/quick.md",
    "data/README.md",
]
exclude_patterns = ["**/.ipynb_checkpoints", "docs/decks/**"]  # decks.py builds the decks

nb_execution_mode = "off"  # what is committed was executed; CI executes it again
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "attrs_inline"]
myst_heading_anchors = 3
nb_ipywidgets_js = {}  # the sliders carry a page that needs no kernel
nb_mime_priority_overrides = [("html", "application/vnd.jupyter.widget-view+json", None)]
suppress_warnings = ["mystnb.unknown_mime_type"]

html_theme = "furo"  # search, dark mode, previous and next
html_title = "potara_lite"
html_static_path = ["static", str(Path(jupyter_server_mathjax.__file__).parent / "static")]  # formulas offline
html_css_files = ["book.css"]
mathjax_path = "MathJax.js?config=TeX-AMS-MML_HTMLorMML-full,Safe"
mathjax2_config = {
    "HTML-CSS": {"availableFonts": [], "imageFont": None, "preferredFont": None, "webFont": "STIX-Web"},
    "tex2jax": {"processClass": "math", "ignoreClass": "body", "inlineMath": [["\\(", "\\)"]]},
    "messageStyle": "none",
    "showMathMenu": False,
}
myst_update_mathjax = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_mock_imports = ["flwr"]  # the extra `flower` is not needed to read
autodoc_default_options = {"members": True}


def as_restructured_text(app, what, name, obj, options, lines):
    """The docstrings are prose with literals: keep bars outside of literals from becoming substitutions."""
    lines[:] = [re.sub(r"(?<![`|])\|(?=[^|`]*\|)(?![^`]*``)", r"\\|", line) for line in lines]


def setup(app):
    app.connect("autodoc-process-docstring", as_restructured_text)
