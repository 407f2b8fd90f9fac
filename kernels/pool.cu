// Pooling: the maximum, the mean or the norm of the elements under every window.
//
//     y[n, c, o] = max over i of x[n, c, i],   or  (sum over i of x[n, c, i]) / count(o),
//                  or  (sum over i of |x[n, c, i]|^p)^(1/p)
//
// over the elements i under the window of o; pool.cuh says which.  With `indices`, the
// index of each maximum is written too, or (TAKE) the element with that index is y, and
// 0 where an index is not of an element under its window.  A norm whose sum of powers
// overflows or underflows is computed anew, from elements divided by the largest.
//
// One thread owns one output, reads each of its elements once, and writes once; sums
// are added in row-major order.  The elements under a window are a range along every
// axis, computed before the loop, which has no tests.  Neighbouring threads own
// neighbouring outputs, or channels if those have the smaller step: writes, and reads
// at stride 1, are coalesced; shared elements come from the cache.
//
// Bytes: x and y pass through memory once.  A maximum over a box could be taken axis by
// axis, with fewer reads, but the intermediate results would cost more bytes of memory
// than the cache saves.

#define RANK 3

#include "element.cuh"
#include "index.cuh"
#include "pool.cuh"

#if KIND == NORM
// The least sum of powers that has full accuracy: those that underflow are less than
// the square of epsilon of it; and the largest finite number.
__device__ inline bool is_safe(float sum) { return sum > 8.3e-25f && sum < 3.4e38f; }
__device__ inline bool is_safe(double sum) { return sum > 4.6e-277 && sum < 1.79e308; }
#endif

#if KIND == MEAN || KIND == NORM
// The sum over a window of elements or, for a norm, of powers of elements / scale; with
// LARGEST the largest magnitude.
template <bool LARGEST>
__device__ inline SUM sum_of(
    const ELEMENT *x, const Span (&s)[RANK], const Pool &p, SUM scale)
{
    SUM sum = {};
    INDEX step[RANK];
#pragma unroll
    for (int r = 0; r < RANK; ++r) {
        x += s[r].first * p.axis[r].windows.x_step;
        step[r] = s[r].step * p.axis[r].windows.x_step;
    }
#pragma unroll 1
    for (INDEX i = 0; i < s[0].count; ++i)
#pragma unroll 1
        for (INDEX j = 0; j < s[1].count; ++j) {
            INDEX at = i * step[0] + j * step[1];
#pragma unroll 1
            for (INDEX k = 0; k < s[2].count; ++k, at += step[2]) {
#if KIND == NORM
                const SUM size = magnitude(summand(x[at]));
                if (LARGEST) sum = size > sum ? size : sum;
                else sum += raised(size / scale, p.norm);
#else
                add_to(sum, summand(x[at]));
#endif
            }
        }
    return sum;
}
#endif

#if KIND == NORM
__device__ inline SUM norm_of(const ELEMENT *x, const Span (&s)[RANK], const Pool &p)
{
    const SUM sum = sum_of<false>(x, s, p, 1);
    if (p.norm > 1 && !is_safe(sum)) {
        const SUM largest = sum_of<true>(x, s, p, 1);
        // Not for a window of zeros, an infinity or a NaN.
        if (sum == sum && largest > 0 && largest - largest == 0)
            return largest * raised(sum_of<false>(x, s, p, largest), 1 / p.norm);
    }
    return raised(sum, 1 / p.norm);
}
#endif

extern "C" __global__ void pool(
    const ELEMENT *__restrict__ x, RESULT *__restrict__ y,
    long long *__restrict__ indices, const Pool p)
{
    for (INDEX item = first_item(); item < p.items; item += item_step()) {
        INDEX rest = item, channel = 0, to = 0, index_to = 0;
        INDEX o[RANK];
        Span cells[RANK];
        if (p.channels_fastest) channel = take(rest, p.by_channels);
#pragma unroll
        for (int r = RANK - 1; r >= 0; --r) {
            const PoolAxis &axis = p.axis[r];
            o[r] = take(rest, axis.windows.by_out);
            to += o[r] * axis.windows.out_step;
            index_to += o[r] * axis.other_y;
            cells[r] = cells_under(o[r], axis);
        }
        if (!p.channels_fastest) channel = take(rest, p.by_channels);
        const ELEMENT *from = x + (rest * p.x_image + channel * p.x_channel);
        to += rest * p.y_image + channel * p.y_channel;
#if KIND == MAXIMUM
        const Best best = best_of<false>(from, cells, p);
        const bool none = best.index < 0;
        y[to] = none ? finished(p.least) : finished(best.value);
        index_to += rest * p.other_y_image + channel * p.other_y_channel;
        if (indices)
            indices[index_to] = none ? -1 : index_of(best.index, rest, channel, p);
#elif KIND == TAKE
        index_to += rest * p.other_y_image + channel * p.other_y_channel;
        INDEX at;
        const bool found = find_index(indices[index_to], rest, channel, cells, p, at);
        y[to] = found ? from[at] : RESULT();
#elif KIND == MEAN
        const SUM sum = sum_of<false>(from, cells, p, SUM());
        y[to] = finished(divided(sum, divisor_of(o, p)));
#else
        y[to] = finished(norm_of(from, cells, p));
#endif
    }
}
