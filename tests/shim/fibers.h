// Launches on the CPU.
#pragma once
#include <cstdint>
#include <functional>
#include <string>

namespace shim {

// Runs `body` for every thread of every block. `together` neighbouring blocks run at the same time
// and may form a cluster. schedule: 0 in order, else the seed of a random one. Returns what went
// wrong (a deadlock, threads of a warp at different operations, a bad read), or nothing.
std::string launch(int grid, int threads, int together, uint64_t schedule,
                   const std::function<void()>& body);

// Ends the launch with an error.
void fail(const std::string& why);

}  // namespace shim
