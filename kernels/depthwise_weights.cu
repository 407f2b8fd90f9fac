// The weight gradient of a depthwise convolution, for few channels in a group.
//
//     dw[g, k, c, t] = sum over n, o of dy[n, g, k, o] * conj(x[n, g, c, i])
//
// with i = first + o * stride + t * dilation; cells outside x are passed over.
// direct.cuh says how arrays are addressed.
//
// One block sums some taps (at most TAPS, `taps_each`) of one channel of `lanes` filters,
// over all positions and images: no atomics, nothing kept between blocks, and the same
// bits on every run.  A thread owns one filter and every so many of the positions; it
// loads a cell of dy once for all its taps, and keeps a sum for each in a register.
// Then the sums of a block are added up in shared memory, in a fixed order.
//
// Bytes: dy and x pass from memory once for all taps of a block; were each block to sum
// one tap, both would be read once for every tap.  Where filters are so few that their
// blocks leave most of a GPU idle, the host cuts the taps up all the same: then the
// blocks of a filter run side by side and share what they read in the second cache.
// With channels last, a thread that walks alone would use 4 bytes of every 32 that it
// reads: the lanes of a block are as many filters as fill such a sector.

#define RANK 3
#define CELL int
#ifndef ELEMENT
#define ELEMENT float32_t
#define SUM float32_t
#endif
#ifndef RESULT
#define RESULT ELEMENT
#endif

#include "element.cuh"
#include "index.cuh"
#include "direct.cuh"

// Sums that a thread keeps in registers.
#ifndef TAPS
#define TAPS 9
#endif
#define FOLD 256

struct alignas(16) Tap {
    INDEX offset;
    CELL shift[RANK];
};

// Where a tap of a block lies, beside tap 0, in x and in dw.
__device__ inline void place_tap(
    Tap *taps, INDEX *places, CELL first, CELL j, const Direct &d)
{
    CELL rest = first + j;
    INDEX place = 0;
    Tap tap = {};
    for (int r = RANK - 1; r >= 0; --r) {
        const CELL t = rest % d.axis[r].kernel;
        rest /= d.axis[r].kernel;
        tap.shift[r] = t * d.axis[r].dilation;
        tap.offset += tap.shift[r] * d.axis[r].x_step;
        place += t * d.axis[r].tap_step;
    }
    taps[j] = tap;
    places[j] = place;
}

// Everything that one thread sums: items row, row + rows, …
__device__ inline void add_items(
    SUM (&sums)[TAPS], const Tap *taps, CELL count, const ELEMENT *x, const ELEMENT *dy,
    INDEX row, INDEX rows, const Direct &d)
{
    for (INDEX item = row; item < d.items; item += rows) {
        INDEX rest = item, under = 0, at = 0;
        CELL cell[RANK];
#pragma unroll
        for (int r = RANK - 1; r >= 0; --r) {
            const Axis &axis = d.axis[r];
            const CELL o = take(rest, axis.by_out);
            cell[r] = axis.first + o * axis.stride;
            under += cell[r] * axis.x_step;
            at += o * axis.out_step;
        }
        const CELL first = (CELL)rest * d.each;
        const CELL images = smaller(d.each, d.images - first);
        under += first * d.source_image;
        at += first * d.out_image;
        SUM gradient[IMAGES] = {};
#pragma unroll
        for (int m = 0; m < IMAGES; ++m)
            if (m < images) gradient[m] = widen(dy[at + m * d.out_image]);
#pragma unroll
        for (int j = 0; j < TAPS; ++j) {
            if (j >= count) break;
            const Tap tap = taps[j];
            bool inside = true;
#pragma unroll
            for (int r = 0; r < RANK; ++r) {
                const unsigned i = (unsigned)(cell[r] + tap.shift[r]);
                inside = inside && i < (unsigned)d.axis[r].size;
            }
            if (!inside) continue;
#pragma unroll
            for (int m = 0; m < IMAGES; ++m)
                if (m < images) {
                    const SUM value = widen(x[under + tap.offset + m * d.source_image]);
                    add_product(sums[j], gradient[m], conjugate(value));
                }
        }
    }
}

// Add the sums of all threads with the same lane, into the first FOLD's places.
__device__ inline void fold(SUM (&folded)[TAPS][FOLD], const SUM (&sums)[TAPS], int lanes)
{
    const int thread = threadIdx.x, threads = blockDim.x;
    for (int part = 0; part < threads; part += FOLD) {
        if (thread >= part && thread < part + FOLD)
#pragma unroll
            for (int j = 0; j < TAPS; ++j) {
                SUM &place = folded[j][thread - part];
                if (part == 0) place = sums[j];
                else add_to(place, sums[j]);
            }
        __syncthreads();
    }
    for (int half = (threads < FOLD ? threads : FOLD) / 2; half >= lanes; half /= 2) {
        if (thread < half)
#pragma unroll
            for (int j = 0; j < TAPS; ++j)
                add_to(folded[j][thread], folded[j][thread + half]);
        __syncthreads();
    }
}

extern "C" __global__ void __launch_bounds__(512) depthwise_weights(
    const ELEMENT *__restrict__ x, const ELEMENT *__restrict__ dy,
    RESULT *__restrict__ dw, const Direct d)
{
    __shared__ SUM folded[TAPS][FOLD];
    __shared__ Tap taps[TAPS];
    __shared__ INDEX places[TAPS];  // of the taps in dw
    const CELL lanes = d.lanes, lane = threadIdx.x % lanes;
    CELL all = 1;
    for (int r = 0; r < RANK; ++r) all *= d.axis[r].kernel;
    const CELL chunks = (all + d.taps_each - 1) / d.taps_each;
    for (INDEX block = blockIdx.x; block < d.blocks; block += gridDim.x) {
        INDEX rest = block;
        const CELL first = rest % chunks * d.taps_each;
        rest /= chunks;
        const CELL c = rest % d.inner;
        const INDEX filter = rest / d.inner * lanes + lane;
        const CELL count = smaller(d.taps_each, all - first);
        if ((CELL)threadIdx.x < count) place_tap(taps, places, first, threadIdx.x, d);
        __syncthreads();
        const INDEX group = filter / d.own, k = filter % d.own;
        const bool alive = group < d.groups;
        SUM sums[TAPS] = {};
        if (alive)
            add_items(
                sums, taps, count, x + group * d.source_group + c * d.source_channel,
                dy + group * d.out_group + k * d.out_channel, threadIdx.x / lanes,
                blockDim.x / lanes, d);
        fold(folded, sums, lanes);
        if (alive && (CELL)threadIdx.x < lanes)
            for (CELL j = 0; j < count; ++j)
                dw[group * d.w_group + k * d.w_own + c * d.w_inner + places[j]] =
                    Stored<RESULT>::of(folded[j][lane]);
        __syncthreads();
    }
}
