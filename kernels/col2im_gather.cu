// col2im by gathering: every cell of x sums the column cells that came from it.
//
//     x[n, g, c, i] (+)= sum of columns[n, g, c, t, o]
//                        over all t, o with first + o * stride + t * dilation = i
//
// One thread owns one cell of x and visits the taps in order: no atomics, the same bits
// on every run, and each cell is written once.  A tap reaches the cell only if the
// stride divides its distance.  Neighbouring threads own neighbouring cells (or
// channels, when these lie closer together), so their reads are coalesced at stride 1.
//
// ADD (a kernel argument) keeps what is in x; without it x is overwritten, and cells
// that no window reaches become zero.

#ifndef ELEMENT
#define ELEMENT float32_t
#define SUM float32_t
#endif

#include "element.cuh"
#include "index.cuh"

// The output cells at which these taps meet the cell; false if there are none.
__device__ inline bool column_over(
    const Place &p, const INDEX (&tap)[RANK], const Geometry &g, INDEX &offset)
{
    offset = 0;
    for (int r = 0; r < RANK; ++r) {
        const Axis &axis = g.axis[r];
        const INDEX distance = p.cell[r] - axis.first - tap[r] * axis.dilation;
        if (distance < 0) return false;
        const INDEX o = quotient(distance, axis.by_stride);
        if (o >= axis.out || o * axis.stride != distance) return false;
        offset += o * axis.out_step;
    }
    return true;
}

extern "C" __global__ void col2im_gather(
    const ELEMENT *__restrict__ columns, SUM *__restrict__ x, const Geometry g, int add)
{
    for (INDEX item = first_item(); item < g.items; item += item_step()) {
        const Place place = place_of<false>(item, g);
        const ELEMENT *from = columns + column_offset(place, g);
        SUM *to = x + x_offset(place, g);
#pragma unroll
        for (int r = 0; r < RANK; ++r) to += place.cell[r] * g.axis[r].x_step;
        SUM sum = add ? *to : SUM();
        INDEX tap[RANK] = {};
        do {
            INDEX over;
            if (column_over(place, tap, g, over))
                add_to(sum, (SUM)widen(from[over + tap_offset(tap, g)]));
        } while (next_tap(tap, g));
        *to = sum;
    }
}
