// transform_tiles: every transform of Winograd's convolution, from tile to tile.
//
//     target tile = left · source tile · rightᵀ  (+ bias)
//
// for all images, groups, channels, planes and tiles: six digits of an item, in any
// order.  One side has frequencies, the other elements of an array, in place:
//
//     element (a, b) of a tile is at plane, row + a, column + b of the array
//
// with plane, row and column each a first one plus the sum over the digits.  Elements
// outside the array are read as zero and are not written.  So the same kernel is
//
//     the input's      V = Bᵀ d B      elements of x, tiles that overlap
//     the filters'     U = G g Gᵀ      taps of w, one tile
//     the gradient's   D = A dY Aᵀ     elements of dy
//     the output's     Y = Aᵀ M A      to elements of y, with the bias
//     the taps'        dg = Gᵀ dU G    to taps of dw
//
// Both sides have their own steps for every digit and along the tile: any layout, any
// view, flipped ones included.
//
// One thread transforms one tile in registers.  Neighbouring threads have neighbouring
// items, and the host orders the digits by the memory order of the frequencies, so that
// a warp reads or writes each of these contiguously.  Every element of the target is
// written by exactly one thread.
//
// Tiles have ROWS × COLUMNS elements at most: ROWS is 1 or COLUMNS, and a matrix that
// is smaller on a side is padded with zeros, for which nothing is read or written.

#ifndef ELEMENT
#define ELEMENT float32_t
#endif
#ifndef ROWS
#define ROWS 6
#endif
#ifndef COLUMNS
#define COLUMNS 6
#endif

#include "element.cuh"
#include "index.cuh"

const int DIGITS = 6;

struct Digit {
    INDEX source, target, bias;  // steps of addresses
    INDEX plane, row, column;    // steps of the element
    Divisor by;
};

struct Side {
    INDEX first, row_step, column_step;  // addresses
    INDEX tall, wide;                    // how much of a tile there is
    INDEX is_array;                      // else frequencies
};

struct Transform {
    INDEX items;
    INDEX adds_bias;
    INDEX plane, row, column;     // the first element
    INDEX planes, rows, columns;  // of the array
    Side source, target;
    Digit digit[DIGITS];  // the fastest first
    ELEMENT left[ROWS][ROWS], right[COLUMNS][COLUMNS];
};

#ifdef TRANSFORM_BYTES
static_assert(sizeof(Transform) == TRANSFORM_BYTES, "the host packs another Transform");
#endif

// The offsets of one tile on both sides, and its position in the array.
struct Tile {
    INDEX source, target, bias;
    INDEX plane, row, column;
};

// The part of a tile inside the array: rows [top, bottom), columns [before, after).
struct Part {
    INDEX top, bottom, before, after;
};

__device__ inline Tile tile_of(INDEX item, const Transform &t)
{
    Tile tile = {t.source.first, t.target.first, 0, t.plane, t.row, t.column};
#pragma unroll
    for (int i = 0; i < DIGITS; ++i) {
        const Digit &digit = t.digit[i];
        const INDEX n = take(item, digit.by);
        tile.source += n * digit.source;
        tile.target += n * digit.target;
        tile.bias += n * digit.bias;
        tile.plane += n * digit.plane;
        tile.row += n * digit.row;
        tile.column += n * digit.column;
    }
    return tile;
}

__device__ inline INDEX smaller(INDEX a, INDEX b) { return a < b ? a : b; }

__device__ inline Part part_of(const Side &side, const Tile &tile, const Transform &t)
{
    Part part = {0, side.tall, 0, side.wide};
    if (!side.is_array) return part;
    if (tile.row < 0) part.top = -tile.row;
    if (tile.column < 0) part.before = -tile.column;
    part.bottom = smaller(side.tall, t.rows - tile.row);
    part.after = smaller(side.wide, t.columns - tile.column);
    if ((UNSIGNED_INDEX)tile.plane >= (UNSIGNED_INDEX)t.planes) part.bottom = 0;
    return part;
}

extern "C" __global__ void transform_tiles(
    const ELEMENT *__restrict__ source, ELEMENT *__restrict__ target,
    const ELEMENT *__restrict__ bias, const Transform t)
{
    for (INDEX item = first_item(); item < t.items; item += item_step()) {
        const Tile tile = tile_of(item, t);
        const Part from = part_of(t.source, tile, t), to = part_of(t.target, tile, t);
        ELEMENT half[ROWS][COLUMNS] = {};  // left · source tile
#pragma unroll
        for (int a = 0; a < ROWS; ++a) {
            if (a < from.top || a >= from.bottom) continue;
            const INDEX row = tile.source + a * t.source.row_step;
            ELEMENT cells[COLUMNS];
#pragma unroll
            for (int b = 0; b < COLUMNS; ++b) {
                const bool inside = b >= from.before && b < from.after;
                cells[b] = inside ? source[row + b * t.source.column_step] : ELEMENT();
            }
#pragma unroll
            for (int i = 0; i < ROWS; ++i)
#pragma unroll
                for (int b = 0; b < COLUMNS; ++b) half[i][b] += t.left[i][a] * cells[b];
        }
        const ELEMENT offset = t.adds_bias ? bias[tile.bias] : ELEMENT();
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            if (i < to.top || i >= to.bottom) continue;
            const INDEX row = tile.target + i * t.target.row_step;
#pragma unroll
            for (int j = 0; j < COLUMNS; ++j) {
                if (j < to.before || j >= to.after) continue;
                ELEMENT sum = offset;
#pragma unroll
                for (int b = 0; b < COLUMNS; ++b) sum += half[i][b] * t.right[j][b];
                target[row + j * t.target.column_step] = sum;
            }
        }
    }
}
