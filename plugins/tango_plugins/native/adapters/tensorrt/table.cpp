// Plugins of the table of operators (adapters/operators.h).
#include <algorithm>
#include <cstring>

#include "adapters/operators.h"
#include "plugin.h"
#include "tango/common.h"

namespace tango {
namespace {

using nvinfer1::DataType;
using nvinfer1::DimensionOperation;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldType;

#if NV_TENSORRT_MAJOR > 8
constexpr DataType kFp8 = DataType::kFP8;
#else
constexpr DataType kFp8 = static_cast<DataType>(6);  // which it is called from 8.6 on
#endif

DataType convert(Type type) {
    switch (type) {
        case Type::kHalf: return DataType::kHALF;
        case Type::kFloat: return DataType::kFLOAT;
        case Type::kFp8: return kFp8;
        case Type::kInt8: return DataType::kINT8;
        case Type::kUint8: return DataType::kUINT8;
        case Type::kInt32: break;
    }
    return DataType::kINT32;
}

PluginFieldType field_type(const Attribute& attribute) {
    return attribute.is_float ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32;
}

// A field's value has 32 bits, where an operator's integer has 64.
union Field {
    int32_t integer;
    float real;
};

class TablePlugin final : public Plugin {
  public:
    TablePlugin(const Operator& op, const std::vector<Field>& values, Phase phase)
        : op_(op), values_(values), phase_(phase) {
        for (size_t i = 0; i < values_.size(); ++i) {
            const Attribute& attribute = op_.attributes[i];
            attributes_.push_back(attribute.is_float ? Value{0, values_[i].real} : Value{values_[i].integer, 0.0f});
            fields_.emplace_back(attribute.name, &values_[i], field_type(attribute), 1);
        }
        collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    }

    TablePlugin(const TablePlugin& other) = delete;  // the fields point into this object
    TablePlugin& operator=(const TablePlugin&) = delete;

    std::unique_ptr<Plugin> clone() const override { return std::make_unique<TablePlugin>(op_, values_, phase_); }
    const char* name() const override { return op_.name; }
    int outputs() const override { return static_cast<int>(op_.outputs.size()); }
    const nvinfer1::PluginFieldCollection* fields() override { return &collection_; }

    bool output_shape(int output, const nvinfer1::DimsExprs* inputs, int count, nvinfer1::IExprBuilder& builder,
                      nvinfer1::DimsExprs& shape) const override {
        const size_t wanted = op_.signatures[0].inputs.size();
        if (static_cast<size_t>(count) != wanted) return reject("it takes " + std::to_string(wanted) + " inputs");
        const OutputShape& rule = op_.outputs[output];
        shape.nbDims = 0;
        if (rule.same_as >= 0) shape = inputs[rule.same_as];
        if (rule.same_as >= 0 && rule.lengths.empty()) return true;
        if (shape.nbDims > 0) --shape.nbDims;
        for (const Length& length : rule.lengths) {
            if (length.axis >= inputs[length.input].nbDims)
                return reject("input " + std::to_string(length.input) + " has too few axes");
            shape.d[shape.nbDims++] = evaluate(length, inputs, builder);
        }
        return true;
    }

    // A network that is not strongly typed may ask for types that no signature has; it converts what it then gets.
    DataType output_type(int output, const DataType* inputs, int count) const override {
        const Signature* found = signature(std::vector<DataType>(inputs, inputs + count));
        return found == nullptr ? inputs[0] : convert(found->outputs[output]);
    }

    bool supports(const std::vector<DataType>& types) const override { return signature(types) != nullptr; }

    int alias_of(int output) const override {
        for (const auto& [input, shared] : op_.in_place)
            if (shared == output) return input;
        return -1;
    }

    int enqueue(const nvinfer1::PluginTensorDesc* input_descriptions,
                const nvinfer1::PluginTensorDesc* output_descriptions, const void* const* inputs, void* const* outputs,
                void*, cudaStream_t stream) const override {
        std::vector<DataType> types;
        std::vector<Tensor> in, out;
        for (size_t i = 0; i < op_.signatures[0].inputs.size(); ++i) {
            types.push_back(input_descriptions[i].type);
            in.push_back(tensor(const_cast<void*>(inputs[i]), input_descriptions[i].dims));
        }
        for (size_t i = 0; i < op_.outputs.size(); ++i) {
            types.push_back(output_descriptions[i].type);
            out.push_back(tensor(outputs[i], output_descriptions[i].dims));
        }
        const Signature* found = signature(types);
        if (found == nullptr) return reject("there is no such operator for these types"), -1;
        if (phase_ == Phase::kBuild && !op_.is_in_place(in, out)) return 0;  // a builder has no cache for it
        if (op_.run({*found, attributes_, in, out, stream}) != TANGO_OK) return reject(tango_last_error()), -1;
        return 0;
    }

  private:
    bool reject(const std::string& message) const {
        report(op_.name, message);
        return false;
    }

    // The first signature that begins with these types, or null.
    const Signature* signature(const std::vector<DataType>& types) const {
        for (const Signature& each : op_.signatures) {
            std::vector<DataType> known;
            for (Type type : each.inputs) known.push_back(convert(type));
            for (Type type : each.outputs) known.push_back(convert(type));
            if (types.size() <= known.size() && std::equal(types.begin(), types.end(), known.begin())) return &each;
        }
        return nullptr;
    }

    const nvinfer1::IDimensionExpr* evaluate(const Length& length, const nvinfer1::DimsExprs* inputs,
                                             nvinfer1::IExprBuilder& builder) const {
        const nvinfer1::IDimensionExpr* found = inputs[length.input].d[length.axis];
        if (length.times_attribute >= 0) {
            const int32_t factor = values_[length.times_attribute].integer;
            found = builder.operation(DimensionOperation::kPROD, *found, *builder.constant(factor));
        }
        if (length.divided_by != 1)
            found = builder.operation(DimensionOperation::kFLOOR_DIV, *found, *builder.constant(length.divided_by));
        if (length.divided_by_attribute >= 0) {
            const int32_t divisor = std::max(values_[length.divided_by_attribute].integer, 1);
            found = builder.operation(DimensionOperation::kFLOOR_DIV, *found, *builder.constant(divisor));
        }
        return found;
    }

    static Tensor tensor(void* data, const nvinfer1::Dims& dims) {
        return {data, Lengths(dims.d, dims.d + dims.nbDims)};
    }

    const Operator& op_;
    std::vector<Field> values_;
    Phase phase_;
    std::vector<Value> attributes_;
    std::vector<PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_ = {};
};

class TableKind final : public PluginKind {
  public:
    explicit TableKind(const Operator& op) : op_(op) {
        for (const Attribute& attribute : op.attributes)
            fields_.emplace_back(attribute.name, nullptr, field_type(attribute), 1);
        collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
    }

    const char* name() const override { return op_.name; }
    const nvinfer1::PluginFieldCollection* field_names() const override { return &collection_; }

    std::unique_ptr<Plugin> make(const nvinfer1::PluginFieldCollection& given, Phase phase) const override {
        std::vector<Field> values;
        for (const PluginField& known : fields_) {
            const PluginField* const end = given.fields + given.nbFields;
            const PluginField* const found = std::find_if(
                given.fields, end, [&](const PluginField& field) { return std::strcmp(field.name, known.name) == 0; });
            if (found == end || found->type != known.type || found->length != 1) {
                const char* kind = known.type == PluginFieldType::kINT32 ? "one integer" : "one number";
                report(op_.name, std::string("attribute ") + known.name + " must be " + kind);
                return nullptr;
            }
            std::memcpy(&values.emplace_back(), found->data, sizeof(Field));
        }
        return std::make_unique<TablePlugin>(op_, values, phase);
    }

  private:
    const Operator& op_;
    std::vector<PluginField> fields_;
    nvinfer1::PluginFieldCollection collection_ = {};
};

}  // namespace

const std::vector<const PluginKind*>& operator_kinds() {
    static const std::vector<const PluginKind*>& all = *[] {
        auto* kinds = new std::vector<const PluginKind*>();
        for (const Operator& op : operators()) kinds->push_back(new TableKind(op));
        return kinds;
    }();
    return all;
}

}  // namespace tango
