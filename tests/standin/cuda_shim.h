// Enough of CUDA C++ to run a kernel on a CPU: thread and block indices, atomics,
// intrinsics, shared memory, barriers, copies that arrive late, products by a warp.
//
// Blocks run one after another.  Threads of a block run one after another too, unless
// the kernel has barriers: then each is a fibre that runs from barrier to barrier, and a
// barrier that some threads miss is an error.  What a warp does together is a barrier of
// its 32 lanes: each leaves what it brings, and goes on when all have.
//
// A kernel whose threads race gives another result in another order: the environment
// variable CUCONV_SHIM_ORDER is a seed of it.  0, the default, takes warps and lanes as
// they are counted, and lets copies arrive when they are waited for; 1 takes them
// backwards, and lets copies arrive at once; others draw both.

#undef _FORTIFY_SOURCE  // It takes a jump to another stack for a mistake.
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <type_traits>
#include <utility>

#define HOST_SHIM 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __shared__ static
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

struct alignas(16) uint4 { unsigned x, y, z, w; };
struct ShimIndex { unsigned x, y, z; };
static ShimIndex threadIdx, blockIdx, blockDim, gridDim;

static inline unsigned __umulhi(unsigned a, unsigned b)
{
    return (unsigned)(((uint64_t)a * b) >> 32);
}

static inline float __uint_as_float(unsigned bits)
{
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

static inline unsigned __float_as_uint(float f)
{
    unsigned bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}

static inline float host_half_to_float(unsigned short bits)
{
    const unsigned sign = (unsigned)(bits & 0x8000) << 16;
    const unsigned exponent = bits >> 10 & 31, fraction = bits & 1023;
    if (exponent == 0) {
        const float small = (float)fraction * 5.9604644775390625e-8f;  // 2^-24
        return sign ? -small : small;
    }
    const unsigned wide = exponent == 31 ? 255 : exponent + 112;
    return __uint_as_float(sign | wide << 23 | fraction << 13);
}

// Rounds to the nearest, ties to even, as the conversion of a GPU does.
static inline unsigned short host_float_to_half(float f)
{
    const unsigned bits = __float_as_uint(f), size = bits & 0x7fffffff;
    const unsigned sign = bits >> 16 & 0x8000;
    if (size > 0x7f800000) return 0x7fff;
    if (size >= 0x47800000) return sign | 0x7c00;  // from 2^16 on
    if (size < 0x38800000)  // below 2^-14: a multiple of 2^-24
        return sign | (unsigned)rintf(__uint_as_float(size) * 16777216.0f);
    return sign | (size + 0xfff + (size >> 13 & 1) - 0x38000000) >> 13;
}

template <typename T>
static inline T atomicAdd(T *at, T value)
{
    const T before = *at;
    *at = before + value;
    return before;
}

namespace shim {
static unsigned char *dynamic_memory;
}

#ifdef SHIM_BARRIERS
#include <setjmp.h>
#include <ucontext.h>

namespace shim {
const unsigned STACK = 131072, WARP = 32, DEPOSIT = 32, MOST = 1024, PENDING = 256;
enum State { READY, AT_BARRIER, WITH_WARP, DONE };
struct Copy {
    void *to;
    const void *from;
    int bytes;
    bool is_there;
    unsigned group;
    bool has_arrived = false;
};
// Where a fibre, or what gives it its turn, goes on.
struct Point {
    ucontext_t context;
    jmp_buf jump;
    bool has_run;
};
struct Fibre {
    Point point;
    State state;
    unsigned exchanges;  // with its warp, so far
    unsigned group;
    unsigned pending;  // copies that nobody has waited for
    Copy copies[PENDING];
};
static Point scheduler;
static Fibre fibres[MOST];
static char *stacks;
static unsigned current;
static void (*body)();
// What the lanes of the running warp bring; two, as the first lanes may be one ahead.
alignas(16) static unsigned char deposits[2][WARP][DEPOSIT];
static unsigned long long bank_conflicts;
static unsigned long long seed;  // see CUCONV_SHIM_ORDER
static unsigned long long draws;

[[noreturn]] static void fail(const char *what)
{
    fprintf(stderr, "%s\n", what);
    abort();
}

// Some number below a bound, another one each time (splitmix64).
static unsigned drawn(unsigned bound)
{
    unsigned long long bits = (draws += 0x9e3779b97f4a7c15) ^ seed;
    bits = (bits ^ bits >> 30) * 0xbf58476d1ce4e5b9;
    bits = (bits ^ bits >> 27) * 0x94d049bb133111eb;
    return (unsigned)((bits ^ bits >> 31) >> 32) % bound;
}

// 0 … number - 1, in the order in which they have their turn.
struct Turns {
    unsigned order[MOST];
    unsigned number;
    const unsigned *begin() const { return order; }
    const unsigned *end() const { return order + number; }
};

static Turns turns(unsigned number)
{
    Turns all;
    all.number = number;
    for (unsigned i = 0; i < number; ++i) all.order[i] = seed == 1 ? number - 1 - i : i;
    for (unsigned i = number; seed > 1 && i > 1; --i)
        std::swap(all.order[i - 1], all.order[drawn(i)]);
    return all;
}

static void change(Point &from, Point &to)
{
#ifdef __SANITIZE_ADDRESS__  // which follows swapcontext from stack to stack
    swapcontext(&from.context, &to.context);
#else  // The same without two system calls for the mask of signals.
    from.has_run = true;
    if (_setjmp(from.jump)) return;
    if (to.has_run) _longjmp(to.jump, 1);
    setcontext(&to.context);
#endif
}

static void leave(State state)
{
    fibres[current].state = state;
    change(fibres[current].point, scheduler);
}

static void enter()
{
    body();
    leave(DONE);
}

static unsigned count(unsigned first, unsigned last, State state)
{
    unsigned found = 0;
    for (unsigned t = first; t < last; ++t) found += fibres[t].state == state;
    return found;
}

static void release(unsigned first, unsigned last, State state)
{
    for (unsigned t = first; t < last; ++t)
        if (fibres[t].state == state) fibres[t].state = READY;
}

// Until every lane has ended or waits for the whole block.
static void run_warp(unsigned first, unsigned last)
{
    while (count(first, last, READY)) {
        for (unsigned lane : turns(last - first)) {
            const unsigned t = first + lane;
            if (fibres[t].state != READY) continue;
            current = t;
            threadIdx.x = t;
            change(scheduler, fibres[t].point);
        }
        const unsigned together = count(first, last, WITH_WARP);
        if (together && together != WARP)
            fail("a warp's instruction was reached by some lanes only");
        release(first, last, WITH_WARP);
    }
}

static void run_block(unsigned threads, void (*kernel)())
{
    body = kernel;
    for (unsigned t = 0; t < threads; ++t) {
        Fibre &fibre = fibres[t];
        ucontext_t &context = fibre.point.context;
        getcontext(&context);
        context.uc_stack.ss_sp = stacks + (size_t)t * STACK;
        context.uc_stack.ss_size = STACK;
        context.uc_link = &scheduler.context;
        fibre.point.has_run = false;
        fibre.state = READY;
        fibre.exchanges = fibre.group = fibre.pending = 0;
        makecontext(&context, enter, 0);
    }
    while (count(0, threads, DONE) < threads) {
        for (unsigned warp : turns((threads + WARP - 1) / WARP)) {
            const unsigned first = warp * WARP;
            run_warp(first, first + WARP < threads ? first + WARP : threads);
        }
        if (count(0, threads, DONE) && count(0, threads, AT_BARRIER))
            fail("a barrier was reached by some threads only");
        release(0, threads, AT_BARRIER);
    }
    for (unsigned t = 0; t < threads; ++t)
        if (fibres[t].pending) fail("a copy was never waited for");
}

// Every lane brings a value; afterwards all can be read.
template <typename Value>
static const unsigned char (*exchange(const Value &mine))[DEPOSIT]
{
    static_assert(sizeof(Value) <= DEPOSIT, "a lane brings too much");
    const unsigned which = fibres[current].exchanges++ % 2;
    memcpy(deposits[which][current % WARP], &mine, sizeof mine);
    leave(WITH_WARP);
    return deposits[which];
}

template <typename Value>
static Value brought(const unsigned char (*all)[DEPOSIT], unsigned lane)
{
    Value value;
    memcpy(&value, all[lane], sizeof value);
    return value;
}

static void arrive(const Copy &copy)
{
    if (copy.is_there)
        memcpy(copy.to, copy.from, copy.bytes);
    else
        memset(copy.to, 0, copy.bytes);
}

// Copies are made when they are waited for, or at once.
static void copy_later(void *to, const void *from, int bytes, bool is_there)
{
    if ((uintptr_t)to % bytes || (is_there && (uintptr_t)from % bytes))
        fail("a copy is not aligned");
    Fibre &mine = fibres[current];
    if (mine.pending == PENDING) fail("too many copies wait");
    Copy &copy = mine.copies[mine.pending++];
    copy = {to, from, bytes, is_there, mine.group};
    // What arrives early arrives once: it must find its place free, and stay there.
    if (seed == 1 || (seed > 1 && drawn(2))) {
        arrive(copy);
        copy.has_arrived = true;
    }
}

static void end_group() { ++fibres[current].group; }

static void wait_for_copies(unsigned groups)
{
    Fibre &mine = fibres[current];
    const unsigned pending = mine.pending;
    mine.pending = 0;
    for (unsigned i = 0; i < pending; ++i) {
        const Copy copy = mine.copies[i];
        if (copy.group + groups >= mine.group)
            mine.copies[mine.pending++] = copy;
        else if (!copy.has_arrived)
            arrive(copy);
    }
}

static void count_conflicts(const unsigned char (*all)[DEPOSIT])
{
    if (current % WARP) return;
    for (unsigned matrix = 0; matrix < 4; ++matrix) {
        unsigned banks = 0;
        for (unsigned row = 0; row < 8; ++row) {
            const uintptr_t at = brought<uintptr_t>(all, matrix * 8 + row);
            if (at % 16) fail("a row of a matrix is not aligned");
            bank_conflicts += banks >> at / 16 % 8 & 1;
            banks |= 1u << at / 16 % 8;
        }
    }
}

static void load_matrices(unsigned (&into)[4], const void *row, bool transposed)
{
    const auto all = exchange((uintptr_t)row);
    const unsigned lane = current % WARP;
    count_conflicts(all);
    for (unsigned matrix = 0; matrix < 4; ++matrix) {
        unsigned short pair[2];
        for (unsigned i = 0; i < 2; ++i) {
            const unsigned across = lane % 4 * 2 + i, down = lane / 4;
            const unsigned r = transposed ? across : down, c = transposed ? down : across;
            const uintptr_t from = brought<uintptr_t>(all, matrix * 8 + r);
            pair[i] = ((const unsigned short *)from)[c];
        }
        into[matrix] = pair[0] | (unsigned)pair[1] << 16;
    }
}

// One term of a fragment: register and place in it, by the type of the terms.
template <typename Type>
static float term_of(const unsigned *registers, unsigned index, unsigned pair)
{
    if constexpr (sizeof(Type) == 4) {
        return __uint_as_float(registers[index] & 0xFFFFE000);
    } else {
        Type half;
        half.bits = (unsigned short)(registers[index] >> 16 * pair);
        return widen(half);
    }
}

struct Fragments { unsigned a[4], b[2]; };

template <typename Type>
static void multiply_matrices(
    const unsigned (&a)[4], const unsigned (&b)[2], float (&c)[4])
{
    Fragments mine;
    memcpy(mine.a, a, sizeof a);
    memcpy(mine.b, b, sizeof b);
    const auto all = exchange(mine);
    const unsigned lane = current % WARP, packed = sizeof(Type) == 4 ? 1 : 2;
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        for (unsigned k = 0; k < 8 * packed; ++k) {
            const unsigned lane_k = k % (4 * packed) / packed, high = k / (4 * packed);
            const Fragments left = brought<Fragments>(all, row % 8 * 4 + lane_k);
            const Fragments right = brought<Fragments>(all, column * 4 + lane_k);
            c[i] += term_of<Type>(left.a, row / 8 + 2 * high, k % packed) *
                    term_of<Type>(right.b, high, k % packed);
        }
    }
}
}  // namespace shim

extern "C" unsigned long long shim_bank_conflicts()
{
    const unsigned long long found = shim::bank_conflicts;
    shim::bank_conflicts = 0;
    return found;
}

static inline void __syncthreads() { shim::leave(shim::AT_BARRIER); }
#endif

namespace shim {
template <typename... Arguments, size_t... I>
void call(void (*kernel)(Arguments...), void **arguments, std::index_sequence<I...>)
{
    kernel(*(std::remove_cv_t<Arguments> *)arguments[I]...);
}

template <typename... Arguments>
void launch(
    void (*kernel)(Arguments...), unsigned grid, unsigned block, unsigned shared,
    void **arguments)
{
    void *allocated = nullptr;
    if (shared && posix_memalign(&allocated, 1024, shared)) abort();
    dynamic_memory = (unsigned char *)allocated;
    gridDim = {grid, 1, 1};
    blockDim = {block, 1, 1};
#ifdef SHIM_BARRIERS
    static void (*called)(Arguments...);
    static void **with;
    called = kernel;
    with = arguments;
    const char *order = getenv("CUCONV_SHIM_ORDER");
    seed = order ? strtoull(order, nullptr, 10) : 0;
    draws = 0;
    stacks = (char *)malloc((size_t)block * STACK);
#endif
    for (unsigned b = 0; b < grid; ++b) {
        blockIdx = {b, 0, 0};
        if (shared) memset(dynamic_memory, 0xFF, shared);  // no block finds another's
#ifdef SHIM_BARRIERS
        run_block(block, [] { call(called, with, std::index_sequence_for<Arguments...>()); });
#else
        for (unsigned t = 0; t < block; ++t) {
            threadIdx = {t, 0, 0};
            call(kernel, arguments, std::index_sequence_for<Arguments...>());
        }
#endif
    }
#ifdef SHIM_BARRIERS
    free(stacks);
#endif
    free(allocated);
}
}  // namespace shim
