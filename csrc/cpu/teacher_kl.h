// KL of one row of one teacher, for multi_teacher_kl and the whole loss.
#pragma once

#include "../core/multi_teacher_kl.h"
#include "../core/softmax_entropy.h"
#include "rows.h"

BMTARD_NAMESPACE_BEGIN

template <typename real>
struct TeacherKL {
  real kl, center;
  real entropy, entropy_eps;  // of the teacher: -sum p log p and -sum p log(p + eps)
  real student_max, student_log_sum, teacher_max, teacher_log_sum;
};

// `exps` has room for 2 C values: exp of the shifted student's and teacher's logits, which the
// caller may turn into probabilities with the log-sums' exponentials (returned in `norms`).
template <typename scalar>
inline TeacherKL<acc_t<scalar>> teacher_kl(const scalar* student, const scalar* teacher,
                                           int64_t classes, acc_t<scalar> student_scale,
                                           acc_t<scalar> teacher_scale, acc_t<scalar> eps,
                                           acc_t<scalar>* exps, acc_t<scalar> norms[2]) {
  using real = acc_t<scalar>;
  using V = Vec<real>;
  const V zero = real(0);
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
    for_rows_pair(student + start, teacher + start, length, kNegativeInfinity<real>,
                  [&](V s, V t, int64_t j) {
                    const V v = student_u(s), u = teacher_u(t);
                    const V ev = exp(v), eu = exp(u);
                    store(student_exps + start + j, ev);
                    store(teacher_exps + start + j, eu);
                    q = q + ev;
                    p = p + eu;
                    pd = pd + weighted(eu, u - v);
                    pu = pu + eu * floor_exponent(u);
                  });
    q_sum += static_cast<double>(reduce_add(q));
    p_sum += static_cast<double>(reduce_add(p));
    cross += static_cast<double>(reduce_add(pd));
    self += static_cast<double>(reduce_add(pu));
  }
  const double student_log_sum = ::log(q_sum), teacher_log_sum = ::log(p_sum);
  norms[0] = static_cast<real>(1.0 / q_sum);
  norms[1] = static_cast<real>(1.0 / p_sum);

  const double entropy = teacher_log_sum - self / p_sum;
  double kl, center, entropy_eps;
  if (eps == real(0)) {
    kl = center = cross / p_sum - teacher_log_sum + student_log_sum;
    entropy_eps = entropy;
  } else {
    kl = center = entropy_eps = 0;
    for (int64_t start = 0; start < classes; start += kBlock) {
      const int64_t length = classes - start < kBlock ? classes - start : kBlock;
      V k = zero, c = zero, h = zero;
      for_rows_pair(student + start, teacher + start, length, kNegativeInfinity<real>,
                    [&](V s, V t, int64_t j) {
                      const V p = load(teacher_exps + start + j) * V(norms[1]);
                      const V log_p = teacher_u(t) - V(static_cast<real>(teacher_log_sum));
                      const V log_q = student_u(s) - V(static_cast<real>(student_log_sum));
                      k = k + kl_term(p, log_p, log_q, V(eps), true);
                      c = c + weighted(p, kl_by_probability(p, log_p, log_q, V(eps), true));
                      h = h - p * log(p + V(eps));
                    });
      kl += static_cast<double>(reduce_add(k));
      center += static_cast<double>(reduce_add(c));
      entropy_eps += static_cast<double>(reduce_add(h));
    }
  }
  return {static_cast<real>(kl),
          static_cast<real>(center),
          static_cast<real>(entropy),
          static_cast<real>(entropy_eps),
          student_max,
          static_cast<real>(student_log_sum),
          teacher_max,
          static_cast<real>(teacher_log_sum)};
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
