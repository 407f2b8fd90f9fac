// The gradient of pooling for its input.
//
//     dx[n, c, i] = sum of dy[n, c, o] * slope(o, i)
//
// over the outputs o with a window over element i.  Of a maximum, the slope is 1 where
// the maximum of o is at i (as `indices` say or, without them, as x does) and else 0, so
// that an index which is not of an element under its window adds to none;
// of a mean, 1 / count(o); of a p-norm, (|x| / y)^(p - 1) sign(x), and 0 if y or x is:
// the square of a ratio of roots, where y^(1 - p) and |x|^(p - 1) can overflow or
// underflow.
//
// One thread owns one element and gathers from the outputs over it, in a fixed order:
// no atomics, and the same bits on every run.  Without indices, every output's window
// is searched once more by every element under it: as many reads as taps, squared.

#define RANK 3

#include "element.cuh"
#include "index.cuh"
#include "pool.cuh"

#if KIND == NORM
// The root of (size / norm)^power, and 0 if either is 0.
__device__ inline SUM root_of_slope(SUM size, SUM norm, double power)
{
    if (size == 0 || norm == 0) return 0;
    return raised(root(size) / root(norm), power);
}
#endif

// The gradient from one output to one element.
__device__ inline SUM share_of(
    SUM dy, const ELEMENT *y, const long long *indices, INDEX at, const VALUE *x,
    INDEX plane, const INDEX (&o)[RANK], INDEX own, long long index, SUM size,
    const Pool &p)
{
#if KIND == MAXIMUM
    if (indices) return indices[at] == index ? dy : SUM();
    Span cells[RANK];
#pragma unroll
    for (int r = 0; r < RANK; ++r) cells[r] = cells_under(o[r], p.axis[r]);
    return best_of<true>(x + plane, cells, p).index == own ? dy : SUM();
#elif KIND == MEAN
    return divided(dy, divisor_of(o, p));
#else
    const SUM half = root_of_slope(size, summand(y[at]), p.norm - 1);
    return dy * half * half;
#endif
}

extern "C" __global__ void pool_gradient(
    const ELEMENT *__restrict__ dy, const ELEMENT *__restrict__ y,
    const long long *__restrict__ indices, const VALUE *__restrict__ x,
    RESULT *__restrict__ dx, const Pool p)
{
    for (INDEX item = first_item(); item < p.items; item += item_step()) {
        INDEX rest = item, channel = 0, to = 0, own = 0, x_at = 0;
        Span over[RANK];
        if (p.channels_fastest) channel = take(rest, p.by_channels);
#pragma unroll
        for (int r = RANK - 1; r >= 0; --r) {
            const PoolAxis &axis = p.axis[r];
            const INDEX i = take(rest, axis.windows.by_size);
            to += i * axis.windows.x_step;
            own += i * axis.windows.tap_step;
            x_at += i * axis.other_x;
            over[r] = outputs_over(i, axis);
        }
        if (!p.channels_fastest) channel = take(rest, p.by_channels);
        const INDEX plane = rest * p.other_x_image + channel * p.other_x_channel;
        const INDEX from = rest * p.y_image + channel * p.y_channel;
        const INDEX other = rest * p.other_y_image + channel * p.other_y_channel;
        const long long index = index_of(own, rest, channel, p);
        SUM sum = {}, size = {};
#if KIND == NORM
        const SUM value = summand(x[plane + x_at]);
        size = magnitude(value);
#endif
#pragma unroll 1
        for (INDEX i = 0; i < over[0].count; ++i)
#pragma unroll 1
            for (INDEX j = 0; j < over[1].count; ++j)
#pragma unroll 1
                for (INDEX k = 0; k < over[2].count; ++k) {
                    const INDEX o[RANK] = {
                        over[0].first + i * over[0].step,
                        over[1].first + j * over[1].step,
                        over[2].first + k * over[2].step};
                    INDEX at = from, other_at = other;
#pragma unroll
                    for (int r = 0; r < RANK; ++r) {
                        at += o[r] * p.axis[r].windows.out_step;
                        other_at += o[r] * p.axis[r].other_y;
                    }
                    const SUM all = summand(dy[at]);
                    const SUM share = share_of(
                        all, y, indices, other_at, x, plane, o, own, index, size, p);
                    add_to(sum, share);
                }
#if KIND == NORM
        if (value < 0) sum = -sum;
#endif
        dx[to + rest * p.x_image + channel * p.x_channel] = finished(sum);
    }
}
