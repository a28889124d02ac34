// The experts of a model of which memory holds only some: a cache per layer, least recently used out first, and threads
// that read what it lacks. One thread at a time asks; every function may wait for the readers' lock, `next_experts` for
// the disk.
#pragma once

#include <stdint.h>

struct ExpertLayer;

struct ExpertWave {
    const void* const* records;  // [E]: experts to compute now, the others null; itself null if a record cannot be read
    bool last;                   // of those that were requested
};

// Starts to read those of `ids` that are not in memory. What was requested before is forgotten.
void request_experts(ExpertLayer* layer, const int64_t* ids, int64_t count);

// Waits until some of the requested experts are in memory that no wave had yet; the wave before is computed by now, and
// its places may be read into.
ExpertWave next_experts(ExpertLayer* layer);
