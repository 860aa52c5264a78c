// y = x W^T for the selector: W [outputs, width] is turned once, then every thread takes a block of tokens.
#include <vector>

#include "product.h"
#include "parallel.h"

namespace sparseffn {
namespace {

constexpr int64_t kChunk = 192;

template <class C>
void linear(const C* x, const C* w, int64_t tokens, int64_t width, int64_t outputs, int threads, C* y) {
    Buffer<C> turned(width * outputs);
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (int64_t d = 0; d < width; ++d)
            for (int64_t o = 0; o < outputs; ++o) turned[d * outputs + o] = w[o * width + d];
        Buffer<C> padded(padded_size<C>(width));
        std::vector<const C*> rows(kChunk);
        const Range own = part_of(tokens, omp_get_thread_num(), omp_get_num_threads());
        for (int64_t first = own.begin; first < own.end; first += kChunk) {
            const int64_t n = std::min(kChunk, own.end - first);
            for (int64_t i = 0; i < n; ++i) rows[i] = x + (first + i) * width;
            product<C, C>(rows.data(), n, turned.data(), outputs, width, outputs, padded.data(), Fetch{},
                          [&](int64_t i, int64_t column, int columns, const auto& acc) {
                              put(y + (first + i) * outputs + column, acc, columns);
                          });
        }
    }
}

}  // namespace
}  // namespace sparseffn

using namespace sparseffn;

// sizes: tokens, width, outputs, threads.
extern "C" void sparseffn_linear(int dtype, const void* x, const void* w, const int64_t* sizes, void* y) {
    const auto run = [&](auto* tag) {
        using C = std::remove_pointer_t<decltype(tag)>;
        linear(static_cast<const C*>(x), static_cast<const C*>(w), sizes[0], sizes[1], sizes[2],
               static_cast<int>(sizes[3]), static_cast<C*>(y));
    };
    if (dtype == 0) run(static_cast<float*>(nullptr));
    else run(static_cast<double*>(nullptr));
}
