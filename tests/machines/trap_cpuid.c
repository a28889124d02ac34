// Audit library (rtld-audit(7)): where CPUID cannot fault, each CPUID of a library that is opened later becomes HLT.
//
// A process may not halt the processor, so that HLT faults as CPUID does under ARCH_SET_CPUID, with the same signal,
// and hide_cpu_features.c answers both. Libraries are changed as they are mapped, before their constructors run; the
// file stays as it is. CPUID's two bytes occur inside other instructions and in data too: objdump, run on what lies
// before each place from two beginnings, must find an instruction there both times. Objects that the program starts
// with (C's own library, the interpreter) are left alone.
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

enum { BEFORE = 96, SECOND = 91, SIZE = 128, MOST = 4096 };  // bytes before a place, of a piece; places of a library

static const unsigned char CPUID[] = {0x0f, 0xa2}, HALT[] = {0xf4, 0x90};
static int started;

static _Noreturn void fail(const char* what) {
    perror(what);
    _exit(97);
}

// The code before `at` from `begin` bytes on, as one of the pieces that objdump reads; no-ops end and divide them.
static void write_piece(int file, const unsigned char* from, const unsigned char* at, size_t begin) {
    unsigned char piece[SIZE];
    size_t room = (size_t)(at - from), count = begin < room ? begin : room;
    memset(piece, 0x90, sizeof piece);
    memcpy(piece + begin - count, at - count, count);
    memcpy(piece + begin, CPUID, sizeof CPUID);
    if (write(file, piece, sizeof piece) != (ssize_t)sizeof piece) fail("cannot write code for objdump");
}

// Marks in `found` which of `count` pieces have the instruction where it was looked for, at SIZE * piece + begin.
static void disassemble(int file, size_t count, unsigned char* found) {
    char path[32], line[256];
    int out[2], status;
    pid_t child;
    posix_spawn_file_actions_t actions;
    snprintf(path, sizeof path, "/proc/self/fd/%d", file);
    if (pipe(out) || posix_spawn_file_actions_init(&actions)) fail("cannot start objdump");
    posix_spawn_file_actions_adddup2(&actions, out[1], STDOUT_FILENO);
    posix_spawn_file_actions_addclose(&actions, out[0]);
    char* command[] = {"objdump", "-D", "-w", "--no-show-raw-insn", "-b", "binary", "-m", "i386:x86-64", path, NULL};
    char* environment[] = {"PATH=/usr/local/bin:/usr/bin:/bin", "LC_ALL=C", NULL};
    if (posix_spawnp(&child, *command, &actions, NULL, command, environment)) fail("cannot start objdump");
    close(out[1]);
    FILE* text = fdopen(out[0], "r");
    while (text && fgets(line, sizeof line, text)) {
        char* end;
        size_t address = strtoul(line, &end, 16), piece = address / SIZE, begin = piece % 2 ? SECOND : BEFORE;
        if (strstr(end, "cpuid") && piece < count && address % SIZE == begin) found[piece] = 1;
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
        write_piece(file, from, places[place], BEFORE);
        write_piece(file, from, places[place], SECOND);
    }
    memset(found, 0, sizeof found);
    disassemble(file, 2 * count, found);
    close(file);
    size_t page = (size_t)getpagesize();
    for (size_t place = 0; place < count; ++place) {
        if (!found[2 * place] || !found[2 * place + 1]) continue;
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
    if (!file || fread(&head, sizeof head, 1, file) != 1 || fseek(file, (long)head.e_shoff, SEEK_SET)) fail(map->l_name);
    for (int i = 0; i < head.e_shnum; ++i) {
        ElfW(Shdr) section;
        if (fread(&section, sizeof section, 1, file) != 1) fail(map->l_name);
        unsigned char* from = (unsigned char*)(map->l_addr + section.sh_addr);
        if (section.sh_type == SHT_PROGBITS && section.sh_flags & SHF_EXECINSTR) trap(from, from + section.sh_size);
    }
    fclose(file);
    return 0;
}
