// AVX-VNNI: the kernels of AVX2, except for products of many tokens.
#include "../simd/avxvnni.h"

#include "../fixed/fixed-inl.h"
#include "../isa.h"

namespace bitmill {
namespace {

Isa with_vnni() {
    Isa set = avx2_isa;  // which is a constant: initialized before all that runs
    set.name = "avxvnni";
    set.fixed = &fixed_kernels<AvxVnni>;
    return set;
}

}  // namespace

const Isa avxvnni_isa = with_vnni();

}  // namespace bitmill
