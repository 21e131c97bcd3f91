// db (+)= sum of dy over its rows, in two stages (src/ops/linear): biases of linear layers and of convolutions, whose rows are pixels.
//
//   dy        T   [R, C]
//   partials  f32 [gridDim.x, C] =
//   bias      f32 [C] =, or added to
//
// The order of additions depends on R, C and the grid alone. Where C is a multiple of a pack a thread has 16 bytes of a row, else one
// channel. Grid (pieces of rows, ceil(C / channels of a block)). Moves R C sizeof T bytes, 8 C for each piece.

#include "pack.cuh"

namespace {

/// Neighbours along the channels share a row, neighbours along y a channel.
constexpr int COLUMNS = 32, ROWS = 8, THREADS = COLUMNS * ROWS;

template <class T, int WIDTH>
__device__ __forceinline__ void partial(const T *dy, float *partials, uint32_t rows, uint32_t channels) {
    SHARED(float, shared, ROWS * COLUMNS * Pack<T>::SIZE);
    const uint32_t column = threadIdx.x % COLUMNS, lane = threadIdx.x / COLUMNS;
    const uint32_t first = (blockIdx.y * COLUMNS + column) * WIDTH;
    const uint32_t each = (rows + gridDim.x - 1) / gridDim.x;
    const uint32_t begin = blockIdx.x * each, end = begin + each < rows ? begin + each : rows;
    float sums[WIDTH] = {};
    if (first < channels) {
#pragma unroll 4
        for (uint32_t row = begin + lane; row < end; row += ROWS) {
            const T *from = dy + static_cast<size_t>(row) * channels + first;
            if constexpr (WIDTH == 1) {
                sums[0] += widened(*from);
            } else {
                const Pack<T> pack = Pack<T>::load(from);
#pragma unroll
                for (int i = 0; i < WIDTH; i++)
                    sums[i] += pack.values[i];
            }
        }
    }
    // A channel's sums stand in one column of the array.
#pragma unroll
    for (int i = 0; i < WIDTH; i++)
        shared[(lane * WIDTH + i) * COLUMNS + column] = sums[i];
    __syncthreads();
    for (int i = lane; i < WIDTH; i += ROWS) {
        float sum = shared[i * COLUMNS + column];
#pragma unroll
        for (int other = 1; other < ROWS; other++)
            sum += shared[(other * WIDTH + i) * COLUMNS + column];
        if (first < channels)
            partials[static_cast<size_t>(blockIdx.x) * channels + first + i] = sum;
    }
}

template <class T> __device__ __forceinline__ void bias_gradient(const T *dy, float *partials, uint32_t rows, uint32_t channels) {
    if (channels % Pack<T>::SIZE == 0)
        partial<T, Pack<T>::SIZE>(dy, partials, rows, channels);
    else
        partial<T, 1>(dy, partials, rows, channels);
}

} // namespace

KERNEL(THREADS, bias_gradient_f32, const float *dy, float *partials, uint32_t rows, uint32_t channels) {
    bias_gradient(dy, partials, rows, channels);
}

KERNEL(THREADS, bias_gradient_bf16, const bf16 *dy, float *partials, uint32_t rows, uint32_t channels) {
    bias_gradient(dy, partials, rows, channels);
}

/// A warp for each channel.
KERNEL(THREADS, bias_gradient_total, const float *partials, float *bias, uint32_t pieces, uint32_t channels, uint32_t adds) {
    const uint32_t channel = blockIdx.x * (THREADS / 32) + threadIdx.x / 32, lane = threadIdx.x % 32;
    float sum = 0.0f;
    for (uint32_t piece = lane; channel < channels && piece < pieces; piece += 32)
        sum += partials[static_cast<size_t>(piece) * channels + channel];
#pragma unroll
    for (int bits = 16; bits > 0; bits /= 2)
        sum += __shfl_xor_sync(~0u, sum, bits);
    if (channel < channels && lane == 0)
        bias[channel] = adds ? bias[channel] + sum : sum;
}
