// Hidden units of rows of one expert: products with its keys, activation, dropout and gate.
#pragma once

#include <vector>

#include "experts_types.h"

namespace sparseffn {

// Rows of one expert that are taken at a time: their hidden units stay in the second-level cache.
constexpr int64_t kChunk = 192;

// Up to this many rows of an expert the lines of a matrix are read once, in their order, if rows are multiplied in pairs.
constexpr int64_t kOnceRows = 24;

// Keys as they are multiplied: those of an expert, or with its gate keys in turns.
template <class S> Matrix<S> keys_of(const Problem<S>& p, int64_t expert, int64_t unit) {
    const Matrix<S> keys = p.keys.of(expert).from(0, unit);
    return p.interleaved() ? Matrix<S>{keys.data, keys.row, 1} : keys;
}

// What one thread needs for a chunk of rows. Made before threads start: what they cannot get must not end the process.
template <class S> struct Workspace {
    using C = compute_t<S>;
    using O = operand_t<S>;
    static constexpr bool kNarrows = !std::is_same_v<O, C>;
    // What is multiplied in pairs would be multiplied as float from packed panels.
    static constexpr Dots kDots = kNarrows ? Dots::kAlways : Dots::kFewRows;
    Buffer<C> units, gate_units, joint;
    Buffer<O> operands;  // the units as they are multiplied, where that is another type
    Scratch<S> scratch;
    std::vector<const O*> inputs, rows;
    std::vector<const C*> wide;
    std::vector<C*> to;
    std::vector<int64_t> active;

    // No larger than the rows need: for one token, taking memory would else cost as much as the routing.
    explicit Workspace(const Problem<S>& p)
        : units(most_rows(p) * p.size),
          gate_units(p.gate_keys ? most_rows(p) * p.size : 0),
          joint(p.interleaved() ? most_rows(p) * 2 * p.size : 0),
          operands(kNarrows ? most_rows(p) * p.size : 0),
          scratch(panel_elements(p), kNarrows ? most_rows(p) : 0, std::max(p.width, p.size)),
          inputs(most_rows(p)),
          rows(most_rows(p)),
          wide(most_rows(p)),
          to(most_rows(p)) {
        active.reserve(p.size);
    }

    static int64_t most_rows(const Problem<S>& p) { return std::min(kChunk, p.routing.rows()); }
    static int64_t panel_elements(const Problem<S>& p) {
        const auto packs = [&](const Matrix<S>& m) {
            if (m.column == 1) return most_rows(p) > kRows && collides(m, std::max(p.width, p.size));
            return m.data && !by_dots<S>(kDots, most_rows(p), m.row, m.column);
        };
        if (packs(p.values.of(0)) || packs(keys_of(p, 0, 0)) || (!p.interleaved() && packs(p.gate_keys.of(0))))
            return panel_size<C>(std::max(p.width, p.size));
        return std::max(ragged_size<C>(p.width, p.units_of_keys()), ragged_size<C>(p.size, p.width));
    }
};

// One for each thread.
template <class S> std::vector<Workspace<S>> workspaces(const Problem<S>& p) {
    std::vector<Workspace<S>> all;
    all.reserve(p.threads);
    for (int t = 0; t < p.threads; ++t) all.emplace_back(p);
    return all;
}

template <class C, class S> void add_bias(const S* bias, int64_t n, C* row) {
    for (int64_t g = 0; g < n; ++g) row[g] += upcast(bias[g]);
}

template <class S, class C> void keep_row(const C* row, int64_t n, S* kept) {
    for (int64_t g = 0; g < n; ++g) kept[g] = narrow<S>(row[g]);
}

// How n rows are multiplied by a matrix; `once` where a thread has all rows of an expert.
template <class S> Way way_of(int64_t n, Coming next, bool once) { return {next, Workspace<S>::kDots, once && n <= kOnceRows}; }

// Products of the gathered rows with units `first..first + size` of the keys and gate keys, biases included.
template <class S>
void up_products(const Problem<S>& p, int64_t expert, int64_t n, Range units, Workspace<S>& ws, bool once) {
    using C = compute_t<S>;
    const int64_t size = units.end - units.begin;
    const auto multiply_by = [&](const Matrix<S>& m, int64_t columns, C* u, Coming next) {
        for (int64_t i = 0; i < n; ++i) ws.to[i] = u + i * columns;
        multiply<To::kPut, S>(ws.inputs.data(), n, m, p.width, columns, ws.to.data(), ws.scratch, way_of<S>(n, next, once));
    };
    const Matrix<S> keys = keys_of(p, expert, units.begin);
    const Coming values = first_lines(p.values.of(expert).from(units.begin, 0), size, p.width);
    if (!p.gate_keys) {
        multiply_by(keys, size, ws.units.data(), values);
    } else if (p.interleaved()) {
        multiply_by(keys, 2 * size, ws.joint.data(), values);
        for (int64_t i = 0; i < n * size; ++i) {
            ws.units[i] = ws.joint[2 * i];
            ws.gate_units[i] = ws.joint[2 * i + 1];
        }
    } else {
        const Matrix<S> gate_keys = p.gate_keys.of(expert).from(0, units.begin);
        multiply_by(keys, size, ws.units.data(), first_lines(gate_keys, p.width, size));
        multiply_by(gate_keys, size, ws.gate_units.data(), values);
    }
    for (int64_t i = 0; i < n && p.key_bias; ++i)
        add_bias(p.key_bias + expert * p.size + units.begin, size, ws.units.data() + i * size);
    for (int64_t i = 0; i < n && p.gate_bias; ++i)
        add_bias(p.gate_bias + expert * p.size + units.begin, size, ws.gate_units.data() + i * size);
}

// Activates a row of products in place; `gate_row` are the gate keys' products of gated experts. `kept` may be null.
template <class S>
void activate_row(const Problem<S>& p, int64_t size, compute_t<S>* row, const compute_t<S>* gate_row, S* kept) {
    using C = compute_t<S>;
    if (gate_row) {
        if (kept) {
            keep_row(row, size, kept);
            keep_row(gate_row, size, kept + p.size);
        }
        const Clamp<C> clamp{p.alpha, p.limit};
        with_activation(p.activation, [&](auto a) {
            for (int64_t g = 0; g < size; ++g) row[g] = gated(decltype(a)::value, row[g], gate_row[g], clamp);
        });
        return;
    }
    const bool output = keeps_output(p.activation);
    if (kept && !output) keep_row(row, size, kept);
    // The root of ReLU squared is kept, and squared afterwards.
    const Activation first = p.activation == kRelu2 && kept ? kRelu : p.activation;
    with_activation(first, [&](auto a) {
        if (decltype(a)::value != kIdentity)
            for (int64_t g = 0; g < size; ++g) row[g] = activate(decltype(a)::value, row[g]);
    });
    if (kept && output) keep_row(row, size, kept);
    if (first != p.activation)
        for (int64_t g = 0; g < size; ++g) row[g] *= row[g];
}

// Hidden units `first..first+size` of rows of one expert, activated, dropped and scaled by their gates, into ws.units and
// ws.rows.
template <class S>
void up(const Problem<S>& p, const operand_t<S>* x, int64_t expert, Range rows, Range units, Workspace<S>& ws,
        bool once = false) {
    using C = compute_t<S>;
    const int64_t n = rows.end - rows.begin, size = units.end - units.begin;
    for (int64_t i = 0; i < n; ++i) {
        ws.inputs[i] = x + p.routing.token(rows.begin + i) * p.width;
        if constexpr (Workspace<S>::kNarrows) ws.rows[i] = ws.operands.data() + i * size;
        else ws.rows[i] = ws.units.data() + i * size;
    }
    up_products(p, expert, n, units, ws, once);
    for (int64_t i = 0; i < n; ++i) {
        C* row = ws.units.data() + i * size;
        activate_row(p, size, row, p.gate_keys ? ws.gate_units.data() + i * size : nullptr,
                     p.hidden ? p.hidden + (rows.begin + i) * p.kept() * p.size + units.begin : nullptr);
        const int64_t selection = p.routing.order[rows.begin + i];
        const C gate = p.gates[selection];
        if (p.keep) {
            const uint8_t* keep = p.keep + selection * p.size + units.begin;
            const C scale = gate * p.keep_scale;
            for (int64_t g = 0; g < size; ++g) row[g] = keep[g] ? row[g] * scale : C(0);
        } else {
            for (int64_t g = 0; g < size; ++g) row[g] *= gate;
        }
    }
    if constexpr (Workspace<S>::kNarrows)
        for (int64_t i = 0; i < n * size; ++i) ws.operands[i] = narrow<S>(ws.units[i]);
}

}  // namespace sparseffn
