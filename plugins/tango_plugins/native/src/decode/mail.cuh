// The embedding of a token on its way from the host to a step that is enqueued before the token is known.
#pragma once

#include <cstring>

#include "common/platform.cuh"
#include "tango/decode.h"

namespace tango {

// The only argument of receive(). In pinned memory, `from` has the mail's number, counted from 1, and whether no step
// follows; `row` has the embedding.
struct Mail {
    const unsigned* from;
    unsigned number;
    const uint4* row;
    uint4* embedding;
    int vectors;        // of 16 bytes
    unsigned* stopped;  // whether no step follows, for the step
};

constexpr int kMailThreads = 512;

// Waits for the mail, and puts it where the step finds it. One block, so that whatever else the GPU has to do goes on.
__global__ void __launch_bounds__(kMailThreads) receive(const Mail mail) {
    if (threadIdx.x == 0) {
        while (load_acquire_system(mail.from) != mail.number) {
        }
        *mail.stopped = load_acquire_system(mail.from + 1);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < mail.vectors; i += kMailThreads) mail.embedding[i] = __ldcv(mail.row + i);
}

// Sends the next mail: the embedding of a token, or, for -1, that no step follows.
inline void send(const TangoDecodeWords& words, int hidden_size, int32_t token) {
    const size_t bytes = hidden_size * sizeof(__half);
    if (token >= 0) std::memcpy(words.row, static_cast<const char*>(words.table) + token * bytes, bytes);
    words.mail[1] = token < 0;
    __atomic_store_n(words.mail, words.mail[0] + 1, __ATOMIC_RELEASE);  // receive() looks at the number first
}

}  // namespace tango
