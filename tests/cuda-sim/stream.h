// What the other libraries of the machine ask of its driver, which this process has loaded.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>
#include <functional>

namespace sim {

/// A function of the driver.
template <class F> F *of_driver(const char *name) {
    void *driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    void *function = driver ? dlsym(driver, name) : nullptr;
    if (!function) {
        fprintf(stderr, "cuda-sim: the driver that is loaded has no %s\n", name);
        abort();
    }
    return reinterpret_cast<F *>(function);
}

/// Does `work` on a stream of the driver: now, or, where it captures, whenever the graph is launched. Gives whether the driver lets it.
/// What `work` refers to must be there for as long as the graph.
inline bool begin(void *stream, std::function<void()> work) {
    using Work = std::function<void()>;
    auto *begin = of_driver<int(void *, void (*)(void *), void *, void (*)(void *))>("cuda_sim_begin");
    return begin(stream, [](void *context) { (*static_cast<Work *>(context))(); }, new Work(std::move(work)),
                 [](void *context) { delete static_cast<Work *>(context); }) == 0;
}

/// Begins what `make` makes, which is asked again until it has ended: now, or, where the stream captures, whenever the graph is launched.
inline bool begin_slow(void *stream, const std::function<std::function<bool()>()> &make) {
    return of_driver<int(void *, const void *)>("cuda_sim_begin_slow")(stream, &make) == 0;
}

/// Whether a stream captures: cuStreamIsCapturing.
inline bool is_capturing(void *stream) {
    int status = 0;
    of_driver<int(void *, int *)>("cuStreamIsCapturing")(stream, &status);
    return status != 0;
}

} // namespace sim
