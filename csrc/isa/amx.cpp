// AMX: the kernels of AVX-512, except for products of many tokens. It has never run on a processor, only on emulated
// tiles (tests/sanitize.sh), so it is not chosen unless BITMILL_ISA asks for it.
#include "../simd/amx.h"

#include "../isa.h"

namespace bitmill {
namespace {

Isa with_tiles() {
    Isa set = avx512_isa;  // which is a constant: initialized before all that runs
    set.name = "amx";
    set.fixed = &amx_kernels<Amx>;
    return set;
}

}  // namespace

const Isa amx_isa = with_tiles();

}  // namespace bitmill
