// im2col of a deformable convolution.
//
//     columns[n, g, c, t, o] = mask[n, d, t, o] * x(n, g, c, p(n, d, t, o))
//
// with p and x between elements as in deform.cuh.  Each array has its own steps: one
// kernel for channels first and last.
//
// One thread writes all taps of `each` neighbouring channels at one output: it locates
// a sample and weighs its corners once for all of them.  Neighbouring threads have
// neighbouring outputs (or channels, if those have the smaller step in the columns): the
// writes, and the reads of offsets, are coalesced; those of x are as close as the
// offsets leave them.  Every element of the columns is written by exactly one thread.
//
// Bytes: the columns once, taps times x; offsets and mask once for `each` channels; of x
// 2^RANK elements for each of the columns, nearly all from the cache.

#include "element.cuh"
#include "index.cuh"
#include "deform.cuh"

extern "C" __global__ void deform_im2col(
    const ELEMENT *__restrict__ x, const OFFSET *__restrict__ offset,
    const MASK *__restrict__ mask, COLUMN *__restrict__ columns, const Deform p)
{
    const Geometry &g = p.g;
    for (INDEX item = first_item(); item < g.items; item += item_step()) {
        const Place place = place_of<true>(item, g);
        const INDEX channel = (place.group * g.channels + place.channel) * p.each;
        const INDEX group = quotient(channel, p.by_offset_channels);
        const ELEMENT *from = x + x_offset(place, g);
        COLUMN *to = columns + column_offset(place, g);
#pragma unroll
        for (int r = 0; r < RANK; ++r) to += place.cell[r] * g.axis[r].out_step;
        INDEX tap[RANK] = {}, number = 0;
        do {
            const INDEX at = offset_at(p.offset, place.image, group, number, place.cell);
            const INDEX of = offset_at(p.mask, place.image, group, number, place.cell);
            Between s[RANK];
            sample_at(s, offset + at, place.cell, tap, p);
            const SUM scale = mask_at(mask, of);
            SUM weight[CORNERS];
            INDEX cell[CORNERS];
            bool inside[CORNERS];
#pragma unroll
            for (int c = 0; c < CORNERS; ++c) {
                inside[c] = corner_at(s, c, g, cell[c]);
                weight[c] = scale * weight_of(s, c, -1);
            }
            COLUMN *into = to + tap_offset(tap, g);
#pragma unroll 1
            for (INDEX k = 0; k < p.each; ++k) {
                SUM sum = 0;
#pragma unroll
                for (int c = 0; c < CORNERS; ++c)
                    if (inside[c])
                        sum += weight[c] * (SUM)widen(from[cell[c] + k * p.x_channel]);
                into[k * p.c_channel] = Stored<COLUMN>::of(sum);
            }
            ++number;
        } while (next_tap(tap, g));
    }
}
