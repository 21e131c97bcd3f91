// libcublasLt.so.13 of the machine made of software: the calls of cuBLASLt that this project makes, for memory of the driver beside it, which
// is the host's. What the library refuses is refused, with the rule of its documentation beside it.
//
// It has four algorithms: the first two are right, the third leaves out a term of each sum, and the fourth gives other bits each time.
// CUDA_SIM_CUBLASLT_SLOW=1 makes some take 10 s longer, by the GPU's clock. Each search is a line of the log (setting.h): `searches products`;
// and so is each algorithm that is had again: `has algorithm 0 again`.

#include "setting.h"
#include "stream.h"

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

namespace {

/// cublasStatus_t
enum Status { SUCCESS = 0, NOT_INITIALIZED = 1, INVALID_VALUE = 7, EXECUTION_FAILED = 13, NOT_SUPPORTED = 15 };
/// cudaDataType
enum Type { F32 = 0, BF16 = 14 };
/// cublasOperation_t
enum Operation { AS_IT_IS = 0, TRANSPOSED = 1 };
/// cublasLtEpilogue_t
enum Epilogue { DEFAULT = 1, BIAS = 4 };
/// Of cublasLtReductionScheme_t: parts of a sum are added in the type of the sum.
constexpr uint32_t IN_TYPE_OF_SUM = 2;

constexpr uint64_t MAGIC = 0x0BADC0DE5AFE0001;
constexpr int COMPUTE_32F = 68;

struct Handle {
    uint64_t magic = MAGIC;
};

struct Description {
    int32_t transposed_a = AS_IT_IS, transposed_b = AS_IT_IS;
    uint32_t epilogue = DEFAULT;
    const void *bias = nullptr;
    // "The default value is the same as the type of the matrix D."
    int32_t bias_type = -1;
};

struct Layout {
    int type;
    uint64_t rows, columns;
    int64_t stride;
};

struct Preference {
    // "If no value is set, the default is 256-byte alignment", and no workspace.
    uint32_t alignment[4] = {256, 256, 256, 256};
    uint64_t workspace = 0;
    uint32_t schemes = 7;
};

/// cublasLtMatmulAlgo_t has 64 bytes that only the library reads.
struct Algorithm {
    uint64_t magic;
    uint32_t alignment[4];
    uint64_t workspace;
    uint64_t shape;
    uint64_t number;
    uint64_t rest[2];
};
constexpr int ALGORITHMS = 4;
enum Fault : uint64_t { LEAVES_OUT_A_TERM = 2, OTHER_BITS = 3 };
static_assert(sizeof(Algorithm) == 64);

/// cublasLtMatmulHeuristicResult_t
struct Found {
    Algorithm algorithm;
    size_t workspace;
    int state;
    float waves;
    int reserved[4];
};

bool is_failing(const char *call) {
    const char *wanted = getenv("CUDA_SIM_CUBLASLT_FAIL");
    return wanted && !strcmp(wanted, call);
}

template <class T> bool take(T &to, const void *from, size_t bytes) {
    // "CUBLAS_STATUS_INVALID_VALUE: if buf is NULL or sizeInBytes doesn't match the size of the internal storage for the attribute"
    if (!from || bytes != sizeof(T))
        return false;
    memcpy(&to, from, bytes);
    return true;
}

float number(const void *at, uint64_t place, int type) {
    if (type == F32)
        return static_cast<const float *>(at)[place];
    const uint32_t bits = uint32_t(static_cast<const uint16_t *>(at)[place]) << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

void put(void *at, uint64_t place, int type, float value) {
    if (type == F32) {
        static_cast<float *>(at)[place] = value;
        return;
    }
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    // To nearest, ties to even; NaN stays NaN.
    bits = value != value ? 0x7FC00000u : bits + 0x7FFF + (bits >> 16 & 1);
    static_cast<uint16_t *>(at)[place] = uint16_t(bits >> 16);
}

/// Everything that a product is, if it is one that the library has.
struct Product {
    uint64_t m, n, k;

    static int of(const Description &d, const Layout &a, const Layout &b, const Layout &c, const Layout &sum, Product &p) {
        p.m = d.transposed_a ? a.columns : a.rows, p.k = d.transposed_a ? a.rows : a.columns;
        p.n = d.transposed_b ? b.rows : b.columns;
        const uint64_t k = d.transposed_b ? b.columns : b.rows;
        const bool fits = p.k == k && sum.rows == p.m && sum.columns == p.n && c.rows == p.m && c.columns == p.n;
        for (const Layout *layout : {&a, &b, &c, &sum})
            // "the leading dimension of the matrix ... must be at least as large as the number of rows" for column order
            if (layout->stride < int64_t(layout->rows) || layout->rows == 0 || layout->columns == 0)
                return INVALID_VALUE;
        if (!fits)
            return INVALID_VALUE;
        // The table of types for CUBLAS_COMPUTE_32F and scale type CUDA_R_32F: A and B of one type, C and D of one; bf16 factors with bf16
        // or f32 results, f32 ones with f32 results; the bias of D's type.
        const bool has_types = a.type == b.type && c.type == sum.type && (a.type == BF16 || (a.type == F32 && c.type == F32)) &&
                               (c.type == BF16 || c.type == F32);
        const bool has_bias_type = d.epilogue == DEFAULT || d.bias_type < 0 || d.bias_type == sum.type;
        return has_types && has_bias_type ? SUCCESS : NOT_SUPPORTED;
    }

    uint64_t shape(const Layout &sum) const { return m * 0x9E3779B97F4A7C15u ^ n * 0xC2B2AE3D27D4EB4Fu ^ k * 0x165667B19E3779F9u ^ uint64_t(sum.type); }
};

/// A matrix with rows of `length` that stand one after another: element (i, l) of op(A), or (l, j) of op(B).
std::vector<float> rows_of(const void *at, const Layout &layout, bool is_by_column, uint64_t rows, uint64_t length) {
    std::vector<float> all(rows * length);
    for (uint64_t row = 0; row < rows; row++)
        for (uint64_t l = 0; l < length; l++)
            all[row * length + l] = number(at, is_by_column ? l + row * layout.stride : row + l * layout.stride, layout.type);
    return all;
}

float dot(const float *a, const float *b, uint64_t length) {
    float sums[16] = {}, sum = 0;
    uint64_t l = 0;
    for (; l + 16 <= length; l += 16)
        for (int i = 0; i < 16; i++)
            sums[i] += a[l + i] * b[l + i];
    for (; l < length; l++)
        sum += a[l] * b[l];
    for (float part : sums)
        sum += part;
    return sum;
}

/// A product with pointers.
struct Execution {
    Product product;
    Description d;
    Layout la, lb, lc, ls;
    float alpha, beta;
    const void *a, *b, *c;
    void *sum, *workspace;
    size_t workspace_bytes;
    uint64_t algorithm;
    bool is_slow;

    void run() const {
        if (is_slow)
            sim::of_driver<void(int)>("cuda_sim_takes")(10000);
        static int runs = 0;
        const float factor = algorithm == OTHER_BITS ? 1 + 1e-2f * float(++runs % 7) : 1.0f;
        const uint64_t terms = product.k - (algorithm == LEAVES_OUT_A_TERM);
        const std::vector<float> first = rows_of(a, la, d.transposed_a, product.m, product.k);
        const std::vector<float> second = rows_of(b, lb, !d.transposed_b, product.n, product.k);
        for (uint64_t j = 0; j < product.n; j++)
            for (uint64_t i = 0; i < product.m; i++) {
                float value = factor * alpha * dot(&first[i * product.k], &second[j * product.k], terms);
                // "if beta is 0, C does not have to be a valid input"
                if (beta != 0.0f)
                    value += beta * number(c, i + j * lc.stride, lc.type);
                if (d.epilogue == BIAS)
                    value += number(d.bias, i, ls.type);
                put(sum, i + j * ls.stride, ls.type, value);
            }
        if (workspace_bytes)
            memset(workspace, 0xA5, workspace_bytes);
    }
};

} // namespace

extern "C" {
size_t cublasLtGetVersion() {
    const char *said = getenv("CUDA_SIM_CUBLASLT_VERSION");
    return said ? size_t(atol(said)) : 130001;
}
const char *cublasLtGetStatusName(int status) {
    switch (status) {
    case SUCCESS: return "CUBLAS_STATUS_SUCCESS";
    case NOT_INITIALIZED: return "CUBLAS_STATUS_NOT_INITIALIZED";
    case INVALID_VALUE: return "CUBLAS_STATUS_INVALID_VALUE";
    case EXECUTION_FAILED: return "CUBLAS_STATUS_EXECUTION_FAILED";
    case NOT_SUPPORTED: return "CUBLAS_STATUS_NOT_SUPPORTED";
    default: return "unknown";
    }
}
int cublasLtCreate(Handle **handle) {
    if (is_failing("create"))
        return NOT_INITIALIZED;
    *handle = new Handle;
    return SUCCESS;
}
int cublasLtDestroy(Handle *handle) {
    // cublasLtDestroy: it "releases hardware resources used by the cuBLASLt library", which are those of a context.
    if (!sim::of_driver<int()>("cuda_sim_has_context")()) {
        fprintf(stderr, "cuda-sim: a handle of cuBLASLt that is destroyed after its context\n");
        abort();
    }
    delete handle;
    return SUCCESS;
}

int cublasLtMatmulDescCreate(Description **description, int compute, int scale) {
    *description = new Description;
    return compute == COMPUTE_32F && scale == F32 ? SUCCESS : INVALID_VALUE;
}
int cublasLtMatmulDescDestroy(Description *description) {
    delete description;
    return SUCCESS;
}
int cublasLtMatmulDescSetAttribute(Description *d, int attribute, const void *from, size_t bytes) {
    switch (attribute) {
    case 3: return take(d->transposed_a, from, bytes) ? SUCCESS : INVALID_VALUE;
    case 4: return take(d->transposed_b, from, bytes) ? SUCCESS : INVALID_VALUE;
    case 7: return take(d->epilogue, from, bytes) && (d->epilogue == DEFAULT || d->epilogue == BIAS) ? SUCCESS : INVALID_VALUE;
    case 8: return take(d->bias, from, bytes) ? SUCCESS : INVALID_VALUE;
    case 26: return take(d->bias_type, from, bytes) ? SUCCESS : INVALID_VALUE;
    default: return INVALID_VALUE;
    }
}

int cublasLtMatrixLayoutCreate(Layout **layout, int type, uint64_t rows, uint64_t columns, int64_t stride) {
    *layout = new Layout{type, rows, columns, stride};
    return SUCCESS;
}
int cublasLtMatrixLayoutDestroy(Layout *layout) {
    delete layout;
    return SUCCESS;
}

int cublasLtMatmulPreferenceCreate(Preference **preference) {
    *preference = new Preference;
    return SUCCESS;
}
int cublasLtMatmulPreferenceDestroy(Preference *preference) {
    delete preference;
    return SUCCESS;
}
int cublasLtMatmulPreferenceSetAttribute(Preference *p, int attribute, const void *from, size_t bytes) {
    switch (attribute) {
    case 1: return take(p->workspace, from, bytes) ? SUCCESS : INVALID_VALUE;
    case 3: return take(p->schemes, from, bytes) ? SUCCESS : INVALID_VALUE;
    case 5:
    case 6:
    case 7:
    case 8: return take(p->alignment[attribute - 5], from, bytes) ? SUCCESS : INVALID_VALUE;
    default: return INVALID_VALUE;
    }
}

int cublasLtMatmulAlgoGetHeuristic(Handle *handle, Description *d, Layout *a, Layout *b, Layout *c, Layout *sum, Preference *preference, int wanted,
                                   Found *found, int *count) {
    *count = 0;
    Product product;
    if (!handle || handle->magic != MAGIC || wanted < 1)
        return INVALID_VALUE;
    if (const int status = Product::of(*d, *a, *b, *c, *sum, product))
        return status;
    // All that it has is for such parts of sums; elements must be aligned at least to their own size.
    const int sizes[4] = {a->type == F32 ? 4 : 2, b->type == F32 ? 4 : 2, c->type == F32 ? 4 : 2, sum->type == F32 ? 4 : 2};
    for (int i = 0; i < 4; i++)
        if (preference->alignment[i] < uint32_t(sizes[i]))
            return NOT_SUPPORTED;
    if (!(preference->schemes & IN_TYPE_OF_SUM) || is_failing("heuristic"))
        return NOT_SUPPORTED;
    sim::note("searches products");
    for (; *count < std::min(wanted, ALGORITHMS); ++*count) {
        Algorithm algorithm{MAGIC, {}, uint64_t(preference->workspace < 4096 ? 0 : 4096), product.shape(*sum), uint64_t(*count), {}};
        memcpy(algorithm.alignment, preference->alignment, sizeof algorithm.alignment);
        found[*count] = {algorithm, size_t(algorithm.workspace), SUCCESS, 1.0f, {}};
    }
    return SUCCESS;
}

// "CUBLAS_STATUS_NOT_SUPPORTED: If the algorithm configuration is not currently supported on this device"
int cublasLtMatmulAlgoCheck(Handle *handle, Description *d, Layout *a, Layout *b, Layout *c, Layout *sum, const Algorithm *algorithm,
                            Found *found) {
    Product product;
    if (!handle || handle->magic != MAGIC || !algorithm || !found)
        return INVALID_VALUE;
    if (const int status = Product::of(*d, *a, *b, *c, *sum, product))
        return status;
    if (algorithm->magic != MAGIC || algorithm->shape != product.shape(*sum) || algorithm->number >= ALGORITHMS)
        return NOT_SUPPORTED;
    *found = {*algorithm, size_t(algorithm->workspace), SUCCESS, 1.0f, {}};
    sim::note("has algorithm " + std::to_string(algorithm->number) + " again");
    return SUCCESS;
}

int cublasLtMatmul(Handle *handle, Description *d, const float *alpha, const void *a, Layout *la, const void *b, Layout *lb, const float *beta,
                   const void *c, Layout *lc, void *sum, Layout *ls, const Algorithm *algorithm, void *workspace, size_t workspace_bytes, void *stream) {
    Product product;
    if (!handle || handle->magic != MAGIC)
        return NOT_INITIALIZED;
    if (is_failing("multiply"))
        return EXECUTION_FAILED;
    if (const int status = Product::of(*d, *la, *lb, *lc, *ls, product))
        return status;
    if (!algorithm || algorithm->magic != MAGIC || algorithm->shape != product.shape(*ls))
        return NOT_SUPPORTED;
    // "workspace: pointer must be 16B aligned", and as large as the algorithm was told.
    if (workspace_bytes < algorithm->workspace || (algorithm->workspace && (!workspace || uintptr_t(workspace) % 16)))
        return INVALID_VALUE;
    const void *pointers[4] = {a, b, c, sum};
    for (int i = 0; i < 4; i++)
        if (!pointers[i] || uintptr_t(pointers[i]) % algorithm->alignment[i])
            return INVALID_VALUE;
    if (d->epilogue == BIAS && !d->bias)
        return INVALID_VALUE;
    // A library that does what no capture allows, and does not notice.
    if (uint64_t taken; is_failing("allocate") && sim::of_driver<int(uint64_t *, size_t)>("cuMemAlloc_v2")(&taken, 256) == 0)
        sim::of_driver<int(uint64_t)>("cuMemFree_v2")(taken);
    // All that it takes is read now, but for the matrices: what describes it may be gone when a graph is launched.
    const uint64_t number = algorithm->number;
    const bool is_slow = sim::lists(sim::setting("CUDA_SIM_CUBLASLT_SLOW"), std::to_string(number));
    const Execution execution{product, *d, *la, *lb, *lc, *ls, *alpha, *beta, a, b, c, sum, workspace, algorithm->workspace, number, is_slow};
    return sim::begin(stream, [execution] { execution.run(); }) ? SUCCESS : EXECUTION_FAILED;
}
}
