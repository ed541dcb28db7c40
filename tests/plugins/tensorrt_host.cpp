// A host of plugins that is not TensorRT: makes a plugin of fields as a parser does, stores it and makes it again as an
// engine does, asks for types and shapes, and runs it.
#include <NvInfer.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <deque>
#include <string>
#include <vector>

using namespace nvinfer1;

namespace {

std::string message;

class Logger final : public ILogger {
    void log(Severity, AsciiChar const* text) noexcept override { message = text; }
};

class Finder final : public ILoggerFinder {
    ILogger* findLogger() noexcept override { return &logger_; }
    Logger logger_;
};

// A length that is known.
class Known final : public IDimensionExpr, public apiv::VDimensionExpr {
  public:
    explicit Known(int64_t value) : value_(value) { mImpl = this; }
    bool isConstant() const noexcept override { return true; }
#if NV_TENSORRT_MAJOR >= 10
    int64_t getConstantValue() const noexcept override { return value_; }
    bool isSizeTensor() const noexcept override { return false; }
#else
    int32_t getConstantValue() const noexcept override { return static_cast<int32_t>(value_); }
#endif
  private:
    int64_t value_;
};

class Arithmetic final : public IExprBuilder, public apiv::VExprBuilder {
  public:
    Arithmetic() { mImpl = this; }

#if NV_TENSORRT_MAJOR >= 10
    IDimensionExpr const* constant(int64_t value) noexcept override { return &known_.emplace_back(value); }
    IDimensionExpr const* declareSizeTensor(int32_t, IDimensionExpr const&, IDimensionExpr const&) noexcept override {
        return nullptr;
    }
#else
    IDimensionExpr const* constant(int32_t value) noexcept override { return &known_.emplace_back(value); }
#endif

    IDimensionExpr const* operation(DimensionOperation operation, IDimensionExpr const& first,
                                    IDimensionExpr const& second) noexcept override {
        const int64_t a = first.getConstantValue(), b = second.getConstantValue();
        switch (operation) {
            case DimensionOperation::kSUM: return &known_.emplace_back(a + b);
            case DimensionOperation::kPROD: return &known_.emplace_back(a * b);
            case DimensionOperation::kMIN: return &known_.emplace_back(std::min(a, b));
            case DimensionOperation::kFLOOR_DIV: return &known_.emplace_back(a / b);
            default: return nullptr;
        }
    }

  private:
    std::deque<Known> known_;
};

}  // namespace

struct HostTensor {
    const char* type;
    int32_t rank;
    int64_t shape[8];
    void* data;
};

struct HostField {
    const char* name;
    int32_t is_float;
    union {
        int32_t integer;
        float real;
    };
};

namespace {

DataType convert(const char* type) {
    return std::strcmp(type, "float16") == 0   ? DataType::kHALF
           : std::strcmp(type, "int8") == 0    ? DataType::kINT8
           : std::strcmp(type, "uint8") == 0   ? DataType::kUINT8
           : std::strcmp(type, "float32") == 0 ? DataType::kFLOAT
                                               : DataType::kINT32;
}

#if NV_TENSORRT_MAJOR >= 10
using Creators = IPluginCreatorInterface* const* (*)(int32_t&);
using Made = IPluginV3;
using Description = DynamicPluginTensorDesc;
constexpr char kCreators[] = "getCreators";

Description describe(const HostTensor& tensor) {
    Description found = {};
    found.desc.type = convert(tensor.type), found.desc.format = TensorFormat::kLINEAR;
    found.desc.dims.nbDims = tensor.rank;
    std::copy(tensor.shape, tensor.shape + tensor.rank, found.desc.dims.d);
    found.min = found.opt = found.max = found.desc.dims;
    return found;
}

const PluginTensorDesc& known(const Description& description) { return description.desc; }

template <typename Capability>
Capability& capability(IPluginV3* plugin, PluginCapabilityType type) {
    return *static_cast<Capability*>(plugin->getCapabilityInterface(type));
}

// The interface that a plugin says it has, as TensorRT finds the methods of newer versions.
IPluginV3OneBuild& build(IPluginV3* plugin) {
    return capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
}

Made* make(IPluginCreatorInterface* creator, const PluginFieldCollection& fields, bool building) {
    auto* made = static_cast<IPluginCreatorV3One*>(creator);
    IPluginV3* first = made->createPlugin("node", &fields, TensorRTPhase::kBUILD);
    if (first == nullptr) return nullptr;
    IPluginV3* copy = first->clone();
    delete first;
    if (building) return copy;
    auto& runtime = capability<IPluginV3OneRuntime>(copy, PluginCapabilityType::kRUNTIME);
    IPluginV3* loaded = made->createPlugin("node", runtime.getFieldsToSerialize(), TensorRTPhase::kRUNTIME);
    delete copy;
    return loaded;
}

const char* name_of(IPluginCreatorInterface* creator) {
    return static_cast<IPluginCreatorV3One*>(creator)->getPluginName();
}

bool give_shapes(Made* plugin, const std::vector<DimsExprs>& inputs, std::vector<DimsExprs>& outputs,
                 IExprBuilder& builder) {
    return build(plugin).getOutputShapes(inputs.data(), static_cast<int32_t>(inputs.size()), nullptr, 0, outputs.data(),
                                         static_cast<int32_t>(outputs.size()), builder) == 0;
}

DataType give_type(Made* plugin, int32_t output, const std::vector<DataType>& inputs, int32_t outputs) {
    std::vector<DataType> types(outputs);
    build(plugin).getOutputDataTypes(types.data(), outputs, inputs.data(), static_cast<int32_t>(inputs.size()));
    return types[output];
}

bool supports(Made* plugin, int32_t position, const std::vector<Description>& tensors, int32_t inputs) {
    return build(plugin).supportsFormatCombination(position, tensors.data(), inputs,
                                                   static_cast<int32_t>(tensors.size()) - inputs);
}

int32_t outputs_of(Made* plugin) { return build(plugin).getNbOutputs(); }

int32_t enqueue(Made* plugin, const std::vector<PluginTensorDesc>& tensors, int32_t inputs, const void* const* from,
                void* const* to) {
    IPluginV3* attached =
        capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME).attachToContext(nullptr);
    auto& runtime = capability<IPluginV3OneRuntime>(attached, PluginCapabilityType::kRUNTIME);
    const int32_t status = runtime.enqueue(tensors.data(), tensors.data() + inputs, from, to, nullptr, nullptr);
    delete attached;
    return status;
}

// Whether an output may have the memory of an input.
bool may_alias(Made* plugin, int32_t output, int32_t input) {
#if NV_TENSORRT_MAJOR > 10 || NV_TENSORRT_MINOR >= 3
    if (build(plugin).getInterfaceInfo().major < 2) return false;
    return static_cast<IPluginV3OneBuildV2&>(build(plugin)).getAliasedInput(output) == input;
#else
    return plugin != nullptr && output >= 0 && input >= 0;  // not asked
#endif
}

void destroy(Made* plugin) { delete plugin; }
#else
using Creators = IPluginCreator* const* (*)(int32_t&);
using Made = IPluginV2DynamicExt;
using Description = PluginTensorDesc;
constexpr char kCreators[] = "getPluginCreators";

Description describe(const HostTensor& tensor) {
    Description found = {};
    found.type = convert(tensor.type), found.format = TensorFormat::kLINEAR;
    found.dims.nbDims = tensor.rank;
    std::copy(tensor.shape, tensor.shape + tensor.rank, found.dims.d);
    return found;
}

const PluginTensorDesc& known(const Description& description) { return description; }

Made* make(IPluginCreator* creator, const PluginFieldCollection& fields, bool building) {
    IPluginV2* first = creator->createPlugin("node", &fields);
    if (first == nullptr) return nullptr;
    auto* copy = static_cast<IPluginV2DynamicExt*>(first)->clone();
    first->destroy();
    if (building) return copy;
    std::vector<char> bytes(copy->getSerializationSize());
    copy->serialize(bytes.data());
    copy->destroy();
    for (size_t size = 0; size < bytes.size(); ++size)  // as of an engine that was cut
        if (IPluginV2* part = creator->deserializePlugin("node", bytes.data(), size)) {
            part->destroy();
            message = "a part of a plugin is taken for one";
            return nullptr;
        }
    return static_cast<IPluginV2DynamicExt*>(creator->deserializePlugin("node", bytes.data(), bytes.size()));
}

const char* name_of(IPluginCreator* creator) { return creator->getPluginName(); }

bool give_shapes(Made* plugin, const std::vector<DimsExprs>& inputs, std::vector<DimsExprs>& outputs,
                 IExprBuilder& builder) {
    for (size_t i = 0; i < outputs.size(); ++i)
        outputs[i] = plugin->getOutputDimensions(static_cast<int32_t>(i), inputs.data(),
                                                 static_cast<int32_t>(inputs.size()), builder);
    return std::all_of(outputs.begin(), outputs.end(), [](const DimsExprs& shape) { return shape.nbDims >= 0; });
}

DataType give_type(Made* plugin, int32_t output, const std::vector<DataType>& inputs, int32_t) {
    return plugin->getOutputDataType(output, inputs.data(), static_cast<int32_t>(inputs.size()));
}

bool supports(Made* plugin, int32_t position, const std::vector<Description>& tensors, int32_t inputs) {
    return plugin->supportsFormatCombination(position, tensors.data(), inputs,
                                             static_cast<int32_t>(tensors.size()) - inputs);
}

int32_t outputs_of(Made* plugin) { return plugin->getNbOutputs(); }

int32_t enqueue(Made* plugin, const std::vector<PluginTensorDesc>& tensors, int32_t inputs, const void* const* from,
                void* const* to) {
    return plugin->enqueue(tensors.data(), tensors.data() + inputs, from, to, nullptr, nullptr);
}

bool may_alias(Made*, int32_t, int32_t) { return true; }  // TensorRT 8 does not ask

void destroy(Made* plugin) { plugin->destroy(); }
#endif

// The creators of a library. The caller's logger gets what they report.
std::vector<std::remove_const_t<std::remove_pointer_t<decltype(std::declval<Creators>()(std::declval<int32_t&>()))>>>
creators_of(const char* path) {
    static Finder finder;
    void* library = dlopen(path, RTLD_NOW);
    if (library == nullptr) {
        message = dlerror();
        return {};
    }
    reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library, "setLoggerFinder"))(&finder);
    int32_t count = 0;
    auto* const all = reinterpret_cast<Creators>(dlsym(library, kCreators))(count);
    return {all, all + count};
}

bool run(Made* plugin, const std::vector<HostTensor>& inputs, const std::vector<HostTensor>& outputs) {
    Arithmetic arithmetic;
    std::vector<DimsExprs> shapes, found(outputs.size());
    std::vector<DataType> types;
    std::vector<Description> descriptions;
    std::vector<const void*> from;
    std::vector<void*> to;
    for (const HostTensor& tensor : inputs) {
        DimsExprs shape = {};
        shape.nbDims = tensor.rank;
        for (int i = 0; i < tensor.rank; ++i) shape.d[i] = arithmetic.constant(tensor.shape[i]);
        shapes.push_back(shape);
        types.push_back(convert(tensor.type));
        descriptions.push_back(describe(tensor));
        from.push_back(tensor.data);
    }
    const int32_t count = outputs_of(plugin);
    if (static_cast<size_t>(count) != outputs.size()) return message = "another number of outputs", false;
    if (!give_shapes(plugin, shapes, found, arithmetic)) return false;
    for (int32_t i = 0; i < count; ++i) {
        const HostTensor& wanted = outputs[i];
        bool same = found[i].nbDims == wanted.rank && give_type(plugin, i, types, count) == convert(wanted.type);
        for (int d = 0; same && d < wanted.rank; ++d) same = found[i].d[d]->getConstantValue() == wanted.shape[d];
        if (!same) return message = "output " + std::to_string(i) + " has another shape or type", false;
        for (size_t j = 0; j < inputs.size(); ++j)
            if (wanted.data == inputs[j].data && !may_alias(plugin, i, static_cast<int32_t>(j)))
                return message = "output " + std::to_string(i) + " may not be an input", false;
        descriptions.push_back(describe(wanted));
        to.push_back(wanted.data);
    }
    std::vector<PluginTensorDesc> known_tensors;
    for (size_t i = 0; i < descriptions.size(); ++i) {
        if (!supports(plugin, static_cast<int32_t>(i), descriptions, static_cast<int32_t>(inputs.size())))
            return message = "tensor " + std::to_string(i) + " cannot have this type", false;
        known_tensors.push_back(known(descriptions[i]));
    }
    return enqueue(plugin, known_tensors, static_cast<int32_t>(inputs.size()), from.data(), to.data()) == 0;
}

}  // namespace

// The names of a library's plugins, one a line.
extern "C" const char* host_names(const char* path) {
    static std::string names;
    names.clear();
    for (auto* creator : creators_of(path)) names += std::string(name_of(creator)) + "\n";
    return names.c_str();
}

// Null, or what is wrong. `building`: as a builder runs a plugin to time it, before any engine stores it.
extern "C" const char* host_run(const char* path, const char* name, const HostField* fields, int32_t field_count,
                                const HostTensor* inputs, int32_t input_count, const HostTensor* outputs,
                                int32_t output_count, int32_t building) {
    std::vector<PluginField> given;
    for (int32_t i = 0; i < field_count; ++i)
        given.emplace_back(fields[i].name, &fields[i].integer,
                           fields[i].is_float ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32, 1);
    const PluginFieldCollection collection = {field_count, given.data()};
    message = "there is no such plugin";
    for (auto* creator : creators_of(path)) {
        if (std::strcmp(name_of(creator), name) != 0) continue;
        message = "no reason was given";
        Made* plugin = make(creator, collection, building != 0);
        if (plugin == nullptr) return message.c_str();
        const bool done = run(plugin, {inputs, inputs + input_count}, {outputs, outputs + output_count});
        destroy(plugin);
        return done ? nullptr : message.c_str();
    }
    return message.c_str();
}
