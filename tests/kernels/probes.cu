// Kernels only the tests need: the pieces of the real ones, one layer at a time.
#include "device.h"
#include "noise.h"

// words (n) = Philox of counters (n) under keys (n, 2).
extern "C" __global__ void probe_philox(const Vec4<unsigned>* counters, const unsigned* keys, Vec4<unsigned>* words,
                                        int n)
{
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        words[i] = philox4x32(counters[i], keys[2 * i], keys[2 * i + 1]);
}

// values (n, 3) = log(u), cos(2 pi u), sin(2 pi u) of the uniform number u of words (n).
extern "C" __global__ void probe_functions(const unsigned* words, float* values, int n)
{
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        values[3 * i] = log_of(uniform(words[i]));
        cos_sin(uniform(words[i]) * 0x1.921fb6p+2f, &values[3 * i + 1], &values[3 * i + 2]);
    }
}

// normals (n, 2) = Box-Muller of words (n, 2).
extern "C" __global__ void probe_normals(const unsigned* words, float* normals, int n)
{
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        normal_pair(words[2 * i], words[2 * i + 1], &normals[2 * i], &normals[2 * i + 1]);
}

extern "C" __global__ void probe_narrow(const float* values, Half* halves, int n)
{
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        halves[i] = to_half(values[i]);
}

extern "C" __global__ void probe_widen(const Half* halves, float* values, int n)
{
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x)
        values[i] = to_float(halves[i]);
}
