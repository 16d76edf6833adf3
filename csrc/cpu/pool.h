// The threads that the ops run on. Pieces are claimed one by one and the caller claims too, so
// nobody waits for a thread that the system has not scheduled: on a busy machine a call takes as
// long as the threads that do run need. (OpenMP deals pieces out beforehand and waits for all.)
#pragma once
#include <cstdint>
#include <functional>

namespace svdk {

// Runs task(0) ... task(count - 1), in any order, on at most `threads` threads, this one among
// them; on this one alone while another call is using the pool. The first exception comes out of
// here.
void run_in_pool(int64_t count, int threads, const std::function<void(int64_t)>& task);

}  // namespace svdk
