// Copy what a window reads, with the cells that lie around the array.
//
//     copied[n, g, c, p] = x[n, g, c, wrapped(first + p)]
//
// One thread copies one cell (`wrapped` is in wrap.cuh).  Neighbouring threads take
// neighbouring cells of the copy (or channels, when these lie closer together), so that
// writes are coalesced, and reads too but for the mirrored ones.  Every cell of the copy
// is written by one thread.  A copy knows no types: ELEMENT is a word of 1 to 16 bytes.

#ifndef ELEMENT
#define ELEMENT word4_t
#endif

#include "element.cuh"
#include "index.cuh"
#include "wrap.cuh"

extern "C" __global__ void pad_copy(
    const ELEMENT *__restrict__ x, ELEMENT *__restrict__ copied, const Geometry g,
    int mode)
{
    for (INDEX item = first_item(); item < g.items; item += item_step()) {
        const Place place = place_of<true>(item, g);
        INDEX from = x_offset(place, g), to = column_offset(place, g);
#pragma unroll
        for (int r = 0; r < RANK; ++r) {
            const Axis &axis = g.axis[r];
            const INDEX i = axis.first + place.cell[r];
            from += wrapped(i, axis.size, mode) * axis.x_step;
            to += place.cell[r] * axis.out_step;
        }
        copied[to] = x[from];
    }
}
