// Blocks of key-value pairs in float and double, and the two selections.
#include "product_keys.h"
#include "topk_backward.h"

namespace sparseffn {

template void sum_rows<float>(const Table<float>&, float*);
template void row_gradients<float>(const Table<float>&, const float*, float*, compute_t<float>*);
template void topk_forward<float>(const TopK<float>&, float*);
template void topk_backward<float>(const TopK<float>&, const TopKGradients<float>&);
template void product_keys_forward<float>(const ProductKeys<float>&, float*);
template void product_keys_backward<float>(const ProductKeys<float>&, const float*, const float*, float*, compute_t<float>*, compute_t<float>*);

template void sum_rows<double>(const Table<double>&, double*);
template void row_gradients<double>(const Table<double>&, const double*, double*, compute_t<double>*);
template void topk_forward<double>(const TopK<double>&, double*);
template void topk_backward<double>(const TopK<double>&, const TopKGradients<double>&);
template void product_keys_forward<double>(const ProductKeys<double>&, double*);
template void product_keys_backward<double>(const ProductKeys<double>&, const double*, const double*, double*, compute_t<double>*, compute_t<double>*);

template <class C> void topk(const C* scores, int64_t rows, int64_t n, int64_t k, bool ordered, int threads, int64_t* out) {
    struct Space {
        Buffer<Key<C>> keys;
        Selector<Key<C>> selector;
    };
    std::vector<Space> spaces;
    for (int t = 0; t < threads; ++t) spaces.push_back({Buffer<Key<C>>(n), Selector<Key<C>>::of_best(n, k)});
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * n > 4096)
    for (int64_t r = 0; r < rows; ++r) {
        Space& ws = spaces[omp_get_thread_num()];
        for (int64_t i = 0; i < n; ++i) ws.keys[i] = sortable(scores[r * n + i]);
        ws.selector.best(ws.keys.data(), n, k, ordered, out + r * k);
    }
}
template void topk<float>(const float*, int64_t, int64_t, int64_t, bool, int, int64_t*);
template void topk<double>(const double*, int64_t, int64_t, int64_t, bool, int, int64_t*);

template <class C>
void product_keys(const C* a, const C* b, int64_t rows, int64_t n_a, int64_t n_b, int64_t k, int threads, C* sums,
                  int64_t* indices) {
    std::vector<BestSums<C>> best;
    for (int t = 0; t < threads; ++t) best.emplace_back(n_a, n_b, k);
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * k > 1024)
    for (int64_t r = 0; r < rows; ++r)
        best[omp_get_thread_num()].find(a + r * n_a, b + r * n_b, true, [&](int64_t q, C sum, int64_t index) {
            sums[r * k + q] = sum;
            indices[r * k + q] = index;
        });
}
template void product_keys<float>(const float*, const float*, int64_t, int64_t, int64_t, int64_t, int, float*, int64_t*);
template void product_keys<double>(const double*, const double*, int64_t, int64_t, int64_t, int64_t, int, double*, int64_t*);

}  // namespace sparseffn
