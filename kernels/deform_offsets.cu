// The gradients of a deformable convolution for offsets and mask.
//
//     dmask[n, d, t, o]      = sum over c of columns[n, g, c, t, o] * x(n, g, c, p)
//     doffset[n, d, t, r, o] = mask * sum over c of columns[n, g, c, t, o]
//                                              * (x behind p - x before p along axis r)
//
// over the channels of offset group d; `columns` is their gradient, without the mask.
// With dot(i) the sum over c of columns * x[i], for each of the 2^RANK elements around p,
// the first sum is dot times the weights of all axes, and the second is dot times those
// of all axes but r, the element before p with a minus.
//
// One thread owns one sample, and sums over channels in order: no atomics, the same bits
// on every run.  Neighbouring threads have neighbouring outputs, or taps if those have
// the smaller step in the columns.  The Geometry has taps in place of channels, offset
// groups in place of groups; steps to channels are beside it.

#include "element.cuh"
#include "index.cuh"
#include "deform.cuh"

extern "C" __global__ void deform_offsets(
    const ELEMENT *__restrict__ x, const COLUMN *__restrict__ columns,
    const OFFSET *__restrict__ offset, const MASK *__restrict__ mask,
    RESULT *__restrict__ doffset, RESULT *__restrict__ dmask, const Deform p)
{
    const Geometry &g = p.g;
    for (INDEX item = first_item(); item < g.items; item += item_step()) {
        const Place place = place_of<true>(item, g);
        const INDEX number = place.channel, n = place.image, d = place.group;
        INDEX tap[RANK], rest = number;
#pragma unroll
        for (int r = RANK - 1; r >= 0; --r) {
            tap[r] = rest % p.taps[r];
            rest /= p.taps[r];
        }
        Between s[RANK];
        const INDEX at = offset_at(p.offset, n, d, number, place.cell);
        sample_at(s, offset + at, place.cell, tap, p);
        INDEX cell[CORNERS];
        bool inside[CORNERS];
        SUM dot[CORNERS];
#pragma unroll
        for (int c = 0; c < CORNERS; ++c) {
            inside[c] = corner_at(s, c, g, cell[c]);
            dot[c] = 0;
        }
        const COLUMN *given = columns + n * g.c_image + number * g.c_channel;
#pragma unroll
        for (int r = 0; r < RANK; ++r) given += place.cell[r] * g.axis[r].out_step;
        const INDEX first = d * p.offset_channels;
        const ELEMENT *from = x + n * g.x_image + first * p.x_channel;
        INDEX group = first / p.group_channels, channel = first % p.group_channels;
#pragma unroll 1
        for (INDEX k = 0; k < p.offset_channels; ++k, from += p.x_channel) {
            const INDEX to = group * g.c_group + channel * p.c_channel;
            const SUM value = (SUM)widen(given[to]);
#pragma unroll
            for (int c = 0; c < CORNERS; ++c)
                if (inside[c]) dot[c] += value * (SUM)widen(from[cell[c]]);
            if (++channel == p.group_channels) {
                channel = 0;
                ++group;
            }
        }
        SUM of_mask = 0, of_offset[RANK] = {};
#pragma unroll
        for (int c = 0; c < CORNERS; ++c) {
            of_mask += dot[c] * weight_of(s, c, -1);
#pragma unroll
            for (int r = 0; r < RANK; ++r) {
                const SUM slope = dot[c] * weight_of(s, c, r);
                of_offset[r] += c >> r & 1 ? slope : -slope;
            }
        }
        if (dmask)
            dmask[offset_at(p.dmask, n, d, number, place.cell)] =
                Stored<RESULT>::of(of_mask);
        if (!doffset) continue;
        const SUM scale = mask_at(mask, offset_at(p.mask, n, d, number, place.cell));
        RESULT *to = doffset + offset_at(p.doffset, n, d, number, place.cell);
#pragma unroll
        for (int r = 0; r < RANK; ++r)
            to[r * p.doffset.axis] = Stored<RESULT>::of(scale * of_offset[r]);
    }
}
