// Preloaded library: the process and its children see a processor without the features that HIDDEN_CPU_FEATURES names.
//
// Linux can have each CPUID instruction fault (arch_prctl(2), ARCH_SET_CPUID). The handler answers in the processor's
// place and leaves out the hidden bits; all other code runs at its own speed. /proc/cpuinfo, opened by open(2), loses
// the same words. HIDDEN_CPU_FEATURES lists beginnings of Linux's names, separated by commas: avx512,avx_vnni,amx.
// What was hidden still works when it is used unasked: C's own library has chosen its functions before.
// Where CPUID cannot fault, trap_cpuid.c beside this has put HLT in its place (CPUID_IS_TRAPPED is set), which faults
// in the same way.
#define _GNU_SOURCE
#include <asm/prctl.h>
#include <cpuid.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <ucontext.h>
#include <unistd.h>

enum { EAX, EBX, ECX, EDX };

// Bits of leaf 7 that Linux names, with their subleaf (Intel's manual, volume 2A, CPUID).
static const struct {
    const char* name;
    unsigned subleaf, target, bit;
} FEATURES[] = {
    {"avx512f", 0, EBX, 16},           {"avx512dq", 0, EBX, 17},
    {"avx512ifma", 0, EBX, 21},        {"avx512cd", 0, EBX, 28},
    {"avx512bw", 0, EBX, 30},          {"avx512vl", 0, EBX, 31},
    {"avx512vbmi", 0, ECX, 1},         {"avx512_vbmi2", 0, ECX, 6},
    {"avx512_vnni", 0, ECX, 11},       {"avx512_bitalg", 0, ECX, 12},
    {"avx512_vpopcntdq", 0, ECX, 14},  {"avx512_4vnniw", 0, EDX, 2},
    {"avx512_4fmaps", 0, EDX, 3},      {"avx512_vp2intersect", 0, EDX, 8},
    {"avx512_fp16", 0, EDX, 23},       {"amx_bf16", 0, EDX, 22},
    {"amx_tile", 0, EDX, 24},          {"amx_int8", 0, EDX, 25},
    {"avx_vnni", 1, EAX, 4},           {"avx512_bf16", 1, EAX, 5},
    {"amx_fp16", 1, EAX, 21},          {"avx_vnni_int8", 1, EDX, 4},
    {"amx_complex", 1, EDX, 8},        {"avx_vnni_int16", 1, EDX, 10},
};

static char prefixes[256];
static int is_trapped;
static unsigned masks[2][4];
static struct sigaction others_handler;

// Looked up at first use: the constructors of other libraries may come before ours.
static int real_sigaction(int number, const struct sigaction* next, struct sigaction* before) {
    static int (*real)(int, const struct sigaction*, struct sigaction*);
    if (!real) real = dlsym(RTLD_NEXT, "sigaction");
    return real(number, next, before);
}

static int is_hidden(const char* name, size_t length) {
    for (const char* at = prefixes; *at;) {
        size_t size = strcspn(at, ",");
        if (size && size <= length && strncmp(name, at, size) == 0) return 1;
        at += size + (at[size] == ',');
    }
    return 0;
}

static void answer(int number, siginfo_t* info, void* context) {
    greg_t* registers = ((ucontext_t*)context)->uc_mcontext.gregs;
    const unsigned char* code = (const unsigned char*)registers[REG_RIP];
    // a page that cannot be read faults with another si_code, so that its code is not looked at
    if (info->si_code == SI_KERNEL && memcmp(code, is_trapped ? "\xf4\x90" : "\x0f\xa2", 2) == 0) {
        int kept = errno;
        unsigned leaf = (unsigned)registers[REG_RAX], subleaf = (unsigned)registers[REG_RCX], value[4];
        if (!is_trapped) syscall(SYS_arch_prctl, ARCH_SET_CPUID, 1);
        __cpuid_count(leaf, subleaf, value[EAX], value[EBX], value[ECX], value[EDX]);
        if (!is_trapped) syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0);
        for (int i = EAX; leaf == 7 && subleaf < 2 && i <= EDX; ++i) value[i] &= ~masks[subleaf][i];
        registers[REG_RAX] = value[EAX];
        registers[REG_RBX] = value[EBX];
        registers[REG_RCX] = value[ECX];
        registers[REG_RDX] = value[EDX];
        registers[REG_RIP] += 2;
        errno = kept;
    } else if (others_handler.sa_flags & SA_SIGINFO) {
        others_handler.sa_sigaction(number, info, context);
    } else if (others_handler.sa_handler != SIG_DFL && others_handler.sa_handler != SIG_IGN) {
        others_handler.sa_handler(number);
    } else {
        struct sigaction fatal = {.sa_handler = SIG_DFL};
        real_sigaction(number, &fatal, NULL);  // the instruction faults again, and for good
    }
}

// Others' handlers of SIGSEGV (pytest's faulthandler, TVM's) come after ours.
int sigaction(int number, const struct sigaction* next, struct sigaction* before) {
    if (number != SIGSEGV) return real_sigaction(number, next, before);
    if (before) *before = others_handler;
    if (next) others_handler = *next;
    return 0;
}

// C's own signal() does not come by the function above.
sighandler_t signal(int number, sighandler_t next) {
    struct sigaction wanted = {.sa_handler = next, .sa_flags = SA_RESTART}, before;
    return sigaction(number, &wanted, &before) ? SIG_ERR : before.sa_handler;
}

static int open_cpuinfo(void) {
    FILE* all = fopen("/proc/cpuinfo", "r");
    int file = memfd_create("cpuinfo", MFD_CLOEXEC);
    char* line = NULL;
    size_t room = 0;
    if (!all || file < 0) abort();
    while (getline(&line, &room, all) > 0) {
        for (char* at = line; *at;) {
            size_t word = strcspn(at, " \n"), space = strspn(at + word, " \n");
            if (!is_hidden(at, word)) dprintf(file, "%.*s", (int)(word + space), at);
            else if (at[word] == '\n') dprintf(file, "\n");
            at += word + space;
        }
    }
    free(line);
    fclose(all);
    lseek(file, 0, SEEK_SET);
    return file;
}

int open(const char* path, int flags, ...) {
    mode_t mode = 0;
    if (flags & (O_CREAT | O_TMPFILE)) {
        va_list rest;
        va_start(rest, flags);
        mode = va_arg(rest, mode_t);
        va_end(rest);
    }
    return strcmp(path, "/proc/cpuinfo") == 0 ? open_cpuinfo() : (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

int open64(const char* path, int flags, ...) __attribute__((alias("open")));

__attribute__((constructor)) static void hide(void) {
    const char* names = getenv("HIDDEN_CPU_FEATURES");
    if (names) strncpy(prefixes, names, sizeof prefixes - 1);
    for (size_t i = 0; i < sizeof FEATURES / sizeof *FEATURES; ++i)
        if (is_hidden(FEATURES[i].name, strlen(FEATURES[i].name)))
            masks[FEATURES[i].subleaf][FEATURES[i].target] |= 1u << FEATURES[i].bit;
    struct sigaction ours = {.sa_sigaction = answer, .sa_flags = SA_SIGINFO | SA_NODEFER};
    real_sigaction(SIGSEGV, &ours, NULL);
    is_trapped = getenv("CPUID_IS_TRAPPED") != NULL;
    if (!is_trapped && syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0)) {
        perror("this kernel or processor cannot have CPUID fault");
        _exit(97);
    }
}
