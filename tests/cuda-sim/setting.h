// What the environment sets in a library of the machine made of software. With _OF_1 after its name, a setting is that of local rank 1.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

namespace sim {

inline std::string local_rank() {
    const char *rank = getenv("LOCAL_RANK");
    return rank ? rank : "0";
}
inline std::string setting(const std::string &name) {
    const char *value = getenv((name + "_OF_" + local_rank()).c_str());
    if (!value)
        value = getenv(name.c_str());
    return value ? value : "";
}
/// Whether a list (5,8) has a word.
inline bool lists(const std::string &list, const std::string &word) {
    return ("," + list + ",").find("," + word + ",") != std::string::npos;
}

/// A line of the log that CUDA_SIM_LOG names, if it does: the local rank, and what it does. Each is written at once, to the end.
inline void note(const std::string &what) {
    const std::string path = setting("CUDA_SIM_LOG");
    if (path.empty())
        return;
    FILE *log = fopen(path.c_str(), "a");
    if (!log || fprintf(log, "%s %s\n", local_rank().c_str(), what.c_str()) < 0 || fclose(log) != 0)
        abort();
}

} // namespace sim
