#include "step.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <mutex>
#include <stdexcept>

#include "../isa.h"
#include "../threads.h"

namespace bitmill {
namespace {

void fit(bool does) {
    if (!does) throw std::invalid_argument("a layer does not fit the model's shape");
}

// Of outputs that follow one another.
void activated(const Mlp& mlp, const float* outputs, float* out) {
    const int64_t count = mlp.inner();
    const float* up = mlp.gated ? outputs + count : nullptr;
    isa().step->activate[static_cast<int>(mlp.activation)](outputs, mlp.inputs.bias(0), up, up ? mlp.inputs.bias(count) : nullptr,
                                                           count, out);
}

}  // namespace

void normalize(const Norm& norm, const float* weight, const float* bias, const float* x, int64_t count, float* out) {
    if (norm.centred) isa().step->layer_norm(x, weight, bias, norm.eps, count, out);
    else isa().step->norm(x, weight, norm.eps, count, out);
}

struct Model::Thread {
    RoundedInputs inputs;
    std::vector<float> x, normed, active, scores, own, head, mixed;
    std::vector<Share> shares;
};

Model::~Model() = default;

int64_t Model::windows() const {
    return std::count_if(blocks.begin(), blocks.end(), [](const Block& b) { return b.attention.window > 0; });
}

bool Model::reads_packed() const {
    return std::all_of(blocks.begin(), blocks.end(),
                       [](const Block& b) { return !b.attention.window && !(b.attention.cap > 0); });
}

void Model::check(const Projection& p, int64_t rows, int64_t columns) {
    fit(p.linear && p.linear->rows == rows && p.linear->columns == columns);
    own = std::max(own, p.linear->own);
    shared.resize(std::max<int64_t>(shared.size(), p.linear->shared));
}

void Model::check(const Norm& norm, int64_t size) const { fit(!norm.weight || norm.size == size); }

void Model::check(const Mlp& mlp) {
    for (const Projection& p : mlp.inputs.all) check(p, p.linear ? p.linear->rows : 0, shape.hidden);
    fit(mlp.inputs.rows() == mlp.inner() * (mlp.gated ? 2 : 1));
    check(mlp.output, shape.hidden, mlp.inner());
    inner = std::max(inner, mlp.inner()), widest = std::max(widest, mlp.inputs.rows());
}

void Model::check(Block& b) {
    Attention& a = b.attention;
    for (const Projection& p : a.inputs.all) check(p, p.linear ? p.linear->rows : 0, shape.hidden);
    const auto check_heads = [&](Heads& heads, int64_t count) {
        fit(0 <= heads.at && shape.dim <= heads.stride && heads.at + (count - 1) * heads.stride + shape.dim <= a.inputs.rows());
        check(heads.norm, heads.norm.size == shape.dim ? shape.dim : count * shape.dim);
        fit(!heads.whole || (heads.norm.size == count * shape.dim && !heads.norm.centred));
        heads.bias = a.inputs.bias(heads.at);
    };
    check_heads(a.q, shape.heads), check_heads(a.k, shape.kv_heads), check_heads(a.v, shape.kv_heads);
    fit(a.window >= 0);
    check(a.output, shape.hidden, shape.heads * shape.dim);
    const Experts& e = b.experts;
    const auto count = static_cast<int64_t>(e.all.size());
    if (e.router.linear) {
        check(e.router, count, shape.hidden), fit(!b.parallel && 0 < e.chosen && e.chosen <= count);
        for (const Mlp& mlp : e.all) check(mlp);
        routed.resize(std::max<int64_t>(routed.size(), count)), down.resize(std::max<int64_t>(down.size(), e.chosen * shape.hidden));
    } else {
        check(b.mlp);
    }
    for (const Norm* n : {&b.before_attention, &b.after_attention, &b.before_mlp, &b.after_mlp}) check(*n, shape.hidden);
    rotary_kinds = std::max<int64_t>(rotary_kinds, a.rotary + 1);
    qkv.resize(std::max<int64_t>(qkv.size(), a.inputs.rows()));
    wide.resize(std::max<int64_t>(wide.size(), std::max<int64_t>(1, e.chosen) * widest));
}

Model::Model(const Shape& shape, std::vector<Block> all, const Norm& norm, const Projection& head)
    : shape(shape), blocks(std::move(all)), norm(norm), head(head) {
    int64_t counts[2] = {0, 0};
    for (Block& b : blocks) {
        check(b);
        place_in_past.push_back(counts[b.attention.window > 0]++);
    }
    check(norm, shape.hidden);
    if (!head.linear) throw std::invalid_argument("a model has a head");
    check(head, head.linear->rows, shape.hidden);
    q.resize(shape.heads * shape.dim), attended.resize(q.size()), o.resize(shape.hidden);
    down.resize(std::max<int64_t>(down.size(), shape.hidden));
}

void Model::advance(const float* embedding, const Position& at, float* logits, int threads) {
    const std::lock_guard<std::mutex> alone(busy);
    threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, most_threads)));
    threads_.resize(threads);
    for (Thread& t : threads_) {
        t.x.assign(embedding, embedding + shape.hidden);
        t.normed.resize(shape.hidden), t.mixed.resize(shape.hidden), t.active.resize(inner), t.own.resize(own), t.head.resize(3 * shape.dim);
        t.scores.resize(shape.heads / shape.kv_heads * std::max(at.all.capacity, at.recent.capacity));
    }
    for (int64_t i = 0; at.packed && i < depth(); ++i) pieces.make_room(at.packed[i].call, threads_.size(), threads_.size());
    in_team(threads, [&](const Team& team) { run(team, threads_[team.self], at, logits); });
}

void Model::multiply(const Team& team, Thread& self, const Projection& p, const float* x, float* y) {
    p.linear->apply(team, {self.inputs, self.own.data(), shared.data()}, x, y);
}

void Model::multiply(const Team& team, Thread& self, const Layers& layers, const float* x, float* y) {
    for (const Projection& p : layers.all) {
        multiply(team, self, p, x, y);
        y += p.linear->rows;
    }
}

const float* Model::normed(Thread& self, const Norm& n) const {
    self.inputs.changed();
    if (!n.weight) return self.x.data();
    normalize(n, n.weight, n.bias, self.x.data(), shape.hidden, self.normed.data());
    return self.normed.data();
}

void Model::join(const Projection& p, const float* y, const Norm& after, float factor, float* x, float* spare) const {
    const StepKernels& best = *isa().step;
    if (!after.weight) return best.add(x, y, p.bias, factor, shape.hidden);
    std::memcpy(spare, y, shape.hidden * sizeof(float));
    if (p.bias) best.add(spare, p.bias, nullptr, 1.0f, shape.hidden);
    normalize(after, after.weight, after.bias, spare, shape.hidden, spare);
    best.add(x, spare, nullptr, factor, shape.hidden);
}

void Model::run(const Team& team, Thread& self, const Position& at, float* logits) {
    for (int64_t i = 0; i < depth(); ++i) block(team, self, i, at);
    multiply(team, self, head, normed(self, norm), logits);
    finish(team, logits);
}

void Model::block(const Team& team, Thread& self, int64_t index, const Position& at) {
    const Block& b = blocks[index];
    const Mlp& mlp = b.mlp;
    const auto joined = [&](const Projection& p, const float* y, const Norm& after) {
        join(p, y, after, b.factor, self.x.data(), self.normed.data());
    };
    const float* n = normed(self, b.before_attention);
    multiply(team, self, b.attention.inputs, n, qkv.data());
    if (b.parallel) multiply(team, self, mlp.inputs, b.before_mlp.weight ? normed(self, b.before_mlp) : n, wide.data());
    team.wait();
    at.packed ? attention(team, self, b.attention, at.packed[index], at) : attention(team, self, index, at);
    team.wait();
    self.inputs.changed();
    multiply(team, self, b.attention.output, attended.data(), o.data());
    if (!b.parallel) {
        team.wait();
        joined(b.attention.output, o.data(), b.after_attention);
        const float* read = normed(self, b.before_mlp);
        if (b.experts.router.linear) {
            experts(team, self, b.experts, read);
            return joined({}, self.mixed.data(), b.after_mlp);
        }
        multiply(team, self, mlp.inputs, read, wide.data());
        team.wait();
    }
    activated(mlp, wide.data(), self.active.data());
    self.inputs.changed();
    multiply(team, self, mlp.output, self.active.data(), down.data());
    team.wait();
    if (b.parallel) joined(b.attention.output, o.data(), b.after_attention);
    joined(mlp.output, down.data(), b.after_mlp);
}

void Experts::choose(const float* scores, std::vector<Share>& out) const {
    const auto count = static_cast<int64_t>(all.size());
    const float most = *std::max_element(scores, scores + count);
    out.resize(count);
    float sum = 0, kept = 0;
    for (int64_t i = 0; i < count; ++i) sum += (out[i] = {i, std::exp(scores[i] - most)}).weight;
    const auto larger = [](const Share& a, const Share& b) { return a.weight != b.weight ? a.weight > b.weight : a.expert < b.expert; };
    std::partial_sort(out.begin(), out.begin() + chosen, out.end(), larger);
    out.resize(chosen);
    for (const Share& share : out) kept += share.weight;
    for (Share& share : out) share.weight /= normalized ? kept : sum;
    std::sort(out.begin(), out.end(), [](const Share& a, const Share& b) { return a.expert < b.expert; });
}

// All chosen experts at once: threads wait as often as for one. The result is each thread's own copy.
void Model::experts(const Team& team, Thread& self, const Experts& e, const float* x) {
    multiply(team, self, e.router, x, routed.data());
    team.wait();
    e.choose(routed.data(), self.shares);
    float *w = wide.data(), *y = down.data();
    for (const Share& share : self.shares) {
        multiply(team, self, e.all[share.expert].inputs, x, w);
        w += e.all[share.expert].inputs.rows();
    }
    team.wait();
    w = wide.data();
    for (const Share& share : self.shares) {
        const Mlp& mlp = e.all[share.expert];
        activated(mlp, w, self.active.data());
        self.inputs.changed();
        multiply(team, self, mlp.output, self.active.data(), y);
        w += mlp.inputs.rows(), y += shape.hidden;
    }
    team.wait();
    std::fill(self.mixed.begin(), self.mixed.end(), 0.0f);
    y = down.data();
    for (const Share& share : self.shares) {
        isa().step->add(self.mixed.data(), y, e.all[share.expert].output.bias, share.weight, shape.hidden);
        y += shape.hidden;
    }
}

void Model::finish(const Team& team, float* logits) const {
    const StepKernels& best = *isa().step;
    if (!head.bias && shape.logit_factor == 1.0f && !(shape.logit_cap > 0)) return;
    team.wait();
    const auto [first, last] = team.share(head.linear->rows);
    if (head.bias) best.add(logits + first, head.bias + first, nullptr, 1.0f, last - first);
    for (int64_t i = first; shape.logit_factor != 1.0f && i < last; ++i) logits[i] *= shape.logit_factor;
    if (shape.logit_cap > 0) best.cap(logits + first, shape.logit_cap, last - first);
}

float Model::whole_factor(const Heads& heads, const float* from, int64_t count) const {
    if (!heads.whole) return 0;
    float squares = 0;
    for (int64_t h = 0; h < count; ++h) {
        const float* x = from + h * heads.stride;
        for (int64_t i = 0; i < shape.dim; ++i) {
            const float value = x[i] + (heads.bias ? heads.bias[h * heads.stride + i] : 0.0f);
            squares += value * value;
        }
    }
    return 1.0f / std::sqrt(squares / static_cast<float>(count * shape.dim) + heads.norm.eps);
}

void Model::place(const Heads& heads, const float* from, int64_t head, float factor, const float* cos, const float* sin, float* x) const {
    const StepKernels& best = *isa().step;
    const Norm& norm = heads.norm;
    std::memcpy(x, from + head * heads.stride, shape.dim * sizeof(float));
    if (heads.bias) best.add(x, heads.bias + head * heads.stride, nullptr, 1.0f, shape.dim);
    const int64_t skipped = norm.size == shape.dim ? 0 : head * shape.dim;
    if (heads.whole)
        for (int64_t i = 0; i < shape.dim; ++i) x[i] = norm.weight[skipped + i] * (x[i] * factor);
    else if (norm.weight)
        normalize(norm, norm.weight + skipped, norm.bias ? norm.bias + skipped : nullptr, x, shape.dim, x);
    if (cos) best.rope(x, cos, sin, shape.rotated, shape.interleaved);
}

void Model::attention(const Team& team, Thread& self, int64_t index, const Position& at) {
    const Attention& a = blocks[index].attention;
    const Past& past = a.window ? at.recent : at.all;
    const int64_t dim = shape.dim, group = shape.heads / shape.kv_heads, one = past.capacity * dim;
    float* keys = past.numbers + 2 * place_in_past[index] * shape.kv_heads * one;
    float* values = keys + shape.kv_heads * one;
    const float* cos = a.rotary < 0 ? nullptr : at.cos + a.rotary * shape.rotated;
    const float* sin = a.rotary < 0 ? nullptr : at.sin + a.rotary * shape.rotated;
    const float *q_from = qkv.data() + a.q.at, *k_from = qkv.data() + a.k.at, *v_from = qkv.data() + a.v.at;
    const float q_factor = whole_factor(a.q, q_from, shape.heads), k_factor = whole_factor(a.k, k_from, shape.kv_heads);
    const auto [from, to] = team.share(shape.kv_heads);
    for (int64_t h = from; h < to; ++h) {
        const int64_t place_of = h * one + past.length * dim;
        place(a.k, k_from, h, k_factor, cos, sin, keys + place_of), place(a.v, v_from, h, 0, nullptr, nullptr, values + place_of);
    }
    const auto [first, last] = team.share(shape.heads);
    for (int64_t h = first; h < last; ++h) place(a.q, q_from, h, q_factor, cos, sin, q.data() + h * dim);
    team.wait();
    const int64_t seen = a.window ? std::min(a.window, past.length + 1) : past.length + 1;
    keys += (past.length + 1 - seen) * dim, values += (past.length + 1 - seen) * dim;
    for (int64_t h = first; h < last;) {
        const int64_t of = h / group, next = std::min(last, (of + 1) * group);
        isa().step->attend(q.data() + h * dim, keys + of * one, values + of * one, next - h, seen, dim, a.scaling, a.cap,
                           self.scores.data(), attended.data() + h * dim);
        h = next;
    }
}

// Pages serve all heads at once: threads share out pages, and then the heads of what they summed.
void Model::attention(const Team& team, Thread& self, const Attention& a, const Packed& packed, const Position& at) {
    const StepKernels& best = *isa().step;
    const int64_t dim = shape.dim, group = shape.heads / shape.kv_heads;
    float *key = self.head.data() + dim, *value = key + dim;
    const auto moved = [&](const Basis& basis, const float* matrix, int64_t head, bool back, float* x) {
        const float* mean = basis.mean ? basis.mean + head * dim : nullptr;
        const float* deviation = basis.mean ? basis.deviation + head * dim : nullptr;
        for (int64_t i = 0; mean && i < dim; ++i) x[i] = back ? x[i] * deviation[i] + mean[i] : (x[i] - mean[i]) / deviation[i];
        if (!matrix) return;
        best.dense(matrix, dim, x, self.head.data(), 0, dim);
        std::memcpy(x, self.head.data(), dim * sizeof(float));
    };
    const float* cos = a.rotary < 0 ? nullptr : at.cos + a.rotary * shape.rotated;
    const float* sin = a.rotary < 0 ? nullptr : at.sin + a.rotary * shape.rotated;
    KvAttention call = packed.call;
    call.q = q.data(), call.out = attended.data(), call.scale = a.scaling;
    const float *q_from = qkv.data() + a.q.at, *k_from = qkv.data() + a.k.at, *v_from = qkv.data() + a.v.at;
    const float q_factor = whole_factor(a.q, q_from, shape.heads), k_factor = whole_factor(a.k, k_from, shape.kv_heads);
    const auto [from, to] = team.share(shape.kv_heads);
    for (int64_t h = from; h < to; ++h) {
        const int64_t place_of = (h * call.fp16_room + call.sinks + call.tail - 1) * dim;
        place(a.k, k_from, h, k_factor, cos, sin, key), place(a.v, v_from, h, 0, nullptr, nullptr, value);
        moved(packed.keys, packed.keys.turn, h, false, key), moved(packed.values, packed.values.turn, h, false, value);
        best.to_fp16(key, dim, packed.fp16_keys + place_of), best.to_fp16(value, dim, packed.fp16_values + place_of);
    }
    const auto [first, last] = team.share(shape.heads);
    for (int64_t h = first; h < last; ++h) {
        place(a.q, q_from, h, q_factor, cos, sin, q.data() + h * dim);
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
