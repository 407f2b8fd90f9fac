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
// channel, and one digit for each spatial axis.  A `Place` has the offset of an index
// in x, its offset in the other array, and its coordinates in x; elements outside x
// count as zero.  All arrays are addressed by steps in elements: any layout, any view.
//
// A block computes TILE_F × TILE_P results, TILE_R terms of the sum at a time, with
// STAGES tiles of both operands in flight in shared memory.  The places of p are stored
// there too, and those of r in a ring that is filled one tile ahead.  A tile of an
// operand is loaded along its contiguous axis (ALONG_R: along the sum), VECTOR elements
// by each copy.  With `parts` > 1 the sum is split (split-K), and part q writes its own
// results at q * part_step; `sum_parts` adds them in order.  Every result has one
// writer.
//
// CORE 0 multiplies on the CUDA cores, in any type: each thread TERMS_F × TERMS_P
// results.  CORE 1 uses the tensor cores: halves as they are, float32 rounded to TF32,
// summed in float32; each warp WARP_F × WARP_P results.
//
// Sources: S. Chetlur et al., "cuDNN: efficient primitives for deep learning", 2014
// (the columns that stay in shared memory); PTX ISA (fragments of mma, ldmatrix).

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
#ifndef CONJUGATED
#define CONJUGATED 0  // 1: dense, 2: x
#endif

#include "element.cuh"
#include "tensor.cuh"

const int THREADS = TILE_F / WARP_F * (TILE_P / WARP_P) * 32;

// A mixed-radix iterator over an index: digit 0 counts images or channels, digits 1 to
// 3 the axes.  The last axis is the fastest digit, or digit 0 if `first_fastest`.
struct MixedRadix {
    long long count;
    long long x_base, x_step[4], own_step[4];
    int radix[4], advance[4];  // of TILE_R
    int scale[3], first[3];    // elements of x: first + digit * scale
    int first_fastest, reserved;
};

struct Contraction {
    MixedRadix p, r;
    long long part_length, part_step;
    long long x_group, dense_group, out_group, dense_step, out_step, bias_step;
    unsigned tiles_f, tiles_p, groups, filters, has_bias;
    int size[3], along_filters, reserved;  // neighbouring results: filters if set, else p
};

#ifdef CONTRACTION_BYTES
static_assert(sizeof(Contraction) == CONTRACTION_BYTES, "the host packs another one");
#endif

// The offsets and coordinates of an index.  An index past the end is MISSING: its
// coordinates are far outside x.
const int MISSING = -(1 << 30);

struct Place {
    long long x, own;
    int cell[3];
    int is_there;
};

struct Digits {
    int digit[4];
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

__device__ inline Place place_of(const Digits &d, bool is_there, const MixedRadix &mixed)
{
    Place place = {mixed.x_base, 0, {0, 0, 0}, is_there};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        place.x += d.digit[i] * mixed.x_step[i];
        place.own += d.digit[i] * mixed.own_step[i];
        if (i) place.cell[i - 1] = mixed.first[i - 1] + d.digit[i] * mixed.scale[i - 1];
    }
    if (!is_there) place.cell[0] = MISSING;
    return place;
}

__device__ inline bool is_inside(const int *a, const int *b, const int *size)
{
    bool inside = true;
#pragma unroll
    for (int i = 0; i < 3; ++i)
        inside = inside && (unsigned)(a[i] + b[i]) < (unsigned)size[i];
    return inside;
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
    static const int EACH = (COPIES + THREADS - 1) / THREADS;
    static const bool IS_ONE_FREE = !ALONG_R && THREADS % LINE == 0;
    static const int BYTES = VECTOR * sizeof(ELEMENT);
    // The alignment of copies: complex128 is aligned to 8 bytes.
    static const int GRAIN = sizeof(ELEMENT) == 16 ? 8 : BYTES;
    static const bool IS_ALONE =
        COPIES_ALONE && (BYTES == 4 || BYTES == 8 || BYTES == 16);
    // Addresses computed at the same time take registers; asynchronous copies can wait.
    static const int AT_ONCE = IS_ALONE && EACH > 2 ? 2 : EACH;
    typedef typename WordOf<BYTES, GRAIN>::type Word;

    __device__ static inline int at(int i) { return threadIdx.x + i * THREADS; }
    __device__ static inline bool is_mine(int i)
    {
        return COPIES % THREADS == 0 || at(i) < COPIES;
    }
    __device__ static inline int free_of(int i)
    {
        return ALONG_R ? at(i) / LINE : at(i) % LINE * VECTOR;
    }
    __device__ static inline int term_of(int i)
    {
        return ALONG_R ? at(i) % LINE * VECTOR : at(i) / LINE;
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
const int PLACES_BYTES = (2 * TILE_R + TILE_P) * (int)sizeof(Place);

#ifdef SHARED_BYTES
static_assert(
    TILE_BYTES + PLACES_BYTES + TILE_R * 16 == SHARED_BYTES, "the host asks for another");
#endif

// Copies one tile.  Elements that cannot be copied asynchronously are kept in registers
// until the tile before has been multiplied.
template <class T>
struct Copies {
    typename T::Word held[T::IS_ALONE ? 1 : T::EACH];

    __device__ inline void take(int i, ELEMENT *tile, const ELEMENT *from, bool is_there)
    {
        typename T::Word nothing = {};
        if (T::IS_ALONE)
#pragma unroll
            for (int b = 0; b < T::BYTES; b += T::GRAIN)
                copy_alone<T::GRAIN>(
                    (char *)target(i, tile) + b, (const char *)from + b, is_there);
        else
            held[i] = is_there ? *(const typename T::Word *)from : nothing;
    }

    __device__ inline void settle(ELEMENT *tile)
    {
        if (T::IS_ALONE) return;
#pragma unroll
        for (int i = 0; i < T::EACH; ++i)
            if (T::is_mine(i)) *(typename T::Word *)target(i, tile) = held[i];
    }

    __device__ static inline ELEMENT *target(int i, ELEMENT *tile)
    {
        return tile + T::cell(T::free_of(i), T::term_of(i));
    }
};

// Loads tiles of `dense`: rows are filters, at equal steps.
struct WeightLoader : Copies<DenseTile> {
    const ELEMENT *first;
    int count;

    __device__ inline void begin(
        const ELEMENT *dense, long long row, const Contraction &c)
    {
        first = dense + (row + DenseTile::free_of(0)) * c.dense_step;
        count = (int)(c.filters - row);
    }

    __device__ inline void load(
        const Place *ring, const ELEMENT *any, ELEMENT *tile, const Contraction &c)
    {
#pragma unroll(DenseTile::AT_ONCE)
        for (int i = 0; i < DenseTile::EACH; ++i) {
            if (!DenseTile::is_mine(i)) continue;
            const Place &r = ring[DenseTile::term_of(i)];
            const int row = DenseTile::free_of(i), further = row - DenseTile::free_of(0);
            const bool is_there = row < count && r.is_there;
            const ELEMENT *from = first + further * c.dense_step + r.own;
            take(i, tile, is_there ? from : any, is_there);
        }
    }
};

// Loads tiles of x, gathered by places.  A thread with one place keeps it in registers.
struct InputLoader : Copies<XTile> {
    const ELEMENT *from;
    int cell[3];

    __device__ inline void begin(const ELEMENT *x, const Place *places)
    {
        const Place &mine = places[XTile::free_of(0)];
        from = x + (XTile::IS_ONE_FREE ? mine.x : 0);
#pragma unroll
        for (int i = 0; i < 3; ++i) cell[i] = mine.cell[i];
    }

    __device__ inline void load(
        const Place *ring, const Place *places, const ELEMENT *any, ELEMENT *tile,
        const Contraction &c)
    {
#pragma unroll(XTile::AT_ONCE)
        for (int i = 0; i < XTile::EACH; ++i) {
            if (!XTile::is_mine(i)) continue;
            const Place &r = ring[XTile::term_of(i)];
            const Place &p = places[XTile::free_of(i)];
            const bool is_there =
                is_inside(XTile::IS_ONE_FREE ? cell : p.cell, r.cell, c.size);
            const ELEMENT *source = from + (XTile::IS_ONE_FREE ? 0 : p.x) + r.x;
            take(i, tile, is_there ? source : any, is_there);
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

    __device__ inline SUM result(int n) const { return sum[n]; }
    __device__ static inline int across(int i, int lanes, int lane)
    {
        return i / 4 * 4 * lanes + lane * 4 + i % 4;
    }
    __device__ static inline int filter(int i)
    {
        return threadIdx.x / 32 / (TILE_P / WARP_P) * WARP_F +
               across(i, 4, threadIdx.x % 32 / 8);
    }
    __device__ static inline int position(int j)
    {
        return threadIdx.x / 32 % (TILE_P / WARP_P) * WARP_P +
               across(j, 8, threadIdx.x % 8);
    }
    __device__ static inline int row(int n) { return filter(n / P); }
    __device__ static inline int column(int n) { return position(n % P); }

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

    __device__ inline SUM result(int n) const { return sum[n / 4][n % 4]; }
    __device__ static inline int first_filter()
    {
        return threadIdx.x / 32 / (TILE_P / WARP_P) * WARP_F;
    }
    __device__ static inline int first_position()
    {
        return threadIdx.x / 32 % (TILE_P / WARP_P) * WARP_P;
    }
    __device__ static inline int row(int n)
    {
        return first_filter() + n / 4 / P * 16 + threadIdx.x % 32 / 4 + n % 4 / 2 * 8;
    }
    __device__ static inline int column(int n)
    {
        return first_position() + n / 4 % P * 8 + threadIdx.x % 4 * 2 + n % 2;
    }

    __device__ inline void multiply(const ELEMENT *dense, const ELEMENT *x)
    {
#pragma unroll
        for (int r = 0; r < TILE_R; r += STEP) {
            unsigned b[P][2];
#pragma unroll
            for (int j = 0; j < P; j += 2)
                load_columns(b[j], b[j + 1], x, first_position() + j * 8, r, ELEMENT());
#pragma unroll
            for (int i = 0; i < F; ++i) {
                unsigned a[4];
                load_rows(a, dense, first_filter() + i * 16, r, ELEMENT());
#pragma unroll
                for (int j = 0; j < P; ++j)
                    multiply_matrices(ELEMENT(), a, b[j], sum[i * P + j]);
            }
        }
    }

    // 16 filters × 16 terms of halves, as four matrices: the lower 8 filters second.
    template <class H>
    __device__ static inline void load_rows(
        unsigned (&a)[4], const ELEMENT *dense, int filter, int r, H)
    {
        const int lane = threadIdx.x % 32, half = lane / 8 % 2, other = lane / 16;
        const bool along = DenseTile::IS_ALONG_R;
        const int f = filter + half * 8 + (along ? lane % 8 : 0);
        const int t = r + other * 8 + (along ? 0 : lane % 8);
        load_matrices<!along>(a, dense + DenseTile::cell(f, t));
    }

    // 16 terms × 16 positions: two pairs of matrices.
    template <class H>
    __device__ static inline void load_columns(
        unsigned (&left)[2], unsigned (&right)[2], const ELEMENT *x, int position, int r, H)
    {
        const int lane = threadIdx.x % 32, half = lane / 8 % 2, other = lane / 16;
        const bool along = XTile::IS_ALONG_R;
        const int p = position + other * 8 + (along ? lane % 8 : 0);
        const int t = r + half * 8 + (along ? 0 : lane % 8);
        unsigned four[4];
        load_matrices<!along>(four, x + XTile::cell(p, t));
        left[0] = four[0], left[1] = four[1], right[0] = four[2], right[1] = four[3];
    }

    __device__ static inline void load_rows(
        unsigned (&a)[4], const float *dense, int filter, int r, float)
    {
        const int f = filter + threadIdx.x % 32 / 4, t = r + threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < 4; ++i)
            a[i] = as_tf32(dense[DenseTile::cell(f + i % 2 * 8, t + i / 2 * 4)]);
    }

    __device__ static inline void load_columns(
        unsigned (&left)[2], unsigned (&right)[2], const float *x, int position, int r,
        float)
    {
        const int p = position + threadIdx.x % 32 / 4, t = r + threadIdx.x % 4;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            left[i] = as_tf32(x[XTile::cell(p, t + i * 4)]);
            right[i] = as_tf32(x[XTile::cell(p + 8, t + i * 4)]);
        }
    }
};

#endif

// Results pass through shared memory, so that writes are coalesced.
const int RESULT_PITCH = TILE_P + 1;
const int ROWS_THAT_FIT = TILE_BYTES / (RESULT_PITCH * (int)sizeof(SUM));
const int ROWS_AT_ONCE = ROWS_THAT_FIT >= TILE_F      ? TILE_F
                         : ROWS_THAT_FIT >= TILE_F / 2 ? TILE_F / 2
                         : ROWS_THAT_FIT >= TILE_F / 4 ? TILE_F / 4
                                                       : TILE_F / 8;
static_assert(ROWS_AT_ONCE <= ROWS_THAT_FIT, "a slice of results is too large");

__device__ inline void write_results(
    const Core &core, SUM *stage, const Place *places, const ELEMENT *bias,
    RESULT *out, long long first, long long columns, const Contraction &c)
{
    for (int base = 0; base < TILE_F; base += ROWS_AT_ONCE) {
        __syncthreads();
#pragma unroll
        for (int n = 0; n < Core::COUNT; ++n) {
            const int row = Core::row(n) - base;
            if (row >= 0 && row < ROWS_AT_ONCE)
                stage[row * RESULT_PITCH + Core::column(n)] = core.result(n);
        }
        __syncthreads();
        for (int i = threadIdx.x; i < ROWS_AT_ONCE * TILE_P; i += THREADS) {
            const int row = c.along_filters ? i % ROWS_AT_ONCE : i / TILE_P;
            const int column = c.along_filters ? i / ROWS_AT_ONCE : i % TILE_P;
            const long long f = first + base + row;
            if (f >= c.filters || column >= columns) continue;
            SUM sum = stage[row * RESULT_PITCH + column];
            if (bias) add_to(sum, (SUM)widen(bias[f * c.bias_step]));
            out[f * c.out_step + places[column].own] = Stored<RESULT>::of(sum);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) implicit_gemm(
    const ELEMENT *__restrict__ dense, const ELEMENT *__restrict__ x,
    const ELEMENT *__restrict__ bias, RESULT *__restrict__ out, const Contraction c)
{
    SHARED_MEMORY(memory);
    ELEMENT *const tiles = (ELEMENT *)memory;
    Place *const ring = (Place *)(memory + TILE_BYTES);
    Place *const places = ring + 2 * TILE_R;
    Digits *const digits = (Digits *)(places + TILE_P);

    // Blocks of neighbouring filters run at the same time: they gather the same places.
    const unsigned tile_f = blockIdx.x % c.tiles_f, outer = blockIdx.x / c.tiles_f;
    const unsigned tile_p = outer % c.tiles_p, both = outer / c.tiles_p;
    const int group = (int)(both % c.groups), part = (int)(both / c.groups);
    const long long first_p = (long long)tile_p * TILE_P;
    const int first_f = (int)tile_f * TILE_F;
    const long long start = part * c.part_length;
    const long long rest = c.r.count - start;
    const long long length = rest < c.part_length ? rest : c.part_length;
    const int steps = (int)((length + TILE_R - 1) / TILE_R);

    for (int i = threadIdx.x; i < TILE_P; i += THREADS) {
        const bool is_there = first_p + i < c.p.count;
        const Digits p = digits_of(is_there ? first_p + i : 0, c.p);
        places[i] = place_of(p, is_there, c.p);
    }
    if (threadIdx.x < TILE_R) digits[threadIdx.x] = digits_of(start + threadIdx.x, c.r);
    // The ring is filled by its own threads, one tile ahead.
    const auto fill = [&](int step) {
        if (threadIdx.x >= TILE_R) return;
        const bool is_there = (long long)step * TILE_R + threadIdx.x < length;
        Digits d = digits[threadIdx.x];
        ring[step % 2 * TILE_R + threadIdx.x] = place_of(d, is_there, c.r);
        advance(d, c.r);
        digits[threadIdx.x] = d;
    };
    fill(0);
    __syncthreads();

    WeightLoader weights;
    InputLoader inputs;
    weights.begin(dense + group * c.dense_group, first_f, c);
    inputs.begin(x + group * c.x_group, places);
    const auto load = [&](int step) {
        const Place *terms = ring + step % 2 * TILE_R;
        ELEMENT *to = tiles + step % STAGES * STAGE_CELLS;
        if (step < steps) {
            weights.load(terms, dense, to, c);
            inputs.load(terms, places, x, to + DenseTile::CELLS, c);
        }
        end_group();
    };
    const auto settle = [&](int step) {
        if (step >= steps) return;
        ELEMENT *to = tiles + step % STAGES * STAGE_CELLS;
        weights.settle(to);
        inputs.settle(to + DenseTile::CELLS);
    };
    for (int step = 0; step < STAGES - 1; ++step) {
        load(step);
        settle(step);
        fill(step + 1);
        __syncthreads();
    }

    Core core = {};
    for (int step = 0; step < steps; ++step) {
        wait_for_copies<STAGES - 2>();
        __syncthreads();
        load(step + STAGES - 1);
        const ELEMENT *from = tiles + step % STAGES * STAGE_CELLS;
        core.multiply(from, from + DenseTile::CELLS);
        settle(step + STAGES - 1);
        fill(step + STAGES);
    }
    wait_for_copies<0>();
    const bool adds_bias = c.has_bias && part == 0;
    write_results(
        core, (SUM *)memory, places,
        adds_bias ? bias + (long long)group * c.filters * c.bias_step : nullptr,
        out + group * c.out_group + part * c.part_step, first_f,
        c.p.count - first_p, c);
}
