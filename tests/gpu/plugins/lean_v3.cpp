// The V3 plugin in TensorRT's lean runtime, which has a registry but no builder: loads the library, finds the creator,
// makes the plugin from fields, configures shapes, enqueues, and compares with the C interface, bit by bit.
//
//   nvcc -std=c++17 -I TENSORRT/include -I plugins/tango_plugins/native/include tests/gpu/plugins/lean_v3.cpp \
//        -Xlinker libnvinfer_lean.so.11 libtango.so -ldl -o lean_v3 && ./lean_v3 libtango_tensorrt.so
#include <NvInfer.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <dlfcn.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "tango/prune.h"

using namespace nvinfer1;

namespace {

void require(bool holds, const char* what) {
    std::printf("%s %s\n", holds ? "ok    " : "FAILED", what);
    if (!holds) std::exit(1);
}

struct Memory {
    void* pointer = nullptr;
    size_t bytes;

    explicit Memory(size_t size) : bytes(size) {
        require(cudaMalloc(&pointer, size) == cudaSuccess && cudaMemset(pointer, 0x7f, size) == cudaSuccess, "memory");
    }

    std::vector<char> read() const {
        std::vector<char> host(bytes);
        cudaMemcpy(host.data(), pointer, bytes, cudaMemcpyDeviceToHost);
        return host;
    }
};

PluginTensorDesc describe(DataType type, std::vector<int64_t> shape) {
    PluginTensorDesc found = {};
    found.type = type;
    found.format = TensorFormat::kLINEAR;
    found.dims.nbDims = static_cast<int32_t>(shape.size());
    for (size_t i = 0; i < shape.size(); ++i) found.dims.d[i] = shape[i];
    return found;
}

}  // namespace

int main(int, char** arguments) {
    constexpr int F = 12, H = 8, L = H * H, D = 256;
    require(cudaFree(nullptr) == cudaSuccess, "a GPU");
    IPluginRegistry* registry = getPluginRegistry();
    require(registry != nullptr, "the registry of the lean runtime");
    require(registry->loadLibrary(arguments[1]) != nullptr, "loadLibrary");
    auto* found = registry->getCreator("TangoPrune", "1", "tango");
    require(found != nullptr, "getCreator");
    auto* creator = static_cast<IPluginCreatorV3One*>(found);
    require(creator->getFieldNames()->nbFields == 14, "fourteen fields");

    const int32_t ratio = 2000, grid[] = {H, H};
    const PluginField fields[] = {{"retention_ratio", &ratio, PluginFieldType::kINT32, 1},
                                  {"grid", grid, PluginFieldType::kINT32, 2},
                                  {"budget", "exact", PluginFieldType::kCHAR, 5}};
    const PluginFieldCollection collection = {3, fields};
    IPluginV3* plugin = creator->createPlugin("prune", &collection, TensorRTPhase::kBUILD);
    require(plugin != nullptr, "createPlugin");
    const PluginField wrong = {"budget", "none", PluginFieldType::kCHAR, 4};
    const PluginFieldCollection wrongs = {1, &wrong}, no_grid = {1, fields};
    require(creator->createPlugin("prune", &wrongs, TensorRTPhase::kBUILD) == nullptr, "a wrong field is rejected");
    require(creator->createPlugin("prune", &no_grid, TensorRTPhase::kBUILD) == nullptr, "a missing grid is rejected");
    auto* build = static_cast<IPluginV3OneBuild*>(plugin->getCapabilityInterface(PluginCapabilityType::kBUILD));

    TangoPruneParams params;
    tango_prune_defaults(H, H, &params);
    params.retention_ratio = ratio;
    params.segment_threshold = 8000;
    params.budget = TANGO_BUDGET_EXACT;
    const TangoPruneShape shape = {F, L, D, TANGO_FP16};
    int32_t capacity = 0;
    size_t bytes = 0;
    require(tango_prune_capacity(&shape, &params, &capacity) == TANGO_OK, "capacity");
    require(tango_prune_workspace(&shape, &params, &bytes) == TANGO_OK, "workspace");

    PluginTensorDesc inputs[] = {describe(DataType::kHALF, {F, L, D}), describe(DataType::kFLOAT, {F, L}),
                                 describe(DataType::kFLOAT, {F})};
    PluginTensorDesc outputs[] = {describe(DataType::kHALF, {capacity, D}), describe(DataType::kINT32, {capacity}),
                                  describe(DataType::kINT32, {})};
    DynamicPluginTensorDesc dynamic[6] = {};
    for (int i = 0; i < 6; ++i) {
        dynamic[i].desc = i < 3 ? inputs[i] : outputs[i - 3];
        dynamic[i].min = dynamic[i].max = dynamic[i].desc.dims;
        require(build->supportsFormatCombination(i, dynamic, 3, 3), "format");
    }
    require(build->configurePlugin(dynamic, 3, dynamic + 3, 3) == 0, "configurePlugin");
    require(build->getWorkspaceSize(dynamic, 3, dynamic + 3, 3) == bytes, "the same workspace");

    // As an engine does: serialize the fields, make the plugin again from them.
    auto* runtime = static_cast<IPluginV3OneRuntime*>(plugin->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    IPluginV3* loaded = creator->createPlugin("prune", runtime->getFieldsToSerialize(), TensorRTPhase::kRUNTIME);
    require(loaded != nullptr, "createPlugin from serialized fields");
    runtime = static_cast<IPluginV3OneRuntime*>(loaded->getCapabilityInterface(PluginCapabilityType::kRUNTIME));
    require(runtime->onShapeChange(inputs, 3, outputs, 3) == 0, "onShapeChange");

    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    std::vector<__half> features(F * L * D);
    std::vector<float> scene(L * D), salience(F * L), timestamps(F);
    for (float& value : scene) value = normal(random);
    for (int i = 0; i < F * L * D; ++i) features[i] = __float2half(scene[i % (L * D)] + 0.6f * normal(random));
    for (float& value : salience) value = normal(random);
    for (int f = 0; f < F; ++f) timestamps[f] = 0.5f * f;
    Memory x(features.size() * 2), a(salience.size() * 4), t(timestamps.size() * 4), workspace(bytes);
    cudaMemcpy(x.pointer, features.data(), x.bytes, cudaMemcpyHostToDevice);
    cudaMemcpy(a.pointer, salience.data(), a.bytes, cudaMemcpyHostToDevice);
    cudaMemcpy(t.pointer, timestamps.data(), t.bytes, cudaMemcpyHostToDevice);
    Memory tokens[2] = {Memory(capacity * D * 2), Memory(capacity * D * 2)};
    Memory indices[2] = {Memory(capacity * 4), Memory(capacity * 4)}, count[2] = {Memory(4), Memory(4)};

    const void* given[] = {x.pointer, a.pointer, t.pointer};
    void* wanted[] = {tokens[0].pointer, indices[0].pointer, count[0].pointer};
    require(runtime->enqueue(inputs, outputs, given, wanted, workspace.pointer, nullptr) == 0, "enqueue");
    require(cudaDeviceSynchronize() == cudaSuccess, "synchronize");
    const TangoPruneTensors tensors = {x.pointer,
                                       static_cast<float*>(a.pointer),
                                       static_cast<float*>(t.pointer),
                                       tokens[1].pointer,
                                       static_cast<int32_t*>(indices[1].pointer),
                                       static_cast<int32_t*>(count[1].pointer),
                                       nullptr,
                                       nullptr};
    require(tango_prune_enqueue(&shape, &params, &tensors, workspace.pointer, bytes, nullptr) == TANGO_OK, "direct");
    require(cudaDeviceSynchronize() == cudaSuccess, "synchronize");
    require(tokens[0].read() == tokens[1].read(), "the same tokens");
    require(indices[0].read() == indices[1].read(), "the same indices");
    require(count[0].read() == count[1].read(), "the same count");
    int32_t kept = 0;
    std::memcpy(&kept, count[0].read().data(), 4);
    std::printf("%d of %d tokens kept\n", kept, F * L);
    require(kept == 154, "ceil(0.2 F L) tokens");
}
