// Indices and geometry, shared by the kernels that move between arrays and columns.
//
// Along one axis, output cell o and tap t meet input cell
//
//     i = first + o * stride + t * dilation
//
// where `first` is the cell under tap 0 of output 0 (negative in the padding).  Arrays
// are addressed by steps counted in elements, so any layout and any view will do.
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

// Division by a number known before the launch (Granlund & Montgomery 1994, figure 4.1):
// for 0 <= n < 2^31, n / value = (n * multiplier / 2^32) >> shift, with
// multiplier = ceil(2^(32 + shift) / value) and 2^shift < value <= 2^(shift + 1).
struct Divisor {
    INDEX value;
    unsigned int multiplier;
    unsigned int shift;
};

__device__ inline INDEX quotient(INDEX n, const Divisor &by)
{
#if WIDE_INDEX
    return n / by.value;
#else
    return by.value == 1 ? n : (INDEX)(__umulhi((unsigned)n, by.multiplier) >> by.shift);
#endif
}

struct Axis {
    INDEX size, out, kernel, stride, dilation, first;
    INDEX x_step, tap_step, out_step;
    Divisor by_size, by_out, by_stride;
};

struct Geometry {
    INDEX images, groups, channels;
    INDEX x_image, x_group, x_channel;
    INDEX c_image, c_group, c_channel;
    INDEX items;             // threads with something to do
    INDEX channels_fastest;  // neighbouring threads: channels if set, else cells
    Divisor by_groups, by_channels;
    Axis axis[RANK];
};

#ifdef GEOMETRY_BYTES
static_assert(sizeof(Geometry) == GEOMETRY_BYTES, "the host packs another Geometry");
#endif

// One image, group and channel, and one cell of the output or of the input.
struct Place {
    INDEX image, group, channel;
    INDEX cell[RANK];
};

__device__ inline INDEX take(INDEX &rest, const Divisor &by)
{
    const INDEX more = quotient(rest, by);
    const INDEX digit = rest - more * by.value;
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

// Where a tap of an output cell falls in x; false if it falls into the padding.
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
