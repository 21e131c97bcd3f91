// Where a GPU is in a step, told to the host while nothing of the step has ended, and how long it computed for it
// (src/device/cuda/beacon.rs). One thread. `state` is the GPU's own: when the step began, since when it waits for a sum, how long it has
// waited, and its place. `told` is page-locked memory of the host: the place, and the time of each of the last steps, in nanoseconds. A
// place is the step's number times 65536, and 2 k + 1 while it waits for sum k (from 0), 2 k before that, 65535 when the step is done.

#include "cuda.cuh"

namespace {

enum State { BEGUN, SINCE, WAITED, PLACE };
enum What : uint32_t { STEP, WAITS, HAS_SUM, DONE };
constexpr uint64_t AT_END = 65535;
/// Steps whose times are kept.
constexpr uint64_t KEPT = 4;

} // namespace

KERNEL(1, beacon, uint64_t *state, volatile uint64_t *told, uint64_t step, uint32_t what) {
    const uint64_t now = nanoseconds();
    uint64_t place = state[PLACE];
    switch (what) {
    case STEP:
        state[BEGUN] = now;
        state[WAITED] = 0;
        place = step << 16;
        break;
    case WAITS:
        state[SINCE] = now;
        place++;
        break;
    case HAS_SUM:
        state[WAITED] += now - state[SINCE];
        place++;
        break;
    default:
        told[1 + (place >> 16) % KEPT] = now - state[BEGUN] - state[WAITED];
        place |= AT_END;
    }
    state[PLACE] = place;
    told[0] = place;
    __threadfence_system();
}
