"""Every public name is in the reference and shows an example that runs."""

import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import ROOT

import cuconv

PAGES = ROOT / "docs"
MODULES = ("cuconv", "cuconv.layers", "cuconv.testing")
AUTODOC = re.compile(r"^\.\. auto(?:function|class|exception):: (\S+)$", re.MULTILINE)


def public(name: str) -> Iterator[tuple[str, Any]]:
    """The public names of a module: those it lists, or those it defines."""
    module = importlib.import_module(name)
    for word, value in vars(module).items():
        listed = getattr(module, "__all__", None)
        own = getattr(value, "__module__", None) == name and not word.startswith("_")
        if own if listed is None else word in listed:
            yield word, value


NAMES = [(m, word, value) for m in MODULES for word, value in public(m)]


def test_names_are_found():
    assert len(NAMES) > 65
    assert {word for m, word, _ in NAMES if m == "cuconv"} == set(cuconv.__all__)


@pytest.mark.parametrize(
    ("module", "word", "value"), NAMES, ids=[f"{m}.{word}" for m, word, _ in NAMES]
)
def test_a_docstring_says_what_it_does_and_shows_it(module, word, value):
    text = inspect.getdoc(value) or ""
    assert re.search(r"^Examples\n-{8}$", text, re.MULTILINE), f"{module}.{word}"
    assert ">>> " in text.partition("Examples\n")[2]


def test_the_reference_lists_every_name_of_the_package():
    page = (PAGES / "api.md").read_text(encoding="utf-8")
    listed = [name for name in AUTODOC.findall(page) if "." not in name]
    assert sorted(listed) == sorted(cuconv.__all__)


@pytest.mark.parametrize("module", MODULES[1:])
def test_the_reference_lists_other_modules_whole(module):
    page = (PAGES / "api.md").read_text(encoding="utf-8")
    assert f".. automodule:: {module}\n   :members:\n" in page


def test_the_architecture_names_every_file():
    page = (PAGES / "architecture.md").read_text(encoding="utf-8")
    plan = page.partition("```text\n")[2].partition("```")[0]
    package = Path(cuconv.__file__).parent
    files = {path.name for path in package.glob("*.py")} - {"__init__.py", "version.py"}
    assert set(re.findall(r"\w+\.py", plan)) == files
    for path in (package / "composed").glob("*.py"):
        assert f"**`composed/{path.name}`**" in page


def test_no_page_shows_code_that_nobody_runs():
    """Blocks of Python are doctests; programs are included from files that are run."""
    pages = [*PAGES.rglob("*.md"), PAGES.parent / "README.md"]
    blocks = [
        (page.name, block)
        for page in pages
        for block in re.findall(
            r"^```python\n(.*?)^```$",
            page.read_text(encoding="utf-8"),
            re.MULTILINE | re.DOTALL,
        )
    ]
    assert len(blocks) > 80
    assert [block for block in blocks if not block[1].startswith(">>> ")] == []
