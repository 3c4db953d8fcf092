// Makes a CUDA context and ends: what any program on the GPU takes to start.
#include <cuda_runtime.h>

int main() { return cudaFree(nullptr) == cudaSuccess ? 0 : 1; }
