// libnccl.so.2 of the machine made of software: the calls of NCCL that this project makes, between processes of one machine, for memory of
// the driver beside it, which is the host's. Communicators do not block: a request is under way until the communicator has been asked a
// few times how far it is, and only then stands in its stream. Sums are made in shared memory, in the order of the ranks; in bf16 they are
// rounded whenever two are added. A group of sends and receives is an operation of all ranks here. Nothing is noticed of a process that is
// gone, as between the GPUs of one machine. What the library refuses is refused, with its rule beside it; what it would not survive ends the
// process. Names in quotation marks are sections of NVIDIA's "NCCL documentation".
//
// CUDA_SIM_NCCL_FAIL lists what goes wrong in this process (setting.h): a call; "join", "sum" or "leave" for an error that comes later,
// "sum-graph" for one while a graph adds up; "capture" for sums in one; "deaf" for sums that this GPU never takes part in, "deaf-graph" for
// those of graphs; "abort" for one that never comes back and ends nothing. CUDA_SIM_NCCL_VERSION is its version. It says on standard error
// how communicators end.

#include "setting.h"
#include "stream.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <sys/mman.h>
#include <thread>
#include <unistd.h>
#include <vector>

namespace {

/// ncclResult_t
enum Result { SUCCESS = 0, SYSTEM_ERROR = 2, INTERNAL_ERROR = 3, INVALID_ARGUMENT = 4, INVALID_USAGE = 5, REMOTE_ERROR = 6, IN_PROGRESS = 7 };

constexpr int UINT8 = 1, FLOAT32 = 7, BFLOAT16 = 9, SUM = 0;
constexpr int MOST_RANKS = 16;
/// Of one rank in an operation, as sparse memory.
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

/// What an operation is.
enum class Kind : uint64_t { Sum, SumOfSlices, Gather, Messages };

/// What the processes share; zeros at first.
struct Shared {
    struct Rank {
        std::atomic<int> is_here, has_left;
        /// Operations for which it has laid out its part, and that it has done with.
        std::atomic<uint64_t> offered, taken;
        /// Of the operation that it has laid out: what it is, bytes that it has in it and, for another rank, where they are, how many they are, and how
        /// many it wants of it.
        Kind kind;
        uint64_t bytes, from[MOST_RANKS], sent[MOST_RANKS], wanted[MOST_RANKS];
        /// Its number among those that were captured, from 1; 0 if it was not.
        uint64_t captured;
        /// When its stream came to it, by its GPU's clock.
        uint64_t clock;
    } ranks[MOST_RANKS];
    std::atomic<int> here;
    alignas(4096) char data[MOST_RANKS][MOST_FLOATS * sizeof(float)];
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
    /// Operations that were asked for, that were begun, that were captured, and that are in its streams.
    uint64_t asked = 0, begun = 0, captured = 0;
    std::atomic<int> under_way = 0;
    /// Operations in graphs.
    std::atomic<int> in_graphs = 0;
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

bool is_failing(const char *what) { return sim::lists(sim::setting("CUDA_SIM_NCCL_FAIL"), what); }

using sim::of_driver;

void must_be_held(const void *memory, size_t bytes) {
    auto *holds = of_driver<int(uint64_t, size_t)>("cuda_sim_holds");
    if (bytes == 0 || bytes > sizeof Shared::data[0] || !holds(reinterpret_cast<uint64_t>(memory), bytes))
        crash("memory that is not the device's, or too large for this machine");
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

/// A message of a group.
struct Message {
    int peer;
    bool is_sent;
    char *at;
    size_t bytes;
};

/// What a stream is to do, in place: with numbers of all ranks, of which `slice` bytes are each one's where they have slices, or with the
/// messages of a group.
struct Request {
    Kind kind;
    int type;
    char *at;
    uint64_t count, slice;
    std::vector<Message> messages;
};

size_t bytes_of(int type) { return type == FLOAT32 ? 4 : type == BFLOAT16 ? 2 : 1; }

float widened(uint16_t value) {
    const uint32_t bits = uint32_t(value) << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

/// To the nearest, ties to even.
uint16_t rounded(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return value != value ? 0x7FFF : uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

/// Of the stream that an operation is in.
uint64_t *clock() { return of_driver<uint64_t *()>("cuda_sim_clock")(); }

/// An operation in its stream, which asks again and again until it has ended.
struct Operation {
    Communicator *c;
    std::shared_ptr<const Request> request;
    uint64_t number, captured;
    bool is_offered = false;

    void offer() {
        Shared::Rank &mine = c->shared->ranks[c->rank];
        char *data = c->shared->data[c->rank];
        memset(mine.sent, 0, sizeof mine.sent);
        memset(mine.wanted, 0, sizeof mine.wanted);
        mine.captured = captured;
        mine.clock = *clock();
        mine.kind = request->kind;
        mine.bytes = request->count * bytes_of(request->type);
        if (request->kind == Kind::Gather)
            memcpy(data, request->at + c->rank * request->slice, request->slice);
        else
            memcpy(data, request->at, mine.bytes);
        size_t end = 0;
        for (const Message &message : request->messages) {
            (message.is_sent ? mine.sent : mine.wanted)[message.peer] = message.bytes;
            if (message.is_sent) {
                mine.from[message.peer] = end;
                memcpy(data + end, message.at, message.bytes);
                end += message.bytes;
            }
        }
        if (end > sizeof c->shared->data[0])
            crash("messages that are too large for this machine");
        mine.offered = number + 1;
        is_offered = true;
    }

    void gather() {
        for (int r = 0; r < c->size; r++)
            memcpy(request->at + r * request->slice, c->shared->data[r], request->slice);
    }

    /// Of a sum of slices, what stands in those of the other ranks is spoilt: nobody may count on it.
    void sum_of_slices() {
        const uint64_t own = request->slice / bytes_of(request->type);
        memset(request->at, 0xA5, request->count * bytes_of(request->type));
        sum(c->rank * own, (c->rank + 1) * own);
    }

    void sum(uint64_t from, uint64_t to) {
        for (uint64_t i = from; i < to; i++) {
            if (request->type == FLOAT32) {
                auto value = [&](int r) { return reinterpret_cast<const float *>(c->shared->data[r])[i]; };
                float sum = value(0);
                for (int r = 1; r < c->size; r++)
                    sum += value(r);
                reinterpret_cast<float *>(request->at)[i] = sum;
            } else {
                auto value = [&](int r) { return reinterpret_cast<const uint16_t *>(c->shared->data[r])[i]; };
                uint16_t sum = value(0);
                for (int r = 1; r < c->size; r++)
                    sum = rounded(widened(sum) + widened(value(r)));
                reinterpret_cast<uint16_t *>(request->at)[i] = sum;
            }
        }
    }

    void receive() {
        for (int r = 0; r < c->size; r++) {
            // "Point-to-point communication": a send needs "a corresponding ncclRecv" with "the same count and type" at the other rank.
            if (c->shared->ranks[r].sent[c->rank] != c->shared->ranks[c->rank].wanted[r])
                crash("a rank that sends another number of bytes than is wanted");
        }
        for (const Message &message : request->messages)
            if (!message.is_sent)
                memcpy(message.at, c->shared->data[message.peer] + c->shared->ranks[message.peer].from[c->rank], message.bytes);
    }

    bool go_on() {
        if (c->is_gone)
            return true;
        if (is_failing("deaf") || (captured && is_failing("deaf-graph")))
            return false;
        if (!is_offered) {
            if (!c->all([&](auto &rank) { return rank.taken >= number; }))
                return false;
            offer();
        }
        if (!c->all([&](auto &rank) { return rank.offered > number; }))
            return false;
        Shared::Rank &mine = c->shared->ranks[c->rank];
        // "Using NCCL with CUDA Graphs": "Whether an operation launch is graph-captured is considered a collective property of that
        // operation and therefore must be uniform over all ranks participating in the launch"; "each of those ranks must be using the graph
        // derived from that collective capture".
        if (!c->all([&](auto &rank) { return rank.captured == mine.captured; }))
            crash("an operation that some ranks have captured and others not, or elsewhere");
        if (!c->all([&](auto &rank) { return rank.kind == mine.kind && rank.bytes == mine.bytes; }))
            crash("ranks that sum up different numbers, or do different things");
        switch (request->kind) {
        case Kind::Sum: sum(0, request->count); break;
        case Kind::SumOfSlices: sum_of_slices(); break;
        case Kind::Gather: gather(); break;
        case Kind::Messages: receive(); break;
        }
        // It ends everywhere when the last has come.
        for (int r = 0; r < c->size; r++)
            *clock() = std::max(*clock(), c->shared->ranks[r].clock);
        mine.taken = number + 1;
        return true;
    }
};

/// An operation that a graph holds. Neither ncclCommFinalize, ncclCommDestroy nor ncclCommAbort is done before no graph has any: they wait
/// until `localPersistentRefs` is 0 (commDestroySync in init.cc of NCCL).
struct Held {
    Communicator &c;
    explicit Held(Communicator &c) : c(c) { c.in_graphs++; }
    ~Held() { c.in_graphs--; }
};

/// The operation as work of a stream.
std::function<bool()> work_of(Communicator &c, std::shared_ptr<const Request> request, uint64_t captured) {
    auto operation = std::make_shared<Operation>(Operation{&c, std::move(request), c.begun++, captured});
    c.under_way++;
    return [operation] {
        if (!operation->go_on())
            return false;
        operation->c->under_way--;
        return true;
    };
}

/// Asks for an operation, which stands in its stream when the communicator is ready.
int ask(Communicator &c, void *stream, Request what) {
    c.asked++;
    const bool is_captured = sim::is_capturing(stream);
    if (is_captured && is_failing("capture"))
        // "Fault Tolerance": what a communicator can still do after an internal error is to be aborted.
        return c.broken = Result(refuse(INTERNAL_ERROR, "a capture that it cannot follow"));
    auto begin = [&c, stream, is_captured, request = std::make_shared<const Request>(std::move(what))] {
        // "ncclCommGetAsyncError": a call "has not been issued to the stream" as long as it is in progress. Asked for in a capture and begun
        // after it, it would be in no graph.
        if (is_captured != sim::is_capturing(stream))
            crash("an operation that was not polled to success before its stream began or ended a capture");
        if (!is_captured) {
            sim::begin_slow(stream, [&] { return work_of(c, request, 0); });
            return;
        }
        auto held = std::make_shared<Held>(c);
        const uint64_t number = ++c.captured;
        sim::begin_slow(stream, [&c, request, number, held] { return work_of(c, request, number); });
    };
    return ::request(c, begin, nullptr);
}

/// The group that this thread has open, of one communicator and stream.
struct Group {
    bool is_open = false;
    void *handle = nullptr, *stream = nullptr;
    std::vector<Message> messages;
};
thread_local Group group;

int add(bool is_sent, const void *at, size_t count, int type, int peer, void *handle, void *stream) {
    Communicator &c = of(handle);
    if (is_failing(is_sent ? "ncclSend" : "ncclRecv"))
        return refuse(INTERNAL_ERROR, "no channel");
    if (!is_ready(c))
        return refuse(INVALID_USAGE, "Attempt to use communicator before the previous operation returned ncclSuccess");
    // "Group Calls": point-to-point calls that need each other "must be fused" in a group, or they wait for ever.
    if (!group.is_open || (group.handle && (group.handle != handle || group.stream != stream)))
        crash("a message outside of a group, or in that of another communicator");
    if (peer < 0 || peer >= c.size)
        return refuse(INVALID_ARGUMENT, "Invalid peer : " + std::to_string(peer));
    if (type != FLOAT32)
        crash("a message that is none of floats");
    must_be_held(at, count * sizeof(float));
    for (const Message &other : group.messages)
        if (other.peer == peer && other.is_sent == is_sent)
            crash("two messages of a group to one rank");
    group.handle = handle, group.stream = stream;
    group.messages.push_back({peer, is_sent, static_cast<char *>(const_cast<void *>(at)), count * sizeof(float)});
    return SUCCESS;
}

void end(Communicator &c, const char *how) {
    c.is_gone = true;
    // Here it would wait for ever; this machine says so.
    const auto start = std::chrono::steady_clock::now();
    while (c.in_graphs > 0) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
        if (std::chrono::steady_clock::now() - start > std::chrono::seconds(3))
            crash("a communicator that is given back while graphs hold " + std::to_string(c.in_graphs) + " of its operations");
    }
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
    // What was captured is begun by no request of its own.
    const bool is_in_graph = c.begun + c.captured > c.asked;
    if (((is_failing("sum") && c.asked > 0) || (is_failing("sum-graph") && is_in_graph)) && !c.broken)
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
    if ((type != FLOAT32 && type != BFLOAT16) || operation != SUM || from != to)
        crash("a sum that is not one of floats in place");
    must_be_held(to, count * (type == FLOAT32 ? 4 : 2));
    return ask(c, stream, {Kind::Sum, type, static_cast<char *>(to), count, 0, {}});
}

int ncclReduceScatter(const void *from, void *to, size_t count, int type, int operation, void *handle, void *stream) {
    Communicator &c = of(handle);
    if (is_failing("ncclReduceScatter"))
        return refuse(INTERNAL_ERROR, "no channel");
    if (!is_ready(c))
        return refuse(INVALID_USAGE, "Attempt to use communicator before the previous operation returned ncclSuccess");
    if ((type != FLOAT32 && type != BFLOAT16) || operation != SUM)
        crash("a sum that is not one of floats");
    // "ncclReduceScatter": "recvcount" is that of a slice; "In-place operation will happen if recvbuff == sendbuff + rank * recvcount".
    const size_t slice = count * bytes_of(type);
    auto *all = static_cast<char *>(const_cast<void *>(from));
    if (to != all + c.rank * slice)
        crash("a sum of slices that is not in place");
    must_be_held(all, c.size * slice);
    return ask(c, stream, {Kind::SumOfSlices, type, all, c.size * count, slice, {}});
}

int ncclAllGather(const void *from, void *to, size_t count, int type, void *handle, void *stream) {
    Communicator &c = of(handle);
    if (is_failing("ncclAllGather"))
        return refuse(INTERNAL_ERROR, "no channel");
    if (!is_ready(c))
        return refuse(INVALID_USAGE, "Attempt to use communicator before the previous operation returned ncclSuccess");
    if (type != UINT8)
        crash("a gather that is none of bytes");
    // "ncclAllGather": "In-place operation will happen if sendbuff == recvbuff + rank * sendcount".
    auto *all = static_cast<char *>(to);
    if (from != all + c.rank * count)
        crash("a gather that is not in place");
    must_be_held(all, c.size * count);
    return ask(c, stream, {Kind::Gather, type, all, c.size * count, count, {}});
}

int ncclGroupStart() {
    if (group.is_open)
        crash("a group in a group");
    group = {.is_open = true, .messages = {}};
    return SUCCESS;
}
int ncclSend(const void *from, size_t count, int type, int peer, void *handle, void *stream) {
    return add(true, from, count, type, peer, handle, stream);
}
int ncclRecv(void *to, size_t count, int type, int peer, void *handle, void *stream) {
    return add(false, to, count, type, peer, handle, stream);
}
int ncclGroupEnd() {
    if (!group.is_open)
        return refuse(INVALID_USAGE, "ncclGroupEnd: not in a group call.");
    const Group ended = std::move(group);
    group = {};
    if (ended.messages.empty())
        return SUCCESS;
    return ask(of(ended.handle), ended.stream, {Kind::Messages, FLOAT32, nullptr, 0, 0, ended.messages});
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
    while (is_failing("abort"))
        pause();
    end(of(handle), "aborted");
    return SUCCESS;
}
}
