// A CUDA driver without a GPU, for tests: the part of libcuda.so.1 that cuda.core uses, over the host's memory.
//
// With it the real cuda.core, cuda.bindings and CudaLayer run in CI. It is as late as a driver may be and as strict as
// one can be: work on a stream runs when somebody waits for that stream; freed memory faults when it is touched; a
// capture follows the driver's rules; kernels go to their host build. What a program does that works by luck alone
// is written to stderr as "[fake driver] ...", which the tests look for.
//
// It cannot show real concurrency, numbers, speed, or anything that brings a CUDA runtime of its own (TensorRT, ONNX
// Runtime, PyTorch). Types are the driver's ABI, written down here, so that no CUDA toolkit is needed to build it.
#pragma once
#include <cstdint>
#include <cstdio>
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
    INVALID_DEVICE = 101,
    INVALID_CONTEXT = 201,
    INVALID_HANDLE = 400,
    ILLEGAL_STATE = 401,
    NOT_FOUND = 500,
    NOT_READY = 600,
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

    void run();                // do all that is queued
    Result put(Work work);     // queue work, or record it
    Result spoil();            // what a capture does not allow was asked for
};

extern std::recursive_mutex everything;  // one lock for all state: a test needs no speed
extern std::set<Stream*> streams;        // those of cuStreamCreate; handles are their addresses
Stream* stream_of(void* handle);         // null if there is no such open stream
bool this_thread_captures();             // then calls that wait or allocate are forbidden to it
Result has_context();                    // SUCCESS if this thread has a current context

bool is_pinned(Address address);
bool in_use(Address address, std::size_t size, const char* who);  // reports if it is not

std::map<std::string, void*>& functions();  // by name, for cuGetProcAddress

struct Export {
    Export(const char* name, void* function) { functions()[name] = function; }
};

#define PROBLEM(...) (std::fprintf(stderr, "[fake driver] " __VA_ARGS__), std::fputc('\n', stderr))
#define LOCK std::lock_guard<std::recursive_mutex> lock(everything)
#define CHECK(call) if (Result found = (call); found != SUCCESS) return found

// Define a function of the driver and put it on the list.
#define DRIVER(name, ...)                                                  \
    static Result name(__VA_ARGS__);                                       \
    static Export export_##name(#name, reinterpret_cast<void*>(name));     \
    static Result name(__VA_ARGS__)
