"""The size of the result of a transposed convolution, axis by axis."""

from typing import NamedTuple

from cuconv.geometry.axis import Axis, Range
from cuconv.geometry.options import (
    SIZED_WORDS,
    _check_word_rank,
    pads_of,
    per_axis,
)


class Ends(NamedTuple):
    """The options that determine the size of the result of a transposed convolution."""

    padding: object
    output_padding: object
    output_size: object

    @property
    def word(self) -> str | None:
        """The padding, if it is a string that determines the size of the result."""
        is_word = isinstance(self.padding, str) and self.padding in SIZED_WORDS
        return str(self.padding) if is_word else None


class Source(NamedTuple):
    """One axis of the input of a transposed convolution, with its options."""

    axis: int
    size: int
    kernel: int
    stride: int
    dilation: int

    @property
    def reach(self) -> int:
        """Elements from the first one that a tap writes to the last, both included."""
        return (self.size - 1) * self.stride + self.dilation * (self.kernel - 1) + 1

    @property
    def most_more(self) -> int:
        """The largest output_padding."""
        return max(self.stride, self.dilation) - 1

    def checked(self, more: int) -> int:
        """Raise if an output_padding is too large."""
        if more > self.most_more:
            raise ValueError(
                f"output_padding of spatial axis {self.axis} is {more}; it must be "
                f"less than stride {self.stride} or dilation {self.dilation}, "
                "whichever is larger"
            )
        return more

    def padded(self, pads: Range, more: int) -> Axis:
        """The axis of the adjoint convolution."""
        before, after = pads
        size = self.reach - before - after + more
        if size < 0:
            raise ValueError(
                f"the result has {size} elements on spatial axis {self.axis}: x has "
                f"{self.size}, which reach {self.reach} (kernel {self.kernel}, stride "
                f"{self.stride}, dilation {self.dilation}), less padding {before} and "
                f"{after}, plus output_padding {more}"
            )
        # A whole stride more would have room for another window: it is cropped.
        after -= more - more % self.stride
        return Axis(size, self.kernel, self.stride, self.dilation, before, after)

    def of_word(self, word: str, wanted: int | None, more: int) -> Axis:
        """The axis for padding as a string: ``wanted`` elements, or size · stride.

        The size determines what is cropped, ``more`` elements after the last included.
        """
        size = self.size * self.stride if wanted is None else wanted
        total = max(self.reach + more - size, 0)
        before = {
            "same": total // 2,
            "same_lower": total - total // 2,
            "causal": self.dilation * (self.kernel - 1),
        }[word]
        after = max(self.reach - before - size, 0)
        left = self.reach - before - after
        if wanted is not None:
            self._check_size(size, 0, left + self.most_more)
        return self.padded((before, after), size - left)

    def of_size(self, pads: Range, wanted: int) -> Axis:
        """The axis with the output_padding that makes ``wanted`` elements."""
        least = self.reach - sum(pads)
        self._check_size(wanted, least, least + self.most_more)
        return self.padded(pads, wanted - least)

    def _check_size(self, size: int, least: int, most: int) -> None:
        if not least <= size <= most:
            raise ValueError(
                f"output_size of spatial axis {self.axis} is {size}; it can be "
                f"{least} … {most}"
            )


def transposed_axes(sources: list[Source], ends: Ends) -> tuple[Axis, ...]:
    """The axes of the convolution whose input gradient has the result's size."""
    rank, word = len(sources), ends.word
    more = per_axis("output_padding", ends.output_padding, rank, 0)
    is_split = word in ("same", "same_lower") and ends.output_size is not None
    sized = word is not None or ends.output_size is not None
    if any(more) and sized and not is_split:
        other = f"padding {word!r}" if word else f"output_size {ends.output_size}"
        raise ValueError(
            f"output_padding {ends.output_padding} and {other} both determine the "
            "size of the result: give one of them"
        )
    more = tuple(s.checked(cells) for s, cells in zip(sources, more, strict=True))
    wanted: tuple[int | None, ...] = (None,) * rank
    if ends.output_size is not None:
        wanted = per_axis("output_size", ends.output_size, rank, 0)
    if word is not None:
        _check_word_rank(word, rank)
        each = zip(sources, wanted, more, strict=True)
        return tuple(s.of_word(word, size, cells) for s, size, cells in each)
    _, sizes, kernel, strides, dilations = zip(*sources, strict=True)
    pads = pads_of(ends.padding, sizes, kernel, strides, dilations)
    return tuple(
        source.padded(pair, cells) if size is None else source.of_size(pair, size)
        for source, pair, cells, size in zip(sources, pads, more, wanted, strict=True)
    )
