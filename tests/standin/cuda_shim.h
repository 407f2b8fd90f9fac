// Enough of CUDA C++ to run a kernel on a CPU: thread and block indices, atomics,
// intrinsics, shared memory and barriers.
//
// Blocks run one after another.  Threads of a block run one after another too, unless
// the kernel has barriers: then each is a fibre that runs from barrier to barrier, and a
// barrier that some threads miss is an error.

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

#ifdef SHIM_BARRIERS
#include <ucontext.h>

namespace shim {
const unsigned STACK = 65536;
struct Fibre { ucontext_t context; bool done; };
static ucontext_t scheduler;
static Fibre *fibres;
static char *stacks;
static unsigned current;
static void (*body)();

static void enter()
{
    body();
    fibres[current].done = true;
    swapcontext(&fibres[current].context, &scheduler);
}

static void run_block(unsigned threads, void (*kernel)())
{
    body = kernel;
    for (unsigned t = 0; t < threads; ++t) {
        getcontext(&fibres[t].context);
        fibres[t].context.uc_stack.ss_sp = stacks + (size_t)t * STACK;
        fibres[t].context.uc_stack.ss_size = STACK;
        fibres[t].context.uc_link = &scheduler;
        fibres[t].done = false;
        makecontext(&fibres[t].context, enter, 0);
    }
    for (unsigned left = threads; left;) {
        unsigned ended = 0;
        for (unsigned t = 0; t < threads; ++t) {
            if (fibres[t].done) continue;
            current = t;
            threadIdx.x = t;
            swapcontext(&scheduler, &fibres[t].context);
            ended += fibres[t].done;
        }
        if (ended && ended != left) {
            fprintf(stderr, "a barrier was reached by some threads only\n");
            abort();
        }
        left -= ended;
    }
}
}  // namespace shim

static inline void __syncthreads()
{
    swapcontext(&shim::fibres[shim::current].context, &shim::scheduler);
}
#endif

namespace shim {
template <typename... Arguments, size_t... I>
void call(void (*kernel)(Arguments...), void **arguments, std::index_sequence<I...>)
{
    kernel(*(std::remove_cv_t<Arguments> *)arguments[I]...);
}

template <typename... Arguments>
void launch(void (*kernel)(Arguments...), unsigned grid, unsigned block, void **arguments)
{
    gridDim = {grid, 1, 1};
    blockDim = {block, 1, 1};
#ifdef SHIM_BARRIERS
    static void (*called)(Arguments...);
    static void **with;
    called = kernel;
    with = arguments;
    fibres = (Fibre *)malloc(block * sizeof *fibres);
    stacks = (char *)malloc((size_t)block * STACK);
#endif
    for (unsigned b = 0; b < grid; ++b) {
        blockIdx = {b, 0, 0};
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
    free(fibres);
    free(stacks);
#endif
}
}  // namespace shim
