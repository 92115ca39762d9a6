// One step of the balanced multi-teacher loss: temperatures, losses, weights, gradients and
// state. Rounds over the batch, see batch.cuh; a small batch is one launch.
#include "../core/balance.h"
#include "../core/temperature_search.h"
#include "batch.cuh"
#include "kl_row.cuh"

namespace bmtard {
namespace cuda {
namespace {

// What the next pass over the batch is for.
enum Phase : int32_t {
  kStart,
  kTarget,  // the entropies at the lower bound
  kSearch,  // the entropies where the searches ask for them
  kLoss,    // KL and entropy at the temperatures of this step
  kGradient,
  kDone,
};

// What the balance knows of a teacher between two passes.
struct Teacher {
  double current;      // temperature before this step
  double temperature;  // of the next pass
  double weight;
  double initial_loss;
  TemperatureSearch<double> search;
};

struct Progress {
  int32_t phase;
  int64_t step;
  Teacher teacher[kMaxTeachers];
};

template <typename R>
struct Workspace {
  Progress* progress;  // [2], by the parity of the round
  double* slots;       // [2][kMaxSlots][K][kEntropySums]
  R* statistics;       // [4][K][N]: maximum and log-sum of the student, of the teacher
};

int64_t slot_values(int32_t teachers) { return 2 * kMaxSlots * teachers * kEntropySums; }

template <typename R>
BMTARD_DEVICE Workspace<R> workspace_of(const BMTARDLossArgs& args) {
  auto* progress = static_cast<Progress*>(args.workspace);
  auto* slots = reinterpret_cast<double*>(progress + 2);
  return {progress, slots,
          reinterpret_cast<R*>(slots + 2 * kMaxSlots * args.teachers * kEntropySums)};
}

BMTARD_DEVICE bool bisects(const BMTARDLossArgs& args) {
  return args.update && args.mode == BalanceMode::kBisect;
}

// This block's share of a teacher's KL and entropy. Leaves the statistics of its rows.
template <typename Shape, typename R>
BMTARD_DEVICE void loss_pass(const BMTARDLossArgs& args, int k, double temperature, bool packed,
                             R* statistics, Block<Shape::kThreads>& block, Group<Shape>& group,
                             double (&sums)[kEntropySums]) {
  using T = typename Shape::Type;
  const int classes = static_cast<int>(args.classes);
  const R eps = static_cast<R>(args.eps);
  const int64_t plane = args.teachers * args.rows;
  BMTARD_UNROLL
  for (int i = 0; i < kEntropySums; ++i) sums[i] = 0;
  for (int64_t n = group.first_row(); n < args.rows; n += group.row_step()) {
    const Row<Shape> student(row_of<T>(args.student[k], n), classes, group.lane, packed);
    const Row<Shape> teacher(row_of<T>(args.teacher[k], n), classes, group.lane, packed);
    const auto q =
        log_softmax<Shape>(student, classes, static_cast<R>(1 / args.student_temperature), group);
    const auto p = log_softmax<Shape>(teacher, classes, static_cast<R>(1 / temperature), group);
    const auto found = kl_sums<Shape>(student, teacher, classes, q, p, eps,
                                      args.mode == BalanceMode::kSign ? eps : R(0), group);
    sums[0] += found.kl;
    sums[1] += found.entropy;
    if (group.lane == 0) {
      R* const to = statistics + k * args.rows + n;
      simt::store(to, q.max);
      simt::store(to + plane, q.log_sum);
      simt::store(to + 2 * plane, p.max);
      simt::store(to + 3 * plane, p.log_sum);
    }
  }
  block_total<Shape>(block, group, sums);
}

// d loss / d student k, of this block's rows.
template <typename Shape, typename R>
BMTARD_DEVICE void gradient_pass(const BMTARDLossArgs& args, int k, double temperature,
                                 double weight, bool packed, const R* statistics,
                                 const Group<Shape>& group) {
  using T = typename Shape::Type;
  using std::exp;
  if (!args.grad_student[k]) return;
  const int classes = static_cast<int>(args.classes);
  const R inverse = static_cast<R>(1 / temperature);
  const R student_inverse = static_cast<R>(1 / args.student_temperature);
  const R coefficient = static_cast<R>(weight * args.scale / args.student_temperature);
  const int64_t plane = args.teachers * args.rows;
  for (int64_t n = group.first_row(); n < args.rows; n += group.row_step()) {
    const R* const from = statistics + k * args.rows + n;
    const LogSoftmax<R> q{student_inverse, simt::load(from), simt::load(from + plane)};
    const LogSoftmax<R> p{inverse, simt::load(from + 2 * plane), simt::load(from + 3 * plane)};
    const Row<Shape> student(row_of<T>(args.student[k], n), classes, group.lane, packed);
    const Row<Shape> teacher(row_of<T>(args.teacher[k], n), classes, group.lane, packed);
    T* const to = static_cast<T*>(args.grad_student[k]) + n * args.classes;
    for_each_tile<Shape>(classes, [&](int tile) {
      const Tile<Shape> s = student.get(tile), t = teacher.get(tile);
      Tile<Shape> gradient;
      BMTARD_UNROLL
      for (int i = 0; i < Shape::kWidth; ++i) {
        gradient.value[i] = coefficient * (exp(q(s.value[i])) - exp(p(t.value[i])));
      }
      store_tile<Shape>(to, classes, tile, group.lane, packed, gradient);
    });
  }
}

// What comes after pass `phase`: the next phase, the same on all lanes of the warp. Lane k
// decides for teacher k from its totals of that pass.
template <typename R>
BMTARD_DEVICE int32_t next_phase(const BMTARDLossArgs& args, int32_t phase, int lane,
                                 Teacher* teacher, const simt::Shared<double>& totals) {
  const double rows = static_cast<double>(args.rows);
  if (phase == kStart) {
    if (!bisects(args)) return kLoss;
    if (teacher) teacher->temperature = args.low;
    return kTarget;
  }
  bool open = false;
  if (phase == kTarget) {
    // Where the sign rule comes to rest: the highest of the entropies at the lower bound.
    double target =
        teacher ? totals.get(lane * kEntropySums) / rows : -std::numeric_limits<double>::infinity();
    BMTARD_UNROLL
    for (int distance = simt::kWarp / 2; distance > 0; distance /= 2) {
      target = Max{}(target, simt::shuffle_xor(simt::kFullWarp, target, distance));
    }
    if (teacher) {
      TemperatureSearch<double>& search = teacher->search;
      search.target = target;
      search.log_count = totals.get(lane * kEntropySums + 3) / rows;
      search.tolerance = search_tolerance<R>(args.tolerance, search.log_count);
      search.low = args.low;
      search.high = args.high;
      search.max_iterations = args.max_iterations;
      search.method = SearchMethod::kHalley;
      search.start(teacher->current, teacher->current);
      teacher->temperature = search.temperature;
    }
    return kSearch;
  }
  // kSearch
  if (teacher) {
    TemperatureSearch<double>& search = teacher->search;
    if (!search.done) {
      const int first = lane * kEntropySums;
      search.update(
          {totals.get(first) / rows, totals.get(first + 1) / rows, totals.get(first + 2) / rows});
      teacher->temperature = search.done ? move_temperature(teacher->current, search.temperature,
                                                            args.temperature_momentum)
                                         : search.temperature;
    }
    open = !search.done;
  }
  return simt::any(simt::kFullWarp, open) ? kSearch : kLoss;
}

// Shared by the block: what the threads that own a teacher tell the others.
struct Board {
  simt::Shared<double> temperature, weight, initial_loss, loss, entropy;  // [kMaxTeachers]
};

// Weights, loss and state, by one thread.
template <typename R>
BMTARD_DEVICE void settle(const BMTARDLossArgs& args, const Board& board, int64_t step,
                          bool out_of_bounds, bool writes) {
  const int K = args.teachers;
  const double* losses = board.loss.read_all(K);
  const double* entropies = board.entropy.read_all(K);
  const double* initial_losses = step == 0 ? losses : board.initial_loss.read_all(K);
  double* weights = board.weight.own_all(K);
  bool finite = true;
  BMTARD_ROLLED
  for (int k = 0; k < K; ++k) finite = finite && is_finite(losses[k]) && is_finite(entropies[k]);
  if (args.update && finite) {
    balance_weights(K, losses, initial_losses, simt::load(args.state.weight_lr), args.loss_exponent,
                    weights);
  }
  if (!writes) return;
  double loss = 0;
  BMTARD_ROLLED
  for (int k = 0; k < K; ++k) loss += weights[k] * losses[k];
  put<R>(args.loss, 0, static_cast<R>(loss));
  if (!args.update) return;
  const BalanceState& state = args.state;
  if (!finite) {
    simt::store(state.status, static_cast<int32_t>(kSkippedNonFinite));
    return;
  }
  BMTARD_ROLLED
  for (int k = 0; k < K; ++k) {
    simt::store(state.temperatures + k, board.temperature.get(k));
    simt::store(state.weights + k, weights[k]);
    simt::store(state.initial_losses + k, initial_losses[k]);
    simt::store(state.entropies + k, entropies[k]);
    simt::store(state.losses + k, losses[k]);
  }
  if (args.mode == BalanceMode::kSign) {
    sign_step(K, entropies, simt::load(state.temperature_lr), args.low, args.high,
              state.temperatures);
  }
  simt::store(state.step, step + 1);
  simt::store(state.status, static_cast<int32_t>(out_of_bounds ? kTargetOutOfBounds : kUpdated));
}

template <typename Shape>
BMTARD_KERNEL(Shape::kThreads)
bmtard_loss_kernel(const BMTARD_GRID_CONSTANT BMTARDLossArgs args, bool packed, int round) {
  using R = Real<typename Shape::Type>;
  BMTARD_SHARED(Teacher, teachers, kMaxTeachers);
  BMTARD_SHARED(double, temperature, kMaxTeachers);
  BMTARD_SHARED(double, weight, kMaxTeachers);
  BMTARD_SHARED(double, initial_loss, kMaxTeachers);
  BMTARD_SHARED(double, loss, kMaxTeachers);
  BMTARD_SHARED(double, entropy, kMaxTeachers);
  BMTARD_SHARED(int32_t, searching, kMaxTeachers);
  BMTARD_SHARED(double, totals, kMaxTeachers* kEntropySums);  // of the last pass
  BMTARD_SHARED(int32_t, next, 1);
  const Board board = {temperature, weight, initial_loss, loss, entropy};
  const Workspace<R> workspace = workspace_of<R>(args);
  const Progress* before = workspace.progress + (round + 1) % 2;
  Progress* after = workspace.progress + round % 2;
  const int width = args.teachers * kEntropySums;
  const double* slots_before = workspace.slots + (round + 1) % 2 * kMaxSlots * width;
  double* slots_after = workspace.slots + round % 2 * kMaxSlots * width;
  const int thread = simt::thread_id();
  const bool owns = thread < args.teachers;  // teacher `thread`
  const bool alone = simt::grid_blocks() == 1;
  const bool writes = simt::block_id() == 0;

  Block<Shape::kThreads> block;
  Group<Shape> group(block);
  double sums[kEntropySums];
  const auto keep_totals = [&](int k) {
    if (thread != 0) return;
    BMTARD_UNROLL
    for (int i = 0; i < kEntropySums; ++i) totals.set(k * kEntropySums + i, sums[i]);
  };
  int32_t phase = kStart;
  int64_t step;
  if (round == 0) {
    step = simt::load(args.state.step);
    if (owns) {
      Teacher& teacher = teachers.own(thread);
      teacher.current = teacher.temperature = simt::load(args.state.temperatures + thread);
      teacher.weight = simt::load(args.state.weights + thread);
      teacher.initial_loss = simt::load(args.state.initial_losses + thread);
    }
  } else {
    phase = simt::load(&before->phase);
    step = simt::load(&before->step);
    if (phase == kDone) {
      if (writes && thread == 0) simt::store(&after->phase, phase);
      return;
    }
    if (owns) teachers.set(thread, before->teacher[thread]);
    BMTARD_ROLLED
    for (int k = 0; k < args.teachers; ++k) {
      if (phase == kSearch && before->teacher[k].search.done) continue;
      slot_total(block, slots_before, width, k * kEntropySums, sums);
      keep_totals(k);
    }
  }

  for (;;) {
    // All totals are there, and nobody reads any more what is decided anew.
    simt::block_barrier();
    if (phase == kLoss) {
      bool stopped = false;
      if (owns) {
        const Teacher& teacher = teachers.own(thread);
        board.temperature.set(thread, teacher.temperature);
        board.weight.set(thread, teacher.weight);
        board.initial_loss.set(thread, teacher.initial_loss);
        board.loss.set(thread, args.scale * totals.get(thread * kEntropySums));
        board.entropy.set(thread,
                          totals.get(thread * kEntropySums + 1) / static_cast<double>(args.rows));
        // The teacher that set the target may be clamped at the lower bound, having reached it.
        stopped = bisects(args) && teacher.search.status == kClampedHigh;
      }
      if (thread < simt::kWarp) stopped = simt::any(simt::kFullWarp, stopped);
      simt::block_barrier();
      if (thread == 0) settle<R>(args, board, step, stopped, writes);
      simt::block_barrier();
      phase = kGradient;
    } else {
      if (thread < simt::kWarp) {
        Teacher* teacher = owns ? &teachers.own(thread) : nullptr;
        const int32_t decided = next_phase<R>(args, phase, thread, teacher, totals);
        if (owns) {
          board.temperature.set(thread, teacher->temperature);
          searching.set(thread, decided != kSearch || !teacher->search.done);
        }
        if (thread == 0) next.set(0, decided);
      }
      simt::block_barrier();
      phase = next.get(0);
    }

    BMTARD_ROLLED
    for (int k = 0; k < args.teachers; ++k) {
      if (phase == kGradient) {
        gradient_pass<Shape, R>(args, k, board.temperature.get(k), board.weight.get(k), packed,
                                workspace.statistics, group);
        continue;
      }
      if (!searching.get(k)) continue;
      if (phase == kLoss) {
        loss_pass<Shape, R>(args, k, board.temperature.get(k), packed, workspace.statistics, block,
                            group, sums);
      } else {
        entropy_pass<Shape>(args.teacher[k], args.rows, static_cast<int>(args.classes),
                            board.temperature.get(k), phase == kTarget, packed, block, group, sums);
      }
      keep_totals(k);
      if (!alone && thread == 0) fill_slot(slots_after, width, k * kEntropySums, sums);
    }
    if (phase == kGradient) phase = kDone;
    if (alone && phase != kDone) continue;
    if (writes && !alone) {
      if (owns) after->teacher[thread] = teachers.own(thread);
      if (thread == 0) {
        simt::store(&after->phase, phase);
        simt::store(&after->step, step);
      }
    }
    return;
  }
}

}  // namespace

int bmtard_loss(const BMTARDLossArgs& args, void* stream) {
  bool packed = true;
  for (int32_t k = 0; k < args.teachers; ++k) {
    packed = packed && packable(args.dtype, args.student[k]) &&
             packable(args.dtype, args.teacher[k]) &&
             (!args.grad_student[k] || packable(args.dtype, args.grad_student[k], args.classes));
  }
  return with_shape<kBatchThreads, false>(args.dtype, args.classes, [&](auto shape) {
    using Shape = decltype(shape);
    const int64_t blocks = batch_blocks<Shape>(args.rows, args.classes);
    // Loss and gradient, before them the target and the search.
    const bool searches = args.update && args.mode == BalanceMode::kBisect;
    const int rounds = blocks == 1 ? 1 : 2 + (searches ? 1 + args.max_iterations : 0);
    int error = 0;
    for (int round = 0; round < rounds && error == 0; ++round) {
      error = simt::launch(bmtard_loss_kernel<Shape>, {blocks, Shape::kThreads}, stream, args,
                           packed, round);
    }
    return error;
  });
}

size_t bmtard_loss_workspace(const BMTARDLossArgs& args) {
  const size_t real = args.dtype == DataType::kFloat64 ? sizeof(double) : sizeof(float);
  return 2 * sizeof(Progress) + slot_values(args.teachers) * sizeof(double) +
         static_cast<size_t>(4 * args.teachers * args.rows) * real;
}

}  // namespace cuda
}  // namespace bmtard
