// Sums and activations of the CUDA library.
#include "activate.cu"
