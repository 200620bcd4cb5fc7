#include "kv.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "../isa.h"
#include "../simd/exp.h"
#include "../threads.h"

namespace bitmill {
namespace {

constexpr int64_t least_units = 4;  // of a thread

// Units [first, last) of a row.
struct Piece {
    int64_t row, first, last;
};

// All units in order, cut where a thread's share or a row ends; starts: each share's first piece, and the end.
struct Plan {
    std::vector<Piece> pieces;
    std::vector<int64_t> starts;

    Plan(const KvAttention& a, int threads) {
        int64_t all = 0;
        for (int64_t row = 0; row < a.rows; ++row) all += a.units(row);
        const int64_t shares = std::max<int64_t>(1, std::min<int64_t>(threads, all / least_units));
        int64_t row = 0, at = 0;  // the next unit
        for (int64_t share = 0; share < shares; ++share) {
            starts.push_back(static_cast<int64_t>(pieces.size()));
            int64_t left = all * (share + 1) / shares - all * share / shares;
            while (left > 0) {
                const int64_t count = std::min(left, a.units(row) - at);
                if (count) pieces.push_back({row, at, at + count});
                left -= count, at += count;
                if (at == a.units(row)) ++row, at = 0;
            }
        }
        starts.push_back(static_cast<int64_t>(pieces.size()));
    }
    int64_t shares() const { return static_cast<int64_t>(starts.size()) - 1; }
};

}  // namespace

// By repeated rotation, in fp64.
std::vector<float> kv_rotations(const double* inv_freq, int64_t count) {
    std::vector<float> turns(2 * count * 32);
    for (int64_t f = 0; f < count; ++f) {
        const double by_cos = std::cos(inv_freq[f]), by_sin = std::sin(inv_freq[f]);
        double cos = 1, sin = 0;
        for (int64_t t = 0; t < kv_tokens; ++t) {
            float* to = turns.data() + (t / 16 * count + f) * 32 + t % 16;
            to[0] = static_cast<float>(cos), to[16] = static_cast<float>(sin);
            const double next = cos * by_cos - sin * by_sin;
            sin = sin * by_cos + cos * by_sin, cos = next;
        }
    }
    return turns;
}

int64_t KvAttention::first_page(int64_t row) const {
    return std::min(std::max<int64_t>(0, (first[row] - first_slot) / kv_tokens), packed / kv_tokens);
}

int64_t KvAttention::units(int64_t row) const {
    return packed / kv_tokens - first_page(row) + (sinks + tail + kv_tokens - 1) / kv_tokens;
}

void PartialSoftmax::make_room(const KvAttention& a, int64_t pieces, int64_t threads) {
    one = std::max(one, a.query_heads * a.record()), heads = std::max(heads, (a.query_heads + 15) / 16 * 16);
    spare = std::max(spare, isa().kv->spare(a));
    const auto needed = static_cast<size_t>(pieces * (one + heads) + threads * spare + 16);
    if (memory.size() < needed) memory.resize(needed);
    // Vectors of 16 floats that are cut by no cache line.
    records = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) / 4;
    most = records + pieces * one;
    room = most + pieces * heads;
}

void PartialSoftmax::sweep(const KvAttention& a, int64_t row, int64_t first, int64_t last, int64_t piece, int64_t thread) {
    isa().kv->sweep(a, row, first, last, most + piece * heads, records + piece * one, {room + thread * spare});
}

void PartialSoftmax::merge(const KvAttention& a, int64_t first, int64_t last, int64_t head, float* out) const {
    const int64_t dim = a.pages.dim, width = a.pages.group_width(), sums = 16 * (1 + a.zeros());
    float top = kv_lowest, weight = 0;
    for (int64_t i = first; i < last; ++i) top = std::max(top, most[i * heads + head]);
    std::fill_n(out, dim, 0.0f);
    for (int64_t i = first; i < last; ++i) {
        const float* record = records + i * one + head * a.record();
        const float factor = exponential(most[i * heads + head] - top);
        const auto lanes = [&](const float* of) {
            float sum = 0;
            for (int64_t l = 0; l < 16; ++l) sum += of[l];
            return factor * sum;
        };
        weight += lanes(record);
        for (int64_t c = 0; c < dim; ++c) out[c] += factor * record[sums + c];
        for (int64_t g = 0; g < a.zeros(); ++g) {
            const float zero = lanes(record + 16 * (1 + g));
            for (int64_t c = g * width; c < (g + 1) * width; ++c) out[c] += zero;
        }
    }
    const float factor = weight == 0 ? 0.0f : 1.0f / weight;
    for (int64_t c = 0; c < dim; ++c) out[c] *= factor;
}

void kv_attend(const KvAttention& a, int threads) {
    const Plan plan(a, threads);
    const int64_t count = static_cast<int64_t>(plan.pieces.size());
    PartialSoftmax pieces;
    pieces.make_room(a, count, plan.shares());
    parallel_for(plan.shares(), static_cast<int>(plan.shares()), [&](int64_t from, int64_t to) {
        for (int64_t share = from; share < to; ++share)
            for (int64_t i = plan.starts[share]; i < plan.starts[share + 1]; ++i) {
                const Piece& piece = plan.pieces[i];
                pieces.sweep(a, piece.row, piece.first, piece.last, i, share);
            }
    });
    int64_t first = 0;
    for (int64_t row = 0; row < a.rows; ++row) {
        int64_t last = first;
        while (last < count && plan.pieces[last].row == row) ++last;
        for (int64_t h = 0; h < a.query_heads; ++h)
            pieces.merge(a, first, last, h, a.out + (row * a.query_heads + h) * a.pages.dim);
        first = last;
    }
}

}  // namespace bitmill
