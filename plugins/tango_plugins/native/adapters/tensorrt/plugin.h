// The part of a plugin that does not depend on TensorRT's version, and how it is made from fields. plugin_v2.cpp and
// plugin_v3.cpp adapt it to TensorRT's interfaces.
#pragma once

#include <NvInfer.h>

#include <memory>
#include <string>
#include <vector>

namespace tango {

constexpr char kVersion[] = "1", kNamespace[] = "tango";

// What TensorRT makes a plugin for. A builder times it on uninitialized memory.
enum class Phase { kBuild, kRun };

// An operator as a node of a network. Tensors are counted from 0, and at a position inputs come before outputs.
class Plugin {
  public:
    virtual ~Plugin() = default;
    virtual std::unique_ptr<Plugin> clone() const = 0;

    virtual const char* name() const = 0;
    virtual int outputs() const = 0;

    // Fields from which PluginKind::make makes an equal plugin. Valid as long as this object.
    virtual const nvinfer1::PluginFieldCollection* fields() = 0;

    // Returns false after reporting the error if the inputs cannot be right.
    virtual bool output_shape(int output, const nvinfer1::DimsExprs* inputs, int count, nvinfer1::IExprBuilder& builder,
                              nvinfer1::DimsExprs& shape) const = 0;

    virtual nvinfer1::DataType output_type(int output, const nvinfer1::DataType* inputs, int count) const = 0;

    // Whether the tensor at the last position may have the last type, given the types before it.
    virtual bool supports(const std::vector<nvinfer1::DataType>& types) const = 0;

    // The input whose memory an output must have, or -1.
    virtual int alias_of(int /*output*/) const { return -1; }

    // For inputs of these shapes; enough for smaller ones.
    virtual size_t workspace_size(const nvinfer1::PluginTensorDesc* /*inputs*/) const { return 0; }

    // Returns 0, or -1 after reporting the error.
    virtual int enqueue(const nvinfer1::PluginTensorDesc* input_descriptions,
                        const nvinfer1::PluginTensorDesc* output_descriptions, const void* const* inputs,
                        void* const* outputs, void* workspace, cudaStream_t stream) const = 0;
};

// An operator: makes plugins.
class PluginKind {
  public:
    virtual ~PluginKind() = default;
    virtual const char* name() const = 0;

    // Names and types of the fields.
    virtual const nvinfer1::PluginFieldCollection* field_names() const = 0;

    // Null, after reporting the error, if a field is missing, or has a wrong type or value.
    virtual std::unique_ptr<Plugin> make(const nvinfer1::PluginFieldCollection& fields, Phase phase) const = 0;
};

// TangoPrune.
const PluginKind& prune_kind();

// The operators of the table.
const std::vector<const PluginKind*>& operator_kinds();

// All of them. They live as long as the process.
std::vector<const PluginKind*> all_kinds();

// Reports an error to TensorRT's logger, or to stderr if there is none.
void report(const char* plugin, const std::string& message);
void set_logger(nvinfer1::ILogger* logger);

}  // namespace tango
