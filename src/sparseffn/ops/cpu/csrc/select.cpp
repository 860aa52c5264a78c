// Top-K with ties to the lowest index, and the exact top-K of product keys.
#include <vector>

#include "parallel.h"
#include "select.h"

namespace sparseffn {
namespace {

template <class C> void topk(const C* scores, int64_t rows, int64_t n, int64_t k, bool ordered, int threads, int64_t* out) {
#pragma omp parallel num_threads(threads) if (rows * n > 4096)
    {
        Buffer<Key<C>> keys(n);
        Buffer<int64_t> chosen(k + 1);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) {
            for (int64_t i = 0; i < n; ++i) keys[i] = sortable(scores[r * n + i]);
            best(keys.data(), n, k, ordered, chosen.data());
            std::copy(chosen.data(), chosen.data() + k, out + r * k);
        }
    }
}

// With both halves sorted, a pair of ranks (i, j) has (i + 1)(j + 1) - 1 pairs before it with no smaller sum: only pairs with
// (i + 1)(j + 1) <= k can be among the k largest.
template <class C>
void product_keys(const C* a, const C* b, int64_t rows, int64_t n_a, int64_t n_b, int64_t k, int threads, C* sums,
                  int64_t* indices) {
    const int64_t most_a = std::min(k, n_a), most_b = std::min(k, n_b);
    std::vector<std::pair<int32_t, int32_t>> pairs;
    for (int64_t j = 0; j < most_b; ++j)
        for (int64_t i = 0; i < most_a && (i + 1) * (j + 1) <= k; ++i) pairs.push_back({i, j});
    const int64_t n = static_cast<int64_t>(pairs.size());
#pragma omp parallel num_threads(threads) if (rows * n > 1024)
    {
        Buffer<Key<C>> keys(std::max({n, n_a, n_b}));
        Buffer<int64_t> top_a(most_a + 1), top_b(most_b + 1), chosen(k + 1);
        Buffer<C> values(n);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; ++r) {
            const C *row_a = a + r * n_a, *row_b = b + r * n_b;
            for (int64_t i = 0; i < n_a; ++i) keys[i] = sortable(row_a[i]);
            best(keys.data(), n_a, most_a, true, top_a.data());
            for (int64_t i = 0; i < n_b; ++i) keys[i] = sortable(row_b[i]);
            best(keys.data(), n_b, most_b, true, top_b.data());
            for (int64_t p = 0; p < n; ++p) {
                values[p] = row_b[top_b[pairs[p].second]] + row_a[top_a[pairs[p].first]];
                keys[p] = sortable(values[p]);
            }
            best(keys.data(), n, k, true, chosen.data());
            for (int64_t q = 0; q < k; ++q) {
                const auto [i, j] = pairs[chosen[q]];
                sums[r * k + q] = values[chosen[q]];
                indices[r * k + q] = top_b[j] * n_a + top_a[i];
            }
        }
    }
}

}  // namespace
}  // namespace sparseffn

using namespace sparseffn;

extern "C" {

// sizes: rows, n, k, ordered, threads.
void sparseffn_topk(int dtype, const void* scores, const int64_t* sizes, int64_t* out) {
    const auto run = [&](auto* s) { topk(s, sizes[0], sizes[1], sizes[2], sizes[3] != 0, static_cast<int>(sizes[4]), out); };
    if (dtype == 0) run(static_cast<const float*>(scores));
    else run(static_cast<const double*>(scores));
}

// sizes: rows, n_a, n_b, k, threads.
void sparseffn_product_key_topk(int dtype, const void* a, const void* b, const int64_t* sizes, void* sums,
                                int64_t* indices) {
    const auto run = [&](auto* tag) {
        using C = std::remove_pointer_t<decltype(tag)>;
        product_keys(static_cast<const C*>(a), static_cast<const C*>(b), sizes[0], sizes[1], sizes[2], sizes[3],
                     static_cast<int>(sizes[4]), static_cast<C*>(sums), indices);
    };
    if (dtype == 0) run(static_cast<float*>(nullptr));
    else run(static_cast<double*>(nullptr));
}
}
