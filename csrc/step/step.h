// One token through a whole model of Llama's kind, in one parallel region:
//
//     x += o(attention(rope(q(n)), rope(k(n)), v(n)))     n = norm(x)
//     x += down(silu(gate(n)) * up(n))                     n = norm(x)     for every block; logits = head(norm(x))
//
// Threads divide the rows of products; the operations in between are small, and every thread computes them on its own copy
// of x. So threads wait for each other only before reading another's results: six times a block, seven with packed keys
// and values, for which they divide tokens instead of heads.
#pragma once
#include <cstdint>
#include <mutex>
#include <vector>

#include "../kv/kv.h"
#include "linear.h"

namespace bitmill {

struct Shape {
    int64_t hidden, heads, kv_heads, dim;  // heads share keys and values in groups of heads / kv_heads
    float eps, scaling;
};

// A layer and its bias, if it has one.
struct Projection {
    const Linear* linear = nullptr;
    const float* bias = nullptr;
};

struct Block {
    const float *norm_in, *norm_out;
    Projection q, k, v, o, gate, up, down;
    const float *q_norm = nullptr, *k_norm = nullptr;  // (dim,): Qwen3
};

// Keys, after rotation, and values of all blocks: (blocks, 2, kv_heads, capacity, dim), of which `length` are valid.
struct Past {
    float* numbers;
    int64_t capacity, length;
};

// The basis that heads are stored in: turned by an orthogonal matrix, or channels less their mean, over their deviation.
struct Basis {
    const float *turn = nullptr, *back = nullptr;       // (dim, dim), and transposed
    const float *mean = nullptr, *deviation = nullptr;  // (channels,)
};

// Packed keys and values of a block, of one row. q and out of the call are the step's own; its tail ends with the token,
// whose key and value join the fp16 ones.
struct Packed {
    KvAttention call;
    uint16_t *fp16_keys, *fp16_values;
    Basis keys, values;
};

struct Position {
    const float *cos, *sin;  // (dim,)
    Past past;
    const Packed* packed = nullptr;  // of every block, in the place of the past
};

// Kernels of an instruction set.
struct StepKernels {
    void (*norm)(const float* x, const float* weight, float eps, int64_t count, float* out);
    void (*add)(float* x, const float* y, const float* bias, int64_t count);  // bias may be null
    void (*rope)(float* x, const float* cos, const float* sin, int64_t dim);
    // silu(gate) * up; biases may be null
    void (*gated)(const float* gate, const float* gate_bias, const float* up, const float* up_bias, int64_t count, float* out);
    // Some heads that share keys and values: q and out (heads, dim), scratch memory scores (heads, length).
    void (*attend)(const float* q, const float* keys, const float* values, int64_t heads, int64_t length, int64_t dim,
                   float scaling, float* scores, float* out);
    void (*to_fp16)(const float* x, int64_t count, uint16_t* out);  // to fp16, the largest of which is never exceeded
    void (*dense)(const float* weights, int64_t columns, const float* x, float* y, int64_t first, int64_t last);
    void (*dense_bf16)(const uint16_t* weights, int64_t columns, const float* x, float* y, int64_t first, int64_t last);
};

class Model {
public:
    const Shape shape;

    // Throws std::invalid_argument where layers do not fit the shape.
    Model(const Shape& shape, std::vector<Block> blocks, const float* norm, const Projection& head);
    ~Model();
    Model(const Model&) = delete;

    int64_t depth() const { return static_cast<int64_t>(blocks.size()); }
    int64_t tokens() const { return head.linear->rows; }

    // From the embedding of a token to the logits of the next. Appends its keys and values to the past, which must have
    // room. Calls wait for each other.
    void advance(const float* embedding, const Position& at, float* logits, int threads);

private:
    struct Thread;  // what a thread has to itself

    const std::vector<Block> blocks;
    const float* norm;
    const Projection head;
    int64_t inner = 0, own = 0;
    std::vector<float> q, k, v, attended, o, gate, up, down, shared;
    std::vector<Thread> threads_;
    PartialSoftmax pieces;
    std::mutex busy;

    void run(const Team& team, Thread& self, const Position& at, float* logits);
    // The token's head as a projection has it, with bias, normed and turned where it is a key's or a query's.
    void place(const Projection& p, const float* weight, int64_t head, const Position* at, float* x) const;
    void attention(const Team& team, Thread& self, const Block& block, int64_t index, const Position& at);
    void attention(const Team& team, Thread& self, const Block& block, const Packed& packed, const Position& at);
};

}  // namespace bitmill
