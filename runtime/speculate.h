// Drafting with the MTP layer: draft, verify, accept, truncate (docs/model.md 6.4). Exact by construction: every emitted
// token is sampled from the main model's own logits, computed by the same pass that plain decoding runs (law L1); a
// draft only decides how many of them one pass yields. This file never sees a tensor layout.
#pragma once

#include "runtime/sampler.h"
#include "runtime/session.h"

#include <vector>

namespace deepcalm {

inline constexpr int kMaxDraft = kMaxRound - 1;

struct DraftParams {
    int k = 1;  // drafts of this round, 0..kMaxDraft; capped by the context
    SampleParams sample;
    int n_valid = 0;           // tokenizer size: ids beyond are never chosen
    float min_confidence = 0;  // stop the chain before a draft whose probability under its own distribution is lower
    // Measurement only: replace draft j by forced[j] after the MTP layer has run. Null: the real drafts.
    const int32_t* forced = nullptr;  // [k]
};

struct Round {
    std::vector<int32_t> tokens;  // accepted drafts, then the token after them: 1..k+1 of them
    int n_drafted = 0, n_accepted = 0;
    int64_t experts_verify = 0;                 // distinct (layer, expert) pairs of the verification pass
    int64_t draft_bytes = 0, verify_bytes = 0;  // weight and cache bytes read
    double draft_seconds = 0, verify_seconds = 0;
};

class Speculator {
  public:
    // One round. `token` is t_n: known, not yet in the cache; positions 0..n-1 are. Afterwards the cache holds t_n and the
    // accepted drafts, and round.tokens.back() is the next token to pass. With k = 0 this is a plain decode step.
    // logits: [k + 1, vocab_size] or null; receives the rows that round.tokens were chosen from.
    static Result<Round> round(Session& session, int32_t token, const DraftParams& params, float* logits);

  private:
    static Status check(const Session& session, int32_t token, const DraftParams& params);
    // Appends up to k drafts to rows = {token}.
    static Status draft(Session& session, int k, const DraftParams& params, std::vector<int32_t>& rows);
};

}  // namespace deepcalm
