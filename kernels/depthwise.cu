// Depthwise convolution and its input gradient, for few channels in a group.
//
//     y[n, g, k, o]  = bias[g, k] + sum over c, t of w[g, k, c, t] * x[n, g, c, i]
//     dx[n, g, c, i] = bias[g, c] + sum over k, t, o of w[g, k, c, t] * dy[n, g, k, o]
//
// with i = first + o * stride + t * dilation, and w conjugated if asked for, as in a
// gradient; no array is copied, and elements outside x are skipped, not multiplied by
// zero.  direct.cuh documents how arrays are addressed.
//
// One thread owns one element of the result in one channel, and IMAGES images of it.
// The taps for the element are a range along every axis (`taps_inside`;
// `taps_reaching`), computed once for all images, so that the loop over taps has no
// tests.  Each result is written once, its terms added in a fixed order.  Neighbouring
// threads own neighbouring elements, or channels if those have the smaller step in the
// result: writes, and reads at stride 1, are coalesced.
//
// Bytes: x and the result pass through memory once; a tap's reads come from the cache,
// as neighbours have just read them.  With 9 taps, a float32 result costs 9 reads of x
// and, shared by 4 images, 9/4 of w for 8 bytes of memory traffic.
//
// The input gradient at stride s could be s^rank launches at stride 1, one for each
// residue (`ConvGeometry.phases`).  Each of them reads dy again, and writes every s-th
// element of dx, a part of each 32-byte sector: at stride 2 in a plane, dy four times
// and every sector of dx twice.  Gathering writes dx once, coalesced, and reads dy
// once, in one launch; its cost is that neighbouring threads have different numbers of
// taps.

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

struct TapRange {
    INDEX source, w;  // offsets of the first tap
    INDEX source_step[RANK], w_step[RANK];
    CELL count[RANK];
};

// Add the range of taps along one axis.
__device__ inline void add_axis(TapRange &range, int r, CELL cell, const Direct &d)
{
    const Axis &axis = d.axis[r];
    const Reach reach = d.adjoint ? taps_reaching(cell, axis) : taps_inside(cell, axis);
    range.source += reach.cell * axis.x_step;
    range.source_step[r] = reach.cell_step * axis.x_step;
    range.w += reach.tap * axis.tap_step;
    range.w_step[r] = reach.tap_step * axis.tap_step;
    range.count[r] = reach.count;
}

// One element of the result in COUNT images.
template <int COUNT>
__device__ inline void sum_up(
    const ELEMENT *source, const ELEMENT *w, RESULT *out, SUM start, const TapRange &range,
    const Direct &d)
{
    SUM sums[COUNT];
#pragma unroll
    for (int m = 0; m < COUNT; ++m) sums[m] = start;
    // Images are unrolled; unrolling the taps too would cost registers.
#pragma unroll 1
    for (CELL c = 0; c < d.inner; ++c)
#pragma unroll 1
        for (CELL a = 0; a < range.count[0]; ++a)
#pragma unroll 1
            for (CELL b = 0; b < range.count[1]; ++b) {
                INDEX from = c * d.source_channel + a * range.source_step[0];
                INDEX with = c * d.w_inner + a * range.w_step[0] + b * range.w_step[1];
                from += b * range.source_step[1];
#pragma unroll 1
                for (CELL t = 0; t < range.count[2]; ++t) {
                    const SUM own = widen(w[with]);
                    const SUM weight = d.conjugated ? conjugate(own) : own;
#pragma unroll
                    for (int m = 0; m < COUNT; ++m) {
                        const SUM value = widen(source[from + m * d.source_image]);
                        add_product(sums[m], weight, value);
                    }
                    from += range.source_step[2];
                    with += range.w_step[2];
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
        CELL channel = 0;
        TapRange range = {};
        if (d.channels_fastest) channel = take(rest, d.by_channels);
#pragma unroll
        for (int r = RANK - 1; r >= 0; --r) {
            const Axis &axis = d.axis[r];
            const CELL cell = take(rest, d.adjoint ? axis.by_size : axis.by_out);
            to += cell * axis.out_step;
            add_axis(range, r, cell, d);
        }
        if (!d.channels_fastest) channel = take(rest, d.by_channels);
        const SUM start = bias ? (SUM)widen(bias[channel * d.bias_step]) : SUM();
        const CELL own = take(channel, d.by_own);  // the channel becomes its group
        const CELL first = (CELL)rest * d.each, last = smaller(first + d.each, d.images);
        range.source += channel * d.source_group + first * d.source_image;
        range.w += channel * d.w_group + own * d.w_own;
        to += channel * d.out_group + own * d.out_channel + first * d.out_image;
        if (last - first == IMAGES) {
            sum_up<IMAGES>(source + range.source, w + range.w, out + to, start, range, d);
            continue;
        }
        for (CELL image = first; image < last; ++image) {
            sum_up<1>(source + range.source, w + range.w, out + to, start, range, d);
            range.source += d.source_image;
            to += d.out_image;
        }
    }
}
