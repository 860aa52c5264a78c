// The expert computation with a further top-K among the hidden units of a token's experts.
#pragma once

#include <vector>

#include "experts_backward.h"
#include "select.h"

namespace sparseffn {

// Where each selection's row is, by selection: token * k + slot.
inline Buffer<int64_t> places(const Routing& routing) {
    Buffer<int64_t> place(routing.rows());
    for (int64_t r = 0; r < routing.rows(); ++r) place[routing.order[r]] = r;
    return place;
}

// What one thread needs to choose a token's survivors.
template <class C> struct SurvivorChoice {
    Buffer<Key<C>> keys;
    Selector<Key<C>> selector;

    SurvivorChoice(int64_t units, int64_t count) : keys(units), selector(units, count) {}
};

// Chooses the survivors of one token among `alpha`, its rows side by side, and sets the others to zero.
template <class S>
void choose(const Problem<S>& p, const Inner<S>& inner, int64_t token, const int64_t* place, const S* hidden,
            compute_t<S>* alpha, SurvivorChoice<compute_t<S>>& choice) {
    using C = compute_t<S>;
    const int64_t k = p.routing.k;
    for (int64_t slot = 0; slot < k; ++slot) {
        const C* row = alpha + place[token * k + slot] * p.size;
        for (int64_t g = 0; g < p.size; ++g) choice.keys[slot * p.size + g] = sortable(row[g]);
    }
    const int32_t* chosen = choice.selector.ascending(choice.keys.data(), k * p.size, inner.count);
    int64_t next = 0;
    for (int64_t slot = 0; slot < k; ++slot) {
        C* row = alpha + place[token * k + slot] * p.size;
        const S* kept = hidden + place[token * k + slot] * p.kept() * p.size;
        const uint8_t* keep = p.keep ? p.keep + (token * k + slot) * p.size : nullptr;
        int64_t from = 0;
        for (; next < inner.count && chosen[next] < (slot + 1) * p.size; ++next) {
            const int64_t unit = chosen[next] - slot * p.size;
            std::fill(row + from, row + unit, C(0));
            from = unit + 1;
            for (int64_t part = 0; part < p.kept(); ++part)
                inner.kept[(token * p.kept() + part) * inner.count + next] = kept[part * p.size + unit];
            inner.positions[token * inner.count + next] =
                keep && !keep[unit] ? -1 : chosen[next];
        }
        std::fill(row + from, row + p.size, C(0));
    }
}

// y += a B[list, :] for some columns, a few lines at a time, as a long sum of single terms would be rounded too often.
template <class S>
void add_lines(const compute_t<S>* a, const Matrix<S>& b, Range columns, const std::vector<int64_t>& list, compute_t<S>* y) {
    using C = compute_t<S>;
    const int64_t n = columns.end - columns.begin;
    C* to = y + columns.begin;
    if (b.column == 1 && n >= kLanes<C>) return add_listed<C, S, 1>(&a, b.at(0, columns.begin), b.row, n, list, &to);
    for (size_t first = 0; first < list.size(); first += kListed) {
        const size_t end = std::min(first + kListed, list.size());
        for (int64_t c = 0; c < n; ++c) {
            C sum = 0;
            for (size_t q = first; q < end; ++q) sum += a[list[q]] * upcast(*b.at(list[q], columns.begin + c));
            to[c] += sum;
        }
    }
}

// sums[token] += the survivors' values, of some columns.
template <class S>
void add_survivors(const Problem<S>& p, const compute_t<S>* alpha, Range columns, Workspace<S>& ws, compute_t<S>* sums) {
    using C = compute_t<S>;
    for (int64_t e = 0; e < p.routing.experts; ++e)
        for (int64_t r = p.routing.offsets[e]; r < p.routing.offsets[e + 1]; ++r) {
            const C* row = alpha + r * p.size;
            find_active(1, p.size, row, ws);
            add_lines(row, p.values.of(e), columns, ws.active, sums + p.routing.token(r) * p.width);
        }
    // Last: values added to a bias would each be rounded at its size.
    for (int64_t e = 0; e < p.routing.experts && p.value_bias; ++e)
        for (int64_t r = p.routing.offsets[e]; r < p.routing.offsets[e + 1]; ++r) {
            C* to = sums + p.routing.token(r) * p.width;
            const C gate = p.gates[p.routing.order[r]];
            for (int64_t c = columns.begin; c < columns.end; ++c) to[c] += gate * upcast(p.value_bias[e * p.width + c]);
        }
}

// Forward with an inner top-K: all hidden units, the choice token by token, then the values of the survivors.
template <class S> void forward_inner(Problem<S> problem, const Inner<S>& inner, S* y) {
    using C = compute_t<S>;
    Problem<S> p = with_useful_threads(problem);
    const Routing& routing = p.routing;
    const int64_t n = routing.tokens * p.width;
    const Upcast<S, operand_t<S>> x(p.x, n, p.threads);
    Buffer<S> hidden(routing.rows() * p.kept() * p.size);
    Buffer<C> alpha(routing.rows() * p.size), sums(n);
    const Buffer<int64_t> place = places(routing);
    p.hidden = hidden.data();
    const Shares shares = shares_of(p);
    const bool few = routing.rows() <= kFewRows * routing.experts;
    std::vector<Workspace<S>> all = workspaces(p);
    std::vector<SurvivorChoice<C>> choices;
    choices.reserve(p.threads);
    for (int t = 0; t < p.threads; ++t) choices.emplace_back(routing.k * p.size, inner.count);
#pragma omp parallel num_threads(p.threads)
    {
        const int thread = omp_get_thread_num(), threads = omp_get_num_threads();
        Workspace<S>& ws = all[thread];
        const auto fill = [&](int64_t e, Range all_rows, Range units) {
            in_chunks(all_rows, [&](Range rows) {
                up(p, x.data(), e, rows, units, ws);
                const int64_t size = units.end - units.begin;
                for (int64_t r = rows.begin; r < rows.end; ++r)
                    std::copy_n(ws.units.data() + (r - rows.begin) * size, size, alpha.data() + r * p.size + units.begin);
            });
        };
        const Range tokens = part_of(routing.tokens, thread, threads);
        if (few) {
            const Range own = shares.runs.of(thread, threads);
            for (int64_t i = own.begin; i < own.end; ++i) {
                const int64_t e = shares.all[i].expert;
                fill(e, {routing.offsets[e], routing.offsets[e + 1]}, shares.all[i].units);
            }
        } else {
            for (int64_t e = 0; e < routing.experts; ++e) fill(e, routing.rows_of(e, tokens), {0, p.size});
        }
#pragma omp barrier
        for (int64_t t = tokens.begin; t < tokens.end; ++t)
            choose(p, inner, t, place.data(), hidden.data(), alpha.data(), choices[thread]);
        std::fill(sums.data() + tokens.begin * p.width, sums.data() + tokens.end * p.width, C(0));
        if (!few)
            for (int64_t e = 0; e < routing.experts; ++e)
                in_chunks(routing.rows_of(e, tokens), [&](Range rows) {
                    const C* units = alpha.data() + rows.begin * p.size;
                    for (int64_t i = 0; i < rows.end - rows.begin; ++i) ws.wide[i] = units + i * p.size;
                    down(p, e, rows, Range{0, p.size}, ws.wide.data(), units, ws, sums.data());
                });
#pragma omp barrier
        if (few) {
            // Columns are divided, and only the survivors' values are read.
            const int64_t lines = (p.width + kLanes<C> - 1) / kLanes<C>;
            const Range part = part_of(lines, thread, threads);
            add_survivors(p, alpha.data(), {part.begin * kLanes<C>, std::min(part.end * kLanes<C>, p.width)}, ws, sums.data());
#pragma omp barrier
        }
        for (int64_t i = tokens.begin * p.width; i < tokens.end * p.width; ++i) y[i] = narrow<S>(sums[i]);
    }
}

// Backward with an inner top-K: that of all units, of which only the survivors were kept.
template <class S> void backward_inner(Problem<S> problem, const Inner<S>& inner, const Gradients<S>& g) {
    Problem<S> p = with_useful_threads(problem);
    const int64_t k = p.routing.k, n = p.routing.rows() * p.size, kept = p.kept();
    Buffer<S> hidden(n * kept);
    Buffer<uint8_t> alive(n);
    std::memset(static_cast<void*>(hidden.data()), 0, n * kept * sizeof(S));
    std::fill(alive.data(), alive.data() + n, uint8_t(0));
    const Buffer<int64_t> place = places(p.routing);
#pragma omp parallel for num_threads(p.threads) schedule(static)
    for (int64_t t = 0; t < p.routing.tokens; ++t)
        for (int64_t j = 0; j < inner.count; ++j) {
            const int32_t position = inner.positions[t * inner.count + j];
            if (position < 0) continue;
            const int64_t selection = t * k + position / p.size, unit = position % p.size;
            for (int64_t part = 0; part < kept; ++part)
                hidden[(place[selection] * kept + part) * p.size + unit] = inner.kept[(t * kept + part) * inner.count + j];
            alive[selection * p.size + unit] = 1;
        }
    p.hidden = hidden.data();
    p.keep = alive.data();
    backward(p, g);
}

}  // namespace sparseffn
