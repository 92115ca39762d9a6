// Entropy derivatives of rows, and the search for the temperature of a mean entropy.
#pragma once

#include "../core/temperature_search.h"
#include "rows.h"

BMTARD_NAMESPACE_BEGIN

// Sums over the logits that are not masked by -inf, of their distance from the maximum.
template <typename T>
struct LogitSums {
  T count, sum, squares;
  BMTARD_HD void add(T z, T max) {
    using real = typename T::scalar;
    const auto masked = z == T(kNegativeInfinity<real>);
    const T d = select(masked, T(real(0)), z - max);
    count = count + select(masked, T(real(0)), T(real(1)));
    sum = sum + d;
    squares = squares + d * d;
  }
};

// The logarithm of a count that seldom differs from the one before.
class LogOfCount {
 public:
  double operator()(double count) {
    if (count != count_) log_ = ::log(count_ = count);
    return log_;
  }

 private:
  double count_ = 1, log_ = 0;
};

inline LogitRange<double> range_of(LogitSums<double> sums, LogOfCount& log_of) {
  const double mean = sums.sum / sums.count;
  return {log_of(sums.count), sums.squares / sums.count - mean * mean};
}

// What the first pass over a row finds.
template <typename real>
struct RowLook {
  real max;
  LogitRange<double> range;
};

template <typename scalar>
inline RowLook<acc_t<scalar>> look_at(const scalar* row, int64_t count, LogOfCount& log_of) {
  using real = acc_t<scalar>;
  using V = Vec<real>;
  const real max = row_max(row, count);
  LogitSums<double> total{0, 0, 0};
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t length = count - start < kBlock ? count - start : kBlock;
    LogitSums<V> sums{V(real(0)), V(real(0)), V(real(0))};
    for_row(row + start, length, kNegativeInfinity<real>,
            [&](V z, int64_t) { sums.add(z, V(max)); });
    total.count += static_cast<double>(reduce_add(sums.count));
    total.sum += static_cast<double>(reduce_add(sums.sum));
    total.squares += static_cast<double>(reduce_add(sums.squares));
  }
  return {max, range_of(total, log_of)};
}

template <typename scalar>
inline EntropyDerivatives<double> row_derivatives(const scalar* row, int64_t count,
                                                  acc_t<scalar> max, double temperature) {
  const acc_t<scalar> scale = static_cast<acc_t<scalar>>(1.0 / temperature);
  return derivatives_of(row_sums<EntropyMoments>(row, count, max, scale));
}

// The mean over rows. Each row's part goes through `parts` ([3, N] doubles) and is added in row
// order, so that the sum does not depend on the number of threads.
template <typename scalar>
inline EntropyDerivatives<double> mean_derivatives(const Matrix& logits, int64_t rows,
                                                   int64_t classes, const acc_t<scalar>* max,
                                                   double temperature, double* parts,
                                                   ParallelFor parallel_for) {
  using real = acc_t<scalar>;
  using V = Vec<real>;
  const auto write = [&](int64_t r, double entropy, double variance, double third_moment) {
    parts[3 * r] = entropy;
    parts[3 * r + 1] = variance;
    parts[3 * r + 2] = third_moment;
  };
  for_rows(parallel_for, rows, classes, [&](int64_t begin, int64_t end) {
    if (classes <= kMaxColumns) {
      real columns[kMaxColumns * V::size];
      const V scale = static_cast<real>(1.0 / temperature);
      for_groups<real>(begin, end, [&](int64_t r, int n) {
        load_columns<scalar>(logits, r, n, classes, columns);
        const auto d = derivatives_of(
            column_sums<EntropyMoments>(columns, classes, column_max(columns, classes), scale));
        for (int i = 0; i < n; ++i) {
          write(r + i, d.entropy.v[i], d.variance.v[i], d.third_moment.v[i]);
        }
      });
      return;
    }
    for (int64_t r = begin; r < end; ++r) {
      const auto d = row_derivatives(row_of<scalar>(logits, r), classes, max[r], temperature);
      write(r, d.entropy, d.variance, d.third_moment);
    }
  });
  EntropyDerivatives<double> mean{};
  for (int64_t r = 0; r < rows; ++r) {
    mean.entropy += parts[3 * r];
    mean.variance += parts[3 * r + 1];
    mean.third_moment += parts[3 * r + 2];
  }
  const double n = static_cast<double>(rows);
  return {mean.entropy / n, mean.variance / n, mean.third_moment / n};
}

// The first pass over every row: writes their maxima to `max` [N], returns the mean of their
// ranges. `parts` as in mean_derivatives().
template <typename scalar>
inline LogitRange<double> mean_range(const Matrix& logits, int64_t rows, int64_t classes,
                                     acc_t<scalar>* max, double* parts, ParallelFor parallel_for) {
  for_rows(parallel_for, rows, classes, [&](int64_t begin, int64_t end) {
    LogOfCount log_of;
    for (int64_t r = begin; r < end; ++r) {
      const auto look = look_at(row_of<scalar>(logits, r), classes, log_of);
      max[r] = look.max;
      parts[3 * r] = look.range.log_count;
      parts[3 * r + 1] = look.range.variance;
    }
  });
  LogitRange<double> mean{0, 0};
  for (int64_t r = 0; r < rows; ++r) {
    mean.log_count += parts[3 * r] / static_cast<double>(rows);
    mean.variance += parts[3 * r + 1] / static_cast<double>(rows);
  }
  return mean;
}

// A search over logits whose statistics are `real`, with the settings that BisectTemperatureArgs
// and BMTARDLossArgs share. Call start() next.
template <typename real, typename Args>
inline TemperatureSearch<double> new_search(const Args& args, SearchMethod method, double target,
                                            double log_count) {
  TemperatureSearch<double> search{};
  search.target = target;
  search.log_count = log_count;
  // The rounding error of an entropy in `real`: 4 ulp of log C.
  const double rounding = 4.0 * std::numeric_limits<real>::epsilon() * log_count;
  search.tolerance = args.tolerance > rounding ? args.tolerance : rounding;
  search.low = args.low;
  search.high = args.high;
  search.max_iterations = args.max_iterations;
  search.method = method;
  return search;
}

// Runs a search to its end; evaluate(temperature) gives the entropy's derivatives there.
template <typename F>
inline void run(TemperatureSearch<double>& search, F evaluate) {
  while (!search.done) search.update(evaluate(search.temperature));
}

BMTARD_NAMESPACE_END
