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

// One block with biases on the queries and the gate, `length` tokens after the first.
void run(int64_t hidden, int64_t inner, int64_t heads, int64_t kv, int64_t dim, int64_t tokens, int threads) {
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
    for (int64_t t = 0; t < tokens; ++t) {
        const Floats x = random_floats(hidden), cos = random_floats(dim), sin = random_floats(dim);
        model.advance(x.data(), {cos.data(), sin.data(), {past.data(), capacity, t}}, logits.data(), threads);
        Exact stream(x.begin(), x.end());
        const Exact n = normed(stream, norms.data(), shape.eps);
        Exact queries = q.times(n), attended(heads * dim, 0.0);
        keys.push_back(k.times(n)), values.push_back(v.times(n));
        for (size_t i = 0; i < queries.size(); ++i) queries[i] += q_bias[i];
        for (int64_t h = 0; h < heads; ++h) turn(queries.data() + h * dim, cos, sin);
        for (int64_t h = 0; h < kv; ++h) turn(keys.back().data() + h * dim, cos, sin);
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
        report(difference(logits, head.times(normed(stream, norms.data() + 2 * hidden, shape.eps))), 2e-5,
               "step %s: hidden %ld, token %ld, %d threads", isa().name, static_cast<long>(hidden), static_cast<long>(t), threads);
    }
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
    LookupInputs inputs;
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
        }
        run_bf16(5, 77), run_bf16(3, 32);
    }
}

}  // namespace bitmill
