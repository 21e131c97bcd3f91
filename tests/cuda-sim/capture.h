// Streams of the machine's driver. One that captures keeps what is begun on it, with its arguments, and does not run it; the graph that
// comes of it runs all of it whenever it is launched: what was begun on one stream in that order, streams side by side as far as their
// events let them. Names in quotation marks are sections of NVIDIA's "CUDA Driver API" and "CUDA C++ Programming Guide"; what they prohibit
// while a stream captures is refused, and spoils the capture.
//
// A stream has a clock, by which what is begun on it takes as long as CUDA_SIM_WORK says (setting.h), in microseconds, each; where it waits
// for an event, it goes on at the later time of the two. That is what kernels see (`nanoseconds`), and not what events measure.
//
// The environment sets faults: CUDA_SIM_FAIL=begin, capture (the tenth thing that is begun) or instantiate is refused.
#pragma once

#include "cuda_sim.h"
#include "setting.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <thread>
#include <vector>

namespace sim {

/// CUresult
enum CaptureResult {
    CAPTURED = 0,
    CAPTURE_INVALID_VALUE = 1,
    CAPTURE_OUT_OF_MEMORY = 2,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_MERGE = 902,
    CAPTURE_UNMATCHED = 903,
    CAPTURE_UNJOINED = 904,
    CAPTURE_ISOLATION = 905,
    CAPTURED_EVENT = 907,
    CAPTURE_WRONG_THREAD = 908,
};

inline const char *text_of(int result) {
    switch (result) {
    case CAPTURE_UNSUPPORTED: return "operation not permitted when stream is capturing";
    case CAPTURE_INVALIDATED: return "operation failed due to a previous error during capture";
    case CAPTURE_MERGE: return "operation would result in a merge of separate capture sequences";
    case CAPTURE_UNMATCHED: return "capture was not ended in the same stream as it began";
    case CAPTURE_UNJOINED: return "capturing stream has unjoined work";
    case CAPTURE_ISOLATION: return "dependency created on uncaptured work in another stream";
    case CAPTURED_EVENT: return "operation not permitted on an event last recorded in a capturing stream";
    case CAPTURE_WRONG_THREAD: return "attempt to terminate a thread-local capture sequence from another thread";
    default: return nullptr;
    }
}

inline bool is_failing(const char *what) {
    const char *wanted = getenv("CUDA_SIM_FAIL");
    return wanted && !strcmp(wanted, what);
}

using Work = std::function<void()>;
/// Does its work, as far as that comes now, and gives whether it has ended.
using Slow = std::function<bool()>;
/// Makes the work of one launch.
using Maker = std::function<Slow()>;

struct Stream;

/// What was captured, and on which stream.
struct Captured {
    const Stream *stream;
    Maker make;
};
using Works = std::vector<Captured>;

/// CUgraph, and CUgraphExec.
struct Graph {
    std::shared_ptr<const Works> works;
};

/// CUstreamCaptureMode
enum Mode { GLOBAL = 0, THREAD_LOCAL = 1, RELAXED = 2 };

/// What has been begun between cuStreamBeginCapture and cuStreamEndCapture.
struct Capture {
    const Stream *origin;
    Mode mode;
    std::thread::id thread = std::this_thread::get_id();
    bool is_valid = true;
    Works works = {};
    /// Streams that have come in by an event, each with how often something was begun on it.
    std::map<Stream *, int> forks = {};
    /// Those of them whose work nothing waits for yet.
    std::set<Stream *> unjoined = {};
};

/// Nanoseconds.
using Clock = std::shared_ptr<uint64_t>;
/// That of the stream whose work runs now.
inline Clock clock_now = std::make_shared<uint64_t>(0);

/// Something has been computed.
inline void work() {
    static const std::string said = setting("CUDA_SIM_WORK");
    static const uint64_t microseconds = said.empty() ? 10 : strtoull(said.c_str(), nullptr, 10);
    *clock_now += 1000 * microseconds;
}

/// The same work, by a clock.
inline Maker by(Clock clock, Maker make) {
    return [=] {
        return [=, slow = make()]() mutable {
            clock_now = clock;
            return slow();
        };
    };
}

/// Work that takes no time.
inline Maker at_once_by(Clock clock, Work work) {
    return by(clock, [=]() -> Slow {
        return [=] {
            work();
            return true;
        };
    });
}

/// CUstream. The only kind is CU_STREAM_NON_BLOCKING, which the legacy stream neither waits for nor keeps waiting.
struct Stream {
    std::shared_ptr<Capture> capture = nullptr;
    /// What it has not done yet.
    std::deque<Slow> left = {};
    Clock clock = std::make_shared<uint64_t>(0);
};

/// All that are not destroyed, or that were before their work had ended.
inline std::set<Stream *> streams;

/// Goes on with all streams as far as they come.
inline void go_on() {
    for (bool is_moving = true; is_moving;) {
        is_moving = false;
        for (Stream *stream : streams)
            for (; !stream->left.empty() && stream->left.front()(); is_moving = true)
                stream->left.pop_front();
    }
}

/// How often graphs have come past a record of an event, and when by its stream's clock the last time.
struct Passed {
    uint64_t count = 0, time = 0;
};

/// Where a stream that captures was when an event was recorded there.
struct Mark {
    std::weak_ptr<Capture> capture = {};
    Stream *stream = nullptr;
    int begun = 0;
    std::shared_ptr<Passed> passed = nullptr;
};

/// Those that have begun and not ended.
inline std::set<Capture *> captures;

inline int spoil(Capture &capture, int result) {
    // "Invalidation": "When an invalid operation is attempted during stream capture, any associated capture graphs are invalidated".
    capture.is_valid = false;
    return result;
}

/// Whether nothing begins before it is waited for, as on a GPU that is busy: what the host changes too early is then seen.
inline bool is_busy() {
    static const bool said = getenv("CUDA_SIM_BUSY") != nullptr;
    return said;
}

/// Begins what `make` makes, which is asked again until it has ended: it waits for another stream or for another process. Where the stream
/// captures, `make` is kept.
inline int begin_slow(void *on, Maker make) {
    auto *stream = static_cast<Stream *>(on);
    if (!stream)
        return CAPTURE_INVALID_VALUE;
    make = by(stream->clock, std::move(make));
    if (!stream->capture) {
        stream->left.push_back(make());
        if (!is_busy())
            go_on();
        return CAPTURED;
    }
    Capture &capture = *stream->capture;
    // "Invalidation": "further use of any streams which are being captured ... is invalid and will return an error".
    if (!capture.is_valid)
        return CAPTURE_INVALIDATED;
    if (is_failing("capture") && capture.works.size() >= 9)
        return spoil(capture, CAPTURE_UNSUPPORTED);
    capture.works.push_back({stream, std::move(make)});
    if (stream != capture.origin) {
        capture.forks[stream]++;
        capture.unjoined.insert(stream);
    }
    return CAPTURED;
}

/// Runs `work` in the order of the stream, or keeps it where that captures.
inline int begin(void *on, Work work) {
    if (on)
        return begin_slow(on, [work = std::move(work)]() -> Slow {
            return [work] {
                work();
                return true;
            };
        });
    // The order of that stream among the others is not needed here.
    work();
    return CAPTURED;
}

/// An event is recorded on a stream: where, if that captures.
inline int mark(void *on, Mark *mark) {
    auto *stream = static_cast<Stream *>(on);
    *mark = {};
    if (!stream || !stream->capture)
        return CAPTURED;
    if (!stream->capture->is_valid)
        return CAPTURE_INVALIDATED;
    const auto passed = std::make_shared<Passed>();
    *mark = {stream->capture, stream, stream == stream->capture->origin ? 0 : stream->capture->forks[stream], passed};
    stream->capture->works.push_back({stream, at_once_by(stream->clock, [=] { *passed = {passed->count + 1, *clock_now}; })});
    return CAPTURED;
}

/// A stream waits for an event: "Cross-stream Dependencies and Events".
inline int wait_for(void *on, const Mark &mark) {
    auto *stream = static_cast<Stream *>(on);
    const std::shared_ptr<Capture> capture = mark.capture.lock();
    if (!stream || (!capture && !stream->capture))
        return CAPTURED;
    // CUDA_ERROR_STREAM_CAPTURE_ISOLATION: "A dependency would have been created which crosses the capture sequence boundary".
    if (!capture)
        return spoil(*stream->capture, CAPTURE_ISOLATION);
    // "It is invalid to merge two separate capture graphs by waiting on a captured event from a stream which is being captured and is
    // associated with a different capture graph than the event".
    if (stream->capture && stream->capture != capture)
        return spoil(*stream->capture, spoil(*capture, CAPTURE_MERGE));
    if (!capture->is_valid)
        return CAPTURE_INVALIDATED;
    if (!stream->capture) {
        // It "must be joined back to the origin stream", even where nothing is begun on it.
        stream->capture = capture;
        capture->forks[stream] = 0;
        capture->unjoined.insert(stream);
    }
    capture->works.push_back({stream, by(stream->clock, [passed = mark.passed, launches = std::make_shared<uint64_t>(0)]() -> Slow {
        return [passed, wanted = ++*launches] {
            *clock_now = std::max(*clock_now, passed->time);
            return passed->count >= wanted;
        };
    })});
    if (stream != mark.stream && mark.stream != capture->origin && capture->forks[mark.stream] == mark.begun)
        capture->unjoined.erase(mark.stream);
    return CAPTURED;
}

/// Whether the host may wait for an event. "Prohibited and Unhandled Operations": "It is invalid to synchronize or query the execution
/// status of ... a captured event".
inline int must_not_be_captured(const Mark &mark) {
    if (!mark.stream)
        return CAPTURED;
    if (const std::shared_ptr<Capture> capture = mark.capture.lock())
        spoil(*capture, CAPTURED_EVENT);
    return CAPTURED_EVENT;
}

/// Whether the host may wait for a stream. "Prohibited and Unhandled Operations": "It is invalid to synchronize or query the execution
/// status of a stream which is being captured".
inline int must_not_capture(void *on) {
    auto *stream = static_cast<Stream *>(on);
    return stream && stream->capture ? spoil(*stream->capture, CAPTURE_UNSUPPORTED) : int(CAPTURED);
}

/// Whether the host may wait for the context. The same: "It is also invalid to query the execution status of or synchronize a broader
/// handle which encompasses an active stream capture, such as a device or context handle".
inline int no_stream_must_capture() {
    for (Capture *capture : captures)
        spoil(*capture, CAPTURE_UNSUPPORTED);
    return captures.empty() ? int(CAPTURED) : int(CAPTURE_UNSUPPORTED);
}

/// Whether this thread may do what happens at once and not on a stream: allocate, free, load a module.
/// cuThreadExchangeStreamCaptureMode: "If the local thread has an ongoing capture sequence not initiated with
/// CU_STREAM_CAPTURE_MODE_RELAXED, it is prohibited from potentially unsafe API calls", and also "if any other thread has a concurrent
/// capture sequence initiated with CU_STREAM_CAPTURE_MODE_GLOBAL".
inline int is_safe() {
    int result = CAPTURED;
    for (Capture *capture : captures)
        if (capture->mode == GLOBAL || (capture->mode == THREAD_LOCAL && capture->thread == std::this_thread::get_id()))
            result = spoil(*capture, CAPTURE_UNSUPPORTED);
    return result;
}

inline int begin_capture(void *on, int mode) {
    auto *stream = static_cast<Stream *>(on);
    if (is_failing("begin"))
        return CAPTURE_UNSUPPORTED;
    // cuStreamBeginCapture: "Capture may not be initiated if stream is CU_STREAM_LEGACY", and "only if the stream is not already in capture
    // mode".
    if (!stream || stream->capture || mode < GLOBAL || mode > RELAXED)
        return CAPTURE_INVALID_VALUE;
    stream->capture = std::make_shared<Capture>(Capture{stream, Mode(mode)});
    captures.insert(stream->capture.get());
    return CAPTURED;
}

inline int end_capture(void *on, Graph **graph) {
    auto *stream = static_cast<Stream *>(on);
    *graph = nullptr;
    // cuStreamEndCapture: "Capture must have been initiated on stream via a call to cuStreamBeginCapture".
    if (!stream || !stream->capture)
        return CAPTURE_INVALID_VALUE;
    std::shared_ptr<Capture> capture = stream->capture;
    if (capture->origin != stream)
        return CAPTURE_UNMATCHED;
    // The same: "If the mode argument to cuStreamBeginCapture was not CU_STREAM_CAPTURE_MODE_RELAXED, this call must be from the same
    // thread".
    if (capture->mode != RELAXED && capture->thread != std::this_thread::get_id())
        return CAPTURE_WRONG_THREAD;
    captures.erase(capture.get());
    stream->capture = nullptr;
    for (auto &[other, _] : capture->forks)
        other->capture = nullptr;
    // The same: "If capture was invalidated, due to a violation of the rules of stream capture, then a NULL graph will be returned".
    if (!capture->is_valid)
        return CAPTURE_INVALIDATED;
    // CUDA_ERROR_STREAM_CAPTURE_UNJOINED: "the capture contains a fork that was not joined to the primary stream".
    if (!capture->unjoined.empty())
        return CAPTURE_UNJOINED;
    *graph = new Graph{std::make_shared<Works>(std::move(capture->works))};
    return CAPTURED;
}

/// CUgraphInstantiate_flags
enum Flags : uint64_t { AUTO_FREE_ON_LAUNCH = 1, DEVICE_LAUNCH = 4, USE_NODE_PRIORITY = 8 };

/// Of the last graph that was instantiated, for tests.
inline uint64_t flags_of_last = 0;

inline int instantiate(Graph **executable, const Graph *graph, uint64_t flags) {
    if (is_failing("instantiate"))
        return CAPTURE_OUT_OF_MEMORY;
    // cuGraphInstantiate: the flags above are valid; DEVICE_LAUNCH "cannot be used in conjunction with" AUTO_FREE_ON_LAUNCH. This machine's
    // graphs cannot be launched from the device.
    if (!graph || flags & ~(AUTO_FREE_ON_LAUNCH | USE_NODE_PRIORITY))
        return CAPTURE_INVALID_VALUE;
    flags_of_last = flags;
    *executable = new Graph{*graph};
    return CAPTURED;
}

/// Launches of graphs so far, for tests.
inline unsigned long long launches = 0;

inline int launch(const Graph *executable, void *stream) {
    launches++;
    // Its works, and not the graph, which may be gone when what captured this launch is launched.
    return begin_slow(stream, [works = executable->works]() -> Slow {
        std::map<const Stream *, std::deque<Slow>> left;
        for (const Captured &captured : *works)
            left[captured.stream].push_back(captured.make());
        return [left = std::move(left)]() mutable {
            bool is_over = true;
            for (bool is_moving = true; is_moving;) {
                is_moving = false, is_over = true;
                for (auto &[_, of_stream] : left) {
                    for (; !of_stream.empty() && of_stream.front()(); is_moving = true)
                        of_stream.pop_front();
                    is_over = is_over && of_stream.empty();
                }
            }
            return is_over;
        };
    });
}

} // namespace sim
