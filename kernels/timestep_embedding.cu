// Sines and cosines of t times each frequency (src/ops/timestep_embedding).
//
//   t            u32 [N]
//   frequencies  f64 [dim/2]
//   embedding    T   [N, dim] =: sines then cosines, or the other way round; 0 in the last column of an odd dim
//
// Angles are f64, good to 4e-13 at t = 999; one of f32 would be off by 3e-5. A thread has one frequency of one image. Moves N dim sizeof T
// bytes.

#include "pack.cuh"

namespace {

constexpr int THREADS = 128;

template <class T>
__device__ __forceinline__ void timestep_embedding(const uint32_t *t, const double *frequencies, T *embedding, uint32_t dim,
                                                   bool cosines_first) {
    const uint32_t n = blockIdx.y, i = blockIdx.x * blockDim.x + threadIdx.x, half = dim / 2;
    T *row = embedding + static_cast<size_t>(n) * dim;
    if (i < half) {
        // In halves of a turn: sin and cos keep an array on the stack, for angles far beyond any timestep's.
        constexpr double INVERSE_OF_PI = 0.31830988618379067;
        double sine, cosine;
        sincospi(double(t[n]) * frequencies[i] * INVERSE_OF_PI, &sine, &cosine);
        row[i + (cosines_first ? half : 0)] = rounded<T>(float(sine));
        row[i + (cosines_first ? 0 : half)] = rounded<T>(float(cosine));
    } else if (i == half && dim % 2 == 1) {
        row[dim - 1] = rounded<T>(0.0f);
    }
}

} // namespace

KERNEL(THREADS, timestep_embedding_f32, const uint32_t *t, const double *frequencies, float *embedding, uint32_t dim,
       uint32_t cosines_first) {
    timestep_embedding(t, frequencies, embedding, dim, cosines_first != 0);
}

KERNEL(THREADS, timestep_embedding_bf16, const uint32_t *t, const double *frequencies, bf16 *embedding, uint32_t dim,
       uint32_t cosines_first) {
    timestep_embedding(t, frequencies, embedding, dim, cosines_first != 0);
}
