// Windows over arrays (N, C, *spatial), and the reduction of the elements under each.
//
// There are always three spatial axes (RANK), of which an array may have fewer; every
// array has its own steps, negative ones and zeros included.  Along one axis, output o
// and tap t read element i = first + o * stride + t * dilation, if it is before `end`.
// An even axis of n elements and m outputs has windows from floor(o n / m) up to
// ceil((o + 1) n / m) instead.
//
// Macros: KIND; ELEMENT, the type of x or, for a gradient, of dy; SUM, the type of
// sums; RESULT, that of the result; VALUE, of the x that a gradient reads.

#define MAXIMUM 0
#define MEAN 1
#define NORM 2
#define TAKE 3

#ifndef KIND
#define KIND MAXIMUM
#endif
#ifndef ELEMENT
#define ELEMENT float32_t
#define SUM float32_t
#endif
#ifndef RESULT
#define RESULT ELEMENT
#endif
#ifndef VALUE
#define VALUE ELEMENT
#endif

// Integers that are compared, or turned into floats, have their sign.
typedef signed char signed1_t;
typedef short signed2_t;
typedef int signed4_t;
typedef long long signed8_t;

struct PoolAxis {
    Axis windows;    // steps of x and y or of their gradients; tap_step: of an index
    INDEX end;       // elements from here on are cropped
    INDEX low, high; // the range that a divisor counts
    INDEX is_even;
    INDEX other_x, other_y;  // steps of another array like x, and one like y
};

struct Pool {
    INDEX images, channels, items;
    INDEX channels_fastest;  // neighbouring threads: channels if set, else elements
    INDEX x_image, x_channel, y_image, y_channel;
    INDEX other_x_image, other_x_channel, other_y_image, other_y_channel;
    Divisor by_channels;
    // An index counts the elements of a plane (1, 0, 0), or of the whole array.
    long long index_step, index_image, index_channel;
    double divisor;  // zero: the number of elements
    double norm;
    double least;  // of a window without elements
    PoolAxis axis[RANK];
};

#ifdef POOL_BYTES
static_assert(sizeof(Pool) == POOL_BYTES, "the host packs another Pool");
#endif

// Cells under a window, or outputs over an element, along one axis.
struct Span {
    INDEX first, step, count;
};

__device__ inline Span cells_under(INDEX o, const PoolAxis &p)
{
    const Axis &a = p.windows;
    if (p.is_even) {
        const long long n = a.size, m = a.out;
        const INDEX first = (INDEX)(o * n / m);
        return {first, 1, (INDEX)((o * n + n + m - 1) / m) - first};
    }
    const INDEX base = a.first + o * a.stride;
    const INDEX low = base < 0 ? quotient(a.dilation - 1 - base, a.by_dilation) : 0;
    const INDEX cell = base + low * a.dilation;
    if (low >= a.kernel || cell >= p.end) return {0, 1, 0};
    const INDEX more = quotient(p.end - 1 - cell, a.by_dilation);
    return {cell, a.dilation, smaller(more, a.kernel - 1 - low) + 1};
}

__device__ inline Span outputs_over(INDEX i, const PoolAxis &p)
{
    const Axis &a = p.windows;
    if (p.is_even) {
        const long long n = a.size, m = a.out;
        const INDEX first = (INDEX)(i * m / n);
        return {first, 1, (INDEX)((i * m + m + n - 1) / n) - first};
    }
    if (i >= p.end) return {0, 1, 0};
    const Reach reach = taps_reaching(i, a);
    return {reach.cell, reach.cell_step, reach.count};
}

// The elements that the divisor of an output counts along one axis, at least one.
__device__ inline INDEX counted(INDEX o, const PoolAxis &p)
{
    const Axis &a = p.windows;
    if (p.is_even) return cells_under(o, p).count;
    const INDEX base = a.first + o * a.stride, left = p.high - 1 - base;
    if (left < 0) return 1;
    const INDEX before = p.low - base;
    const INDEX below = before > 0 ? quotient(before + a.dilation - 1, a.by_dilation) : 0;
    const INDEX count = smaller(quotient(left, a.by_dilation) + 1, a.kernel) - below;
    return count > 1 ? count : 1;
}

__device__ inline double divisor_of(const INDEX (&o)[RANK], const Pool &p)
{
    if (p.divisor != 0) return p.divisor;
    double product = 1;
#pragma unroll
    for (int r = 0; r < RANK; ++r) product *= (double)counted(o[r], p.axis[r]);
    return product;
}

__device__ inline long long index_of(
    INDEX cell, INDEX image, INDEX channel, const Pool &p)
{
    return cell * p.index_step + image * p.index_image + channel * p.index_channel;
}

// The offset in x, from its first element of the plane, of the element with an index;
// false if that is not under the window.
__device__ inline bool find_index(
    long long index, INDEX image, INDEX channel, const Span (&cells)[RANK],
    const Pool &p, INDEX &offset)
{
    if (index < 0) return false;  // nor can the difference overflow
    index -= image * p.index_image + channel * p.index_channel;
    if (index < 0 || (p.index_step > 1 && index % p.index_step)) return false;
    if (p.index_step > 1) index /= p.index_step;
    long long plane = 1;
#pragma unroll
    for (int r = 0; r < RANK; ++r) plane *= p.axis[r].windows.size;
    if (index >= plane) return false;
    INDEX rest = (INDEX)index;
    offset = 0;
    bool is_under = true;
#pragma unroll
    for (int r = RANK - 1; r >= 0; --r) {
        const Axis &a = p.axis[r].windows;
        const INDEX cell = take(rest, a.by_size), far = cell - cells[r].first;
        is_under &= far >= 0 && far < cells[r].count * cells[r].step;
        if (cells[r].step > 1)
            is_under = is_under && quotient(far, a.by_dilation) * a.dilation == far;
        offset += cell * a.x_step;
    }
    return is_under;
}

// Conversions, also to and from complex numbers.
template <typename To, typename From>
struct Converted {
    __device__ static inline To of(From v) { return (To)v; }
};

template <typename From>
struct Converted<complex64_t, From> {
    __device__ static inline complex64_t of(From v) { return {(float)v, 0}; }
};

template <typename From>
struct Converted<complex128_t, From> {
    __device__ static inline complex128_t of(From v) { return {(double)v, 0}; }
};

#define BETWEEN_COMPLEX(To, From, Part)                                                 \
    template <>                                                                         \
    struct Converted<To, From> {                                                        \
        __device__ static inline To of(From v) { return {(Part)v.re, (Part)v.im}; }     \
    };

BETWEEN_COMPLEX(complex64_t, complex64_t, float)
BETWEEN_COMPLEX(complex64_t, complex128_t, float)
BETWEEN_COMPLEX(complex128_t, complex64_t, double)
BETWEEN_COMPLEX(complex128_t, complex128_t, double)

template <typename T> struct WideOf { typedef T type; };
template <> struct WideOf<float16_t> { typedef float type; };
template <> struct WideOf<bfloat16_t> { typedef float type; };

__device__ inline SUM summand(ELEMENT v)
{
    return Converted<SUM, WideOf<ELEMENT>::type>::of(widen(v));
}

template <typename From>
__device__ inline RESULT finished(From v)
{
    return Stored<RESULT>::of(Converted<WideOf<RESULT>::type, From>::of(v));
}

template <typename T>
__device__ inline T divided(T sum, double by) { return (T)(sum / (T)by); }

__device__ inline complex64_t divided(complex64_t sum, double by)
{
    return {sum.re / (float)by, sum.im / (float)by};
}

__device__ inline complex128_t divided(complex128_t sum, double by)
{
    return {sum.re / by, sum.im / by};
}

__device__ inline float magnitude(float v) { return fabsf(v); }
__device__ inline double magnitude(double v) { return fabs(v); }
__device__ inline float root(float v) { return sqrtf(v); }
__device__ inline double root(double v) { return sqrt(v); }
__device__ inline float general_power(float v, double p) { return powf(v, (float)p); }
__device__ inline double general_power(double v, double p) { return pow(v, p); }

template <typename T>
__device__ inline T raised(T v, double p)
{
    if (p == 1) return v;
    if (p == 2) return v * v;
    if (p == 0.5) return root(v);
    return general_power(v, p);
}

#if KIND == MAXIMUM
// The largest element under a window, the first of equal ones; a NaN is larger than
// all.
struct Best {
    WideOf<VALUE>::type value;
    INDEX index;  // in the plane; -1 if there is none
};

template <bool OTHER>
__device__ inline Best best_of(const VALUE *x, const Span (&s)[RANK], const Pool &p)
{
    Best best = {};
    best.index = -1;
    INDEX step[RANK], index[RANK];
#pragma unroll
    for (int r = 0; r < RANK; ++r) {
        const Axis &a = p.axis[r].windows;
        const INDEX own = OTHER ? p.axis[r].other_x : a.x_step;
        x += s[r].first * own;
        step[r] = s[r].step * own;
        index[r] = s[r].step * a.tap_step;
    }
    const INDEX first = s[0].first * p.axis[0].windows.tap_step
        + s[1].first * p.axis[1].windows.tap_step
        + s[2].first * p.axis[2].windows.tap_step;
#pragma unroll 1
    for (INDEX i = 0; i < s[0].count; ++i)
#pragma unroll 1
        for (INDEX j = 0; j < s[1].count; ++j) {
            INDEX at = i * step[0] + j * step[1];
            INDEX place = first + i * index[0] + j * index[1];
#pragma unroll 1
            for (INDEX k = 0; k < s[2].count; ++k, at += step[2], place += index[2]) {
                const auto value = widen(x[at]);
                const bool is_nan = value != value, had_nan = best.value != best.value;
                if (best.index < 0 || value > best.value || (is_nan && !had_nan)) {
                    best.value = value;
                    best.index = place;
                }
            }
        }
    return best;
}
#endif
