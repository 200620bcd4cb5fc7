// Shared by the tests of the compiled kernels: random numbers, and what counts as a failure.
#pragma once
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <stdexcept>
#include <vector>

namespace bitmill {

inline std::mt19937 random_bits(1);
inline int below(int n) { return static_cast<int>(random_bits() % static_cast<unsigned>(n)); }
inline std::vector<uint8_t> random_bytes(size_t count) {
    std::vector<uint8_t> out(count);
    for (auto& b : out) b = static_cast<uint8_t>(random_bits());
    return out;
}
inline std::vector<float> random_floats(size_t count) {
    std::vector<float> out(count);
    for (auto& v : out) v = static_cast<float>(below(2001) - 1000) / 300.0f;
    return out;
}

// The largest difference of outputs, relative to the largest expected one; large where one is NaN.
template <class Expected>
double difference(const std::vector<float>& found, const std::vector<Expected>& expected) {
    double most = 1e-30, off = 0;
    for (size_t i = 0; i < found.size(); ++i) {
        most = std::max(most, std::fabs(static_cast<double>(expected[i])));
        off = std::max(off, std::fabs(static_cast<double>(found[i]) - static_cast<double>(expected[i])));
        if (std::isnan(found[i])) return 1e30;
    }
    return off / most;
}

inline int failures = 0, runs = 0;

inline void report(double off, double limit, const char* format, ...) {
    ++runs;
    if (off <= limit) return;
    ++failures;
    va_list arguments;
    va_start(arguments, format);
    std::vprintf(format, arguments);
    va_end(arguments);
    std::printf(": %g, more than %g\n", off, limit);
}

void test_lookup();
void test_grid();
void test_additive();
void test_vector();
void test_rotation();
void test_sparse();
void test_fixed();
void test_step();
void test_kv();
void test_solve();

}  // namespace bitmill
