#include "temperature_search.h"

BMTARD_NAMESPACE_BEGIN

namespace {

template <typename real>
TemperatureSearch<double> started_search(const BisectTemperatureArgs& args, int64_t row,
                                         LogitRange<double> range) {
  const double target = static_cast<double>(
      static_cast<const real*>(args.target_entropy)[row * args.target_entropy_stride]);
  auto search = new_search<real>(args, args.method, target, range.log_count);
  if (args.initial) {
    const double initial =
        static_cast<double>(static_cast<const real*>(args.initial)[row * args.initial_stride]);
    search.start(initial, initial);
  } else {
    search.start(initial_temperature(range, target, args.low, args.high), 1.0);
  }
  return search;
}

template <typename real>
void write(const BisectTemperatureArgs& args, int64_t row,
           const TemperatureSearch<double>& search) {
  static_cast<real*>(args.temperature)[row] = static_cast<real>(search.temperature);
  static_cast<real*>(args.entropy)[row] = static_cast<real>(search.at.entropy);
  static_cast<real*>(args.slope)[row] = static_cast<real>(search.at.variance);
  args.status[row] = search.status;
  args.iterations[row] = search.iterations;
}

template <typename scalar>
void each_row(const BisectTemperatureArgs& args, int64_t begin, int64_t end) {
  using real = acc_t<scalar>;
  LogOfCount log_of;
  for (int64_t r = begin; r < end; ++r) {
    const scalar* row = row_of<scalar>(args.logits, r);
    const auto look = look_at(row, args.classes, log_of);
    auto search = started_search<real>(args, r, look.range);
    run(search, [&](double temperature) {
      return row_derivatives(row, args.classes, look.max, temperature);
    });
    write<real>(args, r, search);
  }
}

// One search a lane, side by side. A search that has ended waits for the others.
template <typename scalar>
void each_column(const BisectTemperatureArgs& args, int64_t begin, int64_t end) {
  using real = acc_t<scalar>;
  using V = Vec<real>;
  real columns[kMaxColumns * V::size];
  TemperatureSearch<double> searches[V::size];
  LogOfCount log_of;
  for_groups<real>(begin, end, [&](int64_t r, int n) {
    load_columns<scalar>(args.logits, r, n, args.classes, columns);
    const V max = column_max(columns, args.classes);
    LogitSums<V> sums{V(real(0)), V(real(0)), V(real(0))};
    for (int64_t j = 0; j < args.classes; ++j) sums.add(load(columns + j * V::size), max);
    V log_count = real(1), target = real(1);
    for (int i = 0; i < n; ++i) {
      searches[i] = started_search<real>(
          args, r + i, range_of({sums.count.v[i], sums.sum.v[i], sums.squares.v[i]}, log_of));
      log_count.v[i] = static_cast<real>(searches[i].log_count);
      target.v[i] = static_cast<real>(searches[i].target);
    }
    while (true) {
      V temperature = real(1);
      for (int i = 0; i < n; ++i) temperature.v[i] = static_cast<real>(searches[i].temperature);
      const auto found = derivatives_of(
          column_sums<EntropyMoments>(columns, args.classes, max, V(real(1)) / temperature));
      bool all_done = true;
      for (int i = 0; i < n; ++i) {
        if (searches[i].done) continue;
        searches[i].judge({found.entropy.v[i], found.variance.v[i], found.third_moment.v[i]});
        all_done = all_done && searches[i].done;
      }
      if (all_done) break;
      const V factor = halley_factor(found, log_count, target);
      for (int i = 0; i < n; ++i) {
        if (!searches[i].done) searches[i].move(factor.v[i]);
      }
    }
    for (int i = 0; i < n; ++i) write<real>(args, r + i, searches[i]);
  });
}

template <typename scalar>
void batch_mean(const BisectTemperatureArgs& args, ParallelFor parallel_for) {
  using real = acc_t<scalar>;
  double* parts = static_cast<double*>(args.workspace);
  real* max = reinterpret_cast<real*>(parts + 3 * args.rows);
  const auto range =
      mean_range<scalar>(args.logits, args.rows, args.classes, max, parts, parallel_for);
  auto search = started_search<real>(args, 0, range);
  run(search, [&](double temperature) {
    return mean_derivatives<scalar>(args.logits, args.rows, args.classes, max, temperature, parts,
                                    parallel_for);
  });
  write<real>(args, 0, search);
}

}  // namespace

void bisect_temperature(const BisectTemperatureArgs& args, ParallelFor parallel_for) {
  with_type(args.dtype, [&](auto type) {
    using scalar = typename decltype(type)::type;
    if (!args.per_sample) return batch_mean<scalar>(args, parallel_for);
    // A search takes about five passes over its row.
    for_rows(parallel_for, args.rows, 5 * args.classes, [&](int64_t begin, int64_t end) {
      args.classes <= kMaxColumns ? each_column<scalar>(args, begin, end)
                                  : each_row<scalar>(args, begin, end);
    });
  });
}

BMTARD_NAMESPACE_END
