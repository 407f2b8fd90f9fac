// Transpose matrices, many at a time.
//
//     out[n, g, j, i] = in[n, g, i, j]
//
// Columns j of `in` and columns i of `out` are contiguous; everything else is addressed
// by steps in elements.  A block copies one tile of TILE × TILE elements through shared
// memory, so that it reads along one axis and writes along the other, both coalesced;
// the tile is padded by one element against bank conflicts.  Every element of `out` is
// written by one thread.  ELEMENT is an integer type of 1 to 16 bytes: a copy needs
// only the size.

#ifndef ELEMENT
#define ELEMENT word4_t
#endif
#ifndef TILE
#define TILE 32
#endif

#include "element.cuh"

struct Matrices {
    long long groups, rows, columns;
    long long tiles;  // over all images and groups
    long long in_image, in_group, in_row;
    long long out_image, out_group, out_row;
};

#ifdef MATRICES_BYTES
static_assert(sizeof(Matrices) == MATRICES_BYTES, "the host packs other Matrices");
#endif

extern "C" __global__ void transpose(
    const ELEMENT *__restrict__ in, ELEMENT *__restrict__ out, const Matrices m)
{
    __shared__ ELEMENT tile[TILE][TILE + 1];
    const int x = threadIdx.x % TILE, y = threadIdx.x / TILE;
    const int step = blockDim.x / TILE;
    const long long across = (m.columns + TILE - 1) / TILE;
    const long long down = (m.rows + TILE - 1) / TILE;
    for (long long at = blockIdx.x; at < m.tiles; at += gridDim.x) {
        const long long column = at % across * TILE, row = at / across % down * TILE;
        const long long outer = at / (across * down);
        const long long group = outer % m.groups, image = outer / m.groups;
        const ELEMENT *from = in + image * m.in_image + group * m.in_group;
        ELEMENT *to = out + image * m.out_image + group * m.out_group;
        for (int i = y; i < TILE; i += step)
            if (row + i < m.rows && column + x < m.columns)
                tile[i][x] = from[(row + i) * m.in_row + column + x];
        __syncthreads();
        for (int i = y; i < TILE; i += step)
            if (column + i < m.columns && row + x < m.rows)
                to[(column + i) * m.out_row + row + x] = tile[x][i];
        __syncthreads();
    }
}
