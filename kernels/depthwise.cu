// Depthwise convolution and its input gradient, for few channels in a group.
//
//     y[n, g, k, o]  = bias[g, k] + sum over c, t of w[g, k, c, t] * x[n, g, c, i]
//     dx[n, g, c, i] = bias[g, c] + sum over k, t, o of w[g, k, c, t] * dy[n, g, k, o]
//
// with i = first + o * stride + t * dilation, and w conjugated where that is asked, as
// in a gradient; no array is copied, and cells outside x are
// passed over, not multiplied by zero.  direct.cuh says how arrays are addressed.
//
// One thread owns one cell of the result in one channel, and IMAGES images of it.  The
// taps that meet the cell are a range along every axis (`taps_inside`; `taps_reaching`),
// found once for all images, so that the loop over taps tests nothing.  Each result is
// written once, its terms added in a fixed order.  Neighbouring threads own neighbouring
// cells, or channels when these lie closer together in the result: writes, and reads at
// stride 1, are coalesced.
//
// Bytes: x and the result pass through memory once; a tap's reads come from the cache, as
// neighbours have just read them.  With 9 taps, a float32 result costs 9 reads of x and,
// shared by 4 images, 9/4 of w for 8 bytes of memory traffic.
//
// The input gradient at stride s could be s^rank launches at stride 1, one for each
// residue (`ConvGeometry.phases`).  Each of them reads dy again, and writes every s-th
// cell of dx, a part of each 32-byte sector: at stride 2 in a plane, dy four times and
// every sector of dx twice.  Gathering writes dx once, coalesced, and reads dy once, in
// one launch; what it pays is that neighbouring threads have different numbers of taps.

#define RANK 3
#define CELL int
#ifndef ELEMENT
#define ELEMENT float32_t
#define SUM float32_t
#endif
#ifndef RESULT
#define RESULT ELEMENT
#endif

#include "element.cuh"
#include "index.cuh"
#include "direct.cuh"

struct Walk {
    INDEX source, w;  // where the first tap is
    INDEX source_step[RANK], w_step[RANK];
    CELL count[RANK];
};

// Add the range of taps along one axis.
__device__ inline void add_axis(Walk &walk, int r, CELL cell, const Direct &d)
{
    const Axis &axis = d.axis[r];
    const Reach reach = d.adjoint ? taps_reaching(cell, axis) : taps_inside(cell, axis);
    walk.source += reach.cell * axis.x_step;
    walk.source_step[r] = reach.cell_step * axis.x_step;
    walk.w += reach.tap * axis.tap_step;
    walk.w_step[r] = reach.tap_step * axis.tap_step;
    walk.count[r] = reach.count;
}

// One cell of the result in as many images as COUNT.
template <int COUNT>
__device__ inline void sum_up(
    const ELEMENT *source, const ELEMENT *w, RESULT *out, SUM start, const Walk &walk,
    const Direct &d)
{
    SUM sums[COUNT];
#pragma unroll
    for (int m = 0; m < COUNT; ++m) sums[m] = start;
    // The images are what is unrolled; to unroll the taps too costs registers.
#pragma unroll 1
    for (CELL c = 0; c < d.inner; ++c)
#pragma unroll 1
        for (CELL a = 0; a < walk.count[0]; ++a)
#pragma unroll 1
            for (CELL b = 0; b < walk.count[1]; ++b) {
                INDEX from = c * d.source_channel + a * walk.source_step[0];
                INDEX with = c * d.w_inner + a * walk.w_step[0] + b * walk.w_step[1];
                from += b * walk.source_step[1];
#pragma unroll 1
                for (CELL t = 0; t < walk.count[2]; ++t) {
                    const SUM own = widen(w[with]);
                    const SUM weight = d.conjugated ? conjugate(own) : own;
#pragma unroll
                    for (int m = 0; m < COUNT; ++m) {
                        const SUM value = widen(source[from + m * d.source_image]);
                        add_product(sums[m], weight, value);
                    }
                    from += walk.source_step[2];
                    with += walk.w_step[2];
                }
            }
#pragma unroll
    for (int m = 0; m < COUNT; ++m) out[m * d.out_image] = Stored<RESULT>::of(sums[m]);
}

extern "C" __global__ void __launch_bounds__(256, 2) depthwise(
    const ELEMENT *__restrict__ source, const ELEMENT *__restrict__ w,
    const ELEMENT *__restrict__ bias, RESULT *__restrict__ out, const Direct d)
{
    for (INDEX item = first_item(); item < d.items; item += item_step()) {
        INDEX rest = item, to = 0;
        CELL lane = 0;
        Walk walk = {};
        if (d.channels_fastest) lane = take(rest, d.by_lanes);
#pragma unroll
        for (int r = RANK - 1; r >= 0; --r) {
            const Axis &axis = d.axis[r];
            const CELL cell = take(rest, d.adjoint ? axis.by_size : axis.by_out);
            to += cell * axis.out_step;
            add_axis(walk, r, cell, d);
        }
        if (!d.channels_fastest) lane = take(rest, d.by_lanes);
        const SUM start = bias ? (SUM)widen(bias[lane * d.bias_step]) : SUM();
        const CELL own = take(lane, d.by_own);  // the lane becomes its group
        const CELL first = (CELL)rest * d.each, last = smaller(first + d.each, d.images);
        walk.source += lane * d.source_group + first * d.source_image;
        walk.w += lane * d.w_group + own * d.w_own;
        to += lane * d.out_group + own * d.out_channel + first * d.out_image;
        if (last - first == IMAGES) {
            sum_up<IMAGES>(source + walk.source, w + walk.w, out + to, start, walk, d);
            continue;
        }
        for (CELL image = first; image < last; ++image) {
            sum_up<1>(source + walk.source, w + walk.w, out + to, start, walk, d);
            walk.source += d.source_image;
            to += d.out_image;
        }
    }
}
