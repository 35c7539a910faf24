// The threads of a chain of calls. They stay in one parallel region from its first call to its last: a call publishes its
// tasks, each thread takes them from its own share and then from the others', and whoever waits, for the others or for
// the next tasks, has the weights of the next linear brought into its L2 cache. So memory is never idle, which a decode
// step's time is made of.
#pragma once
#include <immintrin.h>
#include <sched.h>
#include <stdint.h>

#include <atomic>
#include <memory>
#include <vector>

namespace {

// Weights that a coming call reads: shares of whole blocks, one thread's behind another's.
struct Weights {
  const uint8_t* data;
  int64_t blocks, block_bytes;
};

class Team {
 public:
  // `coming`: the weights of the linears to come, in their order.
  Team(int threads, std::vector<Weights> coming)
      : threads_(threads), shares_(new Share[threads]), readers_(new Reader[threads]), coming_(std::move(coming)) {}

  // Calls f(begin, end) for pieces of [0, count), count < 2^31, on all threads, and returns when all are done. f must not
  // throw. Called by one thread, between two of whose calls nothing but `begins` of the next linear changes.
  template <class F>
  void each(int64_t count, const F& f) {
    if (count <= 0) return;
    job_ = {[](const void* f, int64_t begin, int64_t end) { (*static_cast<const F*>(f))(begin, end); }, &f};
    left_.store(count, std::memory_order_relaxed);
    for (int64_t t = 0; t < threads_; t++)
      shares_[t].range.store(range(count * t / threads_, count * (t + 1) / threads_), std::memory_order_release);
    calls_.fetch_add(1, std::memory_order_release);
    work(0);
    for (Wait wait; left_.load(std::memory_order_acquire) != 0;) wait.turn(*this, 0);
  }

  // From the tasks that are published next on, threads that wait read the weights of the linear behind.
  void begins() { linear_.store(linear_.load(std::memory_order_relaxed) + 1, std::memory_order_release); }

  // What each thread but the first does until the end.
  void serve(int thread) {
    Wait wait;
    for (int64_t seen = 0;;) {
      const int64_t calls = calls_.load(std::memory_order_acquire);
      if (calls == kEnd) return;
      if (calls == seen) {
        wait.turn(*this, thread);
        continue;
      }
      seen = calls;
      work(thread);
      wait = Wait();
    }
  }
  void end() { calls_.store(kEnd, std::memory_order_release); }

 private:
  static constexpr int64_t kEnd = -1;
  static constexpr int64_t kAhead = 256 << 10;  // bytes that a thread reads ahead: its L2 cache keeps them, and what it works on

  struct Job {
    void (*run)(const void* f, int64_t begin, int64_t end);
    const void* f;
  };
  // What is left of a thread's share of the tasks: begin, end. Who comes late may take of the next call's: job_ is read
  // once something is taken, and stands until that is done.
  struct alignas(64) Share {
    std::atomic<uint64_t> range{0};
  };
  struct alignas(64) Reader {
    int64_t linear = -1;
    const uint8_t *at = nullptr, *end = nullptr;
  };
  // A while of looking on, then giving the processor away: there may be more threads than cores.
  struct Wait {
    int turns = 0;
    void turn(Team& team, int thread) {
      if (team.read_ahead(thread)) return;
      if (++turns < 4096) _mm_pause();
      else sched_yield();
    }
  };

  static uint64_t range(int64_t begin, int64_t end) { return uint64_t(begin) << 32 | uint64_t(end); }

  // Takes the first half of a share, or, of another's, the last; false where nothing is left.
  static bool take(Share& share, bool own, int64_t& begin, int64_t& end) {
    uint64_t rest = share.range.load(std::memory_order_acquire);
    for (;;) {
      const int64_t first = int64_t(rest >> 32), last = int64_t(rest & 0xffffffff);
      if (first == last) return false;
      const int64_t half = (last - first + 1) / 2;
      begin = own ? first : last - half;
      end = own ? first + half : last;
      if (share.range.compare_exchange_weak(rest, own ? range(end, last) : range(first, begin),
                                            std::memory_order_acq_rel, std::memory_order_acquire))
        return true;
    }
  }

  void work(int thread) {
    for (int i = 0; i < threads_; i++) {
      Share& share = shares_[(thread + i) % threads_];
      for (int64_t begin, end; take(share, i == 0, begin, end);) {
        job_.run(job_.f, begin, end);
        left_.fetch_sub(end - begin, std::memory_order_acq_rel);
      }
    }
  }

  // Asks for some more of this thread's share of the next weights; false where enough was asked for.
  bool read_ahead(int thread) {
    Reader& reader = readers_[thread];
    const int64_t linear = linear_.load(std::memory_order_acquire);
    if (reader.linear != linear) {
      reader.linear = linear;
      reader.at = reader.end = nullptr;
      if (linear < int64_t(coming_.size())) {
        const Weights& w = coming_[linear];
        const int64_t begin = w.blocks * thread / threads_ * w.block_bytes, end = w.blocks * (thread + 1) / threads_ * w.block_bytes;
        reader.at = w.data + begin;
        reader.end = w.data + (end - begin < kAhead ? end : begin + kAhead);
      }
    }
    if (reader.at >= reader.end) return false;
    for (int i = 0; i < 8; i++, reader.at += 64) _mm_prefetch(reinterpret_cast<const char*>(reader.at), _MM_HINT_T1);
    return true;
  }

  const int threads_;
  std::unique_ptr<Share[]> shares_;
  std::unique_ptr<Reader[]> readers_;
  const std::vector<Weights> coming_;
  Job job_{};
  alignas(64) std::atomic<int64_t> calls_{0};
  alignas(64) std::atomic<int64_t> left_{0};
  alignas(64) std::atomic<int64_t> linear_{0};
};

}  // namespace
