// The K largest of a row, ties to the lowest position.
//
// A float is mapped to an integer that sorts alike. The K-th largest is found by halving the interval of integers and counting,
// which the compiler vectorises: about 30 passes over a row in the first-level cache, whatever K is.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace sparseffn {

template <class C> struct key_of;
template <> struct key_of<float> { using type = int32_t; };
template <> struct key_of<double> { using type = int64_t; };
template <class C> using Key = typename key_of<C>::type;

// Adding 0 turns -0 into 0, which must tie with it; the magnitude bits of negative numbers count backwards.
template <class C> inline Key<C> sortable(C x) {
    // A NaN of either sign comes first, so that what it is chosen for shows it.
    if (x != x) return std::numeric_limits<Key<C>>::max();
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
template <class K> inline void select(const K* keys, int64_t n, int64_t k, int64_t* chosen) {
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
template <class K> inline void sort_descending(const K* keys, int64_t* chosen, int64_t k) {
    std::stable_sort(chosen, chosen + k, [&](int64_t a, int64_t b) { return keys[a] > keys[b]; });
}

// A few best of a short row, in order, by insertion: the case of routers. Blocks without a candidate are passed over.
template <class K> inline void insert_best(const K* keys, int64_t n, int64_t k, int64_t* chosen) {
    constexpr int64_t kBlock = 16;
    int64_t found = 0;
    const auto offer = [&](int64_t i) {
        if (found == k && keys[i] <= keys[chosen[k - 1]]) return;
        int64_t at = found < k ? found++ : k - 1;
        for (; at > 0 && keys[chosen[at - 1]] < keys[i]; --at) chosen[at] = chosen[at - 1];
        chosen[at] = i;
    };
    int64_t i = 0;
    while (i < n && found < k) offer(i++);
    for (; i + kBlock <= n; i += kBlock) {
        const K worst = keys[chosen[k - 1]];
        bool any = false;
        for (int64_t j = 0; j < kBlock; ++j) any |= keys[i + j] > worst;
        if (any)
            for (int64_t j = 0; j < kBlock; ++j) offer(i + j);
    }
    for (; i < n; ++i) offer(i);
}

template <class K> inline void best(const K* keys, int64_t n, int64_t k, bool ordered, int64_t* chosen) {
    constexpr int64_t kShort = 16;
    if (k == 0) return;
    if (k <= kShort) return insert_best(keys, n, k, chosen);
    select(keys, n, k, chosen);
    if (ordered) sort_descending(keys, chosen, k);
}

}  // namespace sparseffn
