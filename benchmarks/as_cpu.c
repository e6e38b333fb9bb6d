/* Loaded before all else (LD_PRELOAD): CPUID answers without the instructions that AS_CPU leaves out.
 *
 * Runtimes choose their kernels by CPUID alone. Linux lets a thread have CPUID fault, where the processor can
 * (`cpuid_fault` in /proc/cpuinfo); threads inherit that. The fault is answered with what the processor says,
 * some bits of leaf 7 cleared: what is left out is not asked for again, and everything else runs as it is.
 */

#define _GNU_SOURCE
#include <asm/prctl.h>
#include <cpuid.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

#define BIT(n) (1u << (n))

static int wide; /* whether AVX-512 stays */

/* Leaf 7 without VNNI, AMX and what came later; unless wide without any of AVX-512. */
static void leave_out(unsigned sub, unsigned *a, unsigned *b, unsigned *c, unsigned *d)
{
    if (sub == 1) {
        *a &= ~(BIT(4) | BIT(5));           /* AVX-VNNI, AVX512-BF16 */
        *d &= ~(BIT(4) | BIT(10) | BIT(19)); /* AVX-VNNI-INT8, AVX-VNNI-INT16, AVX10 */
        return;
    }
    if (sub != 0)
        return;
    *c &= ~BIT(11);                                   /* AVX512-VNNI */
    *d &= ~(BIT(22) | BIT(23) | BIT(24) | BIT(25));   /* AMX-BF16, AVX512-FP16, AMX-TILE, AMX-INT8 */
    if (wide)
        return;
    *b &= ~(BIT(16) | BIT(17) | BIT(21) | BIT(26) | BIT(27) | BIT(28) | BIT(30) | BIT(31));
    *c &= ~(BIT(1) | BIT(6) | BIT(12) | BIT(14));
    *d &= ~(BIT(2) | BIT(3) | BIT(8));
}

static void on_fault(int number, siginfo_t *info, void *context)
{
    greg_t *r = ((ucontext_t *)context)->uc_mcontext.gregs;
    const unsigned char *at = (const unsigned char *)r[REG_RIP];
    unsigned a, b, c, d;

    (void)info;
    if (at[0] != 0x0f || at[1] != 0xa2) { /* a fault of the program's own: it comes again, unhandled */
        signal(number, SIG_DFL);
        return;
    }
    syscall(SYS_arch_prctl, ARCH_SET_CPUID, 1L);
    __cpuid_count((unsigned)r[REG_RAX], (unsigned)r[REG_RCX], a, b, c, d);
    syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0L);
    if ((unsigned)r[REG_RAX] == 7)
        leave_out((unsigned)r[REG_RCX], &a, &b, &c, &d);
    r[REG_RAX] = a;
    r[REG_RBX] = b;
    r[REG_RCX] = c;
    r[REG_RDX] = d;
    r[REG_RIP] += 2;
}

__attribute__((constructor)) static void begin(void)
{
    const char *asked = getenv("AS_CPU");
    struct sigaction action = {0};

    if (!asked)
        return;
    wide = !strcmp(asked, "avx512");
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    if (sigaction(SIGSEGV, &action, NULL) || syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0L)) {
        perror("AS_CPU: CPUID cannot be made to fault here");
        _exit(97);
    }
}
