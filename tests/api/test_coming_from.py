"""The page of other libraries' names: every call in its tables runs."""

import doctest
import re

import numpy as np
import pytest
from scipy import ndimage, signal
from support import ROOT

import cuconv
import cuconv.layers

PAGE = (ROOT / "docs" / "coming_from.md").read_text(encoding="utf-8")
SECTIONS = re.split(r"^## ", PAGE, flags=re.MULTILINE)


def rows() -> list[tuple[str, str, str]]:
    """Section, theirs, ours: the two columns of every line of a table."""
    found = []
    for section in SECTIONS[1:]:
        name = section.partition("\n")[0]
        lines = re.findall(r"^\| (.+) \| `(.+)` \|$", section, re.MULTILINE)
        found += [(name, theirs, ours) for theirs, ours in lines]
    return found


def arrays() -> dict[str, object]:
    """What the first example of the page defines."""
    names: dict[str, object] = {"ndimage": ndimage, "signal": signal}
    for example in doctest.DocTestParser().get_examples(SECTIONS[0]):
        exec(example.source, names)
    return names


@pytest.mark.parametrize(("section", "theirs", "ours"), rows())
def test_every_call_runs(section, theirs, ours):
    names = arrays()
    result = eval(ours, names)
    assert result is not None
    if section.startswith("SciPy"):
        wanted = eval(theirs.strip("`"), names)
        assert result.shape == wanted.shape
        np.testing.assert_allclose(result, wanted, rtol=1e-4, atol=1e-4)


def test_the_page_has_calls():
    assert len(rows()) > 80
    assert arrays()["cuconv"] is cuconv
