// Convolutions in plain loops, f32, NHWC; the innermost ones run over channels, where the compiler makes vectors of them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace sim {

/// x [n, h, w, c], weights [o, r, s, c], y [n, p, q, o].
struct Convolution {
    int64_t n, h, w, c, o, r, s, p, q;
    int64_t stride[2], before[2];

    /// Calls `each` with the offsets of a pixel of y, of the pixel of x under a place of the filter, and the number of that place.
    template <class F> void for_each_tap(F each) const {
        for (int64_t image = 0; image < n; image++)
            for (int64_t row = 0; row < p; row++)
                for (int64_t column = 0; column < q; column++)
                    for (int64_t u = 0; u < r; u++)
                        for (int64_t v = 0; v < s; v++) {
                            const int64_t y = row * stride[0] + u - before[0], x = column * stride[1] + v - before[1];
                            if (y >= 0 && y < h && x >= 0 && x < w)
                                each(((image * p + row) * q + column) * o, ((image * h + y) * w + x) * c, u * s + v);
                        }
    }
};

inline std::vector<float> forward(const Convolution &a, const std::vector<float> &x, const std::vector<float> &weights) {
    // [place, c, o]: outputs are neighbours.
    std::vector<float> turned(weights.size()), y(size_t(a.n * a.p * a.q * a.o));
    const int64_t places = a.r * a.s;
    for (int64_t o = 0; o < a.o; o++)
        for (int64_t i = 0; i < places * a.c; i++)
            turned[size_t(i * a.o + o)] = weights[size_t(o * places * a.c + i)];
    a.for_each_tap([&](int64_t to, int64_t from, int64_t place) {
        for (int64_t c = 0; c < a.c; c++) {
            const float factor = x[size_t(from + c)];
            const float *row = &turned[size_t((place * a.c + c) * a.o)];
            float *sums = &y[size_t(to)];
            for (int64_t o = 0; o < a.o; o++)
                sums[o] += factor * row[o];
        }
    });
    return y;
}

inline std::vector<float> input_gradient(const Convolution &a, const std::vector<float> &weights, const std::vector<float> &dy) {
    std::vector<float> dx(size_t(a.n * a.h * a.w * a.c));
    a.for_each_tap([&](int64_t from, int64_t to, int64_t place) {
        for (int64_t o = 0; o < a.o; o++) {
            const float factor = dy[size_t(from + o)];
            const float *row = &weights[size_t((o * a.r * a.s + place) * a.c)];
            float *sums = &dx[size_t(to)];
            for (int64_t c = 0; c < a.c; c++)
                sums[c] += factor * row[c];
        }
    });
    return dx;
}

inline std::vector<float> weight_gradient(const Convolution &a, const std::vector<float> &x, const std::vector<float> &dy) {
    std::vector<float> dw(size_t(a.o * a.r * a.s * a.c));
    a.for_each_tap([&](int64_t of_y, int64_t of_x, int64_t place) {
        for (int64_t o = 0; o < a.o; o++) {
            const float factor = dy[size_t(of_y + o)];
            const float *row = &x[size_t(of_x)];
            float *sums = &dw[size_t((o * a.r * a.s + place) * a.c)];
            for (int64_t c = 0; c < a.c; c++)
                sums[c] += factor * row[c];
        }
    });
    return dw;
}

} // namespace sim
