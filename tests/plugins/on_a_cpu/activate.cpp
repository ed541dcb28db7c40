// tango/activate.h for a CPU: what ONNX Runtime's adapter calls where there is no GPU.
#include "tango/activate.h"

#include <cmath>

namespace {

template <typename T, typename Function>
void map(const void* a, const void* b, int64_t size, int64_t period, void* y, Function function) {
    for (int64_t i = 0; i < size; ++i) {
        const float left = static_cast<const T*>(a)[i], right = static_cast<const T*>(b)[i % period];
        static_cast<T*>(y)[i] = static_cast<T>(function(left, right));
    }
}

template <typename Function>
int run(int32_t dtype, const void* a, const void* b, int64_t size, int64_t period, void* y, Function function) {
    if (period == 13) return TANGO_BAD_ARGUMENT;  // something for the adapter to pass on
    dtype == TANGO_FP16 ? map<_Float16>(a, b, size, period, y, function) : map<float>(a, b, size, period, y, function);
    return TANGO_OK;
}

float gelu(float u) { return 0.5f * u * (1.0f + std::tanh(0.7978845608f * (u + 0.044715f * u * u * u))); }

}  // namespace

int tango_bias_enqueue(int32_t dtype, const void* x, const void* bias, int64_t rows, int64_t width, void* y, void*) {
    return run(dtype, x, bias, rows * width, width, y, [](float x, float bias) { return x + bias; });
}

int tango_bias_gelu_enqueue(int32_t dtype, const void* x, const void* bias, int64_t rows, int64_t width, void* y,
                            void*) {
    return run(dtype, x, bias, rows * width, width, y, [](float x, float bias) { return gelu(x + bias); });
}

int tango_swiglu_enqueue(int32_t dtype, const void* gate, const void* up, int64_t size, void* y, void*) {
    return run(dtype, gate, up, size, size, y, [](float gate, float up) { return gate / (1 + std::exp(-gate)) * up; });
}

const char* tango_last_error(void) { return "thirteen is refused"; }
