// The point of a pyramid of (nearly) the largest cosine, and its length: numerics/pyramid.py `project` and
// formats/pyramid.py `snap`, operation by operation, so that both give the same bytes.
#pragma once
#include <cmath>
#include <cstdint>

#include "../simd/inline.h"
#include "pyramid-inl.h"

namespace bitmill {

namespace nearest {

constexpr int width = 16, moves = 2;  // numerics/pyramid.py: _MOVES

// Sums and extremes by halves: the order of numerics/pyramid.py's `halved`, and one that fills vectors.
template <class Join>
BITMILL_INLINE float halved(const float* x, const Join& join) {
    float a[8];
    for (int i = 0; i < 8; ++i) a[i] = join(x[i], x[i + 8]);
    for (int i = 0; i < 4; ++i) a[i] = join(a[i], a[i + 4]);
    for (int i = 0; i < 2; ++i) a[i] = join(a[i], a[i + 2]);
    return join(a[0], a[1]);
}

BITMILL_INLINE float sum(const float* x) {
    return halved(x, [](float a, float b) { return a + b; });
}

BITMILL_INLINE int first_equal(const float* x, float value) {
    uint32_t equal = 0;
    for (int i = 0; i < width; ++i) equal |= static_cast<uint32_t>(x[i] == value) << i;
    return equal ? __builtin_ctz(equal) : 0;
}

BITMILL_INLINE int largest(const float* x) {
    return first_equal(x, halved(x, [](float a, float b) { return a > b ? a : b; }));
}

BITMILL_INLINE int smallest(const float* x) {
    return first_equal(x, halved(x, [](float a, float b) { return a < b ? a : b; }));
}

struct Search {
    float size[width], y[width];
    float cross = 0, power = 0;

    BITMILL_INLINE void move(int place, float pulse) {
        cross += pulse * size[place];
        power += pulse * (2 * y[place] + pulse);
        y[place] += pulse;
    }

    BITMILL_INLINE void run(const float* x, int pulses) {
        float products[width];
        for (int i = 0; i < width; ++i) size[i] = std::fabs(x[i]);
        const float total = sum(size);
        float scale = 1.0f / total;
        if (!std::isfinite(total) || !std::isfinite(scale)) {  // zero, or nothing that has a direction
            for (int i = 0; i < width; ++i) size[i] = i == 0;
            scale = 1;
        }
        scale *= static_cast<float>(pulses);
        for (int i = 0; i < width; ++i) {
            size[i] *= scale;
            y[i] = std::floor(size[i] + 1e-4f);
            products[i] = size[i] * y[i];
        }
        cross = sum(products);
        for (int i = 0; i < width; ++i) products[i] = y[i] * y[i];
        power = sum(products);
        for (int missing = pulses - static_cast<int>(sum(y)); missing > 0; --missing) {
            for (int i = 0; i < width; ++i) {
                const float all = cross + size[i];
                products[i] = all * all / (power + 2 * y[i] + 1);
            }
            move(largest(products), 1);
        }
        for (int i = 0; i < moves; ++i) exchange();
    }

    BITMILL_INLINE void exchange() {
        float lack[width], held[width];
        const float ratio = power / cross;
        for (int i = 0; i < width; ++i) {
            lack[i] = size[i] * ratio - y[i];
            held[i] = y[i] > 0 ? lack[i] : INFINITY;
        }
        const int place = largest(lack), source = smallest(held);
        if (!(lack[place] - held[source] > 1.0001f)) return;
        move(source, -1);
        move(place, 1);
    }
};

}  // namespace nearest

// Codes (count, 4 * bits + 1) and vectors (count, 16) nearest to x (count, 16).
template <class V>
void nearest_points_with(int bits, const float* lengths, int64_t count, const float* x, uint8_t* codes,
                         float* vectors) {
    using nearest::width;
    const Pyramid<V> set(bits, lengths);
    nearest::Search found;
    float unit[width], products[width];
    int8_t y[width];
    for (int64_t n = 0; n < count; ++n, x += width, vectors += width) {
        found.run(x, set.pulses);
        const float norm = static_cast<float>(std::sqrt(static_cast<double>(found.power)));
        for (int i = 0; i < width; ++i) {
            const float value = x[i] < 0 ? -found.y[i] : found.y[i];
            y[i] = static_cast<int8_t>(value);
            unit[i] = value / norm;
            products[i] = x[i] * unit[i];
        }
        const float projection = nearest::sum(products);
        int gain = 0;
        for (int i = 0; i < 15; ++i) gain += !(projection <= (lengths[i] + lengths[i + 1]) / 2);
        for (int i = 0; i < width; ++i) vectors[i] = unit[i] * lengths[gain];
        const uint64_t number = set.number(y);
        for (int d = 0; d < 4 * bits; ++d) *codes++ = static_cast<uint8_t>(number >> 4 * d & 15);
        *codes++ = static_cast<uint8_t>(gain);
    }
}

}  // namespace bitmill
