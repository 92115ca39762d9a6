// The temperature at which the entropy of a row, or the mean over rows, has a given value.
#include "../core/temperature_search.h"
#include "batch.cuh"

namespace bmtard {
namespace cuda {
namespace {

constexpr int kThreads = 256;

// One group a row, which stays in registers or shared memory during the search if it fits.
template <typename Shape>
BMTARD_KERNEL(Shape::kThreads)
bisect_rows_kernel(const BMTARD_GRID_CONSTANT BisectTemperatureArgs args, bool packed,
                   bool cached) {
  using T = typename Shape::Type;
  using R = Real<T>;
  Block<Shape::kThreads> block;
  Group<Shape> group(block);
  const int64_t n = group.first_row();
  if (n >= args.rows) return;
  const int classes = static_cast<int>(args.classes);
  const T* data = row_of<T>(args.logits, n);
  const auto row = [&] {
    if constexpr (Shape::kTiles > 0) {
      return Row<Shape>(data, classes, group.lane, packed);
    } else {
      return CachedRow<Shape>(data, classes, group.lane, packed, simt::dynamic_shared<T>(), 0,
                              cached);
    }
  }();
  const R max = row_max<Shape>(row, classes, group);
  const LogitRange<R> range = logit_range<Shape>(row, classes, max, group);

  TemperatureSearch<R> search;
  search.target = at<R>(args.target_entropy, n * args.target_entropy_stride);
  search.tolerance = static_cast<R>(args.tolerance);
  search.log_count = range.log_count;
  search.low = static_cast<R>(args.low);
  search.high = static_cast<R>(args.high);
  search.max_iterations = args.max_iterations;
  search.method = args.method;
  if (args.initial) {
    const R initial = at<R>(args.initial, n * args.initial_stride);
    search.start(initial, initial);
  } else {
    search.start(initial_temperature(range, search.target, search.low, search.high), 1);
  }
  while (!search.done) {
    search.update(derivatives_of(
        sums_below<EntropyMoments<R>, Shape>(row, classes, max, 1 / search.temperature, group)));
  }
  if (group.lane == 0) {
    put<R>(args.temperature, n, search.temperature);
    put<R>(args.entropy, n, search.at.entropy);
    put<R>(args.slope, n, search.at.variance);
    put<int32_t>(args.status, n, search.status);
    put<int32_t>(args.iterations, n, search.iterations);
  }
}

enum Phase : int32_t { kStart, kRange, kSearch, kDone };

struct Progress {
  int32_t phase;
  TemperatureSearch<double> search;
};

struct Workspace {
  Progress* progress;  // [2], by the parity of the round
  double* slots;       // [2][kMaxSlots][kEntropySums]
};

BMTARD_DEVICE Workspace workspace_of(void* memory) {
  auto* progress = static_cast<Progress*>(memory);
  return {progress, reinterpret_cast<double*>(progress + 2)};
}

// This block's share of the log of the number of unmasked classes and of the variance of
// the logits.
template <typename Shape>
BMTARD_DEVICE void range_pass(const BisectTemperatureArgs& args, bool packed,
                              Block<Shape::kThreads>& block, Group<Shape>& group,
                              double (&sums)[kEntropySums]) {
  using T = typename Shape::Type;
  using R = Real<T>;
  const int classes = static_cast<int>(args.classes);
  BMTARD_UNROLL
  for (int i = 0; i < kEntropySums; ++i) sums[i] = 0;
  for (int64_t n = group.first_row(); n < args.rows; n += group.row_step()) {
    const Row<Shape> row(row_of<T>(args.logits, n), classes, group.lane, packed);
    const R max = row_max<Shape>(row, classes, group);
    const LogitRange<R> range = logit_range<Shape>(row, classes, max, group);
    sums[0] += range.log_count;
    sums[1] += range.variance;
  }
  block_total<Shape>(block, group, sums);
}

template <typename R>
BMTARD_DEVICE void decide(const BisectTemperatureArgs& args, Progress& progress,
                          const double (&sums)[kEntropySums]) {
  TemperatureSearch<double>& search = progress.search;
  const double rows = static_cast<double>(args.rows);
  if (progress.phase == kStart) {
    progress.phase = kRange;
  } else if (progress.phase == kRange) {
    const LogitRange<double> range = {sums[0] / rows, sums[1] / rows};
    search.target = at<R>(args.target_entropy, 0);
    search.log_count = range.log_count;
    search.tolerance = search_tolerance<R>(args.tolerance, range.log_count);
    search.low = args.low;
    search.high = args.high;
    search.max_iterations = args.max_iterations;
    search.method = args.method;
    const double keep = args.initial ? at<R>(args.initial, 0) : 1;
    search.start(
        args.initial ? keep : initial_temperature(range, search.target, args.low, args.high), keep);
    progress.phase = kSearch;
  } else {
    search.update({sums[0] / rows, sums[1] / rows, sums[2] / rows});
  }
  if (progress.phase == kSearch && search.done) progress.phase = kDone;
}

// Rounds over the batch, see batch.cuh.
template <typename Shape>
BMTARD_KERNEL(Shape::kThreads)
bisect_batch_kernel(const BMTARD_GRID_CONSTANT BisectTemperatureArgs args, bool packed, int round) {
  using R = Real<typename Shape::Type>;
  BMTARD_SHARED(Progress, progress, 1);
  BMTARD_SHARED(double, temperature, 1);
  BMTARD_SHARED(int32_t, phase, 1);
  const Workspace workspace = workspace_of(args.workspace);
  const Progress* before = workspace.progress + (round + 1) % 2;
  Progress* after = workspace.progress + round % 2;
  double* slots_before = workspace.slots + (round + 1) % 2 * kMaxSlots * kEntropySums;
  double* slots_after = workspace.slots + round % 2 * kMaxSlots * kEntropySums;
  const bool decides = simt::thread_id() == 0;
  const bool writes = decides && simt::block_id() == 0;

  Block<Shape::kThreads> block;
  Group<Shape> group(block);
  double sums[kEntropySums];
  if (round == 0) {
    if (decides) progress.own(0).phase = kStart;
  } else {
    if (simt::load(&before->phase) == kDone) {
      if (writes) simt::store(&after->phase, static_cast<int32_t>(kDone));
      return;
    }
    slot_total(block, slots_before, kEntropySums, 0, sums);
    if (decides) progress.set(0, *before);
  }
  for (;;) {
    if (decides) {
      Progress& now = progress.own(0);
      decide<R>(args, now, sums);
      phase.set(0, now.phase);
      temperature.set(0, now.search.temperature);
    }
    simt::block_barrier();
    const int32_t pass = phase.get(0);
    if (pass == kDone) break;
    if (pass == kRange) {
      range_pass<Shape>(args, packed, block, group, sums);
    } else {
      entropy_pass<Shape>(args.logits, args.rows, static_cast<int>(args.classes),
                          temperature.get(0), false, packed, block, group, sums);
    }
    if (simt::grid_blocks() > 1) {
      if (decides) fill_slot(slots_after, kEntropySums, 0, sums);
      if (writes) *after = progress.get(0);
      return;
    }
  }
  if (writes) {
    const Progress& now = progress.own(0);
    put<R>(args.temperature, 0, static_cast<R>(now.search.temperature));
    put<R>(args.entropy, 0, static_cast<R>(now.search.at.entropy));
    put<R>(args.slope, 0, static_cast<R>(now.search.at.variance));
    put<int32_t>(args.status, 0, now.search.status);
    put<int32_t>(args.iterations, 0, now.search.iterations);
    simt::store(&after->phase, static_cast<int32_t>(kDone));
  }
}

int bisect_rows(const BisectTemperatureArgs& args, void* stream) {
  if (args.rows == 0) return 0;
  return with_shape<kThreads>(args.dtype, args.classes, [&](auto shape) {
    using Shape = decltype(shape);
    const size_t cache = cache_bytes<Shape>(args.classes, 1);
    return simt::launch(bisect_rows_kernel<Shape>,
                        {ceil_divide(args.rows, Shape::kRows), Shape::kThreads, cache}, stream,
                        args, packable(args.dtype, args.logits), cache > 0);
  });
}

int bisect_batch(const BisectTemperatureArgs& args, void* stream) {
  return with_shape<kBatchThreads, false>(args.dtype, args.classes, [&](auto shape) {
    using Shape = decltype(shape);
    const int64_t blocks = batch_blocks<Shape>(args.rows, args.classes);
    // The range, the search, and a last round to write what the last pass decided.
    const int rounds = blocks == 1 ? 1 : args.max_iterations + 2;
    int error = 0;
    for (int round = 0; round < rounds && error == 0; ++round) {
      error = simt::launch(bisect_batch_kernel<Shape>, {blocks, Shape::kThreads}, stream, args,
                           packable(args.dtype, args.logits), round);
    }
    return error;
  });
}

}  // namespace

int bisect_temperature(const BisectTemperatureArgs& args, void* stream) {
  return args.per_sample ? bisect_rows(args, stream) : bisect_batch(args, stream);
}

size_t bisect_temperature_workspace(const BisectTemperatureArgs& args) {
  if (args.per_sample) return 0;
  return 2 * sizeof(Progress) + 2 * kMaxSlots * kEntropySums * sizeof(double);
}

}  // namespace cuda
}  // namespace bmtard
