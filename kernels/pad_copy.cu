// Copy the padded input of a window.
//
//     copied[n, g, c, p] = x[n, g, c, wrapped(first + p)]
//
// One thread copies one element (`wrapped` is in wrap.cuh).  Neighbouring threads take
// neighbouring elements of the copy (or channels, if those have the smaller step), so
// that writes are coalesced, and reads too except reflected ones.  Every element of the
// copy is written by one thread.  ELEMENT is an integer type of 1 to 16 bytes: a copy
// needs only the size.

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
