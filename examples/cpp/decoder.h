// The decoder and its KV cache: takes a prompt, then one token after the other.
#pragma once

#include <cmath>
#include <numeric>

#include "engine.h"
#include "tango/argmax.h"

class Decoder {
  public:
    enum Profile { kPrefill = 0, kDecode = 1 };  // optimization profiles of the engine

    Decoder(Engine& engine, cudaStream_t stream)
        : capacity(engine.length("past_key.0", 1, kDecode)), engine_(engine), stream_(stream) {
        const int layers =
            engine.tensors() / 4;  // each has four tensors; there are also embeddings, positions and logits
        for (int i = 0; i < layers; ++i) {
            parts_.push_back({"key." + std::to_string(i), Memory(heads_ * capacity * row_), {}});
            parts_.push_back({"value." + std::to_string(i), Memory(heads_ * capacity * row_), {}});
        }
    }

    // Prepares passes over embeddings [tokens, D], whose memory must stay in place. A prefill begins a sequence and
    // attends to itself only. A decode pass attends to the cache, up to its position.
    void bind(Profile profile, const Memory& embeddings, int tokens) {
        engine_.use(profile, stream_);
        positions_ = Memory(tokens * sizeof(Integer));
        engine_.input("embeddings", {tokens, engine_.length("embeddings", 1)}, embeddings);
        engine_.input("positions", {tokens}, positions_);
        const int held = profile == kPrefill ? 0 : capacity;
        for (Part& part : parts_) engine_.input("past_" + part.name, {heads_, held, head_dim_}, part.cache);
        for (Part& part : parts_) part.rows = engine_.output("new_" + part.name);
        logits_ = engine_.output("logits");
        if (profile == kDecode) return;
        length_ = 0;
        for (Part& part : parts_)  // a NaN left there would spoil attention, even with weight 0
            check(cudaMemsetAsync(part.cache.at(), 0, part.cache.bytes, stream_), "clearing the cache");
    }

    // Runs the bound tokens, appends them to the sequence, and returns the most likely next token.
    Integer pass() {
        const int tokens = static_cast<int>(positions_.bytes / sizeof(Integer));
        std::vector<Integer> positions(tokens);
        std::iota(positions.begin(), positions.end(), length_);
        positions_.upload(positions, stream_);
        engine_.run(stream_);
        const size_t head_bytes = tokens * row_;
        for (Part& part : parts_)
            check(cudaMemcpy2DAsync(part.cache.at(length_ * row_), capacity * row_, part.rows.at(), head_bytes,
                                    head_bytes, heads_, cudaMemcpyDeviceToDevice, stream_),
                  "appending to the cache");
        length_ += tokens;
        auto* logits = reinterpret_cast<float*>(logits_.at());
        auto* argmax = reinterpret_cast<TangoArgmax*>(argmax_.at());
        const int vocabulary = static_cast<int>(logits_.bytes / sizeof(float));
        require(tango_argmax_enqueue(logits, vocabulary, argmax, stream_) == TANGO_OK,
                std::string("greedy sampling failed: ") + tango_last_error(), "check the GPU: nvidia-smi");
        const auto found = argmax_.download<TangoArgmax>(stream_);
        require(std::isfinite(found.value), "a logit is not finite: the decoder overflowed",
                "export with --dtype fp32, or check the bundle: tango validate BUNDLE");
        return found.index;
    }

    const int capacity;  // positions of the cache, from the engine

  private:
    struct Part {  // keys or values of one layer
        std::string name;
        Memory cache, rows;  // [heads, capacity, head_dim], and the new rows of a pass, [heads, tokens, head_dim]
    };

    Engine& engine_;
    const cudaStream_t stream_;
    const int heads_ = engine_.length("past_key.0", 0), head_dim_ = engine_.length("past_key.0", 2);
    const size_t row_ = head_dim_ * engine_.item("past_key.0");
    int length_ = 0;
    std::vector<Part> parts_;
    Memory positions_, logits_, argmax_{sizeof(TangoArgmax)};
};
