// Attention on packed pages against fp64: codes, numbers and outliers of exactly as many bytes as a page has, NaN in
// pages and fp16 tokens that nothing is to read.
#include "../kv/kv.h"

#include <algorithm>

#include "../isa.h"
#include "driver.h"

namespace bitmill {
namespace {

constexpr uint16_t half_nan = 0x7e00;

uint16_t small_half() { return static_cast<uint16_t>(0x3000 + below(2048)); }  // 0.125 to 0.5
double of_half(uint16_t h) { return std::ldexp(1024.0 + (h & 1023), (h >> 10) - 25); }

struct Options {
    int bits;
    KvAxis axis;
    int64_t groups_a_head, outliers;  // groups_a_head: 0 for one of all heads
    bool turned, zeros;
    int64_t heads, group, dim, pages, sinks, tail;
};

struct Run {
    const Options o;
    const int64_t rows = 2, room, group;
    KvPages p{};
    std::vector<std::vector<uint32_t>> slabs;
    std::vector<uint16_t> fp16_keys, fp16_values;
    std::vector<float> q, levels, scale, zero;
    std::vector<double> inv_freq;
    const std::vector<int32_t> start{3, 0}, first{3, 37};

    explicit Run(const Options& o) : o(o), room(o.sinks + o.tail + 2), group(o.group) {
        p.heads = o.heads, p.dim = o.dim;
        add(p.key, o.axis, 2 * o.heads * ((o.dim * o.bits + 31) / 32) * 16);
        add(p.value, KvAxis::token, o.heads * o.dim * o.bits);
        for (int64_t s = 0; s < (o.pages + 1) / 2; ++s) {  // of two pages each
            slabs.emplace_back(rows * 2 * p.words, 0x7e007e00u);
            for (int64_t r = 0; r < rows; ++r)
                for (int64_t i = 0; i < 2 && 2 * s + i < o.pages; ++i) fill(slabs.back().data() + (2 * r + i) * p.words);
        }
        for (auto* loose : {&fp16_keys, &fp16_values}) {
            loose->assign(rows * o.heads * room * o.dim, half_nan);
            for (int64_t i = 0; i < rows * o.heads; ++i)
                for (int64_t j = 0; j < (o.sinks + o.tail) * o.dim; ++j) (*loose)[i * room * o.dim + j] = small_half();
        }
        q = random_floats(rows * o.heads * o.group * o.dim), levels = random_floats(16);
        for (int i = 0; i < 16 && o.bits < 4; ++i) levels[i] = levels[i % (1 << o.bits)];
        scale = random_floats(p.channels()), zero = random_floats(p.channels());
        for (int64_t f = 0; f < o.dim / 2; ++f) inv_freq.push_back(std::pow(100.0, -2.0 * f / o.dim));
    }

    void add(KvSide& s, KvAxis axis, int64_t codes) {
        const auto part = [&](int64_t bytes, bool there) {
            const int64_t at = p.words;
            p.words += there ? (bytes + 3) / 4 : 0;
            return there ? at : -1;
        };
        const int64_t groups = axis == KvAxis::token && o.groups_a_head ? o.groups_a_head * o.heads : 1;
        const int64_t numbers = 2 * (axis == KvAxis::token ? groups * kv_tokens : p.channels());
        s = {o.bits, axis, groups, o.outliers, part(4 * codes, true), 0, 0, 0, 0};
        s.scale = part(numbers, axis != KvAxis::fixed), s.zero = part(numbers, axis != KvAxis::fixed && o.zeros);
        s.outlier_value = part(64 * o.outliers, o.outliers > 0);
        s.outlier_index = part((p.wide() ? 64 : 32) * o.outliers, o.outliers > 0);
    }

    void fill(uint32_t* page) {
        for (int64_t i = 0; i < p.words; ++i) page[i] = static_cast<uint32_t>(random_bits());
        for (const auto* s : {&p.key, &p.value}) {
            const int64_t numbers = s->axis == KvAxis::token ? s->groups * kv_tokens : p.channels();
            for (const int64_t at : {s->scale, s->zero})
                for (int64_t i = 0; at >= 0 && i < numbers; ++i) reinterpret_cast<uint16_t*>(page + at)[i] = small_half();
            for (int64_t e = 0; e < s->outliers * kv_tokens; ++e) {
                const int64_t channel = (e / kv_tokens * 7 + below(7)) % p.channels();  // several of a token at a distance
                reinterpret_cast<uint16_t*>(page + s->outlier_value)[e] = small_half();
                if (p.wide()) reinterpret_cast<uint16_t*>(page + s->outlier_index)[e] = static_cast<uint16_t>(channel);
                else reinterpret_cast<uint8_t*>(page + s->outlier_index)[e] = static_cast<uint8_t>(channel);
            }
        }
    }

    // A number of a page, as the words say.
    double number(const uint32_t* page, const KvSide& s, int64_t t, int64_t channel) const {
        const int64_t h = channel / o.dim, c = channel % o.dim, b = s.bits;
        const bool keys = &s == &p.key;
        const int64_t stream = keys ? (2 * h + t / 16) * ((o.dim * b + 31) / 32) * 16 + t % 16
                                    : (h * o.dim + c) / 16 * b * 16 + c % 16;
        int code = 0;
        for (int64_t bit = 0; bit < b; ++bit) {
            const int64_t at = (keys ? c : t) * b + bit;
            code |= static_cast<int>(page[s.codes + stream + at / 32 * 16] >> at % 32 & 1) << bit;
        }
        double x = b == 8 ? code : levels[code];
        const auto own = [&](int64_t part) {
            const int64_t i = s.axis == KvAxis::token ? channel / (p.channels() / s.groups) * kv_tokens + t : channel;
            return part < 0 ? 0.0 : of_half(reinterpret_cast<const uint16_t*>(page + part)[i]);
        };
        x = s.axis == KvAxis::fixed ? x * scale[channel] + zero[channel] : x * own(s.scale) + own(s.zero);
        for (int64_t e = t; e < s.outliers * kv_tokens; e += kv_tokens) {
            const int64_t index = p.wide() ? reinterpret_cast<const uint16_t*>(page + s.outlier_index)[e]
                                           : reinterpret_cast<const uint8_t*>(page + s.outlier_index)[e];
            if (index == channel) x += of_half(reinterpret_cast<const uint16_t*>(page + s.outlier_value)[e]);
        }
        return x;
    }

    std::vector<double> expected() const {
        std::vector<double> out(q.size());
        for (int64_t head = 0; head < rows * o.heads * group; ++head) {
            const int64_t row = head / (o.heads * group), h = head / group % o.heads;
            std::vector<double> scores;
            std::vector<std::vector<double>> values;
            const auto take = [&](const std::vector<double>& key, const std::vector<double>& value) {
                double score = 0;
                for (int64_t c = 0; c < o.dim; ++c) score += 0.1 * q[head * o.dim + c] * key[c];
                scores.push_back(score), values.push_back(value);
            };
            std::vector<double> key(o.dim), value(o.dim);
            for (int64_t slot = first[row]; slot < o.pages * kv_tokens; ++slot) {
                if (slot >= start[row] && slot < start[row] + o.sinks) continue;
                const uint32_t* page = slabs[slot / 64].data() + (2 * row + slot / 32 % 2) * p.words;
                for (int64_t c = 0; c < o.dim; ++c) {
                    key[c] = number(page, p.key, slot % 32, h * o.dim + c);
                    value[c] = number(page, p.value, slot % 32, h * o.dim + c);
                }
                for (int64_t f = 0; o.turned && f < o.dim / 2; ++f) {
                    const double angle = (slot - start[row]) * inv_freq[f], a = key[f], b = key[f + o.dim / 2];
                    key[f] = 1.5 * (a * std::cos(angle) - b * std::sin(angle));
                    key[f + o.dim / 2] = 1.5 * (b * std::cos(angle) + a * std::sin(angle));
                }
                take(key, value);
            }
            for (int64_t i = 0; i < o.sinks + o.tail; ++i) {
                const int64_t end = o.pages * kv_tokens, slot = i < o.sinks ? start[row] + i : end + i - o.sinks;
                if (slot < first[row] || (i < o.sinks && slot >= end)) continue;
                const int64_t at = ((row * o.heads + h) * room + i) * o.dim;
                for (int64_t c = 0; c < o.dim; ++c) key[c] = of_half(fp16_keys[at + c]), value[c] = of_half(fp16_values[at + c]);
                take(key, value);
            }
            const double most = *std::max_element(scores.begin(), scores.end());
            double sum = 0;
            for (size_t i = 0; i < scores.size(); ++i) {
                const double weight = std::exp(scores[i] - most);
                sum += weight;
                for (int64_t c = 0; c < o.dim; ++c) out[head * o.dim + c] += weight * values[i][c];
            }
            for (int64_t c = 0; c < o.dim; ++c) out[head * o.dim + c] /= sum;
        }
        return out;
    }

    void check() const {
        const auto correct = expected();
        const auto turns = kv_rotations(inv_freq.data(), inv_freq.size());
        std::vector<const uint32_t*> data;
        for (const auto& slab : slabs) data.push_back(slab.data());
        const bool fixed = o.axis == KvAxis::fixed;
        for (const auto& name : available_isas())
            for (const int threads : {1, 3}) {
                use_isa(name);
                std::vector<float> out(q.size(), NAN);
                kv_attend({p, rows, o.heads * group, q.data(), data.data(), 2, 0, o.pages * kv_tokens, fp16_keys.data(),
                           fp16_values.data(), room, o.sinks, o.tail, start.data(), first.data(), levels.data(), levels.data(),
                           fixed ? scale.data() : nullptr, fixed ? zero.data() : nullptr, o.turned ? inv_freq.data() : nullptr,
                           turns.data(), 1.5f, 0.1f, out.data()},
                          threads);
                report(difference(out, correct), 1e-4, "kv %s: %d bits, axis %d, %ld heads of %ld, %ld pages", name.c_str(), o.bits,
                       static_cast<int>(o.axis), static_cast<long>(o.heads), static_cast<long>(o.dim), static_cast<long>(o.pages));
            }
    }
};

}  // namespace

void test_kv() {
    for (const int bits : {2, 3, 4, 8})
        for (const bool turned : {false, true}) {
            Run({bits, KvAxis::fixed, 0, 1, turned, true, 2, 3, 64, 3, 2, 5}).check();
            Run({bits, KvAxis::page, 0, 0, turned, true, 1, 1, 80, 2, 0, 40}).check();
            Run({bits, KvAxis::token, 1, 2, turned, false, 3, 5, 96, 3, 40, 1}).check();
            Run({bits, KvAxis::token, 4, 0, turned, true, 1, 4, 128, 3, 1, 0}).check();
        }
    Run({4, KvAxis::token, 0, 0, true, true, 2, 2, 16, 0, 4, 50}).check();
}

}  // namespace bitmill
