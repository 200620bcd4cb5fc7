// Attention of one token on packed keys and values (pages: src/bitmill/kv/page.py):
//
//     out = sum over slots of softmax(scale * q . k) * v        k, v = scale * levels[code] + zero, + outliers
//
// Work is divided into units: a page of a row, or 32 of its fp16 tokens. Threads process ranges of units, each with sums
// and a maximum of its own, which are merged at the end. A unit covers all heads, so that scales and outliers of a token
// are read once.
#pragma once
#include <cstdint>
#include <vector>

#include "../simd/inline.h"

namespace bitmill {

constexpr int64_t kv_tokens = 32;  // of a page

// The numbers that share a scale: a channel, a channel of a page, a token's group of channels; with `channel` every channel
// has levels of its own.
enum class KvAxis { fixed, page, token, channel };

struct KvSide {
    int bits;
    KvAxis axis;
    int64_t groups, outliers;                          // of a token
    int64_t codes, scale, zero;                        // first words of its parts in a page, -1 for an absent one
    int64_t outlier_value, outlier_index;
};

struct KvPages {
    int64_t heads, dim, words;  // words of a page; dim is a multiple of 16
    KvSide key, value;

    BITMILL_INLINE int64_t channels() const { return heads * dim; }
    BITMILL_INLINE bool wide() const { return channels() > 256; }  // indices of outliers are uint16, otherwise uint8
    // Groups of values that a head has, and their channels.
    BITMILL_INLINE int64_t head_groups() const { return value.groups == 1 ? 1 : value.groups / heads; }
    BITMILL_INLINE int64_t group_width() const { return dim / head_groups(); }
};

struct KvAttention {
    KvPages pages;
    int64_t rows, query_heads;
    const float* q;                  // (rows, query heads, dim), after RoPE
    const uint32_t* const* slabs;    // each (rows, slab_pages, words)
    int64_t slab_pages, first_slot;  // slot of the first page
    int64_t packed;                  // tokens, whole pages
    const uint16_t *fp16_keys, *fp16_values;  // fp16 (rows, heads, fp16_room, dim), after RoPE: sinks, then the tail
    int64_t fp16_room, sinks, tail;
    const int32_t *start, *first;    // (rows,): slot of the first token that is no padding, and of the first visible token
    const float *key_levels, *value_levels;  // repeated to 16; keys' (channels, 16) where each channel has its own
    const float *key_scale, *key_zero;       // (channels,) of a fixed axis
    const double* inv_freq;          // (dim / 2,), null where keys are stored after RoPE
    const float* turns;              // kv_rotations of it
    float rope_scaling, scale;
    float* out;                      // (rows, query heads, dim)

    BITMILL_INLINE int64_t group() const { return query_heads / pages.heads; }
    BITMILL_INLINE int64_t packed_end() const { return first_slot + packed; }
    int64_t first_page(int64_t row) const;  // the first with a visible token
    int64_t units(int64_t row) const;

    // Sums of a thread for a query head: 16 lanes of the weights, 16 of weights times zeros for each group, and dim
    // sums of weights times values.
    BITMILL_INLINE int64_t zeros() const { return pages.value.zero < 0 ? 0 : pages.head_groups(); }
    BITMILL_INLINE int64_t record() const { return 16 * (1 + zeros()) + pages.dim; }
};

constexpr float kv_lowest = -3.0e38f;  // maximum of no scores

// Memory of a thread, allocated piece by piece in whole vectors; without memory, sizes are only counted.
struct Scratch {
    float* floats;
    int64_t taken = 0;

    BITMILL_INLINE float* take(int64_t count) {
        const int64_t at = taken;
        taken += (count + 15) / 16 * 16;
        return floats ? floats + at : nullptr;
    }
};

// Kernels of an instruction set: units [first, last) of a row into the maxima and sums of its query heads.
struct KvKernels {
    void (*sweep)(const KvAttention&, int64_t row, int64_t first, int64_t last, float* most, float* records, Scratch spare);
    int64_t (*spare)(const KvAttention&);  // how many floats a sweep takes
};

// (2, frequencies, 2, 16): cos and sin of 0 to 31 times each, the angles at the tokens of both halves of a page.
std::vector<float> kv_rotations(const double* inv_freq, int64_t count);

// Partial sums of pieces of work, each by one thread, in memory kept from call to call.
class PartialSoftmax {
public:
    // Allocates memory for so many pieces and threads, of this call and of previous ones.
    void make_room(const KvAttention& a, int64_t pieces, int64_t threads);
    // Units [first, last) of a row as a piece of its own.
    void sweep(const KvAttention& a, int64_t row, int64_t first, int64_t last, int64_t piece, int64_t thread);
    // A query head of a row, from all of the row's pieces, [first, last).
    void merge(const KvAttention& a, int64_t first, int64_t last, int64_t head, float* out) const;

private:
    std::vector<float> memory;
    int64_t one = 0, heads = 0, spare = 0;  // floats of a piece's records and maxima, and of what a thread needs
    float *records = nullptr, *room = nullptr, *most = nullptr;
};

// Rows without visible tokens become 0.
void kv_attend(const KvAttention&, int threads);

}  // namespace bitmill
