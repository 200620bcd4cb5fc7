// Products of many tokens with AMX: tiles of 16 rows and up to 64 bytes, multiplied by one instruction; all else is AVX-512's.
//
// A span of a panel is a tile as it is stored: four bytes of 16 rows, then the next four. Tokens' bytes of a span follow each
// other here, in place of four bytes of every token in turns. Sums of a span are exact, and end in fp32 as everywhere.
#pragma once
#include "../fixed/fixed-inl.h"
#include "avx512_streams.h"
#if defined(BITMILL_TEST_AMX)
#include "../tests/emulated/tiles.h"
#endif

namespace bitmill {

struct Amx : Avx512Streams {
    struct alignas(64) Config {  // of tiles: 0 the sums, 1 the tokens, 2 the panel
        uint8_t palette = 1, start = 0, none[14] = {};
        uint16_t row_bytes[16] = {};
        uint8_t rows[16] = {};

        Config(int tokens, int span) {
            row_bytes[0] = row_bytes[2] = 64, row_bytes[1] = static_cast<uint16_t>(span);
            rows[0] = rows[1] = static_cast<uint8_t>(tokens), rows[2] = static_cast<uint8_t>(span / 4);
        }
    };
    static BITMILL_INLINE void written(const void* p) {  // before a tile instruction, of whose reads compilers know little
        asm volatile("" : : "r"(p) : "memory");
    }
};

// From four bytes of every token in turns to one token after the other, in every span of a tile.
template <class V>
void amx_inputs(const FixedSource& from, int64_t tile, FixedInputs& out) {
    fixed_inputs_of<V>(from, tile, out);
    if (out.shape.bytes != 1) return;
    const int64_t first = out.first(tile), tokens = out.first(tile + 1) - first, words = out.shape.span / 4;
    uint8_t* span = out.integers.data() + first * out.shape.row_bytes();
    for (int64_t s = 0; s < out.shape.spans(); ++s, span += 4 * words * tokens) {
        uint8_t before[V::fixed_tokens * 64];
        std::memcpy(before, span, 4 * words * tokens);
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t i = 0; i < words; ++i) std::memcpy(span + 4 * (t * words + i), before + 4 * (i * tokens + t), 4);
    }
}

template <class V>
void amx_products(const FixedInputs& x, int64_t tile, const FixedPanel& panel, int64_t count, float* y, int64_t stride) {
    const FixedShape& shape = x.shape;
    if (shape.bytes != 1) return fixed_products<V>(x, tile, panel, count, y, stride);
    using P = typename V::Quads;
    const int64_t first = x.first(tile), spans = shape.spans(), groups = shape.groups(), in_group = shape.stored / shape.span;
    const int tokens = static_cast<int>(x.first(tile + 1) - first), span = static_cast<int>(shape.span);
    const uint8_t *inputs = x.integers.data() + first * shape.row_bytes(), *weights = panel.integers.data();
    const float *steps = x.steps.data() + first * spans, *sums = x.sums.data() + first * groups;
    alignas(64) float total[V::fixed_tokens * fixed_rows] = {};
    alignas(64) int32_t found[V::fixed_tokens * fixed_rows];
    const typename V::Config config(tokens, span);
    V::written(&config);
    _tile_loadconfig(&config);
    for (int64_t g = 0, left = spans; g < groups; ++g, sums += tokens) {
        const auto size = P::reals(panel.steps.data() + g * fixed_rows);
        for (int64_t s = in_group < left ? in_group : left; s > 0; --s, --left) {
            _tile_zero(0);
            _tile_loadd(1, inputs, span);
            _tile_loadd(2, weights, 64);
            _tile_dpbsud(0, 1, 2);  // signed tokens, unsigned entries
            _tile_stored(0, found, 64);
            for (int t = 0; t < tokens; ++t) {
                float* to = total + t * fixed_rows;
                const auto whole = P::load(reinterpret_cast<const uint8_t*>(found + t * fixed_rows));
                P::store(to, P::add(P::reals(to), whole, size, steps[t]));
            }
            inputs += tokens * span, weights += fixed_rows * span, steps += tokens;
        }
        if (!panel.offsets.empty())
            for (int t = 0; t < tokens; ++t) {
                float* to = total + t * fixed_rows;
                P::store(to, P::subtract(P::reals(to), P::reals(panel.offsets.data() + g * fixed_rows), sums[t]));
            }
    }
    _tile_release();
    for (int t = 0; t < tokens; ++t) std::memcpy(y + (first + t) * stride, total + fixed_rows * t, count * sizeof(float));
}

template <class V>
int64_t amx_peak(int64_t rounds) {
    alignas(64) uint8_t bytes[16 * 64];
    std::memset(bytes, 1, sizeof bytes);
    V::written(bytes);
    const typename V::Config config(16, 64);
    V::written(&config);
    _tile_loadconfig(&config);
    _tile_zero(0);
    _tile_loadd(1, bytes, 64);
    _tile_loadd(2, bytes, 64);
    for (int64_t i = 0; i < rounds; ++i) _tile_dpbsud(0, 1, 2);
    alignas(64) int32_t found[16 * 16];
    _tile_stored(0, found, 64);
    _tile_release();
    return rounds * 16 * 16 * 64 + (found[0] < 0);  // so that no product is left out
}

template <class V>
constexpr FixedKernels amx_kernels = {V::fixed_tokens, V::Quads::largest, amx_inputs<V>, fixed_panel<V>, amx_products<V>,
                                      amx_peak<V>};

}  // namespace bitmill
