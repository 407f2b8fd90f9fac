// cuBLAS in the loader's eyes: the functions that the library calls, over host memory.
// Calls are counted, products are computed; halves are counted alone.
#include <complex>
#include <cstdint>

namespace {
template <typename T>
const T &at(const T *m, int64_t ld, bool turned, int row, int column)
{
    return turned ? m[row * ld + column] : m[column * ld + row];
}

template <typename T>
void multiply(bool turn_a, bool turn_b, int m, int n, int k, const void *alpha,
              const void *a, int lda, long long step_a, const void *b, int ldb,
              long long step_b, const void *beta, void *c, int ldc, long long step_c,
              int batches)
{
    T scale = *(const T *)alpha, keep = *(const T *)beta;
    for (int i = 0; i < batches; i++)
        for (int column = 0; column < n; column++)
            for (int row = 0; row < m; row++) {
                T sum = 0;
                for (int t = 0; t < k; t++)
                    sum += at((const T *)a + i * step_a, lda, turn_a, row, t)
                           * at((const T *)b + i * step_b, ldb, turn_b, t, column);
                T &out = ((T *)c)[i * step_c + (int64_t)column * ldc + row];
                out = scale * sum + (keep == T(0) ? T(0) : keep * out);
            }
}
}

extern "C" {
// Handles made, streams set, products; the mode now; mode and type of the last product.
int counted[6];

intptr_t zero() { return 0; }
int cublasCreate_v2(void **handle) { *handle = counted; return counted[0]++, 0; }
int cublasDestroy_v2(void *) { return 0; }
int cublasSetStream_v2(void *, void *) { return counted[1]++, 0; }
int cublasGetMathMode(void *, int *mode) { return *mode = counted[3], 0; }
int cublasSetMathMode(void *, int mode) { return counted[3] = mode, 0; }

int cublasGemmStridedBatchedEx(
    void *, int turn_a, int turn_b, int m, int n, int k, const void *alpha,
    const void *a, int type_a, int lda, long long step_a, const void *b, int, int ldb,
    long long step_b, const void *beta, void *c, int, int ldc, long long step_c,
    int batches, int compute, int)
{
    counted[2]++, counted[4] = counted[3], counted[5] = compute;
    auto run = type_a == 0   ? multiply<float>
               : type_a == 1 ? multiply<double>
               : type_a == 4 ? multiply<std::complex<float>>
               : type_a == 5 ? multiply<std::complex<double>>
                             : nullptr;
    if (run)
        run(turn_a, turn_b, m, n, k, alpha, a, lda, step_a, b, ldb, step_b, beta, c, ldc,
            step_c, batches);
    return 0;
}
}
