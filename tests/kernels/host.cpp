// The kernels as ordinary C++: the CUDA keywords defined away, a launch as loops over blocks and threads.
//
// Threads run one after the other, thread 0 of a block last, so that what it does alone after a barrier comes after all
// of its block has done what stands before it. That is no model of concurrency: test_on_gpu.py is for that.
// Contraction to FMA must be off (-ffp-contract=off), as it is on the device.
#include <array>
#include <cmath>
#include <cstddef>
#include <utility>

#define __global__
#define __device__
#define __host__

static struct {
    unsigned x, y;
} blockIdx, gridDim, threadIdx, blockDim;

static void __syncthreads() {}
static void __threadfence() {}
static unsigned atomicInc(unsigned* address, unsigned last)
{
    const unsigned old = *address;
    *address = old >= last ? 0 : old + 1;
    return old;
}

#include "images.cu"
#include "probes.cu"
#include "sampler.cu"

// What cuLaunchKernel takes: `arguments[i]` points to the i-th argument, here of `sizes[i]` bytes. Returns whether
// number and sizes are those of the kernel's parameters, and runs it if so.
template <typename... A, std::size_t... I>
static bool launch(void (*kernel)(A...), std::index_sequence<I...>, unsigned grid_x, unsigned grid_y, unsigned block,
                   unsigned count, void** arguments, const unsigned* sizes)
{
    if (count != sizeof...(A) || !((sizes[I] == sizeof(A)) && ...)) return false;
    gridDim = {grid_x, grid_y};
    blockDim = {block, 1};
    for (blockIdx.y = 0; blockIdx.y < grid_y; ++blockIdx.y)
        for (blockIdx.x = 0; blockIdx.x < grid_x; ++blockIdx.x)
            for (threadIdx.x = block; threadIdx.x-- > 0;) kernel(*static_cast<A*>(arguments[I])...);
    return true;
}

template <typename... A>
static std::index_sequence_for<A...> indices(void (*)(A...))
{
    return {};
}

// The number of a kernel's parameters and their sizes.
template <typename... A>
static constexpr std::array<unsigned, sizeof...(A) + 1> sizes_of(void (*)(A...))
{
    return {sizeof...(A), sizeof(A)...};
}

#define EXPORT(name)                                                                                                   \
    extern "C" const auto host_sizes_##name = sizes_of(name);                                                          \
    extern "C" bool host_##name(unsigned grid_x, unsigned grid_y, unsigned block, unsigned count, void** arguments,    \
                                const unsigned* sizes)                                                                 \
    {                                                                                                                  \
        return launch(name, indices(name), grid_x, grid_y, block, count, arguments, sizes);                            \
    }

EXPORT(noise_init_f32)
EXPORT(noise_init_f16)
EXPORT(sampler_step_f32)
EXPORT(sampler_step_f16)
EXPORT(normalise_pad_f32)
EXPORT(normalise_pad_f16)
EXPORT(gather_crops_f32)
EXPORT(gather_crops_f16)
EXPORT(probe_philox)
EXPORT(probe_functions)
EXPORT(probe_normals)
EXPORT(probe_narrow)
EXPORT(probe_widen)

extern "C" const unsigned host_struct_sizes[] = {sizeof(Window), sizeof(Step), sizeof(Progress), sizeof(Source),
                                                 sizeof(Crop)};
