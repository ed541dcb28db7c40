/* Prune the visual tokens of any model with the CUDA library, without Python; README.md builds it. */
#include <cuda_runtime_api.h>
#include <stdio.h>
#include <stdlib.h>

#include "tango/prune.h"

enum { FRAMES = 16, ROWS = 14, COLUMNS = 14, TOKENS = ROWS * COLUMNS, WIDTH = 896 };

static void check(int status) {
    if (status == TANGO_OK) return;
    fprintf(stderr, "error: %s\n", tango_last_error());
    exit(2);
}

static void check_cuda(cudaError_t status) {
    if (status == cudaSuccess) return;
    fprintf(stderr, "error: %s\n", cudaGetErrorString(status));
    exit(2);
}

static void* device_memory(size_t bytes) {
    void* memory = NULL;
    check_cuda(cudaMalloc(&memory, bytes));
    return memory;
}

/* In place of a vision tower: random numbers from 0 to 1 on the device. */
static float* random_floats(int count) {
    float* host = malloc(count * sizeof(float));
    float* device = device_memory(count * sizeof(float));
    if (host == NULL) exit(2);
    for (int i = 0; i < count; i++) host[i] = (float)rand() / (float)RAND_MAX;
    check_cuda(cudaMemcpy(device, host, count * sizeof(float), cudaMemcpyHostToDevice));
    free(host);
    return device;
}

int main(void) {
    if (tango_abi_version() != TANGO_ABI_VERSION) {
        fprintf(stderr, "error: libtango.so is of another version than tango/prune.h\n");
        return 2;
    }
    const TangoPruneShape shape = {FRAMES, TOKENS, WIDTH, TANGO_FP32};
    TangoPruneParams params;
    tango_prune_defaults(ROWS, COLUMNS, &params);
    params.retention_ratio = 1000; /* ten-thousandths */

    int32_t capacity = 0;
    size_t bytes = 0;
    check(tango_prune_capacity(&shape, &params, &capacity));
    check(tango_prune_workspace(&shape, &params, &bytes));

    float seconds[FRAMES];
    for (int f = 0; f < FRAMES; f++) seconds[f] = 0.5f * (float)f;
    float* timestamps = device_memory(sizeof seconds);
    check_cuda(cudaMemcpy(timestamps, seconds, sizeof seconds, cudaMemcpyHostToDevice));

    int32_t* kept = device_memory(sizeof(int32_t));
    const TangoPruneTensors tensors = {
        .features = random_floats(FRAMES * TOKENS * WIDTH),
        .salience = random_floats(FRAMES * TOKENS),
        .timestamps = timestamps,
        .tokens = device_memory((size_t)capacity * WIDTH * sizeof(float)),
        .indices = device_memory((size_t)capacity * sizeof(int32_t)),
        .count = kept,
    };
    void* workspace = device_memory(bytes);

    /* Enqueues on the default stream: allocates nothing, waits for nothing. A CUDA graph can capture it. */
    check(tango_prune_enqueue(&shape, &params, &tensors, workspace, bytes, NULL));

    int32_t count = 0;
    check_cuda(cudaMemcpy(&count, kept, sizeof count, cudaMemcpyDeviceToHost)); /* waits */
    printf("kept %d of %d tokens, at most %d\n", count, FRAMES * TOKENS, capacity);
    return 0; /* the process's end frees the memory */
}
