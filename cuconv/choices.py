"""Strings that users choose from, and the hint where one is misspelt."""

import difflib
from collections.abc import Collection, Iterable
from typing import Literal, TypeAlias

import numpy as np

# For type checkers.  Layouts and paddings are taken in any case.
Layout: TypeAlias = Literal[
    "channels_first",
    "channels_last",
    "NCL",
    "NCW",
    "NCHW",
    "NCDHW",
    "NLC",
    "NWC",
    "NHWC",
    "NDHWC",
]
PaddingWord: TypeAlias = Literal[
    "valid",
    "full",
    "same",
    "same_lower",
    "causal",
    "VALID",
    "SAME",
    "SAME_UPPER",
    "SAME_LOWER",
]
StrategyWord: TypeAlias = Literal[
    "auto",
    "benchmark",
    "im2col",
    "partial_im2col",
    "pointwise",
    "tap_matmul",
    "winograd",
    "depthwise",
    "fft",
    "implicit_gemm",
    "cudnn",
]
Order: TypeAlias = Literal["rows", "columns", "batched"]
Operation: TypeAlias = Literal[
    "forward",
    "input_grad",
    "weight_grad",
    "transpose",
    "transpose_input_grad",
    "transpose_weight_grad",
]
Gradient: TypeAlias = Literal["x", "w", "bias"]
# Type checkers infer strings in a tuple as such only where a tuple is named.
Gradients: TypeAlias = tuple[Gradient, ...] | Collection[Gradient]


def hint(given: object, known: Iterable[str]) -> str:
    """The end of an error message: the string that was probably meant, if any."""
    by_folded = {word.casefold(): word for word in known}
    found = difflib.get_close_matches(str(given).casefold(), by_folded, n=1)
    return f": did you mean {by_folded[found[0]]!r}?" if found else ""


def check_choice(name: str, value: object, known: Iterable[str], also: str = "") -> str:
    """The one of these strings that a value is, in any case; raise if it is none.

    ``also`` is what the option takes beside strings, for the message.
    """
    words = tuple(known)
    if isinstance(value, str):
        folded = value.casefold()
        for word in words:
            if word.casefold() == folded:
                return word
    raise not_a_choice(name, value, words, also)


def not_a_choice(
    name: str, value: object, known: Iterable[str], also: str = ""
) -> ValueError:
    """The error of a value that is none of these strings."""
    words = tuple(known)
    listed = ", ".join(map(repr, words))
    return ValueError(
        f"{name} must be {also}one of {listed}; got {value!r}{hint(value, words)}"
    )


def check_flag(name: str, value: object) -> bool:
    """Raise if a value is neither True nor False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False; got {value!r}")
    return bool(value)


def check_options(given: Iterable[str], known: Iterable[str]) -> None:
    """Raise for the first name that is no option."""
    names = tuple(known)
    for name in sorted(set(given) - set(names)):
        listed = ", ".join(names)
        raise TypeError(
            f"there is no option {name!r}; the options are {listed}{hint(name, names)}"
        )
