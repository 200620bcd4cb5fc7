// Every kernel of every instruction set against plain loops over the same numbers. Built with sanitizers by
// tests/sanitize.sh: arrays are exactly as large as the layouts say.
#include "driver.h"

int main() {
    using namespace bitmill;
    const auto tests = {test_lookup, test_additive, test_vector, test_rotation, test_sparse, test_fixed, test_step, test_kv};
    for (const auto& test : tests) {
        random_bits.seed(1);  // so that none depends on how much those before it drew
        test();
    }
    std::printf("%d kernel runs, %d failures\n", runs, failures);
    return failures != 0;
}
