// Element types and their sums, without a vendor header: CuPy's cache of compiled
// kernels does not see what headers contain, and NVRTC compiles this in milliseconds.
//
// Macros: ELEMENT, one of the names below; SUM, the type it is summed in.

typedef unsigned char word1_t;
typedef unsigned short word2_t;
typedef unsigned int word4_t;
typedef unsigned long long word8_t;
struct word16_t { unsigned long long low, high; };

struct boolean_t { unsigned char value; };
struct float16_t { unsigned short bits; };
struct bfloat16_t { unsigned short bits; };
typedef float float32_t;
typedef double float64_t;
struct complex64_t { float re, im; };
struct complex128_t { double re, im; };

// Signed and unsigned integers of one width are added alike, modulo 2^width.

__device__ inline float widen(float16_t h)
{
#ifdef HOST_SHIM
    return host_half_to_float(h.bits);
#else
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h.bits));
    return f;
#endif
}

__device__ inline float widen(bfloat16_t b)
{
    return __uint_as_float((unsigned)b.bits << 16);
}

template <typename T>
__device__ inline T widen(T value) { return value; }

__device__ inline void add_to(boolean_t &sum, boolean_t v) { sum.value |= v.value; }

__device__ inline void add_to(complex64_t &sum, complex64_t v)
{
    sum.re += v.re;
    sum.im += v.im;
}

__device__ inline void add_to(complex128_t &sum, complex128_t v)
{
    sum.re += v.re;
    sum.im += v.im;
}

template <typename T>
__device__ inline void add_to(T &sum, T v) { sum = (T)(sum + v); }

__device__ inline void atomic_add(word4_t *at, word4_t v) { atomicAdd(at, v); }
__device__ inline void atomic_add(word8_t *at, word8_t v) { atomicAdd(at, v); }
__device__ inline void atomic_add(float *at, float v) { atomicAdd(at, v); }
__device__ inline void atomic_add(double *at, double v) { atomicAdd(at, v); }

__device__ inline void atomic_add(complex64_t *at, complex64_t v)
{
    atomicAdd(&at->re, v.re);
    atomicAdd(&at->im, v.im);
}

__device__ inline void atomic_add(complex128_t *at, complex128_t v)
{
    atomicAdd(&at->re, v.re);
    atomicAdd(&at->im, v.im);
}
