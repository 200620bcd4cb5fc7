#include "bind_decoder.h"

#include <nanobind/stl/unique_ptr.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>

#include "bind_kv.h"

namespace bitmill {

using namespace nb::literals;

namespace {

void new_norm(Norm* self, Floats weight, MaybeFloats bias, float eps, bool centred) {
    const auto size = static_cast<int64_t>(weight.size());
    require(!bias || centred, "a norm without a mean has no bias");
    new (self) Norm{weight.data(), numbers(bias, size, "a bias has another size"), size, eps, centred};
}

void add_layer(Layers& layers, const Linear& linear, const MaybeFloats& bias) {
    layers.all.push_back({&linear, numbers(bias, linear.rows, "a bias has another size")});
}

Projection only(const Layers& layers) {
    require(layers.all.size() == 1, "outputs come from one layer");
    return layers.all[0];
}

Norm or_none(const Norm* norm) { return norm ? *norm : Norm{}; }

void new_attention(Attention* self, const Layers& inputs, const Layers& output, const std::vector<int64_t>& starts, int64_t stride,
                   const Norm* q_norm, const Norm* k_norm, bool whole_norms, float scaling, float cap, int64_t window, int rotary) {
    require(starts.size() == 3 && 0 <= window && -1 <= rotary, "queries, keys and values have starts");
    require(!whole_norms || (q_norm && k_norm), "norms over all heads are missing");
    new (self) Attention{inputs, {starts[0], stride, or_none(q_norm), whole_norms}, {starts[1], stride, or_none(k_norm), whole_norms},
                         {starts[2], stride}, only(output), scaling, cap, window, rotary};
}

void new_mlp(Mlp* self, const Layers& inputs, const Layers& output, bool gated, int activation) {
    require(0 <= activation && activation < 4, "an activation is 0 (SiLU), 1 (GELU by tanh), 2 (GELU) or 3 (ReLU)");
    new (self) Mlp{inputs, only(output), gated, static_cast<Activation>(activation)};
}

void new_experts(Experts* self, const Layers& router, int64_t chosen, bool normalized) {
    require(0 < chosen, "a token takes one expert or more");
    new (self) Experts{only(router), {}, chosen, normalized};
    require(!self->router.bias, "a router has no bias");
}

// A model while it is put together.
struct Builder {
    Shape shape;
    std::vector<Block> blocks;

    Builder(int64_t hidden, int64_t heads, int64_t kv_heads, int64_t dim, int64_t rotated, bool interleaved,
            float logit_factor, float logit_cap)
        : shape{hidden, heads, kv_heads, dim, rotated, interleaved, logit_factor, logit_cap} {
        const auto sound = [](int64_t size) { return 0 < size && size < int64_t{1} << 24; };
        require(sound(hidden) && sound(heads) && sound(kv_heads) && sound(dim) && sound(heads * dim) &&
                    heads % kv_heads == 0 && 0 <= rotated && rotated <= dim && rotated % 2 == 0,
                "the shape is no model's");
    }

    void block(const Attention& attention, const Mlp* mlp, const Norm* before_attention, const Norm* after_attention,
               const Norm* before_mlp, const Norm* after_mlp, bool parallel, float factor, const Experts* experts) {
        require(!mlp == !!experts, "a block has an MLP or experts");
        blocks.push_back({attention, mlp ? *mlp : Mlp{}, or_none(before_attention), or_none(after_attention), or_none(before_mlp),
                          or_none(after_mlp), parallel, factor, experts ? *experts : Experts{}});
    }

    std::unique_ptr<Model> build(const Norm* norm, const Layers& head) const {
        return std::make_unique<Model>(shape, blocks, or_none(norm), only(head));
    }
};

// The input of the first block: an embedding, given or a row of a table, times a factor, and that of the position.
std::vector<float> first_input(int64_t hidden, const MaybeFloats& embedding, const Linear* table, int64_t token, float factor,
                               const MaybeFloats& position) {
    std::vector<float> x(hidden);
    if (embedding) {
        require(static_cast<int64_t>(embedding->size()) == hidden, "an array has another size");
        std::copy_n(embedding->data(), hidden, x.begin());
    } else {
        require(table && table->columns == hidden, "the table has another width");
        require(0 <= token && token < table->rows, "a row is out of range");
        require(table->row(token, x.data()), "the table has no rows");
    }
    const float* added = numbers(position, hidden, "an array has another size");
    for (int64_t i = 0; i < hidden; ++i) x[i] = x[i] * factor + (added ? added[i] : 0.0f);
    return x;
}

// A token's input and the angles of its position.
struct Token {
    MaybeFloats embedding;
    const Linear* table;
    int64_t token;
    float factor;
    MaybeFloats position;
    Array<const float, 2> cos, sin;
};

void advance(Model& model, const Token& token, Position at, Array<float, 1>& logits, int threads) {
    const Shape& s = model.shape;
    const std::vector<float> x = first_input(s.hidden, token.embedding, token.table, token.token, token.factor, token.position);
    for (const auto* angles : {&token.cos, &token.sin})
        require(static_cast<int64_t>(angles->shape(0)) >= model.rotaries() &&
                    static_cast<int64_t>(angles->shape(1)) == s.rotated,
                "angles have another size");
    require(static_cast<int64_t>(logits.size()) == model.tokens(), "an array has another size");
    at.cos = token.cos.data(), at.sin = token.sin.data();
    nb::gil_scoped_release free;
    model.advance(x.data(), at, logits.data(), threads);
}

Past past_of(const Shape& s, int64_t blocks, const Array<float, 5>& past, int64_t length, int64_t tokens = 1) {
    const auto is = [&](size_t found, int64_t expected) { return static_cast<int64_t>(found) == expected; };
    require(is(past.shape(0), blocks) && past.shape(1) == 2 && is(past.shape(2), s.kv_heads) && is(past.shape(4), s.dim) &&
                0 <= length && (!blocks || inside(length, tokens, past.shape(3))),
            "the past has another shape, or no room");
    return {past.data(), static_cast<int64_t>(past.shape(3)), length};
}

void advance_floats(Model& model, MaybeFloats embedding, const Linear* table, int64_t token, float factor, MaybeFloats position,
                    Array<const float, 2> cos, Array<const float, 2> sin, Array<float, 5> all, int64_t length,
                    Array<float, 5> recent, int64_t recent_length, Array<float, 1> logits, int threads) {
    const int64_t windows = model.windows();
    const Position at{nullptr, nullptr, past_of(model.shape, model.depth() - windows, all, length),
                      past_of(model.shape, windows, recent, recent_length)};
    advance(model, {embedding, table, token, factor, position, cos, sin}, at, logits, threads);
}

void advance_packed(Model& model, MaybeFloats embedding, const Linear* table, int64_t token, float factor, MaybeFloats position,
                    Array<const float, 2> cos, Array<const float, 2> sin, const std::vector<const KvBlock*>& past, int64_t packed,
                    int64_t sinks, int64_t waiting, Array<float, 1> logits, int threads) {
    require(static_cast<int64_t>(past.size()) == model.depth(), "there is a past of each block");
    require(model.reads_packed(), "packed keys are read from the first to the last, and their scores are not capped");
    std::vector<Packed> blocks;
    blocks.reserve(past.size());
    for (const KvBlock* block : past) {
        require(block, "a block is missing");
        blocks.push_back(block->packed(model.shape, packed, sinks, waiting));
    }
    Position at{};
    at.packed = blocks.data();
    advance(model, {embedding, table, token, factor, position, cos, sin}, at, logits, threads);
}

void read_floats(Model& model, Array<const float, 2> embeddings, Array<const float, 3> cos, Array<const float, 3> sin,
                 Array<float, 5> all, int64_t length, Array<float, 5> recent, int64_t recent_length, Array<float, 2> logits, bool floats,
                 int threads) {
    const Shape& s = model.shape;
    const auto tokens = static_cast<int64_t>(embeddings.shape(0)), kept = static_cast<int64_t>(logits.shape(0)), windows = model.windows();
    require(tokens > 0 && static_cast<int64_t>(embeddings.shape(1)) == s.hidden, "embeddings have another size");
    for (const auto* angles : {&cos, &sin})
        require(static_cast<int64_t>(angles->shape(0)) == tokens && static_cast<int64_t>(angles->shape(1)) == model.rotaries() &&
                    static_cast<int64_t>(angles->shape(2)) == s.rotated,
                "angles have another size");
    require(kept <= tokens && static_cast<int64_t>(logits.shape(1)) == model.tokens(), "an array has another size");
    const Position at{cos.data(), sin.data(), past_of(s, model.depth() - windows, all, length, tokens),
                      past_of(s, windows, recent, recent_length, tokens)};
    nb::gil_scoped_release free;
    model.read(embeddings.data(), at, logits.data(), kept, {tokens, floats, threads});
}

}  // namespace

void bind_decoder(nb::module_& m) {
    nb::class_<Norm>(m, "StepNorm")
        .def("__init__", new_norm, "weight"_as_is, "bias"_as_is.none(), "eps"_a, "centred"_a, nb::keep_alive<1, 2>(),
             nb::keep_alive<1, 3>());
    nb::class_<Layers>(m, "StepLayers")
        .def(nb::init<>())
        .def("add", add_layer, "linear"_a, "bias"_as_is.none(), nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>());
    nb::class_<Attention>(m, "StepAttention")
        .def("__init__", new_attention, "inputs"_a, "output"_a, "starts"_a, "stride"_a, "q_norm"_a.none(), "k_norm"_a.none(),
             "whole_norms"_a, "scaling"_a, "cap"_a, "window"_a, "rotary"_a, nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(),
             nb::keep_alive<1, 6>(), nb::keep_alive<1, 7>());
    nb::class_<Mlp>(m, "StepMlp")
        .def("__init__", new_mlp, "inputs"_a, "output"_a, "gated"_a, "activation"_a, nb::keep_alive<1, 2>(),
             nb::keep_alive<1, 3>());
    nb::class_<Experts>(m, "StepExperts")
        .def("__init__", new_experts, "router"_a, "chosen"_a, "normalized"_a, nb::keep_alive<1, 2>())
        .def("add", [](Experts& experts, const Mlp& mlp) { experts.all.push_back(mlp); }, "mlp"_a, nb::keep_alive<1, 2>());
    nb::class_<Builder>(m, "ModelBuilder")
        .def(nb::init<int64_t, int64_t, int64_t, int64_t, int64_t, bool, float, float>(), "hidden"_a, "heads"_a, "kv_heads"_a,
             "dim"_a, "rotated"_a, "interleaved"_a, "logit_factor"_a, "logit_cap"_a)
        .def("block", &Builder::block, "attention"_a, "mlp"_a.none(), "before_attention"_a.none(), "after_attention"_a.none(),
             "before_mlp"_a.none(), "after_mlp"_a.none(), "parallel"_a, "factor"_a, "experts"_a.none() = nb::none(),
             nb::keep_alive<1, 2>(), nb::keep_alive<1, 3>(), nb::keep_alive<1, 4>(), nb::keep_alive<1, 5>(), nb::keep_alive<1, 6>(),
             nb::keep_alive<1, 7>(), nb::keep_alive<1, 10>())
        .def("build", &Builder::build, "norm"_a.none(), "head"_a, nb::keep_alive<0, 1>(), nb::keep_alive<0, 2>(),
             nb::keep_alive<0, 3>());
    nb::class_<Model>(m, "Model")
        .def("advance", advance_floats, "embedding"_as_is.none(), "table"_a.none(), "token"_a, "factor"_a,
             "position"_as_is.none(), "cos"_as_is, "sin"_as_is, "all"_as_is, "length"_a, "recent"_as_is, "recent_length"_a,
             "logits"_as_is, "threads"_a)
        .def("advance", advance_packed, "embedding"_as_is.none(), "table"_a.none(), "token"_a, "factor"_a,
             "position"_as_is.none(), "cos"_as_is, "sin"_as_is, "past"_a, "packed"_a, "sinks"_a, "waiting"_a, "logits"_as_is,
             "threads"_a)
        .def("reads_pieces", &Model::reads_pieces)
        .def("read", read_floats, "embeddings"_as_is, "cos"_as_is, "sin"_as_is, "all"_as_is, "length"_a, "recent"_as_is,
             "recent_length"_a, "logits"_as_is, "floats"_a, "threads"_a);
}

}  // namespace bitmill
