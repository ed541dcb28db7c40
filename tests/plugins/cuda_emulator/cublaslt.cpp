// A cuBLASLt that multiplies matrices of fp16 on a CPU as its descriptions say, for tests of what describes them.
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <map>

namespace {

struct Description {
    std::map<int, uint64_t> attributes;
};

struct Layout {
    int type;
    uint64_t rows, columns;
    int64_t pitch;
};

int chosen = 0;  // algorithms so far

float at(const void* matrix, const Layout& layout, uint64_t row, uint64_t column) {
    return __half2float(static_cast<const __half*>(matrix)[column * layout.pitch + row]);
}

Layout transposed(const Layout& layout) { return {layout.type, layout.columns, layout.rows, layout.pitch}; }

void set(Description* description, int attribute, const void* value, size_t size) {
    std::memcpy(&description->attributes[attribute], value, size);
}

}  // namespace

extern "C" {

// For the tests: how many algorithms were chosen.
int fake_chosen() { return chosen; }

int cublasLtCreate(void** handle) { return *handle = &chosen, 0; }

int cublasLtMatmulDescCreate(Description** made, int compute, int scale) {
    *made = new Description;
    return compute == 68 && scale == 0 ? 0 : 7;  // sums in fp32
}

int cublasLtMatmulDescSetAttribute(Description* description, int attribute, const void* value, size_t size) {
    return set(description, attribute, value, size), 0;
}

int cublasLtMatmulDescDestroy(Description* description) { return delete description, 0; }

int cublasLtMatrixLayoutCreate(Layout** made, int type, uint64_t rows, uint64_t columns, int64_t pitch) {
    return *made = new Layout{type, rows, columns, pitch}, 0;
}

int cublasLtMatrixLayoutDestroy(Layout* layout) { return delete layout, 0; }

int cublasLtMatmulPreferenceCreate(Description** made) { return *made = new Description, 0; }

int cublasLtMatmulPreferenceSetAttribute(Description* preference, int attribute, const void* value, size_t size) {
    return set(preference, attribute, value, size), 0;
}

int cublasLtMatmulPreferenceDestroy(Description* preference) { return delete preference, 0; }

int cublasLtMatmulAlgoGetHeuristic(void*, Description*, Layout*, Layout*, Layout*, Layout*, Description* preference,
                                   int, void*, int* found) {
    ++chosen;
    *found = preference->attributes[1] == 0 && preference->attributes[3] == 2;  // no workspace, parts of sums in fp32
    return 0;
}

int cublasLtMatmul(void*, Description* description, const float* alpha, const void* a, Layout* of_a, const void* b,
                   Layout* of_b, const float*, const void*, Layout*, void* d, Layout* of_d, const void*,
                   void* workspace, size_t workspace_bytes, void*) {
    if (workspace != nullptr || workspace_bytes != 0) return 7;
    const bool transposes = description->attributes[3] == 1;
    const Layout left = transposes ? transposed(*of_a) : *of_a;
    if (left.type != 2 || of_b->type != 2 || of_d->type != 2 || left.columns != of_b->rows || of_d->rows != left.rows ||
        of_d->columns != of_b->columns)
        return 7;
    const uint64_t epilogue = description->attributes[7];
    const void* bias = reinterpret_cast<const void*>(description->attributes[8]);
    for (uint64_t row = 0; row < of_d->rows; ++row)
        for (uint64_t column = 0; column < of_d->columns; ++column) {
            float y = 0.0f;
            for (uint64_t k = 0; k < left.columns; ++k)
                y += (transposes ? at(a, *of_a, k, row) : at(a, *of_a, row, k)) * at(b, *of_b, k, column);
            y *= *alpha;
            if (epilogue & 4) y += __half2float(static_cast<const __half*>(bias)[row]);
            if (epilogue & 32) y = 0.5f * y * (1.0f + std::tanh(0.79788456f * (y + 0.044715f * y * y * y)));
            static_cast<__half*>(d)[column * of_d->pitch + row] = __float2half(y);
        }
    return 0;
}

}  // extern "C"
