// The whole expert computation of a mixture and its backward:
//
//     y[t] = sum over selections (e, s) of token t:  s * (a values[e] + value_bias[e]),
//     a = drop * act(x[t] keys[e] + key_bias[e]),  gated times x[t] gate_keys[e] + gate_bias[e]
//
// Many tokens: each thread owns a block of tokens and goes through all experts, so that it alone adds to its tokens' outputs.
// Few tokens: each thread owns some experts and reads their weights once; its outputs are added up afterwards. Either way the
// order of every sum is fixed by the routing, the number of threads and which units are zero: results are the same from run to
// run.
#pragma once

#include <vector>

#include "experts_panels.h"
#include "hidden.h"
#include "upcast.h"

namespace sparseffn {

// Up to this many rows an expert, on average, threads divide experts instead of tokens. Up to kSomeRows they do where that
// leaves none of them waiting long: measured cold on two cores, 16 and 32 rows an expert take 11% to 46% less so, 64 rows
// 9% to 18% less where an expert has 1.6 or 6.3 million numbers and as long where it has fewer, 128 up to 4% more.
constexpr int64_t kFewRows = 12, kSomeRows = 96;
// How much longer than the mean a thread's part may be.
constexpr double kImbalance = 1.25;
// An expert's weights cost as much as a few rows, once.
constexpr int64_t kWeightsAsRows = 8;

// Up to this many rows that a thread has of an expert, only the values of units that are not zero for all of them are read:
// after ReLU half of a row's are. Measured cold with ReLU, 16 experts of 128 units: one token 17% less, 8 tokens 4%.
constexpr int kSparseRows = 3;

// Units that are not zero for all of n rows.
template <class S> void find_active(int64_t n, int64_t size, const compute_t<S>* units, Workspace<S>& ws) {
    ws.active.clear();
    for (int64_t g = 0; g < size; ++g) {
        bool any = false;
        for (int64_t i = 0; i < n; ++i) any |= units[i * size + g] != compute_t<S>(0);
        if (any) ws.active.push_back(g);
    }
}

// to[i] += units[i] B, where B's rows are lines.
template <class S>
void down_active(const Matrix<S>& b, int64_t n, int64_t size, int64_t width, const compute_t<S>* units, Workspace<S>& ws) {
    using C = compute_t<S>;
    find_active(n, size, units, ws);
#if defined(SPARSEFFN_PAIRS)
    if constexpr (Workspace<S>::kNarrows) {
        const int64_t count = static_cast<int64_t>(ws.active.size());
        for (int64_t i = 0; i < n; ++i) {
            ws.rows[i] = ws.operands.data() + i * size;
            for (int64_t q = 0; q < count; ++q) ws.operands[i * size + q] = narrow<S>(units[i * size + ws.active[q]]);
        }
        return product_lines(ws.rows.data(), n, count, width, ws.to.data(),
                             [&](int64_t k) { return b.at(ws.active[k], 0); });
    }
#endif
    for (int64_t i = 0; i < n; ++i) ws.wide[i] = units + i * size;
    with_constant<kSparseRows>(static_cast<int>(n), [&](auto r) {
        add_listed<C, S, decltype(r)::value>(ws.wide.data(), b.data, b.row, width, ws.active, ws.to.data());
    });
}

template <class S>
void add_value_bias(const Problem<S>& p, int64_t expert, Range rows, compute_t<S>* y) {
    for (int64_t r = rows.begin; r < rows.end; ++r) {
        const compute_t<S> gate = p.gates[p.routing.order[r]];
        compute_t<S>* to = y + p.routing.token(r) * p.width;
        for (int64_t c = 0; c < p.width; ++c) to[c] += gate * upcast(p.value_bias[expert * p.width + c]);
    }
}

// Whether n rows of an expert take only the values of units that are not zero.
template <class S> bool takes_active(const Problem<S>& p, int64_t n) {
    return n <= kSparseRows && p.width >= kLanes<compute_t<S>> && p.values.column == 1;
}

// y[token] += a values[expert], for rows of one expert and some of its units, which are side by side in `units`; another expert
// follows. `a` are the same as they are multiplied.
template <class S, class A>
void down(const Problem<S>& p, int64_t expert, Range rows, Range units, const A* const* a, const compute_t<S>* wide,
          Workspace<S>& ws, compute_t<S>* y, bool once = false) {
    const int64_t n = rows.end - rows.begin, size = units.end - units.begin;
    const Matrix<S> values = p.values.of(expert).from(units.begin, 0);
    if (p.value_bias && units.begin == 0) add_value_bias(p, expert, rows, y);
    for (int64_t i = 0; i < n; ++i) ws.to[i] = y + p.routing.token(rows.begin + i) * p.width;
    if (takes_active(p, n)) return down_active(values, n, size, p.width, wide, ws);
    const Coming next =
        expert + 1 < p.routing.experts ? first_lines(keys_of(p, expert + 1, 0), p.width, p.units_of_keys()) : Coming{};
    multiply<To::kAdd, S>(a, n, values, size, p.width, ws.to.data(), ws.scratch, way_of<S>(n, next, once));
}

template <class F> void in_chunks(Range rows, F&& f) {
    for (int64_t r = rows.begin; r < rows.end; r += kChunk) f(Range{r, std::min(r + kChunk, rows.end)});
}

template <class S> void forward_by_tokens(const Problem<S>& p, const operand_t<S>* x, compute_t<S>* y) {
    std::vector<Workspace<S>> all = workspaces(p);
#pragma omp parallel num_threads(p.threads)
    {
        Workspace<S>& ws = all[omp_get_thread_num()];
        const Range tokens = part_of(p.routing.tokens, omp_get_thread_num(), omp_get_num_threads());
        std::fill(y + tokens.begin * p.width, y + tokens.end * p.width, compute_t<S>(0));
        for (int64_t e = 0; e < p.routing.experts; ++e)
            in_chunks(p.routing.rows_of(e, tokens), [&](Range rows) {
                up(p, x, e, rows, Range{0, p.size}, ws);
                down(p, e, rows, Range{0, p.size}, ws.rows.data(), ws.units.data(), ws, y);
            });
    }
}

// Part of an expert's units, with all of its rows.
struct Share {
    int64_t expert;
    Range units;
};

// Shares of the experts in use, in one run for each thread.
struct Shares {
    std::vector<Share> all;
    Runs runs;
};

// Experts in use, split where they are few.
template <class S> Shares shares_of(const Problem<S>& p) {
    std::vector<int64_t> used;
    for (int64_t e = 0; e < p.routing.experts; ++e)
        if (p.routing.offsets[e] < p.routing.offsets[e + 1]) used.push_back(e);
    const int64_t n = static_cast<int64_t>(used.size()), line = kLanes<compute_t<S>>;
    int64_t pieces = 1;
    while (n * pieces % p.threads != 0 && n * pieces < 8 * p.threads && p.size / (2 * pieces) >= 2 * line) pieces *= 2;
    Shares shares;
    std::vector<int64_t> work;
    for (const int64_t e : used)
        for (int64_t i = 0; i < pieces; ++i) {
            // Whole vectors, so that no share has a ragged end but the last.
            const auto edge = [&](int64_t j) { return j == pieces ? p.size : p.size * j / pieces / line * line; };
            shares.all.push_back({e, {edge(i), edge(i + 1)}});
            work.push_back((edge(i + 1) - edge(i)) * (p.routing.offsets[e + 1] - p.routing.offsets[e] + kWeightsAsRows));
        }
    shares.runs = runs_of(work, p.threads);
    return shares;
}

template <class S>
void forward_by_experts(const Problem<S>& p, const Shares& shares, const operand_t<S>* x, compute_t<S>* y) {
    using C = compute_t<S>;
    const int64_t n = p.routing.tokens * p.width;
    Buffer<C> partial(n * (p.threads - 1));
    std::vector<Workspace<S>> all = workspaces(p);
#pragma omp parallel num_threads(p.threads)
    {
        const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        Workspace<S>& ws = all[thread];
        C* mine = thread == 0 ? y : partial.data() + (thread - 1) * n;
        std::fill(mine, mine + n, C(0));
        const Range own = shares.runs.of(thread, threads);
        for (int64_t i = own.begin; i < own.end; ++i) {
            const auto [e, units] = shares.all[i];
            const Range all_rows{p.routing.offsets[e], p.routing.offsets[e + 1]};
            for (int64_t first = all_rows.begin; first < all_rows.end; first += kChunk) {
                const Range rows{first, std::min(first + kChunk, all_rows.end)};
                up(p, x, e, rows, units, ws, true);
                down(p, e, rows, units, ws.rows.data(), ws.units.data(), ws, mine, true);
            }
        }
#pragma omp barrier
        const Range part = part_of(n, thread, threads);
        for (int other = 1; other < threads; ++other) {
            const C* add = partial.data() + (other - 1) * n;
            for (int64_t i = part.begin; i < part.end; ++i) y[i] += add[i];
        }
    }
}

// Whether dividing experts is no worse for any thread than reading all weights: it is where an expert's rows are few, else
// where none of the threads waits long for another.
template <class S> bool are_even(const Problem<S>& p, const Shares& shares) {
    return p.routing.rows() <= kFewRows * p.routing.experts || shares.runs.imbalance <= kImbalance;
}

// Products of two numbers for which a thread more is worth waking: some microseconds' work.
constexpr int64_t kThreadsWork = 1 << 15;

// No more threads than find work.
template <class S> Problem<S> with_useful_threads(Problem<S> p) {
    const int64_t work = p.routing.rows() * p.width * p.size;
    p.threads = static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(p.threads, work / kThreadsWork)));
    return p;
}

template <class S> void forward(const Problem<S>& problem, S* y) {
    using C = compute_t<S>;
    const Problem<S> p = with_useful_threads(problem);
    if constexpr (kByPairs<S>)
        if (goes_by_panels(p)) return forward_by_panels(p, y);
    const int64_t n = p.routing.tokens * p.width;
    const Upcast<S, operand_t<S>> x(p.x, n, p.threads);
    // Partial sums of many threads must not outweigh the experts that they save reading twice.
    const bool small = n * (p.threads - 1) <= 2 * p.routing.experts * p.width * p.size;
    const auto run = [&](C* to) {
        if (small && p.routing.rows() <= kSomeRows * p.routing.experts) {
            const Shares shares = shares_of(p);
            if (are_even(p, shares)) return forward_by_experts(p, shares, x.data(), to);
        }
        forward_by_tokens(p, x.data(), to);
    };
    if constexpr (std::is_same_v<S, C>) {
        run(y);
    } else {
        Buffer<C> wide(n);
        run(wide.data());
#pragma omp parallel for num_threads(p.threads) schedule(static)
        for (int64_t i = 0; i < n; ++i) y[i] = narrow<S>(wide[i]);
    }
}

}  // namespace sparseffn
