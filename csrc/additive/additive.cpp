#include "additive.h"

#include <cstring>
#include <vector>

#include "../isa.h"
#include "../threads.h"

namespace bitmill {

void additive(const Additive& w, const float* x, int64_t columns, int64_t tokens, float* y, int threads) {
    const AdditiveKernels& best = *isa().additive;
    const Layout& l = w.layout;
    const int64_t chunks = l.chunks();
    thread_local std::vector<float> padded, steps;
    thread_local std::vector<uint8_t> tables;
    padded.assign(l.columns / w.codebooks * w.width, 0.0f);  // the last block may be ragged
    steps.resize(chunks);
    tables.resize(w.table_bytes());
    float *in = padded.data(), *sizes = steps.data();  // thread_local names mean another vector in every thread
    uint8_t* records = tables.data();
    for (int64_t t = 0; t < tokens; ++t) {
        std::memcpy(in, x + t * columns, columns * sizeof(float));
        parallel_for(chunks, threads, [&](int64_t first, int64_t last) { best.tables(w, in, records, sizes, first, last); });
        float* out = y + t * l.rows;
        parallel_for(l.tiles(), threads, [&](int64_t first, int64_t last) { best.tiles(w, records, sizes, out, first, last); });
    }
}

}  // namespace bitmill
