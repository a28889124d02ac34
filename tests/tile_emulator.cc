// Computes AMX's tile instructions for processors that refuse them (Intel's manual, volume 2, "LDTILECFG" to "TILEZERO").
//
// Once `emulate_tiles` was called, a SIGILL at one of them is answered in the processor's place, from its very bytes, and
// what the processor would refuse ends the process. Any other SIGILL goes to the handler that stood before. Tiles are
// each thread's own. A processor that has tiles computes them itself, once the system lets it.
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <ucontext.h>
#include <unistd.h>

#include <initializer_list>

namespace {

struct Shapes {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
};
static_assert(sizeof(Shapes) == 64);

struct Thread {
    Shapes shapes;
    uint8_t tiles[8][16][64];
};
thread_local Thread mine;
struct sigaction before;

[[noreturn]] void refuse(const char* what) {
    const char start[] = "tiles: ", end[] = "\n";
    for (const char* part : {start, what, end}) {
        if (write(2, part, strlen(part)) < 0) break;
    }
    _exit(99);
}

void check_tile(int tile) {
    if (mine.shapes.palette != 1) refuse("used without a configuration");
    if (!mine.shapes.rows[tile] || !mine.shapes.row_bytes[tile]) refuse("used without a shape");
}

void configure(const uint8_t* from) {
    memcpy(&mine.shapes, from, sizeof mine.shapes);
    if (mine.shapes.palette > 1 || mine.shapes.start_row) refuse("an unknown palette, or a start within a tile");
    for (int i = 0; i < 16; ++i) {
        const int rows = mine.shapes.rows[i], bytes = mine.shapes.row_bytes[i];
        if (rows > 16 || bytes > 64 || !rows != !bytes || (i > 7 && rows)) refuse("a shape that there is not");
        if (i < 14 && mine.shapes.reserved[i]) refuse("a reserved byte that is not zero");
    }
    memset(mine.tiles, 0, sizeof mine.tiles);
}

// sums[m][n] += the products of four bytes each of values[m] and weights[.][n].
template <class Value, class Weight>
void multiply(int sums, int values, int weights) {
    for (int tile : {sums, values, weights}) check_tile(tile);
    const Shapes& shapes = mine.shapes;
    if (sums == values || sums == weights || values == weights) refuse("two operands in one tile");
    const int rows = shapes.rows[sums], columns = shapes.row_bytes[sums] / 4, depth = shapes.row_bytes[values] / 4;
    if (shapes.rows[values] != rows || shapes.row_bytes[weights] != 4 * columns || shapes.rows[weights] != depth ||
        shapes.row_bytes[values] % 4 || shapes.row_bytes[sums] % 4) {
        refuse("shapes that do not fit each other");
    }
    for (int m = 0; m < rows; ++m) {
        int32_t totals[16];
        memcpy(totals, mine.tiles[sums][m], sizeof totals);
        for (int k = 0; k < depth; ++k) {
            for (int n = 0; n < columns; ++n) {
                for (int b = 0; b < 4; ++b) {
                    totals[n] += static_cast<Value>(mine.tiles[values][m][4 * k + b]) *
                                 static_cast<Weight>(mine.tiles[weights][k][4 * n + b]);
                }
            }
        }
        memset(mine.tiles[sums][m], 0, sizeof totals);
        memcpy(mine.tiles[sums][m], totals, 4 * columns);
    }
}

constexpr int REGISTERS[] = {REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI,
                             REG_R8,  REG_R9,  REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15};

// An instruction after its prefix: the operands that ModRM, SIB and displacement name.
struct Operands {
    int mode, middle, low;
    int64_t base = 0, index = 0;  // of an address, the index scaled; the displacement is in the base
    const uint8_t* end;

    Operands(const uint8_t* at, uint8_t prefix, const gregset_t& values) {
        const int reg = 8 * !(prefix & 0x80), x = 8 * !(prefix & 0x40), b = 8 * !(prefix & 0x20);
        mode = *at >> 6, middle = (*at >> 3 & 7) + reg, low = *at & 7;
        ++at;
        if (mode == 3) {
            low += b;
            end = at;
            return;
        }
        int disp = mode == 1 ? 1 : mode == 2 ? 4 : 0;
        if (low == 4) {
            const int scale = *at >> 6, which = (*at >> 3 & 7) + x, from = *at & 7;
            ++at;
            if (which != 4) index = values[REGISTERS[which]] * (int64_t{1} << scale);
            if (from == 5 && mode == 0) {
                disp = 4;
            } else {
                base = values[REGISTERS[from + b]];
            }
        } else if (low == 5 && mode == 0) {
            disp = 4;
            base = reinterpret_cast<int64_t>(at + 4);  // of what follows the instruction
        } else {
            base = values[REGISTERS[low + b]];
        }
        int32_t moved = 0;
        if (disp == 1) moved = static_cast<int8_t>(*at);
        if (disp == 4) memcpy(&moved, at, 4);
        base += moved;
        end = at + disp;
    }

    uint8_t* row(int number) const { return reinterpret_cast<uint8_t*>(base + number * index); }
};

// Whether the instruction at the context's place is one of a tile's; then it is done and the place is after it.
bool computed(ucontext_t* context) {
    const gregset_t& registers = context->uc_mcontext.gregs;
    const auto* at = reinterpret_cast<const uint8_t*>(registers[REG_RIP]);
    // VEX of three bytes in the map 0F38, 128 bits, W 0
    if (at[0] != 0xc4 || (at[1] & 0x1f) != 2 || (at[2] & 0x84)) return false;
    enum { NONE, X66, XF3, XF2 };
    const int prefix = at[2] & 3, third = ~at[2] >> 3 & 15, code = at[3];
    if (code != 0x49 && code != 0x4b && code != 0x5e) return false;
    const Operands operands(at + 4, at[1], registers);
    const int tile = operands.middle;
    if (code == 0x5e) {
        if (operands.mode != 3) return false;
        if (prefix == NONE) multiply<uint8_t, uint8_t>(tile, operands.low, third);
        if (prefix == X66) multiply<uint8_t, int8_t>(tile, operands.low, third);
        if (prefix == XF3) multiply<int8_t, uint8_t>(tile, operands.low, third);
        if (prefix == XF2) multiply<int8_t, int8_t>(tile, operands.low, third);
    } else if (code == 0x4b) {
        if (operands.mode == 3) return false;
        check_tile(tile);
        const int rows = mine.shapes.rows[tile], bytes = mine.shapes.row_bytes[tile];
        if (prefix == XF3) {
            for (int i = 0; i < rows; ++i) memcpy(operands.row(i), mine.tiles[tile][i], bytes);
        } else {
            memset(mine.tiles[tile], 0, sizeof mine.tiles[tile]);
            for (int i = 0; i < rows; ++i) memcpy(mine.tiles[tile][i], operands.row(i), bytes);
        }
    } else if (operands.mode != 3 && prefix == NONE) {
        configure(operands.row(1));  // an index is part of this address
    } else if (operands.mode == 3 && prefix == NONE) {
        memset(&mine, 0, sizeof mine);
    } else if (operands.mode == 3 && prefix == XF2) {
        check_tile(tile);
        memset(mine.tiles[tile], 0, sizeof mine.tiles[tile]);
    } else {
        return false;
    }
    context->uc_mcontext.gregs[REG_RIP] = reinterpret_cast<int64_t>(operands.end);
    return true;
}

void answer(int number, siginfo_t* info, void* context) {
    if (computed(static_cast<ucontext_t*>(context))) return;
    sigaction(number, &before, nullptr);  // the instruction is refused again, to whom it concerns
    (void)info;
}

}  // namespace

// What select.cc asks the system for, in the place of syscall(2): refused only where nothing could be emulated, since a
// processor with tiles takes their shapes without it.
extern "C" long permit_tiles(long number, long code, long feature) {
    const long refused = syscall(number, code, feature);
    return __builtin_cpu_supports("amx-tile") ? refused : 0;
}

extern "C" int emulate_tiles() {
    struct sigaction ours {};
    ours.sa_sigaction = answer;
    ours.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
    return sigaction(SIGILL, &ours, &before);
}
