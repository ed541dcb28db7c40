// TensorRT 10 and 11: IPluginV3. Built with the headers of 10.0 it loads in all of them, and links no libnvinfer.
#include <NvInfer.h>

#if NV_TENSORRT_MAJOR >= 10
#include <cstdint>

#include "fields.h"

namespace tango {
namespace {

using namespace nvinfer1;

class Plugin final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
  public:
    explicit Plugin(const Fields& fields) : fields_(fields) {}

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        switch (type) {
            case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
            case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
            default: return static_cast<IPluginV3OneCore*>(this);
        }
    }

    IPluginV3* clone() noexcept override { return new Plugin(fields_); }

    char const* getPluginName() const noexcept override { return kName; }
    char const* getPluginVersion() const noexcept override { return kVersion; }
    char const* getPluginNamespace() const noexcept override { return kNamespace; }

    int32_t getNbOutputs() const noexcept override { return kOutputs; }

    int32_t configurePlugin(DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*,
                            int32_t) noexcept override {
        return 0;
    }

    int32_t getOutputDataTypes(DataType* types, int32_t outputs, DataType const* inputs,
                               int32_t) const noexcept override {
        for (int32_t i = 0; i < outputs; ++i) types[i] = output_type(i, inputs[kFeatures]);
        return 0;
    }

    int32_t getOutputShapes(DimsExprs const* inputs, int32_t, DimsExprs const*, int32_t, DimsExprs* outputs,
                            int32_t count, IExprBuilder& builder) noexcept override {
        for (int32_t i = 0; i < count; ++i) outputs[i] = output_shape(i, fields_, inputs[kFeatures], builder);
        return 0;
    }

    bool supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* tensors, int32_t,
                                   int32_t) noexcept override {
        return is_supported(position, tensors[position].desc.type, tensors[kFeatures].desc.type,
                            tensors[position].desc.format);
    }

    size_t getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t, DynamicPluginTensorDesc const*,
                            int32_t) const noexcept override {
        return workspace_size(fields_, inputs[kFeatures].max, inputs[kFeatures].desc.type);
    }

    int32_t onShapeChange(PluginTensorDesc const* inputs, int32_t, PluginTensorDesc const*, int32_t) noexcept override {
        return workspace_size(fields_, inputs[kFeatures].dims, inputs[kFeatures].type) > 0 ? 0 : -1;
    }

    int32_t enqueue(PluginTensorDesc const* input_descriptions, PluginTensorDesc const*, void const* const* inputs,
                    void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
        return tango::enqueue(fields_, input_descriptions[kFeatures], inputs, outputs, workspace, stream);
    }

    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }

    PluginFieldCollection const* getFieldsToSerialize() noexcept override { return fields_.write(); }

  private:
    Fields fields_;
};

class Creator final : public IPluginCreatorV3One {
  public:
    IPluginV3* createPlugin(char const*, PluginFieldCollection const* collection, TensorRTPhase) noexcept override {
        Fields fields;
        return collection != nullptr && fields.read(*collection) ? new Plugin(fields) : nullptr;
    }

    PluginFieldCollection const* getFieldNames() noexcept override { return Fields::names(); }
    char const* getPluginName() const noexcept override { return kName; }
    char const* getPluginVersion() const noexcept override { return kVersion; }
    char const* getPluginNamespace() const noexcept override { return kNamespace; }
};

Creator creator;

}  // namespace
}  // namespace tango

extern "C" TANGO_API nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&tango::creator};
    count = 1;
    return creators;
}

extern "C" TANGO_API void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
    tango::set_logger(finder == nullptr ? nullptr : finder->findLogger());
}

// For hosts that open this library themselves: registers the plugin with their registry.
extern "C" TANGO_API bool tango_register_plugins(nvinfer1::IPluginRegistry* registry) {
    return registry != nullptr && registry->registerCreator(tango::creator, tango::kNamespace);
}
#endif
