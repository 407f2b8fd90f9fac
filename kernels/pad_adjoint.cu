// The adjoint of pad_copy.cu: every element of x sums the elements of the copy that
// read it.
//
//     x[n, g, c, i] (+)= sum of copied[n, g, c, p] over all p with wrapped(first + p) = i
//
// One thread owns one element of x and visits its readers in order (`readers_of` in
// wrap.cuh): no atomics, the same bits on every run, and each element is written once.
//
// ADD (a kernel argument) adds to x; without it x is overwritten, and elements that
// nothing reads become zero.

#ifndef ELEMENT
#define ELEMENT float32_t
#endif

#include "element.cuh"
#include "index.cuh"
#include "wrap.cuh"

extern "C" __global__ void pad_adjoint(
    const ELEMENT *__restrict__ copied, ELEMENT *__restrict__ x, const Geometry g,
    int mode, int add)
{
    for (INDEX item = first_item(); item < g.items; item += item_step()) {
        const Place place = place_of<false>(item, g);
        const ELEMENT *from = copied + column_offset(place, g);
        ELEMENT *to = x + x_offset(place, g);
        Readers readers[RANK];
        INDEX count[RANK], visited[RANK] = {};
        bool is_read = true;
#pragma unroll
        for (int r = 0; r < RANK; ++r) {
            const Axis &axis = g.axis[r];
            const INDEX i = place.cell[r];
            to += i * axis.x_step;
            readers[r] = readers_of(i, axis.size, axis.first, axis.out, mode);
            count[r] = readers[r].count + readers[r].other_count;
            is_read = is_read && count[r];
        }
        ELEMENT sum = add ? *to : ELEMENT();
        if (is_read) do {
            INDEX offset = 0;
#pragma unroll
            for (int r = 0; r < RANK; ++r)
                offset += reader(readers[r], visited[r]) * g.axis[r].out_step;
            add_to(sum, from[offset]);
        } while (next_of(visited, count));
        *to = sum;
    }
}
