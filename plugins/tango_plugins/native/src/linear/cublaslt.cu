// Products of FP8 and of fp16 matrices by cuBLASLt, which is loaded when it is first used: who has no device graph
// needs none.
//
// What is called of it is declared here, so no build needs its headers. Names and numbers are those of cublasLt.h, and
// are the same in its versions 11, 12 and 13. FP8 came with 12.
#include <dlfcn.h>

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>

#include "common/check.h"
#include "common/device.h"
#include "linear/product.h"

namespace tango {
namespace {

using Handle = struct cublasLtContext*;
using Operation = struct cublasLtMatmulDescOpaque_t*;
using Layout = struct cublasLtMatrixLayoutOpaque_t*;
using Preference = struct cublasLtMatmulPreferenceOpaque_t*;

struct Algorithm {
    uint64_t data[8];
};

struct Heuristic {
    Algorithm algorithm;
    size_t workspace_bytes;
    int status;
    float waves;
    int reserved[4];
};

enum Type : int { CUDA_R_32F = 0, CUDA_R_16F = 2, CUDA_R_8F_E4M3 = 28 };
enum Compute : int { CUBLAS_COMPUTE_32F = 68 };
enum OperationAttribute : int {
    CUBLASLT_MATMUL_DESC_TRANSA = 3,
    CUBLASLT_MATMUL_DESC_EPILOGUE = 7,
    CUBLASLT_MATMUL_DESC_BIAS_POINTER = 8,
    CUBLASLT_MATMUL_DESC_A_SCALE_POINTER = 17,
    CUBLASLT_MATMUL_DESC_D_SCALE_POINTER = 20,
    CUBLASLT_MATMUL_DESC_FAST_ACCUM = 25,
    CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE = 26
};
enum PreferenceAttribute : int {
    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1,
    CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 3,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5,  // and those of B, C and D after it
    CUBLASLT_MATMUL_PREF_EPILOGUE_MASK = 11          // of version 11 alone
};
constexpr int32_t CUBLAS_OP_T = 1;
constexpr uint32_t CUBLASLT_EPILOGUE_GELU_BIAS = 36;
constexpr uint32_t CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2;

// Its functions, and its major version; 0 where there is none that has all of them.
struct Library {
    int version = 0;
    int (*cublasLtCreate)(Handle*) = nullptr;
    int (*cublasLtMatmulDescCreate)(Operation*, Compute, Type) = nullptr;
    int (*cublasLtMatmulDescSetAttribute)(Operation, OperationAttribute, const void*, size_t) = nullptr;
    int (*cublasLtMatmulDescDestroy)(Operation) = nullptr;
    int (*cublasLtMatrixLayoutCreate)(Layout*, Type, uint64_t rows, uint64_t columns, int64_t pitch) = nullptr;
    int (*cublasLtMatrixLayoutDestroy)(Layout) = nullptr;
    int (*cublasLtMatmulPreferenceCreate)(Preference*) = nullptr;
    int (*cublasLtMatmulPreferenceSetAttribute)(Preference, PreferenceAttribute, const void*, size_t) = nullptr;
    int (*cublasLtMatmulPreferenceDestroy)(Preference) = nullptr;
    int (*cublasLtMatmulAlgoGetHeuristic)(Handle, Operation, Layout a, Layout b, Layout c, Layout d, Preference,
                                          int wanted, Heuristic*, int* found) = nullptr;
    int (*cublasLtMatmul)(Handle, Operation, const void* alpha, const void* a, Layout, const void* b, Layout,
                          const void* beta, const void* c, Layout, void* d, Layout, const Algorithm*, void* workspace,
                          size_t workspace_bytes, cudaStream_t) = nullptr;
};

#define TANGO_FIND(function)                                                                   \
    library.function = reinterpret_cast<decltype(library.function)>(dlsym(handle, #function)); \
    if (library.function == nullptr) return {                                                  \
        }

Library find_functions(int version, int flags) {
    const std::string name = "libcublasLt.so." + std::to_string(version);
    void* const handle = dlopen(name.c_str(), flags);
    Library library;
    if (handle == nullptr) return library;
    TANGO_FIND(cublasLtCreate);
    TANGO_FIND(cublasLtMatmulDescCreate);
    TANGO_FIND(cublasLtMatmulDescSetAttribute);
    TANGO_FIND(cublasLtMatmulDescDestroy);
    TANGO_FIND(cublasLtMatrixLayoutCreate);
    TANGO_FIND(cublasLtMatrixLayoutDestroy);
    TANGO_FIND(cublasLtMatmulPreferenceCreate);
    TANGO_FIND(cublasLtMatmulPreferenceSetAttribute);
    TANGO_FIND(cublasLtMatmulPreferenceDestroy);
    TANGO_FIND(cublasLtMatmulAlgoGetHeuristic);
    TANGO_FIND(cublasLtMatmul);
    library.version = version;
    return library;
}

#undef TANGO_FIND

Library load() {
    for (int flags : {RTLD_NOW | RTLD_NOLOAD, RTLD_NOW})  // the one of this process, if it has one already
        for (int version : {13, 12, 11}) {
            const Library found = find_functions(version, flags);
            if (found.version != 0) return found;
        }
    return {};
}

const Library& library() {
    static const Library loaded = load();
    return loaded;
}

int cublas_status(int status, const char* doing) {
    if (status == 0) return TANGO_OK;
    return fail(TANGO_CUDA_ERROR, "cuBLASLt cannot %s: status %d", doing, status);
}

#define TANGO_TRY(call, doing) \
    if (int status = cublas_status(library().call, doing)) return status

// How products of one shape are computed. cuBLASLt's matrices are stored by columns: y^T [outputs, rows] = weight^T
// x^T.
class Plan {
  public:
    Plan() = default;
    Plan(const Plan&) = delete;
    Plan& operator=(const Plan&) = delete;

    ~Plan() {
        if (operation_ != nullptr) library().cublasLtMatmulDescDestroy(operation_);
        for (Layout layout : {weight_, x_, c_, y_})
            if (layout != nullptr) library().cublasLtMatrixLayoutDestroy(layout);
        if (preference_ != nullptr) library().cublasLtMatmulPreferenceDestroy(preference_);
    }

    // Describes products like this one, of matrices aligned to so many bytes, and chooses the algorithm that cuBLASLt's
    // heuristic takes for the best without a workspace. C is not read; its type is that of the bias.
    int make(Handle handle, const Product& product, uint32_t alignment) {
        const auto [rows, inputs, outputs] = product.shape;
        const bool fp8 = product.is_fp8, has_gelu = product.has_gelu();
        const Type type = fp8 ? CUDA_R_8F_E4M3 : CUDA_R_16F;
        const auto describe = [](Layout* to, Type of, int height, int width, int pitch) {
            if (pitch == 0) pitch = height;
            return cublas_status(library().cublasLtMatrixLayoutCreate(to, of, height, width, pitch), kDescribe);
        };
        const int height = product.by_outputs ? inputs : outputs, width = product.by_outputs ? outputs : inputs;
        if (int status = describe(&weight_, type, height, width, product.weight_pitch)) return status;
        if (int status = describe(&x_, type, inputs, rows, 0)) return status;
        if (int status = describe(&c_, CUDA_R_16F, outputs, rows, product.y_pitch)) return status;
        if (int status = describe(&y_, has_gelu ? type : CUDA_R_16F, outputs, rows, product.y_pitch)) return status;
        TANGO_TRY(cublasLtMatmulDescCreate(&operation_, CUBLAS_COMPUTE_32F, CUDA_R_32F), kDescribe);
        TANGO_TRY(cublasLtMatmulPreferenceCreate(&preference_), kDescribe);
        if (int status = product.by_outputs ? set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T) : TANGO_OK) return status;
        if (int status = fp8 ? set_fp8(has_gelu) : prefer_sums_in_fp32()) return status;
        if (int status = has_gelu ? set_gelu() : TANGO_OK) return status;
        if (int status = point_to(product)) return status;  // an algorithm may depend on the alignment of the bias
        if (int status = prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t{0})) return status;
        for (int matrix = 0; matrix < 4; ++matrix)
            if (int status = prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES + matrix, alignment)) return status;
        Heuristic found = {};
        int count = 0;
        const int status = library().cublasLtMatmulAlgoGetHeuristic(handle, operation_, weight_, x_, c_, y_,
                                                                    preference_, 1, &found, &count);
        if (status != 0 || count == 0)
            return fail(TANGO_CUDA_ERROR,
                        "%s: cuBLASLt has no algorithm for %d rows, %d inputs and %d outputs: status %d", product.name,
                        rows, inputs, outputs, status);
        algorithm_ = found.algorithm;
        return TANGO_OK;
    }

    int run(Handle handle, const Product& product, cudaStream_t stream) {
        if (int status = point_to(product)) return status;
        const float beta = 0.0f;
        TANGO_TRY(cublasLtMatmul(handle, operation_, &product.factor, product.weight, weight_, product.x, x_, &beta,
                                 nullptr, c_, product.y, y_, &algorithm_, nullptr, 0, stream),
                  "multiply");
        return TANGO_OK;
    }

  private:
    static constexpr char kDescribe[] = "describe a product";

    int set_fp8(bool has_bias) {
        if (int status = set(CUBLASLT_MATMUL_DESC_FAST_ACCUM, int8_t{1})) return status;
        return has_bias ? set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, int32_t{CUDA_R_16F}) : TANGO_OK;
    }

    // Should several blocks share a sum, its parts are fp32, too, and are added in one order.
    int prefer_sums_in_fp32() {
        return prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE);
    }

    int set_gelu() {
        constexpr uint32_t kGelu = CUBLASLT_EPILOGUE_GELU_BIAS;
        if (int status = set(CUBLASLT_MATMUL_DESC_EPILOGUE, kGelu)) return status;
        return library().version == 11 ? prefer(CUBLASLT_MATMUL_PREF_EPILOGUE_MASK, kGelu) : TANGO_OK;
    }

    // Bias and the factor of y are null without GELU, as they are by default.
    int point_to(const Product& product) {
        if (int status = set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, product.bias)) return status;
        if (!product.is_fp8) return TANGO_OK;
        if (int status = set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, product.weight_scale)) return status;
        return set(CUBLASLT_MATMUL_DESC_D_SCALE_POINTER, product.y_factor);
    }

    template <typename T>
    int set(OperationAttribute attribute, const T& value) {
        TANGO_TRY(cublasLtMatmulDescSetAttribute(operation_, attribute, &value, sizeof(value)), kDescribe);
        return TANGO_OK;
    }

    template <typename T>
    int prefer(int attribute, const T& value) {
        const auto which = static_cast<PreferenceAttribute>(attribute);
        TANGO_TRY(cublasLtMatmulPreferenceSetAttribute(preference_, which, &value, sizeof(value)), kDescribe);
        return TANGO_OK;
    }

    Operation operation_ = nullptr;
    Layout weight_ = nullptr, x_ = nullptr, c_ = nullptr, y_ = nullptr;
    Preference preference_ = nullptr;
    Algorithm algorithm_ = {};
};

// The largest power of two up to 256 that all addresses are multiples of.
uint32_t alignment_of(const Product& product) {
    uintptr_t bits = 256;
    for (const void* pointer : {product.x, product.weight, product.bias, static_cast<const void*>(product.y)})
        bits |= reinterpret_cast<uintptr_t>(pointer);
    return static_cast<uint32_t>(bits & -bits);
}

// Contexts of cuBLASLt by device, and the plans made so far. They live as long as the process. A plan's pointers are
// set anew for each product, so one thread at a time has them.
struct Plans {
    using Key = std::tuple<int, bool, bool, bool, int, int, int, int, int, uint32_t>;
    static constexpr size_t kMost = 4096;  // prompts of each length have their own

    int multiply(const Product& product, cudaStream_t stream) {
        int device = 0;
        if (int status = cuda_status(cudaGetDevice(&device), product.name)) return status;
        const auto [rows, inputs, outputs] = product.shape;
        const uint32_t alignment = alignment_of(product);
        const Key key{device, product.is_fp8, product.has_gelu(),   product.by_outputs, rows,
                      inputs, outputs,        product.weight_pitch, product.y_pitch,    alignment};
        const std::lock_guard<std::mutex> lock(mutex);
        Handle& handle = handles[device];
        if (handle == nullptr) TANGO_TRY(cublasLtCreate(&handle), "be started");
        auto found = plans.find(key);
        if (found == plans.end()) {
            auto made = std::make_unique<Plan>();
            if (int status = made->make(handle, product, alignment)) return status;
            if (plans.size() == kMost) plans.clear();
            found = plans.emplace(key, std::move(made)).first;
        }
        return found->second->run(handle, product, stream);
    }

    std::mutex mutex;
    std::map<int, Handle> handles;
    std::map<Key, std::unique_ptr<Plan>> plans;
};

}  // namespace

bool has_cublaslt() { return library().version != 0; }

int load_cublaslt(const char* name, int& version) {
    version = library().version;
    if (version != 0) return TANGO_OK;
    return fail(TANGO_CUDA_ERROR,
                "%s: none of libcublasLt.so.13, .12 and .11 can be loaded; it comes with CUDA, and as the package "
                "nvidia-cublas",
                name);
}

int multiply(const Product& product, cudaStream_t stream) {
    static Plans& plans = *new Plans;
    int version = 0;
    if (int status = load_cublaslt(product.name, version)) return status;
    if (!product.is_fp8 || version >= 12) return plans.multiply(product, stream);
    return fail(TANGO_CUDA_ERROR, "%s: libcublasLt.so.%d has no FP8; it needs that of CUDA 12 or 13", product.name,
                version);
}

}  // namespace tango
