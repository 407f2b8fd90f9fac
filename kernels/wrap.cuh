// Padding modes: the element that is read for a coordinate outside an axis, and the
// inverse.
//
// The modes of `cuconv.geometry.PADDING_MODES`: zeros, reflect (at the first element
// and at the last), symmetric (at the edges before and after them, so that both are
// repeated), replicate (the nearest element), and circular (the axis repeated).

enum { ZEROS, REFLECT, SYMMETRIC, REPLICATE, CIRCULAR };

// The coordinates after which a mode repeats.
__device__ inline INDEX period_of(INDEX size, int mode)
{
    return mode == CIRCULAR ? size : 2 * (size - (mode == REFLECT));
}

// The element that is read for coordinate i.
__device__ inline INDEX wrapped(INDEX i, INDEX size, int mode)
{
    if ((UNSIGNED_INDEX)i < (UNSIGNED_INDEX)size) return i;
    if (mode == REPLICATE || size == 1) return i < 0 ? 0 : size - 1;
    const INDEX period = period_of(size, mode);
    INDEX rest = i % period;
    if (rest < 0) rest += period;
    return rest < size ? rest : period - rest - (mode == SYMMETRIC);
}

// The coordinates in a window that read one element: two sequences of equal steps.
struct Readers {
    INDEX first, count, other_first, other_count, step;
};

__device__ inline INDEX reader(const Readers &r, INDEX number)
{
    return number < r.count ? r.first + number * r.step
                            : r.other_first + (number - r.count) * r.step;
}

// The number of first, first + step, first + 2 * step, … before the end.
__device__ inline INDEX count_up(INDEX first, INDEX end, INDEX step)
{
    return first < end ? (end - 1 - first) / step + 1 : 0;
}

// The smallest coordinate from `start` on that is i modulo the period.
__device__ inline INDEX from_on(INDEX start, INDEX i, INDEX period)
{
    INDEX rest = (i - start) % period;
    return start + (rest < 0 ? rest + period : rest);
}

// Counted from the start of the window, which covers [start, start + length).
__device__ inline Readers readers_of(
    INDEX i, INDEX size, INDEX start, INDEX length, int mode)
{
    const INDEX end = start + length;
    Readers r = {0, 0, 0, 0, 1};
    if (mode == ZEROS || mode == REPLICATE || size == 1) {
        const bool repeats = mode != ZEROS;
        INDEX low = repeats && i == 0 ? start : i;
        INDEX high = repeats && i == size - 1 ? end : i + 1;
        if (low < start) low = start;
        if (high > end) high = end;
        r.first = low - start;
        r.count = high > low ? high - low : 0;
        return r;
    }
    r.step = period_of(size, mode);
    INDEX first = from_on(start, i, r.step);
    r.first = first - start;
    r.count = count_up(first, end, r.step);
    if (mode == SYMMETRIC || (mode == REFLECT && i != 0 && i != size - 1)) {
        first = from_on(start, -i - (mode == SYMMETRIC), r.step);
        r.other_first = first - start;
        r.other_count = count_up(first, end, r.step);
    }
    return r;
}
