// The device, its one context, and the door through which cuda.bindings finds every function.
#include <cstdio>
#include <cstring>

#include "driver.h"

std::recursive_mutex everything;

static const int VERSION = 13000;
static bool initialised;
static int primary;  // its address is the context's handle
static thread_local std::vector<void*> contexts;

std::map<std::string, void*>& functions()
{
    static std::map<std::string, void*> list;
    return list;
}

Result has_context()
{
    if (!initialised) return NOT_INITIALIZED;
    return contexts.empty() || !contexts.back() ? INVALID_CONTEXT : SUCCESS;
}

DRIVER(cuInit, unsigned)
{
    initialised = true;
    return SUCCESS;
}
DRIVER(cuDriverGetVersion, int* version)
{
    *version = VERSION;
    return SUCCESS;
}
DRIVER(cuDeviceGetCount, int* count)
{
    *count = 1;
    return initialised ? SUCCESS : NOT_INITIALIZED;
}
DRIVER(cuDeviceGet, int* device, int ordinal)
{
    *device = 0;
    return ordinal ? INVALID_DEVICE : SUCCESS;
}
DRIVER(cuDeviceGetName, char* name, int size, int)
{
    std::snprintf(name, size, "fake GPU");
    return SUCCESS;
}
DRIVER(cuDeviceGetUuid, unsigned char* uuid, int)
{
    std::memset(uuid, 7, 16);
    return SUCCESS;
}
DRIVER(cuDeviceGetAttribute, int* value, int attribute, int)
{
    static const std::map<int, int> known = {
        {1, 1024},  // threads per block
        {2, 1024},  // block x, y, z
        {3, 1024},
        {4, 64},
        {5, 2147483647},  // grid x, y, z
        {6, 65535},
        {7, 65535},
        {10, 32},   // warp
        {16, 132},  // multiprocessors
        {41, 1},    // unified addressing
        {75, 9},    // compute capability
        {76, 0},
        {115, 1},  // memory pools
    };
    const auto found = known.find(attribute);
    *value = found == known.end() ? 0 : found->second;
    return SUCCESS;
}

DRIVER(cuDevicePrimaryCtxRetain, void** context, int)
{
    *context = &primary;
    return initialised ? SUCCESS : NOT_INITIALIZED;
}
DRIVER(cuDevicePrimaryCtxRelease, int) { return SUCCESS; }
DRIVER(cuCtxGetCurrent, void** context)
{
    *context = contexts.empty() ? nullptr : contexts.back();
    return SUCCESS;
}
DRIVER(cuCtxSetCurrent, void* context)
{
    if (contexts.empty()) contexts.push_back(nullptr);
    contexts.back() = context;
    return SUCCESS;
}
DRIVER(cuCtxPushCurrent, void* context)
{
    contexts.push_back(context);
    return SUCCESS;
}
DRIVER(cuCtxPopCurrent, void** context)
{
    if (contexts.empty()) return INVALID_CONTEXT;
    if (context) *context = contexts.back();
    contexts.pop_back();
    return SUCCESS;
}
DRIVER(cuCtxGetDevice, int* device)
{
    *device = 0;
    return has_context();
}
DRIVER(cuCtxGetId, void*, unsigned long long* id)
{
    *id = 1;
    return SUCCESS;
}
DRIVER(cuCtxGetStreamPriorityRange, int* least, int* greatest)
{
    *least = 0;
    *greatest = -5;
    return has_context();
}

DRIVER(cuGetErrorName, Result error, const char** name)
{
    static const std::map<Result, const char*> names = {
        {SUCCESS, "CUDA_SUCCESS"},
        {NO_DEVICE, "CUDA_ERROR_NO_DEVICE"},
        {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"},
        {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"},
        {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT"},
        {INVALID_HANDLE, "CUDA_ERROR_INVALID_HANDLE"},
        {NOT_FOUND, "CUDA_ERROR_NOT_FOUND"},
        {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS"},
        {NOT_READY, "CUDA_ERROR_NOT_READY"},
        {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED"},
        {CAPTURE_UNSUPPORTED, "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"},
        {CAPTURE_INVALIDATED, "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"},
    };
    const auto found = names.find(error);
    *name = found == names.end() ? "CUDA_ERROR_UNKNOWN" : found->second;
    return SUCCESS;
}
DRIVER(cuGetErrorString, Result, const char** text)
{
    *text = "the fake driver says no more";
    return SUCCESS;
}

// A function that is not on the list is null: cuda.bindings then raises an error that names it.
extern "C" Result cuGetProcAddress_v2(const char* name, void** function, int, std::uint64_t, int* status)
{
    LOCK;
    const auto found = functions().find(name);
    *function = found == functions().end() ? nullptr : found->second;
    if (!std::strcmp(name, "cuGetProcAddress")) *function = reinterpret_cast<void*>(cuGetProcAddress_v2);
    if (status) *status = *function ? 0 : 1;
    return SUCCESS;
}
extern "C" Result cuGetProcAddress(const char* name, void** function, int version, std::uint64_t flags)
{
    return cuGetProcAddress_v2(name, function, version, flags, nullptr);
}
