// The loop on the device: the starting noise, and one sampling step, fused.
//
// Buffers, all of a batch of N states of P planes of H x W, W a multiple of 4, in quads of 4 elements. A state is an
// image or a window of one, P = 3; or anything else, as one plane of one row:
//   state  (N,P,H,W) float      the running state
//   y      (N,P,H,W) Real       the network's input, the state rounded to Real; for float it may be the state itself
//   noise  (N,P,H,W) Real       what the network predicted
//   taps   (slots,N,P,H,W) float
//   noise_level (N) float       the network's other input, which tells the step
//   given  (N,P,H,W) Real       what the loop starts from beside noise, or null
//   share  (N) Real             how much of it, the rest is noise; or null: then both shares are arguments
// A loop is one noise_init, then network and sampler_step for each row of a table, from the last to the first. Which
// row it is stands in device memory, so every step is the same launch and one captured graph serves them all. The
// `silent` first rows come last and need no network: they make a tap of the state, and leave the state alone.
#include "device.h"
#include "noise.h"

// Where a window's noise comes from; engine/noise.py says how elements are numbered.
struct alignas(16) Window {
    unsigned key_low, key_high, lane;
    int height, width;  // of the whole padded image
    int top, left;      // of the window in it; left and width are multiples of 4
    int unused;
};

// A row of the sampling table.
struct alignas(16) Step {
    float noise_level, y_to_x0, noise_to_x0, x0_to_mean, y_to_mean, sigma;
    int tap;      // slot of `taps` that the result is copied to, or -1
    int counter;  // of the noise that is added: the step's index in the schedule of training
};

struct Progress {
    int step;         // the row to do next; -1 when the loop is over
    unsigned ticket;  // blocks of the running launch that have read `step`
};

__host__ __device__ inline Float4 window_normals(const Window& w, int channel, unsigned row, unsigned column, int step)
{
    // At most 2^32 quads in an image, says engine/noise.py: 32 bits are enough.
    const unsigned line = static_cast<unsigned>(channel * w.height + w.top) + row;
    const unsigned block = line * (w.width / 4) + w.left / 4 + column;
    return normals(block, step, w.lane, w.key_low, w.key_high);
}

// x0 = clip(y*y_to_x0 - noise*noise_to_x0, -limit, limit); x0*x0_to_mean + y*y_to_mean, rounded as NumPy rounds. The
// comparisons let NaN through: a network that overflowed must not look like a clamped one.
__host__ __device__ inline float posterior_mean(const Step& c, float limit, float y, float noise)
{
    float x0 = y * c.y_to_x0 - noise * c.noise_to_x0;
    x0 = x0 < -limit ? -limit : x0;
    x0 = x0 > limit ? limit : x0;
    return x0 * c.x0_to_mean + y * c.y_to_mean;
}

__host__ __device__ inline Float4 posterior_mean4(const Step& c, float limit, Float4 y, Float4 noise)
{
    return {posterior_mean(c, limit, y.x, noise.x), posterior_mean(c, limit, y.y, noise.y),
            posterior_mean(c, limit, y.z, noise.z), posterior_mean(c, limit, y.w, noise.w)};
}

template <typename Real>
__device__ void store_state(Float4* state, Vec4<Real>* y, Index i, Float4 value)
{
    state[i] = value;
    if (static_cast<void*>(y) != state) y[i] = narrow4<Real>(value);
}

__device__ inline void set_step(Progress* progress, float* noise_level, const Step* table, int batch, int step)
{
    progress->step = step;
    if (step < 0) return;
    const float level = table[step].noise_level;
    for (int n = 0; n < batch; ++n) noise_level[n] = level;
}

template <typename Real>
__device__ void noise_init(Float4* state, Vec4<Real>* y, float* noise_level, const Window* windows, const Step* table,
                           Progress* progress, const Vec4<Real>* given, const Real* share, int batch, int planes,
                           int height, int width, int steps, int start, float part_of_all, float rest_of_all)
{
    if (blockIdx.x == 0 && blockIdx.y == 0 && threadIdx.x == 0) {
        progress->ticket = 0;
        set_step(progress, noise_level, table, batch, steps - 1);
    }
    const unsigned columns = width / 4, quads = height * columns;
    for (unsigned plane = blockIdx.y; plane < 1u * planes * batch; plane += gridDim.y) {
        const Window window = windows[plane / planes];
        const float part = share ? widen(share[plane / planes]) : part_of_all;
        const float rest = share ? 1.0f - part : rest_of_all;
        for (unsigned q = blockIdx.x * blockDim.x + threadIdx.x; q < quads; q += gridDim.x * blockDim.x) {
            const Index i = Index{plane} * quads + q;
            Float4 first = window_normals(window, plane % planes, q / columns, q % columns, start);
            if (given) {
                const Float4 from = widen4(given[i]);
                first = {first.x * rest + from.x * part, first.y * rest + from.y * part,
                         first.z * rest + from.z * part, first.w * rest + from.w * part};
            }
            store_state(state, y, i, first);
        }
    }
}

template <typename Real>
__device__ void sampler_step(Float4* state, Vec4<Real>* y, const Vec4<Real>* __restrict__ noise, float* noise_level,
                             Float4* taps, const Window* windows, const Step* table, Progress* progress, int batch,
                             int planes, int height, int width, int steps, int silent, float limit)
{
    // Volatile, so that the compiler cannot read again what the last block may have changed by then.
    const int step = *static_cast<const volatile int*>(&progress->step);
    if (step < 0 || step >= steps) return;  // launched once too often: nothing is left to do

    // The block that draws the last ticket knows that all others have read the step, and may move it on. A kernel of
    // its own for that would cost a graph node, a microsecond or more, in every step. atomicInc wraps, so the count is
    // 0 again for the next launch. The ticket is drawn first and looked at last: its way to memory and back is hidden.
    const unsigned last = gridDim.x * gridDim.y - 1;
    unsigned ticket = 0;
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        ticket = atomicInc(&progress->ticket, last);
    }

    const Step c = table[step];
    const unsigned columns = width / 4, quads = height * columns;
    for (unsigned plane = blockIdx.y; plane < 1u * planes * batch; plane += gridDim.y) {
        const Window window = windows[plane / planes];
        for (unsigned q = blockIdx.x * blockDim.x + threadIdx.x; q < quads; q += gridDim.x * blockDim.x) {
            const Index i = Index{plane} * quads + q;
            const Float4 before = state[i];
            const Vec4<Real> predicted = noise[i];
            Float4 z = {0, 0, 0, 0};  // worked out while the two loads are under way
            if (c.sigma != 0) z = window_normals(window, plane % planes, q / columns, q % columns, c.counter);
            Float4 next = posterior_mean4(c, limit, before, widen4(predicted));
            if (c.sigma != 0)  // else nothing is added, not even a zero, which would turn -0 into 0
                next = {next.x + z.x * c.sigma, next.y + z.y * c.sigma, next.z + z.z * c.sigma, next.w + z.w * c.sigma};
            if (step >= silent) store_state(state, y, i, next);
            if (c.tap >= 0) taps[Index(c.tap) * planes * batch * quads + i] = next;
        }
    }

    if (threadIdx.x == 0 && ticket == last) {
        __threadfence();
        set_step(progress, noise_level, table, batch, step - 1);
    }
}

#define SAMPLER_KERNELS(suffix, Real)                                                                                  \
    extern "C" __global__ void noise_init_##suffix(Float4* state, Vec4<Real>* y, float* noise_level,                   \
                                                   const Window* windows, const Step* table, Progress* progress,       \
                                                   const Vec4<Real>* given, const Real* share, int batch, int planes,  \
                                                   int height, int width, int steps, int start, float part,            \
                                                   float rest)                                                         \
    {                                                                                                                  \
        noise_init(state, y, noise_level, windows, table, progress, given, share, batch, planes, height, width, steps, \
                   start, part, rest);                                                                                 \
    }                                                                                                                  \
    extern "C" __global__ void sampler_step_##suffix(                                                                  \
        Float4* state, Vec4<Real>* y, const Vec4<Real>* noise, float* noise_level, Float4* taps,                       \
        const Window* windows, const Step* table, Progress* progress, int batch, int planes, int height, int width,    \
        int steps, int silent, float limit)                                                                            \
    {                                                                                                                  \
        sampler_step(state, y, noise, noise_level, taps, windows, table, progress, batch, planes, height, width,       \
                     steps, silent, limit);                                                                            \
    }

SAMPLER_KERNELS(f32, float)
SAMPLER_KERNELS(f16, Half)
