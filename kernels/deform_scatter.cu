// The gradient of a deformable convolution for x, by scattering.
//
//     x[n, g, c, i] += weight(i) * mask[n, d, t, o] * columns[n, g, c, t, o]
//
// for the 2^RANK elements i around every sample, with their weights as in deform.cuh.
// The caller clears x first.
//
// The work is shared out as in deform_im2col.cu.  Samples of several taps and outputs
// are at one element, so additions are atomic: their order, hence the last bits of a
// sum, differs from run to run.  Sums of halves are float32.

#include "element.cuh"
#include "index.cuh"
#include "deform.cuh"

extern "C" __global__ void deform_scatter(
    const COLUMN *__restrict__ columns, const OFFSET *__restrict__ offset,
    const MASK *__restrict__ mask, SUM *__restrict__ x, const Deform p)
{
    const Geometry &g = p.g;
    for (INDEX item = first_item(); item < g.items; item += item_step()) {
        const Place place = place_of<true>(item, g);
        const INDEX channel = (place.group * g.channels + place.channel) * p.each;
        const INDEX group = quotient(channel, p.by_offset_channels);
        SUM *to = x + x_offset(place, g);
        const COLUMN *from = columns + column_offset(place, g);
#pragma unroll
        for (int r = 0; r < RANK; ++r) from += place.cell[r] * g.axis[r].out_step;
        INDEX tap[RANK] = {}, number = 0;
        do {
            const INDEX at = offset_at(p.offset, place.image, group, number, place.cell);
            const INDEX of = offset_at(p.mask, place.image, group, number, place.cell);
            Between s[RANK];
            sample_at(s, offset + at, place.cell, tap, p);
            const SUM scale = mask_at(mask, of);
            const COLUMN *given = from + tap_offset(tap, g);
#pragma unroll
            for (int c = 0; c < CORNERS; ++c) {
                INDEX cell;
                const SUM share = weight_of(s, c, -1), weight = scale * share;
                // A sample that is nowhere adds to no element.
                if (!corner_at(s, c, g, cell) || share != share) continue;
#pragma unroll 1
                for (INDEX k = 0; k < p.each; ++k)
                    atomic_add(
                        to + cell + k * p.x_channel,
                        weight * (SUM)widen(given[k * p.c_channel]));
            }
            ++number;
        } while (next_tap(tap, g));
    }
}
