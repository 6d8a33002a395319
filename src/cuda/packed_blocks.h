#pragma once

#include "math/fn.h"

// How packed sequences are cut into blocks.  Host and device compile this text.
namespace fovea::cuda {

/// Packed sequences in blocks of `size` rows or keys have so many slots, `total` rows or keys together, of which few
/// are empty.  Those of sequence b follow each other from `first_slot` on.
template <class Number>
FOVEA_FN constexpr Number packed_slots(Number total, Number size, Number batch) {
  return total / size + batch;
}
FOVEA_FN constexpr int first_slot(int begin, int size, int b) { return begin / size + b; }

/// Where a block is one of a packed sequence.
struct PackedBlock {
  int batch, block;

  /// Sequence b begins at begin(b) and ends at begin(b + 1).  Slots that are empty are past the end of one.
  template <class Begin>
  FOVEA_FN static constexpr PackedBlock of(const Begin& begin, int batch, int size, int slot) {
    const auto first = [&](int b) { return first_slot(begin(b), size, b); };
    int from = 0;
    for (int end = batch; end - from > 1;) {
      const int middle = (from + end) / 2;
      (first(middle) <= slot ? from : end) = middle;
    }
    return {from, slot < first(from) ? begin(batch) / size + 1 : slot - first(from)};
  }
};

}  // namespace fovea::cuda
