// The whole balanced loss: temperatures, KLs, weights, loss, gradients, state.
#include "../core/balance.h"
#include "loss_workspace.h"
#include "teacher_kl.h"
#include "temperature_search.h"

BMTARD_NAMESPACE_BEGIN

namespace {

// With the logits of a row, these give q and p.
template <typename real>
struct RowNorms {
  real student_max, student_norm, teacher_max, teacher_norm;
};

// Views into the workspace; bmtard_loss_workspace() in dispatch.cpp sizes it.
template <typename scalar>
struct Workspace {
  using real = acc_t<scalar>;
  double* parts;    // [3, N]
  double* kl;       // [K, N]
  double* entropy;  // [K, N]
  real* max;        // [K, N], of the teachers
  // One of these two, or none: see gradient_pass().
  real* difference;       // [K, N, C], q - p, not yet weighted
  RowNorms<real>* norms;  // [K, N]

  explicit Workspace(const BMTARDLossArgs& args) {
    const int64_t rows = args.rows, all = args.teachers * args.rows;
    parts = static_cast<double*>(args.workspace);
    kl = parts + 3 * rows;
    entropy = kl + all;
    max = reinterpret_cast<real*>(entropy + all);
    difference = max + all;
    norms = reinterpret_cast<RowNorms<real>*>(max + all);
  }
};

// Mode "bisect": moves every teacher to the largest of their entropies at the lower bound.
template <typename scalar>
bool solve_temperatures(const BMTARDLossArgs& args, const Workspace<scalar>& work,
                        ParallelFor parallel_for, double* temperatures) {
  using real = acc_t<scalar>;
  double log_count[kMaxTeachers];
  EntropyDerivatives<double> lowest[kMaxTeachers];
  double target = kNegativeInfinity<double>;
  for (int32_t k = 0; k < args.teachers; ++k) {
    real* max = work.max + k * args.rows;
    log_count[k] =
        mean_range<scalar>(args.teacher[k], args.rows, args.classes, max, work.parts, parallel_for)
            .log_count;
    lowest[k] = mean_derivatives<scalar>(args.teacher[k], args.rows, args.classes, max, args.low,
                                         work.parts, parallel_for);
    if (lowest[k].entropy > target) target = lowest[k].entropy;
  }
  bool out_of_bounds = false;
  for (int32_t k = 0; k < args.teachers; ++k) {
    auto search = new_search<real>(args, SearchMethod::kHalley, target, log_count[k]);
    const double current = args.state.temperatures[k];
    search.start(lowest[k], current, current);
    run(search, [&](double temperature) {
      return mean_derivatives<scalar>(args.teacher[k], args.rows, args.classes,
                                      work.max + k * args.rows, temperature, work.parts,
                                      parallel_for);
    });
    out_of_bounds |= search.status == kClampedHigh;
    temperatures[k] = move_temperature(current, search.temperature, args.temperature_momentum);
  }
  return out_of_bounds;
}

template <bool has_eps, typename scalar>
void loss(const BMTARDLossArgs& args, ParallelFor parallel_for) {
  using real = acc_t<scalar>;
  using V = Vec<real>;
  const Workspace<scalar> work(args);
  const BalanceState& state = args.state;
  const int32_t teachers = args.teachers;
  const int64_t rows = args.rows, classes = args.classes;
  const bool wants_grad = args.grad_student[0] != nullptr;

  double temperatures[kMaxTeachers];
  for (int32_t k = 0; k < teachers; ++k) temperatures[k] = state.temperatures[k];
  bool out_of_bounds = false;
  if (args.update && args.mode == BalanceMode::kBisect) {
    out_of_bounds = solve_temperatures<scalar>(args, work, parallel_for, temperatures);
  }

  const real eps = static_cast<real>(args.eps);
  const real student_scale = static_cast<real>(1.0 / args.student_temperature);
  const real gradient_scale = static_cast<real>(args.gradient_scale / args.student_temperature);
  real teacher_scale[kMaxTeachers];
  for (int32_t k = 0; k < teachers; ++k) {
    teacher_scale[k] = static_cast<real>(inverse_temperature(temperatures[k]));
  }
  const auto gradient_of = [&](int32_t k, int64_t r) {
    return static_cast<scalar*>(args.grad_student[k]) + r * classes;
  };
  // The gradient without the weight, which depends on all rows.
  const GradientPass pass = gradient_pass(args);
  const bool keeps_norms = wants_grad && pass == GradientPass::kFromLogits;
  const auto difference_of = [&](int32_t k, int64_t r) -> real* {
    if (!wants_grad || keeps_norms) return nullptr;
    if (pass == GradientPass::kFromFloat) return work.difference + (k * rows + r) * classes;
    return reinterpret_cast<real*>(gradient_of(k, r));
  };
  // Mode "sign" takes the published entropies, which have eps inside the logarithm too.
  const bool published = args.mode == BalanceMode::kSign;
  const auto rows_of_teacher = [&](int32_t k, int64_t begin, int64_t end) {
    const RowScratch<real> scratch(classes);
    for (int64_t r = begin; r < end; ++r) {
      const auto found = teacher_kl<has_eps, scalar>(
          args.student[k], args.teacher[k], r, classes, student_scale, teacher_scale[k], eps, false,
          scratch.data(), difference_of(k, r), gradient_scale);
      const int64_t at = k * rows + r;
      work.kl[at] = found.kl;
      work.entropy[at] = published ? found.entropy_eps : found.entropy;
      if (keeps_norms) {
        work.norms[at] = {found.student_max, found.student_norm, found.teacher_max,
                          found.teacher_norm};
      }
    }
  };
  const auto columns_of_teacher = [&](int32_t k, int64_t begin, int64_t end) {
    real student[kMaxColumns * V::size], teacher[kMaxColumns * V::size];
    for_groups<real>(begin, end, [&](int64_t r, int n) {
      const auto found = teacher_kl_columns<has_eps, scalar>(
          args.student[k], args.teacher[k], r, n, classes, student_scale, teacher_scale[k], eps,
          false, student, teacher);
      const V entropy = published ? found.entropy_eps : found.entropy;
      for (int i = 0; i < n; ++i) {
        const int64_t at = k * rows + r + i;
        work.kl[at] = found.kl.v[i];
        work.entropy[at] = entropy.v[i];
        if (keeps_norms) {
          work.norms[at] = {found.student_max.v[i], found.student_norm.v[i], found.teacher_max.v[i],
                            found.teacher_norm.v[i]};
        }
      }
      if (real* difference = difference_of(k, r)) {
        const V q_scale = found.student_norm * V(gradient_scale);
        const V p_scale = found.teacher_norm * V(gradient_scale);
        for (int64_t j = 0; j < classes * V::size; j += V::size) {
          store(student + j, load(student + j) * q_scale - load(teacher + j) * p_scale);
        }
        store_columns(difference, n, classes, student);
      }
    });
  };
  // f(teacher, first row, last row) over the rows of all teachers.
  const auto for_all = [&](int64_t cost, auto f) {
    for_rows(parallel_for, teachers * rows, cost, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end;) {
        const int32_t k = static_cast<int32_t>(i / rows);
        const int64_t stop = end < (k + 1) * rows ? end : (k + 1) * rows;
        f(k, i - k * rows, stop - k * rows);
        i = stop;
      }
    });
  };
  for_all(2 * classes, [&](int32_t k, int64_t begin, int64_t end) {
    classes <= kMaxColumns ? columns_of_teacher(k, begin, end) : rows_of_teacher(k, begin, end);
  });

  // In row order, whatever the number of threads.
  double losses[kMaxTeachers], entropies[kMaxTeachers], weights[kMaxTeachers];
  bool finite = true;
  for (int32_t k = 0; k < teachers; ++k) {
    losses[k] = entropies[k] = 0;
    for (int64_t r = 0; r < rows; ++r) {
      losses[k] += work.kl[k * rows + r];
      entropies[k] += work.entropy[k * rows + r];
    }
    losses[k] *= args.scale;
    entropies[k] /= static_cast<double>(rows);
    finite &= is_finite(losses[k]) && is_finite(entropies[k]);
    weights[k] = state.weights[k];
  }
  if (args.update && finite) {
    const bool first = *state.step == 0;
    for (int32_t k = 0; k < teachers; ++k) {
      if (first) state.initial_losses[k] = losses[k];
    }
    balance_weights(teachers, losses, state.initial_losses, *state.weight_lr, args.loss_exponent,
                    weights);
    if (args.mode == BalanceMode::kSign) {
      sign_step(teachers, entropies, *state.temperature_lr, args.low, args.high, temperatures);
    }
    for (int32_t k = 0; k < teachers; ++k) {
      state.temperatures[k] = temperatures[k];
      state.weights[k] = weights[k];
      state.entropies[k] = entropies[k];
      state.losses[k] = losses[k];
    }
    *state.step += 1;
    *state.status = out_of_bounds ? kTargetOutOfBounds : kUpdated;
  } else if (args.update) {
    *state.status = kSkippedNonFinite;
  }

  double total = 0;
  for (int32_t k = 0; k < teachers; ++k) total += weights[k] * losses[k];
  *static_cast<real*>(args.loss) = static_cast<real>(total);

  if (!wants_grad) return;
  if (keeps_norms) {
    for_all(2 * classes, [&](int32_t k, int64_t begin, int64_t end) {
      const V weight =
          static_cast<real>(weights[k] * args.gradient_scale / args.student_temperature);
      for (int64_t r = begin; r < end; ++r) {
        const RowNorms<real> norms = work.norms[k * rows + r];
        const scalar* student = row_of<scalar>(args.student[k], r);
        const scalar* teacher = row_of<scalar>(args.teacher[k], r);
        const V q_scale = V(norms.student_norm) * weight, p_scale = V(norms.teacher_norm) * weight;
        for (int64_t j = 0; j < classes; j += V::size) {
          const V s = load_at(student, j, classes, kNegativeInfinity<real>);
          const V t = load_at(teacher, j, classes, kNegativeInfinity<real>);
          const V q = exp((s - V(norms.student_max)) * V(student_scale)) * q_scale;
          const V p = exp((t - V(norms.teacher_max)) * V(teacher_scale[k])) * p_scale;
          store_at(gradient_of(k, r), j, classes, q - p);
        }
      }
    });
    return;
  }
  // Rows lie one after the other, so a thread treats its part as one long row. Memory bounds it.
  for_all(classes / 8, [&](int32_t k, int64_t begin, int64_t end) {
    const V weight = static_cast<real>(weights[k]);
    scalar* gradient = gradient_of(k, begin);
    const int64_t count = (end - begin) * classes;
    for_row(difference_of(k, begin), count, real(0),
            [&](V d, int64_t j) { store_at(gradient, j, count, d * weight); });
  });
}

}  // namespace

void bmtard_loss(const BMTARDLossArgs& args, ParallelFor parallel_for) {
  with_type(args.dtype, [&](auto type) {
    with_eps(args.eps, [&](auto eps) {
      loss<decltype(eps)::is, typename decltype(type)::type>(args, parallel_for);
    });
  });
}

BMTARD_NAMESPACE_END
