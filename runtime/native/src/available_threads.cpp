#include "available_threads.hpp"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <sstream>
#include <string>
#include <thread>
#include <vector>

#include "pool.hpp"

#ifdef __linux__
#include <sched.h>

#include <cerrno>
#endif

namespace osp {
namespace {

namespace fs = std::filesystem;

std::optional<double> cpus_of(double quota, double period) {
    if (quota > 0 && period > 0) return quota / period;
    return std::nullopt;
}

// "50000 100000", or "max 100000" where there is no quota.
std::optional<double> quota_v2(const fs::path& cgroup) {
    double quota = 0, period = 0;
    std::ifstream file(cgroup / "cpu.max");
    file >> quota >> period;
    return file ? cpus_of(quota, period) : std::nullopt;
}

// A quota of -1 is none.
std::optional<double> quota_v1(const fs::path& cgroup) {
    double quota = 0, period = 0;
    std::ifstream quota_file(cgroup / "cpu.cfs_quota_us"), period_file(cgroup / "cpu.cfs_period_us");
    quota_file >> quota;
    period_file >> period;
    return quota_file && period_file ? cpus_of(quota, period) : std::nullopt;
}

// The least quota from `mount`/`cgroup` up to `mount`. A container may see the path that its cgroup has outside, but
// have only its own part mounted: then the upper directories are there, and the lower ones are not.
template <typename Quota>
std::optional<double> least_quota(const fs::path& mount, fs::path cgroup, Quota quota_of) {
    std::optional<double> least;
    for (;; cgroup = cgroup.parent_path()) {
        if (const auto quota = quota_of(mount / cgroup)) least = std::min(*quota, least.value_or(*quota));
        if (cgroup.empty()) return least;
    }
}

bool lists_cpu(const std::string& controllers) {
    std::istringstream list(controllers);
    for (std::string name; std::getline(list, name, ',');) {
        if (name == "cpu") return true;
    }
    return false;
}

// CPUs in this thread's affinity mask; what the hardware has where there are no such masks.
int cpus_in_affinity_mask() {
#ifdef __linux__
    // The kernel refuses a mask that is shorter than its own with EINVAL.
    for (std::vector<cpu_set_t> mask(1); mask.size() <= 64; mask.resize(2 * mask.size())) {
        const std::size_t bytes = mask.size() * sizeof(cpu_set_t);
        if (sched_getaffinity(0, bytes, mask.data()) == 0) return CPU_COUNT_S(bytes, mask.data());
        if (errno != EINVAL) break;
    }
#endif
    return static_cast<int>(std::thread::hardware_concurrency());
}

}  // namespace

std::optional<double> cgroup_cpus(const fs::path& root) {
    const fs::path mounts = root / "sys/fs/cgroup";
    std::optional<double> least;
    const auto consider = [&least](std::optional<double> quota) {
        if (quota) least = std::min(*quota, least.value_or(*quota));
    };
    // Lines such as "4:cpu,cpuacct:/user.slice" for v1 and "0::/user.slice/session-2.scope" for v2.
    std::ifstream file(root / "proc/self/cgroup");
    for (std::string id, controllers, path;
         std::getline(file, id, ':') && std::getline(file, controllers, ':') && std::getline(file, path);) {
        // Seen from within a cgroup namespace, a process outside of it lies at "/../…".
        const fs::path cgroup = fs::path(path).lexically_normal().relative_path();
        if (controllers.empty()) {
            consider(least_quota(mounts, cgroup, quota_v2));
            consider(least_quota(mounts / "unified", cgroup, quota_v2));
        } else if (lists_cpu(controllers)) {
            consider(least_quota(mounts / controllers, cgroup, quota_v1));
            consider(least_quota(mounts / "cpu", cgroup, quota_v1));
        }
    }
    return least;
}

int threads_within_quota(int cpus, const fs::path& root) {
    const double granted = std::min<double>(cpus, std::ceil(cgroup_cpus(root).value_or(cpus)));
    return std::max(1, static_cast<int>(granted));
}

int available_threads() { return threads_within_quota(cpus_in_affinity_mask(), "/"); }

}  // namespace osp
