#include "vector.h"

#include <cstring>
#include <vector>

#include "../isa.h"
#include "../threads.h"

namespace bitmill {

void vector_linear(const Vectors& w, const float* x, int64_t tokens, float* y, int threads) {
    thread_local std::vector<float> padded;
    const int64_t columns = w.padded_columns();
    padded.assign(tokens * columns, 0.0f);
    float* in = padded.data();
    for (int64_t t = 0; t < tokens; ++t) std::memcpy(in + t * columns, x + t * w.columns, w.columns * sizeof(float));
    const auto& best = *isa().vector;
    in_shares(w.rows, threads, [&](int64_t first, int64_t last) { best.linear(w, in, tokens, y, first, last); });
}

void vector_decode(const Vectors& w, int64_t first, int64_t count, float* out, int threads) {
    const auto& best = *isa().vector;
    in_shares(count, threads, [&](int64_t from, int64_t to) {
        best.decode(w, out + from * w.columns, first + from, first + to);
    });
}

}  // namespace bitmill
