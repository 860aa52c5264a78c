// The K largest of a row, ties to the lowest position.
//
// A float is mapped to an integer that sorts alike. The K-th largest is found by parting the integers at a level, again and
// again, until those left are equal: a pass keeps the side that the K-th lies on, so that all passes together read a row a few
// times. Parting is a compress-store where the processor has one.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace sparseffn {

template <class C> struct key_of;
template <> struct key_of<float> { using type = int32_t; };
template <> struct key_of<double> { using type = int64_t; };
template <class C> using Key = typename key_of<C>::type;

// Turns the magnitude bits of negative numbers around: from bits to keys and back.
template <class K> inline K turned(K bits) { return bits ^ ((bits >> (8 * sizeof(K) - 1)) & std::numeric_limits<K>::max()); }

// Adding 0 turns -0 into 0, which must tie with it; the magnitude bits of negative numbers count backwards.
template <class C> inline Key<C> sortable(C x) {
    const C plain = x + C(0);
    Key<C> bits;
    std::memcpy(&bits, &plain, sizeof bits);
    // A NaN of either sign comes first, so that what it is chosen for shows it.
    return x != x ? std::numeric_limits<Key<C>>::max() : turned(bits);
}

// Room beyond a list's end that parting may write.
constexpr int64_t kSlack = 16;

// Copies keys above a level to `up`, the others to `down`, each with kSlack elements to spare; returns how many are above.
template <class K> inline int64_t part_at(const K* keys, int64_t n, K level, K* up, K* down) {
    int64_t above = 0, below = 0, i = 0;
#if defined(__AVX512F__)
    if constexpr (sizeof(K) == 4) {
        const __m512i at = _mm512_set1_epi32(level);
        for (; i < n; i += 16) {
            const auto valid = static_cast<__mmask16>(n - i >= 16 ? 0xFFFF : (1 << (n - i)) - 1);
            const __m512i v = _mm512_maskz_loadu_epi32(valid, keys + i);
            const __mmask16 over = _mm512_mask_cmpgt_epi32_mask(valid, v, at);
            const auto rest = static_cast<__mmask16>(valid & ~over);
            _mm512_storeu_si512(up + above, _mm512_maskz_compress_epi32(over, v));
            _mm512_storeu_si512(down + below, _mm512_maskz_compress_epi32(rest, v));
            const int count = __builtin_popcount(over);
            above += count;
            below += __builtin_popcount(valid) - count;
        }
        return above;
    }
#endif
    for (; i < n; ++i) {
        const bool over = keys[i] > level;
        up[above] = down[below] = keys[i];
        above += over;
        below += !over;
    }
    return above;
}

// What is chosen: all keys above a level, and so many of those at it, from the lowest position.
template <class K> struct Cut {
    K level;
    int64_t ties;
};

// A level between two keys by their values, which lie closer to each other than their exponents.
template <class K> inline K middle_value(K low, K high) {
    using C = std::conditional_t<sizeof(K) == 4, float, double>;
    C a, b;
    const K low_bits = turned(low), high_bits = turned(high);
    std::memcpy(&a, &low_bits, sizeof a);
    std::memcpy(&b, &high_bits, sizeof b);
    const K found = sortable(a / 2 + b / 2);
    // Of infinities and NaN there is no middle.
    return found >= low && found < high ? found : low;
}
template <class K> inline K middle_bits(K low, K high) {
    using U = std::make_unsigned_t<K>;
    return static_cast<K>(static_cast<U>(low) + (static_cast<U>(high) - static_cast<U>(low)) / 2);
}

// Finds cuts in rows of up to `most` keys. Made before threads start, as all that takes memory; for rows of no keys it takes none.
template <class K> class Cutter {
  public:
    explicit Cutter(int64_t most) {
        for (auto& buffer : buffers_) buffer.resize(most ? most + kSlack : 0);
    }

    Cut<K> cut(const K* keys, int64_t n, int64_t k) {
        K low = keys[0], high = keys[0];
        for (int64_t i = 1; i < n; ++i) {
            low = std::min(low, keys[i]);
            high = std::max(high, keys[i]);
        }
        int held = 2;
        // By value and by bits in turns: the first is quick on usual rows, the second bounds the passes on any.
        for (bool by_value = true; low < high; by_value = !by_value) {
            const K level = by_value ? middle_value(low, high) : middle_bits(low, high);
            K *up = buffers_[(held + 1) % 3].data(), *down = buffers_[(held + 2) % 3].data();
            const int64_t above = part_at(keys, n, level, up, down);
            if (above == k) return {level, 0};
            const bool higher = above > k;
            held = (held + (higher ? 1 : 2)) % 3;
            keys = higher ? up : down;
            n = higher ? above : n - above;
            if (!higher) k -= above;
            (higher ? low : high) = higher ? level + 1 : level;
        }
        return {high, k};
    }

  private:
    std::vector<K> buffers_[3];
};

// Positions of what was cut off, ascending, with kSlack elements to spare.
template <class K> inline void chosen_by(const Cut<K>& cut, const K* keys, int64_t n, int32_t* chosen) {
    int64_t found = 0, ties = cut.ties, i = 0;
#if defined(__AVX512F__)
    if constexpr (sizeof(K) == 4) {
        const __m512i level = _mm512_set1_epi32(cut.level), step = _mm512_set1_epi32(16);
        __m512i at = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        for (; i < n; i += 16, at = _mm512_add_epi32(at, step)) {
            const auto valid = static_cast<__mmask16>(n - i >= 16 ? 0xFFFF : (1 << (n - i)) - 1);
            const __m512i v = _mm512_maskz_loadu_epi32(valid, keys + i);
            unsigned take = _mm512_mask_cmpgt_epi32_mask(valid, v, level);
            if (ties > 0) {
                unsigned equal = _mm512_mask_cmpeq_epi32_mask(valid, v, level);
                while (__builtin_popcount(equal) > ties) equal &= ~(0x80000000u >> __builtin_clz(equal));
                take |= equal;
                ties -= __builtin_popcount(equal);
            }
            _mm512_storeu_si512(chosen + found, _mm512_maskz_compress_epi32(static_cast<__mmask16>(take), at));
            found += __builtin_popcount(take);
        }
        return;
    }
#endif
    for (; i < n; ++i) {
        const bool tie = keys[i] == cut.level && ties > 0;
        chosen[found] = static_cast<int32_t>(i);
        found += keys[i] > cut.level || tie;
        ties -= tie;
    }
}

// Which of up to kOffered keys lie above a level, as bits.
constexpr int64_t kOffered = 16;
template <class K> inline unsigned bits_above(const K* keys, int64_t n, K level) {
#if defined(__AVX512F__)
    if constexpr (sizeof(K) == 4) {
        const auto valid = static_cast<__mmask16>((1u << std::min(n, kOffered)) - 1);
        return _mm512_mask_cmpgt_epi32_mask(valid, _mm512_maskz_loadu_epi32(valid, keys), _mm512_set1_epi32(level));
    }
#endif
    unsigned bits = 0;
    for (int64_t j = 0; j < std::min(n, kOffered); ++j) bits |= static_cast<unsigned>(keys[j] > level) << j;
    return bits;
}

// A few best of a short row, in order, by insertion: the case of routers. What is no candidate is passed over.
template <class K, class I> inline void insert_best(const K* keys, int64_t n, int64_t k, I* chosen) {
    int64_t found = 0;
    const auto offer = [&](int64_t i) {
        if (found == k && keys[i] <= keys[chosen[k - 1]]) return;
        int64_t at = found < k ? found++ : k - 1;
        for (; at > 0 && keys[chosen[at - 1]] < keys[i]; --at) chosen[at] = chosen[at - 1];
        chosen[at] = static_cast<I>(i);
    };
    int64_t i = 0;
    while (i < n && found < k) offer(i++);
    for (; i < n; i += kOffered)
        for (unsigned bits = bits_above(keys + i, n - i, keys[chosen[k - 1]]); bits; bits &= bits - 1)
            offer(i + __builtin_ctz(bits));
}

// Sorts positions by descending key, ties to the lower position. A stable sort would take memory.
template <class K, class I> inline void sort_descending(const K* keys, I* chosen, int64_t k) {
    std::sort(chosen, chosen + k, [&](I a, I b) { return keys[a] > keys[b] || (keys[a] == keys[b] && a < b); });
}

// Up to so many are found by insertion.
constexpr int64_t kShort = 16;

// Finds the largest of up to `most` keys, up to `most_chosen` of them.
template <class K> class Selector {
  public:
    Selector(int64_t most, int64_t most_chosen) : cutter_(most), found_(most ? most_chosen + kSlack : 0) {}
    // One that `best` alone is asked of, which needs nothing for a few.
    static Selector of_best(int64_t most, int64_t k) { return Selector(k > kShort ? most : 0, k); }

    // Positions of the k largest keys, ascending; the selector's own, until it is asked again.
    int32_t* ascending(const K* keys, int64_t n, int64_t k) {
        chosen_by(cutter_.cut(keys, n, k), keys, n, found_.data());
        return found_.data();
    }

    // The same into `chosen`, by descending key if wanted, ties to the lower position.
    template <class I> void best(const K* keys, int64_t n, int64_t k, bool ordered, I* chosen) {
        if (k == 0) return;
        if (k <= kShort) return insert_best(keys, n, k, chosen);
        std::copy_n(ascending(keys, n, k), k, chosen);
        if (ordered) sort_descending(keys, chosen, k);
    }

  private:
    Cutter<K> cutter_;
    std::vector<int32_t> found_;
};

}  // namespace sparseffn
