// The partial sums of a product that was split along its terms, added in order.
//
//     out[i] = parts[0, i] + parts[1, i] + …
//
// Both are contiguous, in the same order of elements; neighbouring threads have
// neighbouring elements.  Each element of out is written by one thread.

#ifndef SUM
#define SUM float32_t
#define RESULT float32_t
#endif

#include "element.cuh"

extern "C" __global__ void sum_parts(
    const SUM *__restrict__ parts, RESULT *__restrict__ out, long long count,
    long long number)
{
    const long long step = (long long)gridDim.x * blockDim.x;
    for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i < count;
         i += step) {
        SUM sum = parts[i];
        for (long long part = 1; part < number; ++part)
            add_to(sum, parts[part * count + i]);
        out[i] = Stored<RESULT>::of(sum);
    }
}
