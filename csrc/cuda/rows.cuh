// Which thread takes which part of a matrix.
//
// A group of kLanes threads (part of a warp, a warp, or the block) takes a row. The row is
// cut into tiles of kLanes * kWidth classes, and a thread takes kWidth classes of each tile.
// "Packed", these are neighbours and move in one access, a pack; else they are every kLanes-th.
// A pack begins at a multiple of its size, but a row may begin anywhere: its tiles begin at the
// last such multiple. What a pack there would share with another row moves value by value, so no
// thread touches what is not the row's. With kTiles > 0 the row has at most that many tiles and
// stays in registers; with kTiles == 0 every pass reads it again. With kSplit the blocks of a
// cluster share the tiles of a row; the cluster may be a single block.
#pragma once

#include <climits>
#include <limits>
#include <type_traits>

#include "../core/common.h"
#include "../core/softmax_entropy.h"
#include "../core/temperature_search.h"
#include "../kernels.h"
#include "simt.cuh"
#include "tuned.h"

namespace bmtard {
namespace cuda {

// What values of type T are computed in.
template <typename T>
using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;

// The values of a 16-byte access.
template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// `values` of a row stay with a thread; 0: the row is streamed. tools/cuda_check.py reads the
// width.
template <typename T, int lanes, int threads, int values, int width = kVector<T>,
          bool split = false>
struct Shape {
  using Type = T;
  static constexpr bool kSplit = split;
  static constexpr int kLanes = lanes;
  static constexpr int kThreads = threads;  // of a block
  static constexpr int kRows = threads / lanes;
  static constexpr int kWidth = width;
  static constexpr int kTiles = values / kWidth;
  static constexpr int kSpan = lanes * kWidth;
  static constexpr int kMaxClasses = kTiles * kSpan;
};

// Rows of up to 32 classes: four to a warp. Packs of two values, because every row of an even
// number of classes begins at a multiple of two, and because ten classes then busy five lanes.
template <typename T, int threads>
using SmallShape = Shape<T, 8, threads, 4, 2>;
// Rows of up to 1024 classes (512 in double): one to a warp.
template <typename T, int threads>
using MediumShape = Shape<T, simt::kWarp, threads, 128 / sizeof(Real<T>)>;
template <typename T, int threads, bool split>
using LargeShape = Shape<T, threads, threads, 0, kVector<T>, split>;
// The same groups, with rows that are not kept.
template <typename S>
using StreamedShape = Shape<typename S::Type, S::kLanes, S::kThreads, 0, S::kWidth, S::kSplit>;

template <typename Body>
int with_type(DataType dtype, Body body) {
  switch (dtype) {
    case DataType::kFloat64:
      return body(double{});
    case DataType::kFloat32:
      return body(float{});
    case DataType::kBFloat16:
      return body(BFloat16{});
    case DataType::kFloat16:
      return body(Float16{});
  }
  return simt::kInvalidValue;
}

// Calls body(shape) with the shape for rows of `classes`. Medium rows are kept in registers
// only if `resident`; Large ones may be split. Doubles take two registers, so half the threads.
template <int threads, bool resident = true, bool split = true, typename Body>
int with_shape(DataType dtype, int64_t classes, Body body) {
  return with_type(dtype, [&](auto value) {
    using T = decltype(value);
    constexpr int kThreads = std::is_same_v<T, double> ? threads / 2 : threads;
    using Small = SmallShape<T, kThreads>;
    using Medium = MediumShape<T, kThreads>;
    if (classes <= Small::kMaxClasses) return body(Small{});
    if (classes <= Medium::kMaxClasses) {
      return body(std::conditional_t<resident, Medium, StreamedShape<Medium>>{});
    }
    // A position in a row is an int.
    if (classes > INT_MAX / 2) return +simt::kInvalidValue;
    return body(LargeShape<T, kThreads, split>{});
  });
}

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How the rows of a call move.
struct Packing {
  bool packed;
  int slack;  // the most values by which a row begins behind a multiple of a pack
};

// Where the rows of the matrices of a call begin. They are packed if row n of each begins equally
// far behind a multiple of a pack, for every n.
class Alignment {
 public:
  explicit Alignment(DataType dtype)
      : size_(dtype == DataType::kFloat64   ? 8
              : dtype == DataType::kFloat32 ? 4
                                            : 2) {}

  // data null: there is no such matrix.
  void add(const void* data, int64_t row_stride) {
    if (!data) return;
    const uint64_t begin = reinterpret_cast<uintptr_t>(data);
    const uint64_t step = static_cast<uint64_t>(row_stride * size_);
    if (empty_) {
      begin_ = begin;
      step_ = step;
      empty_ = false;
    }
    differ_ |= (begin ^ begin_) | (step ^ step_);
    uneven_ |= begin | step;
  }
  void add(const Matrix& matrix) { add(matrix.data, matrix.row_stride); }

  // For rows of so many classes.
  template <typename Shape>
  Packing packing(int64_t classes) const {
    constexpr uint64_t kBytes = sizeof(Pack<typename Shape::Type, Shape::kWidth>);
    if (differ_ % kBytes != 0) return {false, 0};
    if (uneven_ % kBytes == 0) return {true, 0};
    constexpr int kSlack = Shape::kWidth - 1;
    const bool fits = Shape::kTiles == 0 || classes + kSlack <= Shape::kMaxClasses;
    return fits ? Packing{true, kSlack} : Packing{false, 0};
  }

 private:
  int64_t size_;  // of a value
  bool empty_ = true;
  uint64_t begin_ = 0, step_ = 0;     // of the first matrix, in bytes
  uint64_t differ_ = 0, uneven_ = 0;  // the bits that differ from it; those that are not 0
};

template <typename T>
BMTARD_DEVICE const T* row_of(const Matrix& matrix, int64_t row) {
  return static_cast<const T*>(matrix.data) + row * matrix.row_stride;
}

template <typename T>
BMTARD_DEVICE T at(const void* data, int64_t i) {
  return simt::load(static_cast<const T*>(data) + i);
}

template <typename T>
BMTARD_DEVICE void put(void* data, int64_t i, T value) {
  simt::store(static_cast<T*>(data) + i, value);
}

struct Add {
  template <typename V>
  BMTARD_DEVICE V operator()(V a, V b) const {
    return a + b;
  }
};

// Ignores a NaN in b.
struct Max {
  template <typename V>
  BMTARD_DEVICE V operator()(V a, V b) const {
    return b > a ? b : a;
  }
};

// Reductions over a block, in a fixed order. Every thread gets the same bits.
template <int threads>
class Block {
 public:
  template <typename V, int n, typename Combine>
  BMTARD_DEVICE void reduce(V (&values)[n], Combine combine) {
    constexpr int kWarps = threads / simt::kWarp;
    BMTARD_UNROLL
    for (int distance = simt::kWarp / 2; distance > 0; distance /= 2) {
      BMTARD_UNROLL
      for (int i = 0; i < n; ++i) {
        values[i] = combine(values[i], simt::shuffle_xor(simt::kFullWarp, values[i], distance));
      }
    }
    // Two buffers take turns, so that a barrier lies between two uses of the same one.
    BMTARD_SHARED(V, scratch, 2 * kWarps * n);
    turn_ ^= 1;
    const int base = turn_ * kWarps * n;
    const int thread = simt::thread_id();
    if (thread % simt::kWarp == 0) {
      BMTARD_UNROLL
      for (int i = 0; i < n; ++i) scratch.set(base + thread / simt::kWarp * n + i, values[i]);
    }
    simt::block_barrier();
    BMTARD_UNROLL
    for (int i = 0; i < n; ++i) {
      values[i] = scratch.get(base + i);
      BMTARD_UNROLL
      for (int warp = 1; warp < kWarps; ++warp) {
        values[i] = combine(values[i], scratch.get(base + warp * n + i));
      }
    }
  }

 private:
  int turn_ = 0;
};

// The threads that share a row.
template <typename Shape>
class Group {
 public:
  BMTARD_DEVICE explicit Group(Block<Shape::kThreads>& block)
      : lane(simt::thread_id() % Shape::kLanes), block_(block) {}

  // The block, or the cluster that takes its place.
  BMTARD_DEVICE static int block_id() {
    if constexpr (Shape::kSplit) return simt::block_id() / simt::cluster_blocks();
    return simt::block_id();
  }
  // The number of the group in its block, and in blocks that are numbered from 0.
  BMTARD_DEVICE static int number() { return simt::thread_id() / Shape::kLanes; }
  BMTARD_DEVICE static int64_t number(int block) {
    return static_cast<int64_t>(block) * Shape::kRows + number();
  }

  // Whether this thread writes what the group has found.
  BMTARD_DEVICE bool leads() const {
    if constexpr (Shape::kSplit) return lane == 0 && simt::cluster_rank() == 0;
    return lane == 0;
  }

  // Call it after the last reduction. It waits for the blocks that still read from this one.
  BMTARD_DEVICE void leave() const {
    if constexpr (Shape::kSplit) {
      if (simt::cluster_blocks() > 1) simt::cluster_barrier();
    }
  }

  template <typename V, int n, typename Combine>
  BMTARD_DEVICE void reduce(V (&values)[n], Combine combine) {
    if constexpr (Shape::kLanes > simt::kWarp) {
      block_.reduce(values, combine);
      if constexpr (Shape::kSplit) {
        if (simt::cluster_blocks() > 1) reduce_over_cluster(values, combine);
      }
    } else {
      const int first = simt::thread_id() % simt::kWarp / Shape::kLanes * Shape::kLanes;
      const uint32_t mask = (simt::kFullWarp >> (simt::kWarp - Shape::kLanes)) << first;
      BMTARD_UNROLL
      for (int distance = Shape::kLanes / 2; distance > 0; distance /= 2) {
        BMTARD_UNROLL
        for (int i = 0; i < n; ++i) {
          values[i] = combine(values[i], simt::shuffle_xor(mask, values[i], distance));
        }
      }
    }
  }

  template <typename V, int n>
  BMTARD_DEVICE void sum(V (&values)[n]) {
    reduce(values, Add{});
  }

  template <typename V>
  BMTARD_DEVICE V max(V value) {
    V values[1] = {value};
    reduce(values, Max{});
    return values[0];
  }

  const int lane;

 private:
  template <typename V, int n, typename Combine>
  BMTARD_DEVICE void reduce_over_cluster(V (&values)[n], Combine combine) {
    // Two buffers take turns, as in Block.
    BMTARD_SHARED(V, scratch, 2 * n);
    turn_ ^= 1;
    if (simt::thread_id() == 0) {
      BMTARD_UNROLL
      for (int i = 0; i < n; ++i) scratch.set(turn_ * n + i, values[i]);
    }
    simt::cluster_barrier();
    BMTARD_UNROLL
    for (int i = 0; i < n; ++i) {
      values[i] = scratch.get_from(0, turn_ * n + i);
      for (int rank = 1; rank < simt::cluster_blocks(); ++rank) {
        values[i] = combine(values[i], scratch.get_from(rank, turn_ * n + i));
      }
    }
  }

  Block<Shape::kThreads>& block_;
  int turn_ = 0;
};

template <typename Shape>
struct Tile {
  Real<typename Shape::Type> value[Shape::kWidth];
};

// The tiles of a row, as a thread sees them.
struct Window {
  int classes;
  int span;   // of all tiles, whatever the row: classes and slack
  int first;  // the class of the thread's first value in tile 0; negative: before the row
  bool packed;
};

// The values between a pack's boundary and the one that follows it.
template <typename Shape>
BMTARD_DEVICE int head_of(const typename Shape::Type* data) {
  using T = typename Shape::Type;
  return static_cast<int>(reinterpret_cast<uintptr_t>(data) / sizeof(T)) & (Shape::kWidth - 1);
}

template <typename Shape>
BMTARD_DEVICE Window window_of(const typename Shape::Type* row, int classes, int lane,
                               Packing packing) {
  const int first = packing.packed ? lane * Shape::kWidth - head_of<Shape>(row) : lane;
  return {classes, classes + packing.slack, first, packing.packed};
}

// The tiles of a row that is not in registers, and those of one of `blocks` blocks.
template <typename Shape>
BMTARD_DEVICE int tiles_of(int span, int blocks = 1) {
  return ((span + Shape::kSpan - 1) / Shape::kSpan + blocks - 1) / blocks;
}

// The first tile of this block.
template <typename Shape>
BMTARD_DEVICE int first_tile(int span) {
  if constexpr (Shape::kSplit) {
    return simt::cluster_rank() * tiles_of<Shape>(span, simt::cluster_blocks());
  }
  return 0;
}

// The tile behind the last one of this block.
template <typename Shape>
BMTARD_DEVICE int end_tile(int span) {
  const int all = tiles_of<Shape>(span);
  if constexpr (Shape::kSplit) {
    const int end = first_tile<Shape>(span) + tiles_of<Shape>(span, simt::cluster_blocks());
    return end < all ? end : all;
  }
  return all;
}

template <typename Shape, typename Visit>
BMTARD_DEVICE void for_each_tile(const Window& window, Visit visit) {
  if constexpr (Shape::kTiles > 0) {
    BMTARD_UNROLL
    for (int tile = 0; tile < Shape::kTiles; ++tile) {
      if (tile * Shape::kSpan < window.span) visit(tile);
    }
  } else {
    const int end = end_tile<Shape>(window.span);
    for (int tile = first_tile<Shape>(window.span); tile < end; ++tile) visit(tile);
  }
}

// The class of a thread's i-th value in a tile. It may lie before the row, or behind it.
template <typename Shape>
BMTARD_DEVICE int class_of(const Window& window, int tile, int i) {
  return tile * Shape::kSpan + window.first + (window.packed ? i : i * Shape::kLanes);
}

BMTARD_DEVICE bool in_row(const Window& window, int j) {
  return static_cast<unsigned>(j) < static_cast<unsigned>(window.classes);
}

// Whether all of a thread's values in a tile are the row's, and lie in a pack.
template <typename Shape>
BMTARD_DEVICE bool is_pack(const Window& window, int first) {
  return window.packed && first >= 0 && first + Shape::kWidth <= window.classes;
}

template <typename T>
constexpr bool kHalf = sizeof(T) == 2;

// A thread waits for a load where it uses a value of it, and to widen one is a use. So loads that
// are under way together stay as they lie in memory: halves two to a word, because nvcc takes a
// pack of anything smaller apart.
template <typename T>
using Word = std::conditional_t<kHalf<T>, uint32_t, T>;
template <typename T>
constexpr int kValues = static_cast<int>(sizeof(Word<T>) / sizeof(T));  // of a word

// A thread's values of a tile.
template <typename Shape>
using RawTile = Pack<Word<typename Shape::Type>, Shape::kWidth / kValues<typename Shape::Type>>;

// A class without weight.
template <typename T>
BMTARD_DEVICE T masked() {
  if constexpr (kHalf<T>) {
    return {std::is_same_v<T, BFloat16> ? uint16_t{0xff80} : uint16_t{0xfc00}};
  } else {
    return -std::numeric_limits<T>::infinity();
  }
}

// Outside the row: masked.
template <typename Shape>
BMTARD_DEVICE RawTile<Shape> fetch_tile(const typename Shape::Type* row, const Window& window,
                                        int tile) {
  using T = typename Shape::Type;
  RawTile<Shape> out;
  const int first = class_of<Shape>(window, tile, 0);
  if (is_pack<Shape>(window, first)) {
    out =
        simt::load_pack<Shape::kWidth / kValues<T>>(reinterpret_cast<const Word<T>*>(row + first));
  } else {
    BMTARD_UNROLL
    for (int i = 0; i < Shape::kWidth; ++i) {
      const int j = class_of<Shape>(window, tile, i);
      const T value = in_row(window, j) ? simt::load(row + j) : masked<T>();
      Word<T>& word = out.value[i / kValues<T>];
      if constexpr (kHalf<T>) {
        word = i % 2 == 0 ? value.bits : word | static_cast<uint32_t>(value.bits) << 16;
      } else {
        word = value;
      }
    }
  }
  return out;
}

template <typename Shape>
BMTARD_DEVICE Tile<Shape> widened(const RawTile<Shape>& raw) {
  using T = typename Shape::Type;
  Tile<Shape> out;
  BMTARD_UNROLL
  for (int i = 0; i < Shape::kWidth; ++i) {
    const Word<T> word = raw.value[i / kValues<T>];
    if constexpr (kHalf<T>) {
      out.value[i] = simt::widen(T{static_cast<uint16_t>(i % 2 == 0 ? word : word >> 16)});
    } else {
      out.value[i] = word;
    }
  }
  return out;
}

template <typename Shape>
BMTARD_DEVICE void store_tile(typename Shape::Type* row, const Window& window, int tile,
                              const Tile<Shape>& in) {
  using T = typename Shape::Type;
  const int first = class_of<Shape>(window, tile, 0);
  if (is_pack<Shape>(window, first)) {
    Pack<T, Shape::kWidth> pack;
    BMTARD_UNROLL
    for (int i = 0; i < Shape::kWidth; ++i) pack.value[i] = simt::narrow<T>(in.value[i]);
    simt::store_pack<Shape::kWidth>(row + first, pack);
  } else {
    BMTARD_UNROLL
    for (int i = 0; i < Shape::kWidth; ++i) {
      const int j = class_of<Shape>(window, tile, i);
      if (in_row(window, j)) simt::store(row + j, simt::narrow<T>(in.value[i]));
    }
  }
}

// The part of a flat buffer that block `number` takes. A part begins at a pack's boundary, except
// the first.
struct Chunk {
  int64_t first;
  int size;
};

template <typename Shape>
BMTARD_DEVICE Chunk chunk_of(const void* data, int64_t size, int64_t number, Packing packing) {
  const int head =
      packing.packed ? head_of<Shape>(static_cast<const typename Shape::Type*>(data)) : 0;
  const int64_t begin = number * Shape::kMaxClasses - head;
  const int64_t first = begin < 0 ? 0 : begin;
  const int64_t end = begin + Shape::kMaxClasses < size ? begin + Shape::kMaxClasses : size;
  return {first, end < first ? 0 : static_cast<int>(end - first)};
}

template <typename Shape>
int64_t chunks_of(int64_t size, Packing packing) {
  return ceil_divide(size + packing.slack, Shape::kMaxClasses);
}

// A row to read: in registers, or streamed from global memory at every pass.
template <typename Shape, bool kResident = (Shape::kTiles > 0)>
class Row;

// All loads are under way together.
template <typename Shape>
class Row<Shape, true> {
 public:
  BMTARD_DEVICE Row(const typename Shape::Type* row, const Window& window) {
    BMTARD_UNROLL
    for (int tile = 0; tile < Shape::kTiles; ++tile) {
      tiles_[tile] = fetch_tile<Shape>(row, window, tile);
    }
  }
  BMTARD_DEVICE RawTile<Shape> fetch(int tile) const { return tiles_[tile]; }
  BMTARD_DEVICE Tile<Shape> get(int tile) const { return widened<Shape>(fetch(tile)); }

 private:
  RawTile<Shape> tiles_[Shape::kTiles];
};

template <typename Shape>
class Row<Shape, false> {
 public:
  BMTARD_DEVICE Row(const typename Shape::Type* row, const Window& window)
      : row_(row), window_(window) {}
  BMTARD_DEVICE bool at_hand() const { return false; }
  BMTARD_DEVICE RawTile<Shape> fetch(int tile) const {
    return fetch_tile<Shape>(row_, window_, tile);
  }
  BMTARD_DEVICE Tile<Shape> get(int tile) const { return widened<Shape>(fetch(tile)); }

 private:
  const typename Shape::Type* row_;
  Window window_;
};

// Calls use(i, fetch(i)) for first <= i < end, and fetches `ahead` calls before. What is fetched
// takes the registers of what has been used: others would have to be moved, which is to wait.
template <int ahead, typename Fetch, typename Use>
BMTARD_DEVICE void for_each_ahead(int first, int end, Fetch fetch, Use use) {
  decltype(fetch(first)) fetched[ahead] = {};
  BMTARD_ROLLED
  for (int group = first - ahead; group < end; group += ahead) {
    BMTARD_UNROLL
    for (int slot = 0; slot < ahead; ++slot) {
      const int i = group + slot;
      if (i >= end) break;
      if (i >= first) use(i, fetched[slot]);
      if (i + ahead < end) fetched[slot] = fetch(i + ahead);
    }
  }
}

template <typename Shape, int rows>
struct RawTiles {
  RawTile<Shape> of[rows];
};

// The tiles that are under way. 40 KB on a multiprocessor are 3 loads of each of 1024 threads, or 5
// of each of 512, which is what many registers leave.
constexpr int kAhead = 3;     // of a row for 1024 threads, of two rows for 512
constexpr int kFarAhead = 5;  // of a row for 512 threads

// Doubles serve tests. They do with one, as the code is there once for each tile.
template <typename T, int wanted>
constexpr int kAheadOf = sizeof(T) == sizeof(double) ? 1 : wanted;

// Calls visit(tile, values) for each tile, values[i] of rows[i].
template <typename Shape, int ahead = kAhead, typename RowType, int n, typename Visit>
BMTARD_DEVICE void for_each_values(const Window& window, const RowType* const (&rows)[n],
                                   Visit visit) {
  const auto fetch = [&](int tile) {
    RawTiles<Shape, n> raw;
    BMTARD_UNROLL
    for (int i = 0; i < n; ++i) raw.of[i] = rows[i]->fetch(tile);
    return raw;
  };
  const auto use = [&](int tile, const RawTiles<Shape, n>& raw) {
    Tile<Shape> values[n];
    BMTARD_UNROLL
    for (int i = 0; i < n; ++i) values[i] = widened<Shape>(raw.of[i]);
    visit(tile, values);
  };
  if constexpr (Shape::kTiles == 0) {
    bool at_hand = true;
    BMTARD_UNROLL
    for (int i = 0; i < n; ++i) at_hand = at_hand && rows[i]->at_hand();
    if (!at_hand) {
      for_each_ahead<kAheadOf<typename Shape::Type, ahead>>(
          first_tile<Shape>(window.span), end_tile<Shape>(window.span), fetch, use);
      return;
    }
  }
  for_each_tile<Shape>(window, [&](int tile) { use(tile, fetch(tile)); });
}

// What a CachedRow does: read global memory; copy the row to shared memory; use that copy.
enum class Cache { kNone, kFill, kFilled };

// A streamed row that may have a copy in shared memory. A thread reads back only what it wrote
// itself, so no barrier is needed.
template <typename Shape>
class CachedRow {
 public:
  using T = typename Shape::Type;

  // `offset`: of values in the dynamic shared memory.
  BMTARD_DEVICE CachedRow(const T* row, const Window& window, int lane, int offset, Cache cache)
      : row_(row),
        window_(window),
        cached_(cache != Cache::kNone),
        offset_((offset + lane * Shape::kWidth - first_tile<Shape>(window.span) * Shape::kSpan) /
                kValues<T>),
        memory_(simt::dynamic_shared<Word<T>>()) {
    if (cache != Cache::kFill) return;
    for_each_ahead<kFarAhead>(
        first_tile<Shape>(window.span), end_tile<Shape>(window.span),
        [&](int tile) { return fetch_tile<Shape>(row_, window_, tile); },
        [&](int tile, const RawTile<Shape>& raw) {
          memory_.template set_pack<kWords>(place(tile), raw);
        });
  }
  BMTARD_DEVICE bool at_hand() const { return cached_; }
  BMTARD_DEVICE RawTile<Shape> fetch(int tile) const {
    return cached_ ? memory_.template get_pack<kWords>(place(tile))
                   : fetch_tile<Shape>(row_, window_, tile);
  }
  BMTARD_DEVICE Tile<Shape> get(int tile) const { return widened<Shape>(fetch(tile)); }

 private:
  static constexpr int kWords = Shape::kWidth / kValues<T>;

  BMTARD_DEVICE int place(int tile) const { return offset_ + tile * (Shape::kSpan / kValues<T>); }

  const T* row_;
  Window window_;
  bool cached_;
  int offset_;  // of words
  simt::Shared<Word<T>> memory_;
};

// The number of values of a row that a block keeps in shared memory.
template <typename Shape>
BMTARD_DEVICE int cached_values(int span) {
  return tiles_of<Shape>(span, Shape::kSplit ? simt::cluster_blocks() : 1) * Shape::kSpan;
}

// Bytes of shared memory for `rows` rows of a block, of which `blocks` share each; 0 where a
// row is in registers.
template <typename Shape>
size_t cache_bytes(int64_t span, int64_t rows, int blocks = 1) {
  if (Shape::kTiles > 0) return 0;
  const int64_t tiles = ceil_divide(ceil_divide(span, Shape::kSpan), blocks);
  return static_cast<size_t>(rows * tiles * Shape::kSpan) * sizeof(typename Shape::Type);
}

inline int largest_cluster() {
  const int most = simt::device().max_cluster;
  const int64_t wanted = tuned("max_cluster", most);
  return wanted < most ? static_cast<int>(wanted) : most;
}

// Whether a block can have so much shared memory, beside the arrays that kernels declare.
inline bool fits_in_shared(size_t bytes) {
  constexpr size_t kOthers = 8 * 1024;
  return bytes + kOthers <= simt::device().max_shared_bytes;
}

// How a launch treats Large rows.
struct RowPlan {
  int split = 1;     // blocks that share a row
  size_t cache = 0;  // bytes of shared memory a block, for rows that are read again
};

// For `groups` groups, each with a row of `span` values, see Window. Each keeps `kept` rows in
// shared memory if they fit.
template <typename Shape>
RowPlan plan_rows(int64_t groups, int64_t span, int kept, int largest_split) {
  // More would leave a multiprocessor idle.
  const size_t worthwhile = static_cast<size_t>(tuned("cached_bytes", 96 * 1024));
  const int64_t fewest_tiles = tuned("split_tiles", 2);  // of a block
  RowPlan plan;
  const auto cached = [&](int split) {
    const size_t bytes = cache_bytes<Shape>(span, kept, split);
    return bytes <= worthwhile && fits_in_shared(bytes);
  };
  if constexpr (Shape::kSplit) {
    const int64_t idle = simt::device().multiprocessors;
    while (2 * plan.split <= largest_split &&
           ceil_divide(span, Shape::kSpan) >= 2 * plan.split * fewest_tiles &&
           (groups * plan.split < idle || !cached(plan.split))) {
      plan.split *= 2;
    }
  }
  if (cached(plan.split)) plan.cache = cache_bytes<Shape>(span, kept, plan.split);
  return plan;
}

// Calls start(grid, cached), which launches a group a row. A device that refuses the clusters, as a
// part of a device may, gets blocks by themselves.
template <typename Shape, typename Start>
int launch_rows(int64_t groups, int64_t span, int kept, Start start) {
  const auto attempt = [&](const RowPlan& plan) {
    return start(simt::Grid{groups * plan.split, Shape::kThreads, plan.cache, plan.split},
                 plan.cache > 0);
  };
  const RowPlan plan = plan_rows<Shape>(groups, span, kept, largest_cluster());
  const int error = attempt(plan);
  if (error == 0 || plan.split == 1) return error;
  return attempt(plan_rows<Shape>(groups, span, kept, 1));
}

template <typename Shape, typename RowType>
BMTARD_DEVICE Real<typename Shape::Type> row_max(const RowType& row, const Window& window,
                                                 Group<Shape>& group) {
  using R = Real<typename Shape::Type>;
  R max = -std::numeric_limits<R>::infinity();
  for_each_values<Shape>(window, {&row}, [&](int, const auto& tiles) {
    const auto& [values] = tiles;
    BMTARD_UNROLL
    for (int i = 0; i < Shape::kWidth; ++i) max = Max{}(max, values.value[i]);
  });
  return group.max(max);
}

template <typename Shape, typename R>
BMTARD_DEVICE void sum_over(Group<Shape>& group, EntropySums<R>& sums) {
  R values[2] = {sums.s0, sums.s1};
  group.sum(values);
  sums = {values[0], values[1]};
}

template <typename Shape, typename R>
BMTARD_DEVICE void sum_over(Group<Shape>& group, EntropyMoments<R>& sums) {
  R values[4] = {sums.s0, sums.s1, sums.s2, sums.s3};
  group.sum(values);
  sums = {values[0], values[1], values[2], values[3]};
}

struct Ignore {
  template <typename R>
  BMTARD_DEVICE void operator()(R) const {}
};

// The sums of u = (z - max) / temperature over a row whose maximum is known. Here and below,
// each thread passes its values to `observe`.
template <typename Sums, typename Shape, typename RowType, typename R, typename Observe = Ignore>
BMTARD_DEVICE Sums sums_below(const RowType& row, const Window& window, R max,
                              R inverse_temperature, Group<Shape>& group, Observe observe = {}) {
  Sums sums{};
  for_each_values<Shape>(window, {&row}, [&](int, const auto& tiles) {
    const auto& [values] = tiles;
    BMTARD_UNROLL
    for (int i = 0; i < Shape::kWidth; ++i) {
      observe(values.value[i]);
      accumulate(sums, (values.value[i] - max) * inverse_temperature);
    }
  });
  sum_over(group, sums);
  return sums;
}

// The same sums and the maximum, in one pass over a row that is not in registers: each thread
// keeps its sums relative to the largest value so far.
template <typename Sums, typename Shape, int ahead, typename RowType, typename R,
          typename Observe = Ignore>
BMTARD_DEVICE Sums online_sums(const RowType& row, const Window& window, R inverse_temperature,
                               Group<Shape>& group, R& max, Observe observe = {}) {
  constexpr R kNothing = -std::numeric_limits<R>::infinity();
  Sums sums{};
  R seen = kNothing;
  for_each_values<Shape, ahead>(window, {&row}, [&](int, const auto& tiles) {
    const auto& [values] = tiles;
    R top = seen;
    BMTARD_UNROLL
    for (int i = 0; i < Shape::kWidth; ++i) top = Max{}(top, values.value[i]);
    if (top > seen) {
      sums = shifted(sums, (seen - top) * inverse_temperature);
      seen = top;
    }
    // As long as all values are masked, -inf - 0 keeps them masked.
    const R base = seen == kNothing ? R(0) : seen;
    BMTARD_UNROLL
    for (int i = 0; i < Shape::kWidth; ++i) {
      observe(values.value[i]);
      accumulate(sums, (values.value[i] - base) * inverse_temperature);
    }
  });
  max = group.max(seen);
  sums = shifted(sums, (seen - max) * inverse_temperature);
  sum_over(group, sums);
  return sums;
}

template <typename Sums, typename Shape, int ahead = kAhead, typename RowType, typename R,
          typename Observe = Ignore>
BMTARD_DEVICE Sums softmax_sums(const RowType& row, const Window& window, R inverse_temperature,
                                Group<Shape>& group, R& max, Observe observe = {}) {
  if constexpr (Shape::kTiles > 0) {
    max = row_max<Shape>(row, window, group);
    return sums_below<Sums, Shape>(row, window, max, inverse_temperature, group, observe);
  } else {
    return online_sums<Sums, Shape, ahead>(row, window, inverse_temperature, group, max, observe);
  }
}

// The sums behind a LogitRange: of 1, d and d^2, d = z - max.
template <typename R>
struct RangeSums {
  R count, first, second;
};

template <typename R>
BMTARD_DEVICE void accumulate(RangeSums<R>& sums, R d) {
  if (!(d > -std::numeric_limits<R>::infinity())) return;
  sums.count += 1;
  sums.first += d;
  sums.second += d * d;
}

template <typename R>
BMTARD_DEVICE RangeSums<R> shifted(RangeSums<R> sums, R d) {
  if (sums.count == R(0)) return sums;
  return {sums.count, sums.first + d * sums.count,
          sums.second + d * (2 * sums.first + d * sums.count)};
}

template <typename Shape, typename R>
BMTARD_DEVICE void sum_over(Group<Shape>& group, RangeSums<R>& sums) {
  R values[3] = {sums.count, sums.first, sums.second};
  group.sum(values);
  sums = {values[0], values[1], values[2]};
}

// See core/temperature_search.h.
template <typename Shape, int ahead = kAhead, typename RowType, typename R>
BMTARD_DEVICE LogitRange<R> logit_range(const RowType& row, const Window& window,
                                        Group<Shape>& group, R& max) {
  using std::log;
  const auto sums = softmax_sums<RangeSums<R>, Shape, ahead>(row, window, R(1), group, max);
  const R mean = sums.first / sums.count;
  return {log(sums.count), sums.second / sums.count - mean * mean};
}

}  // namespace cuda
}  // namespace bmtard
