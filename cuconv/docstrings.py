"""Sections of docstrings that several functions share, written once."""

import re
import textwrap
from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")

_MARK = re.compile(r"^( *)\{([\w*, :]+)\}$", re.MULTILINE)


def shares(sections: Mapping[str, str]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Fill in the lines of a docstring that are a name in braces.

    ``{stride}`` becomes the name and, indented below it, ``sections["stride"]``.  What
    follows a colon chooses among several texts of one name: ``{padding: zeros}``.
    ``{*windows}`` becomes ``sections["*windows"]`` alone.  There may be more such lines
    in a section.

    Examples
    --------
    >>> from cuconv.docstrings import shares
    >>> def double(x):
    ...     '''Double it.
    ...
    ...     {x: any}
    ...     '''
    >>> print(shares({"x: any": "Any number."})(double).__doc__)
    Double it.
    <BLANKLINE>
        x
            Any number.
    <BLANKLINE>
    """

    def filled(match: re.Match[str]) -> str:
        indent, key = match.groups()
        heading = "" if key.startswith("*") else f"{indent}{key.partition(':')[0]}\n"
        inner = indent + "    " if heading else indent
        text = textwrap.indent(sections[key].strip("\n"), inner)
        return heading + _MARK.sub(filled, text)

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        if function.__doc__ is not None:
            function.__doc__ = _MARK.sub(filled, function.__doc__)
        return function

    return decorate
