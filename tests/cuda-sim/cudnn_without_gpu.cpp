// NVIDIA's cuDNN itself, asked about a GPU that is not here: the libcudnn.so.9 that DDPM_DIST_CUDNN names, 9.8 or newer, behind calls that
// need none. Graphs, heuristics, engines and plans are its own; where a handle would tell it the GPU, it gets an H200's properties. It
// computes nothing.

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <dlfcn.h>

namespace {

constexpr int SUCCESS = 0, NOT_SUPPORTED = 3000;
/// cudnnBackendDescriptorType_t, cudnnBackendAttributeType_t and cudnnBackendAttributeName_t
constexpr int DEVICEPROP = 38;
constexpr int CHAR = 24, DESCRIPTOR = 15;
constexpr int DEVICEPROP_JSON = 2702;
constexpr int GRAPH_HANDLE = 800, PLAN_HANDLE = 400, PLAN_DEVICEPROP = 407;
constexpr int HEURISTICS_GRAPH = 201, HEURISTICS_DEVICEPROP = 204;
constexpr int ENGINE_GRAPH = 1300, ENGINE_DEVICEPROP = 1307;

/// What cudaDeviceGetAttribute says of an H200, by the names that cuDNN has for it.
constexpr char H200[] = R"({
    "deviceName": "NVIDIA H200", "deviceVer": 900, "driverVer": 13000, "cudaDeviceId": 0, "pciDeviceId": 0, "isTccDriver": 0,
    "maxGridSize": [2147483647, 65535, 65535], "maxBlockSize": [1024, 1024, 64], "warpSize": 32, "supportCoopLaunch": 1,
    "multiProcessorCount": 132, "smCountOrigin": 0, "maxCtasPerSM": 32, "maxThreadsPerBlock": 1024, "maxThreadsPerSM": 2048,
    "regsPerBlock": 65536, "maxRegistersPerSM": 65536,
    "maxSharedMemoryPerBlock": 49152, "maxSharedMemoryPerBlockOptin": 232448, "oversizedSharedMemoryPerBlock": 0,
    "reservedSharedMemoryPerBlock": 1024, "l2CacheSize": 62914560, "totalGlobalMem": 150109880320,
    "smClockRateKHz": 1980000, "memClockRateKHz": 3201000
})";

[[noreturn]] void stop(const char *what, const char *why) {
    fprintf(stderr, "cudnn_without_gpu: %s: %s\n", what, why);
    abort();
}

void *real() {
    static void *library = [] {
        const char *file = getenv("DDPM_DIST_CUDNN");
        void *found = file ? dlopen(file, RTLD_NOW | RTLD_LOCAL) : nullptr;
        return found ? found : (stop("DDPM_DIST_CUDNN", file ? dlerror() : "it is not set"), nullptr);
    }();
    return library;
}

/// A call of the real library.
template <typename Call> Call *of_real(const char *name) {
    auto *call = reinterpret_cast<Call *>(dlsym(real(), name));
    return call ? call : (stop(name, "cuDNN has no such call"), nullptr);
}

using SetAttribute = int(void *, int, int, int64_t, const void *);

int set(void *descriptor, int name, int type, int64_t count, const void *values) {
    static auto *call = of_real<SetAttribute>("cudnnBackendSetAttribute");
    return call(descriptor, name, type, count, values);
}

/// The GPU, for a descriptor that is made for one.
int set_gpu(void *descriptor, int name) {
    static void *gpu = [] {
        void *made = nullptr;
        int status = of_real<int(int, void **)>("cudnnBackendCreateDescriptor")(DEVICEPROP, &made);
        if (!status)
            status = set(made, DEVICEPROP_JSON, CHAR, sizeof H200 - 1, H200);
        if (!status)
            status = of_real<int(void *)>("cudnnBackendFinalize")(made);
        if (status)
            stop("the properties of a GPU", of_real<const char *(int)>("cudnnGetErrorString")(status));
        return made;
    }();
    return set(descriptor, name, DESCRIPTOR, 1, &gpu);
}

} // namespace

extern "C" {

size_t cudnnGetVersion() { return of_real<size_t()>("cudnnGetVersion")(); }

const char *cudnnGetErrorString(int status) { return of_real<const char *(int)>("cudnnGetErrorString")(status); }

void cudnnGetLastErrorString(char *text, size_t size) {
    of_real<void(char *, size_t)>("cudnnGetLastErrorString")(text, size);
}

int cudnnCreate(void **handle) {
    static int nothing;
    *handle = &nothing;
    return SUCCESS;
}

int cudnnDestroy(void *) { return SUCCESS; }

int cudnnSetStream(void *, void *) { return SUCCESS; }

int cudnnBackendCreateDescriptor(int kind, void **descriptor) {
    return of_real<int(int, void **)>("cudnnBackendCreateDescriptor")(kind, descriptor);
}

int cudnnBackendDestroyDescriptor(void *descriptor) {
    return of_real<int(void *)>("cudnnBackendDestroyDescriptor")(descriptor);
}

int cudnnBackendSetAttribute(void *descriptor, int name, int type, int64_t count, const void *values) {
    if (name == GRAPH_HANDLE)
        return SUCCESS;
    if (name == PLAN_HANDLE)
        return set_gpu(descriptor, PLAN_DEVICEPROP);
    int status = set(descriptor, name, type, count, values);
    if (!status && name == HEURISTICS_GRAPH)
        status = set_gpu(descriptor, HEURISTICS_DEVICEPROP);
    if (!status && name == ENGINE_GRAPH)
        status = set_gpu(descriptor, ENGINE_DEVICEPROP);
    return status;
}

int cudnnBackendGetAttribute(void *descriptor, int name, int type, int64_t room, int64_t *count, void *values) {
    static auto *call = of_real<int(void *, int, int, int64_t, int64_t *, void *)>("cudnnBackendGetAttribute");
    return call(descriptor, name, type, room, count, values);
}

int cudnnBackendFinalize(void *descriptor) { return of_real<int(void *)>("cudnnBackendFinalize")(descriptor); }

int cudnnBackendExecute(void *, void *, void *) { return NOT_SUPPORTED; }
}
