// Gradients of the expert computation of many bfloat16 rows. Those of the weights are sums over an expert's rows of outer
// products, so rows are taken in pairs there, of both factors.
#pragma once

#include "experts_pairs.h"

namespace sparseffn {

#if defined(SPARSEFFN_PAIR_PRODUCTS)

// Rows of a sum of outer products that are packed at a time, and the columns of both factors that one thread takes: 420 KiB of
// the second-level cache.
constexpr int64_t kOuterDepth = 512, kOuterHeight = 128, kOuterWidth = 192;

// The same where no expert has as many rows: fewer pairs leave room for more columns, so that each is packed less often.
struct OuterShape {
    int64_t depth, height, width;

    // With so many experts, threads should find some blocks each.
    OuterShape(const Routing& routing, int64_t columns, int threads) {
        int64_t most = 2;
        for (int64_t e = 0; e < routing.experts; ++e) most = std::max(most, routing.offsets[e + 1] - routing.offsets[e]);
        depth = std::min(kOuterDepth, most);
        int64_t times = std::min(kOuterDepth / depth, columns / kOuterHeight);
        while (times > 1 && columns / (times * kOuterHeight) * routing.experts < 4 * threads) times /= 2;
        times = std::max<int64_t>(times, 1);
        height = times * kOuterHeight;
        width = times * kOuterWidth;
    }
};

struct OuterWorkspace {
    Buffer<uint32_t> left, right;
    Buffer<float> sums;
    std::vector<double> bias;

    OuterWorkspace(const Problem<bf16>& p, const OuterShape& shape)
        : left(pairs_in(shape.depth) * shape.height),
          right(pairs_in(shape.depth) * shape.width),
          sums(shape.depth < kOuterDepth ? 0 : kOuterHeight * kOuterWidth),
          bias(std::max(p.width, p.size)) {}
};

// Columns as blocks of whole pieces, nearly equal.
struct Blocks {
    int64_t columns, piece, n;

    Blocks(int64_t of, int64_t most, int64_t whole) : columns(of), piece(whole), n((of + most - 1) / most) {}
    Range at(int64_t i) const {
        const int64_t pieces = (columns + piece - 1) / piece;
        return {pieces * i / n * piece, std::min(pieces * (i + 1) / n * piece, columns)};
    }
};

// Rows of one factor: row r of an expert is at of(r).
struct Factor {
    const bf16* data;
    int64_t columns;
    const Routing* by_token;  // where rows are tokens'; null: they are sorted

    const bf16* of(int64_t r) const { return data + (by_token ? by_token->token(r) : r) * columns; }
};

// A gradient of weights, whose lines in memory run along `right`.
struct PairedGradient {
    Factor left, right;
    OutMatrices<bf16> to;
    Blocks heights, widths;

    PairedGradient(const Factor& rows, const Factor& columns, const OutMatrices<bf16>& out, const OuterShape& shape)
        : left(out.by_rows() ? rows : columns),
          right(out.by_rows() ? columns : rows),
          to(out),
          heights(left.columns, shape.height, kOuterRows),
          widths(right.columns, shape.width, kPairLanes) {}
    int64_t parts() const { return heights.n * widths.n; }
};

// Columns of some rows, in pairs of rows, as strips of kOuterRows columns: a tile's numbers lie side by side.
inline void pack_strips(const Factor& from, Range rows, Range columns, uint32_t* to) {
    const int64_t depth = rows.end - rows.begin, strip = pairs_in(depth) * kOuterRows;
    weave(depth, columns.end - columns.begin, [&](int64_t k) { return from.of(rows.begin + k) + columns.begin; },
          [&](int64_t pair, int64_t c, __m512i v) {
              uint32_t* at = to + c / kOuterRows * strip + pair * kOuterRows;
              std::memcpy(at, &v, kOuterRows * sizeof *at);
              std::memcpy(at + strip, reinterpret_cast<const uint32_t*>(&v) + kOuterRows, kOuterRows * sizeof *at);
          });
}

// The same as panels of kOuterVectors registers.
inline void pack_panels(const Factor& from, Range rows, Range columns, uint32_t* to) {
    constexpr int64_t kWidth = kOuterVectors * kPairLanes;
    const int64_t depth = rows.end - rows.begin, n = columns.end - columns.begin;
    weave(depth, n, [&](int64_t k) { return from.of(rows.begin + k) + columns.begin; },
          [&](int64_t pair, int64_t c, __m512i v) {
              const int64_t first = c / kWidth * kWidth;
              const int64_t ld = std::min<int64_t>(kOuterVectors, vectors_in(n - first)) * kPairLanes;
              _mm512_storeu_si512(to + first * pairs_in(depth) + pair * ld + c - first, v);
          });
}

inline void put_rounded(const __m512& v, int64_t n, bf16* to) {
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(v);
    if (n >= kPairLanes) _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), rounded);
    else _mm256_mask_storeu_epi16(to, static_cast<__mmask16>((1u << n) - 1), rounded);
}

// Calls out(row, first column, registers) for the tiles of the sum over some rows.
template <class Out>
SPARSEFFN_OWN_FRAME void outer_tiles(int64_t pairs, int64_t height, int64_t width, const OuterWorkspace& ws, Out&& out) {
    constexpr int64_t kWidth = kOuterVectors * kPairLanes;
    for (int64_t column = 0; column < width; column += kWidth)
        with_constant<kOuterVectors>(std::min(kOuterVectors, vectors_in(width - column)), [&](auto n) {
            constexpr int N = decltype(n)::value;
            const uint32_t* panel = ws.right.data() + column * pairs;
            for (int64_t row = 0; row < height; row += kOuterRows) {
                const uint32_t* strip = ws.left.data() + row * pairs;
                __m512 acc[kOuterRows][N] = {};
                tile_pairs<kOuterRows, N>(pairs, panel, acc, [&](int i, int64_t k) { return strip[k * kOuterRows + i]; });
                for (int i = 0; i < kOuterRows && row + i < height; ++i) out(row + i, column, acc[i]);
            }
        });
}

// One block of an expert's gradient; zero without rows.
inline void outer_part(const Problem<bf16>& p, const PairedGradient& g, int64_t e, int64_t part, OuterWorkspace& ws) {
    const Range lines = g.heights.at(part / g.widths.n), columns = g.widths.at(part % g.widths.n);
    const int64_t height = lines.end - lines.begin, width = columns.end - columns.begin;
    const Range rows{p.routing.offsets[e], p.routing.offsets[e + 1]};
    bf16* to = g.to.of(e) + lines.begin * g.to.ld() + columns.begin;
    for (int64_t first = rows.begin; first == rows.begin || first < rows.end; first += kOuterDepth) {
        const Range some{first, std::min(first + kOuterDepth, rows.end)};
        pack_strips(g.left, some, lines, ws.left.data());
        pack_panels(g.right, some, columns, ws.right.data());
        outer_tiles(pairs_in(some.end - some.begin), height, width, ws, [&](int64_t i, int64_t column, const auto& acc) {
            float* sum = ws.sums.data() + i * kOuterWidth + column;
            for (const __m512& v : acc) {
                const __m512 whole = first == rows.begin ? v : _mm512_loadu_ps(sum) + v;
                if (some.end < rows.end) _mm512_storeu_ps(sum, whole);
                else put_rounded(whole, width - column, to + i * g.to.ld() + column);
                sum += kPairLanes;
                column += kPairLanes;
                if (column >= width) break;
            }
        });
    }
}

// Gradients of the hidden units of some rows: d, d_gate and scaled are [rows, size]; of the gates, one addend for each panel.
struct HiddenGradients {
    Buffer<bf16> d, d_gate, scaled;
    Buffer<float> gates;

    HiddenGradients(const Problem<bf16>& p, const Panels& panels, bool for_values)
        : d(p.routing.rows() * p.size),
          d_gate(p.gate_keys ? p.routing.rows() * p.size : 0),
          scaled(for_values ? p.routing.rows() * p.size : 0),
          gates(p.routing.rows() * panels.n) {}
};

inline void hidden_gradients_of(const Problem<bf16>& p, const Gradients<bf16>& g, const UnitsPart& part, const UnitsPart& following,
                                const Panels& panels, PairWorkspace& ws, HiddenGradients& h) {
    const Matrices<bf16> values = p.values.transposed();
    const int64_t n_units = part.n_units();
    Coming next = following.coming(values, p.width);
    const int64_t lines = next.share(part.tiles() * turns_in(p.width));
    pack_panel(part.of(values), p.width, n_units, ws.panel.data());
    for (int64_t first = part.rows.begin; first < part.rows.end; first += kWaiting) {
        const int64_t n = std::min(kWaiting, part.rows.end - first);
        for (int64_t i = 0; i < n; ++i) ws.rows[i] = g.y + p.routing.token(first + i) * p.width;
        put_products(ws.rows.data(), n, ws.panel.data(), p.width, n_units, next, lines, ws.units.data());
        for (int64_t i = 0; i < n; ++i) {
            const int64_t at = (first + i) * p.size + part.units.begin;
            float scaled[kPanelColumns], *d = ws.units.data() + i * kPanelColumns, *d_gate = nullptr;
            if (p.gate_keys) d_gate = ws.gate_units.data() + i * kPanelColumns;
            h.gates[(first + i) * panels.n + part.panel] = through_activation(p, first + i, part.units, d, d_gate, scaled);
            if (g.values) keep_row(scaled, n_units, h.scaled.data() + at);
            keep_row(d, n_units, h.d.data() + at);
            if (d_gate) keep_row(d_gate, n_units, h.d_gate.data() + at);
        }
    }
}

inline void backward_by_pairs(const Problem<bf16>& p, const Gradients<bf16>& g) {
    const Routing& routing = p.routing;
    const Panels panels(p.size, 1);
    const std::vector<UnitsPart> parts = units_parts(routing, panels);
    // Rows of the transposed keys: an expert's units.
    const TokenParts inputs(p, p.keys.row == 1 && (!p.gate_keys || p.gate_keys.row == 1));
    HiddenGradients h(p, panels, static_cast<bool>(g.values));
    auto all = one_for_each_thread<PairWorkspace>(p.threads, p, g.x ? inputs.sums() : 0);
    const OuterShape shape(routing, std::max(p.width, p.size), p.threads);
    auto outer = one_for_each_thread<OuterWorkspace>(p.threads, p, shape);
    const RowsTimes products[] = {{h.d.data(), p.keys.transposed(), p.size},
                                  {p.gate_keys ? h.d_gate.data() : nullptr, p.gate_keys.transposed(), p.size}};
    const Factor x{p.x, p.width, &routing}, gy{g.y, p.width, &routing};
    std::vector<PairedGradient> weights;
    if (g.keys) weights.push_back({x, {h.d.data(), p.size, nullptr}, g.keys, shape});
    if (g.gate_keys) weights.push_back({x, {h.d_gate.data(), p.size, nullptr}, g.gate_keys, shape});
    if (g.values) weights.push_back({{h.scaled.data(), p.size, nullptr}, gy, g.values, shape});
    int64_t per_expert = 1;  // the first are the biases
    for (const PairedGradient& w : weights) per_expert += w.parts();
    const int64_t n_parts = static_cast<int64_t>(parts.size()), n_inputs = g.x ? inputs.n() : 0;
#pragma omp parallel num_threads(p.threads)
    {
        PairWorkspace& ws = all[omp_get_thread_num()];
        OuterWorkspace& own = outer[omp_get_thread_num()];
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < n_parts; ++i)
            hidden_gradients_of(p, g, parts[i], parts[std::min(i + p.threads, n_parts - 1)], panels, ws, h);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t i = 0; i < n_inputs; ++i)
            sum_of_rows(p, products, nullptr, inputs, i, ws, g.x);
#pragma omp for schedule(dynamic, 1) nowait
        for (int64_t unit = 0; unit < routing.experts * per_expert; ++unit) {
            const int64_t e = unit / per_expert;
            int64_t part = unit % per_expert;
            if (part-- == 0) {
                bias_gradients(p, g, e, g.y, own.bias, [&](int64_t r) { return h.d.data() + r * p.size; },
                               [&](int64_t r) { return h.d_gate.data() + r * p.size; });
                for (int64_t r = routing.offsets[e]; r < routing.offsets[e + 1] && g.gates; ++r) {
                    float sum = through_value_bias(p, e, g.y + routing.token(r) * p.width);
                    for (int64_t i = 0; i < panels.n; ++i) sum += h.gates[r * panels.n + i];
                    g.gates[routing.order[r]] = sum;
                }
                continue;
            }
            auto w = weights.begin();
            for (; part >= w->parts(); ++w) part -= w->parts();
            outer_part(p, *w, e, part, own);
        }
    }
}

#endif

}  // namespace sparseffn
