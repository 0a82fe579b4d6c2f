// Streams that run when waited for, their captures and graphs, and events.
#include <chrono>

#include "driver.h"

std::set<Stream*> streams;
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
        PROBLEM("a call that waits or allocates while this thread captures");
        return true;
    }
    return false;
}

void Stream::run()
{
    while (!queue.empty()) {
        const Work work = std::move(queue.front());
        queue.pop_front();
        work();
    }
}

Result Stream::put(Work work)
{
    if (!capture) queue.push_back(std::move(work));
    else if (spoilt) return CAPTURE_INVALIDATED;
    else capture->nodes.push_back(std::move(work));
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
    LOCK;
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    stream->run();
    stream->open = false;
    return SUCCESS;
}
DRIVER(cuStreamSynchronize, void* handle)
{
    LOCK;
    Stream* stream = stream_of(handle);
    if (!stream) return INVALID_HANDLE;
    if (stream->capture) return stream->spoil();
    if (stream == &legacy && this_thread_captures()) return CAPTURE_UNSUPPORTED;
    stream->run();
    return SUCCESS;
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
// A function of the host, when the stream comes to it. The lock is held meanwhile: it may call nothing of CUDA.
DRIVER(cuLaunchHostFunc, void* handle, void (*function)(void*), void* data)
{
    LOCK;
    Stream* stream = stream_of(handle);
    return stream ? stream->put([=] { function(data); }) : INVALID_HANDLE;
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

DRIVER(cuStreamEndCapture, void* handle, Graph** graph)
{
    LOCK;
    *graph = nullptr;
    Stream* stream = stream_of(handle);
    if (!stream || !stream->capture) return ILLEGAL_STATE;
    if (stream->mode != RELAXED && stream->capturer != std::this_thread::get_id()) return CAPTURE_WRONG_THREAD;
    const std::unique_ptr<Graph> captured = std::move(stream->capture);
    if (stream->spoilt) return CAPTURE_INVALIDATED;  // the driver has destroyed what there was
    *graph = new Graph(*captured);
    graphs[*graph].reset(*graph);
    return SUCCESS;
}
DRIVER(cuGraphInstantiateWithFlags, Executable** executable, Graph* graph, unsigned long long)
{
    LOCK;
    if (!graphs.count(graph)) return INVALID_VALUE;
    *executable = new Executable{*graph};
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
    PROBLEM("a graph is destroyed that is not there");
    return INVALID_VALUE;
}
DRIVER(cuGraphLaunch, Executable* executable, void* handle)
{
    LOCK;
    CHECK(has_context());
    Stream* stream = stream_of(handle);
    if (!stream || !executable->open) return INVALID_HANDLE;
    if (stream->capture) PROBLEM("a graph is launched in a capture");
    return stream->put([executable] {
        if (!executable->open) PROBLEM("a graph is destroyed before it ran");
        for (const Work& work : executable->graph.nodes) work();
    });
}
DRIVER(cuGraphExecDestroy, Executable* executable)
{
    LOCK;
    if (!executable->open) PROBLEM("an executable graph is destroyed twice");
    executable->open = false;
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
    event->recorded = true;
    event->done = false;
    return stream->put([event] {
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
