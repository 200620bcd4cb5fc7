// Every kernel of every instruction set against plain loops over the same numbers. Built with sanitizers by
// tests/sanitize.sh: arrays are exactly as large as the layouts say.
#include "driver.h"

int main() {
    bitmill::test_lookup();
    bitmill::test_additive();
    bitmill::test_vector();
    bitmill::test_rotation();
    bitmill::test_sparse();
    bitmill::test_fixed();
    bitmill::test_step();
    bitmill::test_kv();
    std::printf("%d kernel runs, %d failures\n", bitmill::runs, bitmill::failures);
    return bitmill::failures != 0;
}
