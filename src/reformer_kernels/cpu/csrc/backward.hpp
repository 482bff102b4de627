// Backward pass (Dao et al. 2022, section 3.1): weights are computed again from the saved maximum and sum of every row,
// dS = P * (dO V^T - rowsum(dO * O)). A key tile gathers its gradients while it is in reach and adds them to its
// tokens' rows when it is evicted.
#pragma once

#include "forward.hpp"

namespace hf {

struct BackwardScratch {
    Arena arena;
    TileRing ring;
    Queries queries;
    Prefetcher prefetcher;
    float *scores, *grad_scores, *grad_out, *grad_query;  // [kTile][kScores] twice; panels
    alignas(64) float delta[kTile], shift[kTile], row_sum[kTile], query_weight[kTile];

    explicit BackwardScratch(const AttentionParams& p)
        : arena(TileRing::floats(p, true) + 2 * kTile * kScores + (panels_of(p.value_size) + panels_of(p.size)) * kPanel * kTile),
          ring(p, true, arena), queries(p), scores(arena.take(kTile * kScores)), grad_scores(arena.take(kTile * kScores)),
          grad_out(arena.take(panels_of(p.value_size) * kPanel * kTile)),
          grad_query(arena.take(panels_of(p.size) * kPanel * kTile)) {}
};

template <bool kShared, bool kWindow> struct BackwardTask {
    const AttentionParams& p;
    const Head& head;
    const Source grad_out;
    int64_t round;
    BackwardScratch& w;
    uint8_t* touched;  // (B, H, T): whether a token's row of the key's and the value's gradient holds anything yet

    void run(int64_t begin, int64_t end) {
        auto evict = [this](Tile& tile) { add_gradients(tile); };
        for (int64_t tile = begin; tile < end; tile++) {
            w.queries.read(head, round, tile);
            load_state();
            if (w.queries.lowest > w.queries.highest) {
                if (!kShared && round == 0) store_query_gradients();
                continue;
            }
            prefetch_next(tile + 1, end);
            Tile& own = w.ring.get(head, tile, round, evict);
            const float* rows = kShared ? own.rows : w.queries.own_rows.data();
            float* grad = kShared ? own.grad_key : w.grad_query;
            for_key_blocks(head, w.queries, round, w.ring, evict, [&](KeyBlock& block) { add_block(block, rows, grad); });
            if (!kShared) store_query_gradients();
        }
        w.ring.clear(evict);
    }
    int size() const { return static_cast<int>(p.size); }
    int value_size() const { return static_cast<int>(p.value_size); }

    void prefetch_next(int64_t next, int64_t end) {
        w.prefetcher.clear();
        if (next >= end) return;
        int64_t keys = beyond(head, w.queries, next);
        const Tile& evicted = w.ring.slot(keys);  // the tile whose memory the next one takes
        int count = head.geometry.count(keys), own_count = head.geometry.count(next);
        w.prefetcher.add(head.key, head.tokens(keys), count);
        w.prefetcher.add(head.value, head.tokens(keys), count);
        if (!kShared) w.prefetcher.add(head.query, head.tokens(next), own_count);
        w.prefetcher.add(grad_out, head.tokens(next), own_count);
        if (round == 0) w.prefetcher.add(head.rows(p.out, p.value_size), head.tokens(next), own_count);
        if (evicted.index != Tile::kEmpty) {
            w.prefetcher.add(head.rows(kShared ? p.grad_query : p.grad_key, p.size), evicted.token, evicted.count);
            w.prefetcher.add(head.rows(p.grad_value, p.value_size), evicted.token, evicted.count);
        }
    }
    // Saved maxima and sums, and in the first round delta: rowsum(grad_out * out), and the share of the attention mass.
    void load_state() {
        const Queries& q = w.queries;
        if (!kShared) std::memset(w.grad_query, 0, panels_of(p.size) * kPanel * kTile * sizeof(float));
        for (int i = 0; i < q.count; i++) {
            int64_t at = head.offset + q.token[i];
            float row_max = p.row_max[at];
            w.row_sum[i] = p.row_sum[at];
            w.shift[i] = row_max < kFixed ? kNothing : -(row_max + std::log2(w.row_sum[i]));
            gather(grad_out, q.token[i], w.grad_out, i);
            w.query_weight[i] = p.grad_mass ? p.query_weights[head.batch * p.length + q.token[i]] : 0;
            if (round == 0) {
                p.delta[at] = product_of_row(w.grad_out, i, head.row(p.out, q.token[i], p.value_size), value_size());
                if (p.grad_mass) p.delta[at] += w.query_weight[i] * p.mass_dot[at];
            }
            w.delta[i] = p.delta[at];
            if (p.dropout_scale != 1) scale_row(w.grad_out, i, value_size(), static_cast<float>(p.dropout_scale));
        }
        for (int i = q.count; i < kTile; i++) Tile::clear_row(w.grad_out, i, p.value_size);
    }

    void add_block(KeyBlock& block, const float* rows, float* grad_query) {
        const Queries& q = w.queries;
        int groups = (q.count + kGranule - 1) / kGranule;
        int own = kShared ? block.own : -1, mirrored = kShared && block.own_is_whole() ? own : -1;
        multiply_rows(rows, size(), block, groups, mirrored, w.prefetcher, w.scores, [](const Tile& t) { return t.columns; });
        if (mirrored >= 0) mirror_scores(w.scores + mirrored * kTile);
        multiply_rows(w.grad_out, value_size(), block, groups, -1, w.prefetcher, w.grad_scores,
                      [](const Tile& t) { return t.value_columns; });
        for (int i = 0; i < groups * kGranule; i++) {
            if (i >= q.count)
                clear_row(block, i);
            else if (w.shift[i] == kNothing)
                weigh_fixed(block, i);
            else if (p.grad_mass)
                p.dropout ? weigh<true, true>(block, i) : weigh<false, true>(block, i);
            else
                p.dropout ? weigh<true, false>(block, i) : weigh<false, false>(block, i);
        }
        add_weighted_columns(w.scores, w.grad_out, value_size(), block, groups, -1, w.prefetcher,
                             [](Tile& t) { return t.grad_value; });
        add_weighted_columns(w.grad_scores, rows, size(), block, groups, own, w.prefetcher, [](Tile& t) { return t.grad_key; });
        if (own >= 0) add_transpose(w.grad_scores + own * kTile, groups, block);
        add_weighted_rows(w.grad_scores, size(), block, groups, w.prefetcher, grad_query, [](const Tile& t) { return t.rows; });
    }
    template <typename F> HF_INLINE void for_columns(const KeyBlock& block, int i, F&& f) {
        for (int slot = 0; slot < block.tiles; slot++) {
            int64_t row = i * kScores + slot * kTile;
            const int begin = block.begin[slot][i / kGranule], end = block.end[slot][i / kGranule];
            for (int column = begin; column < end; column += kWidth)
                f(*block.tile[slot], column, w.scores + row + column, w.grad_scores + row + column);
        }
    }
    void clear_row(const KeyBlock& block, int i) {
        for_columns(block, i, [](Tile&, int, float* score, float* grad_score) {
            store(score, zero());
            store(grad_score, zero());
        });
    }
    // Scores become weights after dropout, gradients of the weights become those of the query's product with the key's row.
    template <bool kDrop, bool kGradMass> HF_INLINE void weigh(const KeyBlock& block, int i) {
        RowMask<kShared, kWindow> mask(w.queries, i, head.earlier(round), p.keep_threshold);
        Float shift = splat(w.shift[i]), delta = splat(w.delta[i]), query_weight = splat(w.query_weight[i]);
        for_columns(block, i, [&](Tile& t, int column, float* score, float* grad_score) {
            Float x = load(score) * load(t.scale + column);
            Float weight = keep(mask.scored(t, column), exp2(x + shift)), used = weight, grad_weight = load(grad_score);
            if constexpr (kDrop) {
                Mask dropped = mask.dropped(t, column);
                used = select(dropped, zero(), used);
                grad_weight = select(dropped, zero(), grad_weight);
            }
            if constexpr (kGradMass) grad_weight = fma(query_weight, load(t.grad_mass + column), grad_weight);
            Float change = weight * (grad_weight - delta);
            store(score, used);
            if constexpr (kShared) store(t.column_sum + column, fma(change, x, load(t.column_sum + column)));
            store(grad_score, change * load(t.unit + column));
        });
    }
    // Rows whose scores are fixed numbers: themselves (shared query/key), or nothing but padding (chunk rule).
    void weigh_fixed(const KeyBlock& block, int i) {
        RowMask<kShared, kWindow> mask(w.queries, i, head.earlier(round), p.keep_threshold);
        Float weight = splat(1 / w.row_sum[i]);
        for_columns(block, i, [&](Tile& t, int column, float* score, float* grad_score) {
            Mask used = mask.visible(t, column);
            if (kShared) used = both(used, mask.is_self(t, column));
            if (p.dropout) used = first_only(used, mask.dropped(t, column));
            store(score, keep(used, weight));
            store(grad_score, zero());
        });
    }
    // The key of shared attention is query * unit: its gradient loses its part along the query.
    void add_gradients(Tile& tile) {
        float* keys = kShared ? p.grad_query : p.grad_key;
        for (int i = 0; i < tile.count; i++) {
            if (kShared) {
                float along = tile.unit[i] * tile.unit[i] * tile.column_sum[i] / kLog2E;
                for (int panel = 0; panel < panels_of(p.size); panel++)
                    for (int half = 0; half < kPanel; half += kWidth) {
                        int64_t at = (panel * kTile + i) * kPanel + half;
                        store(tile.grad_key + at, fma(splat(-along), load(tile.rows + at), load(tile.grad_key + at)));
                    }
            }
            uint8_t& held = touched[head.offset + tile.token[i]];
            store_row(held, tile.grad_key, i, size(), head.row(keys, tile.token[i], p.size));
            store_row(held, tile.grad_value, i, value_size(), head.row(p.grad_value, tile.token[i], p.value_size));
            held = 1;
        }
    }
    void store_query_gradients() {
        for (int i = 0; i < w.queries.count; i++)
            store_row(round > 0, w.grad_query, i, size(), head.row(p.grad_query, w.queries.token[i], p.size));
    }
    static void store_row(bool add, const float* panels, int i, int size, float* to) {
        if (add)
            scatter<true>(panels, i, size, splat(1.0f), to);
        else
            scatter<false>(panels, i, size, splat(1.0f), to);
    }
};

// Tokens that were visible to no query have gradient 0.
inline void clear_untouched(const AttentionParams& p, const uint8_t* touched) {
    parallel_for(p.batch * p.heads, p.threads, [&](int64_t task, int) {
        Head head(p, task);
        for (int token = 0; token < p.length; token++) {
            if (touched[head.offset + token]) continue;
            std::memset(head.row(p.grad_key ? p.grad_key : p.grad_query, token, p.size), 0, p.size * sizeof(float));
            std::memset(head.row(p.grad_value, token, p.value_size), 0, p.value_size * sizeof(float));
        }
    });
}

// A segment writes to rows of its neighbors. So neighbors take turns, and so does what reaches across rounds, where
// any token may stand: even segments, odd ones, the first of a round, the last.
inline int turn_of(int64_t segment, int64_t segments, bool wraps) {
    if (wraps && segments > 1 && segment == 0) return 2;
    if (wraps && segments > 1 && segment == segments - 1) return 3;
    return static_cast<int>(segment % 2);
}

// Calls run(head, worker, round, begin, end) for all segments of all rounds, neighbors in turn.
template <bool kWindow, typename F> void in_turns(const AttentionParams& p, F&& run) {
    int64_t heads = p.batch * p.heads, tiles = Geometry(p).per_round, segments = segments_of(p, 2 * reach_in_tiles(p));
    for (int64_t round = 0; round < p.rounds; round++)
        for (int turn = 0; turn < 4; turn++) {
            std::vector<int64_t> chosen;
            for (int64_t segment = 0; segment < segments; segment++)
                if (turn_of(segment, segments, !kWindow) == turn) chosen.push_back(segment);
            int64_t count = static_cast<int64_t>(chosen.size());
            parallel_for(heads * count, p.threads, [&](int64_t task, int worker) {
                Head head(p, task / count);
                int64_t segment = chosen[task % count], start = round * tiles;
                run(head, worker, round, start + tiles * segment / segments, start + tiles * (segment + 1) / segments);
            });
        }
}

template <bool kShared, bool kWindow> void run_backward(const AttentionParams& p) {
    std::vector<std::unique_ptr<BackwardScratch>> scratch(std::max<int64_t>(1, p.threads));
    std::vector<uint8_t> touched(p.batch * p.heads * p.length);
    in_turns<kWindow>(p, [&](const Head& head, int worker, int64_t round, int64_t begin, int64_t end) {
        if (!scratch[worker]) scratch[worker] = std::make_unique<BackwardScratch>(p);
        Source grad_out(p.grad_out, head.batch, head.head, false, p.value_size);
        BackwardTask<kShared, kWindow>{p, head, grad_out, round, *scratch[worker], touched.data()}.run(begin, end);
    });
    clear_untouched(p, touched.data());
}

}  // namespace hf
