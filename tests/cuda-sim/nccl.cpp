// libnccl.so.2 of the machine made of software: the calls of NCCL that this project makes, between processes of one machine, for memory of
// the driver beside it, which is the host's. Communicators do not block: a request is under way until the communicator has been asked a
// few times how far it is, and only then stands in its stream. Sums are made in shared memory, in the order of the ranks. Nothing is
// noticed of a process that is gone, as between the GPUs of one machine. What the library refuses is refused, with its rule beside it; what
// it would not survive ends the process.
//
// CUDA_SIM_NCCL_FAIL names what goes wrong in this process: a call; "join", "sum" or "leave" for an error that comes later; "deaf" for
// sums that this GPU never takes part in. CUDA_SIM_NCCL_VERSION is its version. It says on standard error how communicators end.

#include <atomic>
#include <climits>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <dlfcn.h>
#include <fcntl.h>
#include <functional>
#include <random>
#include <string>
#include <sys/mman.h>
#include <unistd.h>

namespace {

/// ncclResult_t
enum Result { SUCCESS = 0, SYSTEM_ERROR = 2, INTERNAL_ERROR = 3, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE_ERROR = 6, IN_PROGRESS = 7 };

constexpr int FLOAT32 = 7, SUM = 0;
constexpr int MOST_RANKS = 16;
/// Of one rank in a sum, as sparse memory.
constexpr size_t MOST_FLOATS = size_t(4) << 20;
/// How often a request is asked after before it is done.
constexpr int DELAY = 3;

struct UniqueId {
    char internal[128];
};

/// ncclConfig_t; "attributes that users should never touch" first.
struct Config {
    size_t size;
    unsigned magic, version;
    int blocking, cga_cluster_size, min_ctas, max_ctas;
    const char *net_name;
    int split_share;
};

/// What the processes share; zeros at first.
struct Shared {
    struct Rank {
        std::atomic<int> is_here, has_left;
        /// Sums whose floats it has laid out, and sums that it has taken.
        std::atomic<uint64_t> offered, taken;
        uint64_t floats;
    } ranks[MOST_RANKS];
    std::atomic<int> here;
    alignas(4096) float data[MOST_RANKS][MOST_FLOATS];
};

struct Communicator {
    Shared *shared;
    int rank, size;
    std::string name;
    /// What is under way: after so many questions it is begun, and then done when it says so.
    int questions = DELAY;
    std::function<void()> begin = [] {};
    std::function<bool()> is_done;
    /// An error that stays.
    Result broken = SUCCESS;
    /// Sums in its streams.
    uint64_t sums = 0;
    std::atomic<int> under_way = 0;
    bool has_left = false;
    std::atomic<bool> is_gone = false;

    bool all(auto &&is) const {
        for (int r = 0; r < size; r++)
            if (!is(shared->ranks[r]))
                return false;
        return true;
    }
};

std::string last_error;

int refuse(Result result, std::string why) {
    last_error = std::move(why);
    return result;
}

/// What the real library would not survive.
[[noreturn]] void crash(const std::string &what) {
    fprintf(stderr, "nccl: %s\n", what.c_str());
    abort();
}

bool is_failing(const char *what) {
    const char *wanted = getenv("CUDA_SIM_NCCL_FAIL");
    return wanted && !strcmp(wanted, what);
}

/// A function of the driver, which this process has loaded.
template <class F> F *of_driver(const char *name) {
    void *driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    void *function = driver ? dlsym(driver, name) : nullptr;
    if (!function)
        crash(std::string("the driver that is loaded has no ") + name);
    return reinterpret_cast<F *>(function);
}

Communicator &of(void *handle) {
    auto *communicator = static_cast<Communicator *>(handle);
    if (!communicator || communicator->is_gone)
        crash("a communicator that is none, or no more");
    return *communicator;
}

/// How far what is under way is.
int state(Communicator &c) {
    if (c.broken)
        return c.broken;
    if (c.questions > 0 && --c.questions > 0)
        return IN_PROGRESS;
    if (c.begin) {
        c.begin();
        c.begin = nullptr;
    }
    if (c.is_done && !c.is_done())
        return IN_PROGRESS;
    c.is_done = nullptr;
    return c.broken;
}

/// "the calling thread ... must not issue another NCCL operation on a communicator in ncclInProgress"
bool is_ready(Communicator &c) { return !c.broken && c.questions == 0 && !c.begin && !c.is_done; }

int request(Communicator &c, std::function<void()> begin, std::function<bool()> is_done) {
    c.questions = DELAY, c.begin = std::move(begin), c.is_done = std::move(is_done);
    return IN_PROGRESS;
}

/// A sum in its stream, which asks again and again until it has ended.
struct Sum {
    Communicator *c;
    const float *from;
    float *to;
    uint64_t floats, number;
    bool is_offered = false;

    bool go_on() {
        if (c->is_gone)
            return true;
        if (is_failing("deaf"))
            return false;
        Shared::Rank &mine = c->shared->ranks[c->rank];
        if (!is_offered) {
            if (!c->all([&](auto &rank) { return rank.taken >= number; }))
                return false;
            memcpy(c->shared->data[c->rank], from, floats * sizeof(float));
            mine.floats = floats;
            mine.offered = number + 1;
            is_offered = true;
        }
        if (!c->all([&](auto &rank) { return rank.offered > number; }))
            return false;
        if (!c->all([&](auto &rank) { return rank.floats == floats; }))
            crash("ranks that sum up different numbers of floats");
        for (uint64_t i = 0; i < floats; i++) {
            float sum = c->shared->data[0][i];
            for (int r = 1; r < c->size; r++)
                sum += c->shared->data[r][i];
            to[i] = sum;
        }
        mine.taken = number + 1;
        return true;
    }
};

void end(Communicator &c, const char *how) {
    c.is_gone = true;
    fprintf(stderr, "nccl: rank %d has %s its communicator\n", c.rank, how);
    // Nobody else can come to it any more. It is not freed: streams may still know it.
    shm_unlink(c.name.c_str());
}

} // namespace

extern "C" {
int ncclGetVersion(int *version) {
    const char *said = getenv("CUDA_SIM_NCCL_VERSION");
    *version = said ? atoi(said) : 22'902;
    return SUCCESS;
}
const char *ncclGetErrorString(int result) {
    switch (result) {
    case SUCCESS: return "no error";
    case SYSTEM_ERROR: return "unhandled system error (run with NCCL_DEBUG=INFO for details)";
    case INTERNAL_ERROR: return "internal error - please report this issue to the NCCL developers";
    case INVALID_ARGUMENT: return "invalid argument (run with NCCL_DEBUG=WARN for details)";
    case INVALID_USAGE: return "invalid usage (run with NCCL_DEBUG=WARN for details)";
    case REMOTE_ERROR: return "remote process exited or there was a network error";
    default: return "unknown result code";
    }
}
const char *ncclGetLastError(void *) { return last_error.c_str(); }

int ncclGetUniqueId(UniqueId *id) {
    if (is_failing("ncclGetUniqueId"))
        return refuse(SYSTEM_ERROR, "Bootstrap : no socket interface found");
    std::random_device random;
    memset(id, 0, sizeof *id);
    snprintf(id->internal, sizeof id->internal, "/ddpm-sim-nccl-%08x%08x%08x", random(), random(), random());
    return SUCCESS;
}

int ncclCommInitRankConfig(void **handle, int size, UniqueId id, int rank, Config *config) {
    if (is_failing("ncclCommInitRankConfig"))
        return refuse(SYSTEM_ERROR, "Call to connect failed : Connection refused");
    if (config->magic != 0xcafebeef)
        return refuse(INVALID_ARGUMENT, "ncclConfig_t argument not initialized via NCCL_CONFIG_INITIALIZER");
    // Fields are read as far as the size says; what a version does not have yet is set by default.
    if (config->size != sizeof(Config) || config->version != 21'700)
        crash("a config that is not that of version 2.17");
    if (config->blocking != 0)
        crash("a communicator that blocks");
    for (int field : {config->cga_cluster_size, config->min_ctas, config->max_ctas, config->split_share})
        if (field != INT_MIN)
            crash("a config with a field that is neither set nor undefined");
    if (size < 1 || size > MOST_RANKS || rank < 0 || rank >= size)
        return refuse(INVALID_ARGUMENT, "Invalid rank requested : " + std::to_string(rank) + "/" + std::to_string(size));
    void *context = nullptr;
    of_driver<int(void **)>("cuCtxGetCurrent")(&context);
    if (!context)
        crash("a thread without a context");
    id.internal[127] = 0;
    const int file = shm_open(id.internal, O_CREAT | O_RDWR, 0600);
    if (file < 0 || ftruncate(file, sizeof(Shared)) != 0)
        return refuse(SYSTEM_ERROR, "no shared memory");
    void *shared = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0);
    close(file);
    if (shared == MAP_FAILED)
        return refuse(SYSTEM_ERROR, "no shared memory");
    auto *c = new Communicator{.shared = static_cast<Shared *>(shared), .rank = rank, .size = size, .name = id.internal, .is_done = {}};
    if (c->shared->ranks[rank].is_here.exchange(1))
        crash("two processes with one rank");
    c->shared->here++;
    *handle = c;
    if (is_failing("join"))
        c->broken = Result(refuse(SYSTEM_ERROR, "socketProgress: Connection closed by remote peer"));
    c->is_done = [c] {
        if (c->shared->here < c->size)
            return false;
        shm_unlink(c->name.c_str());
        return true;
    };
    return IN_PROGRESS;
}

int ncclCommGetAsyncError(void *handle, int *error) {
    Communicator &c = of(handle);
    if (is_failing("sum") && c.sums > 0 && !c.broken)
        c.broken = Result(refuse(REMOTE_ERROR, "NET/IB : Got completion from peer with status=12"));
    *error = state(c);
    return SUCCESS;
}

int ncclAllReduce(const void *from, void *to, size_t count, int type, int operation, void *handle, void *stream) {
    Communicator &c = of(handle);
    if (is_failing("ncclAllReduce"))
        return refuse(INTERNAL_ERROR, "no channel");
    if (!is_ready(c))
        return refuse(INVALID_USAGE, "Attempt to use communicator before the previous operation returned ncclSuccess");
    auto *holds = of_driver<int(uint64_t, size_t)>("cuda_sim_holds");
    if (type != FLOAT32 || operation != SUM || from != to)
        crash("a sum that is not one of floats in place");
    if (count == 0 || count > MOST_FLOATS || !holds(reinterpret_cast<uint64_t>(to), count * sizeof(float)))
        crash("a sum of memory that is not the device's, or too large for this machine");
    auto *begin = of_driver<int(void *, int (*)(void *), void *)>("cuda_sim_begin_slow");
    const uint64_t number = c.sums++;
    auto start = [=, &c] {
        auto *sum = new Sum{&c, static_cast<const float *>(from), static_cast<float *>(to), count, number};
        c.under_way++;
        begin(stream, [](void *data) -> int {
            auto *sum = static_cast<Sum *>(data);
            if (!sum->go_on())
                return 0;
            sum->c->under_way--;
            delete sum;
            return 1;
        }, sum);
    };
    return request(c, start, nullptr);
}

int ncclCommFinalize(void *handle) {
    Communicator &c = of(handle);
    if (!is_ready(c) || c.has_left)
        return refuse(INVALID_USAGE, "a communicator that is not ready, or finalized already");
    c.has_left = true;
    if (is_failing("leave"))
        c.broken = Result(refuse(REMOTE_ERROR, "Connection reset by peer"));
    // "flushes all issued communications"; "ncclSuccess when the communicator is globally quiescent"
    return request(c, [&c] { c.shared->ranks[c.rank].has_left = 1; }, [&c] {
        return c.under_way == 0 && c.all([](auto &rank) { return rank.has_left == 1; });
    });
}

int ncclCommDestroy(void *handle) {
    Communicator &c = of(handle);
    if (!c.has_left || !is_ready(c))
        crash("a communicator that is destroyed before it is finalized");
    end(c, "left");
    return SUCCESS;
}

int ncclCommAbort(void *handle) {
    end(of(handle), "aborted");
    return SUCCESS;
}
}
