// Storage types and index helpers shared by the kernels.
//
// No toolkit header is included: NVRTC's wheel carries none (cuda_fp16.h would need two more packages), and the two
// half conversions below are all we want of it. Without __CUDACC__ this is the host build of the tests, where
// tests/kernels/host.cpp has defined the CUDA keywords away; it needs a compiler that knows _Float16.
//
// All code is compiled with contraction to FMA off, IEEE division and square root, and denormals kept
// (compile.py, OPTIONS): every result is then the same bits on every GPU and in the host build.
#pragma once

using Index = unsigned long long;  // a batch of large images has more than 2^31 elements

struct Half {
    unsigned short bits;  // IEEE binary16
};

// Four neighbouring pixels of a row: what one thread loads or stores at once (16 bytes of float, 8 of half).
template <typename T>
struct alignas(4 * sizeof(T)) Vec4 {
    T x, y, z, w;
};
using Float4 = Vec4<float>;

#ifdef __CUDACC__
__device__ inline float to_float(Half h)
{
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h.bits));
    return f;
}
__device__ inline Half to_half(float f)
{
    Half h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(f));
    return h;
}
#else
inline float to_float(Half h) { return __builtin_bit_cast(_Float16, h.bits); }
inline Half to_half(float f) { return {__builtin_bit_cast(unsigned short, static_cast<_Float16>(f))}; }
#endif

template <typename T>
__host__ __device__ T narrow(float f);
template <>
__host__ __device__ inline float narrow<float>(float f)
{
    return f;
}
template <>
__host__ __device__ inline Half narrow<Half>(float f)
{
    return to_half(f);
}
__host__ __device__ inline float widen(float f) { return f; }
__host__ __device__ inline float widen(Half h) { return to_float(h); }

template <typename T>
__host__ __device__ Vec4<T> narrow4(Float4 v)
{
    return {narrow<T>(v.x), narrow<T>(v.y), narrow<T>(v.z), narrow<T>(v.w)};
}
template <typename T>
__host__ __device__ Float4 widen4(Vec4<T> v)
{
    return {widen(v.x), widen(v.y), widen(v.z), widen(v.w)};
}
