// The end of a loop that a GPU runs by itself: the `while` node of a CUDA graph asks its condition after every run of
// its body, and only a kernel can set that condition.
//
// cudaGraphSetConditional needs no toolkit header and no libcudadevrt: like vprintf and malloc it is a system call that
// ptxas knows (it refuses other functions it cannot see) and leaves in the cubin for the driver to resolve when it
// loads it. So this is a source of its own: a driver that cannot would lose one form of graph, not the sampler. And it
// is a kernel of its own, not the end of sampler_step, because that one also runs where there is no condition to set.
#include "device.h"

extern "C" __device__ void cudaGraphSetConditional(Index condition, unsigned value);

// next (1): the step of sampler.cu's Progress. Without a condition nothing is set.
extern "C" __global__ void more_steps(const int* next, Index condition)
{
    if (condition != 0) cudaGraphSetConditional(condition, *next >= 0);
}
