// A TensorRT engine (8.5 to 11), and device memory.
#pragma once

#include <NvInfer.h>
#include <cuda_runtime_api.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

// Token ids and positions: TensorRT before 10 takes int32 where the graphs have int64.
#if NV_TENSORRT_MAJOR >= 10
using Integer = int64_t;
#else
using Integer = int32_t;
#endif

struct Error : std::runtime_error {
    Error(const std::string& message, const std::string& what_to_do) : runtime_error(message), hint(what_to_do) {}
    std::string hint;
};

inline void require(bool holds, const std::string& message, const std::string& hint) {
    if (!holds) throw Error(message, hint);
}

inline void check(cudaError_t status, const std::string& doing) {
    require(status == cudaSuccess, "CUDA failed " + doing + ": " + cudaGetErrorString(status),
            "check that nvidia-smi shows the GPU, and that enough of its memory is free");
}

// Bytes on the device. Copies are enqueued on a stream.
struct Memory {
    Memory() = default;

    explicit Memory(size_t size) : bytes(size) {
        void* found = nullptr;
        check(cudaMalloc(&found, size > 0 ? size : 1), "allocating " + std::to_string(size) + " bytes");
        owned.reset(static_cast<char*>(found));
    }

    char* at(size_t offset = 0) const { return owned.get() + offset; }

    template <typename T>
    void upload(const std::vector<T>& values, cudaStream_t stream) {
        check(cudaMemcpyAsync(at(), values.data(), bytes, cudaMemcpyHostToDevice, stream), "copying to the device");
        check(cudaStreamSynchronize(stream), "copying to the device");  // the caller may free the values
    }

    template <typename T>
    T download(cudaStream_t stream) const {
        T value;
        check(cudaMemcpyAsync(&value, at(), sizeof value, cudaMemcpyDeviceToHost, stream), "copying to the host");
        check(cudaStreamSynchronize(stream), "running the enqueued work");
        return value;
    }

    struct Free {
        void operator()(char* address) const { cudaFree(address); }
    };
    size_t bytes = 0;
    std::unique_ptr<char, Free> owned;
};

inline std::vector<char> read_file(const std::string& path) {
    std::ifstream file(path, std::ios::binary | std::ios::ate);
    std::vector<char> data(file ? static_cast<size_t>(file.tellg()) : 0);
    require(file.seekg(0).read(data.data(), data.size()).good(), path + " cannot be read",
            "write the clip again with prepare.py");
    return data;
}

// A file, mapped into memory.
struct Mapped {
    explicit Mapped(const std::string& path) {
        const int file = open(path.c_str(), O_RDONLY);
        struct stat found = {};
        if (file >= 0 && fstat(file, &found) == 0 && found.st_size > 0) {
            bytes = static_cast<size_t>(found.st_size);
            data = mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE, file, 0);
        }
        if (file >= 0) close(file);
        require(data != MAP_FAILED, path + " cannot be read", "write the clip again with prepare.py");
    }
    ~Mapped() { munmap(data, bytes); }
    Mapped(const Mapped&) = delete;
    Mapped& operator=(const Mapped&) = delete;

    void* data = MAP_FAILED;
    size_t bytes = 0;
};

// The weights of a device graph, which are inputs of its engine: the bundle's data file on the device.
struct Weights {
    // A list of prepare.py: the data file, then the offset and the name of each weight.
    explicit Weights(const std::string& list) {
        std::ifstream lines(list);
        std::string path, name;
        std::getline(lines, path);
        const Mapped file(path);
        memory = Memory(file.bytes);
        check(cudaMemcpy(memory.at(), file.data, file.bytes, cudaMemcpyHostToDevice), "copying " + path);
        check(cudaDeviceSynchronize(), "copying " + path);  // the copy of pageable memory may end after the call
        for (size_t offset = 0; lines >> offset && std::getline(lines >> std::ws, name);) {
            require(offset < file.bytes, path + " does not hold " + name, "write the clip again with prepare.py");
            offsets[name] = offset;
        }
        require(lines.eof() && !offsets.empty(), list + " is not a list of weights",
                "write the clip again with prepare.py");
    }

    Memory memory;
    std::map<std::string, size_t> offsets;
};

// Tensors are bound by name. Addresses are multiples of 256 bytes, as cudaMalloc returns them.
class Engine {
  public:
    Engine(nvinfer1::IRuntime& runtime, const std::string& path) : path_(path) {
        const std::vector<char> data = read_file(path);
        engine_.reset(runtime.deserializeCudaEngine(data.data(), data.size()));
        require(engine_ != nullptr, "TensorRT cannot load " + path, kRebuild);
        context_.reset(engine_->createExecutionContext());
        require(context_ != nullptr, "TensorRT cannot prepare " + path, "free memory on the GPU");
    }

    // Binds weights, once.
    void take(Weights weights) {
        weights_ = std::make_unique<Weights>(std::move(weights));
        for (const auto& [name, offset] : weights_->offsets) bind(name, weights_->memory.at(offset));
    }

    bool has(const std::string& name) const {
        for (int i = 0; i < engine_->getNbIOTensors(); ++i)
            if (name == engine_->getIOTensorName(i)) return true;
        return false;
    }

    void use(int profile, cudaStream_t stream) {
        require(context_->setOptimizationProfileAsync(profile, stream), path_ + " has no such profile", kRebuild);
    }

    void input(const std::string& name, const std::vector<int>& shape, const Memory& memory) {
        nvinfer1::Dims dims = {};
        for (int length : shape) dims.d[dims.nbDims++] = length;
        require(context_->setInputShape(name.c_str(), dims), path_ + " was built for other shapes of " + name,
                "build it larger: tango build BUNDLE with --max-frames, --max-tokens or --context");
        bind(name, memory.at());
    }

    void output(const std::string& name, const Memory& memory) { bind(name, memory.at()); }

    // Allocates an output; its shape is known once all inputs are bound.
    Memory output(const std::string& name) {
        const nvinfer1::Dims shape = context_->getTensorShape(name.c_str());
        size_t bytes = item(name);
        for (int i = 0; i < shape.nbDims; ++i) bytes *= shape.d[i];
        Memory memory(bytes);
        output(name, memory);
        return memory;
    }

    void run(cudaStream_t stream) {
        require(context_->enqueueV3(stream), path_ + " cannot run", "see TensorRT's message above");
    }

    // Bytes of an element: fp16 or fp32 for features, keys, values and logits, int32 for counts.
    size_t item(const std::string& name) const {
        return engine_->getTensorDataType(name.c_str()) == nvinfer1::DataType::kHALF ? 2 : 4;
    }

    // The largest length of an input's axis in a profile.
    int length(const std::string& name, int axis, int profile = 0) const {
        const auto shape = engine_->getProfileShape(name.c_str(), profile, nvinfer1::OptProfileSelector::kMAX);
        require(axis < shape.nbDims, path_ + " is not the engine that takes " + name, kRebuild);
        return static_cast<int>(shape.d[axis]);
    }

  private:
    static constexpr char kRebuild[] = "build it on this machine, with this TensorRT: tango build BUNDLE";

    void bind(const std::string& name, char* address) {
        require(context_->setTensorAddress(name.c_str(), address), path_ + " has no tensor " + name, kRebuild);
    }

    std::string path_;
    std::unique_ptr<Weights> weights_;
    std::unique_ptr<nvinfer1::ICudaEngine> engine_;
    std::unique_ptr<nvinfer1::IExecutionContext> context_;
};
