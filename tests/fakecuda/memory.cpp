// Device and page-locked memory: pages of their own, 0xFF when new, out of reach once freed; and copies.
#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "driver.h"

static const std::size_t PAGE = 4096, CAPACITY = std::size_t{8} << 30;

struct Piece {
    std::size_t size;
    char* pages;
    std::size_t mapped;
    bool pinned, freed;
};
static std::map<Address, Piece> pieces;  // freed ones stay: nobody else gets their addresses
static std::size_t used;                 // bytes of device memory

static std::map<Address, Piece>::iterator piece_at(Address address)
{
    auto next = pieces.upper_bound(address);
    if (next == pieces.begin()) return pieces.end();
    --next;
    return address < next->first + std::max<std::size_t>(next->second.size, 1) ? next : pieces.end();
}

bool is_pinned(Address address)
{
    const auto found = piece_at(address);
    return found != pieces.end() && found->second.pinned;
}

bool in_use(Address address, std::size_t size, const char* who)
{
    const auto found = piece_at(address);
    const bool good = found != pieces.end() && !found->second.freed &&
                      address + size <= found->first + found->second.size;
    if (!good) PROBLEM("%s: %zu bytes at %#zx are not memory in use", who, size, std::size_t{address});
    return good;
}

// The end of a piece lies at the end of its last page, as far as alignment allows, and behind that is no memory.
static Address take(std::size_t size, bool pinned)
{
    const std::size_t body = std::max<std::size_t>((size + PAGE - 1) / PAGE, 1) * PAGE;
    void* pages = mmap(nullptr, body + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) return 0;
    char* base = static_cast<char*>(pages);
    mprotect(base + body, PAGE, PROT_NONE);
    std::memset(base, 0xFF, body);
    const Address alignment = pinned ? 16 : 512;
    const Address address = (reinterpret_cast<Address>(base) + body - size) & ~(alignment - 1);
    pieces[address] = {size, base, body + PAGE, pinned, false};
    if (!pinned) used += size;
    return address;
}

static void drop(Address address)
{
    const auto found = pieces.find(address);
    if (found == pieces.end() || found->second.freed) {
        PROBLEM("memory at %#zx is freed that is not in use", std::size_t{address});
        return;
    }
    Piece& piece = found->second;
    mprotect(piece.pages, piece.mapped, PROT_NONE);  // from here on who touches it faults
    madvise(piece.pages, piece.mapped, MADV_DONTNEED);
    piece.freed = true;
    if (!piece.pinned) used -= piece.size;
}

static int pool;  // its address is the handle of the one memory pool
static std::uint64_t release_threshold;

DRIVER(cuDeviceGetMemPool, void** found, int)
{
    *found = &pool;
    return SUCCESS;
}
DRIVER(cuDeviceGetDefaultMemPool, void** found, int) { return cuDeviceGetMemPool(found, 0); }
DRIVER(cuMemGetMemPool, void** found, void*, int) { return cuDeviceGetMemPool(found, 0); }
DRIVER(cuMemGetDefaultMemPool, void** found, void*, int) { return cuDeviceGetMemPool(found, 0); }
DRIVER(cuMemPoolGetAttribute, void*, int, std::uint64_t* value)
{
    *value = release_threshold;
    return SUCCESS;
}
DRIVER(cuMemPoolSetAttribute, void*, int attribute, std::uint64_t* value)
{
    if (attribute == 4) release_threshold = *value;
    return SUCCESS;
}
DRIVER(cuMemPoolTrimTo, void* trimmed, std::size_t) { return trimmed == &pool ? SUCCESS : INVALID_VALUE; }

DRIVER(cuMemAllocFromPoolAsync, Address* address, std::size_t size, void*, void* handle)
{
    LOCK;
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (stream->capture) return stream->spoil();
    if (!size) return INVALID_VALUE;
    if (used + size > CAPACITY) return OUT_OF_MEMORY;
    *address = take(size, false);
    return *address ? SUCCESS : OUT_OF_MEMORY;
}
DRIVER(cuMemAllocAsync, Address* address, std::size_t size, void* stream)
{
    return cuMemAllocFromPoolAsync(address, size, &pool, stream);
}
DRIVER(cuMemFreeAsync, Address address, void* handle)
{
    LOCK;
    Stream* stream = stream_of(handle);
    if (!stream) {
        PROBLEM("memory is freed on a stream that is closed");
        return INVALID_HANDLE;
    }
    if (stream->capture) PROBLEM("a capture holds a call that frees memory");
    return stream->put([address] { drop(address); });
}
DRIVER(cuMemAllocHost, void** address, std::size_t size)
{
    LOCK;
    CHECK(has_context());
    if (this_thread_captures()) return CAPTURE_UNSUPPORTED;
    *address = reinterpret_cast<void*>(take(size, true));
    return *address ? SUCCESS : OUT_OF_MEMORY;
}
DRIVER(cuMemFreeHost, void* address)
{
    LOCK;
    CHECK(has_context());
    if (this_thread_captures()) return CAPTURE_UNSUPPORTED;
    drop(reinterpret_cast<Address>(address));
    return SUCCESS;
}
DRIVER(cuMemGetInfo, std::size_t* free, std::size_t* total)
{
    *total = CAPACITY;
    *free = CAPACITY - used;
    return has_context();
}

// From pageable memory the values are taken at once; pinned memory is read when the stream comes to the copy.
DRIVER(cuMemcpyHtoDAsync, Address to, const void* from, std::size_t size, void* handle)
{
    LOCK;
    CHECK(has_context());
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    const Address source = reinterpret_cast<Address>(from);
    if (is_pinned(source))
        return stream->put([=] {
            if (in_use(to, size, "copy to the device") && in_use(source, size, "copy from pinned memory"))
                std::memcpy(reinterpret_cast<void*>(to), from, size);
        });
    if (stream->capture) PROBLEM("a capture holds a copy from pageable memory");
    const std::string values(static_cast<const char*>(from), size);
    return stream->put([=] {
        if (in_use(to, size, "copy to the device")) std::memcpy(reinterpret_cast<void*>(to), values.data(), size);
    });
}
// To pageable memory the driver copies before it returns.
DRIVER(cuMemcpyDtoHAsync, void* to, Address from, std::size_t size, void* handle)
{
    LOCK;
    CHECK(has_context());
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    const Address target = reinterpret_cast<Address>(to);
    const bool pinned = is_pinned(target);
    const auto copy = [=] {
        if (in_use(from, size, "copy from the device") && (!pinned || in_use(target, size, "copy to pinned memory")))
            std::memcpy(to, reinterpret_cast<void*>(from), size);
    };
    if (pinned) return stream->put(copy);
    if (stream->capture) return stream->spoil();
    stream->run();
    copy();
    return SUCCESS;
}
DRIVER(cuPointerGetAttributes, unsigned count, int* attributes, void** values, Address address)
{
    LOCK;
    const auto found = piece_at(address);
    const unsigned type = found == pieces.end() ? 0 : found->second.pinned ? 1 : 2;
    for (unsigned i = 0; i < count; ++i) {
        if (attributes[i] == 1) *static_cast<void**>(values[i]) = nullptr;  // context: a pool's memory has none
        else *static_cast<unsigned*>(values[i]) = attributes[i] == 2 ? type : 0;
    }
    return SUCCESS;
}
