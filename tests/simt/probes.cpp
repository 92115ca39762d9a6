// Small kernels that do one thing wrong each, to show that the machine sees it.
#include "probes.h"

#include <map>

#include "simt.cuh"

namespace bmtard {
namespace {

constexpr int kThreads = 64;
constexpr int kBlocks = 4;  // of the probes that have several
constexpr int kPart = kThreads / kBlocks;

// A value passes from each thread to its neighbour.
BMTARD_KERNEL(kThreads) pass_on(int* out, bool barrier) {
  BMTARD_SHARED(int, values, kThreads);
  const int thread = simt::thread_id();
  values.set(thread, thread);
  if (barrier) simt::block_barrier();
  out[thread] = values.get((thread + 1) % kThreads);
}

BMTARD_KERNEL(kThreads) never_written(int* out) {
  BMTARD_SHARED(int, values, kThreads);
  out[simt::thread_id()] = values.get(simt::thread_id());
}

BMTARD_KERNEL(kThreads) past_the_end(int*) {
  BMTARD_SHARED(int, values, kThreads);
  values.set(simt::thread_id() + 1, 0);
}

BMTARD_KERNEL(kThreads) leave_before_the_barrier(int*) {
  if (simt::thread_id() == 5) return;
  simt::block_barrier();
}

BMTARD_KERNEL(kThreads) two_barriers(int*) {
  if (simt::thread_id() < 32) {
    simt::block_barrier();
  } else {
    simt::block_barrier();
  }
}

BMTARD_KERNEL(kThreads) barrier_and_shuffle(int* out) {
  const int thread = simt::thread_id();
  if (thread == 3 || thread >= simt::kWarp) simt::block_barrier();
  out[thread] = simt::shuffle_xor(simt::kFullWarp, 1, 1);
}

BMTARD_KERNEL(kThreads) not_in_the_mask(int* out) {
  out[simt::thread_id()] = simt::shuffle_xor(0x0000ffffu, 1, 1);
}

BMTARD_KERNEL(kThreads) source_not_in_the_mask(int* out) {
  const uint32_t half = simt::thread_id() % 32 < 16 ? 0x0000ffffu : 0xffff0000u;
  out[simt::thread_id()] = simt::shuffle_xor(half, 1, 16);
}

BMTARD_KERNEL(kThreads) lane_has_left(int* out) {
  if (simt::thread_id() == 7) return;
  out[simt::thread_id()] = simt::shuffle_xor(simt::kFullWarp, 1, 1);
}

BMTARD_KERNEL(kThreads) misaligned(int* out) { simt::store_pack<2>(out + 1, Pack<int, 2>{{1, 2}}); }

// Groups of eight lanes that loop for different times beside each other: allowed.
BMTARD_KERNEL(kThreads) uneven_groups(int* out) {
  const int thread = simt::thread_id(), group = thread % 32 / 8;
  int sum = 1;
  for (int i = 0; i <= group; ++i) {
    for (int distance = 4; distance > 0; distance /= 2) {
      sum += simt::shuffle_xor(0xffu << (8 * group), sum, distance);
    }
  }
  out[thread] = sum + simt::shuffle_xor(simt::kFullWarp, sum, 16);
}

// As pass_on, from each block to the next of its cluster or grid.
BMTARD_KERNEL(kThreads) pass_to_the_next_block(int* out, bool barrier, bool stay) {
  BMTARD_SHARED(int, value, 1);
  const int thread = simt::thread_id(), rank = simt::cluster_rank();
  if (thread == 0) value.set(0, rank);
  if (barrier) {
    simt::cluster_barrier();
  } else {
    simt::block_barrier();
  }
  out[rank * kPart + thread % kPart] = value.get_from((rank + 1) % simt::cluster_blocks(), 0);
  if (stay) simt::cluster_barrier();
}

BMTARD_KERNEL(kThreads) overwrite_what_others_read(int* out) {
  BMTARD_SHARED(int, value, 1);
  const int rank = simt::cluster_rank();
  if (simt::thread_id() == 0) value.set(0, rank);
  simt::cluster_barrier();
  out[rank * kPart] = value.get_from((rank + 1) % simt::cluster_blocks(), 0);
  simt::block_barrier();
  if (simt::thread_id() == 0) value.set(0, -1);
  simt::cluster_barrier();
}

BMTARD_KERNEL(kThreads) outside_the_cluster(int* out) {
  BMTARD_SHARED(int, value, 1);
  value.set(0, simt::thread_id() == 0);
  out[0] = value.get_from(simt::cluster_blocks(), 0);
}

BMTARD_KERNEL(kThreads) some_blocks_wait(int*) {
  if (simt::cluster_rank() > 0) simt::cluster_barrier();
}

BMTARD_KERNEL(kThreads) different_cluster_barriers(int*) {
  if (simt::cluster_rank() > 0) {
    simt::cluster_barrier();
  } else {
    simt::cluster_barrier();
  }
}

BMTARD_KERNEL(kThreads) grid_waits(int* out) {
  if (simt::block_id() == 0 && simt::thread_id() == 0) simt::store(out + kThreads - 1, 7);
  simt::grid_barrier();
  if (simt::thread_id() < kPart) {
    out[simt::block_id() * kPart + simt::thread_id()] = simt::load(out + kThreads - 1);
  }
}

void pass_on_in_cluster(int* out) { pass_to_the_next_block(out, true, true); }
void no_cluster_barrier(int* out) { pass_to_the_next_block(out, false, true); }
void leave_while_others_read(int* out) { pass_to_the_next_block(out, true, false); }

}  // namespace

std::vector<int> run_probe(const std::string& name) {
  alignas(16) static int out[kThreads];
  for (int& value : out) value = -1;
  const simt::Grid grid = {1, kThreads};
  const simt::Grid cluster = {kBlocks, kThreads, 0, kBlocks};
  const simt::Grid cooperative = {kBlocks, kThreads, 0, 1, true};
  const std::map<std::string, void (*)(int*)> probes = {
      {"never_written", never_written},
      {"past_the_end", past_the_end},
      {"leave_before_the_barrier", leave_before_the_barrier},
      {"two_barriers", two_barriers},
      {"barrier_and_shuffle", barrier_and_shuffle},
      {"not_in_the_mask", not_in_the_mask},
      {"source_not_in_the_mask", source_not_in_the_mask},
      {"lane_has_left", lane_has_left},
      {"misaligned", misaligned},
      {"uneven_groups", uneven_groups}};
  const std::map<std::string, void (*)(int*)> cluster_probes = {
      {"pass_on_in_cluster", pass_on_in_cluster},
      {"no_cluster_barrier", no_cluster_barrier},
      {"leave_while_others_read", leave_while_others_read},
      {"overwrite_what_others_read", overwrite_what_others_read},
      {"outside_the_cluster", outside_the_cluster},
      {"some_blocks_wait", some_blocks_wait},
      {"different_cluster_barriers", different_cluster_barriers},
      {"grid_barrier_in_a_cluster", grid_waits}};
  if (name == "grid_barrier") {
    simt::launch(grid_waits, cooperative, nullptr, out);
  } else if (cluster_probes.count(name)) {
    simt::launch(cluster_probes.at(name), cluster, nullptr, out);
  } else if (name == "with_barrier" || name == "without_barrier") {
    simt::launch(pass_on, grid, nullptr, out, name == "with_barrier");
  } else {
    simt::launch(probes.at(name), grid, nullptr, out);
  }
  return {out, out + kThreads};
}

}  // namespace bmtard
