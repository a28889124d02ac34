// The runtime's functions, as TVM calls those of a library: over tagged values, of which ours take and give integers.
#pragma once

#include <stdint.h>

struct TaggedValue {
    int32_t type;
    uint32_t unused;
    int64_t integer;
};
constexpr int32_t TAGGED_INTEGER = 1;
