// Instructions of the tensor cores (sm_80 and later), a function each. Where the host's compiler builds the file for tests each has a twin in
// plain C++, which takes all 32 lanes of a warp.
#pragma once

#include "pack.cuh"

namespace mma {

#ifdef __CUDACC__

__device__ __forceinline__ uint32_t shared_address(const void *address) { return static_cast<uint32_t>(__cvta_generic_to_shared(address)); }

/// c += a b: a is 16 x 16, b 16 x 8, c 16 x 8. With g = lane / 4 and t = 2 (lane % 4), a lane has of a (g, t), (g + 8, t), (g, t + 8),
/// (g + 8, t + 8), each with its right neighbour; of b (t, g), (t + 8, g), each with the one below; of c (g, t), (g, t + 1), (g + 8, t),
/// (g + 8, t + 1).
__device__ __forceinline__ void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t *b) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

/// Matrices of 8 x 8 from shared memory: lane 8 i + r gives the address of row r of matrix i, 16 bytes that 16 divides. A lane gets of each
/// (lane / 4, 2 (lane % 4)) and its right neighbour.
__device__ __forceinline__ void load(uint32_t (&to)[4], const bf16 *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

/// Two of them; the addresses of lanes 0 to 15 count.
__device__ __forceinline__ void load(uint32_t (&to)[2], const bf16 *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(to[0]), "=r"(to[1]) : "r"(shared_address(row)) : "memory");
}

/// Four of them, transposed: a lane gets (2 (lane % 4), lane / 4) and the one below.
__device__ __forceinline__ void load_transposed(uint32_t (&to)[4], const bf16 *row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(shared_address(row))
                 : "memory");
}

/// Two numbers rounded to bf16, `low` in the lower half.
__device__ __forceinline__ uint32_t pair(float low, float high) {
    uint32_t both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}

#else

inline float element(const uint32_t *pairs, int i) { return std::bit_cast<float>(pairs[i / 2] >> i % 2 * 16 << 16); }

inline void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t *b) {
    struct Lane {
        float *c;
        const uint32_t *a, *b;
    } lane{c, a, b};
    sim::as_one(sim::Together::MultiplyMatrices, sim::as_word(&lane), [](const std::array<uint64_t, sim::WARP> &lanes) {
        float left[16][16], right[8][16];
        for (int l = 0; l < 32; l++) {
            const Lane &of = *sim::of_word<const Lane *>(lanes[l]);
            for (int i = 0; i < 8; i++)
                left[l / 4 + i / 2 % 2 * 8][l % 4 * 2 + i % 2 + i / 4 * 8] = element(of.a, i);
            for (int i = 0; i < 4; i++)
                right[l / 4][l % 4 * 2 + i % 2 + i / 2 * 8] = element(of.b, i);
        }
        for (int l = 0; l < 32; l++) {
            for (int i = 0; i < 4; i++) {
                const float *row = left[l / 4 + i / 2 * 8], *column = right[l % 4 * 2 + i % 2];
                float sum = sim::of_word<const Lane *>(lanes[l])->c[i];
                for (int k = 0; k < 16; k++)
                    sum += row[k] * column[k];
                sim::of_word<const Lane *>(lanes[l])->c[i] = sum;
            }
        }
    });
}

/// What a lane gives to ldmatrix and gets.
struct Matrices {
    uint32_t *to;
    const uint16_t *row;
};

/// `COUNT` matrices.
template <int COUNT, bool IS_TRANSPOSED> void load_matrices(uint32_t *to, const bf16 *row) {
    if (sim::lane() < 8 * COUNT)
        sim::must_be_shared(row, 16, 16);
    Matrices lane{to, reinterpret_cast<const uint16_t *>(row)};
    sim::as_one(sim::Together::LoadMatrices, sim::as_word(&lane), [](const std::array<uint64_t, sim::WARP> &lanes) {
        auto of = [&](int lane) { return *sim::of_word<const Matrices *>(lanes[lane]); };
        for (int l = 0; l < 32; l++)
            for (int i = 0; i < COUNT; i++) {
                auto at = [&](int r, int c) { return uint32_t(IS_TRANSPOSED ? of(8 * i + c).row[r] : of(8 * i + r).row[c]); };
                of(l).to[i] = at(l / 4, l % 4 * 2) | at(l / 4, l % 4 * 2 + 1) << 16;
            }
    });
}

inline void load(uint32_t (&to)[4], const bf16 *row) { load_matrices<4, false>(to, row); }
inline void load(uint32_t (&to)[2], const bf16 *row) { load_matrices<2, false>(to, row); }
inline void load_transposed(uint32_t (&to)[4], const bf16 *row) { load_matrices<4, true>(to, row); }
inline uint32_t pair(float low, float high) { return rounded<bf16>(low).bits | uint32_t(rounded<bf16>(high).bits) << 16; }

#endif

} // namespace mma
