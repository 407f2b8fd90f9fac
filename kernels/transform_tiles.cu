// transform_tiles: every transform of Winograd's convolution, from tile to tile.
//
//     target tile = left · source tile · rightᵀ  (+ bias)
//
// for all images, groups, channels, planes and tiles: six digits of an item, in any
// order.  One side are frequencies, the other cells of an array where they lie:
//
//     cell (a, b) of a tile lies at plane, row + a, column + b of the array
//
// with plane, row and column each a first one and as many more as the digits say.  What
// lies outside the array is read as zero and is not written.  So the same kernel is
//
//     the input's      V = Bᵀ d B      cells of x, tiles that overlap
//     the filters'     U = G g Gᵀ      taps of w, one tile
//     the gradient's   D = A dY Aᵀ     cells of dy
//     the output's     Y = Aᵀ M A      to cells of y, with the bias
//     the taps'        dg = Gᵀ dU G    to taps of dw
//
// Both sides have their own steps for every digit and along the tile: any layout, any
// view, flipped ones included.
//
// One thread transforms one tile in registers.  Neighbouring threads take neighbouring
// items, and the host orders the digits as the frequencies lie, so that each of these is
// read or written by a warp as one run.  Every cell of the target is written by exactly
// one thread.
//
// Tiles have ROWS × COLUMNS cells at most: ROWS is 1 or COLUMNS, and a matrix that is
// smaller on a side is filled up with zeros, which are neither read for nor written.

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
    INDEX plane, row, column;    // steps of the cell
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
    INDEX plane, row, column;     // the first cell
    INDEX planes, rows, columns;  // of the array
    Side source, target;
    Digit digit[DIGITS];  // the fastest first
    ELEMENT left[ROWS][ROWS], right[COLUMNS][COLUMNS];
};

#ifdef TRANSFORM_BYTES
static_assert(sizeof(Transform) == TRANSFORM_BYTES, "the host packs another Transform");
#endif

// Where one tile lies on both sides, and in the array.
struct Tile {
    INDEX source, target, bias;
    INDEX plane, row, column;
};

// The cells of a tile that exist: rows [top, bottom), columns [before, after).
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
