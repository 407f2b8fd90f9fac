// Instructions without a C++ counterpart: asynchronous copies into shared memory, and
// matrix products by a warp.  The CPU shim of the tests emulates each.
//
// Fragments of mma.m16n8k16 (halves) and mma.m16n8k8 (TF32), for lane = 4 * row + pair:
// PTX ISA, "Matrix Fragments for mma".  Sums: (row, 2 pair), (row, 2 pair + 1), and the
// same 8 rows below.

#ifdef HOST_SHIM
#define COPIES_ALONE 1
#define SHARED_MEMORY(name) unsigned char *const name = shim::dynamic_memory
#else
#define COPIES_ALONE (__CUDA_ARCH__ >= 800)
#define SHARED_MEMORY(name) extern __shared__ __align__(16) unsigned char name[]
#endif

// A type of this many bytes with this alignment.
template <int BYTES, int ALIGNMENT> struct WordOf;
template <> struct WordOf<1, 1> { typedef unsigned char type; };
template <> struct WordOf<2, 2> { typedef unsigned short type; };
template <> struct WordOf<4, 4> { typedef unsigned int type; };
template <> struct WordOf<8, 8> { typedef unsigned long long type; };
template <> struct WordOf<16, 16> { typedef uint4 type; };
template <> struct WordOf<16, 8> { typedef word16_t type; };

#ifndef HOST_SHIM
__device__ inline unsigned shared_address(const void *at)
{
    return (unsigned)__cvta_generic_to_shared(at);
}
#endif

// Keep a value in a register: the compiler would compute it again in every iteration, or
// take a pointer apart.
__device__ inline unsigned kept(unsigned value)
{
#ifndef HOST_SHIM
    asm volatile("" : "+r"(value));
#endif
    return value;
}

// The same for an address in global memory.
template <class Element>
__device__ inline Element *kept(Element *value)
{
#ifndef HOST_SHIM
    asm volatile("" : "+l"(value));
    __builtin_assume(__isGlobal(value));
#endif
    return value;
}

// Copy 4, 8 or 16 bytes, or clear them, some time before `wait_for_copies`.
template <int BYTES>
__device__ inline void copy_alone(void *to, const void *from, bool is_there)
{
#if defined(HOST_SHIM)
    shim::copy_later(to, from, BYTES, is_there);
#elif COPIES_ALONE
    if (BYTES == 16)
        asm volatile("{.reg .pred p; setp.eq.u32 p, %2, 0;"
                     " cp.async.cg.shared.global [%0], [%1], 16, p;}"
                     :: "r"(shared_address(to)), "l"(from), "r"((unsigned)is_there));
    else
        asm volatile("{.reg .pred p; setp.eq.u32 p, %2, 0;"
                     " cp.async.ca.shared.global [%0], [%1], %3, p;}"
                     :: "r"(shared_address(to)), "l"(from), "r"((unsigned)is_there),
                        "n"(BYTES));
#endif
}

// The copies since the last call are one group.
__device__ inline void end_group()
{
#if defined(HOST_SHIM)
    shim::end_group();
#elif COPIES_ALONE
    asm volatile("cp.async.commit_group;");
#endif
}

// Wait until all but the last GROUPS groups of this thread have arrived.
template <int GROUPS>
__device__ inline void wait_for_copies()
{
#if defined(HOST_SHIM)
    shim::wait_for_copies(GROUPS);
#elif COPIES_ALONE
    asm volatile("cp.async.wait_group %0;" :: "n"(GROUPS));
#endif
}

// Four 8 × 8 matrices of halves; lanes 8 i … 8 i + 7 have the addresses of the i-th's
// rows.
template <bool TRANSPOSED>
__device__ inline void load_matrices(unsigned (&into)[4], const void *row)
{
#if defined(HOST_SHIM)
    shim::load_matrices(into, row, TRANSPOSED);
#else
    if (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(into[0]), "=r"(into[1]), "=r"(into[2]), "=r"(into[3])
                     : "r"(shared_address(row)));
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(into[0]), "=r"(into[1]), "=r"(into[2]), "=r"(into[3])
                     : "r"(shared_address(row)));
#endif
}

#if defined(HOST_SHIM)
#define MULTIPLY_MATRICES(words, type, a, b, c) shim::multiply_matrices<type>(a, b, c)
#else
#define MULTIPLY_MATRICES(words, type, a, b, c) \
    asm volatile(words " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
#endif

// c += a · b, by the type of the terms.
__device__ inline void multiply_matrices(
    float16_t, const unsigned (&a)[4], const unsigned (&b)[2], float (&c)[4])
{
    MULTIPLY_MATRICES(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32", float16_t, a, b, c);
}

__device__ inline void multiply_matrices(
    bfloat16_t, const unsigned (&a)[4], const unsigned (&b)[2], float (&c)[4])
{
    MULTIPLY_MATRICES(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", bfloat16_t, a, b, c);
}

__device__ inline void multiply_matrices(
    float, const unsigned (&a)[4], const unsigned (&b)[2], float (&c)[4])
{
    MULTIPLY_MATRICES(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32", float, a, b, c);
}
