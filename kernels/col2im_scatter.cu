// col2im by scattering: add every element of the columns to the element of x it came
// from.
//
//     x[n, g, c, first + o * stride + t * dilation] += columns[n, g, c, t, o]
//
// Cells outside x are dropped.  The caller clears x first.
//
// One thread reads all taps of one channel at one output position, coalesced as im2col
// writes them.  Windows overlap, so several threads add to one element: additions are
// atomic, and their order, hence the last bits of a floating-point sum, differs from
// run to run.  Types narrower than 32 bits have no atomic addition: halves are summed
// in float32 (SUM), small integers and booleans take the gather.

#ifndef ELEMENT
#define ELEMENT float32_t
#define SUM float32_t
#endif

#include "element.cuh"
#include "index.cuh"

extern "C" __global__ void col2im_scatter(
    const ELEMENT *__restrict__ columns, SUM *__restrict__ x, const Geometry g)
{
    for (INDEX item = first_item(); item < g.items; item += item_step()) {
        const Place place = place_of<true>(item, g);
        SUM *to = x + x_offset(place, g);
        const ELEMENT *from = columns + column_offset(place, g);
#pragma unroll
        for (int r = 0; r < RANK; ++r) from += place.cell[r] * g.axis[r].out_step;
        INDEX tap[RANK] = {};
        do {
            INDEX cell;
            if (cell_under(place, tap, g, cell))
                atomic_add(to + cell, (SUM)widen(from[tap_offset(tap, g)]));
        } while (next_tap(tap, g));
    }
}
