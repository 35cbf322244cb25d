"""The book: notebooks as they were committed, the pages of ``docs/`` and the API, as HTML.

    pip install ".[docs]" && sphinx-build -W -c docs . build/book      # then open build/book/docs/index.html
"""

import re

import potara_lite

project = "potara_lite"
author = copyright = "the potara_lite developers"
release = potara_lite.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.viewcode"]
root_doc = "docs/index"
include_patterns = ["docs/**", "notebooks/**", "benchmarks/README.md", "benchmarks/quick.md", "data/README.md", "README.md"]
exclude_patterns = ["**/.ipynb_checkpoints"]

nb_execution_mode = "off"  # what is committed was executed; CI executes it again
nb_merge_streams = True
myst_enable_extensions = ["dollarmath", "attrs_inline"]
myst_heading_anchors = 3
suppress_warnings = ["mystnb.unknown_mime_type"]

html_theme = "furo"  # search, dark mode, previous and next
html_title = "potara_lite"
html_static_path = []

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {"members": True}


def as_restructured_text(app, what, name, obj, options, lines):
    """The docstrings are prose with literals: keep bars from becoming substitutions, and indented shell lines literal."""
    lines[:] = [re.sub(r"(?<![`|])\|(?=[^|`]*\|)(?![^`]*``)", r"\\|", line) for line in lines]


def setup(app):
    app.connect("autodoc-process-docstring", as_restructured_text)
