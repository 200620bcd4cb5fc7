// Steps of the solvers on every instruction set against loops over one row at a time: alike to the last bit.
#include "../solve/solve.h"

#include <algorithm>

#include "../isa.h"
#include "driver.h"

namespace bitmill {
namespace {

// Ascending levels of every group and row, the middles between them, and codes in another order.
struct Tables {
    int64_t count, rows, groups;
    int levels;
    std::vector<float> table, middles;
    std::vector<uint8_t> codes;
    std::vector<int32_t> group;

    Tables(int64_t count_, int64_t rows_, int levels_) : count(count_), rows(rows_), groups((count_ + 6) / 7), levels(levels_) {
        const auto next = random_floats(groups * rows);
        for (int64_t g = 0; g < groups; ++g) {
            for (int k = 0; k < levels; ++k)
                for (int64_t r = 0; r < rows; ++r) {
                    table.push_back(next[g * rows + r] + 0.37f * static_cast<float>(k));
                    codes.push_back(static_cast<uint8_t>(levels - 1 - k));
                }
            for (int k = 1; k < levels; ++k)
                for (int64_t r = 0; r < rows; ++r) {
                    const float* upper = table.data() + (g * levels + k) * rows + r;
                    middles.push_back((upper[-rows] + *upper) / 2);
                }
        }
        for (int64_t k = 0; k < count; ++k) group.push_back(static_cast<int32_t>(k / 7));
    }
    Columns columns() const { return {count, rows, levels, table.data(), middles.data(), codes.data(), group.data()}; }

    int nearest(int64_t column, int64_t row, float x) const {  // its place in the table
        int place = 0;
        for (int k = 1; k < levels; ++k) place += x > middles[(group[column] * (levels - 1) + k - 1) * rows + row];
        return place;
    }
    float level(int64_t column, int64_t row, int place) const { return table[(group[column] * levels + place) * rows + row]; }
    uint8_t code(int64_t column, int64_t row, int place) const { return codes[(group[column] * levels + place) * rows + row]; }
};

std::vector<float> triangle(int64_t count) {  // with a diagonal away from 0
    auto out = random_floats(count * count);
    for (int64_t k = 0; k < count; ++k) out[k * count + k] = 2.0f + std::fabs(out[k * count + k]);
    return out;
}

void run_feedback(int64_t count, int64_t rows, int levels) {
    const Tables t(count, rows, levels);
    const auto U = triangle(count), W = random_floats(count * rows);
    std::vector<float> expected = W, errors(W.size());
    std::vector<uint8_t> codes(W.size());
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < count; ++k) {
            float& w = expected[k * rows + r];
            const int place = t.nearest(k, r, w);
            const float level = t.level(k, r, place), error = (w - level) / U[k * count + k];
            w = level, errors[k * rows + r] = error, codes[k * rows + r] = t.code(k, r, place);
            for (int64_t l = k + 1; l < count; ++l) expected[l * rows + r] -= U[k * count + l] * error;
        }
    for (const auto& name : available_isas()) {
        use_isa(name);
        std::vector<float> found = W, missed(W.size(), NAN);
        std::vector<uint8_t> chosen(W.size(), 255);
        round_with_feedback(t.columns(), {U.data(), count, found.data(), chosen.data(), missed.data()}, 2);
        report(difference(found, expected) + difference(missed, errors) + (chosen != codes), 0, "feedback %s: %ld x %ld, %d levels",
               name.c_str(), static_cast<long>(rows), static_cast<long>(count), levels);
    }
}

void run_descent(int64_t count, int64_t rows, int levels) {
    const Tables t(count, rows, levels);
    const int64_t all = count + 3;
    const auto H = triangle(count), Q = random_floats(all * rows), slope = random_floats(count * rows);
    std::vector<int64_t> place(all);
    for (int64_t k = 0; k < all; ++k) place[k] = k;
    std::shuffle(place.begin(), place.end(), random_bits);
    place.resize(count);
    std::vector<float> expected = Q, gradient = slope, moved(slope.size());
    std::vector<uint8_t> codes(Q.size(), 7);
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t k = 0; k < count; ++k) {
            float& q = expected[place[k] * rows + r];
            const int best = t.nearest(k, r, q + gradient[k * rows + r] / H[k * count + k]);
            const float step = t.level(k, r, best) - q;
            q = t.level(k, r, best), moved[k * rows + r] = step, codes[place[k] * rows + r] = t.code(k, r, best);
            for (int64_t l = k + 1; l < count; ++l) gradient[l * rows + r] -= H[k * count + l] * step;
        }
    for (const auto& name : available_isas()) {
        use_isa(name);
        std::vector<float> found = Q, left = slope, steps(slope.size(), NAN);
        std::vector<uint8_t> chosen(Q.size(), 7);
        round_by_descent(t.columns(), {H.data(), place.data(), left.data(), found.data(), chosen.data(), steps.data()}, 2);
        report(difference(found, expected) + difference(left, gradient) + difference(steps, moved) + (chosen != codes), 0,
               "descent %s: %ld x %ld, %d levels", name.c_str(), static_cast<long>(rows), static_cast<long>(count), levels);
    }
}

void run_codings(int64_t count, int64_t width, int bins, int codings) {
    const int64_t weights = count % 2 ? 1 : 2;
    const auto x = random_floats(count * width), costs = random_floats(2 * bins * codings);
    auto weight = random_floats(weights * width), factor = random_floats(count);
    for (auto& w : weight) w = std::fabs(w);
    for (auto& f : factor) f = std::max(f, 0.0f);  // zeros among them
    std::vector<float> expected;
    std::vector<int64_t> cheapest;
    std::vector<float> least(count);
    std::vector<int64_t> coding(count);
    for (int64_t n = 0; n < count; ++n) {
        const float divisor = factor[n] > 0 ? factor[n] : 1.0f;
        std::vector<float> mass(bins), moment(bins);
        for (int64_t i = 0; i < width; ++i) {
            const float value = x[n * width + i] / divisor;
            const float at = std::floor((value + static_cast<float>(bins / 4)) * 2) + 1;
            const int bin = static_cast<int>(std::clamp(at, 0.0f, static_cast<float>(bins - 1)));
            mass[bin] += weight[n % weights * width + i], moment[bin] += weight[n % weights * width + i] * value;
        }
        int best = 0;
        float lowest = 0;
        for (int k = 0; k < codings; ++k) {
            float cost = 0;
            for (int b = 0; b < bins; ++b)
                if (mass[b] != 0 || moment[b] != 0) cost += mass[b] * costs[b * codings + k] + moment[b] * costs[(bins + b) * codings + k];
            if (k == 0 || cost < lowest) best = k, lowest = cost;
        }
        expected.push_back(lowest * (factor[n] * factor[n])), cheapest.push_back(best);
    }
    for (const auto& name : available_isas()) {
        use_isa(name);
        std::fill(least.begin(), least.end(), NAN);
        cheapest_codings({count, width, x.data(), weight.data(), weights, factor.data(), costs.data(), bins, codings, least.data(),
                          coding.data()},
                         2);
        report(difference(least, expected) + (coding != cheapest), 0, "codings %s: %ld groups of %ld, %d of %d bins", name.c_str(),
               static_cast<long>(count), static_cast<long>(width), codings, bins);
    }
}

}  // namespace

void test_solve() {
    for (const int64_t rows : {1, 63, 64, 130})
        for (const int64_t count : {1, 7, 20})
            for (const int levels : {1, 2, 16, 256}) run_feedback(count, rows, levels), run_descent(count, rows, levels);
    for (const int64_t count : {1, 6, 33})
        for (const int64_t width : {1, 16, 40}) run_codings(count, width, 4, 1), run_codings(count, width, 32, 7), run_codings(count, width, 512, 64);
}

}  // namespace bitmill
