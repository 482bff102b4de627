// The scores of a tile of queries with up to kBlock tiles of keys: which pairs are visible, and the products of both passes.
#pragma once

#include "tiles.hpp"

namespace hf {

constexpr int kBlock = 4;                                // key tiles worked on at once
constexpr int kScores = kBlock * kTile + kGranule;       // row length of a block's scores; the rest keeps rows apart

// The tiles in reach of the present query tile; a new one replaces the oldest.
class TileRing {
  public:
    TileRing(const AttentionParams& p, bool backward, Arena& arena) {
        for (int64_t i = 0; i < reach_in_tiles(p); i++) tiles_.emplace_back(p, backward, arena);
    }
    Tile& slot(int64_t index) { return tiles_[(index % size() + size()) % size()]; }  // where that tile is, or will be
    // evict(tile) is called before a tile's memory is used again.
    template <typename F> Tile& get(const Head& head, int64_t index, int64_t round, F&& evict) {
        Tile& tile = slot(index);
        if (tile.index != index) {
            if (tile.index != Tile::kEmpty) evict(tile);
            tile.read(head, index, round);
        }
        return tile;
    }
    template <typename F> void clear(F&& evict) {
        for (Tile& tile : tiles_) {
            if (tile.index != Tile::kEmpty) evict(tile);
            tile.index = Tile::kEmpty;
        }
    }
    static size_t floats(const AttentionParams& p, bool backward) { return reach_in_tiles(p) * Tile::floats(p, backward); }

  private:
    int64_t size() const { return static_cast<int64_t>(tiles_.size()); }
    std::vector<Tile> tiles_;
};

// Up to kBlock key tiles, and the columns of each that every granule of queries may see (multiples of kGranule).
struct KeyBlock {
    int tiles = 0, own = -1;  // own: slot of the queries' own tile, if it is among them
    Tile* tile[kBlock];
    int begin[kBlock][kGroups], end[kBlock][kGroups];

    void add(Tile& keys, const Queries& queries) {
        if (keys.index == queries.tile) own = tiles;
        for (int group = 0; group < kGroups; group++) {
            int64_t start = keys.sorted_pos[0], low = queries.group_lowest[group], high = queries.group_highest[group];
            int64_t from = low > high ? kTile : std::max<int64_t>(low - start, 0) / kGranule * kGranule;
            int64_t to = low > high ? 0 : (std::min<int64_t>(high - start + 1, keys.count) + kGranule - 1) / kGranule * kGranule;
            begin[tiles][group] = static_cast<int>(from);
            end[tiles][group] = static_cast<int>(std::max(from, to));
        }
        tile[tiles++] = &keys;
    }
    // Whether all of the queries see all of their own tile.
    bool own_is_whole() const {
        if (own < 0 || tile[own]->count < kTile) return false;
        for (int group = 0; group < kGroups; group++)
            if (begin[own][group] > 0 || end[own][group] < kTile) return false;
        return true;
    }
    bool visible(int slot, int group, int column) const { return begin[slot][group] <= column && column < end[slot][group]; }
};

// Calls add(block) for all that a tile of queries sees, block by block; `evict` as in TileRing::get.
template <typename Evict, typename Add>
void for_key_blocks(const Head& head, const Queries& queries, int64_t round, TileRing& ring, Evict&& evict, Add&& add) {
    int64_t tile = queries.tile;
    while (head.geometry.first(tile) > queries.lowest) tile--;
    do {
        KeyBlock block;
        for (; block.tiles < kBlock && head.geometry.first(tile) <= queries.highest; tile++)
            block.add(ring.get(head, tile, round, evict), queries);
        add(block);
    } while (head.geometry.first(tile) <= queries.highest);
}

// The first tile from `tile` on that the queries don't see: the next to be read.
inline int64_t beyond(const Head& head, const Queries& queries, int64_t tile) {
    while (head.geometry.first(tile) <= queries.highest) tile++;
    return tile;
}

// First column right of the panels that hold the diagonal, for the rows of a granule.
HF_INLINE int beyond_diagonal(int row) { return ((row / kGranule + 1) * kGranule + kPanel - 1) / kPanel * kPanel; }

// Scores of a tile with itself are symmetric: those beyond the diagonal, which multiply_rows left out.
inline void mirror_scores(float* own) {
    for (int row = 0; row < kTile; row += kWidth)
        for (int column = beyond_diagonal(row); column < kTile; column += kWidth)
            transpose(own + column * kScores + row, kScores, own + row * kScores + column, kScores);
}

// scores[i][slot * kTile + j] = sum over d of rows[i][d] * columns_of(tile)[d][j], where granules may be seen; of slot
// `mirrored` only up to the diagonal.
template <typename F>
inline void multiply_rows(const float* rows, int size, const KeyBlock& block, int groups, int mirrored, Prefetcher& prefetcher,
                          float* scores, F&& columns_of) {
    const int height = (size + kWidth - 1) / kWidth * kWidth;
    for (int slot = 0; slot < block.tiles; slot++) {
        for (int panel = 0; panel < kTile / kPanel; panel++) {
            const float* columns = columns_of(*block.tile[slot]) + panel * height * kPanel;
            for (int group = 0; group < groups; group++) {
                int begin = std::max(block.begin[slot][group], panel * kPanel);
                int end = std::min(block.end[slot][group], (panel + 1) * kPanel);
                if (begin >= end || (slot == mirrored && begin >= beyond_diagonal(group * kGranule))) continue;
                auto run = [&](auto vectors) {
                    for_rows_of_granule<vectors.value>([&](auto sums, int m) {
                        sums.clear();
                        int row = group * kGranule + m;
                        for (int at = 0; at < size; at += kPanel)
                            sums.template accumulate<kPanel, 1>(rows + at * kTile + row * kPanel,
                                                               columns + at * kPanel + begin % kPanel,
                                                               std::min(kPanel, size - at), prefetcher);
                        sums.write(scores + row * kScores + slot * kTile + begin, kScores);
                    });
                };
                if (end - begin > kWidth)
                    run(std::integral_constant<int, 2>());
                else
                    run(std::integral_constant<int, 1>());
            }
        }
    }
}

// Score gradients of a tile with itself, plus their transpose: what its rows get as queries and as keys in one product. Widens the
// columns of every group to all that are then not zero.
inline void add_transpose(float* own, int groups, KeyBlock& block) {
    int slot = block.own;
    KeyBlock before = block;
    alignas(64) float upper[kWidth * kWidth], lower[kWidth * kWidth];
    auto visible = [&](int row, int column) {
        return row / kGranule < groups && before.visible(slot, row / kGranule, column / kGranule * kGranule);
    };
    for (int row = 0; row < groups * kGranule; row += kWidth)
        for (int column = 0; column <= row; column += kWidth) {
            float *here = own + row * kScores + column, *there = own + column * kScores + row;
            bool low = visible(row, column), high = visible(column, row);
            if (!low && !high) continue;
            if (low) transpose(here, kScores, lower, kWidth);
            if (high) transpose(there, kScores, upper, kWidth);
            for (int i = 0; i < kWidth; i++) {
                Float sum_here = low ? load(here + i * kScores) : zero(), sum_there = high ? load(there + i * kScores) : zero();
                if (high) sum_here = sum_here + load(upper + i * kWidth);
                if (low) sum_there = sum_there + load(lower + i * kWidth);
                store(here + i * kScores, sum_here);
                if (row != column) store(there + i * kScores, sum_there);
            }
        }
    for (int group = 0; group < groups; group++)
        for (int other = 0; other < groups; other++) {
            if (!before.visible(slot, other, group * kGranule)) continue;
            block.begin[slot][group] = std::min(block.begin[slot][group], other * kGranule);
            block.end[slot][group] = std::max(block.end[slot][group], (other + 1) * kGranule);
        }
}

// to[i] += sum over slots, j of weights[i][slot * kTile + j] * rows_of(tile)[j], all panels.
template <typename F>
inline void add_weighted_rows(const float* weights, int size, const KeyBlock& block, int groups, Prefetcher& prefetcher, float* to,
                              F&& rows_of) {
    for_panels(size, [&](auto vectors, int panel) {
        for (int group = 0; group < groups; group++)
            for_rows_of_granule<vectors.value>([&](auto sums, int m) {
                int row = group * kGranule + m;
                float* target = to + (panel * kTile + row) * kPanel;
                sums.read(target, kPanel);
                for (int slot = 0; slot < block.tiles; slot++) {
                    int begin = block.begin[slot][group];
                    sums.template accumulate<kScores, 1>(weights + row * kScores + slot * kTile + begin,
                                                         rows_of(*block.tile[slot]) + (panel * kTile + begin) * kPanel,
                                                         block.end[slot][group] - begin, prefetcher);
                }
                sums.write(target, kPanel);
            });
    });
}

// to_of(tile)[j] += sum over i of weights[i][slot * kTile + j] * rows[i], all panels: the transposed product, but for one slot.
template <typename F>
inline void add_weighted_columns(const float* weights, const float* rows, int size, const KeyBlock& block, int groups, int skipped,
                                 Prefetcher& prefetcher, F&& to_of) {
    for_panels(size, [&](auto vectors, int panel) {
        for (int slot = 0; slot < block.tiles; slot++)
            for (int column = 0; column < kTile && slot != skipped; column += kGranule) {
                int first = 0, last = groups;  // groups that may see this granule
                while (first < last && !block.visible(slot, first, column)) first++;
                while (first < last && !block.visible(slot, last - 1, column)) last--;
                if (first == last) continue;
                for_rows_of_granule<vectors.value>([&](auto sums, int m) {
                    float* target = to_of(*block.tile[slot]) + (panel * kTile + column + m) * kPanel;
                    sums.read(target, kPanel);
                    for (int group = first; group < last; group++)
                        if (block.visible(slot, group, column))
                            sums.template accumulate<1, kScores>(
                                weights + group * kGranule * kScores + slot * kTile + column + m,
                                rows + (panel * kTile + group * kGranule) * kPanel, kGranule, prefetcher);
                    sums.write(target, kPanel);
                });
            }
    });
}

// What one row of queries asks of every vector of keys.
template <bool kShared, bool kWindow> struct RowMask {
    Int first, extent, token, limit, draw, threshold;
    const int *earlier_first, *earlier_extent;
    int earlier;

    RowMask(const Queries& q, int i, int earlier, int64_t keep_threshold)
        : first(splat(q.first[i])), extent(splat(q.extent[i])), token(splat(q.token[i])), limit(splat(q.limit[i])),
          draw(splat(q.draw[i])), threshold(splat(static_cast<int>(keep_threshold))),
          earlier_first(q.earlier_first.data() + i), earlier_extent(q.earlier_extent.data() + i), earlier(earlier) {}

    HF_INLINE Mask visible(const Tile& t, int column) const {  // counts in this round
        Mask m = within(load(t.sorted_pos + column), first, extent);
        if constexpr (kWindow)
            for (int r = 0; r < earlier; r++)
                m = first_only(m, within(load(t.earlier + r * kTile + column), splat(earlier_first[r * kTile]),
                                         splat(earlier_extent[r * kTile])));
        return m;
    }
    HF_INLINE Mask is_self(const Tile& t, int column) const { return equal(load(t.token + column), token); }
    HF_INLINE Mask masked(const Tile& t, int column) const { return greater(load(t.order + column), limit); }
    HF_INLINE Mask scored(const Tile& t, int column) const {  // visible, and its score is not a fixed number
        Mask m = visible(t, column);
        if constexpr (!kWindow) m = first_only(m, masked(t, column));
        if constexpr (kShared) m = first_only(m, is_self(t, column));
        return m;
    }
    HF_INLINE Mask dropped(const Tile& t, int column) const {  // prng.pair_scramble
        Int x = mul(bit_xor(load(t.draw + column), draw), splat(-2048144789));
        x = mul(bit_xor(x, shift_right<15>(x)), splat(-1028477387));
        return greater(threshold, x);
    }
};

}  // namespace hf
