// Streams that run when waited for, their captures and graphs, and events.
#include <chrono>

#include "driver.h"

std::set<Stream*> streams;
static std::set<void*> forgotten;  // streams of tests that are over
static Stream legacy;  // the default stream

Stream* stream_of(void* handle)
{
    if (!handle || handle == reinterpret_cast<void*>(1)) return &legacy;
    const auto found = streams.find(static_cast<Stream*>(handle));
    return found == streams.end() || !(*found)->open ? nullptr : *found;
}

bool this_thread_captures()
{
    for (const Stream* stream : streams) {
        const bool mine = stream->mode == THREAD_LOCAL && stream->capturer == std::this_thread::get_id();
        if (!stream->open || !stream->capture || !(mine || stream->mode == GLOBAL)) continue;
        problem("a call that waits or allocates while this thread captures");
        return true;
    }
    return false;
}

Result Stream::run()
{
    const std::lock_guard<std::recursive_mutex> mine(runs);
    while (true) {
        Work work;
        {
            LOCK;
            if (context_is_lost()) queue.clear();
            if (queue.empty()) return context_is_lost() ? ILLEGAL_ADDRESS : SUCCESS;
            work = std::move(queue.front());
            queue.pop_front();
        }
        work();
    }
}

Result Stream::put(const char* what, Work work)
{
    if (spoilt && capture) return CAPTURE_INVALIDATED;
    if (capture) {
        capture->nodes.push_back(std::move(work));
        return SUCCESS;
    }
    CHECK(counted(what));
    queue.push_back(std::move(work));
    return SUCCESS;
}

Result Stream::spoil()
{
    spoilt = true;
    return CAPTURE_UNSUPPORTED;
}

DRIVER(cuStreamCreateWithPriority, void** handle, unsigned flags, int)
{
    LOCK;
    CHECK(has_context());
    auto* stream = new Stream;
    stream->flags = flags;
    streams.insert(stream);
    *handle = stream;
    return SUCCESS;
}
DRIVER(cuStreamDestroy, void* handle)
{
    if (forgotten.count(handle)) return SUCCESS;
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    stream->run();
    LOCK;
    stream->open = false;
    return SUCCESS;
}
DRIVER(cuStreamSynchronize, void* handle)
{
    Stream* stream;
    {
        LOCK;
        stream = stream_of(handle);
        if (!stream) return INVALID_HANDLE;
        if (stream->capture) return stream->spoil();
        if (stream == &legacy && this_thread_captures()) return CAPTURE_UNSUPPORTED;
        counted("wait");
    }
    return stream->run();
}
DRIVER(cuStreamGetCtx, void*, void** context)
{
    return reinterpret_cast<Result (*)(void**)>(functions().at("cuCtxGetCurrent"))(context);
}
DRIVER(cuStreamGetFlags, void* handle, unsigned* flags)
{
    const Stream* stream = stream_of(handle);
    if (stream) *flags = stream->flags;
    return stream ? SUCCESS : INVALID_HANDLE;
}
DRIVER(cuStreamGetPriority, void*, int* priority)
{
    *priority = 0;
    return SUCCESS;
}
DRIVER(cuStreamIsCapturing, void* handle, int* status)
{
    const Stream* stream = stream_of(handle);
    if (stream) *status = !stream->capture ? 0 : stream->spoilt ? 2 : 1;
    return stream ? SUCCESS : INVALID_HANDLE;
}
// A function of the host, when the stream comes to it.
DRIVER(cuLaunchHostFunc, void* handle, void (*function)(void*), void* data)
{
    LOCK;
    Stream* stream = stream_of(handle);
    return stream ? stream->put("host function", [=] { function(data); }) : INVALID_HANDLE;
}

DRIVER(cuStreamBeginCapture, void* handle, CaptureMode mode)
{
    LOCK;
    CHECK(has_context());
    Stream* stream = stream_of(handle);
    if (!stream || stream == &legacy) return INVALID_HANDLE;
    if (stream->capture) return ILLEGAL_STATE;
    stream->capture = std::make_unique<Graph>();
    stream->mode = mode;
    stream->capturer = std::this_thread::get_id();
    stream->spoilt = false;
    return SUCCESS;
}

static std::map<Graph*, std::unique_ptr<Graph>> graphs;

struct Executable {
    Graph graph;
    bool open = true;
};
static std::set<Executable*> executables;  // that are open

int graphs_alive() { return graphs.size() + executables.size(); }

void forget_streams()
{
    for (Stream* stream : streams) {
        forgotten.insert(stream);
        stream->queue.clear();
        stream->capture.reset();
    }
    streams.clear();  // not freed, as events and executables: somebody may still hold their handles
    graphs.clear();
    executables.clear();
}

DRIVER(cuStreamEndCapture, void* handle, Graph** graph)
{
    LOCK;
    *graph = nullptr;
    Stream* stream = stream_of(handle);
    if (!stream || !stream->capture) return ILLEGAL_STATE;
    if (stream->mode != RELAXED && stream->capturer != std::this_thread::get_id()) return CAPTURE_WRONG_THREAD;
    const std::unique_ptr<Graph> captured = std::move(stream->capture);
    if (stream->spoilt) return CAPTURE_INVALIDATED;  // the driver has destroyed what there was
    CHECK(counted("capture"));
    *graph = new Graph(*captured);
    graphs[*graph].reset(*graph);
    return SUCCESS;
}
DRIVER(cuGraphInstantiateWithFlags, Executable** executable, Graph* graph, unsigned long long)
{
    LOCK;
    if (!graphs.count(graph)) return INVALID_VALUE;
    *executable = new Executable{*graph};
    executables.insert(*executable);
    return SUCCESS;
}
DRIVER(cuGraphInstantiate, Executable** executable, Graph* graph, unsigned long long flags)
{
    return cuGraphInstantiateWithFlags(executable, graph, flags);
}
DRIVER(cuGraphDestroy, Graph* graph)
{
    LOCK;
    if (graphs.erase(graph)) return SUCCESS;
    problem("a graph is destroyed that is not there");
    return INVALID_VALUE;
}
DRIVER(cuGraphLaunch, Executable* executable, void* handle)
{
    LOCK;
    CHECK(has_context());
    Stream* stream = stream_of(handle);
    if (!stream || !executable->open) return INVALID_HANDLE;
    if (stream->capture) problem("a graph is launched in a capture");
    return stream->put("graph", [executable] {
        if (!executable->open) problem("a graph is destroyed before it ran");
        for (const Work& work : executable->graph.nodes) {
            if (context_is_lost()) return;
            work();
        }
    });
}
DRIVER(cuGraphExecDestroy, Executable* executable)
{
    LOCK;
    if (!executable->open) problem("an executable graph is destroyed twice");
    executable->open = false;
    executables.erase(executable);
    return SUCCESS;
}

struct Event {
    bool timed, recorded = false, done = false;
    double seconds = 0;
};

DRIVER(cuEventCreate, Event** event, unsigned flags)
{
    CHECK(has_context());
    *event = new Event{!(flags & 2)};
    return SUCCESS;
}
DRIVER(cuEventDestroy, Event*) { return SUCCESS; }  // a stream may still come to it
DRIVER(cuEventRecord, Event* event, void* handle)
{
    LOCK;
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (stream->capture) problem("an event is recorded in a capture: it would tell no time");
    event->recorded = true;
    event->done = false;
    return stream->put("event", [event] {
        event->done = true;
        event->seconds = std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
    });
}
DRIVER(cuEventElapsedTime, float* milliseconds, const Event* first, const Event* last)
{
    LOCK;
    if (!first->timed || !last->timed || !first->recorded || !last->recorded) return INVALID_HANDLE;
    if (!first->done || !last->done) return NOT_READY;
    *milliseconds = static_cast<float>((last->seconds - first->seconds) * 1e3);
    return SUCCESS;
}
