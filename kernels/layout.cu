// Weights between their layouts: OHWI, as flat buffers and checkpoints have them; OIHW, as diffusers has them; and with channels padded, as
// convolutions want the first and the last layer.
//
//   transposed   y f32 [O, B, A] = x f32 [O, A, B]: OIHW to OHWI with A = I and B = H W, and back with A = H W and B = I
//   padded       y T   [R', C'] = x f32 [R, C], R' >= R, C' >= C; what is beyond is 0: R = O H W, C = I, or R = O, C = H W I
//   unpadded     y f32 [R, C] =, or added to: x T [R', C'] without what is beyond
//
// Moves every operand once. They run for two small layers a step, and when a model is read or written: a thread has one element.

#include "pack.cuh"

namespace {

constexpr int TILE = 32, LINES = 8, THREADS = 256;
static_assert(TILE * LINES == THREADS);

template <class T>
__device__ __forceinline__ void padded(const float *x, T *y, uint32_t rows, uint32_t columns, uint32_t with_rows, uint32_t with_columns) {
    const uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= uint64_t(with_rows) * with_columns)
        return;
    const uint64_t row = i / with_columns, column = i % with_columns;
    y[i] = rounded<T>(row < rows && column < columns ? x[row * columns + column] : 0.0f);
}

template <class T>
__device__ __forceinline__ void unpadded(const T *x, float *y, uint32_t rows, uint32_t columns, uint32_t with_columns, bool adds) {
    const uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= uint64_t(rows) * columns)
        return;
    const float value = widened(x[i / columns * with_columns + i % columns]);
    y[i] = adds ? __fadd_rn(y[i], value) : value;
}

} // namespace

/// Grid (tiles of B, tiles of A, O).
KERNEL(THREADS, transposed, const float *x, float *y, uint32_t a, uint32_t b) {
    // One more column: neighbours along A stand in different banks.
    SHARED(float, tile, TILE *(TILE + 1));
    const uint32_t column = threadIdx.x % TILE, line = threadIdx.x / TILE;
    const uint32_t first_a = blockIdx.y * TILE, first_b = blockIdx.x * TILE;
    const size_t image = static_cast<size_t>(blockIdx.z) * a * b;
    for (uint32_t i = line; i < TILE; i += LINES)
        if (first_a + i < a && first_b + column < b)
            tile[i * (TILE + 1) + column] = x[image + static_cast<size_t>(first_a + i) * b + first_b + column];
    __syncthreads();
    for (uint32_t i = line; i < TILE; i += LINES)
        if (first_b + i < b && first_a + column < a)
            y[image + static_cast<size_t>(first_b + i) * a + first_a + column] = tile[column * (TILE + 1) + i];
}

KERNEL(THREADS, padded_f32, const float *x, float *y, uint32_t rows, uint32_t columns, uint32_t with_rows, uint32_t with_columns) {
    padded(x, y, rows, columns, with_rows, with_columns);
}

KERNEL(THREADS, padded_bf16, const float *x, bf16 *y, uint32_t rows, uint32_t columns, uint32_t with_rows, uint32_t with_columns) {
    padded(x, y, rows, columns, with_rows, with_columns);
}

KERNEL(THREADS, unpadded_f32, const float *x, float *y, uint32_t rows, uint32_t columns, uint32_t with_columns, uint32_t adds) {
    unpadded(x, y, rows, columns, with_columns, adds != 0);
}

KERNEL(THREADS, unpadded_bf16, const bf16 *x, float *y, uint32_t rows, uint32_t columns, uint32_t with_columns, uint32_t adds) {
    unpadded(x, y, rows, columns, with_columns, adds != 0);
}
