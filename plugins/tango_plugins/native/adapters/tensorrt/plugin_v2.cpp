// TensorRT 8.5 and 8.6: IPluginV2DynamicExt.
#include <NvInfer.h>

#if NV_TENSORRT_MAJOR < 10
#include <cstring>
#include <string>

#include "fields.h"

namespace tango {
namespace {

using namespace nvinfer1;

class Plugin final : public IPluginV2DynamicExt {
  public:
    explicit Plugin(const Fields& fields) : fields_(fields) {}

    IPluginV2DynamicExt* clone() const noexcept override {
        auto* copy = new Plugin(fields_);
        copy->setPluginNamespace(namespace_.c_str());
        return copy;
    }

    DimsExprs getOutputDimensions(int32_t output, DimsExprs const* inputs, int32_t,
                                  IExprBuilder& builder) noexcept override {
        return output_shape(output, fields_, inputs[kFeatures], builder);
    }

    bool supportsFormatCombination(int32_t position, PluginTensorDesc const* tensors, int32_t,
                                   int32_t) noexcept override {
        return is_supported(position, tensors[position].type, tensors[kFeatures].type, tensors[position].format);
    }

    void configurePlugin(DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*,
                         int32_t) noexcept override {}

    size_t getWorkspaceSize(PluginTensorDesc const* inputs, int32_t, PluginTensorDesc const*,
                            int32_t) const noexcept override {
        return workspace_size(fields_, inputs[kFeatures].dims, inputs[kFeatures].type);
    }

    int32_t enqueue(PluginTensorDesc const* input_descriptions, PluginTensorDesc const*, void const* const* inputs,
                    void* const* outputs, void* workspace, cudaStream_t stream) noexcept override {
        return tango::enqueue(fields_, input_descriptions[kFeatures], inputs, outputs, workspace, stream);
    }

    DataType getOutputDataType(int32_t output, DataType const* inputs, int32_t) const noexcept override {
        return output_type(output, inputs[kFeatures]);
    }

    char const* getPluginType() const noexcept override { return kName; }
    char const* getPluginVersion() const noexcept override { return kVersion; }
    int32_t getNbOutputs() const noexcept override { return kOutputs; }
    int32_t initialize() noexcept override { return 0; }
    void terminate() noexcept override {}
    void destroy() noexcept override { delete this; }
    void setPluginNamespace(char const* name) noexcept override { namespace_ = name; }
    char const* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

    size_t getSerializationSize() const noexcept override { return fields_.to_bytes().size(); }

    void serialize(void* buffer) const noexcept override {
        const std::string bytes = fields_.to_bytes();
        std::memcpy(buffer, bytes.data(), bytes.size());
    }

  private:
    Fields fields_;
    std::string namespace_ = kNamespace;
};

class Creator final : public IPluginCreator {
  public:
    IPluginV2* createPlugin(char const*, PluginFieldCollection const* collection) noexcept override {
        Fields fields;
        return collection != nullptr && fields.read(*collection) ? new Plugin(fields) : nullptr;
    }

    IPluginV2* deserializePlugin(char const*, void const* data, size_t length) noexcept override {
        Fields fields;
        return fields.from_bytes(data, length) ? new Plugin(fields) : nullptr;
    }

    PluginFieldCollection const* getFieldNames() noexcept override { return Fields::names(); }
    char const* getPluginName() const noexcept override { return kName; }
    char const* getPluginVersion() const noexcept override { return kVersion; }
    void setPluginNamespace(char const*) noexcept override {}
    char const* getPluginNamespace() const noexcept override { return kNamespace; }
};

Creator creator;

}  // namespace
}  // namespace tango

#if NV_TENSORRT_MAJOR > 8 || NV_TENSORRT_MINOR >= 6
extern "C" TANGO_API nvinfer1::IPluginCreator* const* getPluginCreators(int32_t& count) {
    static nvinfer1::IPluginCreator* const creators[] = {&tango::creator};
    count = 1;
    return creators;
}

extern "C" TANGO_API void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
    tango::set_logger(finder == nullptr ? nullptr : finder->findLogger());
}
#endif

// For hosts that open this library themselves, because 8.5 has no loadLibrary: registers the plugin with their
// registry, which getPluginRegistry() of libnvinfer returns.
extern "C" TANGO_API bool tango_register_plugins(nvinfer1::IPluginRegistry* registry) {
    return registry != nullptr && registry->registerCreator(tango::creator, tango::kNamespace);
}
#endif
