#include "kernels.hpp"

#include <stdexcept>
#include <string>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace osp {

extern const Kernel kPortableKernel;
#if defined(__x86_64__)
extern const Kernel kAvx512Kernel, kAvxVnniKernel, kAvx2Kernel;
#elif defined(__aarch64__)
extern const Kernel kDotprodKernel, kI8mmKernel;
#endif

namespace {

#if defined(__x86_64__)

// The compiler's own test also asks whether the system saves the registers (XGETBV).
bool has_avx2() {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

bool has_avxvnni() { return has_avx2() && __builtin_cpu_supports("avxvnni"); }

bool has_avx512vnni() {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}

#elif defined(__aarch64__)

#if defined(__linux__)
bool has_dotprod() { return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0; }
bool has_i8mm() { return has_dotprod() && (getauxval(AT_HWCAP2) & HWCAP2_I8MM) != 0; }
#elif defined(__APPLE__)
bool has_feature(const char* name) {
    int value = 0;
    std::size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}
bool has_dotprod() { return has_feature("hw.optional.arm.FEAT_DotProd"); }
bool has_i8mm() { return has_dotprod() && has_feature("hw.optional.arm.FEAT_I8MM"); }
#else
bool has_dotprod() { return false; }
bool has_i8mm() { return false; }
#endif

#endif

}  // namespace

std::vector<const Kernel*> available_kernels() {
    std::vector<const Kernel*> kernels;
#if defined(__x86_64__)
    if (has_avx512vnni()) kernels.push_back(&kAvx512Kernel);
    if (has_avxvnni()) kernels.push_back(&kAvxVnniKernel);
    if (has_avx2()) kernels.push_back(&kAvx2Kernel);
#elif defined(__aarch64__)
    if (has_i8mm()) kernels.push_back(&kI8mmKernel);
    if (has_dotprod()) kernels.push_back(&kDotprodKernel);
#endif
    kernels.push_back(&kPortableKernel);
    return kernels;
}

const Kernel& find_kernel(std::string_view name) {
    const std::vector<const Kernel*> kernels = available_kernels();
    if (name.empty()) return *kernels.front();
    std::string names;
    for (const Kernel* kernel : kernels) {
        if (kernel->name == name) return *kernel;
        names += (names.empty() ? "" : ", ") + std::string(kernel->name);
    }
    throw std::invalid_argument("no kernel \"" + std::string(name) + "\" runs on this processor; there are " + names);
}

}  // namespace osp
