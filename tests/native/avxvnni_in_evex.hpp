// The kernel for AVX-VNNI compiled with its instruction as AVX-512 encodes it: so it is tested where only that is there.
// Includes the kernel's source, as for the compiler options of avx2.cpp and AVX-512's VNNI on 256 bits.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)

#include <immintrin.h>

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512vl,avx512vnni")
// GCC does not tell the preprocessor of a target that a pragma chooses; and vectors shall not have 512 bits.
#undef __AVX512F__
#ifndef __AVX2__
#define __AVX2__ 1
#define __FMA__ 1
#endif
#define kAvxVnniKernel kAvxVnniKernelInEvex
#include "../../runtime/native/src/kernels/avxvnni.cpp"
#undef kAvxVnniKernel
#pragma GCC pop_options

#define OSP_AVXVNNI_IN_EVEX 1

#endif
