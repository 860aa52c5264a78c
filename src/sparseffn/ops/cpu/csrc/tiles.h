// Intel's AMX: registers of 16 rows of 64 bytes. One instruction multiplies two, 16 rows of 32 bfloat16 numbers by 16 columns of as
// many, whose pairs lie side by side, and adds to 16 x 16 floats.
#pragma once

#include <cstdint>

#include "product.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__AVX512BW__) && defined(__linux__) && \
    !defined(SPARSEFFN_NO_TILES)
#define SPARSEFFN_TILES
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sparseffn {

// Whether there are tiles and the system lets this process use them; it is asked once.
inline bool has_tiles() {
#if defined(SPARSEFFN_TILES)
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, and the number of the tiles' state
    static const bool allowed = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
    return allowed;
#else
    return false;
#endif
}

#if defined(SPARSEFFN_TILES)

// The tiles of this thread, all of 16 rows of 64 bytes; afterwards they have the shapes that they had, as PyTorch's libraries use them,
// too, and hold zeros.
class Tiles {
    struct alignas(64) Shapes {
        uint8_t palette = 1, start_row = 0, reserved[14] = {};
        uint16_t bytes[16] = {};
        uint8_t rows[16] = {};
    };

  public:
    // Of a row.
    static constexpr int64_t kBytes = 64;

    Tiles() {
        Shapes ours;
        for (int tile = 0; tile < 8; ++tile) {
            ours.bytes[tile] = kBytes;
            ours.rows[tile] = 16;
        }
        asm volatile("sttilecfg %0" : "=m"(before_));
        asm volatile("ldtilecfg %0" : : "m"(ours));
    }
    ~Tiles() { asm volatile("ldtilecfg %0" : : "m"(before_)); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;

    // GCC 12's own functions do not tell the compiler that they read or write memory.
    template <int T> SPARSEFFN_INLINE static void load(const void* from, int64_t bytes_apart) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(bytes_apart), "i"(T) : "memory");
    }
    template <int T> SPARSEFFN_INLINE static void store(void* to, int64_t bytes_apart) {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(bytes_apart), "i"(T) : "memory");
    }
    template <int T> SPARSEFFN_INLINE static void set_to_zero() { asm volatile("tilezero %%tmm%c0" : : "i"(T)); }
    template <int Sum, int A, int B> SPARSEFFN_INLINE static void add_product() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(Sum), "i"(A), "i"(B));
    }

  private:
    Shapes before_;
};

#endif

}  // namespace sparseffn
