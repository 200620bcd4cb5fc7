// The parts that a decoder is described by; every number is that of transformers' module.
#pragma once
#include <cstdint>
#include <vector>

#include "linear.h"

namespace bitmill {

// The factor of embeddings is applied by the caller; a cap of 0 is none.
struct Shape {
    int64_t hidden, heads, kv_heads, dim;  // heads share keys and values in groups of heads / kv_heads
    int64_t rotated;                       // the first numbers of a head, which rotate
    bool interleaved;                      // pairs are neighbours, otherwise a half apart
    float logit_factor, logit_cap;
};

// Absent without weights. Gemma's (1 + weight) are weights like others here.
struct Norm {
    const float *weight = nullptr, *bias = nullptr;
    int64_t size = 0;
    float eps = 0;
    bool centred = false;  // LayerNorm, otherwise RMSNorm
};

// A layer and its bias, if it has one.
struct Projection {
    const Linear* linear = nullptr;
    const float* bias = nullptr;
};

// Layers that read one input, and whose outputs follow one another.
struct Layers {
    std::vector<Projection> all;

    int64_t rows() const {
        int64_t sum = 0;
        for (const Projection& p : all) sum += p.linear->rows;
        return sum;
    }
    // The bias that starts at an output, or null.
    const float* bias(int64_t at) const {
        for (const Projection& p : all) {
            if (at < p.linear->rows) return p.bias ? p.bias + at : nullptr;
            at -= p.linear->rows;
        }
        return nullptr;
    }
};

// Where the queries, keys or values of the heads are among the outputs of the layers.
struct Heads {
    int64_t at = 0, stride = 0;
    Norm norm{};                  // of each head, before rotation: one for all, or heads x dim weights
    bool whole = false;           // the norm is that of all heads together
    const float* bias = nullptr;  // of the first head, at the stride
};

struct Attention {
    Layers inputs;
    Heads q, k, v;
    Projection output;
    float scaling, cap;
    int64_t window;  // tokens that are read, the present one included; 0: all
    int rotary;      // which of the angles rotate its heads; -1: none
};

enum class Activation { silu, gelu_tanh, gelu_erf, relu };

// down(activation(gate) * up), or down(activation(up)).
struct Mlp {
    Layers inputs;  // gate, if there is one, and up
    Projection output;
    bool gated;
    Activation activation;

    int64_t inner() const { return inputs.rows() / (gated ? 2 : 1); }
};

// An expert, and its share of a token's result.
struct Share {
    int64_t expert;
    float weight;
};

// MLPs of which a token takes the `chosen` with the largest shares of softmax(router(n)), and adds up their results by share.
struct Experts {
    Projection router;  // of no layer where a block has one MLP
    std::vector<Mlp> all;
    int64_t chosen = 0;
    bool normalized = false;  // the shares of the chosen are divided by their sum

    // In the order of experts, from what the router puts out.
    void choose(const float* scores, std::vector<Share>& out) const;
};

// Norms may be absent. In parallel blocks the MLP reads the stream that attention reads, through its own norm or, without
// one, attention's.
struct Block {
    Attention attention;
    Mlp mlp;
    Norm before_attention, after_attention, before_mlp, after_mlp;
    bool parallel;
    float factor;  // of both results, before they join the stream
    Experts experts{};  // in the place of the MLP
};

}  // namespace bitmill
