// Rows of codes as dense streams of 32-bit words, least significant bit first (numerics/packing.py).
#pragma once
#include <cstdint>

namespace bitmill {

// `Code` is what a code of `bits` bits fits in.
template <class Code>
void read_words(const uint32_t* words, int bits, int64_t count, Code* codes) {
    uint64_t held = 0;
    int have = 0;
    for (int64_t i = 0; i < count; ++i) {
        if (have < bits) {
            held |= static_cast<uint64_t>(*words++) << have;
            have += 32;
        }
        codes[i] = static_cast<Code>(held & ((1u << bits) - 1));
        held >>= bits;
        have -= bits;
    }
}

template <class Code>
void write_words(const Code* codes, int bits, int64_t count, uint32_t* words) {
    uint64_t held = 0;
    int have = 0;
    for (int64_t i = 0; i < count; ++i) {
        held |= static_cast<uint64_t>(codes[i]) << have;
        have += bits;
        if (have >= 32) {
            *words++ = static_cast<uint32_t>(held);
            held >>= 32;
            have -= 32;
        }
    }
    if (have) *words = static_cast<uint32_t>(held);
}

}  // namespace bitmill
