// The gradient of a deformable convolution for x, the same bits on every run.
//
//     x[n, g, c, i] += sum of weight(i) * mask[n, d, t, o] * columns[n, g, c, t, o]
//                      over all t, o whose samples are beside element i
//
// with the weights of deform.cuh.  The caller clears x first.
//
// One thread owns one row of x, along the last axis, and visits all samples in order:
// no atomics.  Where offsets have moved the taps is not known before they are read, so
// every sample is looked at once for each row, mostly to be passed over.  Threads of a
// warp look at the same sample, unless their images or offset groups differ: offsets are
// read once for all.

#include "element.cuh"
#include "index.cuh"
#include "deform.cuh"

// Whether a sample is beside this row, and the weight that it has there.
__device__ inline bool is_beside(
    const Between (&s)[RANK], const INDEX (&row)[RANK], SUM &weight)
{
#pragma unroll
    for (int r = 0; r < RANK - 1; ++r) {
        const INDEX high = row[r] - s[r].low;
        if (high != 0 && high != 1) return false;
        weight *= high ? s[r].fraction : 1 - s[r].fraction;
    }
    return true;
}

extern "C" __global__ void deform_gather(
    const COLUMN *__restrict__ columns, const OFFSET *__restrict__ offset,
    const MASK *__restrict__ mask, SUM *__restrict__ x, const Deform p)
{
    const Geometry &g = p.g;
    INDEX outs[RANK];
#pragma unroll
    for (int r = 0; r < RANK; ++r) outs[r] = g.axis[r].out;
    for (INDEX item = first_item(); item < g.items; item += item_step()) {
        const Place place = place_of<false>(item, g);
        const INDEX channel = place.group * g.channels + place.channel;
        const INDEX group = quotient(channel, p.by_offset_channels);
        const Axis &last = g.axis[RANK - 1];
        SUM *row = x + x_offset(place, g);
        const COLUMN *from = columns + column_offset(place, g);
#pragma unroll
        for (int r = 0; r < RANK - 1; ++r) row += place.cell[r] * g.axis[r].x_step;
        INDEX tap[RANK] = {}, number = 0;
        do {
            const COLUMN *given = from + tap_offset(tap, g);
            INDEX o[RANK] = {};
            do {
                Between s[RANK];
                const INDEX at = offset_at(p.offset, place.image, group, number, o);
                const OFFSET *moved = offset + at;
#pragma unroll
                for (int r = 0; r < RANK; ++r) {
                    const Axis &a = g.axis[r];
                    const INDEX base = a.first + o[r] * a.stride + tap[r] * a.dilation;
                    const INDEX size = r == RANK - 1 ? p.last : a.size;
                    s[r] = between(base, (SUM)widen(moved[r * p.offset.axis]), size);
                }
                const INDEX of = offset_at(p.mask, place.image, group, number, o);
                SUM weight = 1;
                // A sample that is nowhere adds to no element.
                if (!is_beside(s, place.cell, weight) || weight != weight) continue;
                INDEX place_of_column = 0;
#pragma unroll
                for (int r = 0; r < RANK; ++r)
                    place_of_column += o[r] * g.axis[r].out_step;
                weight *= mask_at(mask, of) * (SUM)widen(given[place_of_column]);
                const Between &along = s[RANK - 1];
#pragma unroll
                for (int high = 0; high < 2; ++high) {
                    const INDEX i = along.low + high;
                    const SUM part = high ? along.fraction : 1 - along.fraction;
                    if ((UNSIGNED_INDEX)i < (UNSIGNED_INDEX)p.last && part == part)
                        row[i * last.x_step] += weight * part;
                }
            } while (next_of(o, outs));
            ++number;
        } while (next_tap(tap, g));
    }
}
