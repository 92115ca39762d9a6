// Rows whose loads are under way together. A thread waits for a load where it uses a value of it,
// and to widen one is a use. So it asks for several tiles as they lie in memory, and widens the
// first of them after that: all of a row that stays in registers, kAhead of one that is streamed.
#pragma once

#include "rows.cuh"

namespace bmtard {
namespace cuda {

// With three, no type has less than 40 KB in flight on a multiprocessor of sm_90; with four, the
// gradient needs registers that cost a block there.
constexpr int kAhead = 3;

// A thread's values of a tile of a half type: two to a word.
template <typename Shape>
struct HalfTile {
  Pack<uint32_t, Shape::kWidth / 2> words;
};

template <typename Shape>
constexpr bool kHalves = sizeof(typename Shape::Type) == 2;

// Other types have nothing to widen.
template <typename Shape>
using RawTile = std::conditional_t<kHalves<Shape>, HalfTile<Shape>, Tile<Shape>>;

// The bits of -inf, a class without weight.
template <typename T>
constexpr uint32_t kMasked = std::is_same_v<T, BFloat16> ? 0xff80 : 0xfc00;

// As load_tile, but not widened.
template <typename Shape>
BMTARD_DEVICE RawTile<Shape> fetch_tile(const typename Shape::Type* row, const Window& window,
                                        int tile) {
  if constexpr (kHalves<Shape>) {
    using T = typename Shape::Type;
    HalfTile<Shape> out;
    const int first = class_of<Shape>(window, tile, 0);
    if (is_pack<Shape>(window, first)) {
      out.words =
          simt::load_pack<Shape::kWidth / 2>(reinterpret_cast<const uint32_t*>(row + first));
    } else {
      BMTARD_UNROLL
      for (int i = 0; i < Shape::kWidth; ++i) {
        const int j = class_of<Shape>(window, tile, i);
        const uint32_t bits = in_row(window, j) ? simt::load(row + j).bits : kMasked<T>;
        uint32_t& word = out.words.value[i / 2];
        word = i % 2 == 0 ? bits : word | bits << 16;
      }
    }
    return out;
  } else {
    return load_tile<Shape>(row, window, tile);
  }
}

template <typename Shape>
BMTARD_DEVICE Tile<Shape> widened(const RawTile<Shape>& raw) {
  if constexpr (kHalves<Shape>) {
    using T = typename Shape::Type;
    Tile<Shape> out;
    BMTARD_UNROLL
    for (int i = 0; i < Shape::kWidth; ++i) {
      const uint32_t word = raw.words.value[i / 2];
      out.value[i] = simt::widen(T{static_cast<uint16_t>(i % 2 == 0 ? word : word >> 16)});
    }
    return out;
  } else {
    return raw;
  }
}

// As Row.
template <typename Shape, bool kResident = (Shape::kTiles > 0)>
class AheadRow;

template <typename Shape>
class AheadRow<Shape, true> {
 public:
  BMTARD_DEVICE AheadRow(const typename Shape::Type* row, const Window& window) {
    BMTARD_UNROLL
    for (int tile = 0; tile < Shape::kTiles; ++tile) {
      tiles_[tile] = fetch_tile<Shape>(row, window, tile);
    }
  }
  BMTARD_DEVICE Tile<Shape> get(int tile) const { return widened<Shape>(tiles_[tile]); }

  // Calls visit(tile, values) for each tile.
  template <typename Visit>
  BMTARD_DEVICE void for_each(const Window& window, Visit visit) const {
    for_each_tile<Shape>(window, [&](int tile) { visit(tile, get(tile)); });
  }

 private:
  RawTile<Shape> tiles_[Shape::kTiles];
};

template <typename Shape>
class AheadRow<Shape, false> {
 public:
  BMTARD_DEVICE AheadRow(const typename Shape::Type* row, const Window&) : row_(row) {}

  // The tile kAhead tiles behind takes the registers of one that has been widened, or used if there
  // is nothing to widen. Any earlier, it would need others, and be waited for when it is moved.
  template <typename Visit>
  BMTARD_DEVICE void for_each(const Window& window, Visit visit) const {
    static_assert(Shape::kSplit, "a block by itself is a cluster of one");
    const int all = tiles_of<Shape>(window.span);
    const int first = first_tile<Shape>(window.span);
    const int last = first + tiles_of<Shape>(window.span, simt::cluster_blocks());
    const int end = last < all ? last : all;
    RawTile<Shape> raw[kAhead] = {};
    BMTARD_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      if (first + i < end) raw[i] = fetch_tile<Shape>(row_, window, first + i);
    }
    BMTARD_ROLLED
    for (int group = first; group < end; group += kAhead) {
      BMTARD_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        const int tile = group + i;
        if (tile >= end) break;
        const auto replace = [&] {
          if (tile + kAhead < end) raw[i] = fetch_tile<Shape>(row_, window, tile + kAhead);
        };
        if constexpr (kHalves<Shape>) {
          const Tile<Shape> values = widened<Shape>(raw[i]);
          replace();
          visit(tile, values);
        } else {
          visit(tile, raw[i]);
          replace();
        }
      }
    }
  }

 private:
  const typename Shape::Type* row_;
};

// As softmax_sums.
template <typename Sums, typename Shape, typename R>
BMTARD_DEVICE Sums softmax_sums_ahead(const AheadRow<Shape>& row, const Window& window,
                                      R inverse_temperature, Group<Shape>& group, R& max) {
  if constexpr (Shape::kTiles > 0) {
    return softmax_sums<Sums, Shape>(row, window, inverse_temperature, group, max);
  } else {
    // As online_sums.
    constexpr R kNothing = -std::numeric_limits<R>::infinity();
    Sums sums{};
    R seen = kNothing;
    row.for_each(window, [&](int, const Tile<Shape>& values) {
      R top = seen;
      BMTARD_UNROLL
      for (int i = 0; i < Shape::kWidth; ++i) top = Max{}(top, values.value[i]);
      if (top > seen) {
        sums = shifted(sums, (seen - top) * inverse_temperature);
        seen = top;
      }
      const R base = seen == kNothing ? R(0) : seen;
      BMTARD_UNROLL
      for (int i = 0; i < Shape::kWidth; ++i) {
        accumulate(sums, (values.value[i] - base) * inverse_temperature);
      }
    });
    max = group.max(seen);
    sums = shifted(sums, (seen - max) * inverse_temperature);
    sum_over(group, sums);
    return sums;
  }
}

}  // namespace cuda
}  // namespace bmtard
