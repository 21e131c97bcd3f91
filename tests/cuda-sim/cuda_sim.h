// The words of CUDA for the host's C++ compiler: with this header the `.cu` files of kernels/ are programs for a machine made of software.
//
// A thread is a fibre, a warp 32 of them, a block the fibres that one thread of the system runs in turn. What waits for others
// (`__syncthreads`, `__syncwarp`, shuffles, votes, what a warp does as one) gives the processor back; what CUDA leaves undefined there ends
// the program with a message.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct uint3 {
    unsigned x, y, z;
};
using dim3 = uint3;
#define CUDA_SIM_VECTOR(name, type)                                                                                                        \
    struct alignas(2 * sizeof(type)) name##2 {                                                                                             \
        type x, y;                                                                                                                         \
    };                                                                                                                                     \
    struct alignas(sizeof(type) > 4 ? 16 : 4 * sizeof(type)) name##4 {                                                                     \
        type x, y, z, w;                                                                                                                   \
    };
CUDA_SIM_VECTOR(float, float)
CUDA_SIM_VECTOR(uint, unsigned)
CUDA_SIM_VECTOR(int, int)
CUDA_SIM_VECTOR(uchar, unsigned char)
#undef CUDA_SIM_VECTOR
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

/// bfloat16: the upper half of an f32.
struct __nv_bfloat16 {
    uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 value) { return std::bit_cast<float>(uint32_t(value.bits) << 16); }
/// To the nearest, ties to even; every NaN becomes the one that hardware gives.
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
    uint32_t bits = std::bit_cast<uint32_t>(value);
    if (std::isnan(value))
        return {0x7FFF};
    return {uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short bits) { return {bits}; }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
inline float __uint2float_rn(unsigned a) { return static_cast<float>(a); }
inline float __int2float_rn(int a) { return static_cast<float>(a); }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
inline unsigned __float_as_uint(float value) { return std::bit_cast<unsigned>(value); }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }

namespace sim {

/// A result of a function whose last places hardware does not promise: as many units off as it may be, up or down as the argument has it.
/// Equal arguments give equal bits, as they do there. Zeros, infinities and what is beside them are exact.
inline float off_by(unsigned units, double exact, float argument) {
    constexpr uint32_t SMALLEST = 0x00800000, LARGEST = 0x7F7FFFFF;
    const float rounded = float(exact);
    const uint32_t bits = std::bit_cast<uint32_t>(rounded), size = bits & 0x7FFFFFFF;
    if (size < SMALLEST + units || size > LARGEST - units)
        return rounded;
    const bool is_up = std::bit_cast<uint32_t>(argument) * 0x9E3779B1u >> 31;
    return std::bit_cast<float>(is_up ? bits + units : bits - units);
}

/// ex2.approx.ftz.f32: the same as exp2f; 2^0 is 1 (PTX ISA), a subnormal result 0.
inline float exp2_approx(float x) {
    if (x == 0.0f)
        return 1.0f;
    const float result = off_by(2, std::exp2(double(x)), x);
    return result < 0x1p-126f ? 0.0f : result;
}

// Standard functions, where the compiler for GPUs has its own.
inline float exp(float x) { return x == 0.0f ? 1.0f : off_by(2, std::exp(double(x)), x); }
inline float log(float x) { return off_by(1, std::log(double(x)), x); }

} // namespace sim

// Largest errors: CUDA C++ Programming Guide, "Mathematical Functions".
inline float __expf(float x) {
    // e^x is 0 or infinite where there were more units.
    const float more = std::min(std::fabs(1.173f * x), 128.0f);
    return x == 0.0f || std::isnan(x) ? std::exp(x) : sim::off_by(2 + unsigned(more), std::exp(double(x)), x);
}
/// 0 for a divisor above 2^126.
inline float __fdividef(float a, float b) {
    return std::fabs(b) > 0x1p126f && std::isfinite(b) ? 0.0f : sim::off_by(2, double(a) / double(b), b);
}
inline float rsqrtf(float x) { return sim::off_by(2, 1.0 / std::sqrt(double(x)), x); }
/// Of pi x.
inline void sincospi(double x, double *sine, double *cosine) {
    const double angle = M_PI * std::remainder(x, 2.0);
    *sine = std::sin(angle), *cosine = std::cos(angle);
}
#define expf(x) sim::exp(x)
#define logf(x) sim::log(x)
template <class T> T __ldg(const T *p) { return *p; }

namespace sim {

/// The GPU's clock when the kernel that runs began.
inline uint64_t now = 0;
inline uint64_t nanoseconds() { return now; }

constexpr unsigned WARP = 32;
/// Shared memory of a block on an H100, A100 and later by opting in: the smallest of them.
constexpr unsigned SHARED_LIMIT = 163 << 10;

/// Ends the program with what the kernel did wrong.
[[noreturn]] void refuse(const std::string &what);

/// The coordinates of the fibre that runs.
const uint3 &thread();
const uint3 &block();
const uint3 &block_size();
const uint3 &grid_size();

/// Waits until all threads of the block are here.
void barrier();

/// What the threads of a warp do together.
enum class Together : uint8_t { Sync, Shuffle, Vote, LoadMatrices, MultiplyMatrices };
/// Gives each lane of `mask` the values of all: `mine` of lane l in place l. `detail` must be the same at all (which kind of vote, say).
const std::array<uint64_t, WARP> &exchange(Together what, unsigned mask, uint64_t mine, unsigned detail);

/// What a whole warp does as one: `act` is called once, when all 32 lanes have come, with what each has given.
void as_one(Together what, uint64_t mine, void (*act)(const std::array<uint64_t, WARP> &));

/// Begins to copy `bytes` to shared memory, `there` of them from `from` and the rest zeros. They land between now and the wait: that
/// differs from run to run.
void begin_copy(void *to, const void *from, unsigned bytes, unsigned there);
/// Makes a group of the copies that this thread has begun since the last one.
void commit_copies();
/// Waits until all but the last `left` groups of this thread have landed.
void wait_for_copies(unsigned left);
/// Refuses an address that is not shared memory of the block, or that `alignment` does not divide.
void must_be_shared(const void *address, size_t bytes, size_t alignment);

/// Memory that the block's threads share: the same for the same `tag`.
void *shared(const void *tag, size_t bytes);
/// What the launch asked for.
void *dynamic_shared();

inline unsigned lane() {
    const uint3 &t = thread(), &size = block_size();
    return ((t.z * size.y + t.y) * size.x + t.x) % WARP;
}

template <class T> uint64_t as_word(T value) {
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
    uint64_t word = 0;
    memcpy(&word, &value, sizeof value);
    return word;
}
template <class T> T of_word(uint64_t word) {
    T value;
    memcpy(&value, &word, sizeof value);
    return value;
}

template <class T> T shuffle(unsigned mask, T value, unsigned from, bool is_inside, unsigned kind) {
    const auto &all = exchange(Together::Shuffle, mask, as_word(value), kind);
    if (!is_inside)
        return value;
    if (!(mask >> from & 1))
        refuse("a shuffle that reads lane " + std::to_string(from) + ", which does not take part");
    return of_word<T>(all[from]);
}

/// An argument of a kernel as the launch gives it.
struct Argument {
    /// A buffer's address, or the value.
    std::vector<unsigned char> value;
};

/// A kernel by name, with its arguments unpacked.
struct Kernel {
    unsigned max_threads;
    /// Bytes of each argument.
    std::vector<size_t> sizes;
    /// What must divide an argument that is an address; 0 for the others.
    std::vector<unsigned> alignments;
    /// Refuses arguments of other sizes than the kernel's.
    void (*call)(const std::vector<Argument> &);
};
std::map<std::string, Kernel> &kernels();

/// A kernel's name, and what it is launched with.
struct Launch {
    std::string name;
    uint3 grid, block;
    unsigned shared;
    std::vector<Argument> arguments;
};
/// Makes a launch the one that runs; refuses what a driver would.
void prepare(const Launch &launch);
/// Runs it once, threads in ascending order.
void run_once();

template <auto function, class... A, size_t... I>
void call(const std::vector<Argument> &arguments, void (*)(A...), std::index_sequence<I...>) {
    auto take = [&]<class T>(size_t i, std::type_identity<T>) {
        if (arguments[i].value.size() != sizeof(T))
            refuse("argument " + std::to_string(i) + " has " + std::to_string(arguments[i].value.size()) + " bytes, the kernel's " +
                   std::to_string(sizeof(T)));
        T value;
        memcpy(&value, arguments[i].value.data(), sizeof value);
        return value;
    };
    function(take(I, std::type_identity<A>{})...);
}

/// Kernels access 4 bytes and less in groups of 16, and larger types one by one.
template <class A> constexpr unsigned alignment() {
    if constexpr (std::is_pointer_v<A>)
        return sizeof(std::remove_pointer_t<A>) > 4 ? 8 : 16;
    return 0;
}

template <auto function, class... A> Kernel describe(unsigned max_threads, void (*)(A...)) {
    return {max_threads, {sizeof(A)...}, {alignment<A>()...}, [](const std::vector<Argument> &arguments) {
                call<function>(arguments, static_cast<void (*)(A...)>(function), std::index_sequence_for<A...>{});
            }};
}

} // namespace sim

#define threadIdx (sim::thread())
#define blockIdx (sim::block())
#define blockDim (sim::block_size())
#define gridDim (sim::grid_size())
constexpr int warpSize = sim::WARP;

inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __syncthreads() { sim::barrier(); }
inline void __syncwarp(unsigned mask = ~0u) { sim::exchange(sim::Together::Sync, mask, 0, 0); }
template <class T> T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
    unsigned lane = sim::lane();
    return sim::shuffle(mask, value, (lane & ~(width - 1)) + (from & (width - 1)), true, 0);
}
template <class T> T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
    unsigned lane = sim::lane(), from = lane ^ bits;
    return sim::shuffle(mask, value, from, from < (lane & ~(width - 1)) + width, 1 + bits);
}
template <class T> T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
    unsigned lane = sim::lane(), from = lane + by;
    return sim::shuffle(mask, value, from, from < (lane & ~(width - 1)) + width, 64 + by);
}
template <class T> T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
    unsigned lane = sim::lane(), first = lane & ~(width - 1);
    return sim::shuffle(mask, value, lane - by, lane >= first + by, 128 + by);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    const auto &all = sim::exchange(sim::Together::Vote, mask, predicate != 0, 0);
    unsigned votes = 0;
    for (unsigned lane = 0; lane < sim::WARP; lane++)
        votes |= unsigned(mask >> lane & 1 & all[lane]) << lane;
    return votes;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
