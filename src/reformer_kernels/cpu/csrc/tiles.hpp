// Tiles of the line: rows gathered by token, their transposes, and what masks need to know of every place.
#pragma once

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "gemm.hpp"
#include "problem.hpp"

namespace hf {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kSelf = -1e5f * kLog2E;      // score of a token with itself, shared query/key
constexpr float kMasked = -1e9f * kLog2E;    // chunk rule: score of padding and of the future
constexpr float kNothing = -1e30f;           // maximum of a row that has seen nothing yet
constexpr float kFixed = -5e4f * kLog2E;     // a maximum below this one is a fixed score, not a product
constexpr float kEasy = 40.0f * kLog2E;      // where no |score| is larger, a softmax needs no maximum
constexpr int kNowhere = INT_MIN / 2;        // place of a column that holds no token

// Where a row's vector that begins at `column` lies in panels.
template <typename T> HF_INLINE T* in_panels(T* panels, int row, int column) {
    return panels + column / kPanel * (kTile * kPanel) + row * kPanel + column % kPanel;
}

// Row `token` into row `at` of panels.
HF_INLINE void gather(const Source& rows, int token, float* panels, int at) {
    const char* from = rows.row(token);
    int column = 0;
    if (!rows.bfloat16)
        for (; column + kWidth <= rows.size; column += kWidth)
            store(in_panels(panels, at, column), load(reinterpret_cast<const float*>(from) + column));
    for (; column < rows.size; column += kWidth) {
        alignas(64) float part[kWidth] = {};
        for (int i = 0; i < std::min(kWidth, rows.size - column); i++) part[i] = rows.element(from, column + i);
        store(in_panels(panels, at, column), load(part));
    }
}

// Adds (or writes) row `at` of panels, times `factor`, to a row of `size` floats.
template <bool kAdd> HF_INLINE void scatter(const float* panels, int at, int size, Float factor, float* to) {
    for (int column = 0; column < size; column += kWidth) {
        Float x = load(in_panels(panels, at, column)) * factor;
        if (column + kWidth <= size) {
            store(to + column, kAdd ? load(to + column) + x : x);
        } else {
            alignas(64) float part[kWidth];
            store(part, x);
            for (int i = 0; i < size - column; i++) to[column + i] = kAdd ? to[column + i] + part[i] : part[i];
        }
    }
}

// Product of row `at` of panels with a row of `size` floats.
HF_INLINE float product_of_row(const float* panels, int at, const float* with, int size) {
    Float total = zero();
    int column = 0;
    for (; column + kWidth <= size; column += kWidth) total = fma(load(in_panels(panels, at, column)), load(with + column), total);
    float result = sum(total);
    for (const float* rest = in_panels(panels, at, column); column < size; column++) result += *rest++ * with[column];
    return result;
}

// Panels [columns / kPanel][kTile][kPanel] to panels of the transpose, [kTile / kPanel][columns][kPanel].
inline void transpose_panels(const float* from, int columns, float* to) {
    int height = (columns + kWidth - 1) / kWidth * kWidth;
    for (int panel = 0; panel < kTile / kPanel; panel++)
        for (int column = 0; column < columns; column += kWidth)
            for (int half = 0; half < kPanel; half += kWidth)
                transpose(from + (column / kPanel) * (kTile * kPanel) + (panel * kPanel + half) * kPanel + column % kPanel,
                          kPanel, to + (panel * height + column) * kPanel + half, kPanel);
}

// Squared lengths of a tile's rows, from their transpose.
inline void square_rows(const float* columns, int size, float* squares) {
    const int height = (size + kWidth - 1) / kWidth * kWidth;
    for (int panel = 0; panel < kTile / kPanel; panel++) {
        Float first = zero(), second = zero();
        for (const float *at = columns + panel * height * kPanel, *end = at + size * kPanel; at < end; at += kPanel) {
            first = fma(load(at), load(at), first);
            second = fma(load(at + kWidth), load(at + kWidth), second);
        }
        store(squares + panel * kPanel, first);
        store(squares + panel * kPanel + kWidth, second);
    }
}

// The line of one head in tiles that never cross a round. Tiles are numbered through all rounds; numbers beyond the
// ends stand for the line wrapped around, and so do places.
struct Geometry {
    int64_t length, rounds, per_round;

    explicit Geometry(const Problem& p) : length(p.length), rounds(p.rounds), per_round((p.length + kTile - 1) / kTile) {}
    int64_t tiles() const { return per_round * rounds; }
    int64_t wraps(int64_t tile) const { return (tile >= 0 ? tile : tile - tiles() + 1) / tiles(); }
    int64_t first(int64_t tile) const {  // place of the tile's first token
        int64_t turn = wraps(tile), inner = tile - turn * tiles();
        return (inner / per_round + turn * rounds) * length + inner % per_round * kTile;
    }
    int count(int64_t tile) const {
        int64_t inner = tile - wraps(tile) * tiles();
        return static_cast<int>(std::min<int64_t>(kTile, length - inner % per_round * kTile));
    }
};

// Tiles a query tile may have to look at, its own included.
inline int64_t reach_in_tiles(const Problem& p) {
    int64_t longer = p.tile % kTile == 0 ? p.tile - kTile : kTile % p.tile == 0 ? 0 : p.tile - 1;  // chunks than tiles
    int64_t span = p.before + p.after + kTile + (p.dedup_pairs ? 0 : 2 * longer);
    return span / kTile + (p.dedup_pairs ? 0 : span / p.length) + 4;
}

// The pointers of one (batch, head).
struct Head {
    const Problem& p;
    Geometry geometry;
    Source query, key, value;
    const int32_t *line, *lo, *hi, *inverse;
    const uint8_t* mask;
    const int32_t* query_draw;
    int64_t offset, batch, head;  // offset: of this head in (B, H, T)

    static const int32_t* ints(const Strided& x, int64_t b, int64_t h) {
        return x.data ? static_cast<const int32_t*>(x.data) + b * x.batch + h * x.head : nullptr;
    }
    Head(const Problem& p, int64_t index)
        : p(p), geometry(p), query(p.query, index / p.heads, index % p.heads, p.bfloat16, p.size),
          key(p.key.data ? p.key : p.query, index / p.heads, index % p.heads, p.bfloat16, p.size),
          value(p.value, index / p.heads, index % p.heads, p.bfloat16, p.value_size),
          offset(index * p.length), batch(index / p.heads), head(index % p.heads) {
        line = ints(p.line, batch, head);
        lo = ints(p.lo, batch, head);
        hi = ints(p.hi, batch, head);
        inverse = ints(p.inverse, batch, head);
        mask = p.mask ? p.mask + batch * p.length : nullptr;
        query_draw = p.query_draw ? p.query_draw + offset : nullptr;
    }
    bool shared() const { return p.key.data == nullptr; }
    const int32_t* tokens(int64_t tile) const {  // of geometry.count(tile) places
        return line + (geometry.first(tile) - geometry.wraps(tile) * p.length * p.rounds);
    }
    int earlier(int64_t round) const { return p.dedup_pairs ? static_cast<int>(round) : 0; }  // rounds that count first
    float* row(float* x, int token, int64_t size) const {  // of a contiguous (B, T, H, size)
        return x + ((batch * p.length + token) * p.heads + head) * size;
    }
    Source rows(float* x, int64_t size) const {
        return Source({x, p.length * p.heads * size, size, p.heads * size}, batch, head, false, size);
    }
};

// Memory for tiles: one allocation, handed out in pieces of whole cache lines.
class Arena {
  public:
    explicit Arena(size_t floats)
        : memory_(static_cast<float*>(std::aligned_alloc(64, rounded(floats) * sizeof(float))), std::free), next_(memory_.get()) {
        if (!memory_) throw std::bad_alloc();
        std::memset(memory_.get(), 0, rounded(floats) * sizeof(float));
    }
    float* take(size_t floats) {
        float* piece = next_;
        next_ += rounded(floats);
        return piece;
    }
    static size_t rounded(size_t floats) { return (floats + 15) / 16 * 16; }

  private:
    std::unique_ptr<float, decltype(&std::free)> memory_;
    float* next_;
};

// Keys and values of one tile of places; with shared query/key its queries too.
struct Tile {
    static constexpr int64_t kEmpty = INT64_MIN;
    int64_t index = kEmpty;
    int count = 0;
    alignas(64) int token[kTile];
    alignas(64) int order[kTile];       // chunk rule: the token, or INT_MAX where it is padding
    alignas(64) int place[kTile];
    alignas(64) int draw[kTile];        // dropout
    alignas(64) float scale[kTile];     // of the query's product with this key, to a score in units of log 2
    alignas(64) float unit[kTile];      // key = row * unit. Shared: 1 / (|q| sqrt(size)), about; else key_scale
    alignas(64) float pull[kTile];      // shared, backward: sum over queries of dS * S; sweep: of paid * P
    alignas(64) float push[kTile];      // gradient of what the token receives
    float longest = 0;                  // largest |key|
    int* earlier = nullptr;             // [rounds - 1][kTile] places in the earlier rounds
    float *rows, *columns, *values, *value_columns, *grad, *value_grad;

    static size_t floats(const Problem& p, bool backward) {
        size_t rows = panels_of(p.size) * kPanel * kTile, values = panels_of(p.value_size) * kPanel * kTile;
        return (backward ? 3 * (rows + values) : 2 * rows + values) + p.rounds * kTile + 256;
    }
    Tile(const Problem& p, bool backward, Arena& arena) {
        size_t size = panels_of(p.size) * kPanel * kTile, value_size = panels_of(p.value_size) * kPanel * kTile;
        rows = arena.take(size);
        columns = arena.take(size);
        values = arena.take(value_size);
        value_columns = backward ? arena.take(value_size) : nullptr;
        grad = backward ? arena.take(size) : nullptr;
        value_grad = backward ? arena.take(value_size) : nullptr;
        earlier = reinterpret_cast<int*>(arena.take(p.rounds * kTile));
    }

    void read(const Head& head, int64_t tile, int64_t round) {
        const Problem& p = head.p;
        const Geometry& geometry = head.geometry;
        int64_t first = geometry.first(tile);
        const int32_t* tokens = head.tokens(tile);
        index = tile;
        count = geometry.count(tile);
        for (int i = 0; i < count; i++) {
            token[i] = tokens[i];
            order[i] = head.mask && !head.mask[token[i]] ? INT_MAX : token[i];
            place[i] = static_cast<int>(first) + i;
            gather(head.key, token[i], rows, i);
            gather(head.value, token[i], values, i);
            if (p.key_draw) draw[i] = p.key_draw[token[i]];
            if (p.push) push[i] = p.push[head.batch * p.length + token[i]];
        }
        for (int r = 0; r < head.earlier(round); r++)
            for (int i = 0; i < count; i++) earlier[r * kTile + i] = head.inverse[r * p.length + token[i]];
        for (int i = count; i < kTile; i++) {
            token[i] = order[i] = place[i] = kNowhere;
            draw[i] = 0;
            push[i] = 0;
            clear_row(rows, i, p.size);
            clear_row(values, i, p.value_size);
            for (int r = 0; r < head.earlier(round); r++) earlier[r * kTile + i] = kNowhere;
        }
        transpose_panels(rows, static_cast<int>(p.size), columns);
        measure(head);
        std::memset(pull, 0, sizeof pull);
        if (value_columns) {
            transpose_panels(values, static_cast<int>(p.value_size), value_columns);
            std::memset(grad, 0, panels_of(p.size) * kPanel * kTile * sizeof(float));
            std::memset(value_grad, 0, panels_of(p.value_size) * kPanel * kTile * sizeof(float));
        }
    }
    // Lengths of the keys; those of shared query/key attention are the queries over their root mean square.
    void measure(const Head& head) {
        const Float size = splat(static_cast<float>(head.p.size)), little = splat(1e-6f), one = splat(1.0f);
        const Float given = splat(static_cast<float>(head.p.key_scale));
        Float largest_key = zero();
        square_rows(columns, static_cast<int>(head.p.size), unit);
        for (int i = 0; i < kTile; i += kWidth) {
            Float squares = load(unit + i), factor = head.shared() ? one / sqrt((squares / size + little) * size) : given;
            largest_key = max(largest_key, sqrt(squares) * abs(factor));
            store(unit + i, factor);
            store(scale + i, factor * splat(kLog2E));
        }
        longest = largest(largest_key);
    }
    static void clear_row(float* panels, int at, int64_t size) {
        for (int panel = 0; panel < panels_of(size); panel++)
            std::memset(panels + (panel * kTile + at) * kPanel, 0, kPanel * sizeof(float));
    }
};

// What is known of a tile's queries, row by row.
struct Queries {
    int64_t tile = 0;
    int count = 0;
    int64_t lowest, highest;            // places that any row sees; lowest > highest: none
    int64_t group_lowest[kGroups], group_highest[kGroups];  // that any row of a granule sees
    int token[kTile], limit[kTile];     // limit: tokens beyond it are the future, or padding (chunk rule)
    int first[kTile], extent[kTile];    // first place seen, and how many more
    int draw[kTile];
    std::vector<int> earlier_first, earlier_extent;  // [rounds - 1][kTile]
    alignas(64) float norm[kTile];      // |query| in units of log 2
    std::vector<float> own_rows, own_columns;  // queries of their own, panels

    explicit Queries(const Problem& p)
        : earlier_first(p.rounds * kTile), earlier_extent(p.rounds * kTile),
          own_rows(p.key.data ? panels_of(p.size) * kPanel * kTile : 0), own_columns(own_rows.size()) {}

    void read(const Head& head, int64_t round, int64_t index) {
        const Problem& p = head.p;
        tile = index;
        int64_t place = head.geometry.first(tile);
        count = head.geometry.count(tile);
        std::fill(group_lowest, group_lowest + kGroups, INT64_MAX);
        std::fill(group_highest, group_highest + kGroups, INT64_MIN);
        for (int i = 0; i < count; i++) {
            token[i] = head.line[place + i];
            limit[i] = p.causal ? token[i] : INT_MAX - 1;
            set_window(head.lo[place + i], head.hi[place + i], first[i], extent[i]);
            if (head.lo[place + i] <= head.hi[place + i]) {
                int64_t &low = group_lowest[i / kGranule], &high = group_highest[i / kGranule];
                low = std::min<int64_t>(low, head.lo[place + i]);
                high = std::max<int64_t>(high, head.hi[place + i]);
            }
            for (int r = 0; r < head.earlier(round); r++) {
                int64_t there = r * p.length + head.inverse[r * p.length + token[i]];
                int start = static_cast<int>(r * p.length);
                set_window(head.lo[there] - start, head.hi[there] - start, earlier_first[r * kTile + i],
                           earlier_extent[r * kTile + i]);
            }
            if (head.query_draw) draw[i] = head.query_draw[token[i]];
            if (!own_rows.empty()) gather(head.query, token[i], own_rows.data(), i);
        }
        lowest = *std::min_element(group_lowest, group_lowest + kGroups);
        highest = *std::max_element(group_highest, group_highest + kGroups);
        if (!own_rows.empty()) measure(p);
    }
    void measure(const Problem& p) {
        for (int i = count; i < kTile; i++) Tile::clear_row(own_rows.data(), i, p.size);
        transpose_panels(own_rows.data(), static_cast<int>(p.size), own_columns.data());
        square_rows(own_columns.data(), static_cast<int>(p.size), norm);
        for (int i = 0; i < kTile; i += kWidth) store(norm + i, sqrt(load(norm + i)) * splat(kLog2E));
    }
    static void set_window(int lo, int hi, int& first, int& extent) {
        first = lo <= hi ? lo : INT_MAX / 2;  // no place is at or beyond it
        extent = lo <= hi ? hi - lo : 0;
    }
    // Shared query/key: the queries are the rows of their own tile.
    void take_norms(const Tile& own) {
        for (int i = 0; i < count; i++) norm[i] = kLog2E / own.unit[i];
    }
};

}  // namespace hf
