// Images on their way into the networks: 8-bit pixels to a normalised padded plane, and crops out of planes.
#include "device.h"

// An index past the end of an axis of `size`, mirrored at the last element, which is not repeated: NumPy's "reflect".
__host__ __device__ inline int reflect(int i, int size)
{
    if (i < size) return i;
    if (size == 1) return 0;
    const int period = 2 * (size - 1), r = i % period;
    return r < size ? r : period - r;
}

__host__ __device__ inline float normalised(float value) { return (value / 255.0f - 0.5f) / 0.5f; }

// engine/pixels.py, as_tapped, bit for bit; `form` is the place in TapForm. The comparisons let NaN through.
__host__ __device__ inline float as_tapped(float x, int form)
{
    x = x < -1.0f ? -1.0f : x;
    x = x > 1.0f ? 1.0f : x;
    return form == 2 ? normalised(rintf((x + 1.0f) * 127.5f)) : x;
}

// 12 bytes: 4 pixels of 3 channels.
__host__ __device__ inline void load_pixels(const unsigned char* from, unsigned char (&pixels)[12])
{
    if (reinterpret_cast<Index>(from) % 4 == 0) {  // three loads where the row allows it
        for (int word = 0; word < 3; ++word) {
            const unsigned bytes = reinterpret_cast<const unsigned*>(from)[word];
            for (int b = 0; b < 4; ++b) pixels[4 * word + b] = static_cast<unsigned char>(bytes >> 8 * b);
        }
    } else {
        for (int b = 0; b < 12; ++b) pixels[b] = from[b];
    }
}

// image (height, width, 3) bytes, rows `row_bytes` apart, any alignment -> plane (3, padded_height, padded_width) in
// [-1, 1], padded at the right and at the bottom by reflection. padded_width is a multiple of 4.
template <typename Real>
__device__ void normalise_pad(const unsigned char* image, Vec4<Real>* __restrict__ plane, int height, int width,
                              long long row_bytes, int padded_height, int padded_width)
{
    const unsigned columns = padded_width / 4, quads = padded_height * columns;
    for (unsigned q = blockIdx.x * blockDim.x + threadIdx.x; q < quads; q += gridDim.x * blockDim.x) {
        const int row = q / columns, x = q % columns * 4;
        const unsigned char* line = image + reflect(row, height) * row_bytes;
        unsigned char pixels[12];
        if (x + 4 <= width) {
            load_pixels(line + Index(x) * 3, pixels);
        } else {
            for (int p = 0; p < 4; ++p)
                for (int c = 0; c < 3; ++c) pixels[3 * p + c] = line[Index(reflect(x + p, width)) * 3 + c];
        }
        for (int c = 0; c < 3; ++c)
            plane[Index(c) * quads + q] = narrow4<Real>({normalised(pixels[c]), normalised(pixels[3 + c]),
                                                         normalised(pixels[6 + c]), normalised(pixels[9 + c])});
    }
}

// One kind of image: (images, 3, height, width), float or half, and the form that it takes on the way.
struct alignas(16) Source {
    const void* images;
    int is_half, form;
};

struct alignas(16) Crop {
    int image, top, left, unused;
};

template <typename T>
__host__ __device__ Float4 load_pixels(const T* from, Index at)
{
    if (at % 4 == 0) return widen4(reinterpret_cast<const Vec4<T>*>(from)[at / 4]);
    return {widen(from[at]), widen(from[at + 1]), widen(from[at + 2]), widen(from[at + 3])};
}

// sources (kinds), crops (count) -> out (count, kinds, 3, crop_height, crop_width). Crops start at any pixel and lie
// inside the images; width and crop_width are multiples of 4.
template <typename Real>
__device__ void gather_crops(const Source* sources, const Crop* crops, Vec4<Real>* __restrict__ out, int count,
                             int kinds, int height, int width, int crop_height, int crop_width)
{
    const unsigned columns = crop_width / 4, quads = crop_height * columns;
    for (unsigned plane = blockIdx.y; plane < 3u * kinds * count; plane += gridDim.y) {
        const Source source = sources[plane / 3 % kinds];
        const Crop crop = crops[plane / 3 / kinds];
        const Index first = (Index(crop.image) * 3 + plane % 3) * height + crop.top;
        for (unsigned q = blockIdx.x * blockDim.x + threadIdx.x; q < quads; q += gridDim.x * blockDim.x) {
            const Index at = (first + q / columns) * width + crop.left + q % columns * 4;
            Float4 pixels = source.is_half ? load_pixels(static_cast<const Half*>(source.images), at)
                                           : load_pixels(static_cast<const float*>(source.images), at);
            if (source.form > 0)
                pixels = {as_tapped(pixels.x, source.form), as_tapped(pixels.y, source.form),
                          as_tapped(pixels.z, source.form), as_tapped(pixels.w, source.form)};
            out[Index{plane} * quads + q] = narrow4<Real>(pixels);
        }
    }
}

#define IMAGE_KERNELS(suffix, Real)                                                                                    \
    extern "C" __global__ void normalise_pad_##suffix(const unsigned char* image, Vec4<Real>* plane, int height,       \
                                                      int width, long long row_bytes, int padded_height,               \
                                                      int padded_width)                                                \
    {                                                                                                                  \
        normalise_pad(image, plane, height, width, row_bytes, padded_height, padded_width);                            \
    }                                                                                                                  \
    extern "C" __global__ void gather_crops_##suffix(const Source* sources, const Crop* crops, Vec4<Real>* out,        \
                                                     int count, int kinds, int height, int width, int crop_height,     \
                                                     int crop_width)                                                   \
    {                                                                                                                  \
        gather_crops(sources, crops, out, count, kinds, height, width, crop_height, crop_width);                       \
    }

IMAGE_KERNELS(f32, float)
IMAGE_KERNELS(f16, Half)
