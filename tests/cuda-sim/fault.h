// What goes wrong with a card while it works: CUDA_SIM_FAULT=WHAT@N, in processes that use GPU 0, or with " of G" after it, GPU G.
//
//   memory@N   the N-th allocation of a process is one too many
//   late@N     the N-th allocation after its first graph
//   launch@N   the N-th graph that a process launches is refused, and nothing else is
//   ecc@N      while the N-th graph runs a bit of memory is lost for good, which is noticed later
//   address@N  likewise a kernel of it reads where there is nothing
//   bus@N      from the N-th graph on the card does not answer any more (Xid 79)
//
// A k before N counts kernels that are launched one by one in place of graphs.
//
// If CUDA_SIM_FAULT_ONCE names a file, that happens once: the fault makes the file, and there is none where it is there already.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace sim {

/// CUresult
enum FaultResult {
    FINE = 0,
    FAULT_OUT_OF_MEMORY = 2,
    ECC_UNCORRECTABLE = 214,
    ILLEGAL_ADDRESS = 700,
    LAUNCH_OUT_OF_RESOURCES = 701,
    MISALIGNED_ADDRESS = 716,
    UNKNOWN = 999,
};

inline const char *text_of_fault(int result) {
    switch (result) {
    case FAULT_OUT_OF_MEMORY: return "out of memory";
    case ECC_UNCORRECTABLE: return "uncorrectable ECC error encountered";
    case ILLEGAL_ADDRESS: return "an illegal memory access was encountered";
    case MISALIGNED_ADDRESS: return "misaligned address";
    case LAUNCH_OUT_OF_RESOURCES: return "too many resources requested for launch";
    case UNKNOWN: return "unknown error";
    default: return nullptr;
    }
}

/// What the card's context has come to. cuGetErrorString's list, of ILLEGAL_ADDRESS and its like: "This leaves the process in an
/// inconsistent state and any further CUDA work will return the same error. To continue using CUDA, the process must be terminated and
/// relaunched."
inline int lost = FINE;

/// The GPU that this process uses.
inline int gpu = 0;

/// What is counted.
enum class Counted { Others, Kernels };

/// Whether this is the place at which `what` happens, of which this is number `number`.
inline bool is_fault(const char *what, unsigned long number, Counted counted = Counted::Others) {
    const char *said = getenv("CUDA_SIM_FAULT");
    if (!said)
        return false;
    char wanted[16];
    unsigned long at;
    int of = 0;
    const bool counts_kernels = strstr(said, "@k");
    if (sscanf(said, counts_kernels ? "%15[a-z]@k%lu of %d" : "%15[a-z]@%lu of %d", wanted, &at, &of) < 2) {
        fprintf(stderr, "CUDA_SIM_FAULT=%s: expected, for example, ecc@3 of 1\n", said);
        abort();
    }
    if (strcmp(wanted, what) || at != number || of != gpu || counts_kernels != (counted == Counted::Kernels))
        return false;
    const char *once = getenv("CUDA_SIM_FAULT_ONCE");
    FILE *mark = once ? fopen(once, "wx") : nullptr;
    if (mark)
        fclose(mark);
    return !once || mark;
}

/// Graphs and kernels that were launched so far.
inline unsigned long launched[2] = {};

/// An allocation is asked for.
inline int fault_of_allocation() {
    static unsigned long allocations = 0, late = 0;
    const bool is_late = launched[int(Counted::Others)] > 0 && is_fault("late", ++late);
    return is_fault("memory", ++allocations) || is_late ? FAULT_OUT_OF_MEMORY : FINE;
}

/// A graph or a kernel is to be launched. What it gives is the answer to that call; what comes later stands in `lost`.
inline int fault_of_launch(Counted counted) {
    const unsigned long number = ++launched[int(counted)];
    if (is_fault("launch", number, counted))
        return LAUNCH_OUT_OF_RESOURCES;
    if (is_fault("bus", number, counted))
        return lost = UNKNOWN;
    // Asynchronous: the call itself is well.
    if (is_fault("ecc", number, counted))
        lost = ECC_UNCORRECTABLE;
    if (is_fault("address", number, counted))
        lost = ILLEGAL_ADDRESS;
    return FINE;
}

} // namespace sim
