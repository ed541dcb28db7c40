// TensorRT 10 and 11: IPluginV3. Built with the headers of 10.0 it loads in all of them, and links no libnvinfer.
#include <NvInfer.h>

#if NV_TENSORRT_MAJOR >= 10
#include "plugin.h"
#include "tango/common.h"

namespace tango {
namespace {

using namespace nvinfer1;

// From 10.3 on TensorRT can be told which outputs share the memory of an input
// (PreviewFeature::kALIASED_PLUGIN_IO_10_03). Before, all one can do is bind both to one address.
#if NV_TENSORRT_MAJOR > 10 || NV_TENSORRT_MINOR >= 3
using BuildCapability = IPluginV3OneBuildV2;
#define TANGO_ALIASED_INPUT override
#else
using BuildCapability = IPluginV3OneBuild;
#define TANGO_ALIASED_INPUT
#endif

class PluginV3 final : public IPluginV3, public IPluginV3OneCore, public BuildCapability, public IPluginV3OneRuntime {
  public:
    explicit PluginV3(std::unique_ptr<Plugin> plugin) : plugin_(std::move(plugin)) {}

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        switch (type) {
            case PluginCapabilityType::kBUILD: return static_cast<BuildCapability*>(this);
            case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
            default: return static_cast<IPluginV3OneCore*>(this);
        }
    }

    IPluginV3* clone() noexcept override { return new PluginV3(plugin_->clone()); }

    char const* getPluginName() const noexcept override { return plugin_->name(); }
    char const* getPluginVersion() const noexcept override { return kVersion; }
    char const* getPluginNamespace() const noexcept override { return kNamespace; }

    int32_t getNbOutputs() const noexcept override { return plugin_->outputs(); }
    int32_t getAliasedInput(int32_t output) noexcept TANGO_ALIASED_INPUT { return plugin_->alias_of(output); }

    int32_t configurePlugin(DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*,
                            int32_t) noexcept override {
        return 0;
    }

    int32_t getOutputDataTypes(DataType* types, int32_t outputs, DataType const* inputs,
                               int32_t count) const noexcept override {
        for (int32_t i = 0; i < outputs; ++i) types[i] = plugin_->output_type(i, inputs, count);
        return 0;
    }

    int32_t getOutputShapes(DimsExprs const* inputs, int32_t count, DimsExprs const*, int32_t, DimsExprs* shapes,
                            int32_t outputs, IExprBuilder& builder) noexcept override {
        for (int32_t i = 0; i < outputs; ++i)
            if (!plugin_->output_shape(i, inputs, count, builder, shapes[i])) return -1;
        return 0;
    }

    bool supportsFormatCombination(int32_t position, DynamicPluginTensorDesc const* tensors, int32_t,
                                   int32_t) noexcept override {
        std::vector<DataType> types;
        for (int32_t i = 0; i <= position; ++i) types.push_back(tensors[i].desc.type);
        return tensors[position].desc.format == TensorFormat::kLINEAR && plugin_->supports(types);
    }

    size_t getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t count, DynamicPluginTensorDesc const*,
                            int32_t) const noexcept override {
        std::vector<PluginTensorDesc> largest;
        for (int32_t i = 0; i < count; ++i) {
            largest.push_back(inputs[i].desc);
            largest.back().dims = inputs[i].max;
        }
        return plugin_->workspace_size(largest.data());
    }

    int32_t onShapeChange(PluginTensorDesc const*, int32_t, PluginTensorDesc const*, int32_t) noexcept override {
        return 0;
    }

    int32_t enqueue(PluginTensorDesc const* input_descriptions, PluginTensorDesc const* output_descriptions,
                    void const* const* inputs, void* const* outputs, void* workspace,
                    cudaStream_t stream) noexcept override {
        return plugin_->enqueue(input_descriptions, output_descriptions, inputs, outputs, workspace, stream);
    }

    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }

    PluginFieldCollection const* getFieldsToSerialize() noexcept override { return plugin_->fields(); }

  private:
    std::unique_ptr<Plugin> plugin_;
};

class CreatorV3 final : public IPluginCreatorV3One {
  public:
    explicit CreatorV3(const PluginKind* kind) : kind_(kind) {}

    IPluginV3* createPlugin(char const*, PluginFieldCollection const* fields, TensorRTPhase phase) noexcept override {
        const Phase known = phase == TensorRTPhase::kBUILD ? Phase::kBuild : Phase::kRun;
        std::unique_ptr<Plugin> made = fields == nullptr ? nullptr : kind_->make(*fields, known);
        return made == nullptr ? nullptr : new PluginV3(std::move(made));
    }

    PluginFieldCollection const* getFieldNames() noexcept override { return kind_->field_names(); }
    char const* getPluginName() const noexcept override { return kind_->name(); }
    char const* getPluginVersion() const noexcept override { return kVersion; }
    char const* getPluginNamespace() const noexcept override { return kNamespace; }

  private:
    const PluginKind* kind_;
};

// The creators live as long as the process, because TensorRT refers to them.
const std::vector<IPluginCreatorInterface*>& creators() {
    static const std::vector<IPluginCreatorInterface*>& all = *[] {
        auto* made = new std::vector<IPluginCreatorInterface*>();
        for (const PluginKind* kind : all_kinds()) made->push_back(new CreatorV3(kind));
        return made;
    }();
    return all;
}

}  // namespace
}  // namespace tango

extern "C" TANGO_API nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
    count = static_cast<int32_t>(tango::creators().size());
    return tango::creators().data();
}

extern "C" TANGO_API void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
    tango::set_logger(finder == nullptr ? nullptr : finder->findLogger());
}

// For hosts that open this library themselves: registers the plugins with their registry.
extern "C" TANGO_API bool tango_register_plugins(nvinfer1::IPluginRegistry* registry) {
    if (registry == nullptr) return false;
    bool all = true;
    for (nvinfer1::IPluginCreatorInterface* creator : tango::creators())
        all = registry->registerCreator(*creator, tango::kNamespace) && all;
    return all;
}
#endif
