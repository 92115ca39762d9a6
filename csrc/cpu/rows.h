// What the row loops share: element types, threads, and the passes over one row.
#pragma once

#include "../kernels.h"
#include "vec.h"

BMTARD_NAMESPACE_BEGIN

using cpu::ParallelFor;

// Defined once per instruction set, one file an op; dispatch.cpp chooses among the tables.
void softmax_entropy(const SoftmaxEntropyArgs& args, ParallelFor parallel_for);
void softmax_entropy_backward(const SoftmaxEntropyBackwardArgs& args, ParallelFor parallel_for);
void bisect_temperature(const BisectTemperatureArgs& args, ParallelFor parallel_for);
void multi_teacher_kl(const MultiTeacherKLArgs& args, ParallelFor parallel_for);
void multi_teacher_kl_backward(const MultiTeacherKLBackwardArgs& args, ParallelFor parallel_for);
void bmtard_loss(const BMTARDLossArgs& args, ParallelFor parallel_for);
void pgd_step(const PgdStepArgs& args, ParallelFor parallel_for);
void scale(const ScaleArgs& args, ParallelFor parallel_for);

template <typename scalar>
struct Type {
  using type = scalar;
};

// Calls f(Type<scalar>) for the element type.
template <typename F>
BMTARD_HD void with_type(DataType dtype, F f) {
  switch (dtype) {
    case DataType::kFloat64:
      return f(Type<double>{});
    case DataType::kFloat32:
      return f(Type<float>{});
    case DataType::kBFloat16:
      return f(Type<BFloat16>{});
    case DataType::kFloat16:
      return f(Type<Float16>{});
  }
}

// f(begin, end) over the rows, on several threads when there is work for them: 16k elements
// take about as long as waking a thread.
template <typename F>
BMTARD_HD void for_rows(ParallelFor parallel_for, int64_t rows, int64_t elements_per_row, F f) {
  const int64_t grain = elements_per_row > 16384 ? 1 : 16384 / (elements_per_row + 1) + 1;
  if (rows <= 0) return;
  if (rows <= grain) return f(int64_t{0}, rows);
  parallel_for(
      0, rows, grain,
      [](int64_t begin, int64_t end, void* context) { (*static_cast<F*>(context))(begin, end); },
      &f);
}

template <typename scalar>
BMTARD_HD const scalar* row_of(const Matrix& matrix, int64_t row) {
  return static_cast<const scalar*>(matrix.data) + row * matrix.row_stride;
}

// The vector at index j of a row of `count` elements; lanes past its end hold `fill`.
template <typename scalar>
BMTARD_HD Vec<acc_t<scalar>> load_at(const scalar* row, int64_t j, int64_t count,
                                     acc_t<scalar> fill) {
  return j + Vec<acc_t<scalar>>::size <= count
             ? load(row + j)
             : load_partial(row + j, static_cast<int>(count - j), fill);
}

// f(vector, index of its first element) over a row. One call of f only: it is inlined, and what
// it accumulates stays in registers.
template <typename scalar, typename F>
BMTARD_HD void for_row(const scalar* row, int64_t count, acc_t<scalar> fill, F f) {
  for (int64_t j = 0; j < count; j += Vec<acc_t<scalar>>::size) {
    f(load_at(row, j, count, fill), j);
  }
}

// Writes one vector of a row of `count` elements at index j.
template <typename scalar>
BMTARD_HD void store_at(scalar* row, int64_t j, int64_t count, Vec<acc_t<scalar>> x) {
  constexpr int size = Vec<acc_t<scalar>>::size;
  if (j + size <= count) {
    store(row + j, x);
  } else {
    store_partial(row + j, static_cast<int>(count - j), x);
  }
}

// Elements a pass sums in vector lanes before it adds them up in double: keeps float sums of
// long rows as exact as those of short ones.
constexpr int64_t kBlock = 2048;

template <typename real>
constexpr real kNegativeInfinity = -std::numeric_limits<real>::infinity();

// The largest logit; NaN logits are passed over, to show in the sums that follow. A row that is
// all -inf gives 0, so that logits minus maximum stays -inf instead of NaN.
template <typename scalar>
BMTARD_HD acc_t<scalar> row_max(const scalar* row, int64_t count) {
  using real = acc_t<scalar>;
  using V = Vec<real>;
  constexpr int size = V::size;
  V largest = kNegativeInfinity<real>;
  V second = largest;
  int64_t j = 0;
  for (; j + 2 * size <= count; j += 2 * size) {
    const V x = load(row + j), y = load(row + j + size);
    largest = larger(x, largest);
    second = larger(y, second);
  }
  for_row(row + j, count - j, kNegativeInfinity<real>,
          [&](V x, int64_t) { largest = larger(x, largest); });
  const real max = reduce_max(larger(second, largest));
  return max > kNegativeInfinity<real> ? max : real(0);
}

// The sums of a row over u = (z - max) * scale. Sums is one of core's, such as EntropySums;
// `fields` of its values are added up.
template <template <typename> class Sums, typename scalar>
BMTARD_HD Sums<double> row_sums(const scalar* row, int64_t count, acc_t<scalar> max,
                                acc_t<scalar> scale) {
  using real = acc_t<scalar>;
  using V = Vec<real>;
  constexpr int fields = sizeof(Sums<double>) / sizeof(double);
  Sums<double> total{};
  double* into = reinterpret_cast<double*>(&total);
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t length = count - start < kBlock ? count - start : kBlock;
    Sums<V> sums;
    V* values = reinterpret_cast<V*>(&sums);
    for (int i = 0; i < fields; ++i) values[i] = V(real(0));
    for_row(row + start, length, kNegativeInfinity<real>,
            [&](V z, int64_t) { accumulate(sums, (z - V(max)) * V(scale)); });
    for (int i = 0; i < fields; ++i) into[i] += static_cast<double>(reduce_add(values[i]));
  }
  return total;
}

// --- Few classes: as many rows at once as a vector has lanes ----------------------------------

// Up to here the columns of `size` rows stay in L1 and save every horizontal sum.
constexpr int64_t kMaxColumns = 128;

// Columns of n <= Vec::size rows: value j of row i at [j * size + i]. Missing rows are 0.
template <typename scalar>
BMTARD_HD void load_columns(const Matrix& matrix, int64_t row, int n, int64_t classes,
                            acc_t<scalar>* columns) {
  using V = Vec<acc_t<scalar>>;
  constexpr int size = V::size;
  const scalar* first = row_of<scalar>(matrix, row);
  for (int64_t j = 0; j < classes; j += size) {
    V block[size];
    BMTARD_UNROLL
    for (int i = 0; i < size; ++i) {
      block[i] = i < n ? load_at(first + i * matrix.row_stride, j, classes, acc_t<scalar>(0))
                       : V(acc_t<scalar>(0));
    }
    transpose(block);
    BMTARD_UNROLL
    for (int i = 0; i < size; ++i) {
      if (j + i < classes) store(columns + (j + i) * size, block[i]);
    }
  }
}

// The way back, into n contiguous rows.
template <typename scalar>
BMTARD_HD void store_columns(scalar* rows, int n, int64_t classes, const acc_t<scalar>* columns) {
  using V = Vec<acc_t<scalar>>;
  constexpr int size = V::size;
  for (int64_t j = 0; j < classes; j += size) {
    V block[size];
    BMTARD_UNROLL
    for (int i = 0; i < size; ++i) {
      block[i] = j + i < classes ? load(columns + (j + i) * size) : V(acc_t<scalar>(0));
    }
    transpose(block);
    BMTARD_UNROLL
    for (int i = 0; i < size; ++i) {
      if (i < n) store_at(rows + i * classes, j, classes, block[i]);
    }
  }
}

// The first n lanes.
template <typename real>
BMTARD_HD void store_lanes(real* out, int n, Vec<real> x) {
  if (n == Vec<real>::size) {
    store(out, x);
  } else {
    store_partial(out, n, x);
  }
}

template <typename real>
BMTARD_HD void store_lanes(real* out, int, real x) {
  *out = x;
}

// row_max() of each lane's row.
template <typename real>
BMTARD_HD Vec<real> column_max(const real* columns, int64_t classes) {
  using V = Vec<real>;
  V max = kNegativeInfinity<real>;
  for (int64_t j = 0; j < classes; ++j) {
    max = larger(load(columns + j * V::size), max);
  }
  return select(max > V(kNegativeInfinity<real>), max, V(real(0)));
}

// row_sums() of each lane's row.
template <template <typename> class Sums, typename real>
BMTARD_HD Sums<Vec<real>> column_sums(const real* columns, int64_t classes, Vec<real> max,
                                      Vec<real> scale) {
  using V = Vec<real>;
  Sums<V> sums;
  V* values = reinterpret_cast<V*>(&sums);
  for (size_t i = 0; i < sizeof(Sums<V>) / sizeof(V); ++i) values[i] = V(real(0));
  for (int64_t j = 0; j < classes; ++j) {
    accumulate(sums, (load(columns + j * V::size) - max) * scale);
  }
  return sums;
}

// f(first row, number of rows) for groups of at most Vec::size rows.
template <typename real, typename F>
BMTARD_HD void for_groups(int64_t begin, int64_t end, F f) {
  constexpr int size = Vec<real>::size;
  for (int64_t r = begin; r < end; r += size) {
    f(r, end - r < size ? static_cast<int>(end - r) : size);
  }
}

BMTARD_NAMESPACE_END
