// Cases of window attention: heads, head_dim, and windows=64,64,3 (rows of each).
#include "check.h"

Complaints check_window_attention(const Case& given, const Bench& bench) {
  streamo_window_attention a = {};
  a.heads = given.integer("heads");
  a.head_dim = given.integer("head_dim");
  a.scale = 1 / std::sqrt(static_cast<float>(a.head_dim));
  std::vector<std::int32_t> starts = {0};
  for (const std::int32_t rows : given.integers("windows")) starts.push_back(starts.back() + rows);
  a.rows = starts.back();
  a.window_count = static_cast<std::int32_t>(starts.size()) - 1;
  a.window_starts = starts.data();

  const std::size_t width = static_cast<std::size_t>(a.heads) * a.head_dim;
  Random random;
  const Floats qkv = random.normals(3 * width * a.rows);
  std::vector<std::int64_t> positions;
  for (std::int32_t row = 0; row < a.rows; ++row) positions.push_back(row);
  const Angles angles(positions, a.head_dim);
  a.qkv = qkv.data();
  a.rope_cos = angles.cosines.data();
  a.rope_sin = angles.sines.data();

  Complaints complaints;
  Floats expected(width * a.rows, NAN);
  a.output = expected.data();
  if (!succeeded(streamo_window_attention_reference(&a), "oracle", complaints)) return complaints;
  for (const std::string& set : bench.sets) {
    streamo_select_instruction_set(set.c_str());
    Floats found(expected.size(), NAN), shared(expected.size(), NAN);
    a.output = found.data();
    if (!succeeded(streamo_window_attention_run(&a, nullptr), set, complaints)) continue;
    a.output = shared.data();
    if (!succeeded(streamo_window_attention_run(&a, bench.two_threads), set, complaints)) continue;
    expect_near(nmse(found.data(), expected.data(), found.size()), kFloatNmse, set, complaints);
    if (!same_bytes(found, shared)) complaints.push_back(set + ": two threads give other bits than one");
  }
  return complaints;
}
