// libcudnn.so.9 of the machine made of software: the calls of its backend interface that this project makes, for graphs of one convolution
// and sums after it. What the real library refuses is refused, with the rule beside it: names in quotation marks are sections of NVIDIA's
// "cudnn_graph Library". Executions run at once, on the driver's memory, or with the graph that their stream captures.
//
// The environment sets faults:
//   CUDA_SIM_CUDNN_VERSION=8907       what cudnnGetVersion says
//   CUDA_SIM_CUDNN_FAIL=execute       create, finalize or execute fails; allocate: an execution takes memory, which no capture allows
//   CUDA_SIM_CUDNN_KILLED=1           the process is, at the search of that number
//   CUDA_SIM_CUDNN_WAIT=8000          the first search takes so many milliseconds
//   CUDA_SIM_CUDNN_WITHOUT=beta,wide  no engine adds to an output (beta), fuses (fusion), or writes weight gradients of bf16 in f32 (wide)
//                                     or bf16 (narrow)
//   CUDA_SIM_CUDNN_ENGINES=5,7        heuristics propose these only
//   CUDA_SIM_CUDNN_SLOW=8             these take 10 s longer, by the GPU's clock
// Each search and each plan is a line of the log (setting.h): `searches`, or `plans engine 8`.

#include "convolution.h"
#include "cuda_sim.h"
#include "setting.h"
#include "stream.h"

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <set>
#include <sstream>
#include <thread>

namespace {

/// cudnnStatus_t
enum Status {
    SUCCESS = 0,
    NOT_INITIALIZED = 1001,
    BAD_PARAM = 2000,
    NULL_POINTER = 2002,
    MISALIGNED_POINTER = 2003,
    NOT_FINALIZED = 2004,
    SHAPE_MISMATCH = 2008,
    DUPLICATED_ENTRIES = 2009,
    ATTRIBUTE_TYPE = 2010,
    DESCRIPTOR_TYPE = 2012,
    NOT_SUPPORTED = 3000,
    GRAPH_PATTERN = 3001,
    DATA_TYPE_NOT_SUPPORTED = 3003,
    LAYOUT_NOT_SUPPORTED = 3004,
    INTERNAL_ERROR = 4000,
    EXECUTION_FAILED = 5000,
};
/// cudnnBackendAttributeType_t, and the bytes of a value.
enum Type {
    HANDLE = 0,
    DATA_TYPE = 1,
    BOOLEAN = 2,
    INT64 = 3,
    FLOAT = 4,
    VOID_PTR = 6,
    CONVOLUTION_MODE = 7,
    HEUR_MODE = 8,
    KNOB_TYPE = 9,
    NUMERICAL_NOTE = 11,
    POINTWISE_MODE = 14,
    DESCRIPTOR = 15,
    BEHAVIOR_NOTE = 19,
};
size_t size_of(int type) {
    if (type == BOOLEAN)
        return 1;
    return type == HANDLE || type == INT64 || type == VOID_PTR || type == DESCRIPTOR ? 8 : 4;
}
/// cudnnBackendDescriptorType_t
enum Kind {
    POINTWISE = 0,
    CONVOLUTION = 1,
    ENGINE = 2,
    ENGINECFG = 3,
    ENGINEHEUR = 4,
    PLAN = 5,
    KNOB_CHOICE = 7,
    FORWARD = 10,
    BWD_FILTER = 11,
    BWD_DATA = 12,
    ADDITION = 13,
    GRAPH = 15,
    PACK = 16,
    TENSOR = 17,
    ANY_OPERATION = -1,
    NONE = -2,
};
/// cudnnBackendAttributeName_t
enum Name {
    POINTWISE_MODE_NAME = 0,
    POINTWISE_MATH_PREC = 1,
    CONV_COMP_TYPE = 100,
    CONV_MODE,
    CONV_DILATIONS,
    CONV_STRIDES,
    CONV_POST,
    CONV_PRE,
    CONV_DIMS,
    HEUR_MODE_NAME = 200,
    HEUR_GRAPH,
    HEUR_RESULTS,
    CFG_ENGINE = 300,
    CFG_KNOBS = 302,
    PLAN_HANDLE = 400,
    PLAN_CONFIG,
    PLAN_WORKSPACE,
    KNOB_CHOICE_TYPE = 600,
    KNOB_CHOICE_VALUE,
    // The three passes have the same attributes in the same order.
    FORWARD_FIRST = 700,
    BWD_DATA_FIRST = 706,
    BWD_FILTER_FIRST = 712,
    ADDITION_POINTWISE = 750,
    ADDITION_X,
    ADDITION_B,
    ADDITION_Y,
    GRAPH_HANDLE = 800,
    GRAPH_OPS,
    TENSOR_ALIGNMENT = 900,
    TENSOR_TYPE,
    TENSOR_DIMS,
    TENSOR_STRIDES,
    TENSOR_ID = 906,
    TENSOR_VIRTUAL,
    PACK_IDS = 1000,
    PACK_POINTERS,
    PACK_WORKSPACE = 1003,
    ENGINE_GRAPH = 1300,
    ENGINE_INDEX,
    ENGINE_NOTES = 1303,
    ENGINE_BEHAVIOR = 1305,
};
enum PassAttribute { ALPHA, BETA, CONV, W, X, Y };
/// cudnnDataType_t
enum { F32 = 0, BF16 = 9 };
/// cudnnBackendNumericalNote_t
enum { TENSOR_CORE = 0, DOWN_CONVERT = 1, NONDETERMINISTIC = 4, WINOGRAD = 5, WINOGRAD_TILE_4x4 = 6 };
/// cudnnBackendBehaviorNote_t
const std::vector<int> RUNTIME_COMPILATION = {0};

/// An attribute that a descriptor of a kind has: "Backend Descriptor Types". Those of no values are computed.
struct Rule {
    int name, type;
    int64_t least, most;
    bool is_required;
    int kind = NONE;
};
Rule one(int name, int type, int kind = NONE) { return {name, type, 1, 1, true, kind}; }
Rule some(int name, int type, int64_t most, int kind = NONE) { return {name, type, 1, most, true, kind}; }
Rule optional(Rule rule) { return {rule.name, rule.type, rule.least, rule.most, false, rule.kind}; }
Rule computed(int name, int type, int kind = NONE) { return {name, type, 0, 0, false, kind}; }
std::vector<Rule> of_pass(int first) {
    return {one(first + ALPHA, FLOAT),
            one(first + BETA, FLOAT),
            one(first + CONV, DESCRIPTOR, CONVOLUTION),
            one(first + W, DESCRIPTOR, TENSOR),
            one(first + X, DESCRIPTOR, TENSOR),
            one(first + Y, DESCRIPTOR, TENSOR)};
}
const std::map<int, std::vector<Rule>> RULES = {
    {TENSOR,
     {one(TENSOR_TYPE, DATA_TYPE), some(TENSOR_DIMS, INT64, 8), some(TENSOR_STRIDES, INT64, 8), one(TENSOR_ID, INT64),
      one(TENSOR_ALIGNMENT, INT64), optional(one(TENSOR_VIRTUAL, BOOLEAN))}},
    {POINTWISE, {one(POINTWISE_MODE_NAME, POINTWISE_MODE), one(POINTWISE_MATH_PREC, DATA_TYPE)}},
    {CONVOLUTION,
     {one(CONV_COMP_TYPE, DATA_TYPE), one(CONV_MODE, CONVOLUTION_MODE), one(CONV_DIMS, INT64), some(CONV_DILATIONS, INT64, 6),
      some(CONV_STRIDES, INT64, 6), some(CONV_PRE, INT64, 6), some(CONV_POST, INT64, 6)}},
    {FORWARD, of_pass(FORWARD_FIRST)},
    {BWD_DATA, of_pass(BWD_DATA_FIRST)},
    {BWD_FILTER, of_pass(BWD_FILTER_FIRST)},
    {ADDITION,
     {one(ADDITION_POINTWISE, DESCRIPTOR, POINTWISE), one(ADDITION_X, DESCRIPTOR, TENSOR), one(ADDITION_B, DESCRIPTOR, TENSOR),
      one(ADDITION_Y, DESCRIPTOR, TENSOR)}},
    {GRAPH, {one(GRAPH_HANDLE, HANDLE), some(GRAPH_OPS, DESCRIPTOR, 100, ANY_OPERATION)}},
    {ENGINEHEUR, {one(HEUR_GRAPH, DESCRIPTOR, GRAPH), one(HEUR_MODE_NAME, HEUR_MODE), computed(HEUR_RESULTS, DESCRIPTOR, ENGINECFG)}},
    {ENGINE,
     {one(ENGINE_GRAPH, DESCRIPTOR, GRAPH), one(ENGINE_INDEX, INT64), computed(ENGINE_NOTES, NUMERICAL_NOTE),
      computed(ENGINE_BEHAVIOR, BEHAVIOR_NOTE)}},
    {KNOB_CHOICE, {one(KNOB_CHOICE_TYPE, KNOB_TYPE), one(KNOB_CHOICE_VALUE, INT64)}},
    {ENGINECFG, {one(CFG_ENGINE, DESCRIPTOR, ENGINE), optional(some(CFG_KNOBS, DESCRIPTOR, 44, KNOB_CHOICE))}},
    {PLAN, {one(PLAN_HANDLE, HANDLE), one(PLAN_CONFIG, DESCRIPTOR, ENGINECFG), computed(PLAN_WORKSPACE, INT64)}},
    {PACK, {some(PACK_IDS, INT64, 100), some(PACK_POINTERS, VOID_PTR, 100), one(PACK_WORKSPACE, VOID_PTR)}},
};

struct Attribute {
    int64_t count;
    std::vector<unsigned char> bytes;
};
struct Descriptor {
    int kind;
    bool is_finalized = false;
    std::map<int, Attribute> attributes = {};
    /// What the library has made itself, for those that it gives out.
    std::vector<std::shared_ptr<Descriptor>> made = {};

    template <class T> std::vector<T> all(int name) const {
        auto found = attributes.find(name);
        if (found == attributes.end())
            return {};
        std::vector<T> values(size_t(found->second.count));
        memcpy(values.data(), found->second.bytes.data(), found->second.bytes.size());
        return values;
    }
    template <class T> T one(int name) const { return all<T>(name).at(0); }
    Descriptor *part(int name) const { return one<Descriptor *>(name); }
    template <class T> void put(int name, const std::vector<T> &values) {
        auto *bytes = reinterpret_cast<const unsigned char *>(values.data());
        attributes[name] = {int64_t(values.size()), {bytes, bytes + values.size() * sizeof(T)}};
    }
};
struct Handle {
    void *stream = nullptr;
};

// Never freed: they outlive whatever a program leaves to its end.
std::set<const Descriptor *> &live = *new std::set<const Descriptor *>;
std::set<const Handle *> &handles = *new std::set<const Handle *>;
thread_local std::string said;

int refuse(int status, const std::string &why) {
    said = why;
    return status;
}
/// What a real library answers with a crash.
[[noreturn]] void crash(const std::string &why) {
    fprintf(stderr, "cuda-sim: cuDNN: %s\n", why.c_str());
    abort();
}

std::string setting(const std::string &name) { return sim::setting("CUDA_SIM_CUDNN_" + name); }
using sim::lists;
using sim::note;
bool fails(const char *phase) { return setting("FAIL") == phase; }
bool is_without(const char *feature) { return lists(setting("WITHOUT"), feature); }

/// How an engine goes wrong.
enum class Fault { None, OtherBits, Larger, Rounded, SkipsAnImage, Unwritten, FailsToBuild, FailsToRun };
struct Engine {
    int64_t index;
    Fault fault;
    std::vector<int> notes;
    size_t workspace;
    bool has_knob, fuses;
};
constexpr int TILE_SIZE = 2;
constexpr int64_t LARGEST_TILE = 3;
/// The engines of both precisions.
std::vector<Engine> engines(int precision) {
    const bool is_f32 = precision == F32;
    const std::vector<int> of_cores = is_f32 ? std::vector<int>{TENSOR_CORE, DOWN_CONVERT} : std::vector<int>{TENSOR_CORE};
    const std::vector<int> honest = is_f32 ? std::vector<int>{} : of_cores;
    return {
        {0, Fault::OtherBits, {NONDETERMINISTIC}, 0, false, true},
        {1, Fault::Larger, {WINOGRAD, WINOGRAD_TILE_4x4}, 0, false, true},
        {2, Fault::Larger, honest, size_t(1) << 30, false, !is_f32},
        {3, Fault::FailsToBuild, honest, 0, false, !is_f32},
        {4, is_f32 ? Fault::Rounded : Fault::None, of_cores, 0, true, true},
        {5, Fault::SkipsAnImage, honest, 0, false, !is_f32},
        {6, Fault::None, honest, 1000, true, true},
        {7, Fault::OtherBits, honest, 0, false, !is_f32},
        {8, Fault::None, honest, 0, false, true},
        {9, Fault::FailsToRun, honest, 0, false, !is_f32},
        {10, Fault::Unwritten, honest, 0, false, !is_f32},
        // In bf16 there is nothing left to round.
        {11, Fault::Rounded, honest, 0, false, !is_f32},
    };
}
/// What heuristics propose, best first: mode A (3), B (1), the fallback (2).
std::vector<int64_t> proposed(int mode) {
    switch (mode) {
    case 3: return {0, 1, 2, 3, 4, 6};
    case 1: return {4, 5, 7, 9, 10, 11};
    default: return {8};
    }
}

int precision_of(const Descriptor *tensor) { return tensor->one<int>(TENSOR_TYPE); }
bool is_virtual(const Descriptor *tensor) {
    auto values = tensor->all<unsigned char>(TENSOR_VIRTUAL);
    return !values.empty() && values[0] != 0;
}
std::vector<int64_t> dims(const Descriptor *tensor) { return tensor->all<int64_t>(TENSOR_DIMS); }
int64_t elements(const Descriptor *tensor) {
    int64_t product = 1;
    for (int64_t size : dims(tensor))
        product *= size;
    return product;
}
size_t bytes_of(const Descriptor *tensor) { return size_t(elements(tensor)) * (precision_of(tensor) == F32 ? 4 : 2); }

/// A convolution in any of the three passes.
struct Pass {
    const Descriptor *operation, *convolution, *x, *weights, *y;
    float alpha, beta;
    const Descriptor *output() const { return operation->kind == FORWARD ? y : operation->kind == BWD_DATA ? x : weights; }
};
Pass pass_of(const Descriptor *d) {
    const int first = d->kind == FORWARD ? FORWARD_FIRST : d->kind == BWD_DATA ? BWD_DATA_FIRST : BWD_FILTER_FIRST;
    auto part = [&](int name) { return d->part(first + name); };
    return {d, part(CONV), part(X), part(W), part(Y), d->one<float>(first + ALPHA), d->one<float>(first + BETA)};
}
bool is_convolution(int kind) { return kind == FORWARD || kind == BWD_DATA || kind == BWD_FILTER; }

int check_tensor(const Descriptor *d) {
    auto sizes = dims(d), strides = d->all<int64_t>(TENSOR_STRIDES);
    // "CUDNN_BACKEND_TENSOR_DESCRIPTOR", return values of its finalization.
    if (sizes.size() != strides.size())
        return refuse(BAD_PARAM, std::to_string(sizes.size()) + " sizes and " + std::to_string(strides.size()) + " strides");
    if (*std::min_element(sizes.begin(), sizes.end()) <= 0 || *std::min_element(strides.begin(), strides.end()) <= 0)
        return refuse(BAD_PARAM, "a size or a stride that is not positive");
    int64_t alignment = d->one<int64_t>(TENSOR_ALIGNMENT);
    int type = precision_of(d);
    if (type != F32 && type != BF16)
        return refuse(DATA_TYPE_NOT_SUPPORTED, "this machine has f32 and bf16 only");
    if (alignment <= 0 || alignment % (type == F32 ? 4 : 2) != 0)
        return refuse(BAD_PARAM, "an alignment of " + std::to_string(alignment));
    return SUCCESS;
}

int check_convolution(const Descriptor *d) {
    // "CUDNN_BACKEND_CONVOLUTION_DESCRIPTOR": as many dilations, strides and paddings as spatial dimensions.
    auto count = d->one<int64_t>(CONV_DIMS);
    for (int name : {CONV_DILATIONS, CONV_STRIDES, CONV_PRE, CONV_POST})
        if (int64_t(d->all<int64_t>(name).size()) != count)
            return refuse(BAD_PARAM, "attribute " + std::to_string(name) + " does not have " + std::to_string(count) + " values");
    for (int name : {CONV_DILATIONS, CONV_STRIDES})
        for (int64_t value : d->all<int64_t>(name))
            if (value < 1)
                return refuse(BAD_PARAM, "a stride or a dilation below 1");
    return SUCCESS;
}

int check_pass(const Descriptor *d) {
    const Pass pass = pass_of(d);
    auto x = dims(pass.x), weights = dims(pass.weights), y = dims(pass.y);
    if (x.size() != 4 || weights.size() != 4 || y.size() != 4)
        return refuse(BAD_PARAM, "this machine convolves pictures only: four sizes");
    // "CUDNN_BACKEND_OPERATION_CONVOLUTION_FORWARD_DESCRIPTOR": sizes of y follow from the others', and backward likewise.
    auto strides = pass.convolution->all<int64_t>(CONV_STRIDES), dilations = pass.convolution->all<int64_t>(CONV_DILATIONS);
    auto before = pass.convolution->all<int64_t>(CONV_PRE), after = pass.convolution->all<int64_t>(CONV_POST);
    if (strides.size() != 2 || x[0] != y[0] || x[1] != weights[1] || y[1] != weights[0])
        return refuse(SHAPE_MISMATCH, "images or channels that do not fit");
    for (size_t i = 0; i < 2; i++)
        if (y[2 + i] != 1 + (x[2 + i] + before[i] + after[i] - (weights[2 + i] - 1) * dilations[i] - 1) / strides[i])
            return refuse(SHAPE_MISMATCH, "rows or columns that do not fit");
    // "Supported Tensor Layouts" and "Mixed Input and Output Types": f32 or bf16 all over; f32 may come out, also in what is virtual.
    const Descriptor *inputs[] = {pass.output() == pass.x ? pass.weights : pass.x, pass.output() == pass.y ? pass.weights : pass.y};
    if (precision_of(inputs[0]) != precision_of(inputs[1]))
        return refuse(BAD_PARAM, "operands of two types");
    const bool is_wide = precision_of(pass.output()) != precision_of(inputs[0]);
    if (is_wide && (precision_of(pass.output()) != F32 || (d->kind == BWD_FILTER && is_without("wide"))))
        return refuse(BAD_PARAM, "an output of another type than the operands");
    if (is_wide && d->kind != BWD_FILTER && !is_virtual(pass.output()))
        return refuse(BAD_PARAM, "an output of another type than the operands");
    if (is_virtual(inputs[0]) || is_virtual(inputs[1]) || (is_virtual(pass.output()) && pass.beta != 0))
        return refuse(BAD_PARAM, "a virtual tensor that would be read from memory");
    return SUCCESS;
}

int check_addition(const Descriptor *d) {
    // "CUDNN_BACKEND_OPERATION_POINTWISE_DESCRIPTOR": b has y's sizes, or 1 where it is broadcast; cudnnPointwiseMode_t 0 is the sum.
    auto x = dims(d->part(ADDITION_X)), b = dims(d->part(ADDITION_B)), y = dims(d->part(ADDITION_Y));
    if (d->part(ADDITION_POINTWISE)->one<int>(POINTWISE_MODE_NAME) != 0)
        return refuse(NOT_SUPPORTED, "this machine adds only");
    if (x != y || b.size() != y.size())
        return refuse(SHAPE_MISMATCH, "a sum of tensors of two shapes");
    for (size_t i = 0; i < b.size(); i++)
        if (b[i] != y[i] && b[i] != 1)
            return refuse(SHAPE_MISMATCH, "a sum of tensors of two shapes");
    return SUCCESS;
}

int check_graph(const Descriptor *d) {
    auto operations = d->all<Descriptor *>(GRAPH_OPS);
    if (!handles.count(d->one<Handle *>(GRAPH_HANDLE)))
        return refuse(BAD_PARAM, "a graph of no handle");
    // "Graphs": tensors connect operations; the machine knows a convolution and sums after it.
    if (!is_convolution(operations[0]->kind))
        return refuse(GRAPH_PATTERN, "no convolution comes first");
    const Descriptor *last = pass_of(operations[0]).output();
    for (size_t i = 1; i < operations.size(); i++) {
        const bool is_forward = operations[0]->kind == FORWARD && operations[i]->kind == ADDITION;
        if (!is_forward || operations[i]->part(ADDITION_X) != last || !is_virtual(last))
            return refuse(GRAPH_PATTERN, "a sum that does not continue what is before it");
        last = operations[i]->part(ADDITION_Y);
    }
    if (is_virtual(last))
        return refuse(BAD_PARAM, "a graph without an output");
    return SUCCESS;
}

/// The type of what a graph reads.
int precision_of_graph(const Descriptor *graph) {
    const Pass pass = pass_of(graph->all<Descriptor *>(GRAPH_OPS)[0]);
    return precision_of(pass.operation->kind == FORWARD ? pass.x : pass.y);
}

/// Whether it gives f32 weight gradients of bf16.
bool is_wide_gradient(const Pass &pass) {
    return pass.operation->kind == BWD_FILTER && precision_of(pass.output()) != precision_of(pass.y);
}

/// The engine, if the graph has it.
const Engine *engine_of(const Descriptor *graph, int64_t index) {
    static std::map<int, std::vector<Engine>> all = {{F32, engines(F32)}, {BF16, engines(BF16)}};
    auto operations = graph->all<Descriptor *>(GRAPH_OPS);
    const bool is_fused = operations.size() > 1;
    if ((is_fused && is_without("fusion")) || (pass_of(operations[0]).beta != 0 && is_without("beta")))
        return nullptr;
    // cuDNN 9.19, of a sum with a bias before one with a tensor like y: "!(addOp->getBDesc()->isSimilarTo(yDesc))". Engines that compile
    // have it; here, none.
    if (operations.size() > 2 && dims(operations[1]->part(ADDITION_B)) != dims(operations[1]->part(ADDITION_Y)))
        return nullptr;
    // It has one engine that writes f32 weight gradients of bf16, which is not tuned, and proposed when all others have refused.
    const bool is_wide = is_wide_gradient(pass_of(operations[0]));
    const bool is_narrow = operations[0]->kind == BWD_FILTER && precision_of_graph(graph) == BF16 && !is_wide;
    if ((is_wide && index != 8) || (is_narrow && is_without("narrow")))
        return nullptr;
    // "Supported Tensor Layouts": this machine's engines have NHWC.
    for (const Descriptor *tensor : {pass_of(operations[0]).x, pass_of(operations[0]).weights, pass_of(operations[0]).y}) {
        auto size = dims(tensor);
        const std::vector<int64_t> strides = {size[1] * size[2] * size[3], 1, size[3] * size[1], size[1]};
        if (tensor->all<int64_t>(TENSOR_STRIDES) != strides)
            return nullptr;
    }
    for (const Engine &engine : all[precision_of_graph(graph)])
        if (engine.index == index && (!is_fused || engine.fuses))
            return &engine;
    return nullptr;
}
const Engine *engine_of(const Descriptor *plan) {
    const Descriptor *engine = plan->part(PLAN_CONFIG)->part(CFG_ENGINE);
    return engine_of(engine->part(ENGINE_GRAPH), engine->one<int64_t>(ENGINE_INDEX));
}

int check_engine(Descriptor *d) {
    const Engine *engine = engine_of(d->part(ENGINE_GRAPH), d->one<int64_t>(ENGINE_INDEX));
    if (!engine)
        return refuse(NOT_SUPPORTED, "no engine " + std::to_string(d->one<int64_t>(ENGINE_INDEX)) + " for this graph");
    d->put(ENGINE_NOTES, engine->notes);
    d->put(ENGINE_BEHAVIOR, engine->fuses ? RUNTIME_COMPILATION : std::vector<int>{});
    return SUCCESS;
}

int check_config(const Descriptor *d) {
    const Descriptor *engine = d->part(CFG_ENGINE);
    auto knobs = d->all<Descriptor *>(CFG_KNOBS);
    const bool has_knob = engine_of(engine->part(ENGINE_GRAPH), engine->one<int64_t>(ENGINE_INDEX))->has_knob;
    // "CUDNN_BACKEND_ENGINECFG_DESCRIPTOR": a choice is one of the engine's knobs, within its bounds.
    for (const Descriptor *knob : knobs) {
        auto value = knob->one<int64_t>(KNOB_CHOICE_VALUE);
        if (!has_knob || knob->one<int>(KNOB_CHOICE_TYPE) != TILE_SIZE || value < 0 || value > LARGEST_TILE)
            return refuse(BAD_PARAM, "a knob that the engine does not have, or a value beyond its bounds");
    }
    return SUCCESS;
}

/// What a process may meet when it searches.
void begin_search() {
    static int searches = 0;
    ++searches;
    if (setting("KILLED") == std::to_string(searches))
        raise(SIGKILL);
    if (const std::string wait = setting("WAIT"); searches == 1 && !wait.empty())
        std::this_thread::sleep_for(std::chrono::milliseconds(std::stoi(wait)));
}

std::shared_ptr<Descriptor> made(int kind) {
    std::shared_ptr<Descriptor> descriptor(new Descriptor{kind, true}, [](Descriptor *d) {
        live.erase(d);
        delete d;
    });
    live.insert(descriptor.get());
    return descriptor;
}

int propose(Descriptor *d) {
    const int mode = d->one<int>(HEUR_MODE_NAME);
    // cudnnBackendHeurMode_t: 0 is an old name of mode A.
    if (mode < 1 || mode > 3)
        return refuse(BAD_PARAM, "no such mode");
    note("searches");
    begin_search();
    std::vector<Descriptor *> results;
    for (int64_t index : proposed(mode)) {
        if (!setting("ENGINES").empty() && !lists(setting("ENGINES"), std::to_string(index)))
            continue;
        const Engine *found = engine_of(d->part(HEUR_GRAPH), index);
        if (!found)
            continue;
        auto engine = made(ENGINE), config = made(ENGINECFG);
        engine->put(ENGINE_GRAPH, std::vector{d->part(HEUR_GRAPH)});
        engine->put(ENGINE_INDEX, std::vector{index});
        engine->put(ENGINE_NOTES, found->notes);
        engine->put(ENGINE_BEHAVIOR, found->fuses ? RUNTIME_COMPILATION : std::vector<int>{});
        config->put(CFG_ENGINE, std::vector{engine.get()});
        if (found->has_knob) {
            auto knob = made(KNOB_CHOICE);
            knob->put(KNOB_CHOICE_TYPE, std::vector<int>{TILE_SIZE});
            knob->put(KNOB_CHOICE_VALUE, std::vector<int64_t>{1});
            config->put(CFG_KNOBS, std::vector{knob.get()});
            config->made.push_back(knob);
        }
        config->made.push_back(engine);
        results.push_back(config.get());
        d->made.push_back(config);
    }
    if (results.empty())
        return refuse(NOT_SUPPORTED, "no engine for this graph");
    d->put(HEUR_RESULTS, results);
    return SUCCESS;
}

int check_plan(Descriptor *d) {
    const Engine *engine = engine_of(d);
    if (!handles.count(d->one<Handle *>(PLAN_HANDLE)))
        return refuse(BAD_PARAM, "a plan of no handle");
    if (engine->fault == Fault::FailsToBuild)
        return refuse(NOT_SUPPORTED, "the engine does not support this configuration");
    note("plans engine " + std::to_string(engine->index));
    d->put(PLAN_WORKSPACE, std::vector<int64_t>{int64_t(engine->workspace)});
    return SUCCESS;
}

int check_pack(const Descriptor *d) {
    // "CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR": a pointer for each number.
    auto ids = d->all<int64_t>(PACK_IDS);
    if (ids.size() != d->all<void *>(PACK_POINTERS).size())
        return refuse(BAD_PARAM, "as many pointers as numbers");
    if (std::set<int64_t>(ids.begin(), ids.end()).size() != ids.size())
        return refuse(DUPLICATED_ENTRIES, "a number twice");
    return SUCCESS;
}

int check(Descriptor *d) {
    switch (d->kind) {
    case TENSOR: return check_tensor(d);
    case CONVOLUTION: return check_convolution(d);
    case FORWARD:
    case BWD_DATA:
    case BWD_FILTER: return check_pass(d);
    case ADDITION: return check_addition(d);
    case GRAPH: return check_graph(d);
    case ENGINE: return check_engine(d);
    case ENGINECFG: return check_config(d);
    case ENGINEHEUR: return propose(d);
    case PLAN: return check_plan(d);
    case PACK: return check_pack(d);
    default: return SUCCESS;
    }
}

/// Ends the program if a descriptor is no more: a real library would read freed memory.
Descriptor *alive(void *descriptor) {
    auto *d = static_cast<Descriptor *>(descriptor);
    if (!live.count(d))
        crash("a descriptor that has been destroyed");
    return d;
}
/// Likewise for all that a descriptor is made of.
void must_be_whole(Descriptor *d) {
    alive(d);
    for (const Rule &rule : RULES.at(d->kind))
        if (rule.type == DESCRIPTOR && rule.most > 0)
            for (Descriptor *part : d->all<Descriptor *>(rule.name))
                must_be_whole(part);
}

const Rule *rule_of(const Descriptor *d, int name) {
    for (const Rule &rule : RULES.at(d->kind))
        if (rule.name == name)
            return &rule;
    return nullptr;
}

/// Where a tensor is, and what of; nothing of its descriptor, which may be gone when a graph is launched.
struct Operand {
    void *memory;
    int precision;
    size_t elements;
};

std::vector<float> read(const Operand &from, bool is_rounded) {
    std::vector<float> values(from.elements);
    if (from.precision == F32) {
        memcpy(values.data(), from.memory, values.size() * sizeof(float));
    } else {
        std::vector<__nv_bfloat16> narrow(values.size());
        memcpy(narrow.data(), from.memory, narrow.size() * sizeof narrow[0]);
        std::transform(narrow.begin(), narrow.end(), values.begin(), __bfloat162float);
    }
    // TF32 has 10 bits after the point.
    if (is_rounded)
        for (float &value : values)
            value = __uint_as_float((__float_as_uint(value) + 0x1000) & ~0x1FFFu);
    return values;
}

void write(const Operand &to, const std::vector<float> &values, size_t from) {
    if (to.precision == F32) {
        memcpy(static_cast<float *>(to.memory) + from, values.data() + from, (values.size() - from) * sizeof(float));
    } else {
        auto *narrow = static_cast<__nv_bfloat16 *>(to.memory);
        for (size_t i = from; i < values.size(); i++)
            narrow[i] = __float2bfloat16_rn(values[i]);
    }
}

/// A plan with pointers.
struct Execution {
    int kind;
    Fault fault;
    float alpha, beta;
    sim::Convolution convolution;
    Operand x, weights, y, output;
    std::vector<Operand> addends;
    void *workspace;
    size_t workspace_bytes;
    bool is_slow;

    void run() const {
        if (is_slow)
            sim::of_driver<void(int)>("cuda_sim_takes")(10000);
        // What the engine leaves there is nobody's business, before it reads its operands and after it has written: not a number.
        memset(workspace, 0xFF, workspace_bytes);
        sim::Convolution sizes = convolution;
        const bool is_rounded = fault == Fault::Rounded;
        std::vector<float> result;
        switch (kind) {
        case FORWARD: result = sim::forward(sizes, read(x, is_rounded), read(weights, is_rounded)); break;
        case BWD_DATA: result = sim::input_gradient(sizes, read(weights, is_rounded), read(y, is_rounded)); break;
        default:
            if (fault == Fault::SkipsAnImage)
                sizes.n--;
            result = sim::weight_gradient(sizes, read(x, is_rounded), read(y, is_rounded));
        }
        // "Scaling parameters": what is multiplied by 0 is not read.
        std::vector<float> old = beta != 0 ? read(output, false) : std::vector<float>();
        for (size_t i = 0; i < result.size(); i++)
            result[i] = alpha * result[i] + (beta != 0 ? beta * old[i] : 0.0f);
        for (const Operand &addend : addends) {
            auto terms = read(addend, false);
            // Either y's shape, or a number for each channel.
            for (size_t j = 0; j < result.size(); j++)
                result[j] += terms[j % terms.size()];
        }
        static int runs = 0;
        runs++;
        const float factor = fault == Fault::Larger ? 1.5f : fault == Fault::OtherBits ? 1 + 1e-2f * float(runs % 7) : 1.0f;
        for (float &value : result)
            value *= factor;
        write(output, result, fault == Fault::Unwritten ? 1 : 0);
        memset(workspace, 0xFF, workspace_bytes);
    }
};

int execute(void *stream, const Descriptor *plan, const Descriptor *pack) {
    const Engine &engine = *engine_of(plan);
    auto operations = plan->part(PLAN_CONFIG)->part(CFG_ENGINE)->part(ENGINE_GRAPH)->all<Descriptor *>(GRAPH_OPS);
    auto *holds = sim::of_driver<int(uint64_t, size_t)>("cuda_sim_holds");
    auto ids = pack->all<int64_t>(PACK_IDS);
    auto pointers = pack->all<void *>(PACK_POINTERS);
    int status = SUCCESS;
    auto place = [&](const Descriptor *tensor) -> Operand {
        if (is_virtual(tensor))
            return {nullptr, precision_of(tensor), size_t(elements(tensor))};
        auto found = std::find(ids.begin(), ids.end(), tensor->one<int64_t>(TENSOR_ID));
        void *pointer = found == ids.end() ? nullptr : pointers[size_t(found - ids.begin())];
        if (!pointer)
            status = refuse(NULL_POINTER, "a tensor without a pointer");
        // CUDNN_ATTR_TENSOR_BYTE_ALIGNMENT, of the pointers in "CUDNN_BACKEND_VARIANT_PACK_DESCRIPTOR".
        else if (reinterpret_cast<uint64_t>(pointer) % uint64_t(tensor->one<int64_t>(TENSOR_ALIGNMENT)) != 0)
            status = refuse(MISALIGNED_POINTER, "a pointer that is not aligned as its tensor says");
        else if (!holds(reinterpret_cast<uint64_t>(pointer), bytes_of(tensor)))
            crash("a tensor that lies outside its allocation");
        return {pointer, precision_of(tensor), size_t(elements(tensor))};
    };
    const Pass pass = pass_of(operations[0]);
    const Operand x = place(pass.x), weights = place(pass.weights), y = place(pass.y);
    std::vector<Operand> addends;
    Operand output = pass.output() == pass.x ? x : pass.output() == pass.weights ? weights : y;
    for (size_t i = 1; i < operations.size(); i++) {
        addends.push_back(place(operations[i]->part(ADDITION_B)));
        output = place(operations[i]->part(ADDITION_Y));
    }
    void *workspace = pack->one<void *>(PACK_WORKSPACE);
    if (engine.workspace > 0 && !workspace)
        return refuse(NULL_POINTER, "a plan that needs workspace has none");
    if (status != SUCCESS)
        return status;
    if (engine.workspace > 0 && !holds(reinterpret_cast<uint64_t>(workspace), engine.workspace))
        crash("a workspace that lies outside its allocation");
    if (fails("execute") || engine.fault == Fault::FailsToRun)
        return refuse(EXECUTION_FAILED, "the engine does not run");
    if (fails("allocate")) {
        uint64_t taken;
        if (sim::of_driver<int(uint64_t *, size_t)>("cuMemAlloc_v2")(&taken, 256))
            return refuse(EXECUTION_FAILED, "no memory");
        sim::of_driver<int(uint64_t)>("cuMemFree_v2")(taken);
    }

    auto sizes = dims(pass.x), filter = dims(pass.weights), out = dims(pass.y);
    auto strides = pass.convolution->all<int64_t>(CONV_STRIDES), before = pass.convolution->all<int64_t>(CONV_PRE);
    const sim::Convolution convolution{sizes[0],  sizes[2], sizes[3], sizes[1], filter[0],                filter[2],
                                       filter[3], out[2],   out[3],   {strides[0], strides[1]}, {before[0], before[1]}};
    const bool is_slow = is_wide_gradient(pass) || lists(setting("SLOW"), std::to_string(engine.index));
    const Execution execution{pass.operation->kind, engine.fault, pass.alpha, pass.beta, convolution,      x,      weights,
                              y,                    output,       addends,    workspace, engine.workspace, is_slow};
    const bool is_begun = sim::begin(stream, [execution] { execution.run(); });
    return is_begun ? int(SUCCESS) : refuse(EXECUTION_FAILED, "the driver refuses");
}

} // namespace

extern "C" {
size_t cudnnGetVersion() {
    const std::string version = setting("VERSION");
    return version.empty() ? 91002 : size_t(std::stoul(version));
}
const char *cudnnGetErrorString(int status) {
    switch (status) {
    case SUCCESS: return "CUDNN_STATUS_SUCCESS";
    case NOT_INITIALIZED: return "CUDNN_STATUS_NOT_INITIALIZED";
    case BAD_PARAM: return "CUDNN_STATUS_BAD_PARAM";
    case NULL_POINTER: return "CUDNN_STATUS_BAD_PARAM_NULL_POINTER";
    case MISALIGNED_POINTER: return "CUDNN_STATUS_BAD_PARAM_MISALIGNED_POINTER";
    case NOT_FINALIZED: return "CUDNN_STATUS_BAD_PARAM_NOT_FINALIZED";
    case SHAPE_MISMATCH: return "CUDNN_STATUS_BAD_PARAM_SHAPE_MISMATCH";
    case NOT_SUPPORTED: return "CUDNN_STATUS_NOT_SUPPORTED";
    case INTERNAL_ERROR: return "CUDNN_STATUS_INTERNAL_ERROR";
    case EXECUTION_FAILED: return "CUDNN_STATUS_EXECUTION_FAILED";
    default: return "CUDNN_STATUS_UNKNOWN";
    }
}
void cudnnGetLastErrorString(char *message, size_t size) {
    snprintf(message, size, "%s", said.c_str());
    said.clear();
}

int cudnnCreate(Handle **handle) {
    if (fails("create"))
        return refuse(NOT_INITIALIZED, "the library cannot begin");
    // cudnnCreate: the handle belongs to the context that is current.
    void *context = nullptr;
    sim::of_driver<int(void **)>("cuCtxGetCurrent")(&context);
    if (!context)
        return refuse(NOT_INITIALIZED, "no context is current");
    *handle = new Handle;
    handles.insert(*handle);
    return SUCCESS;
}
int cudnnDestroy(Handle *handle) {
    if (!handles.erase(handle))
        return NOT_INITIALIZED;
    delete handle;
    return SUCCESS;
}
int cudnnSetStream(Handle *handle, void *stream) {
    if (!handles.count(handle))
        return NOT_INITIALIZED;
    handle->stream = stream;
    return SUCCESS;
}

int cudnnBackendCreateDescriptor(int kind, void **descriptor) {
    // cudnnBackendCreateDescriptor
    if (!RULES.count(kind))
        return refuse(NOT_SUPPORTED, "this machine has no such descriptor");
    auto *made = new Descriptor{kind};
    live.insert(made);
    *descriptor = made;
    return SUCCESS;
}
int cudnnBackendDestroyDescriptor(void *descriptor) {
    Descriptor *d = alive(descriptor);
    live.erase(d);
    delete d;
    return SUCCESS;
}

int cudnnBackendSetAttribute(void *descriptor, int name, int type, int64_t count, const void *values) {
    Descriptor *d = alive(descriptor);
    // cudnnBackendSetAttribute, return values.
    if (d->is_finalized)
        return refuse(NOT_INITIALIZED, "the descriptor is finalized");
    const Rule *rule = rule_of(d, name);
    if (!rule || rule->most == 0)
        return refuse(BAD_PARAM, "the descriptor has no attribute " + std::to_string(name) + " that can be set");
    if (type != rule->type)
        return refuse(ATTRIBUTE_TYPE, "attribute " + std::to_string(name) + " is of type " + std::to_string(rule->type));
    if (!values)
        return refuse(NULL_POINTER, "no values");
    if (count < rule->least || count > rule->most)
        return refuse(BAD_PARAM, std::to_string(count) + " values of attribute " + std::to_string(name));
    if (type == DESCRIPTOR)
        for (int64_t i = 0; i < count; i++) {
            Descriptor *part = alive(static_cast<void *const *>(values)[i]);
            const bool is_operation = is_convolution(part->kind) || part->kind == ADDITION;
            const bool fits = rule->kind == ANY_OPERATION ? is_operation : part->kind == rule->kind;
            if (!fits)
                return refuse(DESCRIPTOR_TYPE, "a descriptor of another kind");
            if (!part->is_finalized)
                return refuse(NOT_FINALIZED, "a descriptor that is not finalized");
        }
    auto *bytes = static_cast<const unsigned char *>(values);
    d->attributes[name] = {count, {bytes, bytes + size_t(count) * size_of(type)}};
    return SUCCESS;
}

int cudnnBackendGetAttribute(void *descriptor, int name, int type, int64_t room, int64_t *count, void *values) {
    Descriptor *d = alive(descriptor);
    // cudnnBackendGetAttribute, return values.
    if (!d->is_finalized)
        return refuse(NOT_INITIALIZED, "the descriptor is not finalized");
    const Rule *rule = rule_of(d, name);
    if (!rule || type != rule->type)
        return refuse(BAD_PARAM, "no attribute " + std::to_string(name) + " of type " + std::to_string(type));
    const Attribute &found = d->attributes[name];
    // It says how many there are, and writes no more than there is room for.
    *count = found.count;
    if (!values)
        return SUCCESS;
    const int64_t written = std::min(room, found.count);
    if (type != DESCRIPTOR) {
        memcpy(values, found.bytes.data(), size_t(written) * size_of(type));
        return SUCCESS;
    }
    for (int64_t i = 0; i < written; i++) {
        Descriptor *to = alive(static_cast<void **>(values)[i]), *from = alive(d->all<Descriptor *>(name)[size_t(i)]);
        if (to->kind != from->kind)
            return refuse(DESCRIPTOR_TYPE, "a descriptor of another kind");
        *to = *from;
    }
    return SUCCESS;
}

int cudnnBackendFinalize(void *descriptor) {
    Descriptor *d = alive(descriptor);
    if (fails("finalize"))
        return refuse(INTERNAL_ERROR, "nothing can be finalized");
    for (const Rule &rule : RULES.at(d->kind))
        if (rule.is_required && !d->attributes.count(rule.name))
            return refuse(BAD_PARAM, "attribute " + std::to_string(rule.name) + " is not set");
    must_be_whole(d);
    if (int status = check(d); status != SUCCESS)
        return status;
    d->is_finalized = true;
    return SUCCESS;
}

int cudnnBackendExecute(Handle *handle, void *plan, void *pack) {
    Descriptor *p = alive(plan), *v = alive(pack);
    if (!handles.count(handle) || p->kind != PLAN || v->kind != PACK)
        return refuse(BAD_PARAM, "no handle, no plan, or no pointers");
    if (!p->is_finalized || !v->is_finalized)
        return refuse(NOT_FINALIZED, "a plan or pointers that are not finalized");
    if (!handle->stream)
        crash("the handle has no stream: the work would not be in order with the rest");
    must_be_whole(p);
    return execute(handle->stream, p, v);
}
}
