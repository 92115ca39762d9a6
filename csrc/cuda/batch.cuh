// Sums over all rows of a batch.
//
// The kernels here work in rounds: they decide from the sums of the last pass and then make the
// next pass over the rows. One launch runs all rounds. Its blocks form a team. After a pass, each
// block adds up the sums of all blocks in the same order, so all reach the same decision.
//   A small batch has a team of one block, or of one cluster if the device has clusters: there,
//     a barrier of the whole device would cost more than the work.
//   Every other batch has a cooperative grid.
// Each block has the same rows in every round, and keeps them in shared memory if they fit.
#pragma once

#include "rows.cuh"

namespace bmtard {
namespace cuda {

constexpr int64_t kSmallBatch = 32 * 1024;  // elements of a matrix
constexpr int64_t kFewestElements = 1024;   // of a block of a grid
constexpr int64_t kMaxSlots = 512;
constexpr int kBatchThreads = 512;

// How a launch treats a batch.
struct BatchPlan {
  simt::Grid grid;
  int cached_matrices;  // the first so many stay in shared memory
};

template <typename Shape>
BatchPlan one_block() {
  return {{1, Shape::kThreads}, 0};
}

// `span`: see Window. `kept`: the number of matrices that every round reads, and of all that may
// stay.
template <typename Shape, typename Kernel>
BatchPlan plan_batch(Kernel* kernel, int64_t rows, int64_t classes, int64_t span, int first_kept,
                     int all_kept) {
  BatchPlan plan = one_block<Shape>();
  const auto keep = [&](int64_t blocks) {
    for (const int matrices : {all_kept, first_kept}) {
      const size_t bytes = cache_bytes<Shape>(span, matrices * ceil_divide(rows, blocks));
      if (bytes == 0 || !fits_in_shared(bytes)) continue;
      plan.cached_matrices = matrices;
      plan.grid.shared_bytes = bytes;
      return;
    }
  };
  if (rows * classes <= tuned("small_batch", kSmallBatch)) {
    // A second read of the same rows costs less than a cluster's barrier.
    const int64_t wanted = rows <= 2 * Shape::kRows ? 1 : ceil_divide(rows, Shape::kRows);
    while (plan.grid.cluster < wanted && 2 * plan.grid.cluster <= largest_cluster()) {
      plan.grid.cluster *= 2;
    }
    plan.grid.blocks = plan.grid.cluster;
    keep(plan.grid.blocks);
    return plan;
  }
  int64_t blocks = ceil_divide(rows * classes, tuned("block_elements", kFewestElements));
  const int64_t slots = tuned("grid_blocks", kMaxSlots);
  for (const int64_t most : {rows, slots, kMaxSlots}) blocks = most < blocks ? most : blocks;
  const simt::Device device = simt::device();
  const int64_t one_each = device.multiprocessors;
  keep(blocks < one_each ? blocks : one_each);
  const int64_t resident = !device.cooperative ? 0
                           : plan.cached_matrices > 0
                               ? one_each
                               : one_each * simt::blocks_a_multiprocessor(kernel, Shape::kThreads);
  plan.grid.blocks = resident < blocks ? resident : blocks;
  plan.grid.cooperative = plan.grid.blocks > 1;
  return plan.grid.cooperative ? plan : one_block<Shape>();
}

// A device may refuse blocks that run side by side, as MPS or a part of a device does. Then one
// block takes the batch.
template <typename Shape, typename Kernel, typename Args>
int launch_batch(Kernel* kernel, const BatchPlan& plan, void* stream, const Args& args,
                 Packing packing) {
  const auto attempt = [&](const BatchPlan& plan) {
    return simt::launch(kernel, plan.grid, stream, args, packing, plan.cached_matrices);
  };
  const int error = attempt(plan);
  return error != 0 && plan.grid.blocks > 1 ? attempt(one_block<Shape>()) : error;
}

// The rows of a block, and how its groups read them.
template <typename Shape>
class Share {
 public:
  using T = typename Shape::Type;

  BMTARD_DEVICE Share(int64_t rows, int64_t classes, Packing packing, int cached_matrices,
                      const Group<Shape>& group)
      : group_(group),
        classes_(static_cast<int>(classes)),
        packing_(packing),
        cached_matrices_(cached_matrices),
        rows_((rows + simt::grid_blocks() - 1) / simt::grid_blocks()),
        first_(rows_ * simt::block_id()),
        end_(first_ + rows_ < rows ? first_ + rows_ : rows) {}

  // Each row of this group.
  template <typename Visit>
  BMTARD_DEVICE void for_each(Visit visit) const {
    for (int64_t n = first_ + group_.number(); n < end_; n += Shape::kRows) visit(n);
  }

  // The window of row n, which all matrices of the call share.
  BMTARD_DEVICE Window window(const Matrix& data, int64_t n) const {
    return window_of<Shape>(row_of<T>(data, n), classes_, group_.lane, packing_);
  }

  // Row n of the call's matrix number `matrix`; `first_look` until all its rows were read once.
  BMTARD_DEVICE auto row(const Matrix& data, const Window& window, int matrix, int64_t n,
                         bool first_look) const {
    const T* const from = row_of<T>(data, n);
    if constexpr (Shape::kTiles > 0) {
      return Row<Shape>(from, window);
    } else {
      const int64_t place = (matrix * rows_ + n - first_) * cached_values<Shape>(window.span);
      return CachedRow<Shape>(from, window, group_.lane, static_cast<int>(place),
                              matrix >= cached_matrices_ ? Cache::kNone
                              : first_look               ? Cache::kFill
                                                         : Cache::kFilled);
    }
  }

 private:
  const Group<Shape>& group_;
  int classes_;
  Packing packing_;
  int cached_matrices_;
  int64_t rows_, first_, end_;
};

// What a pass finds for a teacher: kSums sums over the rows.
constexpr int kSums = 4;

// Shared memory of a Team for `sets` sets of sums.
struct TeamMemory {
  simt::Shared<double> totals;  // [sets][kSums]
  simt::Shared<double> mine;    // [2][sets][kSums], of this block by the parity of the round
  double* slots;                // [2][kMaxSlots][sets][kSums], global: those of a grid
};

inline int64_t slot_values(int64_t sets) { return 2 * kMaxSlots * sets * kSums; }

// Adds up what the blocks of the launch have found in a round.
template <int threads>
class Team {
 public:
  BMTARD_DEVICE Team(Block<threads>& block, const TeamMemory& memory, int sets)
      : block_(block), memory_(memory), sets_(sets) {}

  // Takes the sums that this block's groups found for a set.
  template <typename Shape>
  BMTARD_DEVICE void give(const Group<Shape>& group, int set, double (&sums)[kSums]) {
    if (group.lane != 0) {
      BMTARD_UNROLL
      for (int i = 0; i < kSums; ++i) sums[i] = 0;
    }
    block_.reduce(sums, Add{});
    if (simt::thread_id() != 0) return;
    BMTARD_UNROLL
    for (int i = 0; i < kSums; ++i) {
      if (simt::grid_blocks() == 1) {
        memory_.totals.set(set * kSums + i, sums[i]);
      } else if (in_cluster()) {
        memory_.mine.set((turn_ * sets_ + set) * kSums + i, sums[i]);
      } else {
        simt::store(slot(simt::block_id(), set) + i, sums[i]);
      }
    }
  }

  // Ends the round, for the sets that were given. A barrier: every thread may ask for totals.
  template <typename Given>
  BMTARD_DEVICE void combine(Given given) {
    if (simt::grid_blocks() > 1) {
      if (in_cluster()) {
        simt::cluster_barrier();
        add_up_cluster(given);
      } else {
        simt::grid_barrier();
        add_up_slots(given);
      }
      turn_ ^= 1;
    }
    simt::block_barrier();
  }

  BMTARD_DEVICE double total(int set, int i) const { return memory_.totals.get(set * kSums + i); }

  // Call it after the last round. It waits for the blocks that still read from this one.
  BMTARD_DEVICE void leave() const {
    if (in_cluster()) simt::cluster_barrier();
  }

 private:
  BMTARD_DEVICE static bool in_cluster() { return simt::cluster_blocks() > 1; }

  BMTARD_DEVICE double* slot(int block, int set) const {
    return memory_.slots + ((turn_ * kMaxSlots + block) * sets_ + set) * kSums;
  }

  template <typename Given>
  BMTARD_DEVICE void add_up_cluster(Given given) {
    const int thread = simt::thread_id();
    if (thread >= sets_ * kSums || !given(thread / kSums)) return;
    double total = 0;
    for (int rank = 0; rank < simt::cluster_blocks(); ++rank) {
      total += memory_.mine.get_from(rank, turn_ * sets_ * kSums + thread);
    }
    memory_.totals.set(thread, total);
  }

  template <typename Given>
  BMTARD_DEVICE void add_up_slots(Given given) {
    BMTARD_ROLLED
    for (int set = 0; set < sets_; ++set) {
      if (!given(set)) continue;
      double sums[kSums] = {0, 0, 0, 0};
      for (int from = simt::thread_id(); from < simt::grid_blocks(); from += threads) {
        BMTARD_UNROLL
        for (int i = 0; i < kSums; ++i) sums[i] += simt::load(slot(from, set) + i);
      }
      block_.reduce(sums, Add{});
      if (simt::thread_id() != 0) continue;
      BMTARD_UNROLL
      for (int i = 0; i < kSums; ++i) memory_.totals.set(set * kSums + i, sums[i]);
    }
  }

  Block<threads>& block_;
  TeamMemory memory_;
  int sets_;
  int turn_ = 0;
};

// This block's share of: entropy, its variance and third moment, and the log of the number of
// unmasked classes, at one temperature.
template <typename Shape>
BMTARD_DEVICE void entropy_pass(const Matrix& logits, int matrix, bool first_look,
                                double temperature, const Share<Shape>& share, Group<Shape>& group,
                                double (&sums)[kSums]) {
  using R = Real<typename Shape::Type>;
  using std::log;
  const R inverse = static_cast<R>(1 / temperature);
  BMTARD_UNROLL
  for (int i = 0; i < kSums; ++i) sums[i] = 0;
  share.for_each([&](int64_t n) {
    const Window window = share.window(logits, n);
    const auto row = share.row(logits, window, matrix, n, first_look);
    R max;
    R count[1] = {0};
    const auto found = derivatives_of(softmax_sums<EntropyMoments<R>, Shape, kFarAhead>(
        row, window, inverse, group, max,
        [&](R value) { count[0] += value > -std::numeric_limits<R>::infinity() ? 1 : 0; }));
    sums[0] += found.entropy;
    sums[1] += found.variance;
    sums[2] += found.third_moment;
    // Later passes know the number.
    if (first_look) {
      group.sum(count);
      sums[3] += log(count[0]);
    }
  });
}

// The tolerance in nats, or the rounding error of an entropy in R if that is larger.
template <typename R>
BMTARD_DEVICE double search_tolerance(double tolerance, double log_count) {
  constexpr double kRounding = 4 * static_cast<double>(std::numeric_limits<R>::epsilon());
  const double floor = kRounding * log_count;
  return tolerance > floor ? tolerance : floor;
}

}  // namespace cuda
}  // namespace bmtard
