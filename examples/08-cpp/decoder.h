// The decoder and its KV cache: takes a prompt, then one token after the other.
#pragma once

#include <cmath>
#include <numeric>

#include "engine.h"
#include "tango/argmax.h"

// Its engine is of a portable graph, which gives new rows of the cache, or of a device graph, which extends it in
// place.
class Decoder {
  public:
    enum Profile { kPrefill = 0, kDecode = 1 };  // optimization profiles; a device graph's engine has the first alone

    Decoder(Engine& engine, cudaStream_t stream)
        : capacity(engine.length("past_key.0", 1, engine.has("positions") ? kDecode : kPrefill)),
          engine_(engine),
          stream_(stream) {
        for (int i = 0; engine.has("past_key." + std::to_string(i)); ++i)
            for (const char* kind : {"key.", "value."})
                parts_.push_back({kind + std::to_string(i), Memory(heads_ * capacity * row_), {}});
    }

    // Prepares passes over embeddings [tokens, D], whose memory must stay in place. A prefill begins a sequence and
    // attends to itself only. A decode pass attends to the cache, up to its position.
    void bind(Profile profile, const Memory& embeddings, int tokens) {
        tokens_ = tokens;
        if (!in_place_) engine_.use(profile, stream_);
        engine_.input("embeddings", {tokens, engine_.length("embeddings", 1)}, embeddings);
        if (in_place_)
            bind_cache();
        else
            bind_rows(profile);
        logits_ = engine_.output("logits");
        if (profile == kDecode) return;
        length_ = 0;
        for (Part& part : parts_)  // a NaN left there would spoil attention, even with weight 0
            check(cudaMemsetAsync(part.cache.at(), 0, part.cache.bytes, stream_), "clearing the cache");
    }

    // Runs the bound tokens, appends them to the sequence, and returns the most likely next token.
    Integer pass() {
        if (in_place_) {
            positions_.upload(std::vector<int32_t>{length_ + tokens_ - 1}, stream_);
        } else {
            std::vector<Integer> positions(tokens_);
            std::iota(positions.begin(), positions.end(), length_);
            positions_.upload(positions, stream_);
        }
        engine_.run(stream_);
        if (!in_place_) append();
        length_ += tokens_;
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

    void bind_cache() {
        positions_ = Memory(sizeof(int32_t));
        engine_.input("last_position", {1}, positions_);
        for (Part& part : parts_) {
            engine_.input("past_" + part.name, {heads_, capacity, head_dim_}, part.cache);
            engine_.output("present_" + part.name, part.cache);
        }
    }

    void bind_rows(Profile profile) {
        positions_ = Memory(tokens_ * sizeof(Integer));
        engine_.input("positions", {tokens_}, positions_);
        const int held = profile == kPrefill ? 0 : capacity;
        for (Part& part : parts_) engine_.input("past_" + part.name, {heads_, held, head_dim_}, part.cache);
        for (Part& part : parts_) part.rows = engine_.output("new_" + part.name);
    }

    void append() {
        const size_t head_bytes = tokens_ * row_;
        for (Part& part : parts_)
            check(cudaMemcpy2DAsync(part.cache.at(length_ * row_), capacity * row_, part.rows.at(), head_bytes,
                                    head_bytes, heads_, cudaMemcpyDeviceToDevice, stream_),
                  "appending to the cache");
    }

    Engine& engine_;
    const cudaStream_t stream_;
    const bool in_place_ = engine_.has("last_position");
    const int heads_ = engine_.length("past_key.0", 0), head_dim_ = engine_.length("past_key.0", 2);
    const size_t row_ = head_dim_ * engine_.item("past_key.0");
    int length_ = 0, tokens_ = 0;
    std::vector<Part> parts_;
    Memory positions_, logits_, argmax_{sizeof(TangoArgmax)};
};
