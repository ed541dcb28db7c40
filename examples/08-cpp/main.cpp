// Answers a question about a clip without Python: vision → prune → splice → prefill → decode. Prints token ids.
//
//   tango_clip CLIP/clip.txt        (prepare.py writes it)
#include <algorithm>
#include <cstdio>
#include <map>
#include <sstream>

#include "decoder.h"
#include "engine.h"

// From libtango_tensorrt.so, which has the plugins of the prune engine and of those of device graphs.
extern "C" bool tango_register_plugins(nvinfer1::IPluginRegistry* registry);

namespace {

struct Log final : nvinfer1::ILogger {
    void log(Severity severity, const char* message) noexcept override {
        if (severity <= Severity::kERROR) std::fprintf(stderr, "TensorRT: %s\n", message);
    }
};

// clip.txt: each line has a name, a space and a value.
struct Clip {
    explicit Clip(const std::string& path) {
        std::ifstream file(path);
        require(file.good(), path + " cannot be read", "pass the clip.txt that prepare.py wrote");
        for (std::string name, value; std::getline(file, name, ' ') && std::getline(file, value);) values[name] = value;
    }

    const std::string& text(const std::string& name) const {
        require(values.count(name), "the clip has no " + name, "write it again with prepare.py");
        return values.at(name);
    }

    template <typename T>
    std::vector<T> numbers(const std::string& name) const {
        std::istringstream words(text(name));
        std::vector<T> found;
        for (T number; words >> number;) found.push_back(number);
        require(words.eof() && !found.empty(), name + " of the clip is not a list of numbers",
                "write it again with prepare.py");
        return found;
    }

    std::map<std::string, std::string> values;
};

// Embeddings [tokens, D]; the memory may be larger.
struct Piece {
    Memory embeddings;
    int tokens;
};

// Frames [F, size, size, 3] and their seconds [F] → the kept tokens.
Piece encode_video(const Clip& clip, Engine& vision, Engine& prune, cudaStream_t stream) {
    const auto seconds = clip.numbers<float>("seconds");
    const int F = static_cast<int>(seconds.size()), size = vision.length("frames", 1);
    const int L = prune.length("features", 1), D = prune.length("features", 2);
    Memory frames(size_t{3} * F * size * size), times(F * sizeof(float));
    const auto pixels = read_file(clip.text("frames"));
    require(pixels.size() == frames.bytes,
            clip.text("frames") + " does not have " + std::to_string(frames.bytes) + " bytes",
            "write the clip again with prepare.py and the engines' bundle");
    frames.upload(pixels, stream);
    times.upload(seconds, stream);
    vision.input("frames", {F, size, size, 3}, frames);
    Memory features = vision.output("features"), salience = vision.output("salience");
    vision.run(stream);
    prune.input("features", {F, L, D}, features);
    prune.input("salience", {F, L}, salience);
    prune.input("timestamps", {F}, times);
    Memory tokens = prune.output("tokens"), indices = prune.output("indices"), count = prune.output("count");
    prune.run(stream);
    const int kept = count.download<int32_t>(stream);
    std::fprintf(stderr, "%d of %d tokens kept\n", kept, F * L);
    return {std::move(tokens), kept};
}

Piece embed_text(const std::vector<Integer>& ids, Engine& embed, cudaStream_t stream) {
    const int tokens = static_cast<int>(ids.size());
    Memory on_device(tokens * sizeof(Integer));
    on_device.upload(ids, stream);
    embed.input("ids", {tokens}, on_device);
    Memory embeddings = embed.output("embeddings");
    embed.run(stream);
    return {std::move(embeddings), tokens};
}

Piece splice(const Piece& before, const Piece& video, const Piece& after, size_t row, cudaStream_t stream) {
    Piece whole = {Memory((before.tokens + video.tokens + after.tokens) * row), 0};
    for (const Piece* piece : {&before, &video, &after}) {
        check(cudaMemcpyAsync(whole.embeddings.at(whole.tokens * row), piece->embeddings.at(), piece->tokens * row,
                              cudaMemcpyDeviceToDevice, stream),
              "splicing");
        whole.tokens += piece->tokens;
    }
    return whole;
}

// Greedy decoding, to a stop token or the number of tokens that the clip asks for.
void answer(const Clip& clip, const Piece& prompt, Engine& embed, Decoder& decoder, cudaStream_t stream) {
    const auto stop = clip.numbers<Integer>("stop");
    const int max_tokens = clip.numbers<int>("tokens").front();
    require(max_tokens >= 1, "tokens of the clip: " + std::to_string(max_tokens),
            "write it again with --max-new-tokens 1 or more");
    require(prompt.tokens + max_tokens <= decoder.capacity,
            "prompt and answer may take " + std::to_string(prompt.tokens + max_tokens) +
                " positions, the decoder holds " + std::to_string(decoder.capacity),
            "write the clip with a smaller --max-new-tokens, or: tango build BUNDLE with --context");
    decoder.bind(Decoder::kPrefill, prompt.embeddings, prompt.tokens);
    Integer token = decoder.pass();
    Memory id(sizeof token);
    embed.input("ids", {1}, id);
    const Memory embedding = embed.output("embeddings");
    decoder.bind(Decoder::kDecode, embedding, 1);
    for (int tokens = 0; !std::count(stop.begin(), stop.end(), token);) {
        std::printf("%d ", static_cast<int>(token));
        std::fflush(stdout);
        if (++tokens == max_tokens) return;
        id.upload(std::vector<Integer>{token}, stream);
        embed.run(stream);
        token = decoder.pass();
    }
}

void run(const Clip& clip) {
    cudaStream_t stream;
    // Before TensorRT, which would crash without a GPU.
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking), "creating a stream");
    Log log;
    require(tango_register_plugins(getPluginRegistry()), "TensorRT rejects the plugins",
            "build it with this TensorRT's headers: tango plugin build --tensorrt-include FOLDER");
    const std::unique_ptr<nvinfer1::IRuntime> runtime(nvinfer1::createInferRuntime(log));
    require(runtime != nullptr, "TensorRT does not start", "see its message above");
    Engine vision(*runtime, clip.text("vision")), prune(*runtime, clip.text("prune"));
    Engine embed(*runtime, clip.text("embed")), language(*runtime, clip.text("decoder"));
    for (const auto& [list, engine] : {std::pair("vision_weights", &vision), std::pair("embed_weights", &embed),
                                       std::pair("decoder_weights", &language)})
        if (clip.values.count(list)) engine->take(Weights(clip.text(list)));
    const size_t item = language.item("embeddings");
    require(vision.item("features") == item && prune.item("features") == item && prune.item("tokens") == item &&
                embed.item("embeddings") == item,
            "the engines differ in the type of features, tokens and embeddings",
            "delete the bundle's engines and build them again: tango build BUNDLE");
    Decoder decoder(language, stream);
    const Piece before = embed_text(clip.numbers<Integer>("before"), embed, stream),
                video = encode_video(clip, vision, prune, stream);
    const Piece after = embed_text(clip.numbers<Integer>("after"), embed, stream);
    const size_t row = language.length("embeddings", 1) * item;
    answer(clip, splice(before, video, after, row, stream), embed, decoder, stream);
    check(cudaStreamDestroy(stream), "destroying the stream");
}

}  // namespace

int main(int count, char** arguments) try {
    require(count == 2, "no clip was given", "tango_clip CLIP/clip.txt");
    run(Clip(arguments[1]));
    std::printf("\n");
    return 0;
} catch (const Error& error) {
    std::fprintf(stderr, "error: %s\nhint: %s\n", error.what(), error.hint.c_str());
    return 2;
} catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\nhint: free memory on the host, or write the clip again\n", error.what());
    return 2;
}
