// Forward pass: for every tile of queries, scores with the visible tiles, an online softmax that continues from round to
// round, and the weighted sum of values. A row's state between rounds is its running maximum, sum and output.
#pragma once

#include "blocks.hpp"
#include "parallel.hpp"

namespace hf {

struct ForwardScratch {
    Arena arena;
    TileRing ring;
    Queries queries;
    Prefetcher prefetcher;
    float *scores, *out;  // [kTile][kScores]; panels
    alignas(64) float row_max[kTile], row_sum[kTile];

    explicit ForwardScratch(const AttentionParams& p)
        : arena(TileRing::floats(p, false) + kTile * kScores + panels_of(p.value_size) * kPanel * kTile), ring(p, false, arena),
          queries(p), scores(arena.take(kTile * kScores)), out(arena.take(panels_of(p.value_size) * kPanel * kTile)) {}
};

HF_INLINE void scale_row(float* panels, int row, int size, float factor) {
    for (int panel = 0; panel < panels_of(size); panel++)
        for (int half = 0; half < kPanel; half += kWidth) {
            float* at = panels + (panel * kTile + row) * kPanel + half;
            store(at, load(at) * splat(factor));
        }
}

template <bool kShared, bool kWindow> struct ForwardTask {
    const AttentionParams& p;
    const Head& head;
    int64_t round;
    ForwardScratch& w;

    void run(int64_t begin, int64_t end) {
        auto nothing = [](Tile&) {};
        w.ring.clear(nothing);
        for (int64_t tile = begin; tile < end; tile++) {
            w.queries.read(head, round, tile);
            load_state();
            prefetch_next(tile + 1, end);
            if (w.queries.lowest <= w.queries.highest) {
                const Tile& own = w.ring.get(head, tile, round, nothing);
                if (kShared) w.queries.take_norms(own);
                const float* rows = kShared ? own.rows : w.queries.own_rows.data();
                for_key_blocks(head, w.queries, round, w.ring, nothing, [&](const KeyBlock& block) { add_block(block, rows); });
            }
            finish();
        }
    }
    void prefetch_next(int64_t next, int64_t end) {
        w.prefetcher.clear();
        if (next >= end) return;
        int64_t keys = beyond(head, w.queries, next);
        w.prefetcher.add(head.key, head.tokens(keys), head.geometry.count(keys));
        w.prefetcher.add(head.value, head.tokens(keys), head.geometry.count(keys));
        if (!kShared) w.prefetcher.add(head.query, head.tokens(next), head.geometry.count(next));
        w.prefetcher.add(head.rows(p.out, p.value_size), head.tokens(next), head.geometry.count(next));
    }
    void load_state() {
        const Queries& q = w.queries;
        for (int i = 0; i < kTile; i++) {
            w.row_max[i] = kNothing;
            w.row_sum[i] = 0;
        }
        if (round == 0) {
            std::memset(w.out, 0, panels_of(p.value_size) * kPanel * kTile * sizeof(float));
            return;
        }
        Source rows = head.rows(p.out, p.value_size);
        for (int i = 0; i < q.count; i++) {
            w.row_max[i] = p.row_max[head.offset + q.token[i]];
            w.row_sum[i] = p.row_sum[head.offset + q.token[i]];
            gather(rows, q.token[i], w.out, i);
        }
    }

    void add_block(const KeyBlock& block, const float* rows) {
        const Queries& q = w.queries;
        int groups = (q.count + kGranule - 1) / kGranule;
        int mirrored = kShared && block.own_is_whole() ? block.own : -1;
        multiply_rows(rows, static_cast<int>(p.size), block, groups, mirrored, w.prefetcher, w.scores,
                      [](const Tile& t) { return t.columns; });
        if (mirrored >= 0) mirror_scores(w.scores + mirrored * kTile);
        float longest = 1, steepest = 0;  // keys of shared attention are shorter than 1
        if (!kShared) {
            longest = 0;
            for (int slot = 0; slot < block.tiles; slot++) longest = std::max(longest, block.tile[slot]->longest);
        }
        for (int i = 0; i < q.count; i++) steepest = std::max(steepest, q.norm[i] * longest);
        bool easy = steepest < kEasy && (kShared || kWindow || !head.mask);
        for (int i = 0; i < groups * kGranule; i++) {
            if (i >= q.count)
                clear_row(block, i);
            else if (easy)
                weigh_bounded(block, i, q.norm[i] * longest);
            else
                weigh(block, i);
        }
        add_weighted_rows(w.scores, static_cast<int>(p.value_size), block, groups, w.prefetcher, w.out,
                          [](const Tile& t) { return t.values; });
        report_nonfinite(block, rows);
    }
    // A row that is not finite, or came near such a key, has the sum NaN: infinity leaves no trace where it weighs nothing.
    void report_nonfinite(const KeyBlock& block, const float* rows) {
        for (int i = 0; i < w.queries.count; i++)
            if (!std::isfinite(w.queries.norm[i]) && !is_finite(rows, i, i + 1, p.size)) w.row_sum[i] = NAN;
        for (int slot = 0; slot < block.tiles; slot++) {
            if (block.tile[slot]->finite) continue;
            for (int i = 0; i < w.queries.count; i++)
                if (block.begin[slot][i / kGranule] < block.end[slot][i / kGranule]) w.row_sum[i] = NAN;
        }
    }
    template <typename F> HF_INLINE void for_columns(const KeyBlock& block, int i, F&& f) {
        for (int slot = 0; slot < block.tiles; slot++) {
            float* scores = w.scores + i * kScores + slot * kTile;
            const int begin = block.begin[slot][i / kGranule], end = block.end[slot][i / kGranule];
            for (int column = begin; column < end; column += kWidth) f(*block.tile[slot], column, scores + column);
        }
    }
    void clear_row(const KeyBlock& block, int i) {
        for_columns(block, i, [](const Tile&, int, float* at) { store(at, zero()); });
    }
    // Sets a row's running maximum to `row_max`; sum and output are rescaled.
    HF_INLINE void raise_max(int i, float row_max) {
        if (row_max == w.row_max[i]) return;
        if (w.row_sum[i] != 0) {
            float decay = std::exp2(w.row_max[i] - row_max);
            w.row_sum[i] *= decay;
            scale_row(w.out, i, static_cast<int>(p.value_size), decay);
        }
        w.row_max[i] = row_max;
    }
    // Weights by a bound on the scores instead of their maximum. Pairs with a fixed score weigh nothing beside others
    // and are left out; where there are no others, a token of shared query/key attention has itself.
    HF_INLINE void weigh_bounded(const KeyBlock& block, int i, float bound) {
        RowMask<kShared, kWindow> mask(w.queries, i, head.earlier(round), p.keep_threshold);
        float row_max = std::max(w.row_max[i], bound);
        Float shift = splat(-row_max);
        float total = store_weights(block, i, mask, [&](const Tile& t, int column, const float* at) {
            return keep(mask.scored(t, column), exp2(fma(load(at), load(t.scale + column), shift)));
        });
        if (total != 0) {  // NaN included: it must reach the output
            raise_max(i, row_max);
        } else if (kShared && w.row_max[i] < kFixed) {
            total = store_weights(block, i, mask, [&](const Tile& t, int column, const float*) {
                return keep(both(mask.visible(t, column), mask.is_self(t, column)), splat(1.0f));
            });
            if (total > 0) raise_max(i, kSelf);
        }
        w.row_sum[i] += total;
    }
    // Replaces scores by weight_of(tile, column, score), or by 0 if the pair is dropped; returns the sum before dropout.
    template <typename F>
    HF_INLINE float store_weights(const KeyBlock& block, int i, const RowMask<kShared, kWindow>& mask, F&& weight_of) {
        Float total = zero();
        auto run = [&](auto drop) {
            for_columns(block, i, [&](const Tile& t, int column, float* at) {
                Float x = weight_of(t, column, at);
                total = total + x;
                if constexpr (drop.value) x = select(mask.dropped(t, column), zero(), x);
                store(at, x);
            });
        };
        if (p.dropout)
            run(std::true_type());
        else
            run(std::false_type());
        return sum(total);
    }
    // Weights by the true maximum, fixed scores included.
    void weigh(const KeyBlock& block, int i) {
        RowMask<kShared, kWindow> mask(w.queries, i, head.earlier(round), p.keep_threshold);
        Float row_max = splat(kNothing);
        for_columns(block, i, [&](const Tile& t, int column, float* at) {
            Float x = load(at) * load(t.scale + column);
            if (!kWindow) x = select(mask.masked(t, column), splat(kMasked), x);
            if (kShared) x = select(mask.is_self(t, column), splat(kSelf), x);
            x = select(mask.visible(t, column), x, splat(kNothing));
            row_max = max(row_max, x);
            store(at, x);
        });
        raise_max(i, std::max(w.row_max[i], largest(row_max)));
        Float shift = splat(-w.row_max[i]);
        w.row_sum[i] += store_weights(block, i, mask, [&](const Tile&, int, const float* at) {
            Float score = load(at);
            return select(greater(splat(kNothing / 2), score), zero(), exp2(score + shift));
        });
    }

    void finish() {
        const Queries& q = w.queries;
        // Values that are not finite show in the output, whatever they weigh.
        bool last = round == p.rounds - 1, finite = !last || is_finite(w.out, 0, q.count, p.value_size);
        for (int i = 0; i < q.count; i++) {
            int token = q.token[i];
            float factor = 1;
            if (!finite && !is_finite(w.out, i, i + 1, p.value_size)) w.row_sum[i] = NAN;
            if (last) {
                if (w.row_sum[i] == 0) w.row_sum[i] = 1;
                factor = static_cast<float>(p.dropout_scale) / w.row_sum[i];
            }
            scatter<false>(w.out, i, static_cast<int>(p.value_size), splat(factor), head.row(p.out, token, p.value_size));
            p.row_max[head.offset + token] = w.row_max[i];
            p.row_sum[head.offset + token] = w.row_sum[i];
        }
    }
};

// Segments of a head's rounds that run side by side, when there are fewer heads than threads could use.
inline int64_t segments_of(const AttentionParams& p, int64_t smallest) {
    int64_t heads = p.batch * p.heads, tiles = Geometry(p).per_round;
    if (p.threads <= 1) return 1;
    int64_t wanted = (4 * p.threads + heads - 1) / heads;
    if (heads >= 4 * p.threads || heads % p.threads == 0) return 1;
    return std::max<int64_t>(1, std::min(wanted, tiles / smallest));
}

template <bool kShared, bool kWindow> void run_forward(const AttentionParams& p) {
    int64_t heads = p.batch * p.heads, tiles = Geometry(p).per_round, segments = segments_of(p, reach_in_tiles(p));
    std::vector<std::unique_ptr<ForwardScratch>> scratch(std::max<int64_t>(1, p.threads));
    for (int64_t round = 0; round < p.rounds; round++)  // a round reads what the one before it wrote
        parallel_for(heads * segments, p.threads, [&](int64_t task, int worker) {
            if (!scratch[worker]) scratch[worker] = std::make_unique<ForwardScratch>(p);
            Head head(p, task / segments);
            int64_t segment = task % segments, start = round * tiles;
            ForwardTask<kShared, kWindow>{p, head, round, *scratch[worker]}.run(
                start + tiles * segment / segments, start + tiles * (segment + 1) / segments);
        });
}

}  // namespace hf
