// Tiles of sorted positions: rows gathered by token, their transposes, and what masks need to know of every position.
#pragma once

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "gemm.hpp"
#include "params.hpp"
#include "prng.hpp"

namespace hf {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kSelf = -1e5f * kLog2E;      // score of a token with itself, shared query/key
constexpr float kMasked = -1e9f * kLog2E;    // chunk rule: score of padding and of the future
constexpr float kNothing = -1e30f;           // maximum of a row before its first visible pair
constexpr float kFixed = -5e4f * kLog2E;     // a maximum below this one is a fixed score, not a product
constexpr float kEasy = 40.0f * kLog2E;      // where no |score| is larger, a softmax needs no maximum
constexpr int kNowhere = INT_MIN / 2;        // position of a column that holds no token

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

// Whether all entries of rows begin … end - 1 of panels are: 0 times what is not finite is NaN.
inline bool is_finite(const float* panels, int begin, int end, int64_t size) {
    Float nothing[kPanel / kWidth] = {};
    for (int panel = 0; panel < panels_of(size); panel++)
        for (int i = begin; i < end; i++)
            for (int part = 0; part < kPanel / kWidth; part++)
                nothing[part] = fma(load(panels + (panel * kTile + i) * kPanel + part * kWidth), zero(), nothing[part]);
    float total = 0;
    for (Float part : nothing) total += sum(part);
    return total == 0;
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

// The sorted positions of one head in tiles that never cross a round. Tiles are numbered through all rounds; numbers beyond
// the ends wrap around, and so do positions.
struct Geometry {
    int64_t length, rounds, per_round;

    explicit Geometry(const AttentionParams& p) : length(p.length), rounds(p.rounds), per_round((p.length + kTile - 1) / kTile) {}
    int64_t tiles() const { return per_round * rounds; }
    int64_t wraps(int64_t tile) const { return (tile >= 0 ? tile : tile - tiles() + 1) / tiles(); }
    int64_t first(int64_t tile) const {  // position of the tile's first token
        int64_t turn = wraps(tile), inner = tile - turn * tiles();
        return (inner / per_round + turn * rounds) * length + inner % per_round * kTile;
    }
    int count(int64_t tile) const {
        int64_t inner = tile - wraps(tile) * tiles();
        return static_cast<int>(std::min<int64_t>(kTile, length - inner % per_round * kTile));
    }
};

// Tiles a query tile may have to look at, its own included.
inline int64_t reach_in_tiles(const AttentionParams& p) {
    // by how much a chunk may reach beyond tiles
    int64_t longer = p.block_size % kTile == 0 ? p.block_size - kTile : kTile % p.block_size == 0 ? 0 : p.block_size - 1;
    int64_t span = p.left_reach + p.right_reach + kTile + (p.dedup_pairs ? 0 : 2 * longer);
    return span / kTile + (p.dedup_pairs ? 0 : span / p.length) + 4;
}

// The pointers of one (batch, head).
struct Head {
    const AttentionParams& p;
    Geometry geometry;
    Source query, key, value;
    const int32_t *perm, *window_start, *window_end, *inverse;
    const uint8_t* mask;
    uint32_t query_key, key_key;  // of the random numbers of queries and keys, for dropout (reference.pair_keys)
    int64_t offset, batch, head;  // offset: of this head in (B, H, T)

    static const int32_t* ints(const Strided& x, int64_t b, int64_t h) {
        return x.data ? static_cast<const int32_t*>(x.data) + b * x.batch + h * x.head : nullptr;
    }
    Head(const AttentionParams& p, int64_t index)
        : p(p), geometry(p), query(p.query, index / p.heads, index % p.heads, p.bfloat16, p.size),
          key(p.key.data ? p.key : p.query, index / p.heads, index % p.heads, p.bfloat16, p.size),
          value(p.value, index / p.heads, index % p.heads, p.bfloat16, p.value_size),
          offset(index * p.length), batch(index / p.heads), head(index % p.heads) {
        perm = ints(p.perm, batch, head);
        window_start = ints(p.window_start, batch, head);
        window_end = ints(p.window_end, batch, head);
        inverse = ints(p.inverse, batch, head);
        mask = p.mask ? p.mask + batch * p.length : nullptr;
        auto key = static_cast<uint32_t>(p.dropout_key);
        query_key = fold(fold(key, static_cast<uint32_t>(batch)), static_cast<uint32_t>(p.first_head + head));
        key_key = fold(key, ~uint32_t{0});
    }
    bool shared() const { return p.key.data == nullptr; }
    const int32_t* tokens(int64_t tile) const {  // of geometry.count(tile) positions
        return perm + (geometry.first(tile) - geometry.wraps(tile) * p.length * p.rounds);
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

// Keys and values of one tile of positions; with shared query/key its queries too.
struct Tile {
    static constexpr int64_t kEmpty = INT64_MIN;
    int64_t index = kEmpty;
    int count = 0;
    alignas(64) int token[kTile];
    alignas(64) int order[kTile];       // chunk rule: the token, or INT_MAX where it is padding
    alignas(64) int sorted_pos[kTile];
    alignas(64) int draw[kTile];        // random number for dropout
    alignas(64) float scale[kTile];     // of the query's product with this key, to a score in units of log 2
    alignas(64) float unit[kTile];      // key = row * unit. Shared: 1 / (|q| sqrt(size)), about; else key_scale
    alignas(64) float column_sum[kTile];  // shared, backward: sum over queries of dS * S; sweep: of query_weights * P
    alignas(64) float grad_mass[kTile];
    float longest = 0;                  // largest |key|
    bool finite = true;                 // whether all keys are, and their squares
    int* earlier = nullptr;             // [rounds - 1][kTile] positions in the earlier rounds
    float *rows, *columns, *values, *value_columns, *grad_key, *grad_value;

    static size_t floats(const AttentionParams& p, bool backward) {
        size_t rows = panels_of(p.size) * kPanel * kTile, values = panels_of(p.value_size) * kPanel * kTile;
        return (backward ? 3 * (rows + values) : 2 * rows + values) + p.rounds * kTile + 256;
    }
    Tile(const AttentionParams& p, bool backward, Arena& arena) {
        size_t size = panels_of(p.size) * kPanel * kTile, value_size = panels_of(p.value_size) * kPanel * kTile;
        rows = arena.take(size);
        columns = arena.take(size);
        values = arena.take(value_size);
        value_columns = backward ? arena.take(value_size) : nullptr;
        grad_key = backward ? arena.take(size) : nullptr;
        grad_value = backward ? arena.take(value_size) : nullptr;
        earlier = reinterpret_cast<int*>(arena.take(p.rounds * kTile));
    }

    void read(const Head& head, int64_t tile, int64_t round) {
        const AttentionParams& p = head.p;
        const Geometry& geometry = head.geometry;
        int64_t first = geometry.first(tile);
        const int32_t* tokens = head.tokens(tile);
        index = tile;
        count = geometry.count(tile);
        for (int i = 0; i < count; i++) {
            token[i] = tokens[i];
            order[i] = head.mask && !head.mask[token[i]] ? INT_MAX : token[i];
            sorted_pos[i] = static_cast<int>(first) + i;
            gather(head.key, token[i], rows, i);
            gather(head.value, token[i], values, i);
            if (p.dropout) draw[i] = static_cast<int>(fold(head.key_key, static_cast<uint32_t>(token[i])));
            if (p.grad_mass) grad_mass[i] = p.grad_mass[head.batch * p.length + token[i]];
        }
        for (int r = 0; r < head.earlier(round); r++)
            for (int i = 0; i < count; i++) earlier[r * kTile + i] = head.inverse[r * p.length + token[i]];
        for (int i = count; i < kTile; i++) {
            token[i] = order[i] = sorted_pos[i] = kNowhere;
            draw[i] = 0;
            grad_mass[i] = 0;
            clear_row(rows, i, p.size);
            clear_row(values, i, p.value_size);
            for (int r = 0; r < head.earlier(round); r++) earlier[r * kTile + i] = kNowhere;
        }
        transpose_panels(rows, static_cast<int>(p.size), columns);
        measure(head);
        std::memset(column_sum, 0, sizeof column_sum);
        if (value_columns) {
            transpose_panels(values, static_cast<int>(p.value_size), value_columns);
            std::memset(grad_key, 0, panels_of(p.size) * kPanel * kTile * sizeof(float));
            std::memset(grad_value, 0, panels_of(p.value_size) * kPanel * kTile * sizeof(float));
        }
    }
    // Lengths of the keys; those of shared query/key attention are the queries over their root mean square.
    void measure(const Head& head) {
        const Float size = splat(static_cast<float>(head.p.size)), little = splat(1e-6f), one = splat(1.0f);
        const Float key_scale = splat(static_cast<float>(head.p.key_scale));
        Float largest_key = zero(), nothing = zero();  // 0 times what is not finite is NaN
        square_rows(columns, static_cast<int>(head.p.size), unit);
        for (int i = 0; i < kTile; i += kWidth) {
            Float squares = load(unit + i), factor = head.shared() ? one / sqrt((squares / size + little) * size) : key_scale;
            largest_key = max(largest_key, sqrt(squares) * abs(factor));
            nothing = fma(squares, zero(), nothing);
            store(unit + i, factor);
            store(scale + i, factor * splat(kLog2E));
        }
        longest = largest(largest_key);
        finite = sum(nothing) == 0 || is_finite(rows, 0, kTile, head.p.size);  // squares of large numbers are infinite
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
    int64_t lowest, highest;            // sorted positions visible to any row; lowest > highest: none
    int64_t group_lowest[kGroups], group_highest[kGroups];  // visible to any row of a granule
    int token[kTile], limit[kTile];     // limit: tokens beyond it are the future, or padding (chunk rule)
    int first[kTile], extent[kTile];    // first visible position, and how many more
    int draw[kTile];
    std::vector<int> earlier_first, earlier_extent;  // [rounds - 1][kTile]
    alignas(64) float norm[kTile];      // |query| in units of log 2
    std::vector<float> own_rows, own_columns;  // queries of their own, panels

    explicit Queries(const AttentionParams& p)
        : earlier_first(p.rounds * kTile), earlier_extent(p.rounds * kTile),
          own_rows(p.key.data ? panels_of(p.size) * kPanel * kTile : 0), own_columns(own_rows.size()) {}

    void read(const Head& head, int64_t round, int64_t index) {
        const AttentionParams& p = head.p;
        tile = index;
        int64_t start = head.geometry.first(tile);
        count = head.geometry.count(tile);
        std::fill(group_lowest, group_lowest + kGroups, INT64_MAX);
        std::fill(group_highest, group_highest + kGroups, INT64_MIN);
        for (int i = 0; i < count; i++) {
            token[i] = head.perm[start + i];
            limit[i] = p.causal ? token[i] : INT_MAX - 1;
            set_window(head.window_start[start + i], head.window_end[start + i], first[i], extent[i]);
            if (head.window_start[start + i] <= head.window_end[start + i]) {
                int64_t &low = group_lowest[i / kGranule], &high = group_highest[i / kGranule];
                low = std::min<int64_t>(low, head.window_start[start + i]);
                high = std::max<int64_t>(high, head.window_end[start + i]);
            }
            for (int r = 0; r < head.earlier(round); r++) {
                int64_t there = r * p.length + head.inverse[r * p.length + token[i]];
                int begin = static_cast<int>(r * p.length);
                set_window(head.window_start[there] - begin, head.window_end[there] - begin, earlier_first[r * kTile + i],
                           earlier_extent[r * kTile + i]);
            }
            if (p.dropout) draw[i] = static_cast<int>(fold(head.query_key, static_cast<uint32_t>(token[i])));
            if (!own_rows.empty()) gather(head.query, token[i], own_rows.data(), i);
        }
        lowest = *std::min_element(group_lowest, group_lowest + kGroups);
        highest = *std::max_element(group_highest, group_highest + kGroups);
        if (!own_rows.empty()) measure(p);
    }
    void measure(const AttentionParams& p) {
        for (int i = count; i < kTile; i++) Tile::clear_row(own_rows.data(), i, p.size);
        transpose_panels(own_rows.data(), static_cast<int>(p.size), own_columns.data());
        square_rows(own_columns.data(), static_cast<int>(p.size), norm);
        for (int i = 0; i < kTile; i += kWidth) store(norm + i, sqrt(load(norm + i)) * splat(kLog2E));
    }
    static void set_window(int start, int end, int& first, int& extent) {
        first = start <= end ? start : INT_MAX / 2;  // no position is at or beyond it
        extent = start <= end ? end - start : 0;
    }
    // Shared query/key: the queries are the rows of their own tile.
    void take_norms(const Tile& own) {
        for (int i = 0; i < count; i++) norm[i] = kLog2E / own.unit[i];
    }
};

}  // namespace hf
