// How many threads a process may use to advantage. The parts take a root directory, "/" but in tests.
#pragma once

#include <filesystem>
#include <optional>

namespace osp {

// CPUs that the cgroups of this process grant it, for example 1.5: the least quota of its own cgroup and of those above,
// v2 (cpu.max) and v1 (cpu.cfs_quota_us over cpu.cfs_period_us). None where none sets a quota, which is so too where
// the files are not there, are not readable or hold something else: a limit that nobody states is not one.
// Expects cgroups where systemd and the container engines mount them, under `root`/sys/fs/cgroup.
std::optional<double> cgroup_cpus(const std::filesystem::path& root);

// `cpus`, cut to what the cgroups grant, rounded up; at least 1.
int threads_within_quota(int cpus, const std::filesystem::path& root);

}  // namespace osp
