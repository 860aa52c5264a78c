// Top-K with ties to the lowest index, and the exact top-K of product keys.
//
// A float is mapped to an integer that sorts alike. The K-th largest is found by halving the interval of integers and counting,
// which the compiler vectorises: about 30 passes over a row in the first-level cache, whatever K is.
#include <vector>

#include "parallel.h"

#include <cstring>
#include <limits>

namespace sparseffn {
namespace {

template <class C> struct key_of;
template <> struct key_of<float> { using type = int32_t; };
template <> struct key_of<double> { using type = int64_t; };
template <class C> using Key = typename key_of<C>::type;

// Adding 0 turns -0 into 0, which must tie with it; the magnitude bits of negative numbers count backwards.
template <class C> inline Key<C> sortable(C x) {
    const C plain = x + C(0);
    Key<C> bits;
    std::memcpy(&bits, &plain, sizeof bits);
    return bits ^ ((bits >> (8 * sizeof(C) - 1)) & std::numeric_limits<Key<C>>::max());
}

template <class K> inline int64_t count_above(const K* keys, int64_t n, K level) {
    K count = 0;
    for (int64_t i = 0; i < n; ++i) count += keys[i] > level;
    return count;
}

// Positions of the k largest keys, ascending.
template <class K> void select(const K* keys, int64_t n, int64_t k, int64_t* chosen) {
    K low = keys[0], high = keys[0];
    for (int64_t i = 1; i < n; ++i) {
        low = std::min(low, keys[i]);
        high = std::max(high, keys[i]);
    }
    // The smallest level that at most k keys exceed; most rows end early, at one that exactly k exceed.
    int64_t above = k;
    bool exact = false;
    while (low < high) {
        const K middle = static_cast<K>(low + static_cast<K>((static_cast<std::make_unsigned_t<K>>(high) -
                                                             static_cast<std::make_unsigned_t<K>>(low)) / 2));
        above = count_above(keys, n, middle);
        if (above == k) {
            low = high = middle;
            exact = true;
        } else if (above > k) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    int64_t ties = exact ? 0 : k - count_above(keys, n, high), found = 0;
    for (int64_t i = 0; i < n && found < k; ++i) {
        const bool take = keys[i] > high || (keys[i] == high && ties > 0);
        ties -= take && keys[i] == high;
        chosen[found] = i;
        found += take;
    }
}

// Sorts positions by descending key, ties to the lower position; positions come in ascending.
template <class K> void sort_descending(const K* keys, int64_t* chosen, int64_t k) {
    std::stable_sort(chosen, chosen + k, [&](int64_t a, int64_t b) { return keys[a] > keys[b]; });
}

// A few best of a short row, in order, by insertion: the case of routers.
template <class K> void insert_best(const K* keys, int64_t n, int64_t k, int64_t* chosen) {
    int64_t found = 0;
    for (int64_t i = 0; i < n; ++i) {
        if (found == k && keys[i] <= keys[chosen[k - 1]]) continue;
        int64_t at = found < k ? found++ : k - 1;
        for (; at > 0 && keys[chosen[at - 1]] < keys[i]; --at) chosen[at] = chosen[at - 1];
        chosen[at] = i;
    }
}

template <class K> void best(const K* keys, int64_t n, int64_t k, bool ordered, int64_t* chosen) {
    constexpr int64_t kShort = 16;
    if (k == 0) return;
    if (k <= kShort) return insert_best(keys, n, k, chosen);
    select(keys, n, k, chosen);
    if (ordered) sort_descending(keys, chosen, k);
}

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
