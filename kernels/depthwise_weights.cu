// The weight gradient of a depthwise convolution, for few channels in a group.
//
//     dw[g, k, c, t] = sum over n, o of dy[n, g, k, o] * conj(x[n, g, c, i])
//
// with i = first + o * stride + t * dilation; elements outside x are skipped.
// direct.cuh documents how arrays are addressed.
//
// One block sums some taps (at most TAPS, `taps_each`) of one channel of
// `block_filters` filters, over all positions and images: no atomics, nothing kept
// between blocks, and the same bits on every run.  A thread owns one filter and a
// strided subset of the positions; it loads an element of dy once for all its taps, and
// keeps a sum for each in a register.  Then the sums of a block are added up in shared
// memory, in a fixed order.
//
// Bytes: dy and x are read from memory once for all taps of a block; with one tap a
// block, both would be read once for every tap.  If there are so few filters that most
// of a GPU is idle, the host divides the taps among blocks all the same: the blocks of
// a filter run at the same time and share their reads in the L2 cache.  With channels
// last, a thread of a block with one filter would use 4 bytes of every 32-byte sector
// that it reads: a block has as many filters as fill a sector.

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
#define SLOTS 256

struct alignas(16) Tap {
    INDEX offset;
    CELL shift[RANK];
};

// The offsets of a block's tap in x and in dw, relative to tap 0.
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

// The sums of one thread, over items row, row + rows, …
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

// Add the sums of all threads with the same filter, by halving, in shared memory.
__device__ inline void add_up(
    SUM (&totals)[TAPS][SLOTS], const SUM (&sums)[TAPS], int block_filters)
{
    const int thread = threadIdx.x, threads = blockDim.x;
    for (int part = 0; part < threads; part += SLOTS) {
        if (thread >= part && thread < part + SLOTS)
#pragma unroll
            for (int j = 0; j < TAPS; ++j) {
                SUM &place = totals[j][thread - part];
                if (part == 0) place = sums[j];
                else add_to(place, sums[j]);
            }
        __syncthreads();
    }
    const int slots = threads < SLOTS ? threads : SLOTS;
    for (int half = slots / 2; half >= block_filters; half /= 2) {
        if (thread < half)
#pragma unroll
            for (int j = 0; j < TAPS; ++j)
                add_to(totals[j][thread], totals[j][thread + half]);
        __syncthreads();
    }
}

extern "C" __global__ void __launch_bounds__(512) depthwise_weights(
    const ELEMENT *__restrict__ x, const ELEMENT *__restrict__ dy,
    RESULT *__restrict__ dw, const Direct d)
{
    __shared__ SUM totals[TAPS][SLOTS];
    __shared__ Tap taps[TAPS];
    __shared__ INDEX places[TAPS];  // of the taps in dw
    const CELL block_filters = d.block_filters, own_filter = threadIdx.x % block_filters;
    CELL all = 1;
    for (int r = 0; r < RANK; ++r) all *= d.axis[r].kernel;
    const CELL chunks = (all + d.taps_each - 1) / d.taps_each;
    for (INDEX block = blockIdx.x; block < d.blocks; block += gridDim.x) {
        INDEX rest = block;
        const CELL first = rest % chunks * d.taps_each;
        rest /= chunks;
        const CELL c = rest % d.inner;
        const INDEX filter = rest / d.inner * block_filters + own_filter;
        const CELL count = smaller(d.taps_each, all - first);
        if ((CELL)threadIdx.x < count) place_tap(taps, places, first, threadIdx.x, d);
        __syncthreads();
        const INDEX group = filter / d.own, k = filter % d.own;
        const bool alive = group < d.groups;
        SUM sums[TAPS] = {};
        if (alive)
            add_items(
                sums, taps, count, x + group * d.source_group + c * d.source_channel,
                dy + group * d.out_group + k * d.out_channel, threadIdx.x / block_filters,
                blockDim.x / block_filters, d);
        add_up(totals, sums, block_filters);
        if (alive && (CELL)threadIdx.x < block_filters)
            for (CELL j = 0; j < count; ++j)
                dw[group * d.w_group + k * d.w_own + c * d.w_inner + places[j]] =
                    Stored<RESULT>::of(totals[j][own_filter]);
        __syncthreads();
    }
}
