#include "step.h"

#include <algorithm>
#include <cstring>
#include <mutex>
#include <stdexcept>

#include "../isa.h"
#include "../threads.h"

namespace bitmill {

struct Model::Thread {
    RoundedInputs inputs;
    std::vector<float> x, normed, gated, q, scores, own, head;
};

Model::~Model() = default;

Model::Model(const Shape& shape, std::vector<Block> all, const float* norm, const Projection& head)
    : shape(shape), blocks(std::move(all)), norm(norm), head(head) {
    const int64_t queries = shape.heads * shape.dim, keys = shape.kv_heads * shape.dim;
    int64_t together = 0;
    const auto check = [&](const Projection& p, int64_t rows, int64_t columns) {
        if (!p.linear || p.linear->rows != rows || p.linear->columns != columns)
            throw std::invalid_argument("a layer does not fit the model's shape");
        own = std::max(own, p.linear->own), together = std::max(together, p.linear->shared);
    };
    for (const Block& b : blocks) {
        inner = std::max(inner, b.gate.linear ? b.gate.linear->rows : 0);
        check(b.q, queries, shape.hidden), check(b.k, keys, shape.hidden), check(b.v, keys, shape.hidden);
        check(b.o, shape.hidden, queries), check(b.gate, inner, shape.hidden), check(b.up, inner, shape.hidden);
        check(b.down, shape.hidden, inner);
    }
    if (!head.linear) throw std::invalid_argument("a model has a head");
    check(head, head.linear->rows, shape.hidden);
    q.resize(queries), attended.resize(queries), k.resize(keys), v.resize(keys), o.resize(shape.hidden);
    gate.resize(inner), up.resize(inner), down.resize(shape.hidden), shared.resize(together);
}

void Model::advance(const float* embedding, const Position& at, float* logits, int threads) {
    const std::lock_guard<std::mutex> alone(busy);
    threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, most_threads)));
    threads_.resize(threads);
    for (Thread& t : threads_) {
        t.x.assign(embedding, embedding + shape.hidden);
        t.normed.resize(shape.hidden), t.gated.resize(inner), t.q.resize(shape.heads * shape.dim);
        t.scores.resize(shape.heads / shape.kv_heads * at.past.capacity), t.own.resize(own), t.head.resize(shape.dim);
    }
    for (int64_t i = 0; at.packed && i < depth(); ++i) pieces.make_room(at.packed[i].call, threads_.size(), threads_.size());
    Barrier barrier;
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads)
        {
            const Team team{omp_get_thread_num(), omp_get_num_threads(), &barrier};
            run(team, threads_[team.self], at, logits);
        }
        return;
    }
#endif
    run({0, 1, &barrier}, threads_[0], at, logits);
}

void Model::run(const Team& team, Thread& self, const Position& at, float* logits) {
    const StepKernels& best = *isa().step;
    const Workspace room{self.inputs, self.own.data(), shared.data()};
    const auto apply = [&](const Projection& p, const float* x, float* y) { p.linear->apply(team, room, x, y); };
    const auto normed = [&](const float* weight) {
        best.norm(self.x.data(), weight, shape.eps, shape.hidden, self.normed.data());
        self.inputs.changed();
        return self.normed.data();
    };
    for (size_t i = 0; i < blocks.size(); ++i) {
        const Block& b = blocks[i];
        const float* n = normed(b.norm_in);
        apply(b.q, n, q.data()), apply(b.k, n, k.data()), apply(b.v, n, v.data());
        team.wait();
        at.packed ? attention(team, self, b, at.packed[i], at) : attention(team, self, b, static_cast<int64_t>(i), at);
        team.wait();
        self.inputs.changed();
        apply(b.o, attended.data(), o.data());
        team.wait();
        best.add(self.x.data(), o.data(), b.o.bias, shape.hidden);
        n = normed(b.norm_out);
        apply(b.gate, n, gate.data()), apply(b.up, n, up.data());
        team.wait();
        best.gated(gate.data(), b.gate.bias, up.data(), b.up.bias, inner, self.gated.data());
        self.inputs.changed();
        apply(b.down, self.gated.data(), down.data());
        team.wait();
        best.add(self.x.data(), down.data(), b.down.bias, shape.hidden);
    }
    apply(head, normed(norm), logits);
    if (!head.bias) return;
    team.wait();
    if (team.self == 0) best.add(logits, head.bias, nullptr, head.linear->rows);
}

void Model::place(const Projection& p, const float* weight, int64_t head, const Position* at, float* x) const {
    const StepKernels& best = *isa().step;
    if (p.bias) best.add(x, p.bias + head * shape.dim, nullptr, shape.dim);
    if (weight) best.norm(x, weight, shape.eps, shape.dim, x);
    if (at) best.rope(x, at->cos, at->sin, shape.dim);
}

void Model::attention(const Team& team, Thread& self, const Block& b, int64_t index, const Position& at) {
    const StepKernels& best = *isa().step;
    const Past& past = at.past;
    const int64_t dim = shape.dim, group = shape.heads / shape.kv_heads, one = past.capacity * dim;
    float* keys = past.numbers + 2 * index * shape.kv_heads * one;
    float* values = keys + shape.kv_heads * one;
    const auto [from, to] = team.share(shape.kv_heads);
    for (int64_t h = from; h < to; ++h) {
        const int64_t place_of = h * one + past.length * dim;
        std::memcpy(keys + place_of, k.data() + h * dim, dim * sizeof(float));
        std::memcpy(values + place_of, v.data() + h * dim, dim * sizeof(float));
        place(b.k, b.k_norm, h, &at, keys + place_of), place(b.v, nullptr, h, nullptr, values + place_of);
    }
    const auto [first, last] = team.share(shape.heads);
    for (int64_t h = first; h < last; ++h) {
        std::memcpy(self.q.data() + h * dim, q.data() + h * dim, dim * sizeof(float));
        place(b.q, b.q_norm, h, &at, self.q.data() + h * dim);
    }
    team.wait();
    for (int64_t h = first; h < last;) {
        const int64_t of = h / group, next = std::min(last, (of + 1) * group);
        best.attend(self.q.data() + h * dim, keys + of * one, values + of * one, next - h, past.length + 1, dim,
                    shape.scaling, self.scores.data(), attended.data() + h * dim);
        h = next;
    }
}

// Pages serve all heads at once: threads share out pages, and then the heads of what they summed.
void Model::attention(const Team& team, Thread& self, const Block& b, const Packed& packed, const Position& at) {
    const StepKernels& best = *isa().step;
    const int64_t dim = shape.dim, group = shape.heads / shape.kv_heads;
    const auto moved = [&](const Basis& basis, const float* matrix, int64_t head, bool back, float* x) {
        const float* mean = basis.mean ? basis.mean + head * dim : nullptr;
        const float* deviation = basis.mean ? basis.deviation + head * dim : nullptr;
        for (int64_t i = 0; mean && i < dim; ++i) x[i] = back ? x[i] * deviation[i] + mean[i] : (x[i] - mean[i]) / deviation[i];
        if (!matrix) return;
        best.dense(matrix, dim, x, self.head.data(), 0, dim);
        std::memcpy(x, self.head.data(), dim * sizeof(float));
    };
    KvAttention call = packed.call;
    call.q = q.data(), call.out = attended.data();
    const auto [from, to] = team.share(shape.kv_heads);
    for (int64_t h = from; h < to; ++h) {
        float *key = k.data() + h * dim, *value = v.data() + h * dim;
        const int64_t place_of = (h * call.fp16_room + call.sinks + call.tail - 1) * dim;
        place(b.k, b.k_norm, h, &at, key), place(b.v, nullptr, h, nullptr, value);
        moved(packed.keys, packed.keys.turn, h, false, key), moved(packed.values, packed.values.turn, h, false, value);
        best.to_fp16(key, dim, packed.fp16_keys + place_of), best.to_fp16(value, dim, packed.fp16_values + place_of);
    }
    const auto [first, last] = team.share(shape.heads);
    for (int64_t h = first; h < last; ++h) {
        place(b.q, b.q_norm, h, &at, q.data() + h * dim);
        moved(packed.keys, packed.keys.turn, h / group, false, q.data() + h * dim);
    }
    team.wait();
    const auto units = team.share(call.units(0));
    pieces.sweep(call, 0, units.first, units.second, team.self, team.self);
    team.wait();
    for (int64_t h = first; h < last; ++h) {
        float* out = attended.data() + h * dim;
        pieces.merge(call, 0, team.count, h, out);
        moved(packed.values, packed.values.back, h / group, true, out);
    }
}

}  // namespace bitmill
