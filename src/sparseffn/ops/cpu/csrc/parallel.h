// Threads of the OpenMP runtime that PyTorch uses: a second runtime would compete with it for the same cores.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include "large_pages.h"
#include "vectors.h"

namespace sparseffn {

// Part `index` of `parts` nearly equal parts of 0..n.
struct Range {
    int64_t begin, end;
};
inline Range part_of(int64_t n, int index, int parts) { return {n * index / parts, n * (index + 1) / parts}; }

// Pieces of work in one run of neighbours for each thread, as equal as the pieces allow.
struct Runs {
    std::vector<int64_t> first;  // run r has pieces first[r]..first[r + 1]
    double imbalance = 0;        // the longest run's work over the mean

    // The pieces of a thread; a team may be smaller than was asked for.
    Range of(int thread, int team) const {
        const Range runs = part_of(static_cast<int64_t>(first.size()) - 1, thread, team);
        return {first[runs.begin], first[runs.end]};
    }
};

inline Runs runs_of(const std::vector<int64_t>& work, int threads) {
    const auto sum_of = [&](int64_t more) {
        std::vector<int64_t> sums{0};
        for (const int64_t piece : work) sums.push_back(sums.back() + piece + more);
        return sums;
    };
    std::vector<int64_t> sums = sum_of(0);
    // Pieces without work are still to be done.
    if (sums.back() == 0) sums = sum_of(1);
    const double mean = static_cast<double>(sums.back()) / threads;
    Runs runs;
    for (int t = 0; t <= threads; ++t) {
        // The edge nearest to an equal share.
        auto edge = std::lower_bound(sums.begin(), sums.end(), static_cast<int64_t>(mean * t));
        if (edge != sums.begin() && edge != sums.end() && mean * t - *(edge - 1) < *edge - mean * t) --edge;
        runs.first.push_back(std::min<int64_t>(edge - sums.begin(), static_cast<int64_t>(work.size())));
    }
    for (int t = 0; t < threads; ++t)
        runs.imbalance = std::max(runs.imbalance, (sums[runs.first[t + 1]] - sums[runs.first[t]]) / mean);
    return runs;
}

// Memory without the zeros of std::vector. Tests compile with SPARSEFFN_POISON, so that what is read unwritten shows: all bits
// set are NaN in every floating type and -1 in every signed one. It begins at a line of memory: two lines a load take longer.
template <class T> class Buffer {
  public:
    explicit Buffer(int64_t n) : data_(static_cast<T*>(::operator new(std::max<int64_t>(n, 1) * sizeof(T), kAlignment))) {
        want_large_pages(data_.get(), n * sizeof(T));
#ifdef SPARSEFFN_POISON
        std::memset(static_cast<void*>(data_.get()), 0xFF, std::max<int64_t>(n, 1) * sizeof(T));
#endif
    }
    T* data() { return data_.get(); }
    const T* data() const { return data_.get(); }
    T& operator[](int64_t i) { return data_[i]; }
    const T& operator[](int64_t i) const { return data_[i]; }

  private:
    static_assert(std::is_trivial_v<T>);
    static constexpr std::align_val_t kAlignment{kLine};
    struct Free {
        void operator()(T* data) const { ::operator delete(data, kAlignment); }
    };
    std::unique_ptr<T[], Free> data_;
};

// Made before threads start: what one of them could not get would end the process.
template <class W, class... A> std::vector<W> one_for_each_thread(int threads, const A&... arguments) {
    std::vector<W> all;
    all.reserve(threads);
    for (int t = 0; t < threads; ++t) all.emplace_back(arguments...);
    return all;
}

}  // namespace sparseffn
