// Stages of decoding itself: drafts and tokens are chosen, accepted and published on the device; the host only queues
// rounds and reads a ring. Same shape as the stages of the pass (kernels/cuda/args.h). A round of k drafts is
//     catch_up, MTP pass, draft 1, MTP pass, draft 2, ...   (docs/model.md 6.4, steps 1 to 3; none without drafts)
//     main pass over the last token and its drafts          (step 4)
//     accept                                                (steps 5 and 6)
// Rounds queued behind the one that stopped run to no effect: they write rows that no one will read.
#pragma once

#include "kernels/cuda/args.h"
#include "kernels/cuda/rt.h"
#include "kernels/noise.h"
#include "runtime/engine.h"

namespace deepcalm::gpu {

inline constexpr int kRingRounds = 128;  // rounds in flight at most
inline constexpr int kMaxEos = 32;

// In pinned memory, written by accept, read by the host after `done`.
struct TokenRing {
    unsigned done = 0;                 // rounds that have ended; the last word written
    DecodedRound rounds[kRingRounds];  // round i at i % kRingRounds
};

// Rows of the main pass or of the MTP pass of a round, which read them through pointers into this.
struct DecodeRows {
    int32_t pos = 0;                      // position of row 0
    int32_t n = 0;                        // live rows
    int32_t ids[kBlockRows] = {};         // their tokens; MTP: the token after each row's position
    int32_t choice[kBlockRows] = {};      // HeadArgs::choice
    int64_t passes = 0, passed_rows = 0;  // so far, rounds queued behind a stop included
    int64_t experts = 0;                  // distinct (layer, expert) pairs, summed over passes
    int64_t cache_rows = 0;               // rows of one layer that they read

    DC_DEVICE void count_pass() {
        passes += 1;
        passed_rows += n;
        cache_rows += pos + n;
    }
};

// What decoding keeps in device memory; written by the host before a run, by catch_up, draft and accept during it.
struct DecodeState {
    DecodeRows main;  // pos: tokens in the main cache; ids: t_pos, not in the cache yet, and its drafts
    DecodeRows mtp;
    int32_t n_pend = 0;  // MTP rows pos - n_pend..pos-1 are due; their hidden rows are pend[0..n_pend-1]
    int32_t chain = 0;   // drafts made in this round, -1: the chain is broken (a draft had no finite logits)
    int32_t stop = 0, bad_id = -1;
    unsigned done = 0;
    int64_t left = 0;  // tokens that may still be emitted
    int32_t ctx = 0, n_valid = 0, n_eos = 0;
    int32_t eos[kMaxEos] = {};
    SampleParams sample;
};

// --- choice at temperature > 0 --------------------------------------------------------------------------------------

// The token that runtime/sampler.cc chooses from the same logits, one block per row: filters top_k, top_p, min_p, then the
// largest logit / temp + Gumbel noise of (seed, position, id). Masses are integers of 2^-40, so that the order of their
// sum does not matter.
struct ChooseArgs {
    static constexpr StageInfo kStage{"choose"};
    const DecodeState* state = nullptr;
    DecodeRows* rows = nullptr;  // its main or mtp; choice: in, the argmax, -1 where there is none; out, the choice
    View<const float> logits;    // [n, n_valid]
    int n = 0;                   // rows at most
    bool last =
        false;  // only the last live row, chosen for position main.pos + offset; else row i for main.pos + offset + i
    int offset = 0;

    constexpr int units() const { return last ? 1 : n; }
    constexpr int64_t smem(const Fit&, int) const { return 32 * 16 * 8; }
};

// sums[j] over the block, for all threads; scratch [warps, N].
template <class T, int N> DC_DEVICE void block_sums(T (&sums)[N], T* scratch) {
    DC_UNROLL
    for (int j = 0; j < N; ++j) sums[j] = rt::sum_lanes(sums[j]);
    rt::sync_block();
    if (rt::lane() == 0) {
        DC_UNROLL
        for (int j = 0; j < N; ++j) scratch[N * rt::warp() + j] = sums[j];
    }
    rt::sync_block();
    DC_UNROLL
    for (int j = 0; j < N; ++j) {
        sums[j] = 0;
        for (int w = 0; w < rt::warps(); ++w) sums[j] += scratch[N * w + j];
    }
}

// One row's tokens.
struct Candidates {
    const float* logits;  // [n]
    int n;
    float max, temp;

    DC_DEVICE bool finite(int v) const { return logits[v] - logits[v] == 0; }
    // 56 bits in the order of the logits, of equal ones the lower id above.
    DC_DEVICE uint64_t rank(int v) const {
        const uint32_t u = rt::bits(logits[v] == 0 ? 0.0F : logits[v]);  // -0 equals 0
        return uint64_t{u >> 31 ? ~u : u | 0x80000000U} << 24 | static_cast<uint32_t>(0xFFFFFF - v);
    }
    DC_DEVICE double probability(int v) const {  // of the best one: 1
        return exp_f64((static_cast<double>(logits[v]) - static_cast<double>(max)) / static_cast<double>(temp));
    }
    DC_DEVICE uint64_t mass(int v) const { return static_cast<uint64_t>(probability(v) * 0x1p40 + 0.5); }
};

// The largest t that tokens of rank >= t reach with a sum of weight(v) of at least `target`; all of them do.
template <class Weight>
DC_DEVICE uint64_t search(const Candidates& c, uint64_t target, Weight weight, uint64_t* scratch) {
    uint64_t prefix = 0, above = 0;  // above: the sum over ranks past the prefix's range
    for (int shift = 52; shift >= 0; shift -= 4) {
        uint64_t sums[16] = {};  // [j]: ranks >= prefix + (j << shift) and inside the prefix's range
        for (int v = rt::thread(); v < c.n; v += rt::threads()) {
            const uint64_t k = c.rank(v);
            if (k >> (shift + 4) != prefix >> (shift + 4)) continue;
            const uint64_t w = weight(v);
            const uint32_t digit = k >> shift & 15;
            DC_UNROLL
            for (uint32_t j = 0; j < 16; ++j) sums[j] += digit >= j ? w : 0;
        }
        block_sums(sums, scratch);
        uint32_t digit = 0;
        uint64_t greater = sums[1];
        DC_UNROLL
        for (uint32_t j = 1; j < 16; ++j) {
            if (above + sums[j] >= target) {
                digit = j;
                greater = j < 15 ? sums[j + 1 < 16 ? j + 1 : 15] : 0;
            }
        }
        above += greater;
        prefix |= uint64_t{digit} << shift;
    }
    return prefix;
}

// The rank from which on top_k and top_p keep tokens: the first ones, by rank, whose weights reach a target.
DC_DEVICE uint64_t filter(const Candidates& c, int top_k, float top_p, uint64_t* scratch) {
    uint64_t border = 0;
    DC_UNROLL_BY(1)                                  // one copy of the search for both
    for (int by_mass = 0; by_mass < 2; ++by_mass) {  // top_p, of what top_k keeps
        if (by_mass ? !(top_p < 1) : top_k <= 0 || top_k >= c.n) continue;
        const auto weight = [&](int v) -> uint64_t {
            if (!c.finite(v) || c.rank(v) < border) return 0;
            return by_mass ? c.mass(v) : 1;
        };
        uint64_t total[1] = {0};
        for (int v = rt::thread(); v < c.n; v += rt::threads()) total[0] += weight(v);
        block_sums(total, scratch);
        auto target = static_cast<uint64_t>(top_k);
        if (by_mass) {
            const double share = static_cast<double>(top_p) * static_cast<double>(total[0]);
            target = static_cast<uint64_t>(share);
            target = target < 1 ? 1 : target + (static_cast<double>(target) < share ? 1 : 0);
        } else if (total[0] <= target) {
            continue;
        }
        border = search(c, target, weight, scratch);
    }
    return border;
}

template <int NB> DC_DEVICE void stage(const ChooseArgs& a, const Fit&) {
    rt::dependency_wait();
    auto* scores = reinterpret_cast<double*>(rt::dynamic_smem());  // [warps], then ids [warps]
    auto* ids = reinterpret_cast<int*>(rt::dynamic_smem() + 32 * 8);
    const DecodeState& state = *a.state;
    const SampleParams& p = state.sample;
    const int live = a.rows->n < a.n ? a.rows->n : a.n;
    for (int row = a.last ? live - 1 + rt::block() : rt::block(); row >= 0 && row < live; row += rt::blocks()) {
        int choice = a.rows->choice[row];
        if (choice < 0) continue;
        const float* logits = a.logits.row(row);
        const Candidates c{logits, state.n_valid, logits[choice], p.temp};
        const uint64_t border = filter(c, p.top_k, p.top_p, reinterpret_cast<uint64_t*>(rt::dynamic_smem()));
        const int64_t pos = int64_t{state.main.pos} + a.offset + (a.last ? 0 : row);
        double best_score = -1e300;
        const auto take = [&](double score, int v) {
            if (score > best_score || (score == best_score && v < choice)) {
                best_score = score;
                choice = v;
            }
        };
        for (int v = rt::thread(); v < c.n; v += rt::threads()) {
            if (!c.finite(v) || c.rank(v) < border) continue;
            if (p.min_p > 0 && c.probability(v) < static_cast<double>(p.min_p)) continue;
            take(static_cast<double>(logits[v]) / static_cast<double>(p.temp) + gumbel(p.seed, pos, v), v);
        }
        for (int m = 16; m > 0; m >>= 1) take(rt::shfl_xor(best_score, m), rt::shfl_xor(choice, m));
        rt::sync_block();
        if (rt::lane() == 0) {
            scores[rt::warp()] = best_score;
            ids[rt::warp()] = choice;
        }
        rt::sync_block();
        if (rt::thread() == 0) {
            for (int w = 1; w < rt::warps(); ++w) take(scores[w], ids[w]);
            a.rows->choice[row] = choice;
        }
        rt::sync_block();
    }
}

// --- drafting and acceptance ----------------------------------------------------------------------------------------

// Distinct experts of rows 0..n-1 of one pass, counted over its layers; all threads get the sum. smem: 4 bytes per warp.
struct Routed {
    const int32_t* topk_idx = nullptr;  // [layers, rows, topk]
    int layers = 0, rows = 0, topk = 0;
};
DC_DEVICE int distinct_experts(const Routed& r, int n, int* smem) {
    const int per_layer = n * r.topk;
    int count[1] = {0};
    for (int i = rt::thread(); i < r.layers * per_layer; i += rt::threads()) {
        const int32_t* ids = r.topk_idx + static_cast<int64_t>(i / per_layer) * r.rows * r.topk;
        const int at = i % per_layer;
        int first = 1;
        for (int j = 0; j < at; ++j) first &= ids[j] != ids[at] ? 1 : 0;
        count[0] += first;
    }
    block_sums(count, smem);
    return count[0];
}

// The rows that the MTP layer is behind, in `parts` passes of up to 8; the last part always ends with the last of them.
struct CatchUpArgs {
    static constexpr StageInfo kStage{"catch_up"};
    DecodeState* state = nullptr;
    const int32_t* tokens = nullptr;  // [ctx + kMaxRound] every token, t_0..t_pos
    int part = 0, parts = 1;
    const float* pend = nullptr;  // [kMaxPending + kMaxRound, d]
    float* hidden = nullptr;      // [8, d] receives the part's rows when there are several; one part reads pend itself
    int d = 0;
    Routed before;  // the previous part's pass, counted

    constexpr int units() const { return 1; }
    constexpr int64_t smem(const Fit&, int) const { return 128; }
};

template <int NB> DC_DEVICE void stage(const CatchUpArgs& a, const Fit&) {
    rt::dependency_wait();
    if (rt::block() != 0) return;
    DecodeState& s = *a.state;
    const int end = s.n_pend - kBlockRows * (a.parts - 1 - a.part);
    const int begin = end > kBlockRows ? end - kBlockRows : 0, n = end > begin ? end - begin : 0;
    for (int i = rt::thread(); a.parts > 1 && i < n * a.d; i += rt::threads())
        a.hidden[i] = a.pend[static_cast<int64_t>(begin) * a.d + i];
    const int experts =
        a.part > 0 ? distinct_experts(a.before, s.mtp.n, reinterpret_cast<int*>(rt::dynamic_smem())) : 0;
    rt::sync_block();
    if (rt::thread() != 0) return;
    s.mtp.experts += experts;
    s.mtp.pos = s.main.pos - s.n_pend + begin;
    s.mtp.n = n;
    for (int i = 0; i < n; ++i) s.mtp.ids[i] = a.tokens[s.mtp.pos + i + 1];
    if (a.part == 0) s.chain = s.n_pend > 0 && s.stop == kStopNone ? 0 : -1;
    s.mtp.count_pass();
}

// Draft j of the round from the MTP pass that just ended: it joins the rows to verify, and is what the next MTP pass
// continues from, with that pass's own output as hidden row.
struct DraftArgs {
    static constexpr StageInfo kStage{"draft"};
    DecodeState* state = nullptr;
    int j = 1;
    bool more = false;    // another draft follows
    View<const float> h;  // [rows, d] post-norm output of the MTP pass
    float* g = nullptr;   // [d]
    int d = 0;
    Routed routed;

    constexpr int units() const { return 1; }
    constexpr int64_t smem(const Fit&, int) const { return 128; }
};

template <int NB> DC_DEVICE void stage(const DraftArgs& a, const Fit&) {
    rt::dependency_wait();
    if (rt::block() != 0) return;
    DecodeState& s = *a.state;
    const int n = s.mtp.n, row = n > 0 ? n - 1 : 0;
    for (int i = rt::thread(); i < a.d; i += rt::threads()) a.g[i] = a.h.row(row)[i];
    const int experts = distinct_experts(a.routed, n, reinterpret_cast<int*>(rt::dynamic_smem()));
    rt::sync_block();
    if (rt::thread() != 0) return;
    s.mtp.experts += experts;
    const int32_t id = s.mtp.choice[row];
    if (id < 0 || n == 0) s.chain = -1;  // a damaged MTP layer must not stop generation: verify what there is
    // Not more rows than positions whose token a plain step would still choose.
    if (s.chain >= 0 && s.main.pos + a.j + 1 < s.ctx) {
        s.chain = a.j;
        s.main.ids[a.j] = id;
        s.main.n = a.j + 1;
    } else {
        s.chain = -1;
    }
    s.mtp.pos = s.main.pos + a.j - 1;  // a row of a recycled state: the next catch_up overwrites it
    s.mtp.n = s.chain > 0 && a.more ? 1 : 0;
    s.mtp.ids[0] = id;
    if (s.mtp.n > 0) s.mtp.count_pass();
}

// Takes the choices of the verified rows while they agree with the drafts, ends at a stop, appends, publishes.
struct AcceptArgs {
    static constexpr StageInfo kStage{"accept"};
    DecodeState* state = nullptr;
    TokenRing* ring = nullptr;  // pinned host memory
    int32_t* tokens = nullptr;  // [ctx + kMaxRound]
    bool caught_up = false;     // the MTP rows that were due have been made in this round
    View<const float> logits;   // [rows, n_valid], to name a NaN
    View<const float> h;        // [rows, d] hidden rows of the main pass
    float* pend = nullptr;      // [kMaxPending + kMaxRound, d] or null without MTP
    int d = 0;
    Routed routed;

    constexpr int units() const { return 1; }
    constexpr int64_t smem(const Fit&, int) const { return 256; }
};

// Emits the choices of the round's rows; one thread. bad: the lowest id whose logit is NaN. Returns how many.
DC_DEVICE int take_choices(const AcceptArgs& a, DecodeState& s, DecodedRound& r, int rows, int bad) {
    int e = 0;
    while (e < rows && s.stop == kStopNone) {
        const int32_t id = s.main.choice[e];
        if (id < 0) {
            if (e > 0) break;  // plain decoding reports it when it gets there
            s.stop = kStopNotFinite;
            s.bad_id = bad == 0x7FFFFFFF ? -1 : bad;
            break;
        }
        ++e;
        a.tokens[s.main.pos + e] = id;
        r.tokens[e - 1] = id;
        s.left -= 1;
        for (int i = 0; i < s.n_eos; ++i) {
            if (s.eos[i] == id) s.stop = kStopEos;
        }
        if (s.stop == kStopNone && s.left <= 0) s.stop = kStopLength;
        if (s.stop == kStopNone && s.main.pos + e + 1 >= s.ctx) s.stop = kStopContext;
        if (e < rows && s.main.ids[e] != id) break;
    }
    if (e == 0) return 0;
    r.n_tokens = e;
    r.drafted = rows - 1;
    r.accepted = e - 1;
    s.main.pos += e;
    s.main.ids[0] = s.main.choice[e - 1];
    return e;
}

template <int NB> DC_DEVICE void stage(const AcceptArgs& a, const Fit&) {
    rt::dependency_wait();
    if (rt::block() != 0) return;
    DecodeState& s = *a.state;
    // [0, 32): a word of each warp; 32: emitted; 33: first pending row
    auto* shared = reinterpret_cast<int*>(rt::dynamic_smem());
    const int rows = s.main.n;
    const bool running = s.stop == kStopNone;
    const int experts = distinct_experts(a.routed, rows, shared);
    int bad = 0x7FFFFFFF;  // the row that plain decoding is at has no token: name the first NaN
    if (running && s.main.choice[0] < 0) {
        for (int v = rt::thread(); v < s.n_valid; v += rt::threads()) {
            if (a.logits.data[v] != a.logits.data[v] && v < bad) bad = v;
        }
    }
    bad = -rt::max_lanes(-bad);
    rt::sync_block();
    if (rt::lane() == 0) shared[rt::warp()] = bad;
    rt::sync_block();
    if (rt::thread() == 0) {
        for (int w = 0; w < rt::warps(); ++w) bad = shared[w] < bad ? shared[w] : bad;
        DecodedRound& r = a.ring->rounds[s.done % kRingRounds];
        r = {};
        r.experts = experts;
        s.main.experts += experts;
        s.main.count_pass();
        const int base = a.caught_up ? 0 : s.n_pend, e = running ? take_choices(a, s, r, rows, bad) : 0;
        if (a.pend != nullptr && e > 0) s.n_pend = base + e;
        s.main.n = 1;
        shared[32] = a.pend != nullptr ? e : 0;
        shared[33] = base;
        s.done += 1;
        r.stop = s.stop;
        r.bad_id = s.bad_id;
        r.end_ns = rt::clock_ns();
        rt::store_release_system(&a.ring->done, s.done);
    }
    rt::sync_block();
    const int e = shared[32], base = shared[33];
    for (int i = 0; i < e; ++i) {
        for (int c = rt::thread(); c < a.d; c += rt::threads())
            a.pend[static_cast<int64_t>(base + i) * a.d + c] = a.h.row(i)[c];
    }
}

}  // namespace deepcalm::gpu
