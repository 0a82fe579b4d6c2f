// What tests ask of the driver: whether there is a GPU, what was called how often, which call is to fail, what is left.
#include <csetjmp>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "driver.h"

static bool plugged_in = std::getenv("FAKE_CUDA_GPU");
static std::map<std::string, long> counts;
static std::vector<std::string> problems;
static std::string failing;  // what is to fail, from the `left`-th time on that it is asked for, so many `times`
static long left, times;
static Result failure;
static long calls_to_live = -1;  // of the context; none left at 0, no limit below

bool context_is_lost() { return calls_to_live == 0; }

Result counted(const char* what)
{
    LOCK;
    ++counts[what];
    const bool call = !std::strncmp(what, "cu", 2) && std::strncmp(what, "cuGetError", 10);
    // What a test has left is given back later, when nobody holds it any more.
    if (call && !plugged_in) return std::strstr(what, "Free") || std::strstr(what, "Destroy") ? SUCCESS : NO_DEVICE;
    if (call && context_is_lost()) return ILLEGAL_ADDRESS;
    if (call && calls_to_live > 0) --calls_to_live;
    if (failing != what || --left > 0 || times <= 0) return SUCCESS;
    --times;
    return failure;
}

static std::string formatted(const char* format, va_list values)
{
    char text[500];
    std::vsnprintf(text, sizeof text, format, values);
    return text;
}

void problem(const char* format, ...)
{
    LOCK;
    va_list values;
    va_start(values, format);
    problems.push_back(formatted(format, values));
    va_end(values);
    std::fprintf(stderr, "[fake driver] %s\n", problems.back().c_str());
}

void lose_context(const char* format, ...)
{
    LOCK;
    va_list values;
    va_start(values, format);
    problem("%s", formatted(format, values).c_str());
    va_end(values);
    calls_to_live = 0;
}

static thread_local sigjmp_buf* landing;
static struct sigaction before;

static void on_fault(int number, siginfo_t*, void*)
{
    if (landing) siglongjmp(*landing, 1);
    sigaction(number, &before, nullptr);  // not ours: it faults again
}

bool guarded(const Work& work)
{
    LOCK;
    sigjmp_buf here;
    struct sigaction ours = {};
    ours.sa_sigaction = on_fault;
    ours.sa_flags = SA_SIGINFO;
    sigaction(SIGSEGV, &ours, &before);
    landing = &here;
    const bool good = !sigsetjmp(here, 1);
    if (good) work();
    landing = nullptr;
    sigaction(SIGSEGV, &before, nullptr);
    return good;
}

extern "C" {
// A process may have found out before that there is no GPU: put one in, or take it out. Either way all is as new.
void fake_reset(int with_gpu)
{
    LOCK;
    plugged_in = with_gpu;
    counts.clear();
    problems.clear();
    failing.clear();
    calls_to_live = -1;
    forget_streams();
    forget_memory();
}
int fake_has_gpu(void) { return plugged_in; }
// How often a function was called ("cuStreamSynchronize"), or a thing was put on a stream or allocated: see `counted`.
long fake_count(const char* what)
{
    LOCK;
    return counts[what];
}
// The `nth` call of a function from now on fails, or allocation of "device memory" or "pinned memory"; so many in a row.
void fake_fail(const char* what, long nth, long in_a_row, int result)
{
    LOCK;
    failing = what;
    left = nth;
    times = in_a_row;
    failure = static_cast<Result>(result);
}
// After so many more calls the context is lost; with -1 it lives on.
void fake_lose_context(long after)
{
    LOCK;
    calls_to_live = after;
}
// Streams, graphs and memory that were not given back.
long fake_alive(void)
{
    LOCK;
    long open = 0;
    for (const Stream* stream : streams) open += stream->open;
    return open + graphs_alive() + pieces_alive();
}
int fake_capturing(void)
{
    LOCK;
    bool open = false;
    for (const Stream* stream : streams) open = open || stream->capture;
    return open;
}
// How much work a stream has that has not run.
long fake_pending(void* handle)
{
    LOCK;
    const Stream* stream = stream_of(handle);
    return stream ? stream->queue.size() : 0;
}
void fake_tell(const char* text) { problem("%s", text); }
// Take one problem off the list; null if there is none.
const char* fake_problem(void)
{
    LOCK;
    static std::string taken;
    if (problems.empty()) return nullptr;
    taken = problems.front();
    problems.erase(problems.begin());
    return taken.c_str();
}
// Put a network of a test on a stream: `run` is called when its turn comes, if all its memory is there, and says 0.
int fake_stage(void* handle, int (*run)(void), unsigned count, const Address* addresses, const std::size_t* sizes)
{
    LOCK;
    CHECK(counted("cuFakeStage"));
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    const std::vector<Address> where(addresses, addresses + count);
    const std::vector<std::size_t> size(sizes, sizes + count);
    return stream->put("stage", [=] {
        for (unsigned i = 0; i < count; ++i)
            if (!in_use(where[i], size[i], "a stage")) return;
        if (run()) lose_context("a stage failed");
    });
}
}
