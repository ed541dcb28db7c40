// TensorRT 8.5 and 8.6: IPluginV2DynamicExt.
#include <NvInfer.h>

#if NV_TENSORRT_MAJOR < 10
#include <cstring>

#include "plugin.h"
#include "tango/common.h"

namespace tango {
namespace {

using namespace nvinfer1;

constexpr int32_t kFormat = 2;  // of what an engine stores

size_t item_size(PluginFieldType type) { return type == PluginFieldType::kCHAR ? 1 : sizeof(int32_t); }

// Fields as bytes: the format, then name, type, length and values of each. Integers have 32 bits; a name ends in a
// zero.
std::string to_bytes(const PluginFieldCollection& collection) {
    std::string bytes;
    const auto append = [&](const void* data, size_t size) { bytes.append(static_cast<const char*>(data), size); };
    append(&kFormat, sizeof kFormat);
    for (int i = 0; i < collection.nbFields; ++i) {
        const PluginField& field = collection.fields[i];
        const int32_t head[] = {static_cast<int32_t>(field.type), field.length};
        append(field.name, std::strlen(field.name) + 1);
        append(head, sizeof head);
        append(field.data, field.length * item_size(field.type));
    }
    return bytes;
}

// What `to_bytes` stored.
class StoredFields {
  public:
    // Returns false if they are incomplete, or of another format.
    bool read(const char* data, size_t size) {
        const char* const end = data + size;
        int32_t format = 0;
        if (!take(data, end, &format, sizeof format) || format != kFormat) return false;
        while (data != end) {
            const char* const name = data;
            data = static_cast<const char*>(std::memchr(name, 0, end - name));
            int32_t head[2] = {};
            if (data == nullptr || !take(++data, end, head, sizeof head) || head[1] < 0) return false;
            const auto type = static_cast<PluginFieldType>(head[0]);
            const size_t bytes = head[1] * item_size(type);
            if (bytes > static_cast<size_t>(end - data)) return false;
            values_.emplace_back(data, bytes);  // a copy, which is aligned
            fields_.emplace_back(name, nullptr, type, head[1]);
            data += bytes;
        }
        for (size_t i = 0; i < fields_.size(); ++i) fields_[i].data = values_[i].data();
        collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
        return true;
    }

    const PluginFieldCollection& collection() const { return collection_; }

  private:
    static bool take(const char*& from, const char* end, void* to, size_t size) {
        if (size > static_cast<size_t>(end - from)) return false;
        std::memcpy(to, from, size);
        from += size;
        return true;
    }

    std::vector<std::string> values_;
    std::vector<PluginField> fields_;
    PluginFieldCollection collection_ = {};
};

class PluginV2 final : public IPluginV2DynamicExt {
  public:
    explicit PluginV2(std::unique_ptr<Plugin> plugin) : plugin_(std::move(plugin)) {}

    IPluginV2DynamicExt* clone() const noexcept override {
        auto* copy = new PluginV2(plugin_->clone());
        copy->setPluginNamespace(namespace_.c_str());
        return copy;
    }

    DimsExprs getOutputDimensions(int32_t output, DimsExprs const* inputs, int32_t count,
                                  IExprBuilder& builder) noexcept override {
        DimsExprs shape = {};
        if (!plugin_->output_shape(output, inputs, count, builder, shape)) shape.nbDims = -1;
        return shape;
    }

    bool supportsFormatCombination(int32_t position, PluginTensorDesc const* tensors, int32_t,
                                   int32_t) noexcept override {
        std::vector<DataType> types;
        for (int32_t i = 0; i <= position; ++i) types.push_back(tensors[i].type);
        return tensors[position].format == TensorFormat::kLINEAR && plugin_->supports(types);
    }

    void configurePlugin(DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*,
                         int32_t) noexcept override {}

    size_t getWorkspaceSize(PluginTensorDesc const* inputs, int32_t, PluginTensorDesc const*,
                            int32_t) const noexcept override {
        return plugin_->workspace_size(inputs);
    }

    int32_t enqueue(PluginTensorDesc const* input_descriptions, PluginTensorDesc const* output_descriptions,
                    void const* const* inputs, void* const* outputs, void* workspace,
                    cudaStream_t stream) noexcept override {
        return plugin_->enqueue(input_descriptions, output_descriptions, inputs, outputs, workspace, stream);
    }

    DataType getOutputDataType(int32_t output, DataType const* inputs, int32_t count) const noexcept override {
        return plugin_->output_type(output, inputs, count);
    }

    char const* getPluginType() const noexcept override { return plugin_->name(); }
    char const* getPluginVersion() const noexcept override { return kVersion; }
    int32_t getNbOutputs() const noexcept override { return plugin_->outputs(); }
    int32_t initialize() noexcept override { return 0; }
    void terminate() noexcept override {}
    void destroy() noexcept override { delete this; }
    void setPluginNamespace(char const* name) noexcept override { namespace_ = name; }
    char const* getPluginNamespace() const noexcept override { return namespace_.c_str(); }

    size_t getSerializationSize() const noexcept override { return to_bytes(*plugin_->fields()).size(); }

    void serialize(void* buffer) const noexcept override {
        const std::string bytes = to_bytes(*plugin_->fields());
        std::memcpy(buffer, bytes.data(), bytes.size());
    }

  private:
    std::unique_ptr<Plugin> plugin_;
    std::string namespace_ = kNamespace;
};

class CreatorV2 final : public IPluginCreator {
  public:
    explicit CreatorV2(const PluginKind* kind) : kind_(kind) {}

    IPluginV2* createPlugin(char const*, PluginFieldCollection const* fields) noexcept override {
        return fields == nullptr ? nullptr : make(*fields, Phase::kBuild);
    }

    IPluginV2* deserializePlugin(char const*, void const* data, size_t length) noexcept override {
        StoredFields stored;
        if (stored.read(static_cast<const char*>(data), length)) return make(stored.collection(), Phase::kRun);
        report(kind_->name(), "the engine contains a plugin of another version: rebuild the engine");
        return nullptr;
    }

    PluginFieldCollection const* getFieldNames() noexcept override { return kind_->field_names(); }
    char const* getPluginName() const noexcept override { return kind_->name(); }
    char const* getPluginVersion() const noexcept override { return kVersion; }
    void setPluginNamespace(char const*) noexcept override {}
    char const* getPluginNamespace() const noexcept override { return kNamespace; }

  private:
    IPluginV2* make(const PluginFieldCollection& fields, Phase phase) const {
        std::unique_ptr<Plugin> made = kind_->make(fields, phase);
        return made == nullptr ? nullptr : new PluginV2(std::move(made));
    }

    const PluginKind* kind_;
};

// The creators live as long as the process, because TensorRT refers to them.
const std::vector<IPluginCreator*>& creators() {
    static const std::vector<IPluginCreator*>& all = *[] {
        auto* made = new std::vector<IPluginCreator*>();
        for (const PluginKind* kind : all_kinds()) made->push_back(new CreatorV2(kind));
        return made;
    }();
    return all;
}

}  // namespace
}  // namespace tango

#if NV_TENSORRT_MAJOR > 8 || NV_TENSORRT_MINOR >= 6
extern "C" TANGO_API nvinfer1::IPluginCreator* const* getPluginCreators(int32_t& count) {
    count = static_cast<int32_t>(tango::creators().size());
    return tango::creators().data();
}

extern "C" TANGO_API void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
    tango::set_logger(finder == nullptr ? nullptr : finder->findLogger());
}
#endif

// For hosts that open this library themselves, because 8.5 has no loadLibrary: registers the plugins with their
// registry, which getPluginRegistry() of libnvinfer returns.
extern "C" TANGO_API bool tango_register_plugins(nvinfer1::IPluginRegistry* registry) {
    if (registry == nullptr) return false;
    bool all = true;
    for (nvinfer1::IPluginCreator* creator : tango::creators())
        all = registry->registerCreator(*creator, tango::kNamespace) && all;
    return all;
}
#endif
