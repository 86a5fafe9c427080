// How many threads: made-up trees of /proc and /sys, and this process's own affinity mask.
#include "available_threads.hpp"

#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>
#include <string>

#include "expect.hpp"
#include "pool.hpp"

#ifdef __linux__
#include <sched.h>
#endif

namespace {

namespace fs = std::filesystem;

// A directory with these files, as long as it lives.
class Tree {
  public:
    explicit Tree(const std::map<std::string, std::string>& files) {
        std::string name = (fs::temp_directory_path() / "available_threads_XXXXXX").string();
        expect(mkdtemp(name.data()) != nullptr, "a directory can be made: " + name);
        root = name;
        for (const auto& [path, text] : files) {
            fs::create_directories((root / path).parent_path());
            std::ofstream(root / path) << text;
        }
    }
    ~Tree() { fs::remove_all(root); }
    Tree(const Tree&) = delete;
    Tree& operator=(const Tree&) = delete;

    fs::path root;
};

void expect_cpus(const std::string& what, const std::map<std::string, std::string>& files,
                 std::optional<double> expected) {
    const Tree tree(files);
    const auto found = osp::cgroup_cpus(tree.root);
    expect(found == expected, what + " (" + (found ? std::to_string(*found) : "none") + ")");
}

const std::string kMounts = "sys/fs/cgroup/";

void quotas_of_v2() {
    const std::string cgroup = "proc/self/cgroup", here = "0::/kubepods/pod7/main\n";
    expect_cpus("no files, no quota", {}, std::nullopt);
    expect_cpus("max is no quota", {{cgroup, here}, {kMounts + "kubepods/pod7/main/cpu.max", "max 100000\n"}},
                std::nullopt);
    expect_cpus("its own quota", {{cgroup, here}, {kMounts + "kubepods/pod7/main/cpu.max", "150000 100000\n"}}, 1.5);
    expect_cpus("the least of its own and those above",
                {{cgroup, here},
                 {kMounts + "kubepods/pod7/main/cpu.max", "400000 100000\n"},
                 {kMounts + "kubepods/pod7/cpu.max", "100000 50000\n"},
                 {kMounts + "kubepods/cpu.max", "max 100000\n"}},
                2.0);
    expect_cpus("a cgroup next to its own is not its own",
                {{cgroup, here}, {kMounts + "kubepods/pod8/cpu.max", "100000 100000\n"}}, std::nullopt);
    expect_cpus("a container that has only its own part mounted",
                {{cgroup, here}, {kMounts + "cpu.max", "300000 100000\n"}}, 3.0);
    expect_cpus("the root of a cgroup namespace", {{cgroup, "0::/\n"}, {kMounts + "cpu.max", "50000 100000\n"}}, 0.5);
    expect_cpus("a cgroup outside of the namespace",
                {{cgroup, "0::/../other\n"}, {kMounts + "other/cpu.max", "50000 100000\n"}}, 0.5);
    expect_cpus("beside v1", {{cgroup, "1:name=systemd:/\n0::/a\n"}, {kMounts + "unified/a/cpu.max", "25 100\n"}},
                0.25);
    expect_cpus("a colon in the path", {{cgroup, "0::/a:b\n"}, {kMounts + "a:b/cpu.max", "100 100\n"}}, 1.0);
    for (const std::string text : {"", "many 100000", "100000", "100000 0", "-1 100000", "0 100000"}) {
        expect_cpus("\"" + text + "\" is no quota", {{cgroup, here}, {kMounts + "kubepods/cpu.max", text}},
                    std::nullopt);
    }
}

void quotas_of_v1() {
    const std::string cgroup = "proc/self/cgroup", here = "5:cpuset:/x\n4:cpu,cpuacct:/docker/c1\n3:memory:/x\n";
    const auto quota = [](const std::string& directory, const std::string& quota_us) {
        return std::map<std::string, std::string>{{kMounts + directory + "/cpu.cfs_quota_us", quota_us},
                                                  {kMounts + directory + "/cpu.cfs_period_us", "100000\n"}};
    };
    const auto expect_quota = [&](const std::string& what, const std::string& directory, const std::string& quota_us,
                                  std::optional<double> expected) {
        auto files = quota(directory, quota_us);
        files[cgroup] = here;
        expect_cpus(what, files, expected);
    };
    expect_quota("v1: its own quota", "cpu,cpuacct/docker/c1", "250000\n", 2.5);
    expect_quota("v1: mounted under its short name", "cpu/docker/c1", "250000\n", 2.5);
    expect_quota("v1: the quota above", "cpu/docker", "100000\n", 1.0);
    expect_quota("v1: only its own part mounted", "cpu", "50000\n", 0.5);
    expect_quota("v1: -1 is no quota", "cpu/docker/c1", "-1\n", std::nullopt);
    expect_quota("v1: the cgroup of another controller", "cpu/x", "100000\n", std::nullopt);
    expect_cpus("v1: a quota without a period",
                {{cgroup, here}, {kMounts + "cpu/docker/c1/cpu.cfs_quota_us", "100000\n"}}, std::nullopt);
}

void threads_are_quotas_rounded_up() {
    const auto threads = [](int cpus, const std::string& cpu_max) {
        const Tree tree({{"proc/self/cgroup", "0::/\n"}, {kMounts + "cpu.max", cpu_max}});
        return osp::threads_within_quota(cpus, tree.root);
    };
    expect(threads(8, "max 100000") == 8, "without a quota, all CPUs");
    expect(threads(8, "150000 100000") == 2, "1.5 CPUs are 2 threads");
    expect(threads(8, "200000 100000") == 2, "2 CPUs are 2 threads");
    expect(threads(8, "1000 100000") == 1, "0.01 CPUs are 1 thread");
    expect(threads(2, "9999999999999 1") == 2, "no more threads than CPUs");
    expect(threads(0, "max 100000") == 1, "1 thread where the number of CPUs is not known");
}

#ifdef __linux__
void the_affinity_mask_is_respected() {
    cpu_set_t all, one;
    expect(sched_getaffinity(0, sizeof all, &all) == 0, "the affinity mask can be read");
    expect(osp::available_threads() <= CPU_COUNT(&all), "no more threads than CPUs in the mask");
    int cpu = 0;
    while (!CPU_ISSET(cpu, &all)) ++cpu;
    CPU_ZERO(&one);
    CPU_SET(cpu, &one);
    expect(sched_setaffinity(0, sizeof one, &one) == 0, "the affinity mask can be set");
    expect(osp::available_threads() == 1, "one thread on one CPU");
    expect(sched_setaffinity(0, sizeof all, &all) == 0, "the affinity mask can be set back");
    const int quota = osp::threads_within_quota(CPU_COUNT(&all), "/");
    expect(osp::available_threads() == quota, "all CPUs of the mask, within the quota");
}
#endif

}  // namespace

int main() {
    quotas_of_v2();
    quotas_of_v1();
    threads_are_quotas_rounded_up();
#ifdef __linux__
    the_affinity_mask_is_respected();
#endif
}
