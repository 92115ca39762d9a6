// KL of one row of one teacher, for multi_teacher_kl and the whole loss.
#pragma once

#include "../core/multi_teacher_kl.h"
#include "../core/softmax_entropy.h"
#include "rows.h"

BMTARD_NAMESPACE_BEGIN

template <typename T>
struct TeacherKL {
  T kl, center;
  T entropy, entropy_eps;  // of the teacher: -sum p log p and -sum p log(p + eps)
  T student_max, student_log_sum, teacher_max, teacher_log_sum;
  T student_norm, teacher_norm;  // 1 / sum of the exponentials
};

// The part of a class with eps > 0, where the logarithm is worth sharing.
template <typename T>
struct EpsTerms {
  T kl, center, entropy;
  BMTARD_HD void add(T p, T log_q, T eps, bool wants_center) {
    const T log_p_eps = log(p + eps);
    const T part = weighted(p, log_p_eps - log_q);
    kl = kl + part;
    if (wants_center) center = center + part + p * (p / (p + eps));
    entropy = entropy - p * log_p_eps;
  }
};

// `exps` receives exp of the shifted student's and teacher's logits, each padded to whole
// vectors; times the norms these are the probabilities.
template <typename scalar>
inline TeacherKL<acc_t<scalar>> teacher_kl(const Matrix& students, const Matrix& teachers,
                                           int64_t row, int64_t classes,
                                           acc_t<scalar> student_scale, acc_t<scalar> teacher_scale,
                                           acc_t<scalar> eps, bool wants_center,
                                           acc_t<scalar>* exps) {
  using real = acc_t<scalar>;
  using V = Vec<real>;
  const V zero = real(0);
  const bool has_eps = eps != real(0);
  const scalar* student = row_of<scalar>(students, row);
  const scalar* teacher = row_of<scalar>(teachers, row);
  const real student_max = row_max(student, classes), teacher_max = row_max(teacher, classes);
  const auto student_u = [&](V s) { return (s - V(student_max)) * V(student_scale); };
  const auto teacher_u = [&](V t) { return (t - V(teacher_max)) * V(teacher_scale); };
  const int64_t padded = (classes + V::size - 1) / V::size * V::size;
  real* student_exps = exps;
  real* teacher_exps = exps + padded;

  double q_sum = 0, p_sum = 0, cross = 0, self = 0;
  for (int64_t start = 0; start < classes; start += kBlock) {
    const int64_t length = classes - start < kBlock ? classes - start : kBlock;
    V q = zero, p = zero, pd = zero, pu = zero;
    for (int64_t j = 0; j < length; j += V::size) {
      // The next row comes while this one is computed: the processor's own prefetch stops at
      // the end of a page, which is about a row.
      __builtin_prefetch(student + students.row_stride + start + j);
      __builtin_prefetch(teacher + teachers.row_stride + start + j);
      const V v = student_u(load_at(student + start, j, length, kNegativeInfinity<real>));
      const V u = teacher_u(load_at(teacher + start, j, length, kNegativeInfinity<real>));
      const V ev = exp(v), eu = exp(u);
      store(student_exps + start + j, ev);
      store(teacher_exps + start + j, eu);
      q = q + ev;
      p = p + eu;
      if (!has_eps) pd = pd + weighted(eu, u - v);
      pu = pu + eu * floor_exponent(u);
    }
    q_sum += static_cast<double>(reduce_add(q));
    p_sum += static_cast<double>(reduce_add(p));
    cross += static_cast<double>(reduce_add(pd));
    self += static_cast<double>(reduce_add(pu));
  }
  const double student_log_sum = ::log(q_sum), teacher_log_sum = ::log(p_sum);
  const real student_norm = static_cast<real>(1.0 / q_sum);
  const real teacher_norm = static_cast<real>(1.0 / p_sum);

  const double entropy = teacher_log_sum - self / p_sum;
  double kl, center, entropy_eps;
  if (!has_eps) {
    kl = center = cross / p_sum - teacher_log_sum + student_log_sum;
    entropy_eps = entropy;
  } else {
    kl = center = entropy_eps = 0;
    for (int64_t start = 0; start < classes; start += kBlock) {
      const int64_t length = classes - start < kBlock ? classes - start : kBlock;
      EpsTerms<V> terms{zero, zero, zero};
      for_row(student + start, length, kNegativeInfinity<real>, [&](V s, int64_t j) {
        terms.add(load(teacher_exps + start + j) * V(teacher_norm),
                  student_u(s) - V(static_cast<real>(student_log_sum)), V(eps), wants_center);
      });
      kl += static_cast<double>(reduce_add(terms.kl));
      center += static_cast<double>(reduce_add(terms.center));
      entropy_eps += static_cast<double>(reduce_add(terms.entropy));
    }
  }
  return {static_cast<real>(kl),
          static_cast<real>(center),
          static_cast<real>(entropy),
          static_cast<real>(entropy_eps),
          student_max,
          static_cast<real>(student_log_sum),
          teacher_max,
          static_cast<real>(teacher_log_sum),
          student_norm,
          teacher_norm};
}

// The same of n <= Vec::size rows of few classes at once. The columns hold the logits on the way
// in and their exponentials on the way out.
template <typename real>
inline TeacherKL<Vec<real>> teacher_kl_columns(real* student, real* teacher, int64_t classes,
                                               Vec<real> student_scale, Vec<real> teacher_scale,
                                               Vec<real> eps, bool has_eps, bool wants_center) {
  using V = Vec<real>;
  const V zero = real(0);
  const V student_max = column_max(student, classes), teacher_max = column_max(teacher, classes);
  V q_sum = zero, p_sum = zero, cross = zero, self = zero;
  V scaled[kMaxColumns];  // the student's shifted logits
  for (int64_t j = 0; j < classes; ++j) {
    const V v = (load(student + j * V::size) - student_max) * student_scale;
    const V u = (load(teacher + j * V::size) - teacher_max) * teacher_scale;
    const V ev = exp(v), eu = exp(u);
    store(student + j * V::size, ev);
    store(teacher + j * V::size, eu);
    scaled[j] = v;
    q_sum = q_sum + ev;
    p_sum = p_sum + eu;
    cross = cross + weighted(eu, u - v);
    self = self + eu * floor_exponent(u);
  }
  const V student_log_sum = log(q_sum), teacher_log_sum = log(p_sum);
  const V student_norm = V(real(1)) / q_sum, teacher_norm = V(real(1)) / p_sum;
  const V entropy = teacher_log_sum - self * teacher_norm;
  const V kl = cross * teacher_norm - teacher_log_sum + student_log_sum;
  EpsTerms<V> terms{kl, kl, entropy};
  if (has_eps) {
    terms = {zero, zero, zero};
    for (int64_t j = 0; j < classes; ++j) {
      terms.add(load(teacher + j * V::size) * teacher_norm, scaled[j] - student_log_sum, eps,
                wants_center);
    }
  }
  return {terms.kl,        terms.center, entropy,         terms.entropy, student_max,
          student_log_sum, teacher_max,  teacher_log_sum, student_norm,  teacher_norm};
}

// Room for the exponentials of one student and one teacher row. Freed on the way out; kept out
// of std containers, whose inline code must not be compiled per instruction set.
template <typename real>
class RowScratch {
 public:
  explicit RowScratch(int64_t classes)
      : data_(static_cast<real*>(
            __builtin_malloc(2 * static_cast<size_t>(classes + Vec<real>::size) * sizeof(real)))) {
    if (!data_) __builtin_abort();
  }
  ~RowScratch() { __builtin_free(data_); }
  RowScratch(const RowScratch&) = delete;
  RowScratch& operator=(const RowScratch&) = delete;
  real* data() const { return data_; }

 private:
  real* data_;
};

BMTARD_NAMESPACE_END
