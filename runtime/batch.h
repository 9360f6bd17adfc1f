// Steps of one sequence or several: draft, verify, accept, truncate (docs/model.md 6.4), and chunks of prompts beside them,
// in shared passes. Exact by construction: every emitted token is sampled from the main model's own logits, which do not
// depend on who else is in the pass (law L1); a draft only decides how many of them one pass yields. This file never sees a
// tensor layout.
#pragma once

#include "runtime/sampler.h"
#include "runtime/session.h"

namespace deepcalm {

inline constexpr int kMaxDraft = kMaxRound - 1;
inline constexpr int kMaxSequences = 64;  // of a step

// What a step does for one sequence.
struct Work {
    Session* session = nullptr;               // none twice in a step
    std::vector<int32_t> ids = {};            // what follows its tokens: a chunk of a prompt, or the token chosen last
    WantLogits want = WantLogits::kNone;      // without `sample`
    std::optional<SampleParams> sample = {};  // choose the token after them
    int n_valid = 0;                          // tokenizer size: ids beyond are never chosen
    // Drafts behind a single id, at most kMaxDraft; fewer near the end of the context. k of them by the MTP layer, none
    // where a hidden state is missing; or those given, whoever made them. Both at once (then [k], for measurements): the
    // given ones replace the layer's after it has run.
    int k = 0;
    std::vector<int32_t> drafts = {};
    float min_confidence = 0;  // stop the layer's chain before a draft whose probability is lower, by its own logits
    int n_top = -1;            // how many of the most probable ids `scores` names; -1: no scores
    std::vector<int32_t> chosen = {};  // measurement only: ids that are taken for the model's choices; or none
    bool keep_hidden = false;          // in Session::hidden()
    // PassArgs::interrupted, where the sequence is alone
    bool (*interrupted)() = nullptr;
    float* logits = nullptr;  // out: [rows, vocab_size] as wanted; with `sample` those that `tokens` were chosen from

    std::vector<int32_t> tokens = {};  // out: accepted drafts, in the cache now, and the next token, which is not
    std::vector<Scores> scores = {};   // out: [tokens]
    int n_drafted = 0, n_accepted = 0;
    std::optional<Error> error = {};  // this sequence failed: it is as it was before the step
};

struct StepCost {
    int rows = 0, mtp_rows = 0;
    int64_t experts_verify = 0;                 // distinct (layer, expert) pairs of main passes
    int64_t draft_bytes = 0, verify_bytes = 0;  // weight and cache bytes read by MTP passes, by main passes
    double draft_seconds = 0, verify_seconds = 0;
};

class Step {
  public:
    // One step. Where a shared pass fails, each sequence is tried alone: those that can go on. stats: what was read, of one
    // session its own.
    static StepCost run(Model& model, std::span<Work> work, PassStats& stats);
    // MTP rows for every position of a session whose next token is known.
    static Status catch_up(Session& session);
    // The session's last row again, for a hidden state that was cut off, by itself.
    static Status repeat_last(Session& session);

  private:
    struct Lane;
    Step(Model& model, PassStats& stats) : model_(model), stats_(stats) {}
    Status check(const Work& work, std::span<Work* const> others) const;
    Status run(std::span<Work* const> work);
    Status draft(std::span<Lane> lanes);
    Status verify(std::span<Lane> lanes);
    void choose(Lane& lane) const;
    void accept(Lane& lane);
    // MTP rows of these lanes; `draft`: those of the tokens in hand too, with logits after them.
    Status catch_up(std::span<Lane* const> lanes, bool draft);
    // Logits of `row` of the latest passes, of those that want some.
    float* logits(int64_t row) const { return model_.logits_row(row); }

    Model& model_;
    PassStats& stats_;
    StepCost cost_;
    std::span<const int32_t> experts_;  // PassResult::experts of a main pass for one sequence
};

}  // namespace deepcalm
