// Kernels: whatever the machine code is, the host build of the same sources does the work.
#include <dlfcn.h>

#include <cstdlib>

#include "driver.h"

struct Library {
    bool loaded = true;
};
// What tests/kernels/host.cpp exports for every kernel; the sizes of its parameters, after their number.
using HostKernel = bool (*)(unsigned grid_x, unsigned grid_y, unsigned block, unsigned count, void** arguments,
                            const unsigned* sizes);
struct Kernel {
    Library* library;
    std::string name;
    std::vector<unsigned> sizes;
    HostKernel host;
    bool launched = false;
};
struct LaunchConfig {  // CUlaunchConfig
    unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
    void* stream;
    void* attributes;
    unsigned count;
};

static void* symbol(const std::string& name)
{
    static void* const build = dlopen(std::getenv("FAKE_CUDA_KERNELS"), RTLD_NOW | RTLD_LOCAL);
    return build ? dlsym(build, name.c_str()) : nullptr;
}

DRIVER(cuLibraryLoadData, Library** library, const void*, void*, void*, unsigned, void*, void*, unsigned)
{
    LOCK;
    if (this_thread_captures()) return CAPTURE_UNSUPPORTED;
    *library = new Library;
    return SUCCESS;
}
DRIVER(cuLibraryUnload, Library* library)
{
    library->loaded = false;
    return SUCCESS;
}
DRIVER(cuLibraryGetKernel, Kernel** kernel, Library* library, const char* name)
{
    LOCK;
    const auto* sizes = static_cast<const unsigned*>(symbol(std::string("host_sizes_") + name));
    if (!sizes) return NOT_FOUND;
    const auto host = reinterpret_cast<HostKernel>(symbol(std::string("host_") + name));
    *kernel = new Kernel{library, name, {sizes + 1, sizes + 1 + sizes[0]}, host};
    return SUCCESS;
}
DRIVER(cuKernelGetLibrary, Library** library, const Kernel* kernel)
{
    *library = kernel->library;
    return SUCCESS;
}
DRIVER(cuKernelGetAttribute, int* value, int, const Kernel*, int)
{
    *value = 0;
    return SUCCESS;
}
// Parameters lie one after the other, each at a multiple of its size.
DRIVER(cuKernelGetParamInfo, const Kernel* kernel, std::size_t index, std::size_t* offset, std::size_t* size)
{
    if (index >= kernel->sizes.size()) return INVALID_VALUE;
    std::size_t end = 0;
    for (std::size_t i = 0; i <= index; ++i) {
        *offset = (end + kernel->sizes[i] - 1) / kernel->sizes[i] * kernel->sizes[i];
        end = *offset + kernel->sizes[i];
    }
    if (size) *size = kernel->sizes[index];
    return SUCCESS;
}
DRIVER(cuLaunchKernelEx, const LaunchConfig* config, Kernel* kernel, void** arguments, void**)
{
    LOCK;
    CHECK(has_context());
    Stream* stream = stream_of(config->stream);
    if (!stream || !kernel->library->loaded) return INVALID_HANDLE;
    if (stream->capture && !kernel->launched) problem("%s is loaded while capturing", kernel->name.c_str());
    kernel->launched = true;
    if (!config->grid_x || !config->grid_y || config->grid_y > 65535 || config->block_x > 1024) return INVALID_VALUE;
    std::vector<std::string> values;  // a launch takes its arguments at once
    for (std::size_t i = 0; i < kernel->sizes.size(); ++i)
        values.emplace_back(static_cast<const char*>(arguments[i]), kernel->sizes[i]);
    const unsigned grid_x = config->grid_x, grid_y = config->grid_y, block = config->block_x;
    return stream->put("kernel", [=]() mutable {
        LOCK;
        std::vector<void*> pointers;
        for (std::string& value : values) pointers.push_back(value.data());
        const auto run = [&] {
            kernel->host(grid_x, grid_y, block, pointers.size(), pointers.data(), kernel->sizes.data());
        };
        if (!guarded(run)) lose_context("%s touches memory that is not in use", kernel->name.c_str());
    });
}
