// Device and page-locked memory: pages of their own, 0xFF when new, out of reach once freed; and copies.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>

#include "driver.h"

static const std::size_t PAGE = 4096, ARENA = std::size_t{1} << 40;

struct Piece {
    std::size_t size;
    char* pages;
    std::size_t body;
    bool pinned, freed;
};
static std::map<Address, Piece> pieces;  // freed ones stay: nobody else gets their addresses
static char* arena;                      // addresses without memory
static char* next_pages;
static Address forgotten;  // what lies below is of tests that are over
static std::size_t capacity = std::size_t{8} << 30;  // bytes of device memory
static std::size_t used, most, unused;               // `unused`: freed and kept by the pool

void forget_memory()
{
    for (auto& [address, piece] : pieces) {
        if (piece.freed) continue;
        mprotect(piece.pages, piece.body, PROT_NONE);
        madvise(piece.pages, piece.body, MADV_DONTNEED);
    }
    pieces.clear();
    forgotten = reinterpret_cast<Address>(next_pages);
    capacity = std::size_t{8} << 30;
    used = most = unused = 0;
}

int pieces_alive()
{
    return std::count_if(pieces.begin(), pieces.end(), [](const auto& entry) { return !entry.second.freed; });
}

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
    LOCK;
    const auto found = piece_at(address);
    const bool good = found != pieces.end() && !found->second.freed &&
                      address + size <= found->first + found->second.size;
    if (!good) lose_context("%s: %zu bytes at %#zx are not memory in use", who, size, std::size_t{address});
    return good;
}

// The end of a piece lies at the end of its last page, as far as alignment allows, and behind that is no memory.
static Address take(std::size_t size, bool pinned)
{
    if (!arena) {
        void* pages = mmap(nullptr, ARENA, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (pages == MAP_FAILED) return 0;
        arena = next_pages = static_cast<char*>(pages);
    }
    const std::size_t body = std::max<std::size_t>((size + PAGE - 1) / PAGE, 1) * PAGE;
    char* const pages = next_pages;
    if (pages + body + PAGE > arena + ARENA || mprotect(pages, body, PROT_READ | PROT_WRITE)) return 0;
    next_pages += body + PAGE;
    std::memset(pages, 0xFF, body);
    const Address alignment = pinned ? 16 : 512;
    const Address address = (reinterpret_cast<Address>(pages) + body - size) & ~(alignment - 1);
    pieces[address] = {size, pages, body, pinned, false};
    return address;
}

static void drop(Address address)
{
    LOCK;
    const auto found = pieces.find(address);
    if (found == pieces.end() || found->second.freed) {
        if (address >= forgotten) problem("memory at %#zx is freed that is not in use", std::size_t{address});
        return;
    }
    Piece& piece = found->second;
    const char *start = reinterpret_cast<char*>(address), *end = start + piece.size;
    const auto written = [](char byte) { return byte != '\xFF'; };
    if (std::any_of(static_cast<const char*>(piece.pages), start, written)) problem("something wrote before a piece");
    if (std::any_of(end, static_cast<const char*>(piece.pages) + piece.body, written))
        problem("something wrote past a piece");
    mprotect(piece.pages, piece.body, PROT_NONE);  // from here on who touches it faults
    madvise(piece.pages, piece.body, MADV_DONTNEED);
    piece.freed = true;
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
DRIVER(cuMemPoolTrimTo, void* trimmed, std::size_t)
{
    LOCK;
    unused = 0;
    return trimmed == &pool ? SUCCESS : INVALID_VALUE;
}

DRIVER(cuMemAllocFromPoolAsync, Address* address, std::size_t size, void*, void* handle)
{
    LOCK;
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (stream->capture) return stream->spoil();
    if (!size) return INVALID_VALUE;
    CHECK(counted("device memory"));
    if (used + size > capacity) return OUT_OF_MEMORY;
    *address = take(size, false);
    if (!*address) return OUT_OF_MEMORY;
    used += size;
    most = std::max(most, used);
    return SUCCESS;
}
DRIVER(cuMemAllocAsync, Address* address, std::size_t size, void* stream)
{
    return cuMemAllocFromPoolAsync(address, size, &pool, stream);
}
// Its address is out of reach when the stream comes here; its bytes can be had again at once, in the stream's order.
DRIVER(cuMemFreeAsync, Address address, void* handle)
{
    LOCK;
    if (address < forgotten) return SUCCESS;
    Stream* stream = stream_of(handle);
    if (!stream) {
        problem("memory is freed on a stream that is closed");
        return INVALID_HANDLE;
    }
    if (stream->capture) problem("a capture holds a call that frees memory");
    const auto found = pieces.find(address);
    if (found == pieces.end()) return INVALID_VALUE;
    used -= found->second.size;
    unused += found->second.size;
    return stream->put("free", [address] { drop(address); });
}
DRIVER(cuMemAllocHost, void** address, std::size_t size)
{
    LOCK;
    CHECK(has_context());
    if (this_thread_captures()) return CAPTURE_UNSUPPORTED;
    CHECK(counted("pinned memory"));
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
    *total = capacity;
    *free = capacity - used;
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
        return stream->put("upload", [=] {
            LOCK;
            if (in_use(to, size, "copy to the device") && in_use(source, size, "copy from pinned memory"))
                std::memcpy(reinterpret_cast<void*>(to), from, size);
        });
    if (stream->capture) problem("a capture holds a copy from pageable memory");
    const std::string values(static_cast<const char*>(from), size);
    return stream->put("upload", [=] {
        LOCK;
        if (in_use(to, size, "copy to the device")) std::memcpy(reinterpret_cast<void*>(to), values.data(), size);
    });
}
// Who reads pinned memory before the stream has come to the copy finds NaN. Pageable memory is waited for.
DRIVER(cuMemcpyDtoHAsync, void* to, Address from, std::size_t size, void* handle)
{
    Stream* stream;
    const Address target = reinterpret_cast<Address>(to);
    {
        LOCK;
        CHECK(has_context());
        stream = stream_of(handle);
        if (!stream) return INVALID_HANDLE;
        if (is_pinned(target)) {
            if (!stream->capture && in_use(target, size, "copy to pinned memory")) std::memset(to, 0xFF, size);
            return stream->put("download", [=] {
                LOCK;
                if (in_use(from, size, "copy from the device") && in_use(target, size, "copy to pinned memory"))
                    std::memcpy(to, reinterpret_cast<void*>(from), size);
            });
        }
        if (stream->capture) return stream->spoil();
        counted("download");
        counted("wait");
    }
    CHECK(stream->run());
    LOCK;
    if (in_use(from, size, "copy from the device")) std::memcpy(to, reinterpret_cast<void*>(from), size);
    return context_is_lost() ? ILLEGAL_ADDRESS : SUCCESS;
}
DRIVER(cuMemcpyDtoH, void* to, Address from, std::size_t size) { return cuMemcpyDtoHAsync(to, from, size, nullptr); }

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

extern "C" {
void fake_set_capacity(std::size_t bytes)
{
    LOCK;
    capacity = bytes;
}
// Bytes of device memory: in use (0), the most there were (1), freed but kept by the pool (2), in all (3).
std::size_t fake_bytes(int which)
{
    LOCK;
    return which == 0 ? used : which == 1 ? most : which == 2 ? unused : capacity;
}
}
