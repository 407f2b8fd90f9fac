// Element types and their sums, without a vendor header: CuPy's cache of compiled
// kernels does not see what headers contain, and NVRTC compiles this in milliseconds.
//
// Macros: ELEMENT, one of the names below; SUM, the type it is summed in.

typedef unsigned char word1_t;
typedef unsigned short word2_t;
typedef unsigned int word4_t;
typedef unsigned long long word8_t;
struct word16_t { unsigned long long low, high; };
struct alignas(16) quadword_t { unsigned int part[4]; };  // copied by one instruction

struct boolean_t { unsigned char value; };
struct float16_t { unsigned short bits; };
struct bfloat16_t { unsigned short bits; };
typedef float float32_t;
typedef double float64_t;
struct complex64_t { float re, im; };
struct complex128_t { double re, im; };

// Signed and unsigned integers of one width are added the same way, modulo 2^width.

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

// A sum as it is stored: halves are rounded to the nearest, ties to even.
template <typename T>
struct Stored {
    __device__ static inline T of(T sum) { return sum; }
};

template <>
struct Stored<float16_t> {
    __device__ static inline float16_t of(float sum)
    {
        float16_t h;
#ifdef HOST_SHIM
        h.bits = host_float_to_half(sum);
#else
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(sum));
#endif
        return h;
    }
};

template <>
struct Stored<bfloat16_t> {
    __device__ static inline bfloat16_t of(float sum)
    {
        // By its bits: the instruction came with sm_80.
        const unsigned bits = __float_as_uint(sum);
        const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
        const unsigned rounded = bits + 0x7fffu + (bits >> 16 & 1u);
        bfloat16_t b = {(unsigned short)(is_nan ? 0x7fffu : rounded >> 16)};
        return b;
    }
};

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

__device__ inline boolean_t times(boolean_t a, boolean_t b)
{
    boolean_t both = {(unsigned char)(a.value & b.value)};
    return both;
}

__device__ inline word2_t times(word2_t a, word2_t b)
{
    // Two shorts multiply as int, and 65535 * 65535 overflows one.
    return (word2_t)((unsigned)a * b);
}

template <typename T>
__device__ inline T times(T a, T b) { return (T)(a * b); }

// sum += a * b, fused where the compiler can.
template <typename T>
__device__ inline void add_product(T &sum, T a, T b) { add_to(sum, times(a, b)); }

template <typename C>
__device__ inline void add_complex(C &sum, C a, C b)
{
    sum.re += a.re * b.re;
    sum.re -= a.im * b.im;
    sum.im += a.re * b.im;
    sum.im += a.im * b.re;
}

__device__ inline void add_product(complex64_t &sum, complex64_t a, complex64_t b)
{
    add_complex(sum, a, b);
}

__device__ inline void add_product(complex128_t &sum, complex128_t a, complex128_t b)
{
    add_complex(sum, a, b);
}

__device__ inline complex64_t conjugate(complex64_t v) { return {v.re, -v.im}; }
__device__ inline complex128_t conjugate(complex128_t v) { return {v.re, -v.im}; }

template <typename T>
__device__ inline T conjugate(T value) { return value; }

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
