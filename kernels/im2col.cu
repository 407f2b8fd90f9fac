// im2col: copy every window of x into a column.
//
//     columns[n, g, c, t, o] = x[n, g, c, first + o * stride + t * dilation]
//
// and zero where that cell lies outside x.  Each array has its own steps for every axis:
// channels first or last, rows or columns, and any view of x are all the same kernel.
//
// One thread writes all taps of one channel at one output position.  Neighbouring
// threads take neighbouring positions (or channels, when these lie closer together in
// the columns), so that every write, and every read at stride 1, is coalesced; the taps
// of a thread read what its neighbours have just brought into the cache.  Every cell of
// the columns is written by exactly one thread.
//
// A copy knows no types: ELEMENT is a word of 1, 2, 4, 8 or 16 bytes.

#ifndef ELEMENT
#define ELEMENT word4_t
#endif

#include "element.cuh"
#include "index.cuh"

extern "C" __global__ void im2col(
    const ELEMENT *__restrict__ x, ELEMENT *__restrict__ columns, const Geometry g)
{
    for (INDEX item = first_item(); item < g.items; item += item_step()) {
        const Place place = place_of<true>(item, g);
        const ELEMENT *from = x + x_offset(place, g);
        ELEMENT *to = columns + column_offset(place, g);
#pragma unroll
        for (int r = 0; r < RANK; ++r) to += place.cell[r] * g.axis[r].out_step;
        INDEX tap[RANK] = {};
        do {
            INDEX cell;
            const bool inside = cell_under(place, tap, g, cell);
            to[tap_offset(tap, g)] = inside ? from[cell] : ELEMENT();
        } while (next_tap(tap, g));
    }
}
