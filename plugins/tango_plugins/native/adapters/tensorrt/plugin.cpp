#include "plugin.h"

#include <cstdio>

namespace tango {
namespace {

nvinfer1::ILogger* logger = nullptr;

}  // namespace

void set_logger(nvinfer1::ILogger* found) { logger = found; }

void report(const char* plugin, const std::string& message) {
    const std::string text = std::string(plugin) + ": " + message;
    if (logger != nullptr)
        logger->log(nvinfer1::ILogger::Severity::kERROR, text.c_str());
    else
        std::fprintf(stderr, "%s\n", text.c_str());
}

std::vector<const PluginKind*> all_kinds() {
    std::vector<const PluginKind*> all = operator_kinds();
    all.push_back(&prune_kind());
    return all;
}

}  // namespace tango
