// The functions of templates/problem for tests to call: plain ones, on numbers and arrays.
#include <cstdint>
#include <type_traits>

#include "problem/kv_cache.cuh"
#include "problem/mask.cuh"
#include "problem/schedule.cuh"
#include "problem/sequence.cuh"
#include "problem/work.cuh"

namespace flash_attn {
namespace {

using Element = uint16_t;  // of Q, K, V and O, with which nothing here computes

// Calls function with the mask class, and with the number of keys in a block, as a constant.
template <class Function>
void with_mask(Mask mask, Function function) {
  switch (mask) {
    case Mask::kFull:
      return function(std::integral_constant<Mask, Mask::kFull>{});
    case Mask::kCausal:
      return function(std::integral_constant<Mask, Mask::kCausal>{});
    case Mask::kWindowed:
      return function(std::integral_constant<Mask, Mask::kWindowed>{});
  }
}

template <class Function>
void with_block(Mask mask, int block_n, Function function) {
  with_mask(mask, [&](auto constant) {
    switch (block_n) {
      case 64:
        return function(constant, std::integral_constant<int, 64>{});
      case 80:
        return function(constant, std::integral_constant<int, 80>{});
      case 128:
        return function(constant, std::integral_constant<int, 128>{});
    }
  });
}

int64_t store_tiles(const TileSchedule& schedule, int32_t* tiles, int64_t room) {
  for (int64_t i = 0; i < schedule.num_tiles() && i < room; ++i) {
    const TileSchedule::Tile tile = schedule.tile(static_cast<int>(i));
    tiles[3 * i] = tile.m_block;
    tiles[3 * i + 1] = tile.batch;
    tiles[3 * i + 2] = tile.head;
  }
  return schedule.num_tiles();
}

}  // namespace

// Rows of a tile: what a QueryBlock is made of.
struct Rows {
  int32_t batch;
  int32_t head;
  int32_t group;
  int32_t first_row;
  int32_t max_rows;

  QueryBlock of(const ForwardParams& params) const {
    return QueryBlock(params, Sequence(params, batch), batch, head, group, first_row, max_rows);
  }
};

extern "C" {

// [first, end) of the keys of each query, and of the queries of each key.
void mask_bounds(const ForwardParams* params, Mask mask, int seqlen_q, int seqlen_k, int32_t* keys,
                 int32_t* queries) {
  with_mask(mask, [&](auto constant) {
    const AttentionMask<constant> rule(*params, seqlen_q, seqlen_k);
    for (int query = 0; query < seqlen_q; ++query) {
      keys[2 * query] = rule.first_key(query);
      keys[2 * query + 1] = rule.end_key(query);
    }
    for (int key = 0; key < seqlen_k; ++key) {
      queries[2 * key] = rule.first_query(key);
      queries[2 * key + 1] = rule.end_query(key, seqlen_q);
    }
  });
}

// [begin, end), and whether each block before `count` needs the mask.
void key_blocks(const ForwardParams* params, Mask mask, int block_n, int seqlen_q, int seqlen_k,
                int first_query, int last_query, int32_t* range, bool* needs_mask, int count) {
  with_block(mask, block_n, [&](auto constant, auto keys) {
    const AttentionMask<constant> rule(*params, seqlen_q, seqlen_k);
    const KeyBlocks<constant, keys> blocks(rule, first_query, last_query);
    range[0] = blocks.begin;
    range[1] = blocks.end;
    for (int block = 0; block < count; ++block) needs_mask[block] = blocks.needs_mask(block);
  });
}

// Both return the number of tiles, and store (m_block, batch, head) of as many as there is room for.
int64_t query_tiles(const ForwardParams* params, int block_m, Mask mask, int64_t section_bytes, int packed,
                    int32_t* tiles, int64_t room) {
  return store_tiles(make_schedule(*params, block_m, mask, section_bytes, packed), tiles, room);
}

int64_t key_tiles(const ForwardParams* params, int block_n, int parts, bool sections, int64_t section_bytes,
                  int32_t* tiles, int64_t room) {
  return store_tiles(make_key_schedule(*params, block_n, parts, sections, section_bytes), tiles, room);
}

// (seqlen_q, seqlen_k).
void lengths(const ForwardParams* params, int batch, int32_t* lengths) {
  const Sequence sequence(*params, batch);
  lengths[0] = sequence.seqlen_q;
  lengths[1] = sequence.seqlen_k;
}

// Addresses of q, out and the LSE of a row of a head, and of the first key and value of a head.
void query_addresses(const ForwardParams* params, int batch, int head, int row, const void** addresses) {
  const Sequence sequence(*params, batch);
  addresses[0] = sequence.q_rows<Element>(*params, head, row);
  addresses[1] = sequence.out_rows<Element>(*params, head, row);
  addresses[2] = sequence.lse_rows(*params, head, row);
}

void key_addresses(const ForwardParams* params, int batch, int key_head, const void** addresses) {
  const Sequence sequence(*params, batch);
  addresses[0] = sequence.k_rows<Element>(*params, key_head);
  addresses[1] = sequence.v_rows<Element>(*params, key_head);
}

// Returns the number of rows; of each (query, head, index) and addresses of q, out and the LSE.
int query_block(const ForwardParams* params, const Rows* rows, int64_t* numbers, const void** addresses) {
  const QueryBlock queries = rows->of(*params);
  for (int i = 0; i < queries.rows; ++i) {
    numbers[3 * i] = queries.query_of(i);
    numbers[3 * i + 1] = queries.head_of(i);
    numbers[3 * i + 2] = queries.index(i);
    addresses[3 * i] = queries.query<Element>(i);
    addresses[3 * i + 1] = queries.out<Element>(i);
    addresses[3 * i + 2] = queries.lse(i);
  }
  return queries.rows;
}

// As a thread block's threads would, one after the other.
void fill_empty_rows(const ForwardParams* params, const Rows* rows, int threads) {
  const QueryBlock queries = rows->of(*params);
  for (int thread = 0; thread < threads; ++thread) store_empty_rows<Element>(queries, thread, threads);
}

void fill_zero_rows(Element* first, int64_t row_stride, int64_t rows, int chunks, int64_t threads) {
  for (int64_t thread = 0; thread < threads; ++thread) {
    zero_rows(first, row_stride, rows, chunks, thread, threads);
  }
}

void fill_no_keys(const CacheParams* params, const Rows* rows, int part, int parts, int threads) {
  const QueryBlock queries = rows->of(params->forward);
  for (int thread = 0; thread < threads; ++thread) {
    store_no_keys<Element>(*params, queries, KeyPart{part, parts}, thread, threads);
  }
}

// Returns the number of tiles, and stores the first row of as many as there is room for.
int tail_tiles(int64_t first, int64_t step, int64_t rows, int32_t* found, int room) {
  int count = 0;
  for_each_tile(first, step, rows, [&](int row) {
    if (count < room) found[count] = row;
    ++count;
  });
  return count;
}

// (begin, end, has_keys) of all blocks of keys, then of each part.
void key_parts(const ForwardParams* params, Mask mask, int block_n, const Rows* rows, int parts,
               int32_t* ranges) {
  with_block(mask, block_n, [&](auto constant, auto keys) {
    const auto store = [&](const auto& work) {
      *ranges++ = work.blocks.begin;
      *ranges++ = work.blocks.end;
      *ranges++ = work.has_keys();
    };
    const Work<constant, keys> all(rows->of(*params));
    store(all);
    for (int part = 0; part < parts; ++part) {
      auto work = all;
      work.keep(KeyPart{part, parts});
      store(work);
    }
  });
}

// Returns the number of rows, and stores where each goes in the partial results of a part.
int partial_rows(const ForwardParams* params, const Rows* rows, int part, int parts, int64_t* found) {
  const QueryBlock queries = rows->of(*params);
  for (int i = 0; i < queries.rows; ++i) found[i] = KeyPart{part, parts}.partial_row(queries, i);
  return queries.rows;
}

// (keys before the call's own, keys of the call, skipped keys).
void cached_lengths(const CacheParams* params, int batch, int32_t* lengths) {
  const CachedSequence sequence(*params, batch);
  lengths[0] = sequence.length;
  lengths[1] = sequence.seqlen_k;
  lengths[2] = sequence.k_row;
}

// (row of the cache or page, row in it) of keys from 0 on: as looked up, and as located.
void key_locations(const CacheParams* params, int batch, int keys, int32_t* looked_up, int32_t* located) {
  const CachedSequence sequence(*params, batch);
  const auto store = [](int32_t* to, const KeyLocation& location) {
    to[0] = location.page_or_batch;
    to[1] = location.row;
  };
  for (int key = 0; key < keys; ++key) {
    store(looked_up + 2 * key, look_up_key(*params, sequence, key));
    store(located + 2 * key, locate_key(*params, sequence, key));
  }
}

bool are_rows_aligned(const void* tensor, int64_t batch_stride, int64_t row_stride, int64_t head_stride,
                      int head_dim) {
  return rows_aligned(tensor, batch_stride, row_stride, head_stride, head_dim);
}

bool is_cache_aligned(const CacheParams* params) { return cache_aligned(*params); }

}  // extern "C"

}  // namespace flash_attn
