// The team of threads of a chain, by itself: every index of every call is taken once, whoever is late; for the thread sanitizer.
#include "team.h"

#include <stdio.h>

#include <thread>

namespace {

constexpr int64_t kCounts[] = {1, 2, 3, 7, 64, 1000, 0, 2500000};

int64_t check(int threads, int calls) {
  std::vector<uint8_t> weights(1 << 20, 1);
  std::vector<Weights> coming;
  for (int i = 0; i < calls; i++) coming.push_back({i % 3 ? weights.data() : nullptr, i % 3 ? 16 : 0, 1 << 16});
  Team team(threads, coming);
  std::vector<std::thread> others;
  for (int t = 1; t < threads; t++) others.emplace_back([&team, t] { team.serve(t); });
  int64_t wrong = 0;
  for (int call = 0; call < calls; call++) {
    const int64_t count = kCounts[call % (call % 50 ? 7 : 8)];
    std::vector<uint8_t> taken(size_t(count), 0);  // no atomics: two threads on one index are a race
    int64_t before = call;                         // what the caller wrote is seen, what the others write is seen by the caller
    if (call % 2) team.begins();
    team.each(count, [&](int64_t begin, int64_t end) {
      if (before != call || begin >= end || end > count) return;
      for (int64_t i = begin; i < end; i++) taken[size_t(i)]++;
    });
    for (uint8_t times : taken) wrong += times != 1;
  }
  team.end();
  for (std::thread& other : others) other.join();
  return wrong;
}

}  // namespace

int main() {
  int64_t wrong = 0;
  for (int threads : {1, 2, 3, 8}) wrong += check(threads, threads > 2 ? 120 : 400);
  { Team idle(4, {}); idle.end(); }
  printf("%ld indices not taken once\n", long(wrong));
  return wrong != 0;
}
