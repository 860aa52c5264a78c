// Vectors of one machine register, and the storage types that are loaded into them. GCC's and Clang's vector extension
// serves every instruction set; -march=native decides which one.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace sparseffn {

// Shape of a product tile: kRows x (kVectors registers) accumulators, a row of B and one broadcast must fit the register
// file. AVX-512 and NEON have 32 registers, AVX2 and SSE have 16.
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

// Values are computed in C: float for float and bfloat16 storage, double for double.
template <class S> struct compute { using type = S; };
template <> struct compute<bf16> { using type = float; };
template <class S> using compute_t = typename compute<S>::type;

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

inline Vec<float> load(const bf16* p) {
    typedef uint16_t half __attribute__((vector_size(kBytes / 2)));
    typedef uint32_t wide __attribute__((vector_size(kBytes)));
    half h;
    __builtin_memcpy(&h, p, sizeof h);
    const wide w = __builtin_convertvector(h, wide) << 16;
    Vec<float> v;
    __builtin_memcpy(&v, &w, sizeof v);
    return v;
}

template <class C> inline void store(C* p, Vec<C> v) { __builtin_memcpy(p, &v, sizeof v); }

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

// Calls f with a null pointer of the storage type that a code stands for: 0 float, 1 double, 2 bfloat16.
template <class F> void with_type(int code, F&& f) {
    if (code == 0) f(static_cast<float*>(nullptr));
    else if (code == 1) f(static_cast<double*>(nullptr));
    else f(static_cast<bf16*>(nullptr));
}

}  // namespace sparseffn
