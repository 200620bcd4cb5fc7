// One token through a whole decoder (decoder.h), in one parallel region. For every block:
//
//     x += factor * norm(o(attention(rope(norm(q(n))), rope(norm(k(n))), v(n))))     n = norm(x)
//     x += factor * norm(down(activation(gate(n)) * up(n)))                          n = norm(x)
//
// and then logits = cap(factor * head(norm(x))). Threads divide the rows of products; the operations in between are small,
// and every thread computes them on its own copy of x. So threads wait for each other only before reading another's
// results: six times a block, five where attention and MLP are parallel, and once more with packed keys and values, for
// which they divide tokens instead of heads. Many tokens, a piece of a prompt, go through the blocks together (prompt.cpp).
#pragma once
#include <cstdint>
#include <mutex>
#include <vector>

#include "../kv/kv.h"
#include "decoder.h"

namespace bitmill {

// Keys, after rotation, and values of some blocks: (blocks, 2, kv_heads, capacity, dim), of which `length` are valid.
struct Past {
    float* numbers = nullptr;
    int64_t capacity = 0, length = 0;
};

// The basis that heads are stored in: turned by an orthogonal matrix, or channels less their mean, over their deviation.
struct Basis {
    const float *turn = nullptr, *back = nullptr;       // (dim, dim), and transposed
    const float *mean = nullptr, *deviation = nullptr;  // (channels,)
};

// Packed keys and values of a block, of one row. q, out and scale of the call are the step's own; its tail ends with the token,
// whose key and value join the fp16 ones.
struct Packed {
    KvAttention call;
    uint16_t *fp16_keys, *fp16_values;
    Basis keys, values;
};

struct Position {
    const float *cos, *sin;  // (kinds of angles, rotated)
    Past all{}, recent{};    // of the blocks that read all tokens, and of those with a window
    const Packed* packed = nullptr;  // of every block, in the place of both
};

// Kernels of an instruction set.
struct StepKernels {
    void (*norm)(const float* x, const float* weight, float eps, int64_t count, float* out);
    void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, int64_t count, float* out);
    // x += factor * (y + bias); bias may be null
    void (*add)(float* x, const float* y, const float* bias, float factor, int64_t count);
    void (*rope)(float* x, const float* cos, const float* sin, int64_t dim, bool interleaved);
    // activation(gate + its bias) * (up + its bias), of every Activation; without up it is left out, biases may be null
    void (*activate[4])(const float* gate, const float* gate_bias, const float* up, const float* up_bias, int64_t count,
                        float* out);
    void (*cap)(float* x, float most, int64_t count);  // most * tanh(x / most)
    // Some heads that share keys and values: q and out (heads, dim), scratch memory scores (heads, length).
    void (*attend)(const float* q, const float* keys, const float* values, int64_t heads, int64_t length, int64_t dim,
                   float scaling, float cap, float* scores, float* out);
    void (*softmax)(float* scores, int64_t length);
    // y (tokens, count) = x (tokens, columns) times w (columns, count), up to 16 of which are read, or added to y.
    void (*tiles)(const float* x, int64_t x_stride, int64_t tokens, const float* w, int64_t w_stride, int64_t columns, float* y,
                  int64_t y_stride, int64_t count, bool add);
    void (*to_fp16)(const float* x, int64_t count, uint16_t* out);  // to fp16, the largest of which is never exceeded
    void (*dense)(const float* weights, int64_t columns, const float* x, float* y, int64_t first, int64_t last);
    void (*dense_bf16)(const uint16_t* weights, int64_t columns, const float* x, float* y, int64_t first, int64_t last);
    // y += W x of fp16 weights
    void (*add_fp16)(const uint16_t* weights, int64_t columns, const float* x, float* y, int64_t first, int64_t last);
    // of weights (columns, rows)
    void (*transposed)(const float* weights, int64_t rows, int64_t columns, const float* x, float* y, int64_t first, int64_t last);
};

class Model {
public:
    const Shape shape;

    // Throws std::invalid_argument where layers do not fit the shape.
    Model(const Shape& shape, std::vector<Block> blocks, const Norm& norm, const Projection& head);
    ~Model();
    Model(const Model&) = delete;

    int64_t depth() const { return static_cast<int64_t>(blocks.size()); }
    int64_t windows() const;    // blocks with a window
    bool reads_packed() const;  // no block has a window or caps scores
    int64_t rotaries() const { return rotary_kinds; }
    int64_t tokens() const { return head.linear->rows; }

    // From the embedding of a token to the logits of the next. Appends its keys and values to the past, which must have
    // room. Calls wait for each other.
    void advance(const float* embedding, const Position& at, float* logits, int threads);

    // As `advance`, of many tokens, whose past is in floats: embeddings (tokens, hidden), angles (tokens, kinds, rotated) and
    // the logits that follow the last `kept` tokens, (kept, tokens()).
    bool reads_pieces() const;
    void read(const float* embeddings, const Position& at, float* logits, int64_t kept, const Piece& piece);

private:
    struct Thread;  // what a thread has to itself
    struct Rows;    // what a piece has

    std::vector<Block> blocks;
    std::vector<int64_t> place_in_past;  // of each block, among those that share a past
    const Norm norm;
    const Projection head;
    int64_t inner = 0, own = 0, rotary_kinds = 0, widest = 0;
    std::vector<float> qkv, q, attended, o, wide, down, shared, routed;
    std::vector<Thread> threads_;
    PartialSoftmax pieces;
    std::mutex busy;

    void check(Block& block);
    void check(const Projection& p, int64_t rows, int64_t columns);
    void check(const Norm& norm, int64_t size) const;
    void check(const Mlp& mlp);
    void run(const Team& team, Thread& self, const Position& at, float* logits);
    void block(const Team& team, Thread& self, int64_t index, const Position& at);
    void multiply(const Team& team, Thread& self, const Projection& p, const float* x, float* y);
    void multiply(const Team& team, Thread& self, const Layers& layers, const float* x, float* y);
    const float* normed(Thread& self, const Norm& norm) const;
    void join(const Projection& p, const float* y, const Norm& after, float factor, float* x, float* spare) const;
    // The factor of a norm over so many heads together; 0 where heads have norms of their own, or none. `from`: the outputs
    // of the layers, where the first head starts.
    float whole_factor(const Heads& heads, const float* from, int64_t count) const;
    // A head as the layers have it, with bias, normed and turned where there are angles.
    void place(const Heads& heads, const float* from, int64_t head, float factor, const float* cos, const float* sin, float* x) const;
    void attention(const Team& team, Thread& self, int64_t index, const Position& at);
    void attention(const Team& team, Thread& self, const Attention& a, const Packed& packed, const Position& at);
    void experts(const Team& team, Thread& self, const Experts& experts, const float* x);
    void finish(const Team& team, float* logits) const;
    void block(const Block& block, int64_t index, const Position& at, Rows& rows, const Piece& piece) const;
    void place(const Attention& attention, const Position& at, float* keys, float* values, int64_t stride, Rows& rows,
               const Piece& piece) const;
    void attention(const Attention& attention, int64_t index, const Position& at, Rows& rows, const Piece& piece) const;
    void mlp(const Mlp& mlp, const float* x, Rows& rows, const Piece& piece, float* y) const;
    void experts(const Experts& experts, const float* x, Rows& rows, const Piece& piece) const;
};

void normalize(const Norm& norm, const float* weight, const float* bias, const float* x, int64_t count, float* out);

}  // namespace bitmill
