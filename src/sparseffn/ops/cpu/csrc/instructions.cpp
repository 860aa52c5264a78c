#include "tiles.h"

// What the kernels were compiled for, as the compiler's flags decided, and for tiles the system: `sparseffn doctor` and every figure of
// the benchmark say it.
extern "C" const char* sparseffn_instruction_sets() {
#if defined(__AVX512BF16__)
    return sparseffn::has_tiles() ? "AMX-BF16, AVX512-BF16, AVX512, AVX2" : "AVX512-BF16, AVX512, AVX2";
#elif defined(__AVX512F__)
    return "AVX512, AVX2";
#elif defined(__AVX2__)
    return "AVX2";
#elif defined(__ARM_NEON)
    return "NEON";
#else
    return "none beyond the compiler's least";
#endif
}
