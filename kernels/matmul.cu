// Matrix products of the types that cuBLAS does not multiply: integers and booleans.
//
//     out[n, g, i, j] (+)= sum over k of a[n, g, i, k] * b[n, g, k, j]
//
// Arrays are addressed by steps in elements; a step of 0 broadcasts a matrix to all
// images.  Sums wrap modulo 2^width, as NumPy's do; booleans are and-ed and or-ed.
//
// A block of TILE × TILE threads computes one tile of one product, through two tiles in
// shared memory, padded by one element against bank conflicts.  Every element of out is
// written by exactly one thread.

#ifndef ELEMENT
#define ELEMENT word4_t
#endif
#ifndef TILE
#define TILE 16
#endif

#include "element.cuh"

struct Matrix {
    long long image, group, row, column;  // steps
};

struct Product {
    long long groups, rows, columns, inner;
    long long tiles;  // over all images and groups
    long long add;
    Matrix a, b, out;
};

#ifdef PRODUCT_BYTES
static_assert(sizeof(Product) == PRODUCT_BYTES, "the host packs another Product");
#endif

__device__ inline ELEMENT at(
    const ELEMENT *matrix, const Matrix &step, long long row, long long column,
    long long rows, long long columns)
{
    const bool inside = row < rows && column < columns;
    return inside ? matrix[row * step.row + column * step.column] : ELEMENT();
}

extern "C" __global__ void matmul(
    const ELEMENT *__restrict__ a, const ELEMENT *__restrict__ b,
    ELEMENT *__restrict__ out, const Product p)
{
    __shared__ ELEMENT a_tile[TILE][TILE + 1];
    __shared__ ELEMENT b_tile[TILE][TILE + 1];
    const int x = threadIdx.x % TILE, y = threadIdx.x / TILE;
    const long long across = (p.columns + TILE - 1) / TILE;
    const long long down = (p.rows + TILE - 1) / TILE;
    for (long long tile = blockIdx.x; tile < p.tiles; tile += gridDim.x) {
        const long long column = tile % across * TILE + x;
        const long long row = tile / across % down * TILE + y;
        const long long group = tile / (across * down) % p.groups;
        const long long image = tile / (across * down * p.groups);
        const ELEMENT *a_here = a + image * p.a.image + group * p.a.group;
        const ELEMENT *b_here = b + image * p.b.image + group * p.b.group;
        ELEMENT *here = out + image * p.out.image + group * p.out.group;
        const bool inside = row < p.rows && column < p.columns;
        here += row * p.out.row + column * p.out.column;
        ELEMENT sum = inside && p.add ? *here : ELEMENT();
        for (long long k = 0; k < p.inner; k += TILE) {
            a_tile[y][x] = at(a_here, p.a, row, k + x, p.rows, p.inner);
            b_tile[y][x] = at(b_here, p.b, k + y, column, p.inner, p.columns);
            __syncthreads();
            for (int i = 0; i < TILE; ++i) add_product(sum, a_tile[y][i], b_tile[i][x]);
            __syncthreads();
        }
        if (inside) *here = sum;
    }
}
