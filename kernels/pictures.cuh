// Pictures, a few pixels for each thread: q_sample, the loss and p_sample.
#pragma once

#include "pack.cuh"
#include "philox.cuh"

/// Sizes of a picture, and the channels that its activations have.
struct Image {
    int height, width, channels, padded;

    __device__ __forceinline__ size_t area() const { return static_cast<size_t>(height) * width; }
};

/// Whether the picture at place `sample` of the global batch is mirrored left to right.
__device__ __forceinline__ bool mirrored(bool flip, uint64_t seed, uint32_t sample, uint32_t step) {
    return flip && rng::first_word(rng::stream(seed, rng::FLIP, 0, sample, step)) >> 31;
}

/// x_0 = (2 pixel - 255)/255: the dividend is exact, so there is one rounding.
__device__ __forceinline__ float x_0_of(uint8_t pixel) {
    return __fdiv_rn(__fadd_rn(__fmul_rn(2.0f, __uint2float_rn(pixel)), -255.0f), 255.0f);
}

/// Pixels of a thread. The normals of four pixels are those of C whole groups, C channels.
constexpr int PIXELS = 4;

/// The u8 channels of a thread's pixels from `first` on, in a picture that may be mirrored. C = 0: as many as the picture has.
///
/// Where 4 divides the width, the pixels of a thread and their mirror image lie in one row each: 4 C bytes at a multiple of 4 C bytes from
/// the picture's first, which a multiple of 4 precedes. They are read as C aligned words. Words of 16 bytes would take 16 pixels a thread,
/// and leave 8192 threads for a batch of 128 CIFAR-10 images; a warp's C accesses are to the same 128 C bytes, which the first of them
/// brings into the cache.
template <int C> struct PictureReader {
    __device__ __forceinline__ PictureReader(const uint8_t *picture, const Image &image, int first, bool is_mirrored)
        : picture(picture), image(image), first(first), is_mirrored(is_mirrored), is_in_words(C > 0 && image.width % PIXELS == 0) {
        if (!is_in_words || first >= image.height * image.width)
            return;
        const int from = source(is_mirrored ? PIXELS - 1 : 0);
#pragma unroll
        for (int k = 0; k < C; k++)
            words[k] = reinterpret_cast<const uint32_t *>(picture)[from / PIXELS * C + k];
    }

    /// Channel c of pixel `first` + i.
    __device__ __forceinline__ uint8_t at(int i, int c) const {
        if (!is_in_words)
            return picture[static_cast<size_t>(source(i)) * (C ? C : image.channels) + c];
        const uint32_t straight = byte(C * i + c), mirrored = byte(C * (PIXELS - 1 - i) + c);
        return static_cast<uint8_t>(is_mirrored ? mirrored : straight);
    }

  private:
    /// The pixel that is read for pixel `first` + i.
    __device__ __forceinline__ int source(int i) const {
        const int pixel = first + i;
        return is_mirrored ? pixel + image.width - 1 - 2 * (pixel % image.width) : pixel;
    }
    __device__ __forceinline__ uint32_t byte(int place) const { return words[C ? place / 4 : 0] >> 8 * (place % 4) & 0xFF; }

    const uint8_t *picture;
    const Image &image;
    int first;
    bool is_mirrored, is_in_words;
    uint32_t words[C ? C : 1] = {};
};

/// Whether the C channels of a pixel stand in one pack of activations with `padded` channels. C = 0: as many as a picture has.
template <class T, int C> __device__ __forceinline__ bool is_packed(int padded) {
    return C > 0 && C <= Pack<T>::SIZE && padded % Pack<T>::SIZE == 0;
}

/// Reads the channels of a pixel of activations: in one access where they are packed.
template <class T, int C> struct PixelReader {
    __device__ __forceinline__ PixelReader(const T *from, int padded) : from(from), packed(is_packed<T, C>(padded)) {
        if (packed)
            pack = Pack<T>::load(from);
    }
    __device__ __forceinline__ float operator[](int c) const { return packed ? pack.values[C ? c : 0] : widened(from[c]); }

  private:
    const T *from;
    bool packed;
    Pack<T> pack;
};

/// Writes a pixel of activations, likewise, and zeros to the channels from C on.
template <class T, int C> struct PixelWriter {
    __device__ __forceinline__ PixelWriter(T *to, int padded) : to(to), padded(padded), packed(is_packed<T, C>(padded)) {}
    __device__ __forceinline__ void set(int c, float value) {
        if (packed)
            pack.values[C ? c : 0] = value;
        else
            to[c] = rounded<T>(value);
    }
    /// To be called when all channels are set.
    __device__ __forceinline__ void finish(int channels) {
        if (!packed) {
            for (int c = channels; c < padded; c++)
                to[c] = rounded<T>(0.0f);
            return;
        }
        pack.store(to);
        for (int c = Pack<T>::SIZE; c < padded; c += Pack<T>::SIZE)
            Pack<T>{}.store(to + c);
    }

  private:
    T *to;
    int padded;
    bool packed;
    Pack<T> pack{};
};

/// The normals of a thread's pixels, asked for element by element from 0 on.
struct PixelNormals {
    __device__ __forceinline__ PixelNormals(const rng::Stream &stream, uint32_t group) : stream(stream), group(group) {}
    __device__ __forceinline__ float operator[](int element) {
        if (element % 4 == 0)
            four = rng::normals(stream, group + element / 4);
        return element % 4 == 0 ? four.x : element % 4 == 1 ? four.y : element % 4 == 2 ? four.z : four.w;
    }

  private:
    rng::Stream stream;
    uint32_t group;
    float4 four = make_float4(0, 0, 0, 0);
};

template <int C> struct KnownChannels {
    static constexpr int COUNT = C;
};

/// Calls `each` with the number of channels where it is known when compiling, else with 0.
template <class F> __device__ __forceinline__ void with_channels(int channels, F each) {
    if (channels == 1)
        each(KnownChannels<1>{});
    else if (channels == 3)
        each(KnownChannels<3>{});
    else
        each(KnownChannels<0>{});
}
