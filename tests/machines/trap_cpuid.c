// Audit library (rtld-audit(7)): where CPUID cannot fault, each CPUID of a library that is opened later becomes HLT.
//
// A process may not halt the processor, so that HLT faults as CPUID does under ARCH_SET_CPUID, with the same signal,
// and hide_cpu_features.c answers both. Libraries are changed as they are mapped, before their constructors run; the
// file stays as it is. CPUID's two bytes occur inside other instructions and in tables amid code too: objdump, run on
// what lies around each place from two beginnings, must find the instruction there both times, nothing about it that is
// none, and EAX set before it. Objects that the program starts with (C's own library, the interpreter) are left alone.
#define _GNU_SOURCE
#include <elf.h>
#include <link.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

enum { BEFORE = 96, SECOND = 91, NEAR = 64, AFTER = 32, SIZE = 192 };  // bytes around a place, and of a piece
enum { MOST = 4096 };                                                  // places of a library
enum { CPUID_THERE = 1, EAX_SET = 2, NOT_CODE = 4 };                   // what is found in a piece

static const unsigned char CPUID[] = {0x0f, 0xa2}, HALT[] = {0xf4, 0x90};
static int started;

static _Noreturn void fail(const char* what) {
    perror(what);
    _exit(97);
}

// The code around `at`, from `begin` bytes before it on, as one of the pieces that objdump reads; no-ops divide them.
static void write_piece(int file, const unsigned char* from, const unsigned char* to, const unsigned char* at,
                        size_t begin) {
    unsigned char piece[SIZE];
    size_t before = (size_t)(at - from), after = (size_t)(to - at);
    if (before > begin) before = begin;
    if (after > sizeof CPUID + AFTER) after = sizeof CPUID + AFTER;
    memset(piece, 0x90, sizeof piece);
    memcpy(piece + begin - before, at - before, before + after);
    if (write(file, piece, sizeof piece) != (ssize_t)sizeof piece) fail("cannot write code for objdump");
}

static int ends_with(const char* line, const char* end) {
    size_t length = strcspn(line, "\n"), size = strlen(end);
    return length >= size && memcmp(line + length - size, end, size) == 0;
}

// Marks in `found` what there is in each of `count` pieces.
static void disassemble(int file, size_t count, unsigned char* found) {
    char path[32], line[256];
    int out[2], status;
    pid_t child;
    posix_spawn_file_actions_t actions;
    snprintf(path, sizeof path, "/proc/self/fd/%d", file);
    if (pipe(out) || posix_spawn_file_actions_init(&actions)) fail("cannot start objdump");
    posix_spawn_file_actions_adddup2(&actions, out[1], STDOUT_FILENO);
    posix_spawn_file_actions_addclose(&actions, out[0]);
    char* command[] = {"objdump", "-Dwz", "--no-show-raw-insn", "-b", "binary", "-m", "i386:x86-64", path, NULL};
    char* environment[] = {"PATH=/usr/local/bin:/usr/bin:/bin", "LC_ALL=C", NULL};
    if (posix_spawnp(&child, *command, &actions, NULL, command, environment)) fail("cannot start objdump");
    close(out[1]);
    FILE* text = fdopen(out[0], "r");
    while (text && fgets(line, sizeof line, text)) {
        char* end;
        size_t address = strtoul(line, &end, 16), piece = address / SIZE, at = address % SIZE;
        size_t begin = piece % 2 ? SECOND : BEFORE;
        if (*end != ':' || piece >= count || at + NEAR < begin) continue;  // a beginning may lie inside an instruction
        if (at == begin && strstr(end, "cpuid")) found[piece] |= CPUID_THERE;
        if (at < begin && (ends_with(end, "%eax") || ends_with(end, "%rax"))) found[piece] |= EAX_SET;
        if (strstr(end, "(bad)")) found[piece] |= NOT_CODE;
    }
    if (!text || fclose(text) || waitpid(child, &status, 0) != child || status) fail("objdump failed");
    posix_spawn_file_actions_destroy(&actions);
}

// Puts HALT in the place of each CPUID in the code from `from` to `to`.
static void trap(unsigned char* from, unsigned char* to) {
    static unsigned char* places[MOST];
    static unsigned char found[2 * MOST];
    size_t count = 0;
    for (unsigned char* at = from; (at = memmem(at, (size_t)(to - at), CPUID, sizeof CPUID)); at += sizeof CPUID) {
        if (count == MOST) fail("a library with too many places");
        places[count++] = at;
    }
    if (!count) return;
    int file = memfd_create("code", 0);
    for (size_t place = 0; place < count; ++place) {
        write_piece(file, from, to, places[place], BEFORE);
        write_piece(file, from, to, places[place], SECOND);
    }
    memset(found, 0, sizeof found);
    disassemble(file, 2 * count, found);
    close(file);
    size_t page = (size_t)getpagesize();
    for (size_t place = 0; place < count; ++place) {
        const int sure = CPUID_THERE | EAX_SET;
        if (found[2 * place] != sure || found[2 * place + 1] != sure) continue;
        unsigned char* begin = places[place] - (size_t)places[place] % page;
        size_t size = (size_t)(places[place] + sizeof HALT - begin);
        if (mprotect(begin, size, PROT_READ | PROT_WRITE | PROT_EXEC)) fail("mprotect");
        memcpy(places[place], HALT, sizeof HALT);
        if (mprotect(begin, size, PROT_READ | PROT_EXEC)) fail("mprotect");
    }
}

unsigned la_version(unsigned version) { return version < LAV_CURRENT ? version : LAV_CURRENT; }

void la_activity(uintptr_t* cookie, unsigned flag) {
    (void)cookie;
    if (flag == LA_ACT_CONSISTENT) started = 1;
}

unsigned la_objopen(struct link_map* map, Lmid_t space, uintptr_t* cookie) {
    (void)cookie;
    if (!started || space != LM_ID_BASE) return 0;
    // sections, of which only the file tells: an executable segment may have tables of symbols in it
    ElfW(Ehdr) head;
    FILE* file = fopen(map->l_name, "re");
    const int read = file && fread(&head, sizeof head, 1, file) == 1;
    if (!read || fseek(file, (long)head.e_shoff, SEEK_SET)) fail(map->l_name);
    for (int i = 0; i < head.e_shnum; ++i) {
        ElfW(Shdr) section;
        if (fread(&section, sizeof section, 1, file) != 1) fail(map->l_name);
        unsigned char* from = (unsigned char*)(map->l_addr + section.sh_addr);
        if (section.sh_type == SHT_PROGBITS && section.sh_flags & SHF_EXECINSTR) trap(from, from + section.sh_size);
    }
    fclose(file);
    return 0;
}
