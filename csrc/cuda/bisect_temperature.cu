// The temperature at which the entropy of a row, or the mean over rows, has a given value.
#include "../core/temperature_search.h"
#include "batch.cuh"

namespace bmtard {
namespace cuda {
namespace {

constexpr int kThreads = 256;

// One group a row. The row stays in registers or shared memory during the search if it fits. All
// threads of the group compute the same search.
template <typename Shape>
BMTARD_KERNEL(Shape::kThreads)
bisect_rows_kernel(const BMTARD_GRID_CONSTANT BisectTemperatureArgs args, Packing packing,
                   bool cached) {
  using T = typename Shape::Type;
  using R = Real<T>;
  Block<Shape::kThreads> block;
  Group<Shape> group(block);
  const int64_t n = group.number(group.block_id());
  if (n >= args.rows) return;
  const T* data = row_of<T>(args.logits, n);
  const Window window = window_of<Shape>(data, static_cast<int>(args.classes), group.lane, packing);
  const auto row = [&] {
    if constexpr (Shape::kTiles > 0) {
      return Row<Shape>(data, window);
    } else {
      return CachedRow<Shape>(data, window, group.lane, 0, cached ? Cache::kFill : Cache::kNone);
    }
  }();
  R max;
  const LogitRange<R> range = logit_range<Shape>(row, window, group, max);

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
        sums_below<EntropyMoments<R>, Shape>(row, window, max, 1 / search.temperature, group)));
  }
  if (group.leads()) {
    put<R>(args.temperature, n, search.temperature);
    put<R>(args.entropy, n, search.at.entropy);
    put<R>(args.slope, n, search.at.variance);
    put<int32_t>(args.status, n, search.status);
    put<int32_t>(args.iterations, n, search.iterations);
  }
  group.leave();
}

enum Phase : int32_t { kRange, kFirst, kSearch, kDone };

// This block's share of the log of the number of unmasked classes and of the variance of
// the logits.
template <typename Shape>
BMTARD_DEVICE void range_pass(const BisectTemperatureArgs& args, const Share<Shape>& share,
                              Group<Shape>& group, double (&sums)[kSums]) {
  BMTARD_UNROLL
  for (int i = 0; i < kSums; ++i) sums[i] = 0;
  share.for_each([&](int64_t n) {
    Real<typename Shape::Type> max;
    const Window window = share.window(args.logits, n);
    const auto range = logit_range<Shape, kFarAhead>(share.row(args.logits, window, 0, n, true),
                                                     window, group, max);
    sums[0] += range.log_count;
    sums[1] += range.variance;
  });
}

// Continues the search with the totals of a pass. Returns the phase of the next one.
template <typename R>
BMTARD_DEVICE int32_t decide(const BisectTemperatureArgs& args, int32_t phase,
                             TemperatureSearch<double>& search, const double (&sums)[kSums]) {
  const double rows = static_cast<double>(args.rows);
  if (phase == kRange) {
    const LogitRange<double> range = {sums[0] / rows, sums[1] / rows};
    search.log_count = range.log_count;
    search.tolerance = search_tolerance<R>(args.tolerance, range.log_count);
    search.start(initial_temperature(range, search.target, args.low, args.high), 1);
    return kSearch;
  }
  if (phase == kFirst) {
    search.log_count = sums[3] / rows;
    search.tolerance = search_tolerance<R>(args.tolerance, search.log_count);
  }
  search.update({sums[0] / rows, sums[1] / rows, sums[2] / rows});
  return search.done ? kDone : kSearch;
}

// Rounds over the batch, see batch.cuh: a pass for the range of the logits if there is no initial
// temperature, then the search.
template <typename Shape>
BMTARD_KERNEL(Shape::kThreads)
bisect_batch_kernel(const BMTARD_GRID_CONSTANT BisectTemperatureArgs args, Packing packing,
                    int cached_matrices) {
  using R = Real<typename Shape::Type>;
  BMTARD_SHARED(TemperatureSearch<double>, searches, 1);
  BMTARD_SHARED(double, temperature, 1);
  BMTARD_SHARED(int32_t, next, 1);
  BMTARD_SHARED(double, totals, kSums);
  BMTARD_SHARED(double, mine, 2 * kSums);
  const bool decides = simt::thread_id() == 0;
  Block<Shape::kThreads> block;
  Group<Shape> group(block);
  const Share<Shape> share(args.rows, args.classes, packing, cached_matrices, group);
  Team<Shape::kThreads> team(block, {totals, mine, static_cast<double*>(args.workspace)}, 1);

  const int32_t first = args.initial ? kFirst : kRange;
  if (decides) {
    TemperatureSearch<double>& search = searches.own(0);
    search.target = at<R>(args.target_entropy, 0);
    search.low = args.low;
    search.high = args.high;
    search.max_iterations = args.max_iterations;
    search.method = args.method;
    if (args.initial) {
      // The first pass finds both.
      search.log_count = search.tolerance = 0;
      const double initial = at<R>(args.initial, 0);
      search.start(initial, initial);
      temperature.set(0, search.temperature);
    }
  }
  simt::block_barrier();
  for (int32_t phase = first; phase != kDone; phase = next.get(0)) {
    double sums[kSums];
    if (phase == kRange) {
      range_pass(args, share, group, sums);
    } else {
      entropy_pass(args.logits, 0, phase == kFirst, temperature.get(0), share, group, sums);
    }
    team.give(group, 0, sums);
    team.combine([](int) { return true; });
    if (decides) {
      BMTARD_UNROLL
      for (int i = 0; i < kSums; ++i) sums[i] = team.total(0, i);
      TemperatureSearch<double>& search = searches.own(0);
      next.set(0, decide<R>(args, phase, search, sums));
      temperature.set(0, search.temperature);
    }
    simt::block_barrier();
  }
  if (decides && simt::block_id() == 0) {
    const TemperatureSearch<double>& search = searches.own(0);
    put<R>(args.temperature, 0, static_cast<R>(search.temperature));
    put<R>(args.entropy, 0, static_cast<R>(search.at.entropy));
    put<R>(args.slope, 0, static_cast<R>(search.at.variance));
    put<int32_t>(args.status, 0, search.status);
    put<int32_t>(args.iterations, 0, search.iterations);
  }
  team.leave();
}

int bisect_rows(const BisectTemperatureArgs& args, void* stream) {
  if (args.rows == 0) return 0;
  Alignment alignment(args.dtype);
  alignment.add(args.logits);
  return with_shape<kThreads>(args.dtype, args.classes, [&](auto shape) {
    using Shape = decltype(shape);
    const int64_t blocks = ceil_divide(args.rows, Shape::kRows);
    const Packing packing = alignment.packing<Shape>(args.classes);
    const int64_t span = args.classes + packing.slack;
    return launch_rows<Shape>(blocks, span, 1, [&](const simt::Grid& grid, bool cached) {
      return simt::launch(bisect_rows_kernel<Shape>, grid, stream, args, packing, cached);
    });
  });
}

int bisect_batch(const BisectTemperatureArgs& args, void* stream) {
  Alignment alignment(args.dtype);
  alignment.add(args.logits);
  return with_shape<kBatchThreads, false, false>(args.dtype, args.classes, [&](auto shape) {
    using Shape = decltype(shape);
    const auto kernel = bisect_batch_kernel<Shape>;
    const Packing packing = alignment.packing<Shape>(args.classes);
    const int64_t span = args.classes + packing.slack;
    const BatchPlan plan = plan_batch<Shape>(kernel, args.rows, args.classes, span, 1, 1);
    return launch_batch<Shape>(kernel, plan, stream, args, packing);
  });
}

}  // namespace

int bisect_temperature(const BisectTemperatureArgs& args, void* stream) {
  return args.per_sample ? bisect_rows(args, stream) : bisect_batch(args, stream);
}

size_t bisect_temperature_workspace(const BisectTemperatureArgs& args) {
  return args.per_sample ? 0 : static_cast<size_t>(slot_values(1)) * sizeof(double);
}

}  // namespace cuda
}  // namespace bmtard
