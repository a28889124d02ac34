// The cache of experts that expert_cache.h tells, and the functions by which the runtime opens one.
#include "expert_cache.h"
#include "tagged_value.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

namespace {

constexpr int64_t PIECE = 1 << 20;  // bytes of one read: a record is read by several threads, so one miss fills a drive

int64_t nanoseconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

class Lock {
   public:
    explicit Lock(pthread_mutex_t& mutex) : mutex_(mutex) { pthread_mutex_lock(&mutex_); }
    ~Lock() { pthread_mutex_unlock(&mutex_); }
    Lock(const Lock&) = delete;

   private:
    pthread_mutex_t& mutex_;
};

enum class Place { absent, reading, resident };

struct Expert {
    ExpertLayer* layer;
    int64_t file, offset;  // of its record
    Place place;
    bool needed;              // requested, and not computed yet
    int64_t slot, last_used;  // in memory; the request that last named it
    int64_t pieces, begun, done;
    bool failed;
    Expert* next;  // in the readers' queue
};

struct Statistics {
    int64_t hits, misses, bytes_read, reading_ns, waits, waiting_ns;
    int64_t error;  // the number of the one that ended the last request, or 0
};

}  // namespace

struct ExpertCache {
    pthread_mutex_t mutex;
    pthread_cond_t queued, landed;
    Expert *first, *last;  // those with pieces that no reader has begun
    bool direct, closing;
    int64_t layer_count, reader_count;
    ExpertLayer* layers;
    pthread_t* readers;
};

struct ExpertLayer {
    ExpertCache* cache;
    int64_t count, bytes, slots;  // experts, and of a record
    uint8_t* memory;              // [slots, bytes]
    Expert* experts;
    Expert** in_slot;      // [slots]
    const void** records;  // [count]: the wave
    int64_t requests, reads_in_flight, reading_since;
    Statistics statistics;
};

namespace {

// A slot for one more record: an empty one, or that of the expert nobody has named for longest; -1 if all are in use.
int64_t take_slot(ExpertLayer& layer) {
    int64_t oldest = -1;
    for (int64_t slot = 0; slot < layer.slots; ++slot) {
        const Expert* held = layer.in_slot[slot];
        if (!held) return slot;
        if (held->place != Place::resident || held->needed) continue;
        if (oldest < 0 || held->last_used < layer.in_slot[oldest]->last_used) oldest = slot;
    }
    if (oldest >= 0) layer.in_slot[oldest]->place = Place::absent;
    return oldest;
}

// Queues those that are needed and absent, as far as there are slots.
void start_reads(ExpertLayer& layer) {
    ExpertCache& cache = *layer.cache;
    for (Expert* expert = layer.experts; expert < layer.experts + layer.count; ++expert) {
        if (!expert->needed || expert->place != Place::absent || layer.statistics.error) continue;
        const int64_t slot = take_slot(layer);
        if (slot < 0) return;
        layer.in_slot[slot] = expert;
        expert->slot = slot;
        expert->place = Place::reading;
        expert->begun = expert->done = 0;
        expert->failed = false;
        expert->next = nullptr;
        (cache.first ? cache.last->next : cache.first) = expert;
        cache.last = expert;
        pthread_cond_broadcast(&cache.queued);
    }
}

// 0, or the number of the error.
int read_piece(const Expert& expert, int64_t piece) {
    const ExpertLayer& layer = *expert.layer;
    const int64_t end = (piece + 1) * PIECE < layer.bytes ? (piece + 1) * PIECE : layer.bytes;
    for (int64_t at = piece * PIECE; at < end;) {
        uint8_t* to = layer.memory + expert.slot * layer.bytes + at;
        const ssize_t count = pread(expert.file, to, end - at, expert.offset + at);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) return errno;
        if (count == 0) return ENODATA;  // the file ends too early
        at += count;
    }
    if (!layer.cache->direct) {  // what the system keeps would count against the same memory
        posix_fadvise(expert.file, expert.offset + piece * PIECE, end - piece * PIECE, POSIX_FADV_DONTNEED);
    }
    return 0;
}

void* run_reader(void* argument) {
    ExpertCache& cache = *static_cast<ExpertCache*>(argument);
    Lock held(cache.mutex);
    for (;;) {
        while (!cache.closing && !cache.first) pthread_cond_wait(&cache.queued, &cache.mutex);
        if (cache.closing) return nullptr;
        Expert& expert = *cache.first;
        ExpertLayer& layer = *expert.layer;
        const int64_t piece = expert.begun++;
        if (expert.begun == expert.pieces) cache.first = expert.next;
        if (layer.reads_in_flight++ == 0) layer.reading_since = nanoseconds();
        pthread_mutex_unlock(&cache.mutex);
        const int error = read_piece(expert, piece);
        pthread_mutex_lock(&cache.mutex);
        if (--layer.reads_in_flight == 0) layer.statistics.reading_ns += nanoseconds() - layer.reading_since;
        if (error) {
            layer.statistics.error = error;
            expert.failed = true;
        }
        if (++expert.done < expert.pieces) continue;
        if (expert.failed) {
            expert.place = Place::absent;
            layer.in_slot[expert.slot] = nullptr;
        } else {
            expert.place = Place::resident;
            layer.statistics.bytes_read += layer.bytes;
        }
        pthread_cond_broadcast(&cache.landed);
    }
}

void close_cache(ExpertCache* cache) {
    {
        Lock held(cache->mutex);
        cache->closing = true;
        pthread_cond_broadcast(&cache->queued);
    }
    for (int64_t reader = 0; reader < cache->reader_count; ++reader) pthread_join(cache->readers[reader], nullptr);
    for (int64_t i = 0; i < cache->layer_count; ++i) {
        ExpertLayer& layer = cache->layers[i];
        if (layer.memory) munmap(layer.memory, layer.slots * layer.bytes);
        free(layer.experts);
        free(layer.in_slot);
        free(layer.records);
    }
    free(cache->layers);
    free(cache->readers);
    free(cache);
}

template <class T>
bool allocate(T*& array, int64_t count) {
    return (array = static_cast<T*>(calloc(count, sizeof(T)))) != nullptr;
}

// What the runtime says of a layer: its `count` experts, (file, offset) each, follow.
struct LayerDescription {
    int64_t count, bytes, slots, table;
};

bool open_layer(ExpertCache& cache, ExpertLayer& layer, const LayerDescription& described) {
    layer.cache = &cache;
    layer.count = described.count, layer.bytes = described.bytes, layer.slots = described.slots;
    if (!allocate(layer.experts, layer.count) || !allocate(layer.in_slot, layer.slots) ||
        !allocate(layer.records, layer.count)) {
        return false;
    }
    void* memory = mmap(nullptr, layer.slots * layer.bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return false;
    madvise(memory, layer.slots * layer.bytes, MADV_HUGEPAGE);
    layer.memory = static_cast<uint8_t*>(memory);
    const auto* places = reinterpret_cast<const int64_t*>(&described + 1);
    for (int64_t e = 0; e < layer.count; ++e) {
        Expert& expert = layer.experts[e];
        expert.layer = &layer;
        expert.file = places[2 * e], expert.offset = places[2 * e + 1];
        expert.pieces = (layer.bytes + PIECE - 1) / PIECE;
    }
    *reinterpret_cast<int64_t*>(described.table) = reinterpret_cast<int64_t>(&layer);
    return true;
}

// `description`: how many layers and readers, whether files are read past the system's cache, then the layers.
ExpertCache* open_cache(const int64_t* description) {
    ExpertCache* cache;
    if (!allocate(cache, 1)) return nullptr;
    pthread_mutex_init(&cache->mutex, nullptr);
    pthread_cond_init(&cache->queued, nullptr);
    pthread_cond_init(&cache->landed, nullptr);
    const int64_t layers = description[0], readers = description[1];
    cache->direct = description[2];
    bool opened = allocate(cache->layers, layers) && allocate(cache->readers, readers);
    const int64_t* at = description + 3;
    for (; opened && cache->layer_count < layers; ++cache->layer_count) {
        const auto& described = *reinterpret_cast<const LayerDescription*>(at);
        opened = open_layer(*cache, cache->layers[cache->layer_count], described);
        at += sizeof described / sizeof *at + 2 * described.count;
    }
    for (; opened && cache->reader_count < readers; ++cache->reader_count) {
        opened = pthread_create(&cache->readers[cache->reader_count], nullptr, run_reader, cache) == 0;
    }
    if (opened) return cache;
    if (cache->layers && cache->layer_count < layers) ++cache->layer_count;  // the one that was begun
    close_cache(cache);
    return nullptr;
}

}  // namespace

void request_experts(ExpertLayer* layer, const int64_t* ids, int64_t count) {
    Lock held(layer->cache->mutex);
    layer->statistics.error = 0;
    ++layer->requests;
    for (int64_t e = 0; e < layer->count; ++e) layer->experts[e].needed = false, layer->records[e] = nullptr;
    for (int64_t i = 0; i < count; ++i) {
        if (ids[i] < 0 || ids[i] >= layer->count || layer->experts[ids[i]].needed) continue;
        Expert& expert = layer->experts[ids[i]];
        expert.needed = true;
        expert.last_used = layer->requests;
        ++(expert.place == Place::absent ? layer->statistics.misses : layer->statistics.hits);
    }
    start_reads(*layer);
}

ExpertWave next_experts(ExpertLayer* layer) {
    ExpertCache& cache = *layer->cache;
    Lock held(cache.mutex);
    for (int64_t e = 0; e < layer->count; ++e) {
        if (layer->records[e]) layer->experts[e].needed = false, layer->records[e] = nullptr;
    }
    const int64_t start = nanoseconds();
    for (bool waited = false;; waited = true) {
        start_reads(*layer);
        int64_t needed = 0, ready = 0;
        for (int64_t e = 0; e < layer->count; ++e) {
            const Expert& expert = layer->experts[e];
            if (!expert.needed) continue;
            ++needed;
            if (expert.place != Place::resident) continue;
            ++ready;
            layer->records[e] = layer->memory + expert.slot * layer->bytes;
        }
        if (ready || !needed || layer->statistics.error) {
            if (waited) {
                ++layer->statistics.waits;
                layer->statistics.waiting_ns += nanoseconds() - start;
            }
            if (layer->statistics.error) return {nullptr, true};
            return {layer->records, ready == needed};
        }
        pthread_cond_wait(&cache.landed, &cache.mutex);
    }
}

// (address of a description) -> the cache, 0 where there is no memory or no thread for it.
extern "C" int __tvm_ffi_arriero_open_experts(void*, const TaggedValue* arguments, int32_t, TaggedValue* result) {
    ExpertCache* cache = open_cache(reinterpret_cast<const int64_t*>(arguments[0].integer));
    *result = {TAGGED_INTEGER, 0, reinterpret_cast<int64_t>(cache)};
    return 0;
}

// (cache, address of i64 [layers, 7], which gets the statistics)
extern "C" int __tvm_ffi_arriero_count_experts(void*, const TaggedValue* arguments, int32_t, TaggedValue* result) {
    auto* cache = reinterpret_cast<ExpertCache*>(arguments[0].integer);
    auto* out = reinterpret_cast<Statistics*>(arguments[1].integer);
    Lock held(cache->mutex);
    for (int64_t i = 0; i < cache->layer_count; ++i) out[i] = cache->layers[i].statistics;
    *result = {TAGGED_INTEGER, 0, 0};
    return 0;
}

// (cache): no graph runs any more.
extern "C" int __tvm_ffi_arriero_close_experts(void*, const TaggedValue* arguments, int32_t, TaggedValue* result) {
    close_cache(reinterpret_cast<ExpertCache*>(arguments[0].integer));
    *result = {TAGGED_INTEGER, 0, 0};
    return 0;
}
