// Every kernel of every instruction set against plain loops over the same numbers; with names as arguments, those tests.
// Built with sanitizers by tests/sanitize.sh: arrays are exactly as large as the layouts say.
#include "driver.h"

int main(int count, char** names) {
    using namespace bitmill;
    struct Test {
        const char* name;
        void (*run)();
    };
    const Test tests[] = {{"lookup", test_lookup}, {"grid", test_grid},     {"additive", test_additive}, {"vector", test_vector}, {"rotation", test_rotation},
                          {"sparse", test_sparse}, {"fixed", test_fixed},   {"step", test_step},         {"kv", test_kv},           {"solve", test_solve}};
    int found = 0;
    for (const auto& test : tests) {
        bool named = count == 1;
        for (int i = 1; i < count; ++i) named |= std::strcmp(names[i], test.name) == 0;
        if (!named) continue;
        random_bits.seed(1);  // so that none depends on how much those before it drew
        test.run();
        ++found;
    }
    if (count > 1 && found < count - 1) {
        std::printf("a name is none of lookup, grid, additive, vector, rotation, sparse, fixed, step, kv and solve\n");
        return 2;
    }
    std::printf("%d kernel runs, %d failures\n", runs, failures);
    return failures != 0;
}
