// Gradients of the expert computation: of rows, of the weights, of the biases and of the gates. Each output element is summed
// by one thread in a fixed order.
#pragma once

#include <vector>

#include "experts.h"
#include "experts_panels_backward.h"
#include "hidden_backward.h"
#include "outer.h"

namespace sparseffn {

// Rows of a gradient of weights that one thread makes at a time where these are columns of x, which it first brings together:
// read again and again where they lie, at 4 KiB from row to row, they leave the cache. Backward of 2,048 and 4,096 tokens takes
// 7% to 11% less; bringing rows of y's gradient together for the values takes 5% to 20% more.
constexpr int64_t kBlock = 16 * kRows;
// Rows that are fetched ahead of those brought together.
constexpr int64_t kRowsAhead = 12;

// Experts in use, in one run for each thread.
struct Division {
    std::vector<int64_t> used, unused;
    int64_t most_rows = 0;
    Runs runs;
};

inline Division divide(const Routing& routing, int threads) {
    Division division;
    std::vector<int64_t> work;
    for (int64_t e = 0; e < routing.experts; ++e) {
        const int64_t rows = routing.offsets[e + 1] - routing.offsets[e];
        (rows ? division.used : division.unused).push_back(e);
        if (rows) work.push_back(rows + kWeightsAsRows);
        division.most_rows = std::max(division.most_rows, rows);
    }
    division.runs = runs_of(work, threads);
    return division;
}

// What one thread needs for `most` rows of an expert.
template <class S> struct BackwardWorkspace {
    using C = compute_t<S>;
    Buffer<C> joint, padded, sums, block;
    FewRows<C> few;
    Scratch<S> scratch;
    std::vector<const C*> inputs, sent, d_rows, gate_rows, scaled_rows, joint_rows, padded_rows;
    std::vector<C*> to;
    std::vector<double> bias;

    BackwardWorkspace(const Problem<S>& p, int64_t most, bool many)
        : joint(p.interleaved() ? (many ? std::min(most, kChunk) : most) * 2 * p.size : 0),
          padded(many ? kDepth * kVectors * kLanes<C> : 0),
          sums(many ? std::max(kBlock, p.size) * kVectors * kLanes<C> : 0),
          block(many ? most * kBlock : 0),
          few(many ? 0 : most, std::max(p.width, p.size)),
          scratch(panel_size<C>(std::max(p.width, 2 * p.size))),
          inputs(most), sent(most), d_rows(most), gate_rows(most), scaled_rows(most), joint_rows(most),
          padded_rows(many ? kDepth : 0), to(most), bias(std::max(p.width, p.size)) {}
};

template <class S> std::vector<BackwardWorkspace<S>> backward_workspaces(const Problem<S>& p, int64_t most, bool many) {
    std::vector<BackwardWorkspace<S>> all;
    all.reserve(p.threads);
    for (int t = 0; t < p.threads; ++t) all.emplace_back(p, most, many);
    return all;
}

// gx[token] += d keys[e]^T, and with the gate keys; gx of row i at ws.to[i], d at ws.d_rows[i] and ws.gate_rows[i].
template <class S>
void to_inputs(const Problem<S>& p, int64_t e, int64_t rows, BackwardWorkspace<S>& ws, Dots dots) {
    const Matrix<S> keys = p.keys.of(e);
    if (p.interleaved()) {
        for (int64_t i = 0; i < rows; ++i) {
            auto* row = ws.joint.data() + i * 2 * p.size;
            for (int64_t g = 0; g < p.size; ++g) {
                row[2 * g] = ws.d_rows[i][g];
                row[2 * g + 1] = ws.gate_rows[i][g];
            }
            ws.joint_rows[i] = row;
        }
        multiply<To::kAdd, S>(ws.joint_rows.data(), rows, {keys.data, 1, keys.row}, 2 * p.size, p.width, ws.to.data(),
                              ws.scratch, Way{{}, dots});
        return;
    }
    multiply<To::kAdd, S>(ws.d_rows.data(), rows, keys.transposed(), p.size, p.width, ws.to.data(), ws.scratch, Way{{}, dots});
    if (p.gate_keys)
        multiply<To::kAdd, S>(ws.gate_rows.data(), rows, p.gate_keys.of(e).transposed(), p.size, p.width, ws.to.data(),
                              ws.scratch, Way{{}, dots});
}

// Gradient of the weights of an expert between tokens' rows of `width` and hidden rows of `size`, [width, size], where
// `by_width` says that a line has all of a column's hidden units.
template <class S>
void weights_of_few(const Problem<S>& p, int64_t rows, const compute_t<S>* const* tokens, const compute_t<S>* const* hidden,
                    bool by_width, S* to, int64_t ld, BackwardWorkspace<S>& ws) {
    const bool streams = p.routing.experts * p.width * p.size * static_cast<int64_t>(sizeof(S)) >= kStreamed;
    if (by_width) outer_of_few(tokens, hidden, rows, p.width, p.size, to, ld, streams, ws.few);
    else outer_of_few(hidden, tokens, rows, p.size, p.width, to, ld, streams, ws.few);
}

// The gradient of a row's gate, of which its units sent `sum`.
template <class S, class T>
void send_gate(const Problem<S>& p, const Gradients<S>& g, int64_t e, int64_t row, const T* gy, compute_t<S> sum) {
    if (g.gates) g.gates[p.routing.order[row]] = sum + through_value_bias(p, e, gy);
}

// All gradients of one expert in use, all of whose rows are taken at once.
template <class S>
void backward_expert(const Problem<S>& p, const Gradients<S>& g, int64_t e, const compute_t<S>* x, const compute_t<S>* gy,
                     compute_t<S>* gx, compute_t<S>* d, compute_t<S>* d_gate, compute_t<S>* scaled, BackwardWorkspace<S>& ws) {
    const int64_t first = p.routing.offsets[e], rows = p.routing.offsets[e + 1] - first;
    for (int64_t i = 0; i < rows; ++i) {
        ws.inputs[i] = x + p.routing.token(first + i) * p.width;
        ws.sent[i] = gy + p.routing.token(first + i) * p.width;
        ws.d_rows[i] = d + i * p.size;
        ws.gate_rows[i] = d_gate ? d_gate + i * p.size : nullptr;
        ws.scaled_rows[i] = scaled + i * p.size;
        ws.to[i] = d + i * p.size;
    }
    multiply<To::kPut, S>(ws.sent.data(), rows, p.values.of(e).transposed(), p.width, p.size, ws.to.data(), ws.scratch);
    for (int64_t i = 0; i < rows; ++i)
        send_gate(p, g, e, first + i, ws.sent[i],
                  through_activation(p, first + i, {0, p.size}, d + i * p.size, d_gate ? d_gate + i * p.size : nullptr,
                                     scaled + i * p.size));
    if (gx) {
        for (int64_t i = 0; i < rows; ++i) ws.to[i] = gx + p.routing.token(first + i) * p.width;
        to_inputs(p, e, rows, ws, Dots::kFewRows);
    }
    if (g.keys) weights_of_few(p, rows, ws.inputs.data(), ws.d_rows.data(), g.keys.by_rows(), g.keys.of(e), g.keys.ld(), ws);
    if (g.gate_keys)
        weights_of_few(p, rows, ws.inputs.data(), ws.gate_rows.data(), g.gate_keys.by_rows(), g.gate_keys.of(e),
                       g.gate_keys.ld(), ws);
    if (g.values)
        weights_of_few(p, rows, ws.sent.data(), ws.scaled_rows.data(), !g.values.by_rows(), g.values.of(e), g.values.ld(), ws);
    bias_gradients(p, g, e, gy, ws.bias, [&](int64_t r) { return d + (r - first) * p.size; },
                   [&](int64_t r) { return d_gate + (r - first) * p.size; });
}

// Gradients of an expert that no token chose.
template <class S> void set_gradients_to_zero(const Problem<S>& p, const Gradients<S>& g, int64_t e) {
    if (g.keys) set_to_zero(g.keys, e, p.width, p.size);
    if (g.gate_keys) set_to_zero(g.gate_keys, e, p.width, p.size);
    if (g.values) set_to_zero(g.values, e, p.size, p.width);
    for (S* bias : {g.key_bias, g.gate_bias})
        if (bias) std::memset(static_cast<void*>(bias + e * p.size), 0, p.size * sizeof(S));
    if (g.value_bias) std::memset(static_cast<void*>(g.value_bias + e * p.width), 0, p.width * sizeof(S));
}

// Each thread goes through some experts, one after the other while their weights are in its cache, and adds to gradients of x
// of its own, which are summed up at the end; without `gx` nobody waits for these.
template <class S>
void backward_by_experts(const Problem<S>& p, const Gradients<S>& g, const Division& division, const compute_t<S>* x,
                         const compute_t<S>* gy, compute_t<S>* gx) {
    using C = compute_t<S>;
    const int64_t n = gx ? p.routing.tokens * p.width : 0, most = std::max<int64_t>(division.most_rows, 1), units = most * p.size;
    Buffer<C> partial(n * (p.threads - 1));
    Buffer<C> hidden(p.threads * 3 * units);
    std::vector<BackwardWorkspace<S>> all = backward_workspaces(p, most, false);
#pragma omp parallel num_threads(p.threads)
    {
        const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        C* mine = thread == 0 || !gx ? gx : partial.data() + (thread - 1) * n;
        std::fill(mine, mine + n, C(0));
        C* d = hidden.data() + thread * 3 * units;
        const Range own = division.runs.of(thread, threads);
        for (int64_t u = own.begin; u < own.end; ++u)
            backward_expert(p, g, division.used[u], x, gy, mine, d, p.gate_keys ? d + units : nullptr, d + 2 * units,
                            all[thread]);
        const Range idle = part_of(static_cast<int64_t>(division.unused.size()), thread, threads);
        for (int64_t u = idle.begin; u < idle.end; ++u) set_gradients_to_zero(p, g, division.unused[u]);
#pragma omp barrier
        const Range part = part_of(n, thread, threads);
        for (int other = 1; other < threads; ++other) {
            const C* add = partial.data() + (other - 1) * n;
            for (int64_t i = part.begin; i < part.end; ++i) gx[i] += add[i];
        }
    }
}

// A gradient of weights between rows of tokens and of hidden units, and the parts in which an expert's is made: blocks of
// lines, where a line has a column's hidden units, else panels of columns.
template <class S> struct WeightGradient {
    using C = compute_t<S>;
    const C *tokens, *hidden;
    OutMatrices<S> to;
    bool by_width;
    int64_t parts;

    WeightGradient(const Problem<S>& p, const C* token_rows, const C* hidden_rows, const OutMatrices<S>& out, bool width_lines)
        : tokens(token_rows), hidden(hidden_rows), to(out), by_width(width_lines) {
        const int64_t part = by_width ? kBlock : kVectors * kLanes<C>;
        parts = (p.width + part - 1) / part;
    }
};

template <class S>
void weights_part(const Problem<S>& p, const WeightGradient<S>& w, int64_t e, int64_t part, BackwardWorkspace<S>& ws) {
    using C = compute_t<S>;
    constexpr int64_t line = kVectors * kLanes<C>;
    const int64_t begin = p.routing.offsets[e], rows = p.routing.offsets[e + 1] - begin;
    const auto token = [&](int64_t r) { return w.tokens + p.routing.token(begin + r) * p.width; };
    const auto hidden = [&](int64_t r) { return w.hidden + (begin + r) * p.size; };
    std::vector<const C*>&left = ws.inputs, &right = ws.sent;
    left.resize(rows);
    right.resize(rows);
    if (!w.by_width) {
        const int64_t first = part * line;
        for (int64_t r = 0; r < rows; ++r) {
            left[r] = hidden(r);
            right[r] = token(r);
        }
        return outer<S>(left, right, p.size, {first, std::min(first + line, p.width)}, w.to.ld(), w.to.of(e), ws.padded, ws.sums,
                        ws.padded_rows);
    }
    const int64_t first = part * kBlock, height = std::min(kBlock, p.width - first);
    for (int64_t r = 0; r < rows; ++r) {
        if (r + kRowsAhead < rows)
            for (int64_t c = 0; c < height; c += kLanes<C>) __builtin_prefetch(token(r + kRowsAhead) + first + c);
        left[r] = ws.block.data() + r * kBlock;
        std::copy_n(token(r) + first, height, ws.block.data() + r * kBlock);
        right[r] = hidden(r);
    }
    for (int64_t column = 0; column < p.size; column += line)
        outer<S>(left, right, height, {column, std::min(column + line, p.size)}, w.to.ld(), w.to.of(e) + first * w.to.ld(),
                 ws.padded, ws.sums, ws.padded_rows);
}

// Chunks of rows of one expert, in one run for each thread: an expert's weights serve several while they are in its cache.
struct Chunks {
    std::vector<std::pair<int64_t, Range>> all;
    Runs runs;
};

inline Chunks chunks_of(const Routing& routing, int threads) {
    Chunks chunks;
    std::vector<int64_t> work;
    for (int64_t e = 0; e < routing.experts; ++e)
        in_chunks({routing.offsets[e], routing.offsets[e + 1]}, [&](Range rows) {
            chunks.all.push_back({e, rows});
            work.push_back(rows.end - rows.begin);
        });
    chunks.runs = runs_of(work, threads);
    return chunks;
}

// Many tokens: each thread takes some chunks, then adds to the inputs of its own tokens, then takes parts of gradients of
// weights. Without `gx` nobody waits for the inputs'.
template <class S>
void backward_by_tokens(const Problem<S>& p, const Gradients<S>& g, const compute_t<S>* x, const compute_t<S>* gy,
                        compute_t<S>* gx) {
    using C = compute_t<S>;
    const Routing& routing = p.routing;
    const int64_t n_hidden = routing.rows() * p.size;
    Buffer<C> d(n_hidden), d_gate(p.gate_keys ? n_hidden : 0), scaled(n_hidden);
    const Chunks chunks = chunks_of(routing, p.threads);
    int64_t most = kChunk;
    for (int64_t e = 0; e < routing.experts; ++e) most = std::max(most, routing.offsets[e + 1] - routing.offsets[e]);
    std::vector<BackwardWorkspace<S>> all = backward_workspaces(p, most, true);
    std::vector<WeightGradient<S>> weights;
    if (g.keys) weights.push_back({p, x, d.data(), g.keys, g.keys.by_rows()});
    if (g.gate_keys) weights.push_back({p, x, d_gate.data(), g.gate_keys, g.gate_keys.by_rows()});
    if (g.values) weights.push_back({p, gy, scaled.data(), g.values, !g.values.by_rows()});
    int64_t parts = 1;  // the first are the biases
    for (const WeightGradient<S>& w : weights) parts += w.parts;

#pragma omp parallel num_threads(p.threads)
    {
        const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        BackwardWorkspace<S>& ws = all[thread];
        const Range own = chunks.runs.of(thread, threads);
        for (int64_t c = own.begin; c < own.end; ++c) {
            const auto [e, rows] = chunks.all[c];
            for (int64_t r = rows.begin; r < rows.end; ++r) {
                ws.sent[r - rows.begin] = gy + routing.token(r) * p.width;
                ws.to[r - rows.begin] = d.data() + r * p.size;
            }
            multiply<To::kPut, S>(ws.sent.data(), rows.end - rows.begin, p.values.of(e).transposed(), p.width, p.size,
                                  ws.to.data(), ws.scratch, Way{{}, Dots::kNever});
            for (int64_t r = rows.begin; r < rows.end; ++r)
                send_gate(p, g, e, r, ws.sent[r - rows.begin],
                          through_activation(p, r, {0, p.size}, d.data() + r * p.size,
                                             p.gate_keys ? d_gate.data() + r * p.size : nullptr, scaled.data() + r * p.size));
        }
#pragma omp barrier
        const Range tokens = gx ? part_of(routing.tokens, thread, threads) : Range{0, 0};
        std::fill(gx + tokens.begin * p.width, gx + tokens.end * p.width, C(0));
        for (int64_t e = 0; e < routing.experts; ++e)
            in_chunks(routing.rows_of(e, tokens), [&](Range rows) {
                for (int64_t i = 0; i < rows.end - rows.begin; ++i) {
                    ws.d_rows[i] = d.data() + (rows.begin + i) * p.size;
                    ws.gate_rows[i] = d_gate.data() + (rows.begin + i) * p.size;
                    ws.to[i] = gx + routing.token(rows.begin + i) * p.width;
                }
                to_inputs(p, e, rows.end - rows.begin, ws, Dots::kNever);
            });
#pragma omp for schedule(dynamic, 1)
        for (int64_t unit = 0; unit < routing.experts * parts; ++unit) {
            const int64_t e = unit / parts;
            int64_t part = unit % parts;
            if (part-- == 0) {
                bias_gradients(p, g, e, gy, ws.bias, [&](int64_t r) { return d.data() + r * p.size; },
                               [&](int64_t r) { return d_gate.data() + r * p.size; });
                continue;
            }
            auto w = weights.begin();
            for (; part >= w->parts; ++w) part -= w->parts;
            weights_part(p, *w, e, part, ws);
        }
    }
}

// Threads divide experts where that leaves none of them waiting long, and always where there is little to wait for.
constexpr int64_t kFewTokens = 16;

template <class S> bool divides_experts(const Problem<S>& p, const Division& division) {
    // An expert's rows must be summed in one go, and the threads' own gradients of x be small beside those of the weights.
    const int64_t own = p.routing.tokens * p.width * (p.threads - 1), weights = 2 * p.routing.experts * p.width * p.size;
    if (division.most_rows > kDepth || own > weights) return false;
    return division.runs.imbalance <= kImbalance || p.routing.tokens <= kFewTokens;
}

// From this many rows an expert, on average, bfloat16 panels are worth packing.
constexpr int64_t kPairedRowsBackward = 1;

template <class S> void backward(const Problem<S>& problem, const Gradients<S>& g) {
    using C = compute_t<S>;
    const Problem<S> p = with_useful_threads(problem);
    if constexpr (kByPairs<S>)
        if (p.routing.rows() >= kPairedRowsBackward * p.routing.experts) return backward_by_panels(p, g);
    const int64_t n = p.routing.tokens * p.width;
    const Upcast<S> x(p.x, n, p.threads), gy(g.y, n, p.threads);
    const Division division = divide(p.routing, p.threads);
    const auto run = [&](C* gx) {
        if (divides_experts(p, division)) backward_by_experts(p, g, division, x.data(), gy.data(), gx);
        else backward_by_tokens(p, g, x.data(), gy.data(), gx);
    };
    if constexpr (std::is_same_v<S, C>) {
        run(g.x);
    } else {
        if (!g.x) return run(nullptr);
        Buffer<C> wide(n);
        run(wide.data());
#pragma omp parallel for num_threads(p.threads) schedule(static)
        for (int64_t i = 0; i < n; ++i) g.x[i] = narrow<S>(wide[i]);
    }
}

}  // namespace sparseffn
