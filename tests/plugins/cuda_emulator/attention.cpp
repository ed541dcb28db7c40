// Attention of a pass of tokens, and nothing else of the CUDA library. So small a GPU takes large tiles for few rows.
#include "attention.cu"
constexpr int kMultiprocessors = 1, kSharedBytes = 100 << 10;
#include "library.h"
