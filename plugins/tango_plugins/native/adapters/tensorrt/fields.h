// What both TensorRT adapters share: the plugin's fields, their defaults, and its tensors.
#pragma once

#include <NvInfer.h>

#include <cstdint>
#include <string>
#include <vector>

#include "tango/prune.h"

namespace tango {

constexpr char kName[] = "TangoPrune", kVersion[] = "1", kNamespace[] = "tango";

// Tensors by position, inputs first.
enum Tensor { kFeatures = 0, kSalience, kTimestamps, kTokens, kIndices, kCount, kTensors };
constexpr int kInputs = 3, kOutputs = 3;

// The operator's parameters as the fields of a plugin. The grid is required. Without sink positions there are none, and
// any other missing field has the default of the paper and its authors' code. ONNX nodes of tango-edge have all fields.
class Fields {
  public:
    // Returns false and reports the error if the grid is missing, or a field has a wrong type or value.
    bool read(const nvinfer1::PluginFieldCollection& collection);

    // All fields in the form that `read` takes. Valid until this object changes.
    const nvinfer1::PluginFieldCollection* write();

    // Names and types of the fields.
    static const nvinfer1::PluginFieldCollection* names();

    std::string to_bytes() const;
    bool from_bytes(const void* data, size_t length);

    // Valid until this object changes.
    TangoPruneParams params() const;

  private:
    TangoPruneParams params_ = {};
    std::vector<int32_t> grid_, sinks_;
    std::vector<nvinfer1::PluginField> written_;
    nvinfer1::PluginFieldCollection collection_ = {};
};

// Reports an error to TensorRT's logger, or to stderr if there is none.
void report(const std::string& message);
void set_logger(nvinfer1::ILogger* logger);

// The video's shape, from that of the features.
bool read_shape(const nvinfer1::Dims& features, nvinfer1::DataType type, TangoPruneShape& shape);

size_t workspace_size(const Fields& fields, const nvinfer1::Dims& features, nvinfer1::DataType type);

bool is_supported(int position, nvinfer1::DataType type, nvinfer1::DataType features, nvinfer1::TensorFormat format);

nvinfer1::DataType output_type(int output, nvinfer1::DataType features);

// Shapes of the outputs: [capacity, D], [capacity] and a scalar.
nvinfer1::DimsExprs output_shape(int output, const Fields& fields, const nvinfer1::DimsExprs& features,
                                 nvinfer1::IExprBuilder& builder);

// Returns 0, or -1 after reporting the error.
int32_t enqueue(const Fields& fields, const nvinfer1::PluginTensorDesc& features, const void* const* inputs,
                void* const* outputs, void* workspace, cudaStream_t stream);

}  // namespace tango
