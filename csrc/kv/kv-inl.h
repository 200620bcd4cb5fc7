// The kernels of kv.h for an instruction set V.
#pragma once
#include <cmath>

#include "../simd/exp.h"
#include "keys-inl.h"
#include "values-inl.h"

namespace bitmill {

// A thread's way through units of a row.
template <class V>
class KvSweep {
public:
    KvSweep(const KvAttention& a, int64_t row, float* most, float* records, Scratch& spare)
        : a(a), p(a.pages), row(row), dim(p.dim), group(a.group()), heads(a.query_heads), stride(a.record()),
          most(most), sums(records ? records + 16 * (1 + a.zeros()) : nullptr), records(records), q(a.q + row * heads * dim) {
        own_q = spare.take(heads * dim), scores = spare.take(heads * kv_tokens), weights = spare.take(4 * kv_tokens);
        tile = spare.take(16 * p.channels());
        for (Numbers* side : {&key, &value}) {
            const KvSide& s = side == &key ? p.key : p.value;
            const int64_t count = s.axis == KvAxis::token ? s.groups * kv_tokens : p.channels();
            side->scale = spare.take(count), side->zero = spare.take(count);
            side->outliers = spare.take(s.outliers * kv_tokens);
        }
        angle = reinterpret_cast<double*>(spare.take(4 * dim));
    }

    void run(int64_t first, int64_t last) {
        const int64_t from = a.first_page(row), pages = a.packed / kv_tokens - from;
        for (int64_t i = 0; i < heads; ++i) most[i] = kv_lowest;
        for (int64_t i = 0; i < heads * stride; ++i) records[i] = 0;
        if (first < last && first < pages) start_pages(from + first);
        for (int64_t unit = first; unit < last; ++unit) {
            if (unit < pages) page(from + unit);
            else fp16_unit(unit - pages);
        }
    }

private:
    struct Numbers { float *scale, *zero, *outliers; };  // of a page, in fp32

    const KvAttention& a;
    const KvPages& p;
    const int64_t row, dim, group, heads, stride;
    float *most, *sums, *records;
    const float* q;
    float *own_q, *scores, *weights, *tile;
    Numbers key, value;
    double* angle;  // cos and sin of a page's first token, then the step from page to page

    // f(integral_constant R, first of R query heads of a head): up to 4 share what is decoded.
    template <class F>
    void query_heads(const F& f) const {
        for (int64_t i = 0; i < group; i += 4)
            chosen<1, 2, 3, 4>(group - i < 4 ? group - i : 4, [&](auto R) { f(R, i); });
    }

    void start_pages(int64_t page) {
        const float factor = a.scale * (a.inv_freq ? a.rope_scaling : 1.0f);
        const double position = static_cast<double>(a.first_slot + page * kv_tokens - a.start[row]);
        for (int64_t f = 0; a.inv_freq && f < dim / 2; ++f) {
            const double at = position * a.inv_freq[f], step = kv_tokens * a.inv_freq[f];
            angle[f] = factor * std::cos(at), angle[dim / 2 + f] = factor * std::sin(at);
            angle[dim + f] = std::cos(step), angle[3 * dim / 2 + f] = std::sin(step);
        }
        for (int64_t i = 0; !a.inv_freq && i < heads * dim; ++i) own_q[i] = factor * q[i];
        for (const auto* side : {&p.key, &p.value}) {
            float* zero = side == &p.key ? key.zero : value.zero;
            const int64_t count = side->axis == KvAxis::token ? side->groups * kv_tokens : p.channels();
            for (int64_t i = 0; side->zero < 0 && i < count; ++i) zero[i] = 0;
        }
        if (p.key.axis != KvAxis::fixed) return;
        key.scale = const_cast<float*>(a.key_scale);  // which nothing writes to: a page has none of its own
        if (a.key_zero) key.zero = const_cast<float*>(a.key_zero);
    }

    // The queries turned back by the angles of a page's first token, so that keys are turned by those within the page.
    void turn_q() {
        const int64_t half = dim / 2;
        double *cos = angle, *sin = angle + half, *by_cos = angle + dim, *by_sin = by_cos + half;
        float* const c = tile, *const s = tile + half;
        for (int64_t f = 0; f < half; ++f) c[f] = static_cast<float>(cos[f]), s[f] = static_cast<float>(sin[f]);
        for (int64_t h = 0; h < heads; ++h) {
            const float* from = q + h * dim;
            float* to = own_q + h * dim;
            int64_t f = 0;
            for (; f + 16 <= half; f += 16) {
                const auto first = V::template rows<16>(from + f), second = V::template rows<16>(from + half + f);
                const auto by_c = V::template rows<16>(c + f), by_s = V::template rows<16>(s + f);
                V::store(to + f, V::fma(second, by_s, V::mul(first, by_c)));
                V::store(to + half + f, V::fnma(first, by_s, V::mul(second, by_c)));
            }
            for (; f < half; ++f) {
                to[f] = from[f] * c[f] + from[f + half] * s[f];
                to[f + half] = from[f + half] * c[f] - from[f] * s[f];
            }
        }
        for (int64_t f = 0; f < half; ++f) {
            const double next = cos[f] * by_cos[f] - sin[f] * by_sin[f];
            sin[f] = sin[f] * by_cos[f] + cos[f] * by_sin[f], cos[f] = next;
        }
    }

    static void widen(const uint32_t* words, int64_t count, float* out) {
        const uint16_t* halves = reinterpret_cast<const uint16_t*>(words);
        for (int64_t i = 0; i < count; i += 16) V::store(out + i, V::template rows<16>(halves + i));
    }

    void read(const KvSide& side, const uint32_t* page, Numbers& to) const {
        const int64_t count = side.axis == KvAxis::token ? side.groups * kv_tokens : p.channels();
        if (side.scale >= 0) widen(page + side.scale, count, to.scale);
        if (side.zero >= 0) widen(page + side.zero, count, to.zero);
        if (side.outliers) widen(page + side.outlier_value, side.outliers * kv_tokens, to.outliers);
    }

    // Bit t: token t of a page is visible, and not stored in fp16.
    uint32_t in_sight(int64_t slot) const {
        uint32_t mask = 0;
        for (int64_t t = 0; t < kv_tokens; ++t, ++slot) {
            const bool sink = slot >= a.start[row] && slot < a.start[row] + a.sinks;
            mask |= static_cast<uint32_t>(slot >= a.first[row] && !sink) << t;
        }
        return mask;
    }

    void page(int64_t number) {
        const int64_t slot = a.first_slot + number * kv_tokens;
        const bool whole = slot >= a.first[row] && (slot + kv_tokens <= a.start[row] || slot >= a.start[row] + a.sinks);
        const uint32_t mask = whole ? ~0u : in_sight(slot);
        const auto at = [&](int64_t page) {
            return a.slabs[page / a.slab_pages] + (row * a.slab_pages + page % a.slab_pages) * p.words;
        };
        const uint32_t* const words = at(number);
        const uint32_t* const next = at(number + 1 < a.packed / kv_tokens ? number + 1 : number);
        for (int64_t i = 0; i < p.words; i += 16) __builtin_prefetch(next + i, 0, 2);  // hardware prefetching stops between slabs and at 4 KiB
        if (a.inv_freq) turn_q();
        if (!mask) return;
        read(p.key, words, key);
        read(p.value, words, value);
        if (!whole) forget(mask);
        a.inv_freq ? score_page<true>(words) : score_page<false>(words);
        soften(mask);
        for (int64_t h = 0; h < p.heads; ++h) mix_head(words, h);
        with_indices(p.value, words, [&](auto* indices) {
            query_heads([&](auto R, int64_t i) {
                mix_outliers<V, R>(a, value.outliers, indices, scores + i * kv_tokens, stride, sums + i * stride);
            });
        });
    }

    template <class F>
    void with_indices(const KvSide& side, const uint32_t* words, const F& f) const {
        if (!side.outliers) return;
        const uint32_t* at = words + side.outlier_index;
        p.wide() ? f(reinterpret_cast<const uint16_t*>(at)) : f(reinterpret_cast<const uint8_t*>(at));
    }

    // Of tokens out of sight the weights are 0, and what they are multiplied by must be finite.
    void forget(uint32_t mask) {
        for (int64_t t = 0; t < kv_tokens; ++t) {
            if (mask >> t & 1) continue;
            for (int64_t g = 0; g < p.value.groups; ++g) value.scale[g * kv_tokens + t] = value.zero[g * kv_tokens + t] = 0;
            for (int64_t e = 0; e < p.value.outliers; ++e) value.outliers[e * kv_tokens + t] = 0;
        }
    }

    template <bool turned>
    void score_page(const uint32_t* words) {
        const int64_t stream = (dim * p.key.bits + 31) / 32 * 16, half = 16 * dim;  // words of a half page, floats of turns
        const bool by_token = p.key.axis == KvAxis::token;
        const int64_t width = p.key.groups == 1 ? p.channels() : p.channels() / p.key.groups;
        for (int64_t g = 0; g < 2; ++g) {
            for (int64_t h = 0; h < p.heads; ++h) {
                const int64_t at = by_token ? h * dim / width * kv_tokens + 16 * g : h * dim;
                float* const keys = tile + 16 * h * dim;
                chosen<2, 3, 4, 8>(p.key.bits, [&](auto bits) {
                    const uint32_t* codes = words + p.key.codes + (2 * h + g) * stream;
                    if (p.key.axis == KvAxis::channel) return look_up_keys<V, bits>(codes, a.key_levels + 16 * h * dim, dim, keys);
                    (by_token ? decode_keys<V, bits, true> : decode_keys<V, bits, false>)(
                        codes, a.key_levels, dim, width, key.scale + at, key.zero + at, keys);
                });
            }
            with_indices(p.key, words, [&](auto* indices) { add_outliers(p, g, key.outliers, indices, tile); });
            for (int64_t h = 0; h < p.heads; ++h)
                query_heads([&](auto R, int64_t i) {
                    const int64_t one = h * group + i;
                    score<V, R, turned>(tile + 16 * h * dim, own_q + one * dim, dim, a.turns + g * half,
                                        scores + one * kv_tokens + 16 * g);
                });
        }
    }

    // Scores to weights relative to the largest score so far; sums of smaller ones are brought down to it.
    void soften(uint32_t mask) {
        for (int64_t h = 0; h < heads; ++h) {
            float* row = scores + h * kv_tokens;
            float* record = records + h * stride;
            if (~mask)
                for (int64_t t = 0; t < kv_tokens; ++t) row[t] = mask >> t & 1 ? row[t] : kv_lowest;
            const float largest = V::largest(V::larger(V::template rows<16>(row), V::template rows<16>(row + 16)));
            if (largest > most[h]) {
                const auto factor = V::all(exponential(most[h] - largest));
                most[h] = largest;
                for (int64_t i = 0; i < stride; i += 16) V::store(record + i, V::mul(factor, V::template rows<16>(record + i)));
            }
            for (int64_t t = 0; t < kv_tokens; t += 16)
                V::store(row + t, exponentials<V>(V::sub(V::template rows<16>(row + t), V::all(most[h]))));
            if (~mask)
                for (int64_t t = 0; t < kv_tokens; ++t) row[t] = mask >> t & 1 ? row[t] : 0.0f;
            const auto both = V::add(V::template rows<16>(row), V::template rows<16>(row + 16));
            V::store(record, V::add(V::template rows<16>(record), both));
        }
    }

    void mix_head(const uint32_t* words, int64_t h) {
        const int64_t groups = p.head_groups(), width = p.group_width(), bits = p.value.bits;
        const uint32_t* codes = words + p.value.codes + h * dim * bits;
        for (int64_t g = 0; g < groups; ++g) {
            const int64_t at = (p.value.groups == 1 ? 0 : h * groups + g) * kv_tokens;
            query_heads([&](auto R, int64_t i) {
                const int64_t one = h * group + i;
                weigh(R, one, value.scale + at, a.zeros() ? value.zero + at : nullptr, 16 * (1 + g));
                chosen<2, 3, 4, 8>(bits, [&](auto b) {
                    mix<V, b, R>(codes + g * width * bits, a.value_levels, width / 16, weights, stride, sums + one * stride + g * width);
                });
            });
        }
    }

    // Weights times scales for R query heads, and the sums of weights times zeros.
    void weigh(int64_t R, int64_t one, const float* scale, const float* zero, int64_t place) {
        for (int64_t i = 0; i < R; ++i)
            for (int64_t t = 0; t < kv_tokens; t += 16) {
                const auto weight = V::template rows<16>(scores + (one + i) * kv_tokens + t);
                V::store(weights + i * kv_tokens + t, V::mul(weight, V::template rows<16>(scale + t)));
                if (!zero) continue;
                float* sum = records + (one + i) * stride + place;
                V::store(sum, V::fma(weight, V::template rows<16>(zero + t), V::template rows<16>(sum)));
            }
    }

    void fp16_unit(int64_t number) {
        int32_t which[kv_tokens];
        int64_t count = 0;
        for (int64_t i = number * kv_tokens; i < (number + 1) * kv_tokens && i < a.sinks + a.tail; ++i) {
            const bool sink = i < a.sinks;
            const int64_t slot = sink ? a.start[row] + i : a.packed_end() + i - a.sinks;
            if (slot >= a.first[row] && (!sink || slot < a.packed_end())) which[count++] = static_cast<int32_t>(i);
        }
        if (!count) return;
        for (int64_t i = 0; i < heads * dim; ++i) own_q[i] = a.scale * q[i];
        for (int64_t h = 0; h < p.heads; ++h)
            query_heads([&](auto R, int64_t i) {
                const int64_t one = h * group + i;
                score_fp16<V, R>(a.fp16_keys + (row * p.heads + h) * a.fp16_room * dim, which, count, own_q + one * dim, dim,
                                  scores + one * kv_tokens);
            });
        soften(~0u >> (kv_tokens - count));
        for (int64_t h = 0; h < p.heads; ++h)
            query_heads([&](auto R, int64_t i) {
                const int64_t one = h * group + i;
                mix_fp16<V, R>(a.fp16_values + (row * p.heads + h) * a.fp16_room * dim, which, count, dim, scores + one * kv_tokens,
                                stride, sums + one * stride);
            });
    }
};

template <class V>
void kv_sweep(const KvAttention& a, int64_t row, int64_t first, int64_t last, float* most, float* records, Scratch spare) {
    KvSweep<V>(a, row, most, records, spare).run(first, last);
}

template <class V>
int64_t kv_spare(const KvAttention& a) {
    Scratch none{nullptr};
    KvSweep<V>(a, 0, nullptr, nullptr, none);
    return none.taken;
}

template <class V>
constexpr KvKernels kv_kernels = {kv_sweep<V>, kv_spare<V>};

}  // namespace bitmill
