// The grouped products as XLA custom calls: cut into blocks (product.h), which XLA's own threads
// take one after the other, the calling thread among them.
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <thread>
#include <type_traits>
#include <vector>

#include "product.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kVectorStep = 42, kMatrixStep = 32;  // whole tiles: of 14 or 6 rows, of 32

struct InstructionSet {
  const char* name;
  Multiply multiply;
  bool (*here)();
  int64_t bf16_step;  // a block's rows in bfloat16 are a multiple of it
};

bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  static const bool has = has_avx512() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
  return has;  // found out once: in a virtual machine the question takes long
}
// Linux keeps the matrix registers of a process that asked for them, for all its threads.
bool has_amx_bf16() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl
  unsigned a = 0, b = 0, c = 0, d = 0;
  static const bool has =
      has_avx512_bf16() && __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d >> 22 & 1) &&
      (d >> 24 & 1) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return has;
}

// Best first.
const InstructionSet kInstructionSets[] = {
    {"amx_bf16", multiply_amx_bf16, has_amx_bf16, kMatrixStep},
    {"avx512_bf16", multiply_avx512_bf16, has_avx512_bf16, kVectorStep},
    {"avx512", multiply_avx512, has_avx512, kVectorStep},
    {"avx2", multiply_avx2, has_avx2, kVectorStep},
};

// The named set, or with an empty name the best, if the processor has it; else null.
const InstructionSet* find(const std::string& name) {
  for (const InstructionSet& set : kInstructionSets) {
    if ((name.empty() || name == set.name) && set.here()) return &set;
  }
  return nullptr;
}

struct Free {
  void operator()(char* p) const { std::free(p); }
};

// What the threads share. It outlives the call: a helper may start when all is done.
struct Work {
  std::vector<Product> blocks;
  Multiply multiply;
  std::atomic<size_t> next{0}, done{0};

  void help() {
    thread_local std::unique_ptr<char, Free> scratch(
        static_cast<char*>(std::aligned_alloc(64, (kScratchBytes + 63) / 64 * 64)));
    for (size_t i; (i = next.fetch_add(1)) < blocks.size();) {
      multiply(blocks[i], scratch.get());
      done.fetch_add(1, std::memory_order_release);
    }
  }
};

// Returns when all blocks are done. Waits only for blocks that a running thread has taken, so it
// cannot deadlock, even if no other thread ever comes to help.
void run(std::vector<Product> blocks, Multiply multiply, ffi::ThreadPool& pool) {
  auto work = std::make_shared<Work>();
  work->blocks = std::move(blocks);
  work->multiply = multiply;
  const int64_t helpers =
      std::min<int64_t>(pool.num_threads() - 1, static_cast<int64_t>(work->blocks.size()) - 1);
  for (int64_t i = 0; i < helpers; ++i) pool.Schedule([work] { work->help(); });
  work->help();
  while (work->done.load(std::memory_order_acquire) < work->blocks.size()) {
    std::this_thread::yield();
  }
}

template <class T>
T* moved(T* p, int64_t elements, bool bf16) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(p) + elements * (bf16 ? 2 : 4));
}

// Cuts a product into blocks of at most kMaxRows x kMaxColumns, of about one size.
void cut(const Product& p, const InstructionSet& set, std::vector<Product>& blocks) {
  const int64_t step = p.bf16 ? set.bf16_step : kVectorStep, most = kMaxRows / step * step;
  const int64_t parts = std::max<int64_t>(1, (p.m + most - 1) / most);
  const int64_t rows = (p.m + parts * step - 1) / (parts * step) * step;
  for (int64_t row = 0; row < p.m; row += rows) {
    for (int64_t column = 0; column < p.n; column += kMaxColumns) {
      Product block = p;
      block.m = std::min(rows, p.m - row);
      block.n = std::min(kMaxColumns, p.n - column);
      if (p.a_ids && !p.a_by_k) {
        block.a_ids = p.a_ids + row;
      } else {
        block.a = moved(p.a, p.a_by_k ? row : row * p.a_stride, p.bf16);
      }
      block.b = moved(p.b, p.b_by_n ? column * p.b_stride : column, p.bf16);
      block.c = moved(p.c, row * p.c_stride + column, p.c_bf16);
      blocks.push_back(block);
    }
  }
}

ffi::Error wrong(const std::string& text) {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument, "grouped_matmul: " + text);
}

// Rows of each group as the caller says, checked: everything else follows from them.
ffi::Error check(const int32_t* counts, int64_t groups, int64_t rows) {
  int64_t sum = 0;
  for (int64_t g = 0; g < groups; ++g) {
    if (counts[g] < 0) {
      return wrong("counts[" + std::to_string(g) + "] is " + std::to_string(counts[g]));
    }
    sum += counts[g];
  }
  if (sum > rows) {
    return wrong("counts sum to " + std::to_string(sum) + ": there are " + std::to_string(rows) +
                 " rows");
  }
  return ffi::Error::Success();
}

bool is_bf16(ffi::DataType type) { return type == ffi::DataType::BF16; }

using Ids = ffi::Buffer<ffi::S32>;  // empty: the rows are in order

// Where the ids are, null if there are none; checked, as they become addresses.
ffi::ErrorOr<const int32_t*> checked(Ids ids, ffi::AnyBuffer rows) {
  const int64_t n = rows.dimensions()[0];
  for (size_t i = 0; i < ids.element_count(); ++i) {
    const int64_t id = ids.typed_data()[i];
    if (id < 0 || id >= n) {
      return ffi::Unexpected(wrong("id " + std::to_string(id) + " at " + std::to_string(i) +
                                   ": there are " + std::to_string(n) + " rows"));
    }
  }
  return ids.element_count() ? ids.typed_data() : nullptr;
}

// The result's memory, holding what the products are added to, if anything.
ffi::Error start_from(ffi::RemainingArgs init, ffi::Result<ffi::AnyBuffer>& out) {
  if (init.size() == 0) return ffi::Error::Success();
  ffi::ErrorOr<ffi::AnyBuffer> from = init.get<ffi::AnyBuffer>(0);
  if (!from) return from.error();
  if (from->untyped_data() != out->untyped_data()) {
    std::memcpy(out->untyped_data(), from->untyped_data(), out->size_bytes());
  }
  return ffi::Error::Success();
}

ffi::Error matmul(ffi::ThreadPool pool, ffi::AnyBuffer rows, ffi::AnyBuffer weights,
                  ffi::Buffer<ffi::S32> counts, Ids row_ids, ffi::RemainingArgs init,
                  ffi::Result<ffi::AnyBuffer> out, bool transpose,
                  std::string_view instructions) {
  const InstructionSet* set = find(std::string(instructions));
  if (!set) return wrong("this processor lacks the instructions");
  const int64_t n = out->dimensions()[0], groups = weights.dimensions()[0];
  const int64_t d = weights.dimensions()[1], f = weights.dimensions()[2];
  if (ffi::Error error = check(counts.typed_data(), groups, n); error.failure()) return error;
  ffi::ErrorOr<const int32_t*> ids = checked(row_ids, rows);
  if (!ids) return ids.error();
  if (ffi::Error error = start_from(init, out); error.failure()) return error;

  Product p = {};
  p.add = init.size() > 0;
  p.n = transpose ? d : f;
  p.k = transpose ? f : d;
  p.a_stride = p.k;
  p.b_stride = f;
  p.c_stride = p.n;
  p.b_by_n = transpose;
  p.bf16 = p.c_bf16 = is_bf16(rows.element_type());
  std::vector<Product> blocks;
  int64_t start = 0;
  for (int64_t g = 0; g < groups; ++g) {
    p.m = counts.typed_data()[g];
    p.a = *ids ? rows.untyped_data() : moved(rows.untyped_data(), start * p.k, p.bf16);
    p.a_ids = *ids ? *ids + start : nullptr;
    p.b = moved(weights.untyped_data(), g * d * f, p.bf16);
    p.c = moved(out->untyped_data(), start * p.n, p.bf16);
    cut(p, *set, blocks);
    start += p.m;
  }
  p.m = n - start;
  p.k = 0;  // rows of nobody
  p.c = moved(out->untyped_data(), start * p.n, p.bf16);
  cut(p, *set, blocks);
  run(std::move(blocks), set->multiply, pool);
  return ffi::Error::Success();
}

ffi::Error outer(ffi::ThreadPool pool, ffi::AnyBuffer left, ffi::AnyBuffer right,
                 ffi::Buffer<ffi::S32> counts, Ids left_ids, Ids right_ids,
                 ffi::RemainingArgs init, ffi::Result<ffi::AnyBuffer> out,
                 std::string_view instructions) {
  const InstructionSet* set = find(std::string(instructions));
  if (!set) return wrong("this processor lacks the instructions");
  const int64_t groups = counts.dimensions()[0];
  const int64_t d = left.dimensions()[1], f = right.dimensions()[1];
  const int64_t n = left_ids.element_count() ? left_ids.element_count() : left.dimensions()[0];
  if (ffi::Error error = check(counts.typed_data(), groups, n); error.failure()) return error;
  ffi::ErrorOr<const int32_t*> of_left = checked(left_ids, left);
  if (!of_left) return of_left.error();
  ffi::ErrorOr<const int32_t*> of_right = checked(right_ids, right);
  if (!of_right) return of_right.error();
  if (ffi::Error error = start_from(init, out); error.failure()) return error;

  Product p = {};
  p.m = d;
  p.n = f;
  p.a_stride = d;
  p.b_stride = p.c_stride = f;
  p.a_by_k = true;
  p.bf16 = is_bf16(left.element_type());
  p.c_bf16 = is_bf16(out->element_type());
  p.add = init.size() > 0;
  std::vector<Product> blocks;
  int64_t start = 0;
  for (int64_t g = 0; g < groups; ++g) {
    p.k = counts.typed_data()[g];
    p.a = *of_left ? left.untyped_data() : moved(left.untyped_data(), start * d, p.bf16);
    p.b = *of_right ? right.untyped_data() : moved(right.untyped_data(), start * f, p.bf16);
    p.a_ids = *of_left ? *of_left + start : nullptr;
    p.b_ids = *of_right ? *of_right + start : nullptr;
    p.c = moved(out->untyped_data(), g * d * f, p.c_bf16);
    cut(p, *set, blocks);
    start += p.k;
  }
  run(std::move(blocks), set->multiply, pool);
  return ffi::Error::Success();
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

// Whether this processor has the named instruction set; with an empty name, any of them.
int olmoe_jax_has(const char* instructions) { return find(instructions) != nullptr; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(olmoe_jax_matmul, matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<Ids>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("transpose")
                                  .Attr<std::string_view>("instructions"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(olmoe_jax_outer, outer,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<Ids>()
                                  .Arg<Ids>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<std::string_view>("instructions"));
}
