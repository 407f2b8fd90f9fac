// col2im by gathering: every element of x sums the column elements that came from it.
//
//     x[n, g, c, i] (+)= sum of columns[n, g, c, t, o]
//                        over all t, o with first + o * stride + t * dilation = i
//
// One thread owns one element of x and visits the taps that reach it in order: no
// atomics, the same bits on every run, and each element is written once.  Along an
// axis, the taps that reach an element are evenly spaced, and so are their outputs
// (`taps_reaching`): only those are visited, while at stride 2 in a plane only one tap
// of four reaches an element. Neighbouring threads own neighbouring elements (or
// channels, if those have the smaller step), so their reads are coalesced at stride 1.
//
// ADD (a kernel argument) adds to x; without it x is overwritten, and elements that no
// window reaches become zero.

#ifndef ELEMENT
#define ELEMENT float32_t
#define SUM float32_t
#endif

#include "element.cuh"
#include "index.cuh"

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
        INDEX count[RANK], step[RANK], visited[RANK] = {};
        bool reached = true;
#pragma unroll
        for (int r = 0; r < RANK; ++r) {
            const Axis &axis = g.axis[r];
            const Reach reach = taps_reaching(place.cell[r], axis);
            from += reach.cell * axis.out_step + reach.tap * axis.tap_step;
            step[r] = reach.cell_step * axis.out_step + reach.tap_step * axis.tap_step;
            count[r] = reach.count;
            reached = reached && reach.count;
        }
        if (reached) do {
            INDEX offset = 0;
#pragma unroll
            for (int r = 0; r < RANK; ++r) offset += visited[r] * step[r];
            add_to(sum, (SUM)widen(from[offset]));
        } while (next_of(visited, count));
        *to = sum;
    }
}
