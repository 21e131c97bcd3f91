// libcuda.so.1 of the machine made of software: the calls of the driver that this project makes. Memory of the device is the host's, and all
// that is begun has ended when the call returns, unless its stream captures or the machine is busy (capture.h). A call that a real driver
// refuses is refused, with the rule beside it.

#include "capture.h"
#include "cuda_sim.h"
#include "fault.h"

#include <chrono>
#include <cstdlib>
#include <deque>
#include <functional>
#include <memory>
#include <set>
#include <thread>

namespace {

/// CUresult
enum Result {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600
};

/// What this machine is: an A100, or what the environment says.
struct Card {
    /// Of the compute capability.
    int major = 8, minor = 0;
    /// Bytes that a block can have by opting in.
    int shared = sim::SHARED_LIMIT;

    Card() {
        const char *said = getenv("CUDA_SIM_CARD");
        if (said && sscanf(said, "%d.%d %d", &major, &minor, &shared) != 3) {
            fprintf(stderr, "CUDA_SIM_CARD=%s: expected, for example, 8.6 101376\n", said);
            abort();
        }
    }
};
const Card card;

/// How many there are: one, or what the environment says.
int gpus() {
    const char *said = getenv("CUDA_SIM_GPUS");
    return said ? atoi(said) : 1;
}

bool is_initialised = false;
int context_of_device;
/// References to it.
int retained = 0;
thread_local void *current_context = nullptr;
/// With their sizes.
std::map<uint64_t, size_t> allocations;
/// Memory of the host that is page-locked, likewise.
std::map<uint64_t, size_t> locked;

/// Bytes that a card has: as many as an H200, or what the environment says.
size_t all_memory() {
    const char *said = getenv("CUDA_SIM_MEMORY");
    return said ? strtoull(said, nullptr, 10) : size_t(141) << 30;
}
size_t free_memory() {
    size_t taken = 0;
    for (const auto &[address, bytes] : allocations)
        taken += bytes;
    return all_memory() - taken;
}

bool is_in(const std::map<uint64_t, size_t> &memories, uint64_t address, size_t bytes) {
    auto next = memories.upper_bound(address);
    if (next == memories.begin())
        return false;
    const auto &[begin, size] = *std::prev(next);
    return address + bytes <= begin + size;
}
std::chrono::steady_clock::time_point start = std::chrono::steady_clock::now();

/// By which the GPU's clock is ahead of the host's: what took long there without anybody's waiting for it.
std::chrono::milliseconds ahead{0};

/// A place in a stream that an event was recorded at.
struct Moment {
    /// Whether what is before it has ended; an event that was never recorded has.
    bool is_over = true;
    std::chrono::steady_clock::time_point time = start;
    /// By the stream's clock.
    uint64_t clock = 0;
};
struct Event {
    /// Without CU_EVENT_DISABLE_TIMING.
    bool has_time;
    bool is_recorded = false;
    std::shared_ptr<Moment> last = std::make_shared<Moment>();
    sim::Mark mark = {};
};

/// Waits as a host does.
void wait_until(auto is_over) {
    for (sim::go_on(); !is_over(); sim::go_on())
        std::this_thread::sleep_for(std::chrono::microseconds(100));
}

/// A function, and the dynamic shared memory it may have: 48 KB unless it is given more (cuFuncSetAttribute).
struct Function {
    std::string name;
    const sim::Kernel *kernel;
    int dynamic = 48 << 10;
};
std::map<std::string, Function> functions;

/// Every call but the first few needs a context on its thread, and none does anything any more where that is lost.
int with_context(auto call) {
    if (!current_context)
        return INVALID_CONTEXT;
    return sim::lost ? sim::lost : call();
}

/// The same for what happens at once, which may not be while this thread captures.
int at_once(auto call) {
    return with_context([&]() -> int {
        const int refused = sim::is_safe();
        return refused ? refused : call();
    });
}

} // namespace

extern "C" {
int cuInit(unsigned flags) {
    is_initialised = true;
    return flags == 0 ? SUCCESS : INVALID_VALUE;
}
int cuDriverGetVersion(int *version) {
    const char *said = getenv("CUDA_SIM_DRIVER");
    *version = said ? atoi(said) : 13000;
    return SUCCESS;
}
int cuDeviceGetCount(int *count) {
    *count = gpus();
    return is_initialised ? SUCCESS : NOT_INITIALIZED;
}
int cuDeviceGet(int *device, int ordinal) {
    if (!is_initialised)
        return NOT_INITIALIZED;
    *device = ordinal;
    return ordinal >= 0 && ordinal < gpus() ? SUCCESS : INVALID_DEVICE;
}
int cuDeviceGetName(char *name, int length, int) {
    const char *said = getenv("CUDA_SIM_NAME");
    snprintf(name, length, "%s", said ? said : "a machine made of software");
    return SUCCESS;
}
int cuDeviceGetAttribute(int *value, int attribute, int) {
    // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR, _MAX_SHARED_MEMORY_PER_BLOCK_OPTIN; of what else is asked it has nothing.
    *value = attribute == 75 ? card.major : attribute == 76 ? card.minor : attribute == 97 ? card.shared : 0;
    return SUCCESS;
}
int cuDevicePrimaryCtxRetain(void **context, int device) {
    if (!is_initialised)
        return NOT_INITIALIZED;
    sim::gpu = device;
    *context = &context_of_device;
    retained++;
    return SUCCESS;
}
int cuDevicePrimaryCtxRelease_v2(int) {
    if (retained == 0)
        return INVALID_CONTEXT;
    // "The primary context is automatically reset once the last reference to it is released": what was allocated in it goes with it, which
    // a program must not count on, as a library may have the context too.
    if (--retained > 0)
        return SUCCESS;
    if (!sim::lost && !(allocations.empty() && locked.empty()))
        fprintf(stderr, "cuda-sim: %zu allocations were left when the context went\n", allocations.size() + locked.size());
    allocations.clear();
    locked.clear();
    return SUCCESS;
}
/// For the other libraries of the machine: whether there is a context.
int cuda_sim_has_context() { return retained > 0; }
int cuCtxSetCurrent(void *context) {
    current_context = context;
    return SUCCESS;
}
int cuCtxGetCurrent(void **context) {
    *context = current_context;
    return SUCCESS;
}
int cuCtxSynchronize() { return with_context(sim::no_stream_must_capture); }

int cuStreamCreate(void **stream, unsigned) {
    return with_context([=] {
        *stream = *sim::streams.insert(new sim::Stream).first;
        return SUCCESS;
    });
}
int cuCtxGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0, *greatest = -5;
    return with_context([] { return SUCCESS; });
}
int cuStreamCreateWithPriority(void **stream, unsigned flags, int) {
    // "if priority is outside the numerical range returned by cuCtxGetStreamPriorityRange, it will automatically be clamped".
    return cuStreamCreate(stream, flags);
}
int cuStreamSynchronize(void *stream) {
    return with_context([=] {
        if (const int refused = sim::must_not_capture(stream))
            return refused;
        wait_until([=] { return !stream || static_cast<sim::Stream *>(stream)->left.empty(); });
        return int(SUCCESS);
    });
}
int cuStreamWaitEvent(void *stream, void *event, unsigned) {
    return with_context([=] {
        const Event &waited = *static_cast<Event *>(event);
        if (waited.mark.stream || (stream && static_cast<sim::Stream *>(stream)->capture))
            return sim::wait_for(stream, waited.mark);
        // "captures in event all work ... at the time of this call": an event that is recorded again later does not matter.
        return sim::begin_slow(stream, [moment = waited.last] {
            return [moment] {
                *sim::clock_now = std::max(*sim::clock_now, moment->clock);
                return moment->is_over;
            };
        });
    });
}
int cuStreamDestroy_v2(sim::Stream *stream) {
    // "the function will return immediately and the resources ... will be released automatically once the device has completed all work"
    sim::captures.erase(stream->capture.get());
    sim::go_on();
    if (stream->left.empty()) {
        sim::streams.erase(stream);
        delete stream;
    }
    return SUCCESS;
}
/// For the other libraries of the machine (stream.h).
int cuda_sim_begin_slow(void *stream, const sim::Maker *make) { return sim::begin_slow(stream, *make); }

int cuStreamBeginCapture_v2(void *stream, int mode) {
    return with_context([=] { return sim::begin_capture(stream, mode); });
}
int cuStreamEndCapture(void *stream, sim::Graph **graph) {
    return with_context([=] { return sim::end_capture(stream, graph); });
}
int cuStreamIsCapturing(void *stream, int *status) {
    if (sim::lost)
        return sim::lost;
    // CUstreamCaptureStatus: none, active, invalidated.
    const auto &capture = static_cast<sim::Stream *>(stream)->capture;
    *status = !capture ? 0 : capture->is_valid ? 1 : 2;
    return SUCCESS;
}
int cuGraphInstantiateWithFlags(sim::Graph **executable, const sim::Graph *graph, unsigned long long flags) {
    return with_context([=] { return sim::instantiate(executable, graph, flags); });
}
int cuGraphLaunch(const sim::Graph *executable, void *stream) {
    return with_context([=] {
        const int refused = sim::fault_of_launch(sim::Counted::Others);
        // What was lost on the way has not been computed, nor is what waited before it: a context that is lost ends nothing.
        if (sim::lost)
            for (sim::Stream *waiting : sim::streams)
                waiting->left.clear();
        return refused || sim::lost ? refused : sim::launch(executable, stream);
    });
}
int cuGraphExecDestroy(sim::Graph *executable) {
    delete executable;
    return SUCCESS;
}
int cuGraphDestroy(sim::Graph *graph) {
    delete graph;
    return SUCCESS;
}
/// For tests: what has been begun and has not ended.
unsigned long long cuda_sim_left() {
    unsigned long long left = 0;
    for (const sim::Stream *stream : sim::streams)
        left += stream->left.size();
    return left;
}
/// For tests: the flags with which the last graph was instantiated.
unsigned long long cuda_sim_graph_flags() { return sim::flags_of_last; }
/// For tests: launches of graphs so far.
unsigned long long cuda_sim_graph_launches() { return sim::launches; }
/// For the other libraries of the machine (stream.h).
int cuda_sim_begin(void *stream, void (*run)(void *), void *context, void (*destroy)(void *)) {
    const std::shared_ptr<void> work(context, destroy);
    if (sim::lost)
        return sim::lost;
    return sim::begin(stream, [=] {
        run(work.get());
        sim::work();
    });
}
/// Likewise: the clock of the stream whose work runs now.
uint64_t *cuda_sim_clock() { return sim::clock_now.get(); }

int cuEventCreate(void **event, unsigned flags) {
    return with_context([=] {
        *event = new Event{.has_time = !(flags & 2)};
        return SUCCESS;
    });
}
int cuEventRecord(void *event, void *stream) {
    if (sim::lost)
        return sim::lost;
    Event &recorded = *static_cast<Event *>(event);
    recorded.is_recorded = true;
    const int result = sim::mark(stream, &recorded.mark);
    if (result || recorded.mark.stream)
        return result;
    auto moment = std::make_shared<Moment>(Moment{false, start});
    recorded.last = moment;
    return sim::begin(stream, [=] {
        moment->time = std::chrono::steady_clock::now() + ahead;
        moment->clock = *sim::clock_now;
        moment->is_over = true;
    });
}
int cuEventQuery(void *event) {
    return with_context([=] {
        const Event &asked = *static_cast<Event *>(event);
        if (const int refused = sim::must_not_be_captured(asked.mark))
            return refused;
        sim::go_on();
        return int(asked.last->is_over ? SUCCESS : NOT_READY);
    });
}
int cuEventSynchronize(void *event) {
    if (sim::lost)
        return sim::lost;
    const Event &awaited = *static_cast<Event *>(event);
    if (const int refused = sim::must_not_be_captured(awaited.mark))
        return refused;
    wait_until([&] { return awaited.last->is_over; });
    return SUCCESS;
}
int cuEventElapsedTime_v2(float *milliseconds, void *from, void *to) {
    // "If either event has not been recorded ... or was created with CU_EVENT_DISABLE_TIMING ... CUDA_ERROR_INVALID_HANDLE".
    for (void *event : {from, to})
        if (const auto &timed = *static_cast<Event *>(event); !timed.is_recorded || !timed.has_time)
            return INVALID_HANDLE;
    for (void *event : {from, to}) {
        if (const int refused = sim::must_not_be_captured(static_cast<Event *>(event)->mark))
            return refused;
        // "If either event has been recorded ... but has not yet completed ... CUDA_ERROR_NOT_READY"
        if (!static_cast<Event *>(event)->last->is_over)
            return NOT_READY;
    }
    *milliseconds = std::chrono::duration<float, std::milli>(static_cast<Event *>(to)->last->time - static_cast<Event *>(from)->last->time).count();
    return SUCCESS;
}
int cuEventDestroy_v2(void *event) {
    delete static_cast<Event *>(event);
    return SUCCESS;
}

int cuMemAlloc_v2(uint64_t *address, size_t bytes) {
    return at_once([=]() -> int {
        // "If bytesize is 0, cuMemAlloc() returns CUDA_ERROR_INVALID_VALUE"; memory is aligned for any variable.
        if (bytes == 0)
            return INVALID_VALUE;
        if (const int refused = sim::fault_of_allocation())
            return refused;
        void *memory = bytes <= free_memory() ? aligned_alloc(256, (bytes + 255) / 256 * 256) : nullptr;
        if (!memory)
            return OUT_OF_MEMORY;
        // Nobody may count on what is there; more than this is taken and never used by most programs, and would be the host's memory.
        memset(memory, 0xA5, std::min(bytes, size_t{64} << 20));
        *address = reinterpret_cast<uint64_t>(memory);
        allocations[*address] = bytes;
        return SUCCESS;
    });
}
int cuMemGetInfo_v2(size_t *free, size_t *total) {
    return with_context([=] {
        *free = free_memory();
        *total = all_memory();
        return SUCCESS;
    });
}
int cuMemFree_v2(uint64_t address) {
    return at_once([=] {
        if (!allocations.count(address))
            return INVALID_VALUE;
        // "Stream Ordered Memory Allocator": "cudaMalloc and cudaFree causes the GPU to synchronize across all executing CUDA streams".
        wait_until([] { return cuda_sim_left() == 0; });
        allocations.erase(address);
        free(reinterpret_cast<void *>(address));
        return SUCCESS;
    });
}
int cuMemHostAlloc(void **memory, size_t bytes, unsigned flags) {
    return at_once([=]() -> int {
        *memory = flags == 0 && bytes > 0 ? aligned_alloc(4096, (bytes + 4095) / 4096 * 4096) : nullptr;
        if (!*memory)
            return flags == 0 && bytes > 0 ? OUT_OF_MEMORY : INVALID_VALUE;
        memset(*memory, 0xA5, bytes);
        locked[reinterpret_cast<uint64_t>(*memory)] = bytes;
        return SUCCESS;
    });
}
int cuMemFreeHost(void *memory) {
    return at_once([=] {
        if (!locked.erase(reinterpret_cast<uint64_t>(memory)))
            return INVALID_VALUE;
        free(memory);
        return SUCCESS;
    });
}
/// For the other libraries of the machine: whether these bytes lie in one allocation.
int cuda_sim_holds(uint64_t address, size_t bytes) { return is_in(allocations, address, bytes); }
/// Likewise: what runs now takes so much longer by the GPU's clock.
void cuda_sim_takes(int milliseconds) { ahead += std::chrono::milliseconds(milliseconds); }
int cuMemsetD8Async(uint64_t to, unsigned char value, size_t bytes, void *stream) {
    return with_context([=]() -> int {
        // No page says what becomes of 0 bytes, which a memset node of a graph cannot have either ("Number of elements per row").
        if (bytes == 0)
            return INVALID_VALUE;
        return sim::begin(stream, [=] { memset(reinterpret_cast<void *>(to), value, bytes); });
    });
}
int cuMemcpyHtoDAsync_v2(uint64_t to, const void *from, size_t bytes, void *stream) {
    return with_context([=] {
        // "API synchronization behavior": copies between page-locked memory and the device are fully asynchronous, so that what is read is
        // what stands there when the stream comes to it.
        const bool is_locked = is_in(locked, reinterpret_cast<uint64_t>(from), bytes);
        if (is_locked || (stream && static_cast<sim::Stream *>(stream)->capture))
            return sim::begin(stream, [=] { memcpy(reinterpret_cast<void *>(to), from, bytes); });
        // "For transfers from pageable host memory ... the function will return once the pageable buffer has been copied to staging memory".
        std::vector<char> staged(static_cast<const char *>(from), static_cast<const char *>(from) + bytes);
        return sim::begin(stream, [=, staged = std::move(staged)] { memcpy(reinterpret_cast<void *>(to), staged.data(), bytes); });
    });
}
int cuMemcpyDtoH_v2(void *to, uint64_t from, size_t bytes) {
    return with_context([=] {
        // Not in the order of any of the streams, none of which is the legacy one or waits for it. Nor does it matter whether they capture.
        // "Prohibited and Unhandled Operations": "When any stream in the same context is being captured, and it was not created with
        // cudaStreamNonBlocking, any attempted use of the legacy stream is invalid"; "also invalid to call synchronous APIs in this case".
        memcpy(to, reinterpret_cast<void *>(from), bytes);
        return SUCCESS;
    });
}
int cuMemcpyDtoHAsync_v2(void *to, uint64_t from, size_t bytes, void *stream) {
    return with_context([=]() -> int {
        const int result = sim::begin(stream, [=] { memcpy(to, reinterpret_cast<void *>(from), bytes); });
        // "For transfers from device memory to pageable host memory, the function will return only once the copy has completed."
        if (result || is_in(locked, reinterpret_cast<uint64_t>(to), bytes))
            return result;
        return cuStreamSynchronize(stream);
    });
}
int cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void *stream) {
    return with_context([=] {
        return sim::begin(stream, [=] { memcpy(reinterpret_cast<void *>(to), reinterpret_cast<void *>(from), bytes); });
    });
}

int cuModuleLoadData(void **module, const void *image) {
    return at_once([=] {
        // The kernels are in this library already. The magic number of a fatbin, "fatbinary.h" of the toolkit.
        uint32_t magic;
        memcpy(&magic, image, sizeof magic);
        *module = new char;
        return magic == 0xBA55ED50 ? SUCCESS : INVALID_VALUE;
    });
}
int cuModuleUnload(void *module) {
    delete static_cast<char *>(module);
    return SUCCESS;
}
int cuModuleGetFunction(void **function, void *, const char *name) {
    auto found = sim::kernels().find(name);
    if (found == sim::kernels().end())
        return NOT_FOUND;
    *function = &functions.emplace(name, Function{name, &found->second}).first->second;
    return SUCCESS;
}
int cuFuncSetAttribute(void *function, int attribute, int value) {
    // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, at most what a block can have.
    if (attribute != 8 || value > card.shared)
        return INVALID_VALUE;
    static_cast<Function *>(function)->dynamic = value;
    return SUCCESS;
}
int cuLaunchKernel(void *function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   void *stream, void **parameters, void **) {
    return with_context([=]() -> int {
        const Function &f = *static_cast<Function *>(function);
        // "Technical Specifications per Compute Capability" of the guide, and the bound that the kernel was compiled with.
        const uint64_t threads = uint64_t(bx) * by * bz;
        const bool has_blocks = gx > 0 && gy > 0 && gz > 0 && gx <= 0x7FFFFFFF && gy <= 65535 && gz <= 65535;
        if (int(shared) > f.dynamic || !has_blocks || threads == 0 || threads > f.kernel->max_threads || bz > 64)
            return INVALID_VALUE;
        if (!stream || !static_cast<sim::Stream *>(stream)->capture)
            if (const int refused = sim::fault_of_launch(sim::Counted::Kernels); refused || sim::lost)
                return refused;
        int followed = SUCCESS;
        sim::Launch launch{f.name, {gx, gy, gz}, {bx, by, bz}, shared, {}};
        for (size_t i = 0; i < f.kernel->sizes.size(); i++) {
            auto *bytes = static_cast<unsigned char *>(parameters[i]);
            launch.arguments.push_back({std::vector<unsigned char>(bytes, bytes + f.kernel->sizes[i])});
            uint64_t address = 0;
            const unsigned alignment = f.kernel->alignments[i];
            if (alignment)
                memcpy(&address, bytes, sizeof address);
            // What leads nowhere is noticed when it is followed, and by a later call. "Global memory instructions support reading or writing
            // words of size equal to 1, 2, 4, 8, or 16 bytes", and an address must be a multiple of that ("Device Memory Accesses" of the
            // guide): the headers of kernels ask for buffers aligned to 16 bytes.
            if (address && !cuda_sim_holds(address, 1) && !is_in(locked, address, 1))
                followed = sim::ILLEGAL_ADDRESS;
            else if (alignment && address % alignment != 0 && !followed)
                followed = sim::MISALIGNED_ADDRESS;
        }
        return sim::begin(stream, [launch = std::move(launch), followed] {
            if (followed)
                sim::lost = followed;
            if (sim::lost)
                return;
            sim::now = *sim::clock_now;
            sim::prepare(launch);
            sim::run_once();
            sim::work();
        });
    });
}

int cuGetErrorName(int, const char **name) {
    *name = "CUDA_ERROR";
    return SUCCESS;
}
int cuGetErrorString(int result, const char **text) {
    switch (result) {
    case INVALID_VALUE: *text = "invalid argument"; break;
    case OUT_OF_MEMORY: *text = "out of memory"; break;
    case NOT_INITIALIZED: *text = "initialization error"; break;
    case INVALID_DEVICE: *text = "invalid device ordinal"; break;
    case INVALID_HANDLE: *text = "invalid resource handle"; break;
    case INVALID_CONTEXT: *text = "invalid device context"; break;
    case NOT_FOUND: *text = "named symbol not found"; break;
    default:
        *text = sim::text_of(result) ? sim::text_of(result) : sim::text_of_fault(result);
        *text = *text ? *text : "no error";
    }
    return SUCCESS;
}
}
