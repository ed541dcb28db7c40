// All operators of domain "tango" except TangoPrune, as one table, from which each engine's adapter makes its
// operators: only this table has names, types, shapes and the function to call. What an operator computes is its ONNX
// function in export/tango_export/graph/operators.py.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace tango {

using Lengths = std::vector<int64_t>;

// A tensor of a call: device memory.
struct Tensor {
    void* data = nullptr;
    Lengths shape;

    // A length counted from the end of the shape: dim(1) is the last one.
    int64_t dim(size_t from_end) const { return from_end > shape.size() ? 1 : shape[shape.size() - from_end]; }
    int64_t size() const;
    int64_t rows() const { return dim(1) == 0 ? 0 : size() / dim(1); }
};

enum class Type { kHalf, kFloat, kFp8, kInt32, kInt8, kUint8 };

struct Attribute {
    const char* name;
    bool is_float;
};

// The value of an attribute; only the member of its type counts.
struct Value {
    int64_t integer = 0;
    float real = 0.0f;
};

// The types of one version of an operator.
struct Signature {
    std::vector<Type> inputs, outputs;
};

// A length of an output: that of an input's axis, times an attribute, divided by a number and by an attribute. Engines
// whose lengths are unknown at build time make an expression of it.
struct Length {
    int input, axis;
    int times_attribute = -1;  // its index, or -1
    int divided_by = 1;
    int divided_by_attribute = -1;  // its index, or -1
};

// The shape of an output: the shape of an input, whose last axis is replaced by the lengths if there are any; or the
// lengths alone.
struct OutputShape {
    int same_as = -1;  // index of the input, or -1
    std::vector<Length> lengths = {};
};

struct Call {
    const Signature& signature;
    const std::vector<Value>& attributes;
    const std::vector<Tensor>&inputs, &outputs;
    void* stream;
    bool interleaved = false;   // weights in blocks, if there are any
    void* workspace = nullptr;  // of the size that the operator wants, or null
    size_t workspace_bytes = 0;
};

struct Operator {
    const char* name;
    std::vector<Attribute> attributes;
    std::vector<Signature> signatures;
    std::vector<OutputShape> outputs;
    std::vector<std::pair<int, int>> in_place;  // an input and an output that must be the same memory
    int (*enqueue)(const Call& call);           // checks the shapes of the inputs; returns a TangoStatus

    // Bytes of a workspace with which it is fastest; returns a TangoStatus. Null where it never wants one. It runs
    // without, too: TensorRT gives none, and no graph that it runs has these operators.
    int (*workspace)(const Call& call, size_t* bytes) = nullptr;

    // Shape of an output; empty where the inputs have too few axes for it.
    Lengths shape(size_t output, const std::vector<Tensor>& inputs, const std::vector<Value>& attributes) const;

    // Whether the tensors that must be the same memory are.
    bool is_in_place(const std::vector<Tensor>& inputs, const std::vector<Tensor>& outputs) const;

    // Enqueues it, and returns a TangoStatus.
    int run(const Call& call) const;
};

const std::vector<Operator>& operators();

}  // namespace tango
