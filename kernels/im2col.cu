// im2col: copy every window of x into a column.
//
//     columns[n, g, c, t, o] = x[n, g, c, first + o * stride + t * dilation]
//
// and zero if that element is outside x.  Each array has its own steps for every axis:
// one kernel for channels first or last, rows or columns, and any view of x.
//
// One thread writes all taps of one channel at VECTOR neighbouring output positions,
// each tap's as one aligned vector.  Neighbouring threads have neighbouring vectors (or
// channels, if those have the smaller step in the columns), so that every write, and
// every read at stride 1, is coalesced; the taps of a thread read elements that its
// neighbours have just loaded into the cache.  Every element of the columns is written
// by exactly one thread.
//
// Bytes: the columns are written once, taps times the bytes of x, which is read about
// once from memory and once a tap from the cache.  So the writes dominate.  Single
// 4-byte items would each need index arithmetic, and too few would be in flight.
// VECTOR items share that arithmetic, and their reads do not wait for one another.
// Reads are single: under most taps they are not aligned.  With channels fastest, the
// host passes several neighbours as one wider ELEMENT, in x and in the columns, if
// steps and addresses allow: then reads are as wide as writes.
//
// ELEMENT is an integer type of 1, 2, 4, 8 or 16 bytes, or quadword_t: a copy needs
// only the size.

#ifndef ELEMENT
#define ELEMENT word4_t
#endif
#ifndef VECTOR
#define VECTOR 1
#endif

#include "element.cuh"
#include "index.cuh"

struct alignas(VECTOR > 1 ? VECTOR * sizeof(ELEMENT) : alignof(ELEMENT)) Word {
    ELEMENT at[VECTOR];
};

extern "C" __global__ void im2col(
    const ELEMENT *__restrict__ x, ELEMENT *__restrict__ columns, const Geometry g)
{
    for (INDEX item = first_item(); item < g.items; item += item_step()) {
        Place place = place_of<true>(item, g);
        place.cell[RANK - 1] *= VECTOR;
        const ELEMENT *from = x + x_offset(place, g);
        ELEMENT *to = columns + column_offset(place, g);
#pragma unroll
        for (int r = 0; r < RANK; ++r) to += place.cell[r] * g.axis[r].out_step;
        INDEX tap[RANK] = {};
        do {
            Word word;
            Place at = place;
#pragma unroll
            for (int j = 0; j < VECTOR; ++j) {
                INDEX cell;
                const bool inside = cell_under(at, tap, g, cell);
                word.at[j] = inside ? from[cell] : ELEMENT();
                ++at.cell[RANK - 1];
            }
            *(Word *)(to + tap_offset(tap, g)) = word;
        } while (next_tap(tap, g));
    }
}
