// Backward pass (Dao et al. 2022, section 3.1): weights are computed again from the saved maximum and sum of every row,
// dS = P * (dO V^T - rowsum(dO * O)). A key tile gathers its gradients while it is in reach and adds them to its tokens'
// rows when it leaves.
#pragma once

#include "forward.hpp"

namespace hf {

struct BackwardScratch {
    Arena arena;
    Ring ring;
    Queries queries;
    Ahead ahead;
    float *scores, *slopes, *upstream, *query_grad;  // [kTile][kScores] twice; panels
    alignas(64) float drift[kTile], shift[kTile], mass[kTile], paid[kTile];

    explicit BackwardScratch(const Problem& p)
        : arena(Ring::floats(p, true) + 2 * kTile * kScores + (panels_of(p.value_size) + panels_of(p.size)) * kPanel * kTile),
          ring(p, true, arena), queries(p), scores(arena.take(kTile * kScores)), slopes(arena.take(kTile * kScores)),
          upstream(arena.take(panels_of(p.value_size) * kPanel * kTile)),
          query_grad(arena.take(panels_of(p.size) * kPanel * kTile)) {}
};

template <bool kShared, bool kWindow> struct BackwardTask {
    const Problem& p;
    const Head& head;
    const Source upstream;
    int64_t round;
    BackwardScratch& w;
    uint8_t* touched;  // (B, H, T): whether a token's row of the key's and the value's gradient holds anything yet

    void run(int64_t begin, int64_t end) {
        auto leave = [this](Tile& tile) { add_gradients(tile); };
        for (int64_t tile = begin; tile < end; tile++) {
            w.queries.read(head, round, tile);
            load_state();
            if (w.queries.lowest > w.queries.highest) {
                if (!kShared && round == 0) store_query_gradients();
                continue;
            }
            look_ahead(tile + 1, end);
            Tile& own = w.ring.get(head, tile, round, leave);
            const float* rows = kShared ? own.rows : w.queries.own_rows.data();
            float* grad = kShared ? own.grad : w.query_grad;
            for_key_blocks(head, w.queries, round, w.ring, leave, [&](KeyBlock& block) { add_block(block, rows, grad); });
            if (!kShared) store_query_gradients();
        }
        w.ring.clear(leave);
    }
    int size() const { return static_cast<int>(p.size); }
    int value_size() const { return static_cast<int>(p.value_size); }

    void look_ahead(int64_t next, int64_t end) {
        w.ahead.clear();
        if (next >= end) return;
        int64_t keys = beyond(head, w.queries, next);
        const Tile& leaving = w.ring.slot(keys);  // whose place it takes
        int count = head.geometry.count(keys), own_count = head.geometry.count(next);
        w.ahead.add(head.key, head.tokens(keys), count);
        w.ahead.add(head.value, head.tokens(keys), count);
        if (!kShared) w.ahead.add(head.query, head.tokens(next), own_count);
        w.ahead.add(upstream, head.tokens(next), own_count);
        if (round == 0) w.ahead.add(head.rows(p.out, p.value_size), head.tokens(next), own_count);
        if (leaving.index != Tile::kEmpty) {
            w.ahead.add(head.rows(kShared ? p.query_grad : p.key_grad, p.size), leaving.token, leaving.count);
            w.ahead.add(head.rows(p.value_grad, p.value_size), leaving.token, leaving.count);
        }
    }
    // Saved sums, and in the first round drift = rowsum(grad * out), and its like for what is received.
    void load_state() {
        const Queries& q = w.queries;
        if (!kShared) std::memset(w.query_grad, 0, panels_of(p.size) * kPanel * kTile * sizeof(float));
        for (int i = 0; i < q.count; i++) {
            int64_t at = head.offset + q.token[i];
            float top = p.top[at];
            w.mass[i] = p.mass[at];
            w.shift[i] = top < kFixed ? kNothing : -(top + std::log2(w.mass[i]));
            gather(upstream, q.token[i], w.upstream, i);
            w.paid[i] = p.push ? p.paid[head.batch * p.length + q.token[i]] : 0;
            if (round == 0) {
                p.drift[at] = product_of_row(w.upstream, i, head.row(p.out, q.token[i], p.value_size), value_size());
                if (p.push) p.drift[at] += w.paid[i] * p.pushed[at];
            }
            w.drift[i] = p.drift[at];
            if (p.dropout_scale != 1) scale_row(w.upstream, i, value_size(), static_cast<float>(p.dropout_scale));
        }
        for (int i = q.count; i < kTile; i++) Tile::clear_row(w.upstream, i, p.value_size);
    }

    void add_block(KeyBlock& block, const float* rows, float* query_grad) {
        const Queries& q = w.queries;
        int groups = (q.count + kGranule - 1) / kGranule;
        int own = kShared ? block.own : -1, mirrored = kShared && block.own_is_whole() ? own : -1;
        multiply_rows(rows, size(), block, groups, mirrored, w.ahead, w.scores, [](const Tile& t) { return t.columns; });
        if (mirrored >= 0) mirror_scores(w.scores + mirrored * kTile);
        multiply_rows(w.upstream, value_size(), block, groups, -1, w.ahead, w.slopes,
                      [](const Tile& t) { return t.value_columns; });
        for (int i = 0; i < groups * kGranule; i++) {
            if (i >= q.count)
                clear_row(block, i);
            else if (w.shift[i] == kNothing)
                weigh_fixed(block, i);
            else if (p.push)
                p.key_draw ? weigh<true, true>(block, i) : weigh<false, true>(block, i);
            else
                p.key_draw ? weigh<true, false>(block, i) : weigh<false, false>(block, i);
        }
        add_weighted_columns(w.scores, w.upstream, value_size(), block, groups, -1, w.ahead,
                             [](Tile& t) { return t.value_grad; });
        add_weighted_columns(w.slopes, rows, size(), block, groups, own, w.ahead, [](Tile& t) { return t.grad; });
        if (own >= 0) add_transpose(w.slopes + own * kTile, groups, block);
        add_weighted_rows(w.slopes, size(), block, groups, w.ahead, query_grad, [](const Tile& t) { return t.rows; });
    }
    template <typename F> HF_INLINE void for_columns(const KeyBlock& block, int i, F&& f) {
        for (int slot = 0; slot < block.tiles; slot++) {
            int64_t row = i * kScores + slot * kTile;
            const int begin = block.begin[slot][i / kGranule], end = block.end[slot][i / kGranule];
            for (int column = begin; column < end; column += kWidth)
                f(*block.tile[slot], column, w.scores + row + column, w.slopes + row + column);
        }
    }
    void clear_row(const KeyBlock& block, int i) {
        for_columns(block, i, [](Tile&, int, float* score, float* slope) {
            store(score, zero());
            store(slope, zero());
        });
    }
    // Scores become weights after dropout, their slopes gradients of the query's product with the key's row.
    template <bool kDrop, bool kPush> HF_INLINE void weigh(const KeyBlock& block, int i) {
        RowMask<kShared, kWindow> mask(w.queries, i, head.earlier(round), p.keep_threshold);
        Float shift = splat(w.shift[i]), drift = splat(w.drift[i]), paid = splat(w.paid[i]);
        for_columns(block, i, [&](Tile& t, int column, float* score, float* slope) {
            Float x = load(score) * load(t.scale + column);
            Float weight = keep(mask.open(t, column), exp2(x + shift)), used = weight, gain = load(slope);
            if constexpr (kDrop) {
                Mask dropped = mask.dropped(t, column);
                used = select(dropped, zero(), used);
                gain = select(dropped, zero(), gain);
            }
            if constexpr (kPush) gain = fma(paid, load(t.push + column), gain);
            Float change = weight * (gain - drift);
            store(score, used);
            if constexpr (kShared) store(t.pull + column, fma(change, x, load(t.pull + column)));
            store(slope, change * load(t.unit + column));
        });
    }
    // Rows whose scores are fixed numbers: themselves (shared query/key), or nothing but padding (chunk rule).
    void weigh_fixed(const KeyBlock& block, int i) {
        RowMask<kShared, kWindow> mask(w.queries, i, head.earlier(round), p.keep_threshold);
        Float weight = splat(1 / w.mass[i]);
        for_columns(block, i, [&](Tile& t, int column, float* score, float* slope) {
            Mask used = mask.shown(t, column);
            if (kShared) used = both(used, mask.itself(t, column));
            if (p.key_draw) used = first_only(used, mask.dropped(t, column));
            store(score, keep(used, weight));
            store(slope, zero());
        });
    }
    // The key of shared attention is query * unit: its gradient loses its part along the query.
    void add_gradients(Tile& tile) {
        float* keys = kShared ? p.query_grad : p.key_grad;
        for (int i = 0; i < tile.count; i++) {
            if (kShared) {
                float along = tile.unit[i] * tile.unit[i] * tile.pull[i] / kLog2E;
                for (int panel = 0; panel < panels_of(p.size); panel++)
                    for (int half = 0; half < kPanel; half += kWidth) {
                        int64_t at = (panel * kTile + i) * kPanel + half;
                        store(tile.grad + at, fma(splat(-along), load(tile.rows + at), load(tile.grad + at)));
                    }
            }
            uint8_t& held = touched[head.offset + tile.token[i]];
            store_row(held, tile.grad, i, size(), head.row(keys, tile.token[i], p.size));
            store_row(held, tile.value_grad, i, value_size(), head.row(p.value_grad, tile.token[i], p.value_size));
            held = 1;
        }
    }
    void store_query_gradients() {
        for (int i = 0; i < w.queries.count; i++)
            store_row(round > 0, w.query_grad, i, size(), head.row(p.query_grad, w.queries.token[i], p.size));
    }
    static void store_row(bool add, const float* panels, int i, int size, float* to) {
        if (add)
            scatter<true>(panels, i, size, splat(1.0f), to);
        else
            scatter<false>(panels, i, size, splat(1.0f), to);
    }
};

// Tokens that no query saw have no gradient.
inline void clear_untouched(const Problem& p, const uint8_t* touched) {
    parallel_for(p.batch * p.heads, p.threads, [&](int64_t task, int) {
        Head head(p, task);
        for (int token = 0; token < p.length; token++) {
            if (touched[head.offset + token]) continue;
            std::memset(head.row(p.key_grad ? p.key_grad : p.query_grad, token, p.size), 0, p.size * sizeof(float));
            std::memset(head.row(p.value_grad, token, p.value_size), 0, p.value_size * sizeof(float));
        }
    });
}

// A segment writes to rows of its neighbours. So neighbours take turns, and so does what reaches across rounds, where
// any token may stand: even segments, odd ones, the first of a round, the last.
inline int turn_of(int64_t segment, int64_t segments, bool wraps) {
    if (wraps && segments > 1 && segment == 0) return 2;
    if (wraps && segments > 1 && segment == segments - 1) return 3;
    return static_cast<int>(segment % 2);
}

// Calls run(head, worker, round, begin, end) for all segments of all rounds, neighbours in turn.
template <bool kWindow, typename F> void in_turns(const Problem& p, F&& run) {
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

template <bool kShared, bool kWindow> void run_backward(const Problem& p) {
    std::vector<std::unique_ptr<BackwardScratch>> scratch(std::max<int64_t>(1, p.threads));
    std::vector<uint8_t> touched(p.batch * p.heads * p.length);
    in_turns<kWindow>(p, [&](const Head& head, int worker, int64_t round, int64_t begin, int64_t end) {
        if (!scratch[worker]) scratch[worker] = std::make_unique<BackwardScratch>(p);
        Source upstream(p.grad, head.batch, head.head, false, p.value_size);
        BackwardTask<kShared, kWindow>{p, head, upstream, round, *scratch[worker], touched.data()}.run(begin, end);
    });
    clear_untouched(p, touched.data());
}

}  // namespace hf
