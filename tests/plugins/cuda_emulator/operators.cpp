// ONNX Runtime's adapter, for its CPU.
#define TANGO_ONNXRUNTIME_PROVIDER "CPUExecutionProvider"
#include "../../../plugins/tango_plugins/native/adapters/onnxruntime.cpp"
