// Sums of the weights P alone, computed again from the saved maximum and sum of every row: over queries, the attention mass
// (sum of query_weights * P), or over keys, what its gradient needs (sum of P * grad_mass).
#pragma once

#include "backward.hpp"

namespace hf {

struct SweepScratch {
    Arena arena;
    TileRing ring;
    Queries queries;
    Prefetcher prefetcher;
    float* scores;  // [kTile][kScores]

    explicit SweepScratch(const AttentionParams& p)
        : arena(TileRing::floats(p, false) + kTile * kScores), ring(p, false, arena), queries(p), scores(arena.take(kTile * kScores)) {}
};

template <bool kShared, bool kWindow> struct SweepTask {
    const AttentionParams& p;
    const Head& head;
    int64_t round;
    SweepScratch& w;

    void run(int64_t begin, int64_t end) {
        auto evict = [this](Tile& tile) {
            for (int i = 0; i < tile.count && !p.grad_mass; i++) p.mass[head.offset + tile.token[i]] += tile.column_sum[i];
        };
        for (int64_t tile = begin; tile < end; tile++) {
            w.queries.read(head, round, tile);
            prefetch_next(tile + 1, end);
            if (w.queries.lowest > w.queries.highest) continue;
            const Tile& own = w.ring.get(head, tile, round, evict);
            const float* rows = kShared ? own.rows : w.queries.own_rows.data();
            for_key_blocks(head, w.queries, round, w.ring, evict, [&](KeyBlock& block) { add_block(block, rows); });
        }
        w.ring.clear(evict);
    }
    void prefetch_next(int64_t next, int64_t end) {
        w.prefetcher.clear();
        if (next >= end) return;
        int64_t keys = beyond(head, w.queries, next);
        w.prefetcher.add(head.key, head.tokens(keys), head.geometry.count(keys));
        if (!kShared) w.prefetcher.add(head.query, head.tokens(next), head.geometry.count(next));
    }
    void add_block(KeyBlock& block, const float* rows) {
        const Queries& q = w.queries;
        int groups = (q.count + kGranule - 1) / kGranule;
        int mirrored = kShared && block.own_is_whole() ? block.own : -1;
        multiply_rows(rows, static_cast<int>(p.size), block, groups, mirrored, w.prefetcher, w.scores,
                      [](const Tile& t) { return t.columns; });
        if (mirrored >= 0) mirror_scores(w.scores + mirrored * kTile);
        for (int i = 0; i < q.count; i++) {
            RowMask<kShared, kWindow> mask(q, i, head.earlier(round), p.keep_threshold);
            int64_t at = head.offset + q.token[i];
            float row_max = p.row_max[at], row_sum = p.row_sum[at];
            if (row_max < kFixed) {  // weights of fixed scores: itself (shared query/key), or nothing but padding
                Float weight = splat(1 / row_sum);
                add_row(block, i, [&](const Tile& t, int column, const float*) {
                    Mask used = mask.visible(t, column);
                    if (kShared) used = both(used, mask.is_self(t, column));
                    return keep(used, weight);
                });
            } else {
                Float shift = splat(-(row_max + std::log2(row_sum)));
                add_row(block, i, [&](const Tile& t, int column, const float* score) {
                    return keep(mask.scored(t, column), exp2(fma(load(score), load(t.scale + column), shift)));
                });
            }
        }
    }
    template <typename F> HF_INLINE void add_row(KeyBlock& block, int i, F&& weight_of) {
        const int token = w.queries.token[i];
        if (p.grad_mass) {
            Float total = zero();
            for_columns(block, i, [&](Tile& t, int column, const float* score) {
                total = fma(weight_of(t, column, score), load(t.grad_mass + column), total);
            });
            p.mass_dot[head.offset + token] += sum(total);
        } else {
            const Float query_weight = splat(p.query_weights[head.batch * p.length + token]);
            for_columns(block, i, [&](Tile& t, int column, const float* score) {
                store(t.column_sum + column, fma(weight_of(t, column, score), query_weight, load(t.column_sum + column)));
            });
        }
    }
    template <typename F> HF_INLINE void for_columns(KeyBlock& block, int i, F&& f) {
        for (int slot = 0; slot < block.tiles; slot++) {
            const float* scores = w.scores + i * kScores + slot * kTile;
            const int begin = block.begin[slot][i / kGranule], end = block.end[slot][i / kGranule];
            for (int column = begin; column < end; column += kWidth) f(*block.tile[slot], column, scores + column);
        }
    }
};

template <bool kShared, bool kWindow> void run_sweep(const AttentionParams& p) {
    std::vector<std::unique_ptr<SweepScratch>> scratch(std::max<int64_t>(1, p.threads));
    in_turns<kWindow>(p, [&](const Head& head, int worker, int64_t round, int64_t begin, int64_t end) {
        if (!scratch[worker]) scratch[worker] = std::make_unique<SweepScratch>(p);
        SweepTask<kShared, kWindow>{p, head, round, *scratch[worker]}.run(begin, end);
    });
}

}  // namespace hf
