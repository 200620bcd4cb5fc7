// Packed keys and values of the Python module.
#pragma once
#include <optional>
#include <vector>

#include "arrays.h"
#include "step/step.h"

namespace bitmill {

// Constants of a layer, in memory of its own.
struct KvLayer {
    using Floats = Array<const float, 1>;
    using MaybeFloats = std::optional<Floats>;

    KvPages pages;
    std::vector<float> key_levels, value_levels, key_scale, key_zero, turns;
    std::vector<double> inv_freq;
    float rope_scaling;

    KvLayer(const KvPages& p, Floats keys, Floats values, MaybeFloats scale, MaybeFloats zero,
            std::optional<Array<const double, 1>> frequencies, float rope_scaling);
};

// Tensors of tokens: slabs of pages (rows, pages, words), all with the same number of pages, and fp16 tokens. The view is
// kept from call to call, because a long past has many slabs.
struct KvTokens {
    using Slab = Array<const int32_t, 3>;
    using Halves = Array<int16_t, 4>;

    Halves fp16_keys, fp16_values;
    std::vector<Slab> slabs;
    std::vector<const uint32_t*> data;

    KvTokens(Halves keys, Halves values);
    void append(Slab slab);
    uint16_t* keys() const { return reinterpret_cast<uint16_t*>(fp16_keys.data()); }
    uint16_t* values() const { return reinterpret_cast<uint16_t*>(fp16_values.data()); }
};

// A layer of one sequence as a step reads and extends it, with the basis that its heads are stored in.
struct KvBlock {
    const KvLayer& layer;
    const KvTokens& tokens;
    std::vector<float> keys, values, values_back, mean, deviation;

    KvBlock(const KvLayer& layer, const KvTokens& tokens, KvLayer::MaybeFloats key_turn, KvLayer::MaybeFloats value_turn,
            KvLayer::MaybeFloats value_mean, KvLayer::MaybeFloats value_deviation);
    // With one more token after `packed` ones in pages and `waiting` fp16 ones; the step sets the scale of scores.
    Packed packed(const Shape& shape, int64_t packed, int64_t sinks, int64_t waiting) const;
};

}  // namespace bitmill
