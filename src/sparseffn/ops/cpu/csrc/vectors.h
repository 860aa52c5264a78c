// Vectors of one machine register, and the storage types that are loaded into them. GCC's and Clang's vector extension
// serves every instruction set; -march=native decides which one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__F16C__) || defined(__AVX__)
#include <immintrin.h>
#endif

namespace sparseffn {

// Bytes of a line of memory, as caches take it.
constexpr int64_t kLine = 64;

// Shape of a product tile: kRows x (kVectors registers) accumulators, the shorter side of the tile and one register of the other
// (`tile_step`) must fit the register file, and so must those of half the rows and twice the registers. AVX-512 and NEON have 32
// registers, AVX2 and SSE have 16.
#if defined(__AVX512F__)
constexpr int kBytes = 64, kRows = 6, kVectors = 4;
#elif defined(__AVX__)
constexpr int kBytes = 32, kRows = 6, kVectors = 2;
#elif defined(__ARM_NEON)
constexpr int kBytes = 16, kRows = 6, kVectors = 4;
#else
constexpr int kBytes = 16, kRows = 6, kVectors = 2;
#endif

struct bf16 {
    uint16_t bits;
};
// IEEE's binary16.
struct half {
    uint16_t bits;
};

// Values are computed in C: float for float, bfloat16 and float16 storage, double for double.
template <class S> struct compute { using type = S; };
template <> struct compute<bf16> { using type = float; };
template <> struct compute<half> { using type = float; };
template <class S> using compute_t = typename compute<S>::type;

// What rows are multiplied as: bfloat16 where the processor adds products of pairs of it to float sums.
template <class S> struct operand { using type = compute_t<S>; };
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
#define SPARSEFFN_PAIRS 1
template <> struct operand<bf16> { using type = bf16; };
#endif
template <class S> using operand_t = typename operand<S>::type;

template <class C> struct vector_of;
template <> struct vector_of<float> { typedef float type __attribute__((vector_size(kBytes))); };
template <> struct vector_of<double> { typedef double type __attribute__((vector_size(kBytes))); };
template <class C> using Vec = typename vector_of<C>::type;
template <class C> constexpr int kLanes = kBytes / static_cast<int>(sizeof(C));

template <class C> inline Vec<C> load(const C* p) {
    Vec<C> v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

typedef uint16_t Bits16 __attribute__((vector_size(kBytes / 2)));
typedef uint32_t Bits32 __attribute__((vector_size(kBytes)));

inline Vec<float> load(const bf16* p) {
    Bits16 h;
    __builtin_memcpy(&h, p, sizeof h);
    const Bits32 w = __builtin_convertvector(h, Bits32) << 16;
    Vec<float> v;
    __builtin_memcpy(&v, &w, sizeof v);
    return v;
}

// The bits of a float16 as a float: moved to its place the exponent is 112 too small, and a product sets that right for
// subnormal numbers too; infinity and NaN get the highest exponent.
inline float upcast(half x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
    float f;
    std::memcpy(&f, &bits, sizeof f);
    f *= 0x1p112f;
    uint32_t wide;
    std::memcpy(&wide, &f, sizeof wide);
    wide |= (bits >= 0x0f800000u ? 0x7f800000u : 0u) | static_cast<uint32_t>(x.bits & 0x8000u) << 16;
    std::memcpy(&f, &wide, sizeof f);
    return f;
}

inline Vec<float> load(const half* p) {
#if defined(__AVX512F__)
    return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
    return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    float lanes[kLanes<float>];
    for (int q = 0; q < kLanes<float>; ++q) lanes[q] = upcast(p[q]);
    return load(lanes);
#endif
}

template <class C> inline void store(C* p, Vec<C> v) { __builtin_memcpy(p, &v, sizeof v); }

// Bytes of a result that is not read again from which on it is written past the caches, and its memory not read first. Measured on two
// cores, the backward of 512 tokens: on tiles (Xeon, family 6, model 167) 0.7 of the time with 805 MB of gradients, in pages of 2 MiB,
// 0.6 with 100 MB, 0.8 with 8 MB.
constexpr int64_t kStreamed = int64_t(1) << 20;

#if defined(__AVX__)
constexpr bool kStreams = true;
// v at p, a multiple of a register, past the caches. What is written so is in no order with what follows, until `end_streams`.
template <class C> inline void stream(C* p, Vec<C> v) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(p), reinterpret_cast<__m512i>(v));
#else
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), reinterpret_cast<__m256i>(v));
#endif
}
inline void end_streams() { _mm_sfence(); }
#else
constexpr bool kStreams = false;
template <class C> inline void stream(C* p, Vec<C> v) { store(p, v); }
inline void end_streams() {}
#endif

template <class C> inline Vec<C> splat(C x) { return x - Vec<C>{}; }

inline float upcast(float x) { return x; }
inline double upcast(double x) { return x; }
inline float upcast(bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}

// Rounds to nearest, ties to even; a NaN stays one.
template <class S> inline S narrow(compute_t<S> x) { return x; }
template <> inline bf16 narrow<bf16>(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    return bf16{static_cast<uint16_t>(x == x ? rounded : (bits >> 16) | 0x40u)};
}
template <> inline half narrow<half>(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    const uint32_t sign = bits >> 16 & 0x8000u, size = bits & 0x7fffffffu;
    // A subnormal number: 0.5 in front of it leaves the bits that remain at the end of the sum.
    float low;
    std::memcpy(&low, &size, sizeof low);
    low += 0.5f;
    uint32_t subnormal;
    std::memcpy(&subnormal, &low, sizeof subnormal);
    const uint32_t normal = (size - 0x38000000u + 0xfffu + (size >> 13 & 1u)) >> 13;
    const uint32_t infinite = size > 0x7f800000u ? 0x7e00u : 0x7c00u;
    const uint32_t found = size >= 0x47800000u ? infinite : size < 0x38800000u ? subnormal - 0x3f000000u : normal;
    return half{static_cast<uint16_t>(found | sign)};
}

// Calls f with a null pointer of the storage type that a code stands for: 0 float, 1 double, 2 bfloat16, 3 float16.
template <class F> void with_type(int code, F&& f) {
    if (code == 0) f(static_cast<float*>(nullptr));
    else if (code == 1) f(static_cast<double*>(nullptr));
    else if (code == 2) f(static_cast<bf16*>(nullptr));
    else f(static_cast<half*>(nullptr));
}

}  // namespace sparseffn
