// The part of ONNX Runtime's C interface that custom operators call, in version 16 (ONNX Runtime 1.16).
//
// ONNX Runtime's Python packages contain no headers, and with this declaration no build needs them. Later versions only
// append to the table of functions, so the position of each function never changes. Assertions below check all of them.
// Names and positions are those of onnxruntime_c_api.h (microsoft/onnxruntime, include/onnxruntime/core/session).
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {

struct OrtStatus;
struct OrtValue;
struct OrtMemoryInfo;
struct OrtAllocator;
struct OrtTensorTypeAndShapeInfo;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtCustomOp;

enum ONNXTensorElementDataType : int {
    ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 = 2,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 = 3,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 = 6,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 = 10,
    ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT8E4M3FN = 17,
};
enum OrtErrorCode : int { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };
enum OrtMemType : int { OrtMemTypeDefault = 0 };
enum OrtCustomOpInputOutputCharacteristic : int { INPUT_OUTPUT_REQUIRED = 0 };

// A gap stands for functions that are not called; its name is the position of the first one.
struct OrtApi {
    OrtStatus* (*CreateStatus)(OrtErrorCode code, const char* message);
    void* gap_1[25];
    OrtStatus* (*CreateCustomOpDomain)(const char* domain, OrtCustomOpDomain** out);
    OrtStatus* (*CustomOpDomain_Add)(OrtCustomOpDomain* domain, const OrtCustomOp* op);
    OrtStatus* (*AddCustomOpDomain)(OrtSessionOptions* options, OrtCustomOpDomain* domain);
    void* gap_29[22];
    OrtStatus* (*GetTensorMutableData)(OrtValue* value, void** out);
    void* gap_52[9];
    OrtStatus* (*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo* info, size_t* out);
    OrtStatus* (*GetDimensions)(const OrtTensorTypeAndShapeInfo* info, int64_t* values, size_t count);
    void* gap_63[2];
    OrtStatus* (*GetTensorTypeAndShape)(const OrtValue* value, OrtTensorTypeAndShapeInfo** out);
    void* gap_66[9];
    OrtStatus* (*AllocatorAlloc)(OrtAllocator* allocator, size_t size, void** out);
    OrtStatus* (*AllocatorFree)(OrtAllocator* allocator, void* memory);
    void* gap_77[8];
    OrtStatus* (*KernelInfoGetAttribute_float)(const OrtKernelInfo* info, const char* name, float* out);
    OrtStatus* (*KernelInfoGetAttribute_int64)(const OrtKernelInfo* info, const char* name, int64_t* out);
    void* gap_87[3];
    OrtStatus* (*KernelContext_GetInput)(const OrtKernelContext* context, size_t index, const OrtValue** out);
    OrtStatus* (*KernelContext_GetOutput)(OrtKernelContext* context, size_t index, const int64_t* dims, size_t count,
                                          OrtValue** out);
    void* gap_92[7];
    void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo* info);
    void* gap_100[32];
    void (*ReleaseAllocator)(OrtAllocator* allocator);
    void* gap_133[60];
    OrtStatus* (*KernelContext_GetGPUComputeStream)(const OrtKernelContext* context, void** out);
    OrtStatus* (*GetTensorMemoryInfo)(const OrtValue* value, const OrtMemoryInfo** out);
    void* gap_195[42];
    OrtStatus* (*HasSessionConfigEntry)(const OrtSessionOptions* options, const char* key, int* out);
    void* gap_238[15];
    OrtStatus* (*KernelContext_GetAllocator)(const OrtKernelContext* context, const OrtMemoryInfo* info,
                                             OrtAllocator** out);
};

struct OrtApiBase {
    const OrtApi* (*GetApi)(uint32_t version);  // null where the version is too new
    const char* (*GetVersionString)();
};

struct OrtCustomOp {
    uint32_t version;
    void* (*CreateKernel)(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info);
    const char* (*GetName)(const OrtCustomOp* op);
    const char* (*GetExecutionProviderType)(const OrtCustomOp* op);
    ONNXTensorElementDataType (*GetInputType)(const OrtCustomOp* op, size_t index);
    size_t (*GetInputTypeCount)(const OrtCustomOp* op);
    ONNXTensorElementDataType (*GetOutputType)(const OrtCustomOp* op, size_t index);
    size_t (*GetOutputTypeCount)(const OrtCustomOp* op);
    void (*KernelCompute)(void* kernel, OrtKernelContext* context);
    void (*KernelDestroy)(void* kernel);
    OrtCustomOpInputOutputCharacteristic (*GetInputCharacteristic)(const OrtCustomOp* op, size_t index);
    OrtCustomOpInputOutputCharacteristic (*GetOutputCharacteristic)(const OrtCustomOp* op, size_t index);
    OrtMemType (*GetInputMemoryType)(const OrtCustomOp* op, size_t index);
    int (*GetVariadicInputMinArity)(const OrtCustomOp* op);
    int (*GetVariadicInputHomogeneity)(const OrtCustomOp* op);
    int (*GetVariadicOutputMinArity)(const OrtCustomOp* op);
    int (*GetVariadicOutputHomogeneity)(const OrtCustomOp* op);
    OrtStatus* (*CreateKernelV2)(const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** kernel);
    OrtStatus* (*KernelComputeV2)(void* kernel, OrtKernelContext* context);
};

}  // extern "C"

// Positions in units of pointers, counted in the header named above. A gap that is one function too wide or too narrow
// would call another function with these arguments, so every function that is called has an assertion.
#define TANGO_ASSERT_POSITION(type, member, position) \
    static_assert(offsetof(type, member) == (position) * sizeof(void*), #type "::" #member " is at another position")

TANGO_ASSERT_POSITION(OrtApi, CreateStatus, 0);
TANGO_ASSERT_POSITION(OrtApi, CreateCustomOpDomain, 26);
TANGO_ASSERT_POSITION(OrtApi, CustomOpDomain_Add, 27);
TANGO_ASSERT_POSITION(OrtApi, AddCustomOpDomain, 28);
TANGO_ASSERT_POSITION(OrtApi, GetTensorMutableData, 51);
TANGO_ASSERT_POSITION(OrtApi, GetDimensionsCount, 61);
TANGO_ASSERT_POSITION(OrtApi, GetDimensions, 62);
TANGO_ASSERT_POSITION(OrtApi, GetTensorTypeAndShape, 65);
TANGO_ASSERT_POSITION(OrtApi, AllocatorAlloc, 75);
TANGO_ASSERT_POSITION(OrtApi, AllocatorFree, 76);
TANGO_ASSERT_POSITION(OrtApi, KernelInfoGetAttribute_float, 85);
TANGO_ASSERT_POSITION(OrtApi, KernelInfoGetAttribute_int64, 86);
TANGO_ASSERT_POSITION(OrtApi, KernelContext_GetInput, 90);
TANGO_ASSERT_POSITION(OrtApi, KernelContext_GetOutput, 91);
TANGO_ASSERT_POSITION(OrtApi, ReleaseTensorTypeAndShapeInfo, 99);
TANGO_ASSERT_POSITION(OrtApi, ReleaseAllocator, 132);
TANGO_ASSERT_POSITION(OrtApi, KernelContext_GetGPUComputeStream, 193);
TANGO_ASSERT_POSITION(OrtApi, GetTensorMemoryInfo, 194);
TANGO_ASSERT_POSITION(OrtApi, HasSessionConfigEntry, 237);
TANGO_ASSERT_POSITION(OrtApi, KernelContext_GetAllocator, 253);

// ONNX Runtime reads these members; it reads those after KernelDestroy only because `version` is at least 16.
TANGO_ASSERT_POSITION(OrtCustomOp, CreateKernel, 1);
TANGO_ASSERT_POSITION(OrtCustomOp, KernelDestroy, 9);
TANGO_ASSERT_POSITION(OrtCustomOp, GetInputMemoryType, 12);
TANGO_ASSERT_POSITION(OrtCustomOp, CreateKernelV2, 17);
TANGO_ASSERT_POSITION(OrtCustomOp, KernelComputeV2, 18);

#undef TANGO_ASSERT_POSITION
