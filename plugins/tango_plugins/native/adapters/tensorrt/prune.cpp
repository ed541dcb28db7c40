// The plugin TangoPrune. Its field grid is required. Without sink positions there are none, and any other missing field
// has the default of the paper and its authors' code. ONNX nodes of tango-edge have all fields.
#include "tango/prune.h"

#include <cstring>
#include <numeric>

#include "plugin.h"

namespace tango {
namespace {

using nvinfer1::DataType;
using nvinfer1::DimensionOperation;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

constexpr char kName[] = "TangoPrune";

// Tensors by position, inputs first.
enum { kFeatures = 0, kSalience, kTimestamps, kTokens, kIndices, kCount };
constexpr int kInputs = 3, kOutputs = 3;

struct Integer {
    const char* name;
    int32_t TangoPruneParams::* value;
};

constexpr Integer kIntegers[] = {
    {"retention_ratio", &TangoPruneParams::retention_ratio},
    {"context_ratio", &TangoPruneParams::context_ratio},
    {"expansion", &TangoPruneParams::expansion},
    {"anchor_weight", &TangoPruneParams::anchor_weight},
    {"segment_threshold", &TangoPruneParams::segment_threshold},
    {"static_threshold", &TangoPruneParams::static_threshold},
    {"neighbors", &TangoPruneParams::neighbors},
    {"time_base", &TangoPruneParams::time_base},
    {"space_base", &TangoPruneParams::space_base},
};

// Names of the values 0 and 1.
struct Choice {
    const char* name;
    int32_t TangoPruneParams::* value;
    const char* words[2];
};

constexpr Choice kChoices[] = {
    {"merge_order", &TangoPruneParams::merge_order, {"anchor", "density"}},
    {"budget", &TangoPruneParams::budget, {"paper", "exact"}},
    {"precision", &TangoPruneParams::precision, {"fast", "exact"}},
};

bool is(const PluginField& field, const char* name) { return std::strcmp(field.name, name) == 0; }

bool reject(const std::string& message) {
    report(kName, message);
    return false;
}

bool reject(const PluginField& field, const std::string& wanted) {
    return reject(std::string("attribute ") + field.name + " must be " + wanted);
}

bool read_list(const PluginField& field, std::vector<int32_t>& list) {
    if (field.length > 0 && field.type != PluginFieldType::kINT32) return reject(field, "a list of integers");
    const auto* values = static_cast<const int32_t*>(field.data);
    list.assign(values, values + field.length);
    return true;
}

bool read_choice(const PluginField& field, const Choice& choice, int32_t& value) {
    const auto* text = static_cast<const char*>(field.data);
    std::string word(text, text + (field.type == PluginFieldType::kCHAR ? field.length : 0));
    word = word.c_str();  // some parsers include the final zero in the length
    for (int i = 0; i < 2; ++i)
        if (word == choice.words[i]) {
            value = i;
            return true;
        }
    return reject(field, std::string(choice.words[0]) + " or " + choice.words[1]);
}

class PrunePlugin final : public Plugin {
  public:
    // Returns false after reporting the error if the grid is missing, or a field has a wrong type or value.
    bool read(const nvinfer1::PluginFieldCollection& collection) {
        bool has_threshold = false;
        tango_prune_defaults(0, 0, &params_);
        for (int i = 0; i < collection.nbFields; ++i) {
            const PluginField& field = collection.fields[i];
            for (const Integer& integer : kIntegers) {
                if (!is(field, integer.name)) continue;
                if (field.type != PluginFieldType::kINT32 || field.length != 1) return reject(field, "one integer");
                params_.*integer.value = *static_cast<const int32_t*>(field.data);
                has_threshold |= integer.value == &TangoPruneParams::segment_threshold;
            }
            for (const Choice& choice : kChoices)
                if (is(field, choice.name) && !read_choice(field, choice, params_.*choice.value)) return false;
            if (is(field, "grid") && (!read_list(field, grid_) || grid_.size() != 2))
                return reject(field, "two integers");
            if (is(field, "sink_positions") && !read_list(field, sinks_)) return false;
        }
        if (grid_.empty()) return reject("the attribute grid is missing: it must be two integers");
        if (!has_threshold) params_.segment_threshold = params_.retention_ratio <= 1000 ? 6500 : 8000;
        return true;
    }

    std::unique_ptr<Plugin> clone() const override { return std::make_unique<PrunePlugin>(*this); }
    const char* name() const override { return kName; }
    int outputs() const override { return kOutputs; }

    const nvinfer1::PluginFieldCollection* fields() override {
        fields_.clear();
        for (const Integer& integer : kIntegers)
            fields_.emplace_back(integer.name, &(params_.*integer.value), PluginFieldType::kINT32, 1);
        for (const Choice& choice : kChoices) {
            const char* word = choice.words[params_.*choice.value];
            fields_.emplace_back(choice.name, word, PluginFieldType::kCHAR, static_cast<int32_t>(std::strlen(word)));
        }
        fields_.emplace_back("grid", grid_.data(), PluginFieldType::kINT32, 2);
        const int32_t sinks = static_cast<int32_t>(sinks_.size());
        fields_.emplace_back("sink_positions", sinks_.data(), PluginFieldType::kINT32, sinks);
        collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
        return &collection_;
    }

    // [capacity, D], [capacity] and a scalar; the capacity is min(F L, F L p div q + 2 F).
    bool output_shape(int output, const nvinfer1::DimsExprs* inputs, int, nvinfer1::IExprBuilder& builder,
                      nvinfer1::DimsExprs& shape) const override {
        shape = {};
        if (kInputs + output == kCount) return true;
        // The ratio in lowest terms, so that products stay small.
        const int32_t ratio = params_.retention_ratio, divisor = std::gcd(ratio, 10000);
        const nvinfer1::DimsExprs& features = inputs[kFeatures];
        const auto apply = [&](DimensionOperation operation, const auto* a, const auto* b) {
            return builder.operation(operation, *a, *b);
        };
        const auto* frames = features.d[0];
        const auto* tokens = apply(DimensionOperation::kPROD, frames, features.d[1]);
        const auto* scaled = apply(DimensionOperation::kPROD, tokens, builder.constant(ratio / divisor));
        const auto* share = apply(DimensionOperation::kFLOOR_DIV, scaled, builder.constant(10000 / divisor));
        const auto* spare = apply(DimensionOperation::kPROD, frames, builder.constant(2));
        shape.nbDims = kInputs + output == kTokens ? 2 : 1;
        shape.d[0] = apply(DimensionOperation::kMIN, tokens, apply(DimensionOperation::kSUM, share, spare));
        if (shape.nbDims == 2) shape.d[1] = features.d[2];
        return true;
    }

    DataType output_type(int output, const DataType* inputs, int) const override {
        return kInputs + output == kTokens ? inputs[kFeatures] : DataType::kINT32;
    }

    bool supports(const std::vector<DataType>& types) const override {
        const DataType type = types.back();
        switch (types.size() - 1) {
            case kFeatures: return type == DataType::kHALF || type == DataType::kFLOAT;
            case kTokens: return type == types[kFeatures];
            case kSalience:
            case kTimestamps: return type == DataType::kFLOAT;
            default: return type == DataType::kINT32;
        }
    }

    size_t workspace_size(const nvinfer1::PluginTensorDesc* inputs) const override {
        TangoPruneShape shape;
        const TangoPruneParams now = params();
        size_t bytes = 0;
        if (!read_shape(inputs[kFeatures], shape)) return 0;
        if (tango_prune_workspace(&shape, &now, &bytes) != TANGO_OK) reject(tango_last_error());
        return bytes;
    }

    int enqueue(const nvinfer1::PluginTensorDesc* input_descriptions, const nvinfer1::PluginTensorDesc*,
                const void* const* inputs, void* const* outputs, void* workspace, cudaStream_t stream) const override {
        TangoPruneShape shape;
        if (!read_shape(input_descriptions[kFeatures], shape)) return -1;
        const TangoPruneParams now = params();
        const TangoPruneTensors tensors = {inputs[kFeatures],
                                           static_cast<const float*>(inputs[kSalience]),
                                           static_cast<const float*>(inputs[kTimestamps]),
                                           outputs[kTokens - kInputs],
                                           static_cast<int32_t*>(outputs[kIndices - kInputs]),
                                           static_cast<int32_t*>(outputs[kCount - kInputs]),
                                           nullptr,
                                           nullptr};
        size_t bytes = 0;
        if (tango_prune_workspace(&shape, &now, &bytes) != TANGO_OK ||
            tango_prune_enqueue(&shape, &now, &tensors, workspace, bytes, stream) != TANGO_OK)
            return reject(tango_last_error()), -1;
        return 0;
    }

  private:
    // Valid until this object changes.
    TangoPruneParams params() const {
        TangoPruneParams params = params_;
        params.grid_rows = grid_[0];
        params.grid_columns = grid_[1];
        params.sink_count = static_cast<int32_t>(sinks_.size());
        params.sink_positions = sinks_.data();
        return params;
    }

    // The video's shape, from that of its features.
    static bool read_shape(const nvinfer1::PluginTensorDesc& features, TangoPruneShape& shape) {
        const nvinfer1::Dims& dims = features.dims;
        if (dims.nbDims != 3)
            return reject("features has " + std::to_string(dims.nbDims) + " axes: it must be [F, L, D]");
        shape = {static_cast<int32_t>(dims.d[0]), static_cast<int32_t>(dims.d[1]), static_cast<int32_t>(dims.d[2]),
                 features.type == DataType::kHALF ? TANGO_FP16 : TANGO_FP32};
        return true;
    }

    TangoPruneParams params_ = {};
    std::vector<int32_t> grid_, sinks_;
    std::vector<PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_ = {};
};

class PruneKind final : public PluginKind {
  public:
    PruneKind() {
        for (const Integer& integer : kIntegers)
            fields_.emplace_back(integer.name, nullptr, PluginFieldType::kINT32, 1);
        for (const Choice& choice : kChoices) fields_.emplace_back(choice.name, nullptr, PluginFieldType::kCHAR, 0);
        fields_.emplace_back("grid", nullptr, PluginFieldType::kINT32, 2);
        fields_.emplace_back("sink_positions", nullptr, PluginFieldType::kINT32, 0);
        collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    }

    const char* name() const override { return kName; }
    const nvinfer1::PluginFieldCollection* field_names() const override { return &collection_; }

    std::unique_ptr<Plugin> make(const nvinfer1::PluginFieldCollection& given, Phase) const override {
        auto plugin = std::make_unique<PrunePlugin>();
        return plugin->read(given) ? std::move(plugin) : nullptr;
    }

  private:
    std::vector<PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_ = {};
};

}  // namespace

const PluginKind& prune_kind() {
    static const PluginKind& kind = *new PruneKind();
    return kind;
}

}  // namespace tango
