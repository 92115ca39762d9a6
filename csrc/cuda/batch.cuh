// Sums over all rows of a batch, for what is solved for the batch as a whole.
//
// Such a kernel works in rounds: decide from the sums of the last pass, then make the next
// pass over the rows. A batch for one block runs all rounds in one launch. A larger one
// takes a launch a round: each block leaves its sums in a slot of its own, and in the next
// launch every block adds up all slots in the same order and comes to the same decision.
#pragma once

#include "rows.cuh"

namespace bmtard {
namespace cuda {

// One multiprocessor is enough for these, and a launch costs more than the others' help.
constexpr int64_t kOneBlockElements = 32 * 1024;
constexpr int64_t kMaxSlots = 512;
constexpr int kBatchThreads = 512;

template <typename Shape>
int64_t batch_blocks(int64_t rows, int64_t classes) {
  if (rows * classes <= kOneBlockElements) return 1;
  const int64_t fits = 2 * static_cast<int64_t>(simt::multiprocessors());
  const int64_t wanted = ceil_divide(rows, Shape::kRows);
  const int64_t most = fits < kMaxSlots ? fits : kMaxSlots;
  return wanted < most ? wanted : (most > 0 ? most : 1);
}

// Adds what the groups of the block have found; every thread gets the total.
template <typename Shape, int n>
BMTARD_DEVICE void block_total(Block<Shape::kThreads>& block, const Group<Shape>& group,
                               double (&sums)[n]) {
  if (group.lane != 0) {
    BMTARD_UNROLL
    for (int i = 0; i < n; ++i) sums[i] = 0;
  }
  block.reduce(sums, Add{});
}

// Adds the slots [blocks][width] from `first` on; every thread gets the total.
template <int threads, int n>
BMTARD_DEVICE void slot_total(Block<threads>& block, const double* slots, int width, int first,
                              double (&sums)[n]) {
  BMTARD_UNROLL
  for (int i = 0; i < n; ++i) sums[i] = 0;
  for (int slot = simt::thread_id(); slot < simt::grid_blocks(); slot += threads) {
    BMTARD_UNROLL
    for (int i = 0; i < n; ++i) {
      sums[i] += simt::load(slots + static_cast<int64_t>(slot) * width + first + i);
    }
  }
  block.reduce(sums, Add{});
}

template <int n>
BMTARD_DEVICE void fill_slot(double* slots, int width, int first, const double (&sums)[n]) {
  BMTARD_UNROLL
  for (int i = 0; i < n; ++i) {
    simt::store(slots + static_cast<int64_t>(simt::block_id()) * width + first + i, sums[i]);
  }
}

// This block's share of: entropy, its variance and third moment, and, if `counting`, the log
// of the number of unmasked classes, at one temperature.
constexpr int kEntropySums = 4;

template <typename Shape>
BMTARD_DEVICE void entropy_pass(const Matrix& logits, int64_t rows, int classes, double temperature,
                                bool counting, bool packed, Block<Shape::kThreads>& block,
                                Group<Shape>& group, double (&sums)[kEntropySums]) {
  using T = typename Shape::Type;
  using R = Real<T>;
  using std::log;
  const R inverse = static_cast<R>(1 / temperature);
  BMTARD_UNROLL
  for (int i = 0; i < kEntropySums; ++i) sums[i] = 0;
  for (int64_t n = group.first_row(); n < rows; n += group.row_step()) {
    const Row<Shape> row(row_of<T>(logits, n), classes, group.lane, packed);
    R max;
    R count[1] = {0};
    const auto found = derivatives_of(softmax_sums<EntropyMoments<R>, Shape>(
        row, classes, inverse, group, max,
        [&](R value) { count[0] += value > -std::numeric_limits<R>::infinity() ? 1 : 0; }));
    sums[0] += found.entropy;
    sums[1] += found.variance;
    sums[2] += found.third_moment;
    if (counting) {
      group.sum(count);
      sums[3] += log(count[0]);
    }
  }
  block_total<Shape>(block, group, sums);
}

// The tolerance in nats, or what rounding leaves of an entropy in R if that is more.
template <typename R>
BMTARD_DEVICE double search_tolerance(double tolerance, double log_count) {
  constexpr double kRounding = 4 * static_cast<double>(std::numeric_limits<R>::epsilon());
  const double floor = kRounding * log_count;
  return tolerance > floor ? tolerance : floor;
}

}  // namespace cuda
}  // namespace bmtard
