// The scores of a tile of queries with up to kBlock tiles of keys: which pairs are seen, and the products of both passes.
#pragma once

#include "tiles.hpp"

namespace hf {

constexpr int kBlock = 4;                                // key tiles worked on at once
constexpr int kScores = kBlock * kTile + kGranule;       // row length of a block's scores; the rest keeps rows apart

// The tiles in reach of the present query tile; a new one takes the place of the oldest.
class Ring {
  public:
    Ring(const Problem& p, bool backward, Arena& arena) {
        for (int64_t i = 0; i < reach_in_tiles(p); i++) tiles_.emplace_back(p, backward, arena);
    }
    // `leave(tile)` is called before a tile's memory is used again.
    template <typename F> Tile& get(const Head& head, int64_t index, int64_t round, F&& leave) {
        Tile& tile = tiles_[(index % size() + size()) % size()];
        if (tile.index != index) {
            if (tile.index != Tile::kEmpty) leave(tile);
            tile.read(head, index, round);
        }
        return tile;
    }
    template <typename F> void clear(F&& leave) {
        for (Tile& tile : tiles_) {
            if (tile.index != Tile::kEmpty) leave(tile);
            tile.index = Tile::kEmpty;
        }
    }
    static size_t floats(const Problem& p, bool backward) { return reach_in_tiles(p) * Tile::floats(p, backward); }

  private:
    int64_t size() const { return static_cast<int64_t>(tiles_.size()); }
    std::vector<Tile> tiles_;
};

// Up to kBlock key tiles, and the columns of each that every granule of queries may see (multiples of kGranule).
struct KeyBlock {
    int tiles = 0;
    Tile* tile[kBlock];
    int begin[kBlock][kGroups], end[kBlock][kGroups];

    void add(Tile& keys, const Queries& queries) {
        for (int group = 0; group < kGroups; group++) {
            int64_t from = kTile, to = 0, start = keys.place[0];
            for (int i = group * kGranule; i < std::min(queries.count, (group + 1) * kGranule); i++) {
                if (!queries.sees[i]) continue;
                from = std::min<int64_t>(from, queries.first[i] - start);
                to = std::max<int64_t>(to, queries.first[i] + queries.extent[i] - start + 1);
            }
            from = std::max<int64_t>(from, 0) / kGranule * kGranule;
            to = (std::min<int64_t>(to, keys.count) + kGranule - 1) / kGranule * kGranule;
            begin[tiles][group] = static_cast<int>(from);
            end[tiles][group] = static_cast<int>(std::max(from, to));
        }
        tile[tiles++] = &keys;
    }
    bool shows(int slot, int group, int column) const { return begin[slot][group] <= column && column < end[slot][group]; }
};

// scores[i][slot * kTile + j] = sum over d of rows[i][d] * columns_of(tile)[d][j], where granules may be seen.
template <typename F>
inline void multiply_rows(const float* rows, int size, const KeyBlock& block, int groups, float* scores, F&& columns_of) {
    const int height = (size + kWidth - 1) / kWidth * kWidth;
    for (int slot = 0; slot < block.tiles; slot++) {
        for (int panel = 0; panel < kTile / kPanel; panel++) {
            const float* columns = columns_of(*block.tile[slot]) + panel * height * kPanel;
            for (int group = 0; group < groups; group++) {
                int begin = std::max(block.begin[slot][group], panel * kPanel);
                int end = std::min(block.end[slot][group], (panel + 1) * kPanel);
                if (begin >= end) continue;
                auto run = [&](auto vectors) {
                    for_rows_of_granule<vectors.value>([&](auto sums, int m) {
                        sums.clear();
                        int row = group * kGranule + m;
                        for (int at = 0; at < size; at += kPanel)
                            sums.template accumulate<kPanel, 1>(rows + at * kTile + row * kPanel,
                                                               columns + at * kPanel + begin % kPanel,
                                                               std::min(kPanel, size - at));
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

// to[i] += sum over slots, j of weights[i][slot * kTile + j] * rows_of(tile)[j], all panels.
template <typename F>
inline void add_weighted_rows(const float* weights, int size, const KeyBlock& block, int groups, float* to, F&& rows_of) {
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
                                                         block.end[slot][group] - begin);
                }
                sums.write(target, kPanel);
            });
    });
}

// to_of(tile)[j] += sum over i of weights[i][slot * kTile + j] * rows[i], all panels: the transposed product.
template <typename F>
inline void add_weighted_columns(const float* weights, const float* rows, int size, const KeyBlock& block, int groups, F&& to_of) {
    for_panels(size, [&](auto vectors, int panel) {
        for (int slot = 0; slot < block.tiles; slot++)
            for (int column = 0; column < kTile; column += kGranule) {
                int first = 0, last = groups;  // groups that may see this granule
                while (first < last && !block.shows(slot, first, column)) first++;
                while (first < last && !block.shows(slot, last - 1, column)) last--;
                if (first == last) continue;
                for_rows_of_granule<vectors.value>([&](auto sums, int m) {
                    float* target = to_of(*block.tile[slot]) + (panel * kTile + column + m) * kPanel;
                    sums.read(target, kPanel);
                    for (int group = first; group < last; group++)
                        if (block.shows(slot, group, column))
                            sums.template accumulate<1, kScores>(
                                weights + group * kGranule * kScores + slot * kTile + column + m,
                                rows + (panel * kTile + group * kGranule) * kPanel, kGranule);
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

    HF_INLINE Mask shown(const Tile& t, int column) const {  // counts in this round
        Mask m = within(load(t.place + column), first, extent);
        if constexpr (kWindow)
            for (int r = 0; r < earlier; r++)
                m = first_only(m, within(load(t.earlier + r * kTile + column), splat(earlier_first[r * kTile]),
                                         splat(earlier_extent[r * kTile])));
        return m;
    }
    HF_INLINE Mask itself(const Tile& t, int column) const { return equal(load(t.token + column), token); }
    HF_INLINE Mask masked(const Tile& t, int column) const { return greater(load(t.order + column), limit); }
    HF_INLINE Mask open(const Tile& t, int column) const {  // shown, and with a score of its own
        Mask m = shown(t, column);
        if constexpr (!kWindow) m = first_only(m, masked(t, column));
        if constexpr (kShared) m = first_only(m, itself(t, column));
        return m;
    }
    HF_INLINE Mask dropped(const Tile& t, int column) const {  // randomness.pair_scramble
        Int x = mul(bit_xor(load(t.draw + column), draw), splat(-2048144789));
        x = mul(bit_xor(x, shift_right<15>(x)), splat(-1028477387));
        return greater(threshold, x);
    }
};

// The same for one pair.
inline bool is_dropped(int query_draw, int key_draw, int64_t threshold) {
    uint32_t x = static_cast<uint32_t>(query_draw ^ key_draw) * 2246822507u;
    x = (x ^ (x >> 15)) * 3266489909u;
    return static_cast<int32_t>(x) < threshold;
}

}  // namespace hf
