// Counter-based Gaussian noise, the device side of engine/noise.py: Philox4x32-10 (Salmon et al., SC'11), Box-Muller.
//
// The logarithm, sine and cosine are our own because libm's and libdevice's differ in the last bits. Written in plain
// IEEE operations they make the host build, which CI compares with NumPy, speak for every GPU bit for bit. They also
// need only the ranges that occur here, so there is no slow path for huge arguments and no stack frame.
#pragma once
#include "device.h"

__host__ __device__ inline Vec4<unsigned> philox4x32(Vec4<unsigned> c, unsigned key_low, unsigned key_high)
{
    for (int round = 0; round < 10; ++round) {
        const Index p0 = Index{0xD2511F53u} * c.x, p1 = Index{0xCD9E8D57u} * c.z;
        c = {static_cast<unsigned>(p1 >> 32) ^ c.y ^ key_low, static_cast<unsigned>(p1),
             static_cast<unsigned>(p0 >> 32) ^ c.w ^ key_high, static_cast<unsigned>(p0)};
        key_low += 0x9E3779B9u;
        key_high += 0xBB67AE85u;
    }
    return c;
}

// A word as a number strictly between 0 and 1; every step is exact.
__host__ __device__ inline float uniform(unsigned word)
{
    return (static_cast<float>(word >> 9) + 0.5f) * 0x1p-23f;
}

// log(u) for normal positive u, within 1 ulp: u = m * 2^k with m in [sqrt(1/2), sqrt(2)), and log(m) = 2 artanh(s) for
// s = f / (2 + f), f = m - 1, as a series in s^2 <= 0.0295. 2s is written f - s*f: f is exact, s is not.
__host__ __device__ inline float log_of(float u)
{
    const int bits = __builtin_bit_cast(int, u);
    const int k = (bits - 0x3F3504F3) >> 23;  // 0x3F3504F3 is sqrt(1/2)
    const float f = __builtin_bit_cast(float, bits - k * (1 << 23)) - 1.0f;
    const float s = f / (2.0f + f), s2 = s * s;
    const float tail = s2 * (2.0f / 3 + s2 * (2.0f / 5 + s2 * (2.0f / 7 + s2 * (2.0f / 9))));
    const float e = static_cast<float>(k);
    // ln 2 in two parts: e * the first is exact.
    return e * 0x1.62e4p-1f + (e * 0x1.7f7d1cp-20f + (f - s * (f - tail)));
}

// cos and sin of an angle in [0, 2 pi], within 1.5 ulp: r = angle - k * pi/2 with |r| <= pi/4, then Taylor's series.
// pi/2 is taken in three parts, so that the first two subtractions are exact and r is good next to its zeros too.
__host__ __device__ inline void cos_sin(float angle, float* cosine, float* sine)
{
    const int k = static_cast<int>(angle * 0x1.45f306p-1f + 0.5f);  // 2/pi
    const float q = static_cast<float>(k);
    const float r = ((angle - q * 0x1.92p+0f) - q * 0x1.fb4p-12f) - q * 0x1.4442d2p-24f, r2 = r * r;
    const float s = r + r * (r2 * (-1.0f / 6 + r2 * (1.0f / 120 + r2 * (-1.0f / 5040 + r2 * (1.0f / 362880)))));
    const float h = 0.5f * r2, one_h = 1.0f - h;  // (1 - one_h) - h is what rounding took from 1 - h
    const float c = one_h + (((1.0f - one_h) - h) + r2 * r2 * (1.0f / 24 + r2 * (-1.0f / 720 + r2 * (1.0f / 40320))));
    *cosine = k & 1 ? s : c;
    *sine = k & 1 ? c : s;
    if ((k + 1) & 2) *cosine = -*cosine;
    if (k & 2) *sine = -*sine;
}

__host__ __device__ inline void normal_pair(unsigned word0, unsigned word1, float* z0, float* z1)
{
    const float radius = sqrtf(log_of(uniform(word0)) * -2.0f);
    float cosine, sine;
    cos_sin(uniform(word1) * 0x1.921fb6p+2f, &cosine, &sine);  // float32(2 pi)
    *z0 = radius * cosine;
    *z1 = radius * sine;
}

// Four standard normals: elements 4*block ... 4*block + 3 of the image at `step`.
__host__ __device__ inline Float4 normals(unsigned block, int step, unsigned lane, unsigned key_low, unsigned key_high)
{
    const Vec4<unsigned> w = philox4x32({block, static_cast<unsigned>(step), lane, 0}, key_low, key_high);
    Float4 z;
    normal_pair(w.x, w.y, &z.x, &z.y);
    normal_pair(w.z, w.w, &z.z, &z.w);
    return z;
}
