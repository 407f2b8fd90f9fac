"""Sphinx configuration: furo, MyST pages, docstrings by autodoc."""

import re

import cuconv

project = "cuconv"
author = "the cuconv developers"
project_copyright = "the cuconv developers"
release = version = cuconv.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "examples"]
default_role = "py:obj"
html_theme = "furo"
html_title = f"cuconv {release}"
html_copy_source = False

autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_rtype = False
myst_heading_anchors = 3

# Docstrings write shapes and norms as people do: (N, C, *spatial) is no emphasis, and
# |a - b| no substitution.
_MARKUP = re.compile(r"(?<![`*\\\\])(?:\*(?=\w)|\|)")


def _escape(*event):
    lines = event[-1]
    for i, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            lines[i] = _MARKUP.sub(r"\\\g<0>", line)


def setup(app):
    # Before napoleon, which has a priority of 500 and writes markup of its own.
    app.connect("autodoc-process-docstring", _escape, priority=400)
