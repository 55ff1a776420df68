// Plain C++: the tests compile it without CUDA.
#include "host/check_params.h"

#include <algorithm>
#include <cmath>

#include "host/status.h"

namespace flash_attn {
namespace {

// The largest sum of a length and a window, or new keys: kernels add them in 32 bits, to positions up to a
// block past the end.
constexpr int64_t kMaxSum = int64_t{INT32_MAX} - kWorkspaceRows;

// The requirements of a function; the first one that does not hold is told.
class Requirements {
 public:
  explicit Requirements(const char* function) : function_(function) {}

  void that(bool holds, const char* field, const char* allowed, int64_t value) {
    if (holds || status_ != Status::kOk) return;
    status_ = fail(Status::kInvalidArgument, "%s: %s must be %s, got %lld", function_, field, allowed,
                   static_cast<long long>(value));
  }

  void that_number(bool holds, const char* field, const char* allowed, float value) {
    if (holds || status_ != Status::kOk) return;
    status_ = fail(Status::kInvalidArgument, "%s: %s must be %s, got %g", function_, field, allowed, value);
  }

  void between(int64_t low, int64_t high, const char* field, int64_t value) {
    if ((value >= low && value <= high) || status_ != Status::kOk) return;
    status_ = fail(Status::kInvalidArgument, "%s: %s must be from %lld to %lld, got %lld", function_, field,
                   static_cast<long long>(low), static_cast<long long>(high), static_cast<long long>(value));
  }

  void multiple(int unit, const char* field, int64_t value) {
    if (value % unit == 0 || status_ != Status::kOk) return;
    status_ = fail(Status::kInvalidArgument, "%s: %s must be a multiple of %d, got %lld", function_, field,
                   unit, static_cast<long long>(value));
  }

  void not_negative(const char* field, int64_t value) { that(value >= 0, field, "at least 0", value); }

  void length(const char* field, int64_t value) { between(0, kMaxSeqlen, field, value); }

  void positive(const char* field, int64_t value) { that(value > 0, field, "at least 1", value); }

  void given(const void* pointer, const char* field) {
    if (pointer != nullptr || status_ != Status::kOk) return;
    status_ = fail(Status::kInvalidArgument, "%s: %s must not be null here", function_, field);
  }

  void together(const void* a, const void* b, const char* fields) {
    if ((a == nullptr) == (b == nullptr) || status_ != Status::kOk) return;
    status_ = fail(Status::kInvalidArgument, "%s: %s must be given together, or neither", function_, fields);
  }

  Status status() const { return status_; }

 private:
  const char* function_;
  Status status_ = Status::kOk;
};

bool is_dtype(int32_t value) {
  return value == static_cast<int32_t>(Dtype::kFp16) || value == static_cast<int32_t>(Dtype::kBf16);
}

bool is_design(int32_t value) {
  return value == static_cast<int32_t>(Design::kMma) || value == static_cast<int32_t>(Design::kWgmma);
}

void require_head_dim(Requirements& require, const char* field, int32_t value) {
  require.between(1, kMaxHeadDim, field, value);
  require.multiple(kHeadDimMultiple, field, value);
}

void require_choice(Requirements& require, const ForwardParams& params) {
  require.that(is_dtype(params.dtype), "dtype", "0 (fp16) or 1 (bf16)", params.dtype);
  require_head_dim(require, "head_dim", params.head_dim);
  require_head_dim(require, "head_dim_v", params.head_dim_v);
  require.that(params.window_left >= -1, "window_left", "at least -1", params.window_left);
  require.that(params.window_right >= -1, "window_right", "at least -1", params.window_right);
}

void require_scores(Requirements& require, const ForwardParams& params) {
  require.that_number(std::isfinite(params.softmax_scale), "softmax_scale", "finite", params.softmax_scale);
  require.that_number(std::isfinite(params.softcap) && params.softcap >= 0.0f, "softcap",
                      "0, or positive and finite", params.softcap);
  require.that_number(params.dropout_p >= 0.0f && params.dropout_p < 1.0f, "dropout_p", "in [0, 1)",
                      params.dropout_p);
  require.that_number(params.dropout_rescale >= 1.0f && std::isfinite(params.dropout_rescale),
                      "dropout_rescale", "at least 1", params.dropout_rescale);
  if (params.dropout_p > 0.0f) require.given(params.rng_state, "rng_state");
}

void require_sizes(Requirements& require, const ForwardParams& params, int least_heads) {
  require.not_negative("batch", params.batch);
  require.length("seqlen_q", params.seqlen_q);
  require.length("seqlen_k", params.seqlen_k);
  require.between(-1, kMaxSum - params.seqlen_q, "window_left", params.window_left);
  require.between(-1, kMaxSum - params.seqlen_k, "window_right", params.window_right);
  require.not_negative("total_q", params.total_q);
  require.not_negative("total_k", params.total_k);
  require.positive("num_heads_k", params.num_heads_k);
  const bool whole = params.num_heads_k > 0 && params.num_heads % params.num_heads_k == 0;
  require.that(whole && params.num_heads >= least_heads, "num_heads", "a multiple of num_heads_k",
               params.num_heads);
}

bool has_queries(const ForwardParams& params) {
  const bool rows = params.cu_seqlens_q != nullptr ? params.total_q > 0 : params.seqlen_q > 0;
  return params.batch > 0 && params.num_heads > 0 && rows;
}

bool has_keys(const ForwardParams& params) {
  const bool rows = params.cu_seqlens_k != nullptr ? params.total_k > 0 : params.seqlen_k > 0;
  return params.batch > 0 && rows;
}

// What has no keys in a cache: all but the tensors.
void require_call(Requirements& require, const ForwardParams& params) {
  require_choice(require, params);
  require_sizes(require, params, 1);
  require_scores(require, params);
  require.together(params.cu_seqlens_q, params.cu_seqlens_k, "cu_seqlens_q and cu_seqlens_k");
}

void require_tensors(Requirements& require, const ForwardParams& params, bool queries, bool keys) {
  if (queries) {
    require.given(params.q, "q");
    require.given(params.out, "out");
  }
  if (queries && keys) {
    require.given(params.k, "k");
    require.given(params.v, "v");
  }
}

void require_workspaces(Requirements& require, const BackwardParams& params) {
  const ForwardParams& forward = params.forward;
  const auto require_rows = [&](const char* field, int64_t rows, bool varlen, int64_t total, int64_t seqlen) {
    require.that(rows >= (varlen ? total : seqlen), field, "at least the rows of a head", rows);
    require.multiple(kWorkspaceRows, field, rows);
  };
  require_rows("rows", params.rows, forward.cu_seqlens_q != nullptr, forward.total_q, forward.seqlen_q);
  require.given(params.softmax_d, "softmax_d");
  require.given(params.softmax_lse_log2, "softmax_lse_log2");
  require.given(params.row_sums, "row_sums");
  if (params.dq != nullptr) require.given(params.dq_accumulator, "dq_accumulator");
  const int64_t parts = params.key_parts;
  require.that(parts >= 1 && forward.num_heads % (forward.num_heads_k * parts) == 0, "key_parts",
               "a divisor of num_heads / num_heads_k", parts);
  if (parts == 1 || params.dk == nullptr) return;
  require.given(params.key_partials, "key_partials");
  require_rows("key_rows", params.key_rows, forward.cu_seqlens_k != nullptr, forward.total_k,
               forward.seqlen_k);
}

void require_cache(Requirements& require, const CacheParams& params) {
  const ForwardParams& forward = params.forward;
  require.not_negative("cache_entries", params.cache_entries);
  require.not_negative("page_size", params.page_size);
  require.multiple(kKeyGroup, "page_size", params.page_size);
  const bool pages = params.page_size > 0 && has_keys(forward) && forward.seqlen_k > 0;
  if (pages) require.given(params.block_table, "block_table");
  const auto holds = [](int elements, int head_dim) {
    return elements > head_dim - kHeadDimMultiple && elements <= head_dim;
  };
  constexpr const char* kOwn = "the cache's own head dim, which the other one rounds up";
  require.that(holds(params.cache_head_dim, forward.head_dim), "cache_head_dim", kOwn, params.cache_head_dim);
  require.that(holds(params.cache_head_dim_v, forward.head_dim_v), "cache_head_dim_v", kOwn,
               params.cache_head_dim_v);
  require.not_negative("cache_seqlen", params.cache_seqlen);
  require.between(0, kMaxSum - forward.seqlen_k, "seqlen_new", params.seqlen_new);
  if (params.seqlen_new > 0 && forward.batch > 0) {
    require.given(params.k_new, "k_new");
    require.given(params.v_new, "v_new");
  }
  require.between(1, kMaxSplits, "num_splits", params.num_splits);
  require.that(is_design(params.design), "design", "0 (mma) or 1 (wgmma)", params.design);
  if (forward.num_heads_k > 0) {
    const bool varlen = forward.cu_seqlens_q != nullptr;  // then rows past the last sequence are counted, too
    const int64_t rows = varlen ? std::max<int64_t>(forward.total_q, forward.seqlen_q) : forward.seqlen_q;
    require.that(rows <= INT32_MAX / std::max(forward.num_heads / forward.num_heads_k, 1),
                 varlen ? "total_q" : "seqlen_q", "fewer than 2^31 rows with the heads that share keys",
                 rows);
  }
  if (params.num_splits > 1 && has_queries(forward)) {
    require.given(params.out_partial, "out_partial");
    require.given(params.lse_partial, "lse_partial");
  }
}

void require_rotation(Requirements& require, const CacheParams& params) {
  require.together(params.rotary_cos, params.rotary_sin, "rotary_cos and rotary_sin");
  if (params.rotary_cos == nullptr) return;
  require.not_negative("rotary_rows", params.rotary_rows);
  require.between(0, params.forward.head_dim, "rotary_dim", params.rotary_dim);
  require.multiple(kRotaryMultiple, "rotary_dim", params.rotary_dim);
  if (has_queries(params.forward)) require.given(params.q_rotated, "q_rotated");
}

void require_forward(Requirements& require, const ForwardParams& params) {
  require_call(require, params);
  require_tensors(require, params, has_queries(params), has_keys(params));
}

void require_backward(Requirements& require, const BackwardParams& params) {
  const ForwardParams& forward = params.forward;
  require_forward(require, forward);
  if (require.status() != Status::kOk) return;
  if (has_queries(forward)) {
    require.given(forward.softmax_lse, "softmax_lse");
    require.given(params.dout, "dout");
  }
  require.together(params.dk, params.dv, "dk and dv");
  require_workspaces(require, params);
}

void require_cache_call(Requirements& require, const CacheParams& params) {
  const ForwardParams& forward = params.forward;
  require_choice(require, forward);
  require_sizes(require, forward, 0);
  require.that_number(forward.dropout_p == 0.0f, "dropout_p", "0 over a cache", forward.dropout_p);
  require_scores(require, forward);
  require_tensors(require, forward, has_queries(forward), has_keys(forward) && params.cache_entries > 0);
  require_cache(require, params);
  require_rotation(require, params);
}

void require_planned_backward(Requirements& require, const BackwardParams& params) {
  require_choice(require, params.forward);
  require_sizes(require, params.forward, 1);
}

void require_planned_cache(Requirements& require, const CacheParams& params) {
  require_choice(require, params.forward);
  require_sizes(require, params.forward, 0);
  require.between(0, kMaxSplits, "num_splits", params.num_splits);
}

void require_dropout_probs(Requirements& require, const ForwardParams& params) {
  require_call(require, params);
  require.given(params.rng_state, "rng_state");
  if (!has_queries(params) || !has_keys(params)) return;
  require.given(params.q, "q");
  require.given(params.k, "k");
  require.given(params.softmax_lse, "softmax_lse");
  require.given(params.probs, "probs");
}

void require_rotary(Requirements& require, const RotaryParams& params) {
  require.that(is_dtype(params.dtype), "dtype", "0 (fp16) or 1 (bf16)", params.dtype);
  require.not_negative("rows", params.rows);
  require.not_negative("batch", params.batch);
  require.length("seqlen", params.seqlen);
  require.not_negative("table_rows", params.table_rows);
  require.positive("num_heads", params.num_heads);
  require.positive("head_dim", params.head_dim);
  require.multiple(kHeadDimMultiple, "head_dim", params.head_dim);
  require.between(1, params.head_dim, "rotary_dim", params.rotary_dim);
  require.multiple(params.interleaved != 0 ? kRotaryMultiple / 2 : kRotaryMultiple, "rotary_dim",
                   params.rotary_dim);
  if (params.rows == 0) return;
  require.given(params.x, "x");
  require.given(params.out, "out");
  if (params.table_rows == 0) return;
  require.given(params.cos, "cos");
  require.given(params.sin, "sin");
}

template <class Params>
Status check(const char* function, const Params* params, void (*rules)(Requirements&, const Params&)) {
  Requirements require(function);
  require.given(params, "params");
  if (params != nullptr) rules(require, *params);
  return require.status();
}

// The same of a function that writes a plan.
template <class Params>
Status check_plan(const char* function, const Params* params, const void* plan,
                  void (*rules)(Requirements&, const Params&)) {
  Requirements require(function);
  require.given(plan, "plan");
  return require.status() != Status::kOk ? require.status() : check(function, params, rules);
}

}  // namespace

Status check_choice(const char* function, const ForwardParams* params) {
  return check(function, params, require_choice);
}

Status check_forward(const char* function, const ForwardParams* params) {
  return check(function, params, require_forward);
}

Status check_backward(const char* function, const BackwardParams* params) {
  return check(function, params, require_backward);
}

Status check_cache(const char* function, const CacheParams* params) {
  return check(function, params, require_cache_call);
}

Status check_plan_backward(const char* function, const BackwardParams* params, const BackwardPlan* plan) {
  return check_plan(function, params, plan, require_planned_backward);
}

Status check_plan_cache(const char* function, const CacheParams* params, const CachePlan* plan) {
  return check_plan(function, params, plan, require_planned_cache);
}

Status check_dropout_probs(const char* function, const ForwardParams* params) {
  return check(function, params, require_dropout_probs);
}

Status check_rotary(const char* function, const RotaryParams* params) {
  return check(function, params, require_rotary);
}

}  // namespace flash_attn
