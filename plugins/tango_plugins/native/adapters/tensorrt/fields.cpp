#include "fields.h"

#include <cstdio>
#include <cstring>
#include <numeric>

using nvinfer1::DataType;
using nvinfer1::DimensionOperation;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

namespace tango {
namespace {

nvinfer1::ILogger* logger = nullptr;

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

constexpr size_t kNumbers = offsetof(TangoPruneParams, sink_positions) / sizeof(int32_t);
constexpr int32_t kFormat = 1;  // of to_bytes

bool is(const PluginField& field, const char* name) { return std::strcmp(field.name, name) == 0; }

bool reject(const PluginField& field, const char* wanted) {
    report(std::string("attribute ") + field.name + " must be " + wanted);
    return false;
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
    return reject(field, (std::string(choice.words[0]) + " or " + choice.words[1]).c_str());
}

}  // namespace

void set_logger(nvinfer1::ILogger* found) { logger = found; }

void report(const std::string& message) {
    const std::string text = std::string(kName) + ": " + message;
    if (logger != nullptr)
        logger->log(nvinfer1::ILogger::Severity::kERROR, text.c_str());
    else
        std::fprintf(stderr, "%s\n", text.c_str());
}

bool Fields::read(const nvinfer1::PluginFieldCollection& collection) {
    grid_.clear();
    sinks_.clear();
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
        if (is(field, "grid") && (!read_list(field, grid_) || grid_.size() != 2)) return reject(field, "two integers");
        if (is(field, "sink_positions") && !read_list(field, sinks_)) return false;
    }
    if (grid_.empty()) {
        report("the attribute grid is missing: it must be two integers");
        return false;
    }
    if (!has_threshold) params_.segment_threshold = params_.retention_ratio <= 1000 ? 6500 : 8000;
    return true;
}

const nvinfer1::PluginFieldCollection* Fields::write() {
    written_.clear();
    for (const Integer& integer : kIntegers)
        written_.emplace_back(integer.name, &(params_.*integer.value), PluginFieldType::kINT32, 1);
    for (const Choice& choice : kChoices) {
        const char* word = choice.words[params_.*choice.value];
        written_.emplace_back(choice.name, word, PluginFieldType::kCHAR, static_cast<int32_t>(std::strlen(word)));
    }
    written_.emplace_back("grid", grid_.data(), PluginFieldType::kINT32, 2);
    const int32_t sinks = static_cast<int32_t>(sinks_.size());
    written_.emplace_back("sink_positions", sinks_.data(), PluginFieldType::kINT32, sinks);
    collection_ = {static_cast<int32_t>(written_.size()), written_.data()};
    return &collection_;
}

const nvinfer1::PluginFieldCollection* Fields::names() {
    static const std::vector<PluginField> fields = [] {
        std::vector<PluginField> known;
        for (const Integer& integer : kIntegers) known.emplace_back(integer.name, nullptr, PluginFieldType::kINT32, 1);
        for (const Choice& choice : kChoices) known.emplace_back(choice.name, nullptr, PluginFieldType::kCHAR, 0);
        known.emplace_back("grid", nullptr, PluginFieldType::kINT32, 2);
        known.emplace_back("sink_positions", nullptr, PluginFieldType::kINT32, 0);
        return known;
    }();
    static const nvinfer1::PluginFieldCollection collection = {static_cast<int32_t>(fields.size()), fields.data()};
    return &collection;
}

TangoPruneParams Fields::params() const {
    TangoPruneParams params = params_;
    params.grid_rows = grid_[0];
    params.grid_columns = grid_[1];
    params.sink_count = static_cast<int32_t>(sinks_.size());
    params.sink_positions = sinks_.data();
    return params;
}

std::string Fields::to_bytes() const {
    const TangoPruneParams now = params();
    std::vector<int32_t> numbers(1 + kNumbers);
    numbers[0] = kFormat;
    std::memcpy(numbers.data() + 1, &now, kNumbers * sizeof(int32_t));
    numbers.insert(numbers.end(), sinks_.begin(), sinks_.end());
    return {reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(int32_t)};
}

bool Fields::from_bytes(const void* data, size_t length) {
    std::vector<int32_t> numbers(length / sizeof(int32_t));
    std::memcpy(numbers.data(), data, numbers.size() * sizeof(int32_t));
    if (numbers.size() < 1 + kNumbers || numbers[0] != kFormat) {
        report("the engine contains a plugin of another version: rebuild the engine");
        return false;
    }
    std::memcpy(&params_, numbers.data() + 1, kNumbers * sizeof(int32_t));
    grid_ = {params_.grid_rows, params_.grid_columns};
    sinks_.assign(numbers.begin() + 1 + kNumbers, numbers.end());
    return true;
}

bool read_shape(const nvinfer1::Dims& features, DataType type, TangoPruneShape& shape) {
    if (features.nbDims != 3) {
        report("features has " + std::to_string(features.nbDims) + " axes: it must be [F, L, D]");
        return false;
    }
    shape = {static_cast<int32_t>(features.d[0]), static_cast<int32_t>(features.d[1]),
             static_cast<int32_t>(features.d[2]), type == DataType::kHALF ? TANGO_FP16 : TANGO_FP32};
    return true;
}

size_t workspace_size(const Fields& fields, const nvinfer1::Dims& features, DataType type) {
    TangoPruneShape shape;
    const TangoPruneParams params = fields.params();
    size_t bytes = 0;
    if (!read_shape(features, type, shape)) return 0;
    if (tango_prune_workspace(&shape, &params, &bytes) != TANGO_OK) report(tango_last_error());
    return bytes;
}

bool is_supported(int position, DataType type, DataType features, nvinfer1::TensorFormat format) {
    if (format != nvinfer1::TensorFormat::kLINEAR) return false;
    switch (position) {
        case kFeatures: return type == DataType::kHALF || type == DataType::kFLOAT;
        case kTokens: return type == features;
        case kSalience:
        case kTimestamps: return type == DataType::kFLOAT;
        default: return type == DataType::kINT32;
    }
}

DataType output_type(int output, DataType features) {
    return kInputs + output == kTokens ? features : DataType::kINT32;
}

nvinfer1::DimsExprs output_shape(int output, const Fields& fields, const nvinfer1::DimsExprs& features,
                                 nvinfer1::IExprBuilder& builder) {
    nvinfer1::DimsExprs shape = {};
    if (kInputs + output == kCount) return shape;
    // min(F L, F L p div q + 2 F), the ratio in lowest terms so that products stay small.
    const int32_t ratio = fields.params().retention_ratio, divisor = std::gcd(ratio, 10000);
    const auto* frames = features.d[0];
    const auto* tokens = builder.operation(DimensionOperation::kPROD, *frames, *features.d[1]);
    const auto* scaled = builder.operation(DimensionOperation::kPROD, *tokens, *builder.constant(ratio / divisor));
    const auto* share = builder.operation(DimensionOperation::kFLOOR_DIV, *scaled, *builder.constant(10000 / divisor));
    const auto* spare = builder.operation(DimensionOperation::kPROD, *frames, *builder.constant(2));
    const auto* wanted = builder.operation(DimensionOperation::kSUM, *share, *spare);
    shape.nbDims = kInputs + output == kTokens ? 2 : 1;
    shape.d[0] = builder.operation(DimensionOperation::kMIN, *tokens, *wanted);
    if (shape.nbDims == 2) shape.d[1] = features.d[2];
    return shape;
}

int32_t enqueue(const Fields& fields, const nvinfer1::PluginTensorDesc& features, const void* const* inputs,
                void* const* outputs, void* workspace, cudaStream_t stream) {
    TangoPruneShape shape;
    if (!read_shape(features.dims, features.type, shape)) return -1;
    const TangoPruneParams params = fields.params();
    const TangoPruneTensors tensors = {inputs[kFeatures],
                                       static_cast<const float*>(inputs[kSalience]),
                                       static_cast<const float*>(inputs[kTimestamps]),
                                       outputs[kTokens - kInputs],
                                       static_cast<int32_t*>(outputs[kIndices - kInputs]),
                                       static_cast<int32_t*>(outputs[kCount - kInputs]),
                                       nullptr,
                                       nullptr};
    size_t bytes = 0;
    if (tango_prune_workspace(&shape, &params, &bytes) != TANGO_OK ||
        tango_prune_enqueue(&shape, &params, &tensors, workspace, bytes, stream) != TANGO_OK) {
        report(tango_last_error());
        return -1;
    }
    return 0;
}

}  // namespace tango
