// A CUDA driver without a GPU, for tests: the part of libcuda.so.1 that cuda.core uses, over the host's memory.
//
// With it the real cuda.core, cuda.bindings and CudaLayer run in CI. It is as late as a driver may be and as strict as
// one can be: work on a stream runs when somebody waits for that stream; pinned memory is read and written only then;
// fresh memory is NaN; who touches memory that is not in use loses the context, as on a GPU; a capture follows the
// driver's rules; kernels go to their host build. What works by luck alone is a problem: the tests look for those.
//
// It cannot show real concurrency, numbers, speed, or anything that brings a CUDA runtime of its own (TensorRT, ONNX
// Runtime, PyTorch). Types are the driver's ABI, written down here, so that no CUDA toolkit is needed to build it.
#pragma once
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

enum Result {  // CUresult
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    ILLEGAL_STATE = 401,
    NOT_FOUND = 500,
    NOT_READY = 600,
    ILLEGAL_ADDRESS = 700,
    NOT_SUPPORTED = 801,
    CAPTURE_UNSUPPORTED = 900,
    CAPTURE_INVALIDATED = 901,
    CAPTURE_WRONG_THREAD = 908,
};

using Address = std::uintptr_t;  // CUdeviceptr; host memory has the same addresses
using Work = std::function<void()>;

struct Graph {
    std::vector<Work> nodes;
};

enum CaptureMode { GLOBAL = 0, THREAD_LOCAL = 1, RELAXED = 2 };

struct Stream {
    std::deque<Work> queue;
    std::unique_ptr<Graph> capture;
    CaptureMode mode = GLOBAL;
    std::thread::id capturer;
    bool spoilt = false;  // the capture
    bool open = true;
    unsigned flags = 0;
    std::recursive_mutex runs;  // held while its work runs; take it before `everything`

    Result run();                            // do all that is queued; never while holding `everything`
    Result put(const char* what, Work work); // count and queue work, or record it
    Result spoil();                          // what a capture does not allow was asked for
};

// One lock for all state: a test needs no speed. It is free while a function of the host runs, which may need Python's.
extern std::recursive_mutex everything;
extern std::set<Stream*> streams;  // those of cuStreamCreate; handles are their addresses
Stream* stream_of(void* handle);   // null if there is no such open stream
bool this_thread_captures();       // then calls that wait or allocate are forbidden to it
Result has_context();              // SUCCESS if this thread has a current context
void forget_streams();             // as if the process had just begun; graphs too
int graphs_alive();

bool is_pinned(Address address);
bool in_use(Address address, std::size_t size, const char* who);  // the context is lost if it is not
void forget_memory();
int pieces_alive();

// What tests ask for: see control.cpp.
Result counted(const char* what);      // count a call or an event, and fail if a test wants it to
void problem(const char* format, ...);
void lose_context(const char* format, ...);  // every call fails from now on
bool context_is_lost();
bool guarded(const Work& work);        // whether it touched no memory that is out of reach

std::map<std::string, void*>& functions();  // by name, for cuGetProcAddress

#define LOCK std::lock_guard<std::recursive_mutex> lock(everything)
#define CHECK(call) if (Result found = (call); found != SUCCESS) return found

// Stands before every function of the driver.
template <auto function>
struct Gate;
template <typename... A, Result (*function)(A...)>
struct Gate<function> {
    static inline const char* title;
    static Result call(A... arguments)
    {
        CHECK(counted(title));
        return function(arguments...);
    }
};

// Define a function of the driver and put it on the list.
#define DRIVER(name, ...)                                                   \
    static Result name(__VA_ARGS__);                                        \
    [[maybe_unused]] static const bool listed_##name = [] {                                  \
        Gate<&name>::title = #name;                                         \
        functions()[#name] = reinterpret_cast<void*>(Gate<&name>::call);    \
        return true;                                                        \
    }();                                                                    \
    static Result name(__VA_ARGS__)
