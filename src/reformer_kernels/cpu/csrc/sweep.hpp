// Sums of the weights P alone, computed again from the saved maximum and sum of every row: over queries, what every token
// receives (sum of paid * P), or over keys, what its gradient needs (sum of P * push).
#pragma once

#include "backward.hpp"

namespace hf {

struct SweepScratch {
    Arena arena;
    Ring ring;
    Queries queries;
    Ahead ahead;
    float* scores;  // [kTile][kScores]

    explicit SweepScratch(const Problem& p)
        : arena(Ring::floats(p, false) + kTile * kScores), ring(p, false, arena), queries(p), scores(arena.take(kTile * kScores)) {}
};

template <bool kShared, bool kWindow> struct SweepTask {
    const Problem& p;
    const Head& head;
    int64_t round;
    SweepScratch& w;

    void run(int64_t begin, int64_t end) {
        auto leave = [this](Tile& tile) {
            for (int i = 0; i < tile.count && !p.push; i++) p.received[head.offset + tile.token[i]] += tile.pull[i];
        };
        for (int64_t tile = begin; tile < end; tile++) {
            w.queries.read(head, round, tile);
            look_ahead(tile + 1, end);
            if (w.queries.lowest > w.queries.highest) continue;
            const Tile& own = w.ring.get(head, tile, round, leave);
            const float* rows = kShared ? own.rows : w.queries.own_rows.data();
            for_key_blocks(head, w.queries, round, w.ring, leave, [&](KeyBlock& block) { add_block(block, rows); });
        }
        w.ring.clear(leave);
    }
    void look_ahead(int64_t next, int64_t end) {
        w.ahead.clear();
        if (next >= end) return;
        int64_t keys = beyond(head, w.queries, next);
        w.ahead.add(head.key, head.tokens(keys), head.geometry.count(keys));
        if (!kShared) w.ahead.add(head.query, head.tokens(next), head.geometry.count(next));
    }
    void add_block(KeyBlock& block, const float* rows) {
        const Queries& q = w.queries;
        int groups = (q.count + kGranule - 1) / kGranule;
        int mirrored = kShared && block.own_is_whole() ? block.own : -1;
        multiply_rows(rows, static_cast<int>(p.size), block, groups, mirrored, w.ahead, w.scores,
                      [](const Tile& t) { return t.columns; });
        if (mirrored >= 0) mirror_scores(w.scores + mirrored * kTile);
        for (int i = 0; i < q.count; i++) {
            RowMask<kShared, kWindow> mask(q, i, head.earlier(round), p.keep_threshold);
            int64_t at = head.offset + q.token[i];
            float top = p.top[at], mass = p.mass[at];
            if (top < kFixed) {  // weights of fixed scores: itself (shared query/key), or nothing but padding
                Float weight = splat(1 / mass);
                add_row(block, i, [&](const Tile& t, int column, const float*) {
                    Mask used = mask.shown(t, column);
                    if (kShared) used = both(used, mask.itself(t, column));
                    return keep(used, weight);
                });
            } else {
                Float shift = splat(-(top + std::log2(mass)));
                add_row(block, i, [&](const Tile& t, int column, const float* score) {
                    return keep(mask.open(t, column), exp2(fma(load(score), load(t.scale + column), shift)));
                });
            }
        }
    }
    template <typename F> HF_INLINE void add_row(KeyBlock& block, int i, F&& weight_of) {
        const int token = w.queries.token[i];
        if (p.push) {
            Float total = zero();
            for_columns(block, i, [&](Tile& t, int column, const float* score) {
                total = fma(weight_of(t, column, score), load(t.push + column), total);
            });
            p.pushed[head.offset + token] += sum(total);
        } else {
            const Float paid = splat(p.paid[head.batch * p.length + token]);
            for_columns(block, i, [&](Tile& t, int column, const float* score) {
                store(t.pull + column, fma(weight_of(t, column, score), paid, load(t.pull + column)));
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

template <bool kShared, bool kWindow> void run_sweep(const Problem& p) {
    std::vector<std::unique_ptr<SweepScratch>> scratch(std::max<int64_t>(1, p.threads));
    in_turns<kWindow>(p, [&](const Head& head, int worker, int64_t round, int64_t begin, int64_t end) {
        if (!scratch[worker]) scratch[worker] = std::make_unique<SweepScratch>(p);
        SweepTask<kShared, kWindow>{p, head, round, *scratch[worker]}.run(begin, end);
    });
}

}  // namespace hf
