// A step of decoding, and nothing else of the CUDA library.
#include "decode.cu"
constexpr int kMultiprocessors = 16, kSharedBytes = 227 << 10;
#include "library.h"
