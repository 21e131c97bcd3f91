// The machine: reads one launch, runs it in several ways that must all give the same, and writes what its buffers hold.
//
// Threads run in ascending order, warp after warp, in descending order, and shuffled, all warps side by side; memory that nobody has
// written holds one of two patterns: a kernel whose result depends on either has a race (a missing barrier), reads what is undefined, or
// leaves part of its output unwritten. Buffers are allocations of their own, so that AddressSanitizer sees every access beside them.
//
// Input (little-endian): name, grid[3], block[3], shared bytes, number of arguments; each argument is a kind (0 value, 1 input, 2 output,
// 3 updated in place), its bytes, and for all but outputs their content. Strings and contents begin with their length (u64).
// Output: the content of each buffer of kind 2 and 3, in order. Whatever is wrong is said on stderr, with exit code 1.

#include "cuda_sim.h"
#include "fibre.h"

#include <algorithm>
#include <cstdio>
#include <numeric>
#include <random>

namespace sim {
namespace {

enum class Order { Ascending, Descending, Shuffled };
enum class State : uint8_t { Ready, AtBarrier, Together, Left };

/// A copy to shared memory that has not landed.
struct Copy {
    unsigned char *to;
    const unsigned char *from;
    unsigned bytes, there;
    unsigned group;

    void land() const {
        memset(to, 0, bytes);
        memcpy(to, from, there);
    }
};

/// A thread of the block that runs.
struct Thread {
    uint3 index;
    State state = State::Ready;
    Together what;
    unsigned mask, detail;
    uint64_t mine;
    std::array<uint64_t, WARP> all;
    void (*act)(const std::array<uint64_t, WARP> &) = nullptr;
    std::vector<Copy> copies;
    unsigned groups = 0;
};

// One block at a time, one thread of it at a time.
const Launch *launch;
const Kernel *kernel;
std::vector<Thread> threads;
std::vector<std::unique_ptr<Fibre>> fibres;
Context scheduler;
size_t current;
uint3 current_block;
unsigned char poison;
std::map<const void *, std::vector<unsigned char>> shared_arrays;
std::vector<unsigned char> dynamic;
size_t shared_bytes;
// When an asynchronous copy lands: in ascending order at the wait, in descending at once, else at one of the two by chance.
Order current_order;
std::mt19937 chance;

std::string text(const uint3 &v) { return "(" + std::to_string(v.x) + ", " + std::to_string(v.y) + ", " + std::to_string(v.z) + ")"; }
std::string name_of(size_t thread) { return "thread " + text(threads[thread].index); }

/// Where a thread is, in words.
std::string place(size_t number) {
    const Thread &t = threads[number];
    switch (t.state) {
    case State::Ready: return "runs";
    case State::AtBarrier: return "is at __syncthreads";
    case State::Left: return "has left the kernel";
    case State::Together: break;
    }
    static const char *const names[] = {"__syncwarp", "a shuffle", "a vote", "ldmatrix", "mma"};
    char mask[16];
    snprintf(mask, sizeof mask, "%08x", t.mask);
    return std::string("is at ") + names[int(t.what)] + " with mask " + mask;
}

void yield(State state) {
    threads[current].state = state;
    fibres[current]->yield(scheduler, state == State::Left);
}

void body() {
    fibres[current]->arrived();
    kernel->call(launch->arguments);
    yield(State::Left);
}

/// Lets the threads go on if all are at the barrier. Gives whether they are.
bool release_block() {
    if (!std::all_of(threads.begin(), threads.end(), [](const Thread &t) { return t.state == State::AtBarrier; }))
        return false;
    for (Thread &t : threads)
        t.state = State::Ready;
    return true;
}

/// Lets the threads of the warp that begins with `first` go on whose partners have all come. Gives whether there are any.
bool release_warp(size_t first) {
    bool any = false;
    size_t lanes = std::min<size_t>(WARP, threads.size() - first);
    for (size_t lane = 0; lane < lanes; lane++) {
        const Thread &t = threads[first + lane];
        if (t.state != State::Together)
            continue;
        auto has_come = [&](size_t other) {
            const Thread &o = threads[first + other];
            return o.state == State::Together && o.what == t.what && o.mask == t.mask && o.detail == t.detail && o.act == t.act;
        };
        bool all = true;
        for (size_t other = 0; other < WARP; other++)
            if (t.mask >> other & 1)
                all = all && other < lanes && has_come(other);
        if (!all)
            continue;
        unsigned mask = t.mask;
        std::array<uint64_t, WARP> values{};
        for (size_t other = 0; other < lanes; other++)
            if (mask >> other & 1)
                values[other] = threads[first + other].mine;
        for (size_t other = 0; other < lanes; other++)
            if (mask >> other & 1)
                threads[first + other].all = values, threads[first + other].state = State::Ready;
        if (t.act)
            t.act(values);
        any = true;
    }
    return any;
}

/// Nobody can go on: says who waits for whom.
[[noreturn]] void stuck() {
    for (size_t i = 0; i < threads.size(); i++) {
        const Thread &t = threads[i];
        if (t.state == State::Together) {
            size_t first = i / WARP * WARP;
            if (!(t.mask >> (i - first) & 1))
                refuse(name_of(i) + " " + place(i) + " that does not name itself");
            for (size_t lane = 0; lane < WARP; lane++) {
                if (!(t.mask >> lane & 1))
                    continue;
                if (first + lane >= threads.size())
                    refuse(name_of(i) + " " + place(i) + ", which names lane " + std::to_string(lane) + ": the block has no such thread");
                const Thread &o = threads[first + lane];
                if (o.state != State::Together || o.what != t.what || o.mask != t.mask || o.detail != t.detail || o.act != t.act)
                    refuse(name_of(i) + " " + place(i) + ", while " + name_of(first + lane) + " " + place(first + lane));
            }
        }
    }
    for (size_t i = 0; i < threads.size(); i++)
        for (size_t j = 0; j < threads.size() && threads[i].state == State::AtBarrier; j++)
            if (threads[j].state == State::Left)
                refuse(name_of(i) + " is at __syncthreads, while " + name_of(j) + " has left the kernel");
    refuse("no thread can go on");
}

void run_block(Order order, unsigned seed) {
    const uint3 &size = launch->block;
    size_t count = size_t(size.x) * size.y * size.z;
    threads.assign(count, {});
    while (fibres.size() < count)
        fibres.push_back(std::make_unique<Fibre>());
    for (size_t i = 0; i < count; i++) {
        threads[i].index = {unsigned(i % size.x), unsigned(i / size.x % size.y), unsigned(i / size.x / size.y)};
        fibres[i]->begin(body);
    }
    shared_arrays.clear();
    shared_bytes = launch->shared;
    dynamic.assign(launch->shared, poison);
    dynamic.shrink_to_fit();
    current_order = order;
    chance.seed(seed);
    std::vector<size_t> turn(count), warps((count + WARP - 1) / WARP);
    std::iota(turn.begin(), turn.end(), size_t(0));
    std::iota(warps.begin(), warps.end(), size_t(0));
    if (order == Order::Descending)
        std::reverse(turn.begin(), turn.end()), std::reverse(warps.begin(), warps.end());
    auto resume = [&](size_t i) {
        if (threads[i].state != State::Ready)
            return false;
        current = i;
        fibres[i]->resume(scheduler);
        return true;
    };
    while (true) {
        bool ran = false;
        if (order == Order::Shuffled) {
            std::shuffle(turn.begin(), turn.end(), chance);
            for (size_t i : turn)
                ran = resume(i) || ran;
            for (size_t warp : warps)
                release_warp(warp * WARP);
        } else {
            // A warp goes as far as it can before the next one begins.
            for (size_t warp : warps) {
                const size_t first = std::min(warp * WARP, count), last = std::min(first + WARP, count);
                auto begin = turn.begin() + (order == Order::Descending ? count - last : first);
                do
                    for (size_t i = 0; i < last - first; i++)
                        ran = resume(begin[i]) || ran;
                while (release_warp(first));
            }
        }
        if (std::all_of(threads.begin(), threads.end(), [](const Thread &t) { return t.state == State::Left; }))
            return;
        if (!release_block() && !ran)
            stuck();
    }
}

void run_grid(Order order, unsigned seed) {
    const uint3 &size = launch->grid;
    size_t count = size_t(size.x) * size.y * size.z;
    for (size_t i = 0; i < count; i++) {
        size_t number = order == Order::Descending ? count - 1 - i : i;
        current_block = {unsigned(number % size.x), unsigned(number / size.x % size.y), unsigned(number / size.x / size.y)};
        run_block(order, seed + unsigned(number));
    }
}

} // namespace

void refuse(const std::string &what) {
    fprintf(stderr, "cuda-sim: %s, block %s: %s\n", launch ? launch->name.c_str() : "no launch", text(current_block).c_str(), what.c_str());
    exit(1);
}

const uint3 &thread() { return threads[current].index; }
const uint3 &block() { return current_block; }
const uint3 &block_size() { return launch->block; }
const uint3 &grid_size() { return launch->grid; }
void barrier() { yield(State::AtBarrier); }

const std::array<uint64_t, WARP> &exchange(Together what, unsigned mask, uint64_t mine, unsigned detail) {
    Thread &t = threads[current];
    t.what = what, t.mask = mask, t.mine = mine, t.detail = detail, t.act = nullptr;
    yield(State::Together);
    return threads[current].all;
}

void as_one(Together what, uint64_t mine, void (*act)(const std::array<uint64_t, WARP> &)) {
    Thread &t = threads[current];
    t.what = what, t.mask = ~0u, t.mine = mine, t.detail = 0, t.act = act;
    yield(State::Together);
}

void begin_copy(void *to, const void *from, unsigned bytes, unsigned there) {
    must_be_shared(to, bytes, bytes);
    if (reinterpret_cast<uintptr_t>(from) % bytes != 0)
        refuse("an asynchronous copy of " + std::to_string(bytes) + " bytes from an address that they do not divide");
    Thread &t = threads[current];
    const Copy copy{static_cast<unsigned char *>(to), static_cast<const unsigned char *>(from), bytes, there, t.groups};
    if (current_order == Order::Descending || (current_order == Order::Shuffled && chance() % 2))
        copy.land();
    else
        t.copies.push_back(copy);
}

void commit_copies() { threads[current].groups++; }

void wait_for_copies(unsigned left) {
    Thread &t = threads[current];
    auto is_awaited = [&](const Copy &copy) { return copy.group + left < t.groups; };
    auto rest = std::stable_partition(t.copies.begin(), t.copies.end(), is_awaited);
    std::for_each(t.copies.begin(), rest, [](const Copy &copy) { copy.land(); });
    t.copies.erase(t.copies.begin(), rest);
}

void must_be_shared(const void *address, size_t bytes, size_t alignment) {
    auto holds = [&](const std::vector<unsigned char> &array) {
        auto *begin = static_cast<const unsigned char *>(address);
        return begin >= array.data() && begin + bytes <= array.data() + array.size();
    };
    bool is_held = holds(dynamic);
    for (const auto &[tag, array] : shared_arrays)
        is_held = is_held || holds(array);
    if (!is_held)
        refuse(name_of(current) + " gives an address that is not shared memory of its block");
    if (reinterpret_cast<uintptr_t>(address) % alignment != 0)
        refuse(name_of(current) + " gives a misaligned address of shared memory");
}

void *shared(const void *tag, size_t bytes) {
    auto &array = shared_arrays[tag];
    if (array.empty()) {
        shared_bytes += bytes;
        if (shared_bytes > SHARED_LIMIT)
            refuse(std::to_string(shared_bytes) + " bytes of shared memory, and a block has " + std::to_string(SHARED_LIMIT));
        array.assign(bytes, poison);
    }
    return array.data();
}
void *dynamic_shared() { return dynamic.data(); }

std::map<std::string, Kernel> &kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}

void prepare(const Launch &l) {
    launch = &l;
    auto found = kernels().find(l.name);
    if (found == kernels().end())
        refuse("there is no kernel of this name");
    kernel = &found->second;
    // CUDA Programming Guide, "Technical Specifications per Compute Capability".
    const auto &[bx, by, bz] = l.block;
    const auto &[gx, gy, gz] = l.grid;
    uint64_t per_block = uint64_t(bx) * by * bz;
    if (per_block == 0 || per_block > 1024 || bz > 64 || gx == 0 || gy == 0 || gz == 0 || gx > 0x7FFFFFFF || gy > 65535 || gz > 65535)
        refuse("a launch of " + text(l.grid) + " blocks of " + text(l.block) + " threads is not possible");
    if (per_block > kernel->max_threads)
        refuse(std::to_string(per_block) + " threads a block, and its launch bound is " + std::to_string(kernel->max_threads));
    if (l.shared > SHARED_LIMIT)
        refuse(std::to_string(l.shared) + " bytes of shared memory, and a block has " + std::to_string(SHARED_LIMIT));
    if (l.arguments.size() != kernel->sizes.size())
        refuse(std::to_string(l.arguments.size()) + " arguments, and the kernel takes " + std::to_string(kernel->sizes.size()));
}

void run_once() {
    // What a process has of memory that nobody has written, it has by chance.
    poison = 0xA5;
    run_grid(Order::Ascending, 1);
}

#ifndef CUDA_SIM_LIBRARY
namespace {

unsigned char *poisoned(size_t bytes) {
    auto *memory = new unsigned char[bytes];
    memset(memory, poison, bytes);
    return memory;
}

/// A buffer of the launch.
struct Buffer {
    size_t argument;
    unsigned kind;
    std::vector<unsigned char> before;
    size_t bytes;
};

void read(void *into, size_t bytes) {
    if (bytes > 0 && fread(into, 1, bytes, stdin) != bytes) {
        fprintf(stderr, "cuda-sim: the launch is cut short\n");
        exit(2);
    }
}
template <class T> T take() {
    T value;
    read(&value, sizeof value);
    return value;
}

/// What one run leaves in the buffers, in order.
using Memory = std::vector<std::vector<unsigned char>>;

Memory run(Launch &l, const std::vector<Buffer> &buffers, Order order, unsigned char pattern) {
    poison = pattern;
    // Allocations of 16-byte alignment and no more than they need: an access beside one is seen.
    std::vector<std::unique_ptr<unsigned char[]>> memory;
    for (const Buffer &buffer : buffers) {
        memory.emplace_back(poisoned(buffer.bytes));
        if (buffer.kind != 2)
            memcpy(memory.back().get(), buffer.before.data(), buffer.bytes);
        auto address = memory.back().get();
        l.arguments[buffer.argument].value.assign(reinterpret_cast<unsigned char *>(&address), reinterpret_cast<unsigned char *>(&address + 1));
    }
    run_grid(order, 1);
    Memory after;
    for (size_t i = 0; i < buffers.size(); i++) {
        after.emplace_back(memory[i].get(), memory[i].get() + buffers[i].bytes);
        if (buffers[i].kind == 1 && after.back() != buffers[i].before)
            refuse("argument " + std::to_string(buffers[i].argument) + " is an input, and was written");
    }
    return after;
}

void compare(const std::vector<Buffer> &buffers, const Memory &expected, const Memory &found, const char *depends_on) {
    for (size_t i = 0; i < buffers.size(); i++)
        for (size_t byte = 0; byte < buffers[i].bytes; byte++)
            if (expected[i][byte] != found[i][byte])
                refuse("byte " + std::to_string(byte) + " of argument " + std::to_string(buffers[i].argument) + " depends on " + depends_on);
}

} // namespace
#endif
} // namespace sim

#ifndef CUDA_SIM_LIBRARY
int main(int count_of_words, char **words) {
    using namespace sim;
    if (count_of_words == 2 && words[1] == std::string("kernels")) {
        for (const auto &[name, kernel] : kernels()) {
            printf("%s", name.c_str());
            for (size_t bytes : kernel.sizes)
                printf(" %zu", bytes);
            printf("\n");
        }
        return 0;
    }
    constexpr unsigned char NAN_BYTES = 0xFF, SMALL_BYTES = 0x3B;
    Launch l;
    l.name.resize(take<uint64_t>());
    read(l.name.data(), l.name.size());
    l.grid = take<uint3>();
    l.block = take<uint3>();
    l.shared = take<unsigned>();
    auto count = take<unsigned>();
    std::vector<Buffer> buffers;
    for (size_t i = 0; i < count; i++) {
        auto kind = take<unsigned>();
        auto bytes = take<uint64_t>();
        std::vector<unsigned char> content(bytes);
        if (kind != 2)
            read(content.data(), bytes);
        l.arguments.push_back({kind == 0 ? content : std::vector<unsigned char>(sizeof(void *))});
        if (kind != 0)
            buffers.push_back({i, kind, content, bytes});
    }
    prepare(l);
    Memory first = run(l, buffers, Order::Ascending, NAN_BYTES);
    // One pattern in another place than the other's: nobody has written it.
    Memory second = run(l, buffers, Order::Ascending, SMALL_BYTES);
    for (size_t i = 0; i < buffers.size(); i++)
        for (size_t byte = 0; byte < buffers[i].bytes; byte++)
            if (buffers[i].kind == 2 && first[i][byte] == NAN_BYTES && second[i][byte] == SMALL_BYTES)
                refuse("byte " + std::to_string(byte) + " of argument " + std::to_string(buffers[i].argument) + ", an output, is not written, or with what nobody has written");
    compare(buffers, first, second, "what uninitialised memory holds");
    for (Order order : {Order::Descending, Order::Shuffled})
        for (unsigned char pattern : {NAN_BYTES, SMALL_BYTES})
            compare(buffers, first, run(l, buffers, order, pattern), "the order in which threads run: a barrier is missing");
    for (size_t i = 0; i < buffers.size(); i++)
        if (buffers[i].kind != 1)
            fwrite(first[i].data(), 1, first[i].size(), stdout);
    return 0;
}
#endif
