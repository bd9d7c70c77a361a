// The groups that the emulator knows: the grid, the block, the tile of a warp.
#pragma once

#include <cuda_runtime.h>

namespace cooperative_groups {

class grid_group {
 public:
  void sync() const { emu::grid_barrier(); }
  unsigned long long num_blocks() const {
    const uint3 g = emu::grid_dim();
    return 1ull * g.x * g.y * g.z;
  }
};
class thread_block {
 public:
  void sync() const { emu::block_barrier(); }
};
inline grid_group this_grid() { return {}; }
inline thread_block this_thread_block() { return {}; }

}  // namespace cooperative_groups
