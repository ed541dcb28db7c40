// Attention of a pass of tokens, and nothing else of the CUDA library.
#include "attention.cu"
#include "library.h"
