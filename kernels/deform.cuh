// Samples of a deformable convolution: taps that offsets move between elements of x.
//
// Along axis r, tap t of output o is at
//
//     p = first + o * stride + t * dilation + offset[n, d, t, r, o]
//
// where d is the offset group of the channel.  x at p is the sum, over the 2^RANK
// elements around p, of the element times the product, along every axis, of 1 - its
// distance from p; elements outside x are zero.
//
// Macros: ELEMENT, the type of x; OFFSET and MASK; COLUMN, of the columns or their
// gradient; SUM, of coordinates and sums; RESULT, of gradients for offsets and mask.

#ifndef ELEMENT
#define ELEMENT float32_t
#define SUM float32_t
#endif
#ifndef COLUMN
#define COLUMN ELEMENT
#endif
#ifndef OFFSET
#define OFFSET ELEMENT
#endif
#ifndef MASK
#define MASK OFFSET
#endif
#ifndef RESULT
#define RESULT ELEMENT
#endif

// Of an array (N, offset groups, taps, axes, *out); a mask has no axes.
struct Steps {
    INDEX image, group, tap, axis, out[RANK];
};

struct Deform {
    Geometry g;
    INDEX each;                  // neighbouring channels of one thread
    INDEX x_channel, c_channel;  // from one of them to the next
    INDEX group_channels, offset_channels;
    INDEX last;                  // elements of x along the last axis
    INDEX taps[RANK];
    Divisor by_offset_channels;
    Steps offset, mask, doffset, dmask;
};

#ifdef DEFORM_BYTES
static_assert(sizeof(Deform) == DEFORM_BYTES, "the host packs another Deform");
#endif

#define CORNERS (1 << RANK)

__device__ inline INDEX
offset_at(const Steps &s, INDEX image, INDEX group, INDEX tap, const INDEX (&o)[RANK])
{
    INDEX at = image * s.image + group * s.group + tap * s.tap;
#pragma unroll
    for (int r = 0; r < RANK; ++r) at += o[r] * s.out[r];
    return at;
}

// The place of a sample along one axis: the element before it, and how far behind.
struct Between {
    INDEX low;
    SUM fraction;
};

__device__ inline float whole(float v) { return floorf(v); }
__device__ inline double whole(double v) { return floor(v); }

__device__ inline Between between(INDEX base, SUM moved, INDEX size)
{
    SUM p = (SUM)base + moved;
    // Where both elements are outside; what is not a number stays so.
    if (p < -1 || p > (SUM)size) p = (SUM)size;
    const SUM low = whole(p);
    return {p == p ? (INDEX)low : 0, p - low};
}

__device__ inline void sample_at(
    Between (&s)[RANK], const OFFSET *offset, const INDEX (&o)[RANK],
    const INDEX (&tap)[RANK], const Deform &p)
{
#pragma unroll
    for (int r = 0; r < RANK; ++r) {
        const Axis &a = p.g.axis[r];
        const INDEX base = a.first + o[r] * a.stride + tap[r] * a.dilation;
        s[r] = between(base, (SUM)widen(offset[r * p.offset.axis]), a.size);
    }
}

// Bit r of a corner: the element behind the sample along axis r.
__device__ inline bool
corner_at(const Between (&s)[RANK], int corner, const Geometry &g, INDEX &at)
{
    bool inside = true;
    at = 0;
#pragma unroll
    for (int r = 0; r < RANK; ++r) {
        const INDEX i = s[r].low + (corner >> r & 1);
        inside = inside && (UNSIGNED_INDEX)i < (UNSIGNED_INDEX)g.axis[r].size;
        at += i * g.axis[r].x_step;
    }
    return inside;
}

// The weight of a corner along all axes but one; -1 for all.
__device__ inline SUM weight_of(const Between (&s)[RANK], int corner, int but)
{
    SUM weight = 1;
#pragma unroll
    for (int r = 0; r < RANK; ++r)
        if (r != but) weight *= corner >> r & 1 ? s[r].fraction : 1 - s[r].fraction;
    return weight;
}

__device__ inline SUM mask_at(const MASK *mask, INDEX at)
{
    return mask ? (SUM)widen(mask[at]) : (SUM)1;
}
