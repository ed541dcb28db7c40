// A step of decoding, and nothing else of the CUDA library.
#include "decode.cu"
#include "library.h"
