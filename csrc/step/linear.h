// Matrices that the threads of a step multiply with together: one token, within the step's parallel region; or many tokens, a
// piece of a prompt, with threads of their own.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "../additive/additive.h"
#include "../lut/grid.h"
#include "../lut/levels.h"
#include "../rotation/rotation.h"
#include "../sparse/sparse.h"
#include "../vector/vector.h"
#include "team.h"

namespace bitmill {

// Rounded inputs of a thread for the lookup kernels; layers with the same input share them.
class RoundedInputs {
public:
    void changed() { from = nullptr; }
    const Inputs& of(const Layout& layout, const float* x, Act act);
    // As integers of a grid; `act` becomes their type.
    const Inputs& of(const Layout& layout, const Grid& grid, bool wide, const float* x, Act& act);
    const std::vector<int64_t>& kept() const { return buffers.kept; }  // columns that were not rounded

private:
    Buffers buffers;
    const float* from = nullptr;
    Layout layout{};
    Act act{};
    Grid grid{};  // of width 0 for none
    bool wide = false;
};

// Memory during a product: `own` of each thread, `shared` by all.
struct Workspace {
    RoundedInputs& inputs;
    float *own, *shared;
};

// Many tokens: `floats` where inputs are not rounded.
struct Piece {
    int64_t tokens;
    bool floats;
    int threads;
};
constexpr int64_t few_tokens = 16;  // that multiply as single ones do (runtime/kernels/compiled.py: MAX_TOKENS)

class Linear {
public:
    const int64_t rows, columns;
    int64_t own = 0, shared = 0;  // floats that it needs in a Workspace

    Linear(int64_t rows, int64_t columns) : rows(rows), columns(columns) {}
    virtual ~Linear() = default;
    Linear(const Linear&) = delete;

    // y = W x. Every thread of the team calls it, with the same numbers in x, be it its own copy or not, and the one y,
    // which is whole when all have passed the next wait.
    virtual void apply(const Team& team, Workspace room, const float* x, float* y) const = 0;
    // One row of W, for embeddings; returns false if it is not supported.
    virtual bool row(int64_t, float*) const { return false; }

    // y (tokens, rows) = x (tokens, columns) W^T.
    void product(const float* x, const Piece& piece, float* y) const;
    // Whether more than a few tokens multiply.
    virtual bool reads_pieces() const { return decodes(); }

protected:
    virtual void few(const float* x, const Piece& piece, float* y) const;   // tokens
    virtual void many(const float* x, const Piece& piece, float* y) const;  // tokens, by rows that are decoded
    virtual bool decodes() const { return false; }
    virtual void decode(int64_t, int64_t, float*, int) const {}  // rows from one on, so many, (count, columns)
};

// Panels for many tokens: byte tables, and the inputs' type and step (lut/linear.h: linear_gemm).
struct Panels {
    Weights weights;
};

// Codes with the tables that decode them in fp32; `levels.first` is set for each call.
struct Codes {
    Levels levels;
};

class LookupLinear : public Linear {
public:
    LookupLinear(const Weights& weights, Act act);  // throws std::invalid_argument where there is no kernel
    void apply(const Team& team, Workspace room, const float* x, float* y) const override;
    bool row(int64_t row, float* out) const override;
    // Columns of W, (rows, count).
    void column_numbers(const int64_t* columns, int64_t count, float* out, int threads) const;
    const Weights& matrix() const { return weights; }
    Act inputs() const { return act; }
    // How many tokens multiply: with panels, or, where inputs are not rounded or there are none, with rows of codes.
    void read_pieces(std::shared_ptr<const Panels> with, Act rounded, int64_t step_columns, std::shared_ptr<const Codes> of);
    bool reads_pieces() const override { return panels || codes; }

protected:
    void few(const float* x, const Piece& piece, float* y) const override;
    void many(const float* x, const Piece& piece, float* y) const override;
    bool decodes() const override { return codes != nullptr; }
    void decode(int64_t first, int64_t count, float* out, int threads) const override;

private:
    const Weights weights;
    const Act act;
    std::shared_ptr<const Panels> panels;
    std::shared_ptr<const Codes> codes;
    Act many_act{};
    int64_t many_step = 0;
};

// The integers of inputs on a grid times a lookup matrix.
class GridLinear : public Linear {
public:
    GridLinear(const Weights& weights, const Grid& grid);  // throws std::invalid_argument where there is no kernel
    void product(const float* x, int64_t tokens, float* y, int threads) const;
    void apply(const Team& team, Workspace room, const float* x, float* y) const override;

private:
    const Weights weights;
    const Grid grid;
    const bool wide;
};

// W' x[base] + V x[outliers]: V (rows, count) in fp16.
class OutlierLinear : public Linear {
public:
    OutlierLinear(const Linear& inner, const int64_t* base, const int64_t* outliers, const uint16_t* values, int64_t count);
    void apply(const Team& team, Workspace room, const float* x, float* y) const override;
    bool reads_pieces() const override { return inner.reads_pieces(); }

protected:
    void few(const float* x, const Piece& piece, float* y) const override { many(x, piece, y); }
    void many(const float* x, const Piece& piece, float* y) const override;

private:
    const Linear& inner;
    const int64_t *base, *outliers;
    const uint16_t* values;
    const int64_t count;
};

// W' x + U (V x): U (rows, rank) and V (rank, columns) in fp16.
class LowRankLinear : public Linear {
public:
    LowRankLinear(const Linear& inner, const uint16_t* left, const uint16_t* right, int64_t rank);
    void apply(const Team& team, Workspace room, const float* x, float* y) const override;
    bool reads_pieces() const override { return inner.reads_pieces(); }

protected:
    void few(const float* x, const Piece& piece, float* y) const override { many(x, piece, y); }
    void many(const float* x, const Piece& piece, float* y) const override;

private:
    const Linear& inner;
    const uint16_t *left, *right;
    const int64_t rank;
};

// Unquantized, fp32 or bf16: rows x columns numbers.
class DenseLinear : public Linear {
public:
    DenseLinear(const void* weights, bool wide, int64_t rows, int64_t columns)
        : Linear(rows, columns), weights(weights), wide(wide) {}
    void apply(const Team& team, Workspace room, const float* x, float* y) const override;
    bool row(int64_t row, float* out) const override;
    bool reads_pieces() const override { return true; }

protected:
    void few(const float* x, const Piece& piece, float* y) const override { many(x, piece, y); }
    void many(const float* x, const Piece& piece, float* y) const override;

private:
    const void* weights;
    const bool wide;
};

// Unquantized, fp32, stored columns x rows as GPT-2 stores its matrices.
class TransposedLinear : public Linear {
public:
    TransposedLinear(const float* weights, int64_t rows, int64_t columns) : Linear(rows, columns), weights(weights) {}
    void apply(const Team& team, Workspace room, const float* x, float* y) const override;
    bool reads_pieces() const override { return true; }

protected:
    void few(const float* x, const Piece& piece, float* y) const override { many(x, piece, y); }
    void many(const float* x, const Piece& piece, float* y) const override;

private:
    const float* weights;
};

class VectorLinear : public Linear {
public:
    explicit VectorLinear(const Vectors& weights);
    void apply(const Team& team, Workspace room, const float* x, float* y) const override;

protected:
    bool decodes() const override { return true; }
    void decode(int64_t first, int64_t count, float* out, int threads) const override;

private:
    const Vectors weights;
};

// Repacked pyramid points.
class PointsLinear : public Linear {
public:
    PointsLinear(const Points& weights, int64_t columns, Act act)
        : Linear(weights.layout.rows, columns), weights(weights), act(act) {
        own = columns < weights.layout.columns ? weights.layout.columns : 0;
    }
    void apply(const Team& team, Workspace room, const float* x, float* y) const override;

protected:
    bool decodes() const override { return true; }
    void decode(int64_t first, int64_t count, float* out, int threads) const override;

private:
    const Points weights;
    const Act act;
};

// Repacked points of E8.
class LatticeLinear : public Linear {
public:
    LatticeLinear(const Lattice& weights, int64_t columns, Act act)
        : Linear(weights.layout.rows, columns), weights(weights), act(act) {
        own = weights.layout.columns;
    }
    void apply(const Team& team, Workspace room, const float* x, float* y) const override;

protected:
    bool decodes() const override { return true; }
    void decode(int64_t first, int64_t count, float* out, int threads) const override;

private:
    const Lattice weights;
    const Act act;
};

class AdditiveLinear : public Linear {
public:
    AdditiveLinear(const Additive& weights, int64_t columns);
    void apply(const Team& team, Workspace room, const float* x, float* y) const override;

private:
    const Additive weights;
    const int64_t padded;
};

// U^T W' V diag(1 / rescale); no rescale and no rotation of the outputs where they are null or of no steps.
class RotatedLinear : public Linear {
public:
    RotatedLinear(const Linear& inner, const float* rescale, const Rotation& inputs, const Rotation& outputs);
    void apply(const Team& team, Workspace room, const float* x, float* y) const override;
    bool reads_pieces() const override { return inner.reads_pieces(); }

protected:
    void few(const float* x, const Piece& piece, float* y) const override { many(x, piece, y); }
    void many(const float* x, const Piece& piece, float* y) const override;

private:
    const Linear& inner;
    const float* rescale;
    const Rotation inputs, outputs;
};

class SumLinear : public Linear {
public:
    SumLinear(const Linear& inner, const Sparse& entries);
    void apply(const Team& team, Workspace room, const float* x, float* y) const override;
    bool reads_pieces() const override { return inner.reads_pieces(); }

protected:
    void few(const float* x, const Piece& piece, float* y) const override { many(x, piece, y); }
    void many(const float* x, const Piece& piece, float* y) const override;

private:
    const Linear& inner;
    const Sparse entries;
};

// W' x[order].
class PermutedLinear : public Linear {
public:
    PermutedLinear(const Linear& inner, const int64_t* order);
    void apply(const Team& team, Workspace room, const float* x, float* y) const override;
    bool reads_pieces() const override { return inner.reads_pieces(); }

protected:
    void few(const float* x, const Piece& piece, float* y) const override { many(x, piece, y); }
    void many(const float* x, const Piece& piece, float* y) const override;

private:
    const Linear& inner;
    const int64_t* order;
};

}  // namespace bitmill
