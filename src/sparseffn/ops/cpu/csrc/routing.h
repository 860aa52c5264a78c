// Rows of a selection sorted by expert.
#pragma once

#include "parallel.h"

namespace sparseffn {

// Row r of the sorted order is selection order[r] = token * k + slot; expert e owns rows offsets[e]..offsets[e + 1].
struct Routing {
    const int64_t* order;
    const int64_t* offsets;
    int64_t tokens, experts, k;

    int64_t rows() const { return tokens * k; }
    int64_t token(int64_t row) const { return order[row] / k; }

    // Rows of an expert whose tokens lie in a range; tokens ascend within an expert.
    Range rows_of(int64_t expert, Range tokens_in) const {
        const auto row_at = [&](int64_t token) {
            const int64_t* first = order + offsets[expert];
            return std::lower_bound(first, order + offsets[expert + 1], token * k) - order;
        };
        return {row_at(tokens_in.begin), row_at(tokens_in.end)};
    }
};

// Stable counting sort; false if an index is not that of an expert.
inline bool sort_by_expert(const int64_t* indices, int64_t rows, int64_t experts, int64_t* order, int64_t* offsets) {
    std::fill(offsets, offsets + experts + 1, 0);
    for (int64_t r = 0; r < rows; ++r) {
        if (indices[r] < 0 || indices[r] >= experts) return false;
        ++offsets[indices[r] + 1];
    }
    for (int64_t e = 0; e < experts; ++e) offsets[e + 1] += offsets[e];
    Buffer<int64_t> next(experts);
    std::copy(offsets, offsets + experts, next.data());
    for (int64_t r = 0; r < rows; ++r) order[next[indices[r]]++] = r;
    return true;
}

}  // namespace sparseffn
