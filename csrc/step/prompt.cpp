// Many tokens through a whole decoder (step.h): pieces of prompts. Products and attention have parallel regions of their own,
// and everything in between goes token by token.
#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "../isa.h"
#include "../threads.h"
#include "step.h"

namespace bitmill {
namespace {

constexpr int64_t block_tokens = 48;  // whose scores of a head a thread holds

// change(token) for all of them.
template <class Change>
void each_token(const Piece& piece, const Change& change) {
    parallel_for(piece.tokens, piece.threads, [&](int64_t first, int64_t last) {
        for (; first < last; ++first) change(first);
    });
}

// The outputs of layers, one layer's (tokens, rows) after another's.
struct Outputs {
    const Layers& layers;
    const float* numbers;
    int64_t tokens;

    // Of a token, from an output on: those of one layer follow.
    const float* at(int64_t token, int64_t output) const {
        const float* start = numbers;
        for (const Projection& p : layers.all) {
            if (output < p.linear->rows) return start + token * p.linear->rows + output;
            output -= p.linear->rows, start += tokens * p.linear->rows;
        }
        return nullptr;
    }
};

void products(const Layers& layers, const float* x, const Piece& piece, float* y) {
    for (const Projection& p : layers.all) {
        p.linear->product(x, piece, y);
        y += piece.tokens * p.linear->rows;
    }
}

// Keys [first, first + count) of a head, (count, dim), in panels of 16 side by side: (panels, dim, 16), zero where there are none.
void pack_keys(const float* keys, int64_t count, int64_t dim, float* panel) {
    std::fill(panel, panel + 16 * dim, 0.0f);
    for (int64_t k = 0; k < std::min<int64_t>(16, count); ++k)
        for (int64_t i = 0; i < dim; ++i) panel[16 * i + k] = keys[k * dim + i];
}

// What a head's queries, (tokens, stride), read.
struct HeadPast {
    const float *panels, *values;  // from the first key on
    int64_t count, dim, window;    // keys; 0: all are read
    float scaling, cap;
};

// Queries of tokens whose last visible keys are `last` and those after it.
void attend_block(const HeadPast& past, const float* q, int64_t tokens, int64_t last, int64_t stride, std::vector<float>& room, float* out) {
    const StepKernels& best = *isa().step;
    const int64_t dim = past.dim, end = std::min(past.count, last + tokens);
    const int64_t begin = past.window ? std::max<int64_t>(0, last + 1 - past.window) / 16 * 16 : 0;
    const int64_t width = (end - begin + 15) / 16 * 16, rest = dim % 16, whole = dim - rest;
    room.resize(tokens * width + 16 * (end - begin));
    float *scores = room.data(), *column = scores + tokens * width;
    for (int64_t k = 0; k < width; k += 16)
        best.tiles(q, stride, tokens, past.panels + (begin + k) * dim, 16, dim, scores + k, width, 16, false);
    for (int64_t t = 0; t < tokens; ++t) {
        float* row = scores + t * width;
        const int64_t to = last + t + 1 - begin, from = past.window ? std::max<int64_t>(0, to - past.window) : 0;
        std::fill(row, row + from, 0.0f), std::fill(row + to, row + width, 0.0f);
        for (int64_t k = from; k < to; ++k) row[k] *= past.scaling;
        if (past.cap > 0) best.cap(row + from, past.cap, to - from);
        best.softmax(row + from, to - from);
    }
    const float* values = past.values + begin * dim;
    for (int64_t c = 0; c < whole; c += 16) best.tiles(scores, width, tokens, values + c, dim, end - begin, out + c, stride, 16, false);
    if (!rest) return;
    std::fill(column, column + 16 * (end - begin), 0.0f);  // no vector of them may end after the last value
    for (int64_t k = 0; k < end - begin; ++k) std::copy_n(values + k * dim + whole, rest, column + 16 * k);
    best.tiles(scores, width, tokens, column, 16, end - begin, out + whole, stride, rest, false);
}

}  // namespace

struct Model::Rows {
    std::vector<float> x, normed, qkv, q, panels, attended, o, wide, active, down, some, result;
};

bool Model::reads_pieces() const {
    const auto read = [](const Projection& p) { return p.linear->reads_pieces(); };
    const auto all = [&](const Layers& layers) { return std::all_of(layers.all.begin(), layers.all.end(), read); };
    const auto in_one = [&](const Heads& heads, const Layers& layers, int64_t count) {
        int64_t at = heads.at;
        for (const Projection& p : layers.all) {
            if (at < p.linear->rows) return at + (count - 1) * heads.stride + shape.dim <= p.linear->rows;
            at -= p.linear->rows;
        }
        return false;
    };
    const auto feeds = [&](const Mlp& mlp) { return all(mlp.inputs) && read(mlp.output); };
    return std::all_of(blocks.begin(), blocks.end(), [&](const Block& b) {
        const Attention& a = b.attention;
        const auto& experts = b.experts.all;
        const bool fed = experts.empty() ? feeds(b.mlp) : std::all_of(experts.begin(), experts.end(), feeds);
        return fed && all(a.inputs) && read(a.output) && in_one(a.q, a.inputs, shape.heads) &&
               in_one(a.k, a.inputs, shape.kv_heads) && in_one(a.v, a.inputs, shape.kv_heads);
    });
}

void Model::read(const float* embeddings, const Position& at, float* logits, int64_t kept, const Piece& given) {
    if (!reads_pieces()) throw std::invalid_argument("a layer multiplies single tokens only");
    const std::lock_guard<std::mutex> alone(busy);
    const Piece piece{given.tokens, given.floats, static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(given.threads, most_threads)))};
    const int64_t tokens = piece.tokens, hidden = shape.hidden, width = shape.heads * shape.dim;
    Rows rows;
    rows.x.assign(embeddings, embeddings + tokens * hidden);
    for (auto* each : {&rows.normed, &rows.o, &rows.down}) each->resize(tokens * hidden);
    rows.q.resize(tokens * width), rows.attended.resize(tokens * width), rows.active.resize(tokens * inner);
    rows.qkv.resize(tokens * qkv.size()), rows.wide.resize(tokens * widest);
    for (int64_t i = 0; i < depth(); ++i) block(blocks[i], i, at, rows, piece);
    if (!kept) return;
    const float* last = rows.x.data() + (tokens - kept) * hidden;
    for (int64_t t = 0; norm.weight && t < kept; ++t)
        normalize(norm, norm.weight, norm.bias, last + t * hidden, hidden, rows.normed.data() + t * hidden);
    head.linear->product(norm.weight ? rows.normed.data() : last, {kept, piece.floats, piece.threads}, logits);
    Barrier barrier;
    for (int64_t t = 0; t < kept; ++t) finish({0, 1, &barrier}, logits + t * this->tokens());
}

void Model::block(const Block& b, int64_t index, const Position& at, Rows& rows, const Piece& piece) const {
    const int64_t hidden = shape.hidden;
    const auto normed = [&](const Norm& norm) -> const float* {
        if (!norm.weight) return rows.x.data();
        each_token(piece, [&](int64_t t) {
            normalize(norm, norm.weight, norm.bias, rows.x.data() + t * hidden, hidden, rows.normed.data() + t * hidden);
        });
        return rows.normed.data();
    };
    const auto joined = [&](const Projection& p, const std::vector<float>& y, const Norm& after) {
        each_token(piece, [&](int64_t t) {
            join(p, y.data() + t * hidden, after, b.factor, rows.x.data() + t * hidden, rows.normed.data() + t * hidden);
        });
    };
    const float* n = normed(b.before_attention);
    products(b.attention.inputs, n, piece, rows.qkv.data());
    if (b.parallel) mlp(b.mlp, b.before_mlp.weight ? normed(b.before_mlp) : n, rows, piece, rows.down.data());
    attention(b.attention, index, at, rows, piece);
    b.attention.output.linear->product(rows.attended.data(), piece, rows.o.data());
    joined(b.attention.output, rows.o, b.after_attention);
    if (b.experts.router.linear) {
        experts(b.experts, normed(b.before_mlp), rows, piece);
        return joined({}, rows.down, b.after_mlp);
    }
    if (!b.parallel) mlp(b.mlp, normed(b.before_mlp), rows, piece, rows.down.data());
    joined(b.mlp.output, rows.down, b.after_mlp);
}

// Without the bias of its outputs.
void Model::mlp(const Mlp& mlp, const float* x, Rows& rows, const Piece& piece, float* y) const {
    const int64_t count = mlp.inner();
    products(mlp.inputs, x, piece, rows.wide.data());
    const Outputs out{mlp.inputs, rows.wide.data(), piece.tokens};
    each_token(piece, [&](int64_t t) {
        isa().step->activate[static_cast<int>(mlp.activation)](out.at(t, 0), mlp.inputs.bias(0), mlp.gated ? out.at(t, count) : nullptr,
                                                               mlp.gated ? mlp.inputs.bias(count) : nullptr, count,
                                                               rows.active.data() + t * count);
    });
    mlp.output.linear->product(rows.active.data(), piece, y);
}

// Each expert multiplies the tokens that chose it, to rows.down.
void Model::experts(const Experts& e, const float* x, Rows& rows, const Piece& piece) const {
    const int64_t hidden = shape.hidden;
    const size_t count = e.all.size();
    std::vector<float> scores(piece.tokens * count);
    struct Taken {
        int64_t token;
        float weight;
    };
    std::vector<std::vector<Taken>> tokens(count);  // by expert
    std::vector<Share> shares;
    e.router.linear->product(x, piece, scores.data());
    for (int64_t t = 0; t < piece.tokens; ++t) {
        e.choose(scores.data() + t * count, shares);
        for (const Share& share : shares) tokens[share.expert].push_back({t, share.weight});
    }
    rows.some.resize(piece.tokens * hidden), rows.result.resize(piece.tokens * hidden);
    std::fill(rows.down.begin(), rows.down.end(), 0.0f);
    for (size_t i = 0; i < count; ++i) {
        const auto some = static_cast<int64_t>(tokens[i].size());
        for (int64_t t = 0; t < some; ++t) std::copy_n(x + tokens[i][t].token * hidden, hidden, rows.some.data() + t * hidden);
        if (!some) continue;
        mlp(e.all[i], rows.some.data(), rows, {some, piece.floats, piece.threads}, rows.result.data());
        for (int64_t t = 0; t < some; ++t)
            isa().step->add(rows.down.data() + tokens[i][t].token * hidden, rows.result.data() + t * hidden, e.all[i].output.bias,
                            tokens[i][t].weight, hidden);
    }
}

// The tokens' keys and values to those of a head that are `stride` apart, and their queries.
void Model::place(const Attention& a, const Position& at, float* keys, float* values, int64_t stride, Rows& rows, const Piece& piece) const {
    const Outputs out{a.inputs, rows.qkv.data(), piece.tokens};
    const int64_t dim = shape.dim;
    each_token(piece, [&](int64_t t) {
        const int64_t angles = (t * rotary_kinds + a.rotary) * shape.rotated;
        const float *cos = a.rotary < 0 ? nullptr : at.cos + angles, *sin = a.rotary < 0 ? nullptr : at.sin + angles;
        const float *q = out.at(t, a.q.at), *k = out.at(t, a.k.at), *v = out.at(t, a.v.at);
        const float q_factor = whole_factor(a.q, q, shape.heads), k_factor = whole_factor(a.k, k, shape.kv_heads);
        for (int64_t h = 0; h < shape.kv_heads; ++h) {
            place(a.k, k, h, k_factor, cos, sin, keys + h * stride + t * dim);
            place(a.v, v, h, 0, nullptr, nullptr, values + h * stride + t * dim);
        }
        for (int64_t h = 0; h < shape.heads; ++h) place(a.q, q, h, q_factor, cos, sin, rows.q.data() + (t * shape.heads + h) * dim);
    });
}

// Threads share out heads and blocks of tokens. Scores are products with panels of keys.
void Model::attention(const Attention& a, int64_t index, const Position& at, Rows& rows, const Piece& piece) const {
    const Past& past = a.window ? at.recent : at.all;
    const int64_t dim = shape.dim, one = past.capacity * dim, tokens = piece.tokens, width = shape.heads * dim;
    float* keys = past.numbers + 2 * place_in_past[index] * shape.kv_heads * one;
    float* values = keys + shape.kv_heads * one;
    place(a, at, keys + past.length * dim, values + past.length * dim, one, rows, piece);
    const int64_t first = a.window ? std::max<int64_t>(0, past.length + 1 - a.window) : 0, seen = past.length + tokens - first;
    const int64_t panels = (seen + 15) / 16;
    rows.panels.resize(shape.kv_heads * panels * 16 * dim);
    parallel_for(shape.kv_heads * panels, piece.threads, [&](int64_t from, int64_t to) {
        for (; from < to; ++from) {
            const int64_t key = from % panels * 16;
            pack_keys(keys + from / panels * one + (first + key) * dim, seen - key, dim, rows.panels.data() + from * 16 * dim);
        }
    });
    const int64_t units = (tokens + block_tokens - 1) / block_tokens;
    parallel_for(shape.heads * units, piece.threads, [&](int64_t from, int64_t to) {
        std::vector<float> room;
        for (; from < to; ++from) {
            const int64_t h = from / units, t = from % units * block_tokens, of = h / (shape.heads / shape.kv_heads);
            const HeadPast head{rows.panels.data() + of * panels * 16 * dim, values + of * one + first * dim, seen, dim, a.window,
                                a.scaling, a.cap};
            attend_block(head, rows.q.data() + t * width + h * dim, std::min(block_tokens, tokens - t), past.length + t - first, width,
                         room, rows.attended.data() + t * width + h * dim);
        }
    });
}

}  // namespace bitmill
