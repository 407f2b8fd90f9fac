// Indices and geometry, shared by the kernels that copy between arrays and columns.
//
// Along one axis, output o and tap t read input element
//
//     i = first + o * stride + t * dilation
//
// where `first` is the element under tap 0 of output 0 (negative in the padding).
// Arrays are addressed by steps in elements, so that any layout and any view is
// possible.
//
// Macros: INDEX (int or long long; WIDE_INDEX says which), RANK.

#ifndef RANK
#define RANK 2
#endif
#ifndef WIDE_INDEX
#define WIDE_INDEX 0
#endif
#if WIDE_INDEX
typedef long long INDEX;
typedef unsigned long long UNSIGNED_INDEX;
#else
typedef int INDEX;
typedef unsigned int UNSIGNED_INDEX;
#endif
// Coordinates along an axis, and the numbers of taps and steps between them.
#ifndef CELL
#define CELL INDEX
#endif

// Division by a number known before the launch (Granlund & Montgomery 1994, figure
// 4.1): for 0 <= n < 2^31, n / value = (n * multiplier / 2^32) >> shift, with
// multiplier = ceil(2^(32 + shift) / value) and 2^shift < value <= 2^(shift + 1).
template <typename T>
struct DivisorOf {
    T value;
    unsigned int multiplier;
    unsigned int shift;
};
typedef DivisorOf<INDEX> Divisor;

__device__ inline int quotient(int n, const DivisorOf<int> &by)
{
    return by.value == 1 ? n : (int)(__umulhi((unsigned)n, by.multiplier) >> by.shift);
}

template <typename T>
__device__ inline long long quotient(long long n, const DivisorOf<T> &by)
{
    return n / by.value;
}

// With `common` the greatest common divisor of stride and dilation: taps that reach one
// element are `tap_apart` = stride / common apart, and their outputs `out_apart` =
// dilation / common, whose inverse modulo `tap_apart` is `inverse`.
struct Axis {
    CELL size, out, kernel, stride, dilation, first;
    INDEX x_step, tap_step, out_step;
    CELL inverse;
    DivisorOf<CELL> by_size, by_out, by_dilation, by_common, by_tap_apart, by_out_apart;
};

struct Geometry {
    INDEX images, groups, channels;
    INDEX x_image, x_group, x_channel;
    INDEX c_image, c_group, c_channel;
    INDEX items;             // number of threads with work
    INDEX channels_fastest;  // neighbouring threads: channels if set, else elements
    Divisor by_groups, by_channels;
    Axis axis[RANK];
};

#ifdef GEOMETRY_BYTES
static_assert(sizeof(Geometry) == GEOMETRY_BYTES, "the host packs another Geometry");
#endif

// One image, group and channel, and one element of the output or of the input.
struct Place {
    INDEX image, group, channel;
    INDEX cell[RANK];
};

template <typename N, typename T>
__device__ inline T take(N &rest, const DivisorOf<T> &by)
{
    const N more = quotient(rest, by);
    const T digit = (T)(rest - more * by.value);
    rest = more;
    return digit;
}

template <bool OVER_OUTPUT>
__device__ inline Place place_of(INDEX item, const Geometry &g)
{
    Place place;
    if (g.channels_fastest) place.channel = take(item, g.by_channels);
#pragma unroll
    for (int r = RANK - 1; r >= 0; --r)
        place.cell[r] = take(item, OVER_OUTPUT ? g.axis[r].by_out : g.axis[r].by_size);
    if (!g.channels_fastest) place.channel = take(item, g.by_channels);
    place.group = take(item, g.by_groups);
    place.image = item;
    return place;
}

__device__ inline INDEX x_offset(const Place &p, const Geometry &g)
{
    return p.image * g.x_image + p.group * g.x_group + p.channel * g.x_channel;
}

__device__ inline INDEX column_offset(const Place &p, const Geometry &g)
{
    return p.image * g.c_image + p.group * g.c_group + p.channel * g.c_channel;
}

// Step to the next tap, innermost axis first; false after the last one.
__device__ inline bool next_tap(INDEX (&tap)[RANK], const Geometry &g)
{
#pragma unroll
    for (int r = RANK - 1; r >= 0; --r) {
        if (++tap[r] < g.axis[r].kernel) return true;
        tap[r] = 0;
    }
    return false;
}

// The same for any counts.
__device__ inline bool next_of(INDEX (&index)[RANK], const INDEX (&count)[RANK])
{
#pragma unroll
    for (int r = RANK - 1; r >= 0; --r) {
        if (++index[r] < count[r]) return true;
        index[r] = 0;
    }
    return false;
}

// The offset in x of a tap of an output; false if it is in the padding.
__device__ inline bool cell_under(
    const Place &p, const INDEX (&tap)[RANK], const Geometry &g, INDEX &offset)
{
    bool inside = true;
    offset = 0;
#pragma unroll
    for (int r = 0; r < RANK; ++r) {
        const Axis &axis = g.axis[r];
        const INDEX i = axis.first + p.cell[r] * axis.stride + tap[r] * axis.dilation;
        inside = inside && (UNSIGNED_INDEX)i < (UNSIGNED_INDEX)axis.size;
        offset += i * axis.x_step;
    }
    return inside;
}

// The taps of one axis for an element, and the elements of the other array under them:
// tap + k * tap_step and cell + k * cell_step for 0 <= k < count, first tap first.
struct Reach {
    CELL tap, tap_step, cell, cell_step, count;
};

template <typename T>
__device__ inline T smaller(T a, T b) { return a < b ? a : b; }

// The taps of output o that are inside x.
__device__ inline Reach taps_inside(CELL o, const Axis &a)
{
    const CELL base = a.first + o * a.stride;
    const CELL low = base < 0 ? quotient(a.dilation - 1 - base, a.by_dilation) : 0;
    if (base >= a.size || low >= a.kernel) return {};
    const CELL cell = base + low * a.dilation;
    if (cell >= a.size) return {};
    const CELL more = quotient(a.size - 1 - cell, a.by_dilation);
    return {low, 1, cell, a.dilation, smaller(more, a.kernel - 1 - low) + 1};
}

// The taps through which outputs read element i of x: those of one residue.
__device__ inline Reach taps_reaching(CELL i, const Axis &a)
{
    const CELL distance = i - a.first;  // o * stride + t * dilation
    if (distance < 0) return {};
    const CELL whole = quotient(distance, a.by_common), apart = a.by_tap_apart.value;
    if (whole * a.by_common.value != distance) return {};
    // whole = o * tap_apart + t * out_apart determines t modulo tap_apart.
    CELL rest = whole;
    CELL turns = take(rest, a.by_tap_apart) * a.inverse;
    const CELL tap = take(turns, a.by_tap_apart);
    if (tap >= a.kernel) return {};
    const CELL left = whole - tap * a.by_out_apart.value;
    if (left < 0) return {};
    const CELL o = quotient(left, a.by_tap_apart), back = a.by_out_apart.value;
    const CELL skip = o < a.out ? 0 : quotient(o - a.out + back, a.by_out_apart);
    const CELL last = smaller(
        quotient(a.kernel - 1 - tap, a.by_tap_apart), quotient(o, a.by_out_apart));
    if (last < skip) return {};
    return {tap + skip * apart, apart, o - skip * back, -back, last - skip + 1};
}

__device__ inline INDEX tap_offset(const INDEX (&tap)[RANK], const Geometry &g)
{
    INDEX offset = 0;
#pragma unroll
    for (int r = 0; r < RANK; ++r) offset += tap[r] * g.axis[r].tap_step;
    return offset;
}

__device__ inline INDEX first_item()
{
    return (INDEX)blockIdx.x * blockDim.x + threadIdx.x;
}

__device__ inline INDEX item_step()
{
    return (INDEX)gridDim.x * blockDim.x;
}
