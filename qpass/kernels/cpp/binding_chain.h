// qpass::chain: native ops one after the other in one call, by a program (ops/chain.py) that is read once.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <exception>
#include <mutex>
#include <sstream>
#include <thread>
#include <unordered_map>

#include "binding.h"
#include "binding_attention.h"
#include "binding_linear.h"
#include "binding_rope.h"

namespace {

namespace chain {

constexpr const char* op = "chain";
using Optional = std::optional<Tensor>;
constexpr int64_t kNone = std::numeric_limits<int64_t>::min();

// One call: its op's arguments in the order of its schema, those of a kind together. A slot is -1 where none is given.
struct Step {
  enum Kind { kLinear, kAttention, kRope, kFlatten, kSlots } kind;
  std::vector<int64_t> slots, integers;  // kNone where none is given
  std::vector<double> numbers;           // NaN where none is given
  std::vector<int64_t> last;    // slots that nobody reads behind this step
  std::string name;             // for the profiler
};

struct Program {
  int64_t inputs = 0;
  std::vector<Step> steps;
  std::vector<int64_t> results;
};

// Kinds of the arguments: t a tensor's slot, i an integer, f a number.
struct Signature {
  const char* name;
  Step::Kind kind;
  const char* arguments;
};
constexpr Signature kSignatures[] = {
    {"packed_linear", Step::kLinear, "tttttiiiiiittffttfiiiff"},
    {"attention", Step::kAttention, "ttttfftt"},
    {"rope_append", Step::kRope, "tttttt"},
    {"flatten", Step::kFlatten, "t"},
    {"slots", Step::kSlots, "t"},
};

int64_t slot_of(const std::string& word, int64_t count, bool optional) {
  if (optional && word == "-") return -1;
  CHECK(word.size() > 1 && word[0] == '%', "'", word, "' is not a slot");
  char* end;
  const int64_t slot = strtoll(word.c_str() + 1, &end, 10);
  CHECK(*end == 0 && slot >= 0 && slot < count, "slot ", word, " is not known yet; there are ", count);
  return slot;
}

// The kernel of a linear by its integers; null for one that its call will refuse.
const QpassKernel* kernel_of(const std::vector<int64_t>& integers) {
  const int64_t n = integers[0], k = integers[1], format = integers[2];
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (format < 0 || format >= kFormats || n < 1 || k < 1 || n >= kMost || k >= kMost) return nullptr;
  return kernels[format].load(std::memory_order_acquire);
}

// " [K, bytes of the packed weight]": what measure/profile.py sorts linears by.
std::string shape_of(const std::vector<int64_t>& integers) {
  const QpassKernel* kernel = kernel_of(integers);
  if (!kernel) return "";
  const int64_t bytes = kernel->packed_bytes(integers[0], integers[1], integers[4] != 0);
  return " [" + std::to_string(integers[1]) + ", " + std::to_string(bytes) + "]";
}

// Whether a call may do without its i-th tensor.
bool optional(Step::Kind kind, size_t i) {
  return kind == Step::kRope ? i == 1 || i == 2 : i >= (kind == Step::kLinear ? 2 : kind == Step::kAttention ? 4 : 1);
}

Step read_step(std::istringstream& line, const std::string& name, int64_t known) {
  for (const Signature& s : kSignatures) {
    if (name != s.name) continue;
    Step step{s.kind, {}, {}, {}, {}, "qpass::" + name};
    std::string word;
    for (const char* kind = s.arguments; *kind; kind++) {
      CHECK(bool(line >> word), name, " has too few arguments");
      char* end = nullptr;
      if (*kind == 't') step.slots.push_back(slot_of(word, known, true));
      if (*kind == 'i') step.integers.push_back(word == "-" ? kNone : strtoll(word.c_str(), &end, 10));
      if (*kind == 'f') step.numbers.push_back(word == "-" ? NAN : strtod(word.c_str(), &end));
      CHECK(end == nullptr || *end == 0 || word == "-", name, ": '", word, "' is not a number");
    }
    CHECK(!(line >> word), name, " has too many arguments");
    for (size_t i = 0; i < step.slots.size(); i++)
      CHECK(step.slots[i] >= 0 || optional(s.kind, i), name, " lacks one of its tensors");
    if (s.kind == Step::kLinear) step.name += shape_of(step.integers);
    return step;
  }
  CHECK(false, "there is no native op ", name);
}

// "INPUTS n", then a step a line, then "return" and the slots of the results. A step's output gets the next slot.
Program read(const std::string& text) {
  Program program;
  std::istringstream lines(text);
  std::string line, word;
  bool ended = false;
  for (int64_t known = -1; std::getline(lines, line);) {
    CHECK(!ended, "'", line, "' behind the program's end");
    std::istringstream words(line);
    CHECK(bool(words >> word), "an empty line");
    if (known < 0) {
      CHECK(word == "inputs" && words >> program.inputs && program.inputs > 0, "the number of inputs is missing");
      known = program.inputs;
    } else if (word == "return") {
      while (words >> word) program.results.push_back(slot_of(word, known, false));
      ended = true;
    } else {
      program.steps.push_back(read_step(words, word, known++));
    }
  }
  CHECK(ended && !program.steps.empty(), "the program is not complete");
  std::vector<bool> read_later(program.inputs + program.steps.size());
  for (int64_t slot : program.results) read_later[slot] = true;
  for (size_t i = program.steps.size(); i-- > 0;)
    for (int64_t slot : program.steps[i].slots)
      if (slot >= 0 && !read_later[slot]) {
        read_later[slot] = true;
        program.steps[i].last.push_back(slot);
      }
  return program;
}

const Program& program_of(const std::string& text) {
  static std::mutex mutex;
  static std::unordered_map<std::string, std::unique_ptr<Program>> programs;  // as many as compiled graphs have
  std::lock_guard<std::mutex> lock(mutex);
  auto& known = programs[text];
  if (!known) known = std::make_unique<Program>(read(text));
  return *known;
}

Tensor view(const Tensor& t, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), int64_t(sizes.size()), sizes.data(), strides.data(),
                                                               0, &handle));
  return Tensor(handle);
}

// A cache [slots, batch, heads, width] as attention reads it.
Tensor heads_first(const Tensor& t) {
  CHECK(t.dim() == 4, "slots takes four dimensions");
  return view(t, {t.size(1), t.size(2), t.size(0), t.size(3)}, {t.stride(1), t.stride(2), t.stride(0), t.stride(3)});
}

// The last two dimensions as one, without a copy where strides allow.
Tensor flat(const Tensor& t) {
  CHECK(t.dim() >= 2, "flatten takes two dimensions at least");
  const Tensor dense = t.is_contiguous() ? t : torch::stable::contiguous(t);
  std::vector<int64_t> sizes, strides;
  for (int64_t d = 0; d + 1 < t.dim(); d++) sizes.push_back(t.size(d)), strides.push_back(dense.stride(d));
  sizes.back() *= t.size(t.dim() - 1);
  strides.back() = 1;
  return view(dense, sizes, strides);
}

// Tells torch's profiler of a step; costs some nanoseconds where none is running.
struct Recorded {
  AtenRecordFunctionHandle handle = nullptr;
  explicit Recorded(const std::string& name) { aoti_record_function_start(name.c_str(), nullptr, nullptr, 0, &handle); }
  ~Recorded() { aoti_record_function_end(handle); }
};

Tensor run(const Step& step, const std::vector<Optional>& slots) {
  const Recorded recorded(step.name);
  auto given = [&](size_t i) { return step.slots[i] < 0 ? Optional() : slots[step.slots[i]]; };
  auto tensor = [&](size_t i) -> const Tensor& { return *slots[step.slots[i]]; };
  const auto& n = step.integers;
  const auto& f = step.numbers;
  auto maybe = [](double number) { return std::isnan(number) ? std::nullopt : std::optional<double>(number); };
  switch (step.kind) {
    case Step::kLinear:
      return linear::packed_linear(tensor(0), tensor(1), given(2), given(3), given(4), n[0], n[1], n[2], n[3],
                                   n[4] != 0, n[5], given(5), given(6), f[0], maybe(f[1]), given(7), given(8), maybe(f[2]),
                                   n[6] == kNone ? std::nullopt : std::optional<int64_t>(n[6]), n[7] != 0, n[8] != 0,
                                   f[3], f[4]);
    case Step::kAttention:
      return attention::attention(tensor(0), tensor(1), tensor(2), tensor(3), f[0], f[1], given(4), given(5));
    case Step::kRope:
      return rope::rope_append(tensor(0), given(1), given(2), tensor(3), tensor(4), tensor(5));
    case Step::kSlots:
      return heads_first(tensor(0));
    default:
      return flat(tensor(0));
  }
}

// The packed weights of the program's linears that are given as they should be: they are only asked for, not read.
std::vector<Weights> weights_of(const Program& program, const std::vector<Tensor>& tensors) {
  std::vector<Weights> weights;
  for (const Step& step : program.steps) {
    if (step.kind != Step::kLinear) continue;
    weights.push_back({nullptr, 0, 0});
    const QpassKernel* kernel = kernel_of(step.integers);
    const int64_t slot = step.slots[1];
    if (!kernel || slot >= program.inputs || !tensors[slot].is_cpu()) continue;
    const bool glu = step.integers[4] != 0;
    const int64_t block = kernel->packed_bytes(glu ? 2 : 1, step.integers[1], glu);  // that of one output
    weights.back() = {static_cast<const uint8_t*>(tensors[slot].const_data_ptr()), tensors[slot].numel() / block, block};
  }
  return weights;
}

// Runs f on this thread while the others of one parallel region wait for its calls' tasks.
template <class F>
void together(const Program& program, const std::vector<Tensor>& tensors, const F& f) {
  const int threads = int(torch::stable::get_num_threads());
  if (threads < 2 || team) return f();
  Team members(threads, weights_of(program, tensors));
  const std::thread::id caller = std::this_thread::get_id();
  std::exception_ptr error;
  bool done = false;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      if (std::this_thread::get_id() != caller) members.serve(int(t));
      else if (!done) {
        done = true;
        team = &members;
        try {
          f();
        } catch (...) {
          error = std::current_exception();
        }
        team = nullptr;
        members.end();
      }
    }
  });
  if (error) std::rethrow_exception(error);
}

std::vector<Tensor> chain(std::vector<Tensor> tensors, std::string text) {
  const Program& program = program_of(text);
  CHECK(int64_t(tensors.size()) == program.inputs, "the program takes ", program.inputs, " tensors, not ",
        tensors.size());
  std::vector<Optional> slots(tensors.begin(), tensors.end());
  slots.reserve(program.inputs + program.steps.size());
  together(program, tensors, [&] {
    for (const Step& step : program.steps) {
      slots.push_back(run(step, slots));
      for (int64_t slot : step.last) slots[slot].reset();
    }
  });
  std::vector<Tensor> results;
  for (int64_t slot : program.results) results.push_back(*slots[slot]);
  return results;
}

// Programs that write to caches: a schema with a list of results can't say so.
std::vector<Tensor> writing(std::vector<Tensor> tensors, const std::vector<Tensor>& caches, std::string text, size_t count) {
  tensors.insert(tensors.end(), caches.begin(), caches.end());
  std::vector<Tensor> results = chain(std::move(tensors), std::move(text));
  CHECK(results.size() == count, "the program has ", results.size(), " results, not ", count);
  return results;
}

Tensor one(std::vector<Tensor> tensors, std::vector<Tensor> caches, std::string text) {
  return writing(std::move(tensors), caches, std::move(text), 1)[0];
}

std::tuple<Tensor, Tensor> two(std::vector<Tensor> tensors, std::vector<Tensor> caches, std::string text) {
  const std::vector<Tensor> results = writing(std::move(tensors), caches, std::move(text), 2);
  return {results[0], results[1]};
}

}  // namespace chain

}  // namespace
