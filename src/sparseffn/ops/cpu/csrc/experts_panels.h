// The expert computation of many bfloat16 rows, by panels of columns that are packed once each:
//
//     hidden units:  for each expert and panel of units, all of the expert's rows
//     outputs:       for each panel of columns, the tokens' sums over all experts, in float, rounded once
//
// Each panel belongs to one thread, whose sums nobody else adds to: results do not depend on the number of threads. Hidden units
// are rounded once between the two products, as in plain PyTorch.
#pragma once

#include "hidden_backward.h"
#include "sorted_rows.h"

namespace sparseffn {

#if defined(SPARSEFFN_PAIR_PRODUCTS)

// Rows of an expert, and tokens, that one panel serves before another thread may pack it again.
constexpr int64_t kPanelRows = 1024, kPanelTokens = 4096;
// Where rows of a matrix are lines, a panel takes some bytes of each, and a line of a wide one is a page of its own. Hence pieces of
// a long depth are read for several panels, before the lines below, if their sums (tokens times panels) are not too many to stay
// near. docs/kernels.md has what it gains.
constexpr int64_t kPanelsTogether = 8, kPieceDepth = 256, kDepthOfPieces = 32, kSumsTogether = 8192;

// Columns as panels of whole registers, nearly equal.
struct Panels {
    int64_t columns, n;

    // As a multiple of `parts` where there are enough registers.
    Panels(int64_t of, int64_t parts) : columns(of) {
        const int64_t vectors = vectors_in(of), needed = (vectors + kPanelVectors - 1) / kPanelVectors;
        n = std::min(vectors, (needed + parts - 1) / parts * parts);
    }
    Range at(int64_t i) const {
        const int64_t vectors = vectors_in(columns);
        return {vectors * i / n * kPairLanes, std::min(vectors * (i + 1) / n * kPairLanes, columns)};
    }
};

// What one thread needs. Made before threads start: what they cannot get must not end the process.
template <class Rows> struct PanelWorkspace {
    Buffer<uint32_t> panel, gate_panel;
    Buffer<float> units, gate_units, sums;
    typename Rows::Scratch scratch;

    PanelWorkspace(const Problem<bf16>& p, int64_t n_sums)
        : panel(Rows::pairs(std::max(p.width, p.size)) * kPanelColumns),
          gate_panel(p.gate_keys ? Rows::pairs(std::max(p.width, p.size)) * kPanelColumns : 0),
          units(kWaiting * kPanelColumns),
          gate_units(p.gate_keys ? kWaiting * kPanelColumns : 0),
          sums(n_sums * kPanelColumns) {}
};

// A panel of an expert's hidden units, for some of its rows.
struct UnitsPart {
    int64_t expert;
    Range rows, units;
    int64_t panel;

    int64_t n_units() const { return units.end - units.begin; }
    // The panel in [width, size].
    Matrix<bf16> of(const Matrices<bf16>& m) const { return m.of(expert).from(0, units.begin); }
    Coming coming(const Matrices<bf16>& m, int64_t depth) const { return m ? coming_of(of(m), depth, n_units()) : Coming(); }
};

inline std::vector<UnitsPart> units_parts(const Routing& routing, const Panels& panels) {
    std::vector<UnitsPart> parts;
    for (int64_t e = 0; e < routing.experts; ++e)
        for (int64_t r = routing.offsets[e]; r < routing.offsets[e + 1]; r += kPanelRows)
            for (int64_t i = 0; i < panels.n; ++i)
                parts.push_back({e, {r, std::min(r + kPanelRows, routing.offsets[e + 1])}, panels.at(i), i});
    return parts;
}

// to[i] = row i of some, times the panel, at kPanelColumns from row to row.
template <class Rows>
void put_products(const Rows& a, int64_t expert, Range rows, const MatrixPanel& panel, Coming& next, int64_t lines,
                  typename Rows::Scratch& scratch, float* to) {
    a.product(expert, rows, 0, panel, next, lines, scratch, [&](int64_t r, const auto& acc) {
        std::memcpy(to + (r - rows.begin) * kPanelColumns, acc, sizeof acc);
    });
}

// Row r's hidden units with its gate and dropout.
inline void weigh_row(const Problem<bf16>& p, int64_t r, Range units, float* row) {
    const int64_t selection = p.routing.order[r], n = units.end - units.begin;
    const float gate = p.gates[selection];
    if (!p.keep) {
        for (int64_t g = 0; g < n; ++g) row[g] *= gate;
        return;
    }
    const uint8_t* keep = p.keep + selection * p.size + units.begin;
    const float scale = gate * p.keep_scale;
    for (int64_t g = 0; g < n; ++g) row[g] = keep[g] ? row[g] * scale : 0.0f;
}

// a [rows, size] gets what goes to the values. `following` is what this thread will probably do next.
template <class Rows>
void units_of(const Problem<bf16>& p, const UnitsPart& part, const UnitsPart& following, const Rows& x, PanelWorkspace<Rows>& ws, Rows& a) {
    const Range units = part.units;
    const int64_t n_units = part.n_units();
    Coming keys = following.coming(p.keys, p.width), gate_keys = following.coming(p.gate_keys, p.width);
    const int64_t turns = Rows::turns(part.rows.end - part.rows.begin, n_units, p.width);
    const int64_t lines = keys.share(turns), gate_lines = gate_keys.share(turns);
    const MatrixPanel panel = x.panel(part.of(p.keys), p.width, n_units, ws.panel.data());
    MatrixPanel gate_panel{};
    if (p.gate_keys) gate_panel = x.panel(part.of(p.gate_keys), p.width, n_units, ws.gate_panel.data());
    const auto bias = [&](const bf16* of, float* row) {
        if (of) add_bias(of + part.expert * p.size + units.begin, n_units, row);
    };
    for (int64_t first = part.rows.begin; first < part.rows.end; first += kWaiting) {
        const Range some{first, std::min(first + kWaiting, part.rows.end)};
        put_products(x, part.expert, some, panel, keys, lines, ws.scratch, ws.units.data());
        if (p.gate_keys)
            put_products(x, part.expert, some, gate_panel, gate_keys, gate_lines, ws.scratch, ws.gate_units.data());
        for (int64_t r = some.begin; r < some.end; ++r) {
            float* row = ws.units.data() + (r - first) * kPanelColumns;
            float* gate_row = p.gate_keys ? ws.gate_units.data() + (r - first) * kPanelColumns : nullptr;
            bias(p.key_bias, row);
            if (gate_row) bias(p.gate_bias, gate_row);
            activate_row(p, n_units, row, gate_row, p.hidden ? p.hidden + r * p.kept() * p.size + units.begin : nullptr);
            weigh_row(p, r, units, row);
            a.put(part.expert, r, units.begin, n_units, row);
        }
    }
}

// Rows [rows, depth], sorted, times their expert's matrix [depth, width].
template <class Rows> struct RowsTimes {
    const Rows* rows;  // may be null
    Matrices<bf16> by;
    int64_t depth;
};

// Tokens that one thread sums at a time, panels of their columns, and the depth of a product that it does so with.
struct TokenParts {
    int64_t tokens, blocks = 0, groups = 0, depth;
    Panels panels;

    // `in_pieces`: rows of all matrices are lines.
    TokenParts(const Problem<bf16>& p, bool in_pieces)
        : tokens(p.routing.tokens), depth(p.size), panels(p.width, p.threads) {
        blocks = std::max((tokens + kPanelTokens - 1) / kPanelTokens, (p.threads + panels.n - 1) / panels.n);
        groups = panels.n;
        if (!in_pieces || depth <= kPieceDepth) return;
        // Nearly equal, each but the last of whole tiles' depth: those of any number of threads.
        const int64_t pieces = (depth + kPieceDepth - 1) / kPieceDepth, least = (depth + pieces - 1) / pieces;
        depth = (least + kDepthOfPieces - 1) / kDepthOfPieces * kDepthOfPieces;
        // Each thread finds as many groups, and two or more.
        const int64_t most = std::min(kPanelsTogether, kSumsTogether / std::max<int64_t>(tokens_at_once(), 1));
        const int64_t together = std::clamp<int64_t>(panels.n / (2 * p.threads), 1, std::max<int64_t>(most, 1));
        const int64_t needed = (panels.n + together - 1) / together;
        groups = std::min((needed + p.threads - 1) / p.threads * p.threads, panels.n);
    }
    int64_t n() const { return blocks * groups; }
    int64_t tokens_at_once() const { return (tokens + blocks - 1) / blocks; }
    // Sums, each of kPanelColumns columns.
    int64_t sums() const { return tokens_at_once() * ((panels.n + groups - 1) / groups); }
    Range tokens_of(int64_t i) const { return part_of(tokens, static_cast<int>(i / groups), static_cast<int>(blocks)); }
    Range columns_of(int64_t i) const {
        const Range own = part_of(panels.n, static_cast<int>(i % groups), static_cast<int>(groups));
        return {panels.at(own.begin).begin, panels.at(own.end - 1).end};
    }
};

// Some columns of an expert's matrix, a piece of its depth at a time.
struct Piece {
    Matrix<bf16> of;
    Range depth;

    template <class Rows> static Piece first(const RowsTimes<Rows>& product, int64_t expert, int64_t column, int64_t most) {
        return Piece{product.by.of(expert).from(0, column), {0, 0}}.after(product.depth, most);
    }
    Piece after(int64_t whole, int64_t most) const { return {of, {depth.end, std::min(depth.end + most, whole)}}; }
    Matrix<bf16> from(int64_t column) const { return of.from(depth.begin, column); }
    int64_t size() const { return depth.end - depth.begin; }
    Coming coming(int64_t columns) const { return coming_of(from(0), size(), columns); }
};

// y[token][columns] = sum over the token's rows of all products, and of their expert's bias of values times the gate.
template <class Rows, int M>
void sum_of_rows(const Problem<bf16>& p, const RowsTimes<Rows> (&products)[M], const bf16* bias, const TokenParts& parts, int64_t part,
                 PanelWorkspace<Rows>& ws, bf16* y) {
    const Range tokens = parts.tokens_of(part), columns = parts.columns_of(part);
    // The first expert from e on that one of these tokens selected.
    const auto selected_from = [&](int64_t e) {
        for (; e < p.routing.experts; ++e)
            if (const Range rows = p.routing.rows_of(e, tokens); rows.begin < rows.end) break;
        return e;
    };
    const int64_t n = columns.end - columns.begin, ld = vectors_in(n) * kPairLanes;
    const Panels panels(n, 1);
    const auto sums_of = [&](int64_t row) { return ws.sums.data() + (p.routing.token(row) - tokens.begin) * ld; };
    std::fill_n(ws.sums.data(), (tokens.end - tokens.begin) * ld, 0.0f);
    for (int64_t e = selected_from(0), e_after = 0; e < p.routing.experts; e = e_after) {
        e_after = selected_from(e + 1);
        const Range rows = p.routing.rows_of(e, tokens);
        for (int64_t r = rows.begin; r < rows.end && bias; ++r) {
            const float gate = p.gates[p.routing.order[r]];
            for (int64_t c = 0; c < n; ++c) sums_of(r)[c] += gate * upcast(bias[e * p.width + columns.begin + c]);
        }
        for (int m = 0; m < M; ++m) {
            const RowsTimes<Rows>& product = products[m];
            if (!product.rows) continue;
            // What comes after the last piece: the next product, or the first one with the next expert.
            const bool more = m + 1 < M && products[m + 1].rows;
            const int64_t expert = more ? e : e_after;
            Piece piece = Piece::first(product, e, columns.begin, parts.depth);
            while (piece.size()) {
                const Piece below = piece.after(product.depth, parts.depth);
                Coming next;
                if (below.size()) next = below.coming(n);
                else if (expert < p.routing.experts)
                    next = Piece::first(products[more ? m + 1 : 0], expert, columns.begin, parts.depth).coming(n);
                const int64_t lines = next.share(panels.n * Rows::turns(rows.end - rows.begin, panels.at(0).end, piece.size()));
                for (int64_t panel = 0; panel < panels.n; ++panel) {
                    const Range own = panels.at(panel);
                    const MatrixPanel b = product.rows->panel(piece.from(own.begin), piece.size(), own.end - own.begin, ws.panel.data());
                    for (int64_t first = rows.begin; first < rows.end; first += kWaiting) {
                        const Range some{first, std::min(first + kWaiting, rows.end)};
                        product.rows->product(e, some, piece.depth.begin, b, next, lines, ws.scratch,
                                              [&](int64_t r, const auto& acc) {
                                                  float* to = sums_of(r) + own.begin;
                                                  for (const __m512& v : acc) {
                                                      _mm512_storeu_ps(to, _mm512_loadu_ps(to) + v);
                                                      to += kPairLanes;
                                                  }
                                              });
                    }
                }
                piece = below;
            }
        }
    }
    for (int64_t t = tokens.begin; t < tokens.end; ++t)
        keep_row(ws.sums.data() + (t - tokens.begin) * ld, n, y + t * p.width + columns.begin);
}

// Whether all keys of a unit lie side by side.
inline bool keys_are_lines(const Problem<bf16>& p) { return p.keys.row == 1 && (!p.gate_keys || p.gate_keys.row == 1); }

template <class Rows> void forward_by_panels(const Problem<bf16>& p, bf16* y) {
    const Panels panels(p.size, 1);
    const std::vector<UnitsPart> parts = units_parts(p.routing, panels);
    const TokenParts outputs(p, false);
    Rows x(p.routing, p.width, p.x, keys_are_lines(p)), a(p.routing, p.size, p.values.row == 1);
    auto all = one_for_each_thread<PanelWorkspace<Rows>>(p.threads, p, outputs.sums());
    const RowsTimes<Rows> products[] = {{&a, p.values, p.size}};
    const int64_t n_parts = static_cast<int64_t>(parts.size());
#pragma omp parallel num_threads(p.threads)
    {
        [[maybe_unused]] const typename Rows::Thread ready;
        PanelWorkspace<Rows>& ws = all[omp_get_thread_num()];
        x.fill();
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < n_parts; ++i)
            units_of(p, parts[i], parts[std::min(i + p.threads, n_parts - 1)], x, ws, a);
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < outputs.n(); ++i)
            sum_of_rows(p, products, p.value_bias, outputs, i, ws, y);
    }
}

// Rows of an expert, on average, from which on panels are worth packing; and tiles that read lines where they lie. Measured with tiles
// (Xeon, family 6, model 167), cold, over the time of dot products: 1,024 x 512 with one and two rows 1.1, with four 0.92, with 16 0.55;
// 2,048 x 1,024 with two rows 0.92.
constexpr int64_t kPackedRows = 24, kLineRows = 4;

inline bool goes_by_panels(const Problem<bf16>& p) {
    const bool lies_ready = has_tiles() && keys_are_lines(p) && p.values.row == 1;
    return p.routing.rows() >= (lies_ready ? kLineRows : kPackedRows) * p.routing.experts;
}

inline void forward_by_panels(const Problem<bf16>& p, bf16* y) {
#if defined(SPARSEFFN_TILES)
    if (has_tiles()) return forward_by_panels<TileRows>(p, y);
#endif
    forward_by_panels<PairRows>(p, y);
}

#endif

}  // namespace sparseffn
