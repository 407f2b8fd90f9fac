"""Sphinx configuration: furo, MyST pages, docstrings by autodoc, figures drawn anew."""

import importlib
import re
import sys
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

import cuconv

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

PUBLIC_MODULES = ("cuconv", "cuconv.layers", "cuconv.testing")

project = "cuconv"
author = "the cuconv developers"
project_copyright = "the cuconv developers"
release = version = cuconv.__version__

extensions = [
    "myst_nb",
    "sphinx_copybutton",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "_figures", "examples", "jupyter_execute"]
default_role = "py:obj"
html_theme = "furo"
html_math_renderer = "mathml"
html_title = f"cuconv {release}"
html_copy_source = False

autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_google_docstring = False
napoleon_use_rtype = False
nb_execution_mode = "force"
nb_execution_raise_on_error = True
# Prompts and results of examples are not copied.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]

# Docstrings write shapes and norms as people do: (N, C, *spatial) is no emphasis, and
# |a - b| no substitution.
_MARKUP = re.compile(r"(?<![`*\\\\])(?:\*(?=\w)|\|)")


def _escape(*event):
    lines = event[-1]
    for i, line in enumerate(lines):
        if not line.lstrip().startswith((">>>", "...")):
            lines[i] = _MARKUP.sub(r"\\\g<0>", line)


def _formula(*, as_block):
    """A visitor that writes a formula as MathML, which browsers read by themselves."""

    def visit(translator, node):
        translator.body.append(tex2mathml(node.astext(), as_block=as_block))
        raise nodes.SkipNode

    return visit, None


def _draw_figures(_app):
    importlib.import_module("figures").draw_all(HERE / "_figures")


def public_names():
    """Every public name of the library, as the reference must list it."""
    for module in map(importlib.import_module, PUBLIC_MODULES):
        own = (n for n, value in vars(module).items() if _is_own(n, value, module))
        for name in getattr(module, "__all__", own):
            yield f"{module.__name__}.{name}"


def _is_own(name, value, module):
    return (
        callable(value)
        and not name.startswith("_")
        and value.__module__ == module.__name__
    )


def _check_reference(_app, env):
    listed = env.get_domain("py").objects
    for name in public_names():
        if name not in listed:
            logging.getLogger(__name__).warning("%s is not in the reference", name)


def setup(app):
    app.add_html_math_renderer(
        "mathml",
        inline_renderers=_formula(as_block=False),
        block_renderers=_formula(as_block=True),
    )
    # Before napoleon, which has a priority of 500 and writes markup of its own.
    app.connect("autodoc-process-docstring", _escape, priority=400)
    app.connect("builder-inited", _draw_figures)
    app.connect("env-updated", _check_reference)
