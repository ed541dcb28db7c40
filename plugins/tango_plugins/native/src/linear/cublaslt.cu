// The product of FP8 matrices by cuBLASLt, which is loaded when it is first used: who has no FP8 graph needs none.
//
// What is called of it is declared here, so no build needs its headers. Names and numbers are those of cublasLt.h, and
// are the same in its versions 12 and 13.
#include <dlfcn.h>

#include <map>
#include <memory>
#include <mutex>
#include <tuple>

#include "common/check.h"
#include "common/device.h"
#include "linear/fp8_product.h"

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
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5  // and those of B, C and D after it
};
constexpr int32_t CUBLAS_OP_T = 1;
constexpr uint32_t CUBLASLT_EPILOGUE_GELU_BIAS = 36;

// The functions; null where the library was not found.
struct Library {
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
    bool is_complete = false;
};

#define TANGO_FIND(function)                                                                   \
    library.function = reinterpret_cast<decltype(library.function)>(dlsym(handle, #function)); \
    library.is_complete = library.is_complete && library.function != nullptr

Library load() {
    void* handle = nullptr;
    for (int flags : {RTLD_NOW | RTLD_NOLOAD, RTLD_NOW})  // the one of this process, if it has one already
        for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12"})
            if (handle == nullptr) handle = dlopen(name, flags);
    Library library;
    library.is_complete = handle != nullptr;
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
    return library;
}

#undef TANGO_FIND

const Library& library() {
    static const Library loaded = load();
    return loaded;
}

int cublas_status(int status, const char* doing) {
    if (status == 0) return TANGO_OK;
    return fail(TANGO_CUDA_ERROR, "fp8 linear: cuBLASLt cannot %s: status %d", doing, status);
}

#define TANGO_TRY(call, doing) \
    if (int status = cublas_status(library().call, doing)) return status

// How products of one shape are computed. cuBLASLt's matrices are stored by columns: y^T [outputs, rows] = weight x^T.
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

    // Describes the products of a shape, of matrices aligned to so many bytes, and chooses the algorithm that
    // cuBLASLt's heuristic takes for the best. None gets a workspace. C is not read; its type is that of the bias.
    int make(Handle handle, const TangoLinearShape& shape, const TangoFp8LinearTensors& tensors, Epilogue epilogue,
             uint32_t alignment) {
        const auto describe = [](Layout* to, Type type, int rows, int columns) {
            return cublas_status(library().cublasLtMatrixLayoutCreate(to, type, rows, columns, rows), kDescribe);
        };
        if (int status = describe(&weight_, CUDA_R_8F_E4M3, shape.inputs, shape.outputs)) return status;
        if (int status = describe(&x_, CUDA_R_8F_E4M3, shape.inputs, shape.rows)) return status;
        if (int status = describe(&c_, CUDA_R_16F, shape.outputs, shape.rows)) return status;
        const Type y_type = epilogue == Epilogue::kNone ? CUDA_R_16F : CUDA_R_8F_E4M3;
        if (int status = describe(&y_, y_type, shape.outputs, shape.rows)) return status;
        TANGO_TRY(cublasLtMatmulDescCreate(&operation_, CUBLAS_COMPUTE_32F, CUDA_R_32F), kDescribe);
        if (int status = set(CUBLASLT_MATMUL_DESC_TRANSA, CUBLAS_OP_T)) return status;
        if (int status = set(CUBLASLT_MATMUL_DESC_FAST_ACCUM, int8_t{1})) return status;
        if (epilogue == Epilogue::kBiasGelu) {
            if (int status = set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_GELU_BIAS)) return status;
            if (int status = set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, int32_t{CUDA_R_16F})) return status;
        }
        if (int status = point_to(tensors)) return status;  // an algorithm may depend on the alignment of the bias
        TANGO_TRY(cublasLtMatmulPreferenceCreate(&preference_), kDescribe);
        if (int status = prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t{0})) return status;
        for (int matrix = 0; matrix < 4; ++matrix)
            if (int status = prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES + matrix, alignment)) return status;
        Heuristic found = {};
        int count = 0;
        const int status = library().cublasLtMatmulAlgoGetHeuristic(handle, operation_, weight_, x_, c_, y_,
                                                                    preference_, 1, &found, &count);
        if (status != 0 || count == 0)
            return fail(TANGO_CUDA_ERROR,
                        "fp8 linear: cuBLASLt has no algorithm for %d rows, %d inputs and %d outputs: status %d",
                        shape.rows, shape.inputs, shape.outputs, status);
        algorithm_ = found.algorithm;
        return TANGO_OK;
    }

    int run(Handle handle, const TangoFp8LinearTensors& tensors, float x_scale, cudaStream_t stream) {
        if (int status = point_to(tensors)) return status;
        const float beta = 0.0f;
        TANGO_TRY(cublasLtMatmul(handle, operation_, &x_scale, tensors.weight, weight_, tensors.x, x_, &beta, nullptr,
                                 c_, tensors.y, y_, &algorithm_, nullptr, 0, stream),
                  "multiply");
        return TANGO_OK;
    }

  private:
    static constexpr char kDescribe[] = "describe a product";

    // Bias and factor are null without an epilogue, as they are by default.
    int point_to(const TangoFp8LinearTensors& tensors) {
        if (int status = set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, tensors.weight_scale)) return status;
        if (int status = set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, tensors.bias)) return status;
        return set(CUBLASLT_MATMUL_DESC_D_SCALE_POINTER, tensors.y_factor);
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
uint32_t alignment_of(const TangoFp8LinearTensors& tensors) {
    uintptr_t bits = 256;
    for (const void* pointer : {tensors.x, tensors.weight, tensors.bias, static_cast<const void*>(tensors.y)})
        bits |= reinterpret_cast<uintptr_t>(pointer);
    return static_cast<uint32_t>(bits & -bits);
}

// Contexts of cuBLASLt by device, and the plans made so far. They live as long as the process. A plan's pointers are
// set anew for each product, so one thread at a time has them.
struct Plans {
    using Key = std::tuple<int, int, int, int, Epilogue, uint32_t>;
    static constexpr size_t kMost = 4096;  // prompts of each length have their own

    int multiply(const TangoLinearShape& shape, const TangoFp8LinearTensors& tensors, float x_scale, Epilogue epilogue,
                 cudaStream_t stream) {
        int device = 0;
        if (int status = cuda_status(cudaGetDevice(&device), "fp8 linear")) return status;
        const uint32_t alignment = alignment_of(tensors);
        const std::lock_guard<std::mutex> lock(mutex);
        Handle& handle = handles[device];
        if (handle == nullptr) TANGO_TRY(cublasLtCreate(&handle), "be started");
        const Key key{device, shape.rows, shape.inputs, shape.outputs, epilogue, alignment};
        if (plans.count(key) == 0) {
            auto made = std::make_unique<Plan>();
            if (int status = made->make(handle, shape, tensors, epilogue, alignment)) return status;
            if (plans.size() == kMost) plans.clear();
            plans[key] = std::move(made);
        }
        return plans[key]->run(handle, tensors, x_scale, stream);
    }

    std::mutex mutex;
    std::map<int, Handle> handles;
    std::map<Key, std::unique_ptr<Plan>> plans;
};

}  // namespace

int multiply_fp8(const TangoLinearShape& shape, const TangoFp8LinearTensors& tensors, float x_scale, Epilogue epilogue,
                 cudaStream_t stream) {
    static Plans& plans = *new Plans;
    if (library().is_complete) return plans.multiply(shape, tensors, x_scale, epilogue, stream);
    return fail(TANGO_CUDA_ERROR,
                "fp8 linear: neither libcublasLt.so.13 nor libcublasLt.so.12 can be loaded; it comes with CUDA, and as "
                "the package nvidia-cublas");
}

}  // namespace tango
