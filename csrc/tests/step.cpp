// A small model's step against plain loops, with layers of several kinds around one another.
#include "../step/step.h"

#include <memory>
#include <thread>

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

Exact normed(const Norm& norm, const Exact& x, int64_t skipped = 0) {
    if (!norm.weight) return x;
    const auto count = static_cast<double>(x.size());
    double mean = 0, squares = 0;
    for (const double v : x) mean += norm.centred ? v / count : 0;
    for (const double v : x) squares += (v - mean) * (v - mean);
    Exact out(x);
    for (size_t i = 0; i < x.size(); ++i) {
        out[i] = norm.weight[skipped + i] * (x[i] - mean) / std::sqrt(squares / count + norm.eps);
        if (norm.bias) out[i] += norm.bias[skipped + i];
    }
    return out;
}

void turn(double* x, int64_t rotated, bool interleaved, const float* cos, const float* sin) {
    const int64_t apart = interleaved ? 1 : rotated / 2;
    for (int64_t i = 0; i < rotated / 2; ++i) {
        const int64_t one = interleaved ? 2 * i : i, other = one + apart;
        const double a = x[one], b = x[other];
        x[one] = a * cos[one] - b * sin[one], x[other] = b * cos[other] + a * sin[other];
    }
}

double activated(Activation kind, double x) {
    switch (kind) {
    case Activation::silu: return x / (1 + std::exp(-x));
    case Activation::gelu_tanh: return 0.5 * x * (1 + std::tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)));
    case Activation::gelu_erf: return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
    default: return x < 0 ? 0 : x;
    }
}

double capped(double x, double most) { return most > 0 ? most * std::tanh(x / most) : x; }

Exact slice(const Exact& x, int64_t first, int64_t count) { return {x.begin() + first, x.begin() + first + count}; }

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
                    1.0f, nullptr};
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

// How a block differs from Llama's.
struct Variant {
    bool parallel = false, own_norm = true, after = false, centred = false, by_head = false, gated = true, interleaved = false,
         head_norms = false, whole = false;
    int64_t rotated = 0, window = 0;  // no rotation left out of a head
    float cap = 0, logit_cap = 0, factor = 1, logit_factor = 1;
    Activation activation = Activation::silu;
    int rotary = 0;
};

// A block of random weights, and the plain loops that it is compared with.
struct Sample {
    const Variant v;
    const int64_t hidden, inner, heads, kv, dim, rotated, stride;
    const Shape shape;
    const Dense qkv, o, wide, down, head;
    const Floats norms, biases, wide_bias, head_weights;
    std::vector<int64_t> order;
    std::unique_ptr<Linear> same;
    Block block{};
    std::vector<Exact> keys, values;

    Sample(int64_t hidden, int64_t inner, int64_t heads, int64_t kv, int64_t dim, const Variant& v)
        : v(v), hidden(hidden), inner(inner), heads(heads), kv(kv), dim(dim), rotated(v.rotated ? v.rotated : dim),
          stride(v.by_head ? 3 * dim : dim),
          shape{hidden, heads, kv, dim, rotated, v.interleaved, v.logit_factor, v.logit_cap},
          qkv((heads + 2 * kv) * dim, hidden), o(hidden, heads * dim), wide((v.gated ? 2 : 1) * inner, hidden),
          down(hidden, inner), head(19, hidden), norms(random_floats(6 * hidden)), biases(random_floats(qkv.rows)),
          wide_bias(random_floats(wide.rows)), head_weights(random_floats(heads * dim + dim)) {
        for (int64_t i = 0; i < hidden; ++i) order.push_back(i);
        same = std::make_unique<PermutedLinear>(*qkv.linear, order.data());  // a layer that needs room of its own
        const auto norm = [&](int64_t at, bool is_there) {
            if (!is_there) return Norm{};
            return Norm{norms.data() + at * hidden, v.centred ? norms.data() + 5 * hidden : nullptr, hidden, 1e-5f, v.centred};
        };
        Attention& a = block.attention;
        a.inputs.all = {{same.get(), biases.data()}}, a.output = {o.linear.get()};
        a.q = {0, stride}, a.k = {v.by_head ? dim : heads * dim, stride}, a.v = {v.by_head ? 2 * dim : (heads + kv) * dim, stride};
        if (v.head_norms) {  // one norm for all keys, and weights for each query's
            a.q.norm = {head_weights.data(), nullptr, heads * dim, 1e-5f, v.centred};
            a.k.norm = {head_weights.data() + heads * dim, nullptr, dim, 1e-5f, v.centred};
        }
        if (v.whole) {
            a.q.norm = a.k.norm = {head_weights.data(), nullptr, heads * dim, 1e-5f, false};
            a.k.norm.size = kv * dim, a.q.whole = a.k.whole = true;
        }
        a.scaling = 0.3f, a.cap = v.cap, a.window = v.window, a.rotary = v.rotary;
        block.mlp.inputs.all = {{wide.linear.get(), wide_bias.data()}}, block.mlp.output = {down.linear.get(), norms.data()};
        block.mlp.gated = v.gated, block.mlp.activation = v.activation;
        block.before_attention = norm(0, true), block.before_mlp = norm(1, v.own_norm);
        block.after_attention = norm(2, v.after), block.after_mlp = norm(3, v.after);
        block.parallel = v.parallel, block.factor = v.factor;
    }
    Norm last() const { return {norms.data() + 4 * hidden, nullptr, hidden, 1e-5f, false}; }

    Exact head_of(const Exact& all, const Heads& of, int64_t h, const float* cos, const float* sin) const {
        Exact one(dim);
        for (int64_t i = 0; i < dim; ++i) one[i] = all[of.at + h * of.stride + i] + biases[of.at + h * of.stride + i];
        if (&of == &block.attention.v) return one;
        if (of.whole) {
            const int64_t count = of.norm.size / dim;
            Exact every;
            for (int64_t i = 0; i < count * dim; ++i) {
                const int64_t at = of.at + i / dim * of.stride + i % dim;
                every.push_back(all[at] + biases[at]);
            }
            one = slice(normed(of.norm, every), h * dim, dim);
        } else {
            one = normed(of.norm, one, of.norm.size == dim ? 0 : h * dim);
        }
        if (v.rotary >= 0) turn(one.data(), rotated, v.interleaved, cos, sin);
        return one;
    }
    template <class Rounded>
    Exact attention(const Exact& n, const float* cos, const float* sin, const Rounded& rounded) {
        const Attention& a = block.attention;
        const Exact all = qkv.times(n);
        Exact key, value, attended(heads * dim, 0.0);
        for (int64_t h = 0; h < kv; ++h) {
            for (const double x : head_of(all, a.k, h, cos, sin)) key.push_back(x);
            for (const double x : head_of(all, a.v, h, cos, sin)) value.push_back(x);
        }
        keys.push_back(rounded(key, true)), values.push_back(rounded(value, false));
        const size_t first = v.window && keys.size() > static_cast<size_t>(v.window) ? keys.size() - v.window : 0;
        for (int64_t h = 0; h < heads; ++h) {
            const Exact query = head_of(all, a.q, h, cos, sin);
            const int64_t of = h / (heads / kv) * dim;
            Exact scores;
            double most = -1e30, sum = 0;
            for (size_t p = first; p < keys.size(); ++p) {
                double score = 0;
                for (int64_t i = 0; i < dim; ++i) score += query[i] * keys[p][of + i];
                scores.push_back(capped(score * a.scaling, v.cap)), most = std::max(most, scores.back());
            }
            for (double& s : scores) sum += s = std::exp(s - most);
            for (size_t p = 0; p < scores.size(); ++p)
                for (int64_t i = 0; i < dim; ++i) attended[h * dim + i] += scores[p] / sum * values[first + p][of + i];
        }
        return normed(block.after_attention, o.times(attended));
    }
    Exact mlp(const Exact& n) const {
        Exact all = wide.times(n);
        for (size_t i = 0; i < all.size(); ++i) all[i] += wide_bias[i];
        Exact active = slice(all, 0, inner);
        for (int64_t i = 0; i < inner; ++i) active[i] = activated(v.activation, active[i]) * (v.gated ? all[inner + i] : 1);
        Exact out = down.times(active);
        for (int64_t i = 0; i < hidden; ++i) out[i] += norms[i];
        return normed(block.after_mlp, out);
    }
    template <class Rounded>
    Exact logits(const Floats& x, const float* cos, const float* sin, const Rounded& rounded) {
        Exact stream(x.begin(), x.end());
        const Exact n = normed(block.before_attention, stream), first = attention(n, cos, sin, rounded);
        const Exact early = v.own_norm ? normed(block.before_mlp, stream) : n;
        for (int64_t i = 0; i < hidden; ++i) stream[i] += v.factor * first[i];
        const Exact second = mlp(v.parallel ? early : normed(block.before_mlp, stream));
        for (int64_t i = 0; i < hidden; ++i) stream[i] += v.factor * second[i];
        Exact out = head.times(normed(last(), stream));
        for (double& y : out) y = capped(y * v.logit_factor, v.logit_cap);
        return out;
    }
};

struct Inputs {
    Floats x, cos, sin;
};

// Tokens in two pieces, whose last logits are given.
void run_pieces(Model& model, const Inputs& given, int64_t tokens, const Variant& variant, const Floats& logits, int threads) {
    const Shape& s = model.shape;
    const int64_t angles = variant.rotary < 0 ? 0 : (variant.rotary + 1) * s.rotated;
    Floats past(2 * s.kv_heads * tokens * s.dim, NAN), found(19);
    for (int64_t first = 0, last; first < tokens; first = last) {
        last = first ? tokens : std::max<int64_t>(1, tokens / 3);
        Position at{given.cos.data() + first * angles, given.sin.data() + first * angles};
        (variant.window ? at.recent : at.all) = {past.data(), tokens, first};
        model.read(given.x.data() + first * s.hidden, at, found.data(), 1, {last - first, true, threads});
    }
    Exact expected(logits.begin(), logits.end());
    report(difference(found, expected), 5e-5, "pieces %s: hidden %ld, %ld tokens, %d threads", isa().name,
           static_cast<long>(s.hidden), static_cast<long>(tokens), threads);
}

// So many tokens of a linear layer, of which one alone gives the expected numbers.
void run_product(const Linear& linear, const Floats& x, const Exact& expected, const char* kind) {
    const int64_t tokens = 20;
    Floats many, y(tokens * linear.rows, NAN);
    for (int64_t t = 0; t < tokens; ++t)
        for (const float value : x) many.push_back(value * static_cast<float>(t + 1));
    linear.product(many.data(), {tokens, true, 2}, y.data());
    for (const int64_t t : {int64_t{0}, int64_t{6}, tokens - 1}) {
        Exact scaled(expected);
        for (double& value : scaled) value *= static_cast<double>(t + 1);
        report(difference({y.begin() + t * linear.rows, y.begin() + (t + 1) * linear.rows}, scaled), 1e-5,
               "%s %s: token %ld of %ld", kind, isa().name, static_cast<long>(t), static_cast<long>(tokens));
    }
}

// So many tokens.
void run(int64_t hidden, int64_t inner, int64_t heads, int64_t kv, int64_t dim, int64_t tokens, int threads,
         Kept kept = Kept::floats, const Variant& variant = {}) {
    Sample sample(hidden, inner, heads, kv, dim, variant);
    Model model(sample.shape, {sample.block}, sample.last(), {sample.head.linear.get()});
    const int64_t capacity = tokens + 1;
    Floats past(2 * kv * capacity * dim, NAN), logits(19);
    const bool is_packed = kept != Kept::floats;
    PackedPast packed(kv, dim, tokens, kept);
    for (int64_t t = 0; is_packed && t < kv_tokens; ++t)
        sample.keys.push_back(packed.token(t, true)), sample.values.push_back(packed.token(t, false));
    Floats inputs, cosines, sines;
    for (int64_t t = 0; t < tokens; ++t) {
        const Floats x = random_floats(hidden), cos = random_floats(2 * sample.rotated), sin = random_floats(2 * sample.rotated);
        inputs.insert(inputs.end(), x.begin(), x.end());
        const int64_t kinds = std::max(0, variant.rotary) + 1;
        cosines.insert(cosines.end(), cos.begin(), cos.begin() + kinds * sample.rotated);
        sines.insert(sines.end(), sin.begin(), sin.begin() + kinds * sample.rotated);
        const Packed block = packed.at(sample.shape, t);
        Position at{cos.data(), sin.data()};
        if (is_packed) at.packed = &block;
        else (variant.window ? at.recent : at.all) = {past.data(), capacity, t};
        model.advance(x.data(), at, logits.data(), threads);
        const auto rounded = [&](const Exact& all, bool keys) { return is_packed ? packed.rounded(all, keys) : all; };
        const int64_t angles = std::max(0, variant.rotary) * sample.rotated;
        report(difference(logits, sample.logits(x, cos.data() + angles, sin.data() + angles, rounded)),
               is_packed ? 1e-3 : 5e-5,  // a number may be rounded to another half
               "step %s: hidden %ld, token %ld, %d threads, kept %d", isa().name, static_cast<long>(hidden),
               static_cast<long>(t), threads, static_cast<int>(kept));
    }
    if (!is_packed) run_pieces(model, {inputs, cosines, sines}, tokens, variant, logits, threads);
}

// Parts of Gemma 2 and 3, GPT-2, GPT-NeoX, Phi, Cohere, StableLM and OLMo 2.
void run_variants(int threads) {
    Variant gemma;
    gemma.after = true, gemma.window = 3, gemma.cap = 2, gemma.logit_cap = 5;
    gemma.activation = Activation::gelu_tanh, gemma.rotary = 1;
    run(42, 56, 6, 2, 12, 6, threads, Kept::floats, gemma);
    Variant gpt2;
    gpt2.centred = true, gpt2.gated = false, gpt2.activation = Activation::gelu_erf, gpt2.rotary = -1;
    run(42, 56, 6, 6, 16, 6, threads, Kept::floats, gpt2);
    run(42, 56, 6, 6, 16, 6, threads, Kept::turned, gpt2);
    Variant neox;
    neox.centred = neox.parallel = neox.by_head = true, neox.gated = false, neox.rotated = 6, neox.activation = Activation::relu;
    run(33, 20, 3, 3, 10, 4, threads, Kept::floats, neox);
    Variant cohere;
    cohere.centred = cohere.parallel = cohere.interleaved = cohere.head_norms = true, cohere.own_norm = false;
    cohere.factor = 0.5f, cohere.logit_factor = 0.25f;
    run(42, 56, 6, 2, 12, 4, threads, Kept::floats, cohere);
    Variant olmo;
    olmo.whole = olmo.after = true;
    run(42, 56, 6, 2, 12, 4, threads, Kept::floats, olmo);
    run(33, 20, 3, 3, 48, 3, threads, Kept::equalized, olmo);
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
    run_product(linear, x, expected, "bf16");
}

// fp16 numbers of a small range, and what they are.
std::vector<uint16_t> halves(int64_t count, Floats& values) {
    std::vector<uint16_t> out(count);
    values.resize(count);
    for (int64_t i = 0; i < count; ++i) {
        out[i] = static_cast<uint16_t>(0x3800 | below(1024) | below(2) << 15);
        values[i] = std::ldexp(1024.0f + (out[i] & 1023), -11) * (out[i] >> 15 ? -1.0f : 1.0f);
    }
    return out;
}

// Columns apart from the others, and a product of low rank, in fp16, by teams of three.
void run_fp16(int64_t rows, int64_t columns, int64_t count) {
    const Dense inner(rows, columns);
    const Floats x = random_floats(columns + count);
    std::vector<int64_t> base, outliers;
    for (int64_t i = 0; i < columns + count; ++i)
        (static_cast<int64_t>(outliers.size()) < count && i % 2 ? outliers : base).push_back(i);
    while (static_cast<int64_t>(base.size()) > columns) outliers.push_back(base.back()), base.pop_back();
    Floats values, left, right, y(rows, NAN);
    const auto stored = halves(rows * count, values), stored_left = halves(rows * count, left), stored_right = halves(columns * count, right);
    Exact of_base, of_inner, thin(count, 0.0);
    for (const int64_t i : base) of_base.push_back(x[i]);
    Exact expected = inner.times(of_base);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < count; ++i) expected[r] += static_cast<double>(values[r * count + i]) * x[outliers[i]];
    const auto check = [&](const Linear& linear, const char* kind) {
        Barrier barrier;
        std::vector<std::thread> threads;
        for (int t = 0; t < 3; ++t)
            threads.emplace_back([&, t] {
                RoundedInputs inputs;
                Floats own(linear.own), shared(linear.shared);
                linear.apply({t, 3, &barrier}, {inputs, own.data(), shared.data()}, x.data(), y.data());
            });
        for (auto& thread : threads) thread.join();
        report(difference(y, expected), 1e-5, "%s %s: %ld x %ld, %ld", kind, isa().name, static_cast<long>(rows),
               static_cast<long>(columns), static_cast<long>(count));
        run_product(linear, Floats(x.begin(), x.begin() + linear.columns), expected, kind);
    };
    check(OutlierLinear(*inner.linear, base.data(), outliers.data(), stored.data(), count), "outlier columns");
    for (int64_t i = 0; i < columns; ++i) of_inner.push_back(x[i]);
    expected = inner.times(of_inner);
    for (int64_t i = 0; i < count; ++i)
        for (int64_t c = 0; c < columns; ++c) thin[i] += static_cast<double>(right[i * columns + c]) * x[c];
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < count; ++i) expected[r] += left[r * count + i] * thin[i];
    check(LowRankLinear(*inner.linear, stored_left.data(), stored_right.data(), count), "low rank");
}

// Weights that are stored columns by rows.
void run_transposed(int64_t rows, int64_t columns) {
    const Dense plain(rows, columns);
    Floats turned(rows * columns), x = random_floats(columns), y(rows, NAN);
    for (int64_t i = 0; i < rows * columns; ++i) turned[i % columns * rows + i / columns] = plain.weights[i];
    const TransposedLinear linear(turned.data(), rows, columns);
    RoundedInputs inputs;
    Barrier barrier;
    for (int t = 0; t < 3; ++t) linear.apply({t, 3, &barrier}, {inputs, nullptr, nullptr}, x.data(), y.data());
    report(difference(y, plain.times(Exact(x.begin(), x.end()))), 1e-5, "transposed %s: %ld x %ld", isa().name,
           static_cast<long>(rows), static_cast<long>(columns));
    run_product(linear, x, plain.times(Exact(x.begin(), x.end())), "transposed");
}

}  // namespace

void test_step() {
    for (const auto& name : available_isas()) {
        use_isa(name);
        for (const int threads : {1, 2, 3}) {
            run(42, 56, 6, 2, 12, 5, threads);
            run(64, 33, 4, 4, 80, 3, threads);
            run(7, 5, 1, 1, 2, 20, threads);
            run(42, 56, 6, 2, 20, 70, threads);  // more than a block of tokens
            run(42, 56, 6, 2, 16, 40, threads, Kept::turned);
            run(33, 20, 3, 3, 48, 3, threads, Kept::equalized);
            run(7, 5, 1, 1, 32, 1, threads, Kept::turned);
            run_variants(threads);
        }
        run_bf16(5, 77), run_bf16(3, 32), run_transposed(7, 33), run_halve();
        run_fp16(7, 33, 5), run_fp16(20, 64, 16), run_fp16(2, 70, 37);
    }
}

}  // namespace bitmill
