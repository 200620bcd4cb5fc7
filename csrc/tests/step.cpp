// A small model's step against plain loops, with layers of several kinds around one another.
#include "../step/step.h"

#include <memory>

#include "../isa.h"
#include "driver.h"

namespace bitmill {
namespace {

using Floats = std::vector<float>;
using Exact = std::vector<double>;

struct Dense {  // a layer and its plain product
    int64_t rows, columns;
    Floats weights;
    std::unique_ptr<Linear> linear;

    Dense(int64_t rows, int64_t columns) : rows(rows), columns(columns), weights(random_floats(rows * columns)) {
        for (auto& w : weights) w *= 0.05f;
        linear = std::make_unique<DenseLinear>(weights.data(), true, rows, columns);
    }
    Exact times(const Exact& x) const {
        Exact y(rows, 0.0);
        for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < columns; ++c) y[r] += weights[r * columns + c] * x[c];
        return y;
    }
};

Exact normed(const Exact& x, const float* weight, double eps) {
    double squares = 0;
    for (const double v : x) squares += v * v;
    Exact out(x);
    for (size_t i = 0; i < x.size(); ++i) out[i] *= weight[i] / std::sqrt(squares / static_cast<double>(x.size()) + eps);
    return out;
}

void turn(double* x, const Floats& cos, const Floats& sin) {
    const size_t half = cos.size() / 2;
    for (size_t i = 0; i < half; ++i) {
        const double a = x[i], b = x[i + half];
        x[i] = a * cos[i] - b * sin[i], x[i + half] = b * cos[i + half] + a * sin[i + half];
    }
}

enum class Kept { floats, turned, equalized };  // of the past: packed ones in a basis of their own

// A packed past of one page, whose tokens are of one number each, and of fp16 tokens: every array as small as may be.
struct PackedPast {
    const int64_t kv, dim, room;
    const Kept kept;
    KvPages pages{};
    std::vector<uint32_t> page;
    std::vector<uint16_t> fp16_keys, fp16_values;
    Floats levels = Floats(16, 0.5f), turn, mean, deviation, turns;
    const uint32_t* slab = nullptr;
    const int32_t none = 0;

    PackedPast(int64_t kv, int64_t dim, int64_t tokens, Kept kept) : kv(kv), dim(dim), room(tokens), kept(kept) {
        const int64_t codes = kv * 2 * ((dim * 4 + 31) / 32) * 16, values = kv * dim * 4;
        pages = {kv, dim, codes + values + 32, {4, KvAxis::token, 1, 0, 0, codes + values, -1, -1, -1},
                 {4, KvAxis::token, 1, 0, codes, codes + values + 16, -1, -1, -1}};
        page.assign(pages.words, 0);
        for (int64_t t = 0; t < 2 * kv_tokens; ++t)  // scales of 0.25 to 0.5
            reinterpret_cast<uint16_t*>(page.data() + codes + values)[t] = static_cast<uint16_t>(0x3400 + below(1024));
        fp16_keys.assign(kv * room * dim, 0x7e00), fp16_values = fp16_keys;
        const Floats v = random_floats(dim);
        float squares = 0;
        for (const float x : v) squares += x * x;
        for (int64_t i = 0; i < dim * dim; ++i) turn.push_back((i / dim == i % dim) - 2 * v[i / dim] * v[i % dim] / squares);
        mean = random_floats(kv * dim), deviation = random_floats(kv * dim);
        for (float& d : deviation) d = 0.5f + std::fabs(d);
        slab = page.data();
    }

    Packed at(const Shape& shape, int64_t waiting) {
        Packed out{};
        out.call = {pages, 1, shape.heads, nullptr, &slab, 1, 0, kv_tokens, fp16_keys.data(), fp16_values.data(), room, 0,
                    waiting + 1, &none, &none, levels.data(), levels.data(), nullptr, nullptr, nullptr, turns.data(), 1.0f,
                    shape.scaling, nullptr};
        out.fp16_keys = fp16_keys.data(), out.fp16_values = fp16_values.data();
        out.keys = {turn.data()};
        if (kept == Kept::turned) out.values = {turn.data(), turn.data()};  // which is symmetric
        else out.values = {nullptr, nullptr, mean.data(), deviation.data()};
        return out;
    }

    // Keys or values (kv * dim) to the basis that is stored, or back: turning is its own inverse.
    Exact moved(const Exact& x, bool keys, bool back) const {
        Exact out(kv * dim, 0.0);
        for (int64_t i = 0; i < kv * dim; ++i) {
            if (!keys && kept == Kept::equalized) out[i] = back ? x[i] * deviation[i] + mean[i] : (x[i] - mean[i]) / deviation[i];
            else
                for (int64_t c = 0; c < dim; ++c) out[i] += turn[i % dim * dim + c] * x[i / dim * dim + c];
        }
        return out;
    }
    // A token of a page in the model's basis.
    Exact token(int64_t t, bool keys) const {
        const uint16_t half = reinterpret_cast<const uint16_t*>(page.data() + pages.words - 32)[(keys ? 0 : kv_tokens) + t];
        return moved(Exact(kv * dim, 0.5 * std::ldexp(1024.0 + (half & 1023), (half >> 10) - 25)), keys, true);
    }
    // A token rounded to fp16, in the model's basis.
    Exact rounded(const Exact& x, bool keys) const {
        Exact halves = moved(x, keys, false);
        for (double& h : halves) {
            int exponent;
            std::frexp(h, &exponent);
            const double last = std::ldexp(1.0, std::max(exponent, -13) - 11);
            h = std::nearbyint(h / last) * last;
        }
        return moved(halves, keys, true);
    }
};

// One block with biases on the queries and the gate, so many tokens.
void run(int64_t hidden, int64_t inner, int64_t heads, int64_t kv, int64_t dim, int64_t tokens, int threads,
         Kept kept = Kept::floats) {
    const Shape shape{hidden, heads, kv, dim, 1e-5f, 0.3f};
    const Dense q(heads * dim, hidden), k(kv * dim, hidden), v(kv * dim, hidden), o(hidden, heads * dim), gate(inner, hidden),
        up(inner, hidden), down(hidden, inner), head(19, hidden);
    const Floats norms = random_floats(3 * hidden), q_bias = random_floats(heads * dim), gate_bias = random_floats(inner);
    std::vector<int64_t> order(hidden);
    for (int64_t i = 0; i < hidden; ++i) order[i] = i;
    const PermutedLinear same(*q.linear, order.data());  // a layer that needs room of its own
    const Block block{norms.data(), norms.data() + hidden, {&same, q_bias.data()}, {k.linear.get()}, {v.linear.get()},
                      {o.linear.get()}, {gate.linear.get(), gate_bias.data()}, {up.linear.get()}, {down.linear.get()}};
    Model model(shape, {block}, norms.data() + 2 * hidden, {head.linear.get()});
    const int64_t capacity = tokens + 1;
    Floats past(2 * kv * capacity * dim, NAN), logits(19);
    std::vector<Exact> keys, values;
    const bool is_packed = kept != Kept::floats;
    PackedPast packed(kv, dim, tokens, kept);
    for (int64_t t = 0; is_packed && t < kv_tokens; ++t)
        keys.push_back(packed.token(t, true)), values.push_back(packed.token(t, false));
    for (int64_t t = 0; t < tokens; ++t) {
        const Floats x = random_floats(hidden), cos = random_floats(dim), sin = random_floats(dim);
        const Packed block = packed.at(shape, t);
        Position at{cos.data(), sin.data(), {past.data(), capacity, t}};
        if (is_packed) at.past = {}, at.packed = &block;
        model.advance(x.data(), at, logits.data(), threads);
        Exact stream(x.begin(), x.end());
        const Exact n = normed(stream, norms.data(), shape.eps);
        Exact queries = q.times(n), attended(heads * dim, 0.0);
        keys.push_back(k.times(n)), values.push_back(v.times(n));
        for (size_t i = 0; i < queries.size(); ++i) queries[i] += q_bias[i];
        for (int64_t h = 0; h < heads; ++h) turn(queries.data() + h * dim, cos, sin);
        for (int64_t h = 0; h < kv; ++h) turn(keys.back().data() + h * dim, cos, sin);
        if (is_packed) keys.back() = packed.rounded(keys.back(), true), values.back() = packed.rounded(values.back(), false);
        for (int64_t h = 0; h < heads; ++h) {
            const int64_t of = h / (heads / kv) * dim;
            Exact scores;
            double most = -1e30, sum = 0;
            for (const Exact& key : keys) {
                double score = 0;
                for (int64_t i = 0; i < dim; ++i) score += queries[h * dim + i] * key[of + i];
                scores.push_back(score * shape.scaling), most = std::max(most, scores.back());
            }
            for (double& s : scores) sum += s = std::exp(s - most);
            for (size_t p = 0; p < scores.size(); ++p)
                for (int64_t i = 0; i < dim; ++i) attended[h * dim + i] += scores[p] / sum * values[p][of + i];
        }
        const Exact first = o.times(attended);
        for (int64_t i = 0; i < hidden; ++i) stream[i] += first[i];
        const Exact m = normed(stream, norms.data() + hidden, shape.eps), ups = up.times(m);
        Exact gates = gate.times(m);
        for (int64_t i = 0; i < inner; ++i) gates[i] += gate_bias[i], gates[i] *= ups[i] / (1 + std::exp(-gates[i]));
        const Exact second = down.times(gates);
        for (int64_t i = 0; i < hidden; ++i) stream[i] += second[i];
        report(difference(logits, head.times(normed(stream, norms.data() + 2 * hidden, shape.eps))),
               is_packed ? 1e-3 : 2e-5,  // a number may be rounded to another half
               "step %s: hidden %ld, token %ld, %d threads, kept %d", isa().name, static_cast<long>(hidden),
               static_cast<long>(t), threads, static_cast<int>(kept));
    }
}

// Numbers to fp16: the nearest, of two the even one, none beyond the largest.
void run_halve() {
    const Floats x{0.0f,  -0.0f, 1.0f,  1.00048828125f, 1.00146484375f, 65504.0f,      65519.0f,         INFINITY,
                   1e30f, -1e30f, 5.9604645e-8f, 2.9802322e-8f, 2.99e-8f, 6.0975552e-5f, -0.333251953125f};
    const std::vector<uint16_t> correct{0,      0x8000, 0x3c00, 0x3c00, 0x3c02, 0x7bff, 0x7bff, 0x7bff,
                                       0x7bff, 0xfbff, 1,      0,      1,      0x03ff, 0xb555};
    std::vector<uint16_t> found(x.size());
    isa().step->to_fp16(x.data(), static_cast<int64_t>(x.size()), found.data());
    for (size_t i = 0; i < x.size(); ++i) report(std::abs(found[i] - correct[i]), 0, "fp16 %s of %g", isa().name, x[i]);
}

// Sixteen-bit weights, and rows as embeddings are looked up.
void run_bf16(int64_t rows, int64_t columns) {
    const auto bytes = random_bytes(2 * rows * columns);
    std::vector<uint16_t> weights(rows * columns);
    for (size_t i = 0; i < weights.size(); ++i)  // exponents of small numbers
        weights[i] = static_cast<uint16_t>(((bytes[2 * i] << 8 | bytes[2 * i + 1]) & 0x80ff) | 0x3f00);
    const DenseLinear linear(weights.data(), false, rows, columns);
    const Floats x = random_floats(columns);
    Floats y(rows, NAN), row(columns);
    RoundedInputs inputs;
    Barrier barrier;
    linear.apply({0, 1, &barrier}, {inputs, nullptr, nullptr}, x.data(), y.data());
    Exact expected(rows, 0.0);
    for (int64_t r = 0; r < rows; ++r) {
        linear.row(r, row.data());
        for (int64_t c = 0; c < columns; ++c) expected[r] += static_cast<double>(row[c]) * x[c];
    }
    report(difference(y, expected), 1e-5, "bf16 %s: %ld x %ld", isa().name, static_cast<long>(rows), static_cast<long>(columns));
}

}  // namespace

void test_step() {
    for (const auto& name : available_isas()) {
        use_isa(name);
        for (const int threads : {1, 2, 3}) {
            run(42, 56, 6, 2, 12, 5, threads);
            run(64, 33, 4, 4, 80, 3, threads);
            run(7, 5, 1, 1, 2, 20, threads);
            run(42, 56, 6, 2, 16, 40, threads, Kept::turned);
            run(33, 20, 3, 3, 48, 3, threads, Kept::equalized);
            run(7, 5, 1, 1, 32, 1, threads, Kept::turned);
        }
        run_bf16(5, 77), run_bf16(3, 32), run_halve();
    }
}

}  // namespace bitmill
