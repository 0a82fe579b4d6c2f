// Cubins and their kernels: parameters are read from the cubin, the work is done by the host build of the same sources.
#include <dlfcn.h>
#include <elf.h>

#include <cstdlib>
#include <cstring>

#include "driver.h"

struct Parameter {
    unsigned offset, size;
};
struct Library {
    std::string code;
    bool loaded = true;
};
// What tests/kernels/host.cpp exports for every kernel.
using HostKernel = bool (*)(unsigned grid_x, unsigned grid_y, unsigned block, unsigned count, void** arguments,
                            const unsigned* sizes);
struct Kernel {
    Library* library;
    std::string name;
    std::vector<Parameter> parameters;
    HostKernel host;
    bool launched = false;
};
struct LaunchConfig {  // CUlaunchConfig
    unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
    void* stream;
    void* attributes;
    unsigned count;
};

static HostKernel host_kernel(const std::string& name)
{
    static void* const build = dlopen(std::getenv("FAKE_CUDA_KERNELS"), RTLD_NOW | RTLD_LOCAL);
    return build ? reinterpret_cast<HostKernel>(dlsym(build, ("host_" + name).c_str())) : nullptr;
}

// A cubin is an ELF file. Its section .nv.info.NAME lists the parameters of kernel NAME, among others: entries of
// format 4 and attribute 0x17. Their bytes 4 to 7 are ordinal and offset; the upper bits of the last word are the size.
static bool read_parameters(const std::string& code, const std::string& name, std::vector<Parameter>& parameters)
{
    const auto* header = reinterpret_cast<const Elf64_Ehdr*>(code.data());
    const auto* sections = reinterpret_cast<const Elf64_Shdr*>(code.data() + header->e_shoff);
    const char* names = code.data() + sections[header->e_shstrndx].sh_offset;
    bool found = false;
    for (int i = 0; i < header->e_shnum; ++i) {
        const std::string section = names + sections[i].sh_name;
        found = found || section == ".text." + name;
        if (section != ".nv.info." + name) continue;
        const auto* at = reinterpret_cast<const unsigned char*>(code.data() + sections[i].sh_offset);
        const auto* end = at + sections[i].sh_size;
        while (at + 4 <= end) {
            const unsigned format = at[0], attribute = at[1], size = at[2] | at[3] << 8;
            at += 4;
            if (format != 4) continue;  // the value stands in the entry itself
            if (attribute == 0x17) {
                std::uint16_t ordinal, offset;
                std::uint32_t last;
                std::memcpy(&ordinal, at + 4, 2);
                std::memcpy(&offset, at + 6, 2);
                std::memcpy(&last, at + 8, 4);
                if (parameters.size() <= ordinal) parameters.resize(ordinal + 1);
                parameters[ordinal] = {offset, last >> 18};
            }
            at += size;
        }
    }
    return found;
}

DRIVER(cuLibraryLoadData, Library** library, const void* code, void*, void*, unsigned, void*, void*, unsigned)
{
    LOCK;
    if (this_thread_captures()) return CAPTURE_UNSUPPORTED;
    const auto* header = static_cast<const Elf64_Ehdr*>(code);
    if (std::memcmp(header->e_ident, ELFMAG, SELFMAG)) return INVALID_VALUE;
    const std::size_t size = header->e_shoff + std::size_t{header->e_shnum} * header->e_shentsize;
    *library = new Library{std::string(static_cast<const char*>(code), size)};
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
    auto found = std::make_unique<Kernel>(Kernel{library, name, {}, host_kernel(name)});
    if (!read_parameters(library->code, name, found->parameters)) return NOT_FOUND;
    if (!found->host) PROBLEM("there is no host build of %s", name);
    *kernel = found.release();
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
DRIVER(cuKernelGetParamInfo, const Kernel* kernel, std::size_t index, std::size_t* offset, std::size_t* size)
{
    if (index >= kernel->parameters.size()) return INVALID_VALUE;
    *offset = kernel->parameters[index].offset;
    if (size) *size = kernel->parameters[index].size;
    return SUCCESS;
}
DRIVER(cuLaunchKernelEx, const LaunchConfig* config, Kernel* kernel, void** arguments, void**)
{
    LOCK;
    CHECK(has_context());
    Stream* stream = stream_of(config->stream);
    if (!stream || !kernel->library->loaded) return INVALID_HANDLE;
    if (stream->capture && !kernel->launched) PROBLEM("%s is loaded while capturing", kernel->name.c_str());
    kernel->launched = true;
    if (!config->grid_x || !config->grid_y || config->grid_y > 65535 || config->block_x > 1024) return INVALID_VALUE;
    std::vector<std::string> values;  // a launch takes its arguments at once
    for (std::size_t i = 0; i < kernel->parameters.size(); ++i)
        values.emplace_back(static_cast<const char*>(arguments[i]), kernel->parameters[i].size);
    const unsigned grid_x = config->grid_x, grid_y = config->grid_y, block = config->block_x;
    return stream->put([=]() mutable {
        std::vector<void*> pointers;
        std::vector<unsigned> sizes;
        for (std::string& value : values) {
            pointers.push_back(value.data());
            sizes.push_back(static_cast<unsigned>(value.size()));
        }
        if (!kernel->host || !kernel->host(grid_x, grid_y, block, pointers.size(), pointers.data(), sizes.data()))
            PROBLEM("the parameters of %s are not those of its host build", kernel->name.c_str());
    });
}
