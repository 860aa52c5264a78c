// Tiles of products, each in a function of its own: `test_cpu_tiles.py` reads their loops in assembly.
#include <vector>

#include "matrix.h"

namespace sparseffn {

constexpr int kLines = kDotLines, kRegisters = kVectors;

template <class S, int R>
__attribute__((noinline)) void dot_tile(const S* const* a, const S* b, int64_t ldb, int64_t depth, float (&sums)[R][kLines]) {
    tile_dots<S, S, R, kLines>(a, b, ldb, depth, {nullptr, kLine, kLine, true, false}, sums);
}

template <int R>
__attribute__((noinline)) void panel_tile(const float* const* a, const float* b, int64_t ldb, int64_t depth, Coming& next,
                                          Vec<float> (&acc)[R][kRegisters]) {
    tile_product<float, float, R, kRegisters, Tile::kLater>(a, b, ldb, depth, next, 1, nullptr, acc);
}

#if defined(SPARSEFFN_PAIRS)
template void dot_tile<bf16, 2>(const bf16* const*, const bf16*, int64_t, int64_t, float (&)[2][kLines]);
template void dot_tile<bf16, 3>(const bf16* const*, const bf16*, int64_t, int64_t, float (&)[3][kLines]);
template void dot_tile<bf16, 4>(const bf16* const*, const bf16*, int64_t, int64_t, float (&)[4][kLines]);
#endif
template void dot_tile<float, 2>(const float* const*, const float*, int64_t, int64_t, float (&)[2][kLines]);
#if defined(__AVX512F__)
template void dot_tile<float, 3>(const float* const*, const float*, int64_t, int64_t, float (&)[3][kLines]);
template void dot_tile<float, 4>(const float* const*, const float*, int64_t, int64_t, float (&)[4][kLines]);
template void dot_tile<float, 6>(const float* const*, const float*, int64_t, int64_t, float (&)[6][kLines]);
#endif
template void panel_tile<2>(const float* const*, const float*, int64_t, int64_t, Coming&, Vec<float> (&)[2][kRegisters]);
template void panel_tile<3>(const float* const*, const float*, int64_t, int64_t, Coming&, Vec<float> (&)[3][kRegisters]);
template void panel_tile<4>(const float* const*, const float*, int64_t, int64_t, Coming&, Vec<float> (&)[4][kRegisters]);
template void panel_tile<6>(const float* const*, const float*, int64_t, int64_t, Coming&, Vec<float> (&)[6][kRegisters]);

}  // namespace sparseffn
