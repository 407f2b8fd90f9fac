// Convolution as one matrix product whose columns are never written: they are gathered
// into shared memory, tile by tile, while the tile before is multiplied.
//
//     out[f, p] = sum over r of dense[f, r] * x[p ⊕ r]   (+ bias[f])
//
// An output position and a term of the window (a channel and a tap) together name an
// element of x, and the operation is the same for both ways round:
//
//     forward           p are positions, r terms:  dense = w,  out = y
//     gradient of w     p are terms, r positions:  dense = dy, out = dw
//     gradient of x     forward over dy, for each phase of the strides
//
// Both indices are mixed-radix numbers of four digits (`MixedRadix`): an image or a
// channel, and one digit for each spatial axis.  All arrays are addressed by steps in
// elements: any layout, any view.
//
// No element of x is tested against its sizes.  An index has an offset in x and a few
// bits: a position one for each tap of each axis, set if that tap is inside x there; a
// term the bits of its own taps.  p ⊕ r is inside if the position has every bit of the
// term, and its address is a pointer of the one plus an offset of the other.  With
// MASKED 0, for kernels of more than 31 taps along all axes together and for arrays that
// offsets of 32 bits do not reach, an index has coordinates instead of bits.
//
// A block computes TILE_F × TILE_P results, TILE_R terms of the sum at a time, with
// STAGES tiles of both operands in flight in shared memory.  The offsets and bits of p
// are stored there too, and those of r in a ring that is filled one tile ahead.  A tile
// of an operand is loaded along its contiguous axis (ALONG_R: along the sum), VECTOR
// elements by each copy.  With `parts` > 1 the sum is split (split-K), and part q writes
// its own results at q * part_step; `sum_parts` adds them in order.  Every result has
// one writer, which writes several neighbours at once if out is aligned.
//
// CORE 0 multiplies on the CUDA cores, in any type: each thread TERMS_F × TERMS_P
// results.  CORE 1 uses the tensor cores: halves as they are, float32 as TF32 (the
// hardware ignores the low 13 bits: rounded towards zero, by less than 2^-10 of each
// factor), summed in float32; each warp WARP_F × WARP_P results.
//
// Sources: S. Chetlur et al., "cuDNN: efficient primitives for deep learning", 2014
// (the columns that stay in shared memory); M. Dukhan, "The indirect convolution
// algorithm", 2019 (offsets from a table); PTX ISA (fragments of mma, ldmatrix).

#ifndef ELEMENT
#define ELEMENT float32_t
#define SUM float32_t
#define RESULT float32_t
#endif
#ifndef CORE
#define CORE 0
#define TILE_F 64
#define TILE_P 64
#define TILE_R 8
#define WARP_F 32
#define WARP_P 64
#define STAGES 2
#define BLOCKS 1  // that share a multiprocessor
#endif
#ifndef DENSE_ALONG_R
#define DENSE_ALONG_R 1
#define DENSE_VECTOR 1
#define X_ALONG_R 0
#define X_VECTOR 1
#endif
#ifndef MASKED
#define MASKED 1
#define SUMS_TERMS 1  // 0: the gradient of w
#endif
#ifndef CONJUGATED
#define CONJUGATED 0  // 1: dense, 2: x
#endif

#include "element.cuh"
#include "tensor.cuh"

const int THREADS = TILE_F / WARP_F * (TILE_P / WARP_P) * 32;

#if MASKED
typedef int Offset;
#else
typedef long long Offset;
#endif

// A mixed-radix iterator over an index: digit 0 counts images or channels, digits 1 to
// 3 the axes.  The last axis is the fastest digit, or digit 0 if `first_fastest`.
struct MixedRadix {
    long long count;
    long long x_base, x_step[4], own_step[4];
    int radix[4], advance[4];  // of TILE_R
    int scale[3], first[3];    // coordinates in x: first + digit * scale
    int first_fastest, reserved;
};

// One axis of x, its bits in a mask from `bit` on, and its dilation with a multiplier
// and a shift for divisions (see `DivisorOf` in index.cuh).
struct Axis {
    int size, taps, bit, dilation;
    unsigned multiplier, shift;
};

struct Contraction {
    MixedRadix p, r;
    long long part_length, part_step;
    long long x_group, dense_group, out_group, dense_step, out_step, bias_step;
    unsigned tiles_f, tiles_p, groups, filters, has_bias;
    int along_filters;  // neighbouring results: filters if set, else p
    int is_packed;      // results can be written WIDE at a time
    Axis axis[3];
    int reserved;
};

#ifdef CONTRACTION_BYTES
static_assert(sizeof(Contraction) == CONTRACTION_BYTES, "the host packs another one");
#endif

// What decides whether p ⊕ r is inside x.
#if MASKED
typedef unsigned Reach;

// A term that is not there needs a bit that no position has.
const unsigned NEVER = 1u << 31;
#else
struct Reach {
    int cell[3];
};

// Coordinates far outside x.
const int MISSING = -(1 << 30);
#endif

// An index: its offset in x, and its offset in the other array.
struct Element {
    Offset x;
    Reach reach;
};

struct Own {
    Offset at;
    int is_there;  // all bits, or none
};

struct Digits {
    int digit[4];
};

// The results of a block, their group, and the part of their sums.
struct BlockOfResults {
    int group, part, first_f, reserved;
    long long first_p;
};

__device__ inline Digits digits_of(long long index, const MixedRadix &mixed)
{
    Digits d;
    if (mixed.first_fastest) {
        d.digit[0] = (int)(index % mixed.radix[0]);
        index /= mixed.radix[0];
    }
#pragma unroll
    for (int i = 3; i >= 1; --i) {
        d.digit[i] = (int)(index % mixed.radix[i]);
        index /= mixed.radix[i];
    }
    if (!mixed.first_fastest) d.digit[0] = (int)index;
    return d;
}

// Add to one digit; return the carry into the next.
__device__ inline int add_digit(int &digit, int more, int radix)
{
    digit += more;
    const int carry = digit >= radix;
    if (carry) digit -= radix;
    return carry;
}

// Add TILE_R to the index, without a division.
__device__ inline void advance(Digits &d, const MixedRadix &mixed)
{
    int carry = 0;
    if (mixed.first_fastest)
        carry = add_digit(d.digit[0], mixed.advance[0], mixed.radix[0]);
#pragma unroll
    for (int i = 3; i >= 1; --i)
        carry = add_digit(d.digit[i], mixed.advance[i] + carry, mixed.radix[i]);
    if (!mixed.first_fastest) d.digit[0] += mixed.advance[0] + carry;
}

__device__ inline Offset offset_of(
    const Digits &d, Offset base, const long long (&step)[4])
{
#pragma unroll
    for (int i = 0; i < 4; ++i) base += d.digit[i] * (Offset)step[i];
    return base;
}

#if MASKED
__device__ inline int over_dilation(int n, const Axis &axis)
{
    return axis.dilation == 1 ? n
                              : (int)(__umulhi((unsigned)n, axis.multiplier) >> axis.shift);
}

__device__ inline int smaller(int a, int b) { return a < b ? a : b; }

// The taps of a position that are inside x: 0 <= first + tap * dilation < size.
__device__ inline Reach taps_inside(
    const Digits &d, const MixedRadix &mixed, const Contraction &c)
{
    Reach inside = 0;
#pragma unroll
    for (int i = 0; i < 3; ++i) {
        const Axis &axis = c.axis[i];
        const int first = mixed.first[i] + d.digit[i + 1] * mixed.scale[i];
        const int before = first < 0 ? axis.dilation - 1 - first : 0;
        const int after = axis.size - 1 - first + axis.dilation;
        const int end = smaller(over_dilation(after > 0 ? after : 0, axis), axis.taps);
        const int low = smaller(over_dilation(before, axis), end);
        inside |= (1u << (axis.bit + end)) - (1u << (axis.bit + low));
    }
    return inside;
}

__device__ inline Reach taps_of(const Digits &d, const Contraction &c)
{
    Reach taps = 0;
#pragma unroll
    for (int i = 0; i < 3; ++i) taps |= 1u << (c.axis[i].bit + d.digit[i + 1]);
    return taps;
}

template <bool IS_TERM>
__device__ inline Reach reach_of(
    const Digits &d, bool is_there, const MixedRadix &mixed, const Contraction &c)
{
    if (IS_TERM) return taps_of(d, c) | (is_there ? 0 : NEVER);
    return is_there ? taps_inside(d, mixed, c) : 0;
}
#else
template <bool IS_TERM>
__device__ inline Reach reach_of(
    const Digits &d, bool is_there, const MixedRadix &mixed, const Contraction &)
{
    Reach reach;
#pragma unroll
    for (int i = 0; i < 3; ++i)
        reach.cell[i] = mixed.first[i] + d.digit[i + 1] * mixed.scale[i];
    if (!is_there) reach.cell[0] = MISSING;
    return reach;
}
#endif

// True if p ⊕ r is inside x.
__device__ inline bool are_inside(const Reach &p, const Reach &r, const Contraction &c)
{
#if MASKED
    return SUMS_TERMS ? !(r & ~p) : !(p & ~r);
#else
    bool inside = true;
#pragma unroll
    for (int i = 0; i < 3; ++i)
        inside =
            inside && (unsigned)(p.cell[i] + r.cell[i]) < (unsigned)c.axis[i].size;
    return inside;
#endif
}

// The tile of one operand, FREE × TILE_R: its layout in shared memory, and the loads of
// each thread.  For CUDA cores, which read along FREE, that is the contiguous axis;
// tensor cores take either.
template <int FREE_, bool ALONG_R, int VECTOR>
struct Tile {
    static const int FREE = FREE_;
    static const bool IS_ALONG_R = CORE == 1 && ALONG_R;
    // Rows are aligned to 16 bytes, and a warp reads from different banks.
    static const int SIXTEEN_BYTES = sizeof(ELEMENT) > 16 ? 1 : 16 / sizeof(ELEMENT);
    static const bool IS_TF32_BY_TERMS = CORE == 1 && sizeof(ELEMENT) == 4 && !ALONG_R;
    static const int PAD = IS_TF32_BY_TERMS ? 8 : SIXTEEN_BYTES;
    static const int PITCH = (IS_ALONG_R ? TILE_R : FREE) + PAD;
    static const int CELLS = (IS_ALONG_R ? FREE : TILE_R) * PITCH;
    static const int LINE = (ALONG_R ? TILE_R : FREE) / VECTOR;
    static const int COPIES = FREE * TILE_R / VECTOR;
    static const int EACH = COPIES < THREADS ? 1 : COPIES / THREADS;
    static_assert(COPIES < THREADS || COPIES % THREADS == 0, "a copy without a thread");
    // The copies of a thread: FREES places and TERMS terms, neighbours of each other.
    static const int FREES = ALONG_R ? EACH : LINE > THREADS ? LINE / THREADS : 1;
    static const int TERMS = EACH / FREES;
    static const int FREE_STEP = ALONG_R ? THREADS / LINE : THREADS * VECTOR;
    static const int BYTES = VECTOR * sizeof(ELEMENT);
    // The alignment of copies: complex128 is aligned to 8 bytes.
    static const int GRAIN = sizeof(ELEMENT) == 16 ? 8 : BYTES;
    static const bool IS_ALONE =
        COPIES_ALONE && (BYTES == 4 || BYTES == 8 || BYTES == 16);
    typedef typename WordOf<BYTES, GRAIN>::type Word;

    __device__ static inline bool is_mine()
    {
        return COPIES >= THREADS || threadIdx.x < COPIES;
    }
    // The place and the term of the first copy.
    __device__ static inline int free()
    {
        return ALONG_R ? threadIdx.x / LINE : threadIdx.x % LINE * VECTOR;
    }
    __device__ static inline int term()
    {
        return ALONG_R ? threadIdx.x % LINE * VECTOR : threadIdx.x / LINE * TERMS;
    }
    __device__ static inline int cell(int free, int term)
    {
        return IS_ALONG_R ? free * PITCH + term : term * PITCH + free;
    }
};

typedef Tile<TILE_F, DENSE_ALONG_R, DENSE_VECTOR> DenseTile;
typedef Tile<TILE_P, X_ALONG_R, X_VECTOR> XTile;

const int STAGE_CELLS = DenseTile::CELLS + XTile::CELLS;
const int TILE_BYTES = (STAGES * STAGE_CELLS * (int)sizeof(ELEMENT) + 15) / 16 * 16;
// Behind the tiles; each begins at a multiple of 16 bytes.
const int BIAS_BYTES = TILE_F * (int)sizeof(SUM);
const int DIGITS_BYTES = TILE_R * (int)sizeof(Digits);
const int RING_BYTES = 2 * TILE_R * (int)sizeof(Element);
const int RING_OWN_BYTES = 2 * TILE_R * (int)sizeof(Own);
const int PLACES_BYTES = TILE_P * (int)sizeof(Element);
const int OWN_BYTES = TILE_P * (int)sizeof(Offset);
const int TABLE_BYTES = DIGITS_BYTES + RING_BYTES + RING_OWN_BYTES + PLACES_BYTES +
                        OWN_BYTES + (int)sizeof(BlockOfResults);

#ifdef SHARED_BYTES
static_assert(
    TILE_BYTES + BIAS_BYTES + TABLE_BYTES == SHARED_BYTES, "the host asks for another");
#endif

// Copies one tile.  Elements that cannot be copied asynchronously are kept in registers
// until the tile before has been multiplied.
template <class T>
struct Copies {
    typename T::Word held[T::IS_ALONE ? 1 : T::EACH];

    // The j-th place and the k-th term of this thread.
    __device__ inline void take(
        int j, int k, ELEMENT *tile, const ELEMENT *from, bool is_there)
    {
        const typename T::Word nothing = {};
        if (T::IS_ALONE)
#pragma unroll
            for (int b = 0; b < T::BYTES; b += T::GRAIN)
                copy_alone<T::GRAIN>(
                    (char *)target(j, k, tile) + b, (const char *)from + b, is_there);
        else
            held[j * T::TERMS + k] =
                is_there ? *(const typename T::Word *)from : nothing;
    }

    __device__ inline void settle(ELEMENT *tile)
    {
        if (T::IS_ALONE || !T::is_mine()) return;
#pragma unroll
        for (int j = 0; j < T::FREES; ++j)
#pragma unroll
            for (int k = 0; k < T::TERMS; ++k)
                *(typename T::Word *)target(j, k, tile) = held[j * T::TERMS + k];
    }

    __device__ static inline ELEMENT *target(int j, int k, ELEMENT *tile)
    {
        return tile + T::cell(T::free(), T::term()) + T::cell(j * T::FREE_STEP, k);
    }
};

// Entries of a table that are read at a time, four of 8 bytes by two instructions: on
// some devices the first copy after a read of shared memory costs three empty reads.
template <class Entry, int MOST>
struct Several {
    static const int N = sizeof(Entry) > 8 || MOST < 2 ? 1 : MOST < 4 ? 2 : 4;
    struct __align__(N == 1 ? alignof(Entry) : 16) Entries {
        Entry each[N];
    };

    __device__ static inline Entries at(const Entry *first)
    {
        return *(const Entries *)first;
    }
};

// Loads tiles of `dense`: rows are filters, at equal steps.
struct WeightLoader : Copies<DenseTile> {
    typedef DenseTile T;
    typedef Several<Own, T::TERMS> Terms;
    static_assert(T::FREES <= 32, "a bit for each row");
    const ELEMENT *first;
    long long further;
    unsigned rows;  // bit j: the j-th row is there

    __device__ inline void begin(
        const ELEMENT *dense, long long row, const Contraction &c)
    {
        first = kept(dense + (row + T::free()) * c.dense_step);
        further = T::FREE_STEP * c.dense_step;
        const long long left = (long long)c.filters - row - T::free();
        rows = 0;
#pragma unroll
        for (int j = 0; j < T::FREES; ++j)
            rows |= (unsigned)(j * T::FREE_STEP < left) << j;
        rows = kept(rows);
    }

    __device__ inline void load(const Own *ring, ELEMENT *tile)
    {
        if (!T::is_mine()) return;
#pragma unroll
        for (int k = 0; k < T::TERMS; k += Terms::N) {
            const typename Terms::Entries r = Terms::at(ring + T::term() + k);
#pragma unroll
            for (int i = 0; i < Terms::N; ++i) {
                const unsigned there = rows & r.each[i].is_there;
                const ELEMENT *from = first + r.each[i].at;
#pragma unroll
                for (int j = 0; j < T::FREES; ++j) {
                    take(j, k + i, tile, from, (there & 1u << j) != 0);
                    from += further;
                }
            }
        }
    }
};

// Loads tiles of x, gathered by offsets.  A thread with few places keeps them in
// registers; one with many copies a single term.
struct InputLoader : Copies<XTile> {
    typedef XTile T;
    typedef Several<Element, T::TERMS> Terms;
    static const bool KEEPS = T::FREES <= 2;
    static const int KEPT = KEEPS ? T::FREES : 1;
    static_assert(KEEPS || T::TERMS == 1, "many places of many terms");
    static const int AT_ONCE = Several<Element, T::FREES>::N;
    const ELEMENT *from[KEPT];
    Reach reach[KEPT];

    __device__ inline void begin(const ELEMENT *x, const Element *places)
    {
        from[0] = kept(x);
        if (KEEPS && T::is_mine())
#pragma unroll
            for (int j = 0; j < KEPT; ++j) {
                const Element mine = places[T::free() + j * T::FREE_STEP];
                from[j] = kept(x + mine.x);
                reach[j] = mine.reach;
            }
    }

    __device__ inline void load(
        const Element *ring, const Element *places, ELEMENT *tile, const Contraction &c)
    {
        if (!T::is_mine()) return;
        if (KEEPS)
#pragma unroll
            for (int k = 0; k < T::TERMS; k += Terms::N) {
                const typename Terms::Entries r = Terms::at(ring + T::term() + k);
#pragma unroll
                for (int i = 0; i < Terms::N; ++i)
#pragma unroll
                    for (int j = 0; j < KEPT; ++j)
                        take(j, k + i, tile, from[j] + r.each[i].x,
                             are_inside(reach[j], r.each[i].reach, c));
            }
        else {
            const Element r = ring[T::term()];
            const ELEMENT *row = kept(from[0] + r.x);
#pragma unroll
            for (int j = 0; j < T::FREES; j += AT_ONCE) {
                Element p[AT_ONCE];
#pragma unroll
                for (int i = 0; i < AT_ONCE; ++i)
                    p[i] = places[T::free() + (j + i) * T::FREE_STEP];
#pragma unroll
                for (int i = 0; i < AT_ONCE; ++i)
                    take(j + i, 0, tile, row + p[i].x, are_inside(p[i].reach, r.reach, c));
            }
        }
    }
};

#if CORE == 0

// A thread's results are squares of 4 × 4, far apart, so that a warp of 4 × 8 threads
// reads contiguous memory.
struct Core {
    static const int F = WARP_F / 4, P = WARP_P / 8;
    static const int COUNT = F * P;
    SUM sum[COUNT];

    __device__ inline SUM &result(int n) { return sum[n]; }
    __device__ static inline int across(int i, int lanes, int lane)
    {
        return i / 4 * 4 * lanes + lane * 4 + i % 4;
    }
    __device__ static inline int filter(int i, unsigned thread = threadIdx.x)
    {
        return thread / 32 / (TILE_P / WARP_P) * WARP_F + across(i, 4, thread % 32 / 8);
    }
    __device__ static inline int position(int j, unsigned thread = threadIdx.x)
    {
        return thread / 32 % (TILE_P / WARP_P) * WARP_P + across(j, 8, thread % 8);
    }
    __device__ static inline int row(int n, unsigned thread)
    {
        return filter(n / P, thread);
    }
    __device__ static inline int column(int n, unsigned thread)
    {
        return position(n % P, thread);
    }

    __device__ inline void multiply(const ELEMENT *dense, const ELEMENT *x)
    {
#pragma unroll
        for (int r = 0; r < TILE_R; ++r) {
            SUM a[F], b[P];
#pragma unroll
            for (int i = 0; i < F; i += 4)
                read<CONJUGATED == 1>(a + i, dense + r * DenseTile::PITCH + filter(i));
#pragma unroll
            for (int j = 0; j < P; j += 4)
                read<CONJUGATED == 2>(b + j, x + r * XTile::PITCH + position(j));
#pragma unroll
            for (int n = 0; n < COUNT; ++n) add_product(sum[n], a[n / P], b[n % P]);
        }
    }

    struct __align__(sizeof(ELEMENT) < 4 ? 4 * sizeof(ELEMENT) : 16) Four {
        ELEMENT value[4];
    };

    template <bool IS_CONJUGATED>
    __device__ static inline void read(SUM *into, const ELEMENT *from)
    {
        const Four four = *(const Four *)from;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const SUM wide = (SUM)widen(four.value[i]);
            into[i] = IS_CONJUGATED ? conjugate(wide) : wide;
        }
    }
};

#else

// Filters are the rows of the product, positions its columns; see `tensor.cuh`.
struct Core {
    static const int F = WARP_F / 16, P = WARP_P / 8;
    static const int COUNT = F * P * 4;
    static const int STEP = sizeof(ELEMENT) == 4 ? 8 : 16;
    float sum[F * P][4];

    __device__ inline SUM &result(int n) { return sum[n / 4][n % 4]; }
    __device__ static inline int first_filter(unsigned thread = threadIdx.x)
    {
        return thread / 32 / (TILE_P / WARP_P) * WARP_F;
    }
    __device__ static inline int first_position(unsigned thread = threadIdx.x)
    {
        return thread / 32 % (TILE_P / WARP_P) * WARP_P;
    }
    __device__ static inline int row(int n, unsigned thread)
    {
        return first_filter(thread) + n / 4 / P * 16 + thread % 32 / 4 + n % 4 / 2 * 8;
    }
    __device__ static inline int column(int n, unsigned thread)
    {
        return first_position(thread) + n / 4 % P * 8 + thread % 4 * 2 + n % 2;
    }

    __device__ inline void multiply(const ELEMENT *dense, const ELEMENT *x)
    {
#pragma unroll
        for (int r = 0; r < TILE_R; r += STEP) {
            unsigned b[P][2];
#pragma unroll
            for (int j = 0; j < P; j += 2)
                load_columns(b[j], b[j + 1], x, first_position() + j * 8, r);
#pragma unroll
            for (int i = 0; i < F; ++i) {
                unsigned a[4];
                load_rows(a, dense, first_filter() + i * 16, r);
#pragma unroll
                for (int j = 0; j < P; ++j)
                    multiply_matrices(ELEMENT(), a, b[j], sum[i * P + j]);
            }
        }
    }

    // 16 filters × STEP terms, as four matrices: the lower 8 filters second.
    __device__ static inline void load_rows(
        unsigned (&a)[4], const ELEMENT *dense, int filter, int r)
    {
        const int lane = threadIdx.x % 32;
        if (BY_MATRICES<DenseTile>) {
            const int half = lane / 8 % 2, other = lane / 16;
            const bool along = DenseTile::IS_ALONG_R;
            const int f = filter + half * 8 + (along ? lane % 8 : 0);
            const int t = r + other * STEP / 2 + (along ? 0 : lane % 8);
            load_matrices<!along>(a, dense + DenseTile::cell(f, t));
            return;
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
            a[i] = bits_of(dense[DenseTile::cell(
                filter + lane / 4 + i % 2 * 8, r + lane % 4 + i / 2 * 4)]);
    }

    // STEP terms × 16 positions: two pairs of matrices.
    __device__ static inline void load_columns(
        unsigned (&left)[2], unsigned (&right)[2], const ELEMENT *x, int position, int r)
    {
        const int lane = threadIdx.x % 32;
        unsigned four[4];
        if (BY_MATRICES<XTile>) {
            const int half = lane / 8 % 2, other = lane / 16;
            const bool along = XTile::IS_ALONG_R;
            const int p = position + other * 8 + (along ? lane % 8 : 0);
            const int t = r + half * STEP / 2 + (along ? 0 : lane % 8);
            load_matrices<!along>(four, x + XTile::cell(p, t));
        } else {
#pragma unroll
            for (int i = 0; i < 4; ++i)
                four[i] = bits_of(x[XTile::cell(
                    position + lane / 4 + i / 2 * 8, r + lane % 4 + i % 2 * 4)]);
        }
        left[0] = four[0], left[1] = four[1], right[0] = four[2], right[1] = four[3];
    }

    // Rows of 16 bytes that are contiguous in a tile, or can be transposed.
    template <class T>
    static const bool BY_MATRICES = sizeof(ELEMENT) == 2 || T::IS_ALONG_R;
    __device__ static inline unsigned bits_of(float value)
    {
        return __float_as_uint(value);
    }
    template <class H>
    __device__ static inline unsigned bits_of(H) { return 0; }
};

#endif

// Results pass through shared memory, so that writes are coalesced: ALONG_F by columns
// of filters, else by rows of p; VECTOR neighbours at a time.
const int WIDE = sizeof(RESULT) > 8 ? 1 : sizeof(RESULT) > 4 ? 2 : 4;

template <bool ALONG_F, int VECTOR>
struct Stage {
    // Aligned for vectors, and for few conflicts of banks.
    static const int PITCH_OF_ROWS = TILE_P + (CORE == 1 ? 8 : 4);
    static const int ROWS_THAT_FIT =
        TILE_BYTES / (int)sizeof(SUM) / (ALONG_F ? TILE_P : PITCH_OF_ROWS) -
        (ALONG_F ? 4 : 0);
    static const int ROWS = ROWS_THAT_FIT >= TILE_F       ? TILE_F
                            : ROWS_THAT_FIT >= TILE_F / 2 ? TILE_F / 2
                            : ROWS_THAT_FIT >= TILE_F / 4 ? TILE_F / 4
                                                          : TILE_F / 8;
    static_assert(ROWS <= ROWS_THAT_FIT, "a slice of results is too large");
    static const int PITCH = ALONG_F ? ROWS + 4 : PITCH_OF_ROWS;
    // All results of a warp lie in one slice.
    static const bool IS_WHOLE = ROWS % WARP_F == 0;
    static const int ACROSS = (ALONG_F ? ROWS : TILE_P) / VECTOR;
    static const int LINES = ALONG_F ? TILE_P : ROWS;
    static const int AT_ONCE = THREADS > ACROSS ? THREADS / ACROSS : 1;
    static_assert(LINES % AT_ONCE == 0, "a thread without a line");

    struct __align__(VECTOR * sizeof(SUM) > 16 ? 16 : VECTOR * sizeof(SUM)) Sums {
        SUM value[VECTOR];
    };
    struct __align__(VECTOR == 1 ? alignof(RESULT) : VECTOR * sizeof(RESULT)) Results {
        RESULT value[VECTOR];
    };

    __device__ static inline int cell(int row, int column)
    {
        return ALONG_F ? column * PITCH + row : row * PITCH + column;
    }

    __device__ static inline void write(
        Core &core, unsigned thread, SUM *stage, const Offset *own, RESULT *out,
        int filters, int columns, long long step)
    {
#pragma unroll 1
        for (int base = 0; base < TILE_F; base += ROWS) {
            __syncthreads();
            collect(core, thread, stage, base);
            __syncthreads();
#pragma unroll
            for (int i = 0; i < ACROSS; i += THREADS) {
                const int line = thread / ACROSS;
                const int across = (i + thread % ACROSS) * VECTOR;
                if (ALONG_F)
                    write_filters(
                        across, line, stage, own, out, filters - base, columns, step);
                else
                    write_places(
                        line, across, stage, own, out, filters - base, columns, step);
            }
            out += ROWS * step;
        }
    }

    __device__ static inline void collect(
        Core &core, unsigned thread, SUM *stage, int base)
    {
        const int first = thread / 32 / (TILE_P / WARP_P) * WARP_F - base;
        if (IS_WHOLE && (first < 0 || first >= ROWS)) return;
#pragma unroll
        for (int n = 0; n < Core::COUNT; ++n) {
            const int row = Core::row(n, thread) - base;
            if (!IS_WHOLE && (row < 0 || row >= ROWS)) continue;
            stage[cell(row, Core::column(n, thread))] = core.result(n);
        }
    }

    // The same filters at every AT_ONCE-th column.
    __device__ static inline void write_filters(
        int row, int first, const SUM *stage, const Offset *own, RESULT *out,
        int filters, int columns, long long step)
    {
        if (row >= filters) return;
        out = kept(out + row * step);
        stage += cell(row, first);
        own += first;
        const int left = columns - first;
#pragma unroll 8
        for (int i = 0; i < LINES; i += AT_ONCE)
            if (i < left) put(out + own[i], stage + cell(0, i));
    }

    // The same columns of every AT_ONCE-th filter.
    __device__ static inline void write_places(
        int first, int column, const SUM *stage, const Offset *own, RESULT *out,
        int filters, int columns, long long step)
    {
        if (column >= columns) return;
        out = kept(out + own[column] + first * step);
        stage += cell(first, column);
        const int left = filters - first;
        const long long further = AT_ONCE * step;
#pragma unroll 8
        for (int i = 0; i < LINES; i += AT_ONCE) {
            if (i < left) put(out, stage + cell(i, 0));
            out = kept(out + further);
        }
    }

    __device__ static inline void put(RESULT *to, const SUM *from)
    {
        const Sums sums = *(const Sums *)from;
        Results results;
#pragma unroll
        for (int i = 0; i < VECTOR; ++i)
            results.value[i] = Stored<RESULT>::of(sums.value[i]);
        *(Results *)to = results;
    }
};

// Blocks of neighbouring filters run at the same time: they gather the same places.
__device__ inline BlockOfResults block_of(unsigned number, const Contraction &c)
{
    const unsigned tile_f = number % c.tiles_f, outer = number / c.tiles_f;
    const unsigned tile_p = outer % c.tiles_p, both = outer / c.tiles_p;
    return {
        (int)(both % c.groups), (int)(both / c.groups), (int)tile_f * TILE_F, 0,
        (long long)tile_p * TILE_P};
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) implicit_gemm(
    const ELEMENT *__restrict__ dense, const ELEMENT *__restrict__ x,
    const ELEMENT *__restrict__ bias, RESULT *__restrict__ out, const Contraction c)
{
    SHARED_MEMORY(memory);
    ELEMENT *const tiles = (ELEMENT *)memory;
    SUM *const biases = (SUM *)(memory + TILE_BYTES);
    Digits *const digits = (Digits *)(memory + TILE_BYTES + BIAS_BYTES);
    Element *const ring = (Element *)((unsigned char *)digits + DIGITS_BYTES);
    Own *const ring_own = (Own *)((unsigned char *)ring + RING_BYTES);
    Element *const places = (Element *)((unsigned char *)ring_own + RING_OWN_BYTES);
    Offset *const own = (Offset *)((unsigned char *)places + PLACES_BYTES);
    BlockOfResults *const block = (BlockOfResults *)((unsigned char *)own + OWN_BYTES);

    const BlockOfResults mine = block_of(blockIdx.x, c);
    if (threadIdx.x == 0) *block = mine;
    const int group = mine.group, part = mine.part, first_f = mine.first_f;
    const long long first_p = mine.first_p;
    const long long start = part * c.part_length;
    const long long rest = c.r.count - start;
    const long long length = rest < c.part_length ? rest : c.part_length;
    const int steps = (int)((length + TILE_R - 1) / TILE_R);
    const int in_last_step = (int)(length - (long long)(steps - 1) * TILE_R);

    for (int i = threadIdx.x; i < TILE_P; i += THREADS) {
        const bool is_there = first_p + i < c.p.count;
        const Digits p = digits_of(is_there ? first_p + i : 0, c.p);
        places[i].x = offset_of(p, (Offset)c.p.x_base, c.p.x_step);
        places[i].reach = reach_of<!SUMS_TERMS>(p, is_there, c.p, c);
        own[i] = offset_of(p, 0, c.p.own_step);
    }
    const bool adds_bias = c.has_bias && part == 0;
    for (int i = threadIdx.x; i < TILE_F; i += THREADS) {
        const long long f = first_f + i;
        const SUM nothing = {};
        biases[i] = adds_bias && f < c.filters
                        ? (SUM)widen(bias[(group * (long long)c.filters + f) * c.bias_step])
                        : nothing;
    }
    if (threadIdx.x < TILE_R) digits[threadIdx.x] = digits_of(start + threadIdx.x, c.r);
    // The ring is filled by its own threads, one tile ahead.
    const auto fill = [&](int step) {
        if (threadIdx.x >= TILE_R) return;
        const bool is_there =
            threadIdx.x < (step < steps - 1 ? TILE_R : in_last_step);
        const int at = step % 2 * TILE_R + threadIdx.x;
        Digits d = digits[threadIdx.x];
        ring[at].x = offset_of(d, (Offset)c.r.x_base, c.r.x_step);
        ring[at].reach = reach_of<SUMS_TERMS>(d, is_there, c.r, c);
        ring_own[at].at = offset_of(d, 0, c.r.own_step);
        ring_own[at].is_there = is_there ? -1 : 0;
        advance(d, c.r);
        digits[threadIdx.x] = d;
    };
    fill(0);
    __syncthreads();

    WeightLoader weights;
    InputLoader inputs;
    weights.begin(dense + group * c.dense_group, first_f, c);
    inputs.begin(x + group * c.x_group, places);
    const auto load = [&](int step, ELEMENT *to) {
        const int at = step % 2 * TILE_R;
        if (step < steps) {
            weights.load(ring_own + at, to);
            inputs.load(ring + at, places, to + DenseTile::CELLS, c);
        }
        end_group();
    };
    const auto settle = [&](int step, ELEMENT *to) {
        if (step >= steps) return;
        weights.settle(to);
        inputs.settle(to + DenseTile::CELLS);
    };
    for (int step = 0; step < STAGES - 1; ++step) {
        load(step, tiles + step * STAGE_CELLS);
        settle(step, tiles + step * STAGE_CELLS);
        fill(step + 1);
        __syncthreads();
    }

    Core core = {};
    // Of the tile that is multiplied, and of the one that is loaded.
    int here = 0, next = (STAGES - 1) * STAGE_CELLS;
    for (int step = 0; step < steps; ++step) {
        wait_for_copies<STAGES - 2>();
        __syncthreads();
        load(step + STAGES - 1, tiles + next);
        core.multiply(tiles + here, tiles + here + DenseTile::CELLS);
        settle(step + STAGES - 1, tiles + next);
        fill(step + STAGES);
        next = here;
        here = here == (STAGES - 1) * STAGE_CELLS ? 0 : here + STAGE_CELLS;
    }
    wait_for_copies<0>();
    // Read or computed again, so that the loop has their registers.
    const BlockOfResults again = *block;
    const unsigned thread = kept(threadIdx.x);
#pragma unroll
    for (int n = 0; n < Core::COUNT; ++n)
        add_to(core.result(n), biases[Core::row(n, thread)]);
    SUM *const stage = (SUM *)memory;
    RESULT *const to = out + again.group * c.out_group + again.part * c.part_step +
                       again.first_f * c.out_step;
    const int filters = (int)(c.filters - again.first_f);
    const long long left = c.p.count - again.first_p;
    const int columns = left < TILE_P ? (int)left : TILE_P;
    if (c.along_filters)
        if (c.is_packed)
            Stage<true, WIDE>::write(
                core, thread, stage, own, to, filters, columns, c.out_step);
        else
            Stage<true, 1>::write(
                core, thread, stage, own, to, filters, columns, c.out_step);
    else if (c.is_packed)
        Stage<false, WIDE>::write(
            core, thread, stage, own, to, filters, columns, c.out_step);
    else
        Stage<false, 1>::write(
            core, thread, stage, own, to, filters, columns, c.out_step);
}
