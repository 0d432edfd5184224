/* A QEMU plugin that counts how often each translated block of guest code runs.
 *
 *   qemu-aarch64 -plugin plugin.so,out=FILE[,l1=SIZE:WAYS:LINE,l2=SIZE:WAYS:LINE] PROGRAM ...
 *
 * FILE gets lines of text: "map START END OFFSET PATH" for each mapping that ran code, with the
 * host's addresses; "block VADDR COUNT MAP L1_MISSES L2_MISSES WORDS", WORDS in hexadecimal, MAP
 * counted from 0 or -1, and VADDR as an offset into the file of its map. The misses are those of
 * data in a cache with write allocation and least-recently-used replacement, 0 without l1 and l2.
 *
 * Counters are not atomic: the guest must do its work on one thread.
 */
#include <inttypes.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The part of version 1 of QEMU's plugin interface that is used: Debian ships no header of it. */
typedef uint64_t qemu_plugin_id_t;
typedef uint32_t qemu_plugin_meminfo_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
enum { INLINE_ADD_U64 = 0 };
enum { CB_NO_REGS = 0 };
enum { MEM_RW = 3 };
typedef void mem_callback(unsigned vcpu, qemu_plugin_meminfo_t info, uint64_t vaddr, void *data);
extern void qemu_plugin_register_vcpu_tb_trans_cb(
    qemu_plugin_id_t, void (*)(qemu_plugin_id_t, struct qemu_plugin_tb *));
extern void qemu_plugin_register_vcpu_tb_exec_inline(
    struct qemu_plugin_tb *, int op, void *counter, uint64_t by);
extern void qemu_plugin_register_vcpu_mem_cb(
    struct qemu_plugin_insn *, mem_callback *, int flags, int kinds, void *data);
extern void qemu_plugin_register_atexit_cb(
    qemu_plugin_id_t, void (*)(qemu_plugin_id_t, void *), void *data);
extern size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
extern uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *);
extern struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
extern const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);
extern void *qemu_plugin_insn_haddr(const struct qemu_plugin_insn *);

#define EXPORT __attribute__((visibility("default")))
EXPORT int qemu_plugin_version = 1;

typedef struct {
    uint64_t start, end, offset;
    char *path;
} map_t;

typedef struct block {
    uint64_t vaddr, place, count, misses[2];
    int map;
    size_t words;
    uint32_t *code;
    struct block *next;
} block_t;

typedef struct {
    uint64_t sets, ways, line, tick;
    uint64_t *tags, *ages;
} cache_t;

enum { BUCKETS = 1 << 16 };
static block_t *blocks[BUCKETS];
static map_t *maps;
static int map_count;
static cache_t caches[2];
static const char *out_path;

static void *checked(void *memory)
{
    if (!memory) {
        perror("arm_cost plugin");
        exit(1);
    }
    return memory;
}

/* Add the mapping of the host that holds an address; QEMU maps guest files as they are. */
static int read_map(uint64_t address)
{
    FILE *file = checked(fopen("/proc/self/maps", "r"));
    char line[8192], path[8192];
    int found = -1;
    while (found < 0 && fgets(line, sizeof line, file)) {
        map_t m = {0};
        path[0] = 0;
        sscanf(line, "%" SCNx64 "-%" SCNx64 " %*s %" SCNx64 " %*s %*s %8191[^\n]", &m.start,
               &m.end, &m.offset, path);
        if (path[0] == '/' && m.start <= address && address < m.end) {
            maps = checked(realloc(maps, (map_count + 1) * sizeof *maps));
            m.path = checked(strdup(path));
            maps[found = map_count++] = m;
        }
    }
    fclose(file);
    return found;
}

static int find_map(uint64_t address)
{
    for (int i = 0; i < map_count; i++) {
        if (maps[i].start <= address && address < maps[i].end) {
            return i;
        }
    }
    return read_map(address);
}

static bool same_code(const block_t *block, const struct qemu_plugin_tb *tb)
{
    if (block->words != qemu_plugin_tb_n_insns(tb)) {
        return false;
    }
    for (size_t i = 0; i < block->words; i++) {
        if (memcmp(block->code + i, qemu_plugin_insn_data(qemu_plugin_tb_get_insn(tb, i)), 4)) {
            return false;
        }
    }
    return true;
}

/* The counters of a block, the same ones if QEMU translates the same code again. */
static block_t *block_of(const struct qemu_plugin_tb *tb)
{
    uint64_t vaddr = qemu_plugin_tb_vaddr(tb);
    block_t **bucket = &blocks[(vaddr >> 2) % BUCKETS];
    for (block_t *b = *bucket; b; b = b->next) {
        if (b->vaddr == vaddr && same_code(b, tb)) {
            return b;
        }
    }
    block_t *b = checked(calloc(1, sizeof *b));
    b->vaddr = b->place = vaddr;
    b->words = qemu_plugin_tb_n_insns(tb);
    b->code = checked(calloc(b->words, 4));
    for (size_t i = 0; i < b->words; i++) {
        memcpy(b->code + i, qemu_plugin_insn_data(qemu_plugin_tb_get_insn(tb, i)), 4);
    }
    uint64_t host = (uintptr_t)qemu_plugin_insn_haddr(qemu_plugin_tb_get_insn(tb, 0));
    b->map = find_map(host);
    if (b->map >= 0) {
        b->place = host - maps[b->map].start + maps[b->map].offset;
    }
    b->next = *bucket;
    return *bucket = b;
}

static bool hit(cache_t *cache, uint64_t vaddr)
{
    uint64_t line = vaddr / cache->line + 1, first = line % cache->sets * cache->ways;
    uint64_t *tags = cache->tags + first, *ages = cache->ages + first, oldest = 0;
    cache->tick++;
    for (uint64_t i = 0; i < cache->ways; i++) {
        if (tags[i] == line) {
            ages[i] = cache->tick;
            return true;
        }
        if (ages[i] < ages[oldest]) {
            oldest = i;
        }
    }
    tags[oldest] = line;
    ages[oldest] = cache->tick;
    return false;
}

static void on_access(unsigned vcpu, qemu_plugin_meminfo_t info, uint64_t vaddr, void *data)
{
    block_t *block = data;
    (void)vcpu, (void)info;
    for (int level = 0; level < 2 && !hit(&caches[level], vaddr); level++) {
        block->misses[level]++;
    }
}

static void on_translation(qemu_plugin_id_t id, struct qemu_plugin_tb *tb)
{
    (void)id;
    block_t *block = block_of(tb);
    qemu_plugin_register_vcpu_tb_exec_inline(tb, INLINE_ADD_U64, &block->count, 1);
    for (size_t i = 0; caches[0].tags && i < block->words; i++) {
        struct qemu_plugin_insn *insn = qemu_plugin_tb_get_insn(tb, i);
        qemu_plugin_register_vcpu_mem_cb(insn, on_access, CB_NO_REGS, MEM_RW, block);
    }
}

static void on_exit_of_guest(qemu_plugin_id_t id, void *data)
{
    (void)id, (void)data;
    FILE *out = checked(fopen(out_path, "w"));
    for (int i = 0; i < map_count; i++) {
        fprintf(out, "map %" PRIx64 " %" PRIx64 " %" PRIx64 " %s\n", maps[i].start, maps[i].end,
                maps[i].offset, maps[i].path);
    }
    for (int i = 0; i < BUCKETS; i++) {
        for (block_t *b = blocks[i]; b; b = b->next) {
            if (!b->count) {
                continue;
            }
            fprintf(out, "block %" PRIx64 " %" PRIu64 " %d %" PRIu64 " %" PRIu64 " ", b->place,
                    b->count, b->map, b->misses[0], b->misses[1]);
            for (size_t w = 0; w < b->words; w++) {
                fprintf(out, "%08" PRIx32, b->code[w]);
            }
            fputc('\n', out);
        }
    }
    fclose(out);
}

static bool set_cache(cache_t *cache, const char *text)
{
    uint64_t size;
    if (sscanf(text, "%" SCNu64 ":%" SCNu64 ":%" SCNu64, &size, &cache->ways, &cache->line) != 3) {
        return false;
    }
    cache->sets = size / cache->ways / cache->line;
    cache->tags = checked(calloc(cache->sets * cache->ways, 8));
    cache->ages = checked(calloc(cache->sets * cache->ways, 8));
    return true;
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const void *info, int argc, char **argv)
{
    (void)info;
    bool fine = true;
    for (int i = 0; i < argc; i++) {
        if (!strncmp(argv[i], "out=", 4)) {
            out_path = checked(strdup(argv[i] + 4));
        } else if (!strncmp(argv[i], "l1=", 3)) {
            fine &= set_cache(&caches[0], argv[i] + 3);
        } else if (!strncmp(argv[i], "l2=", 3)) {
            fine &= set_cache(&caches[1], argv[i] + 3);
        }
    }
    if (!fine || !out_path || !caches[0].tags != !caches[1].tags) {
        fputs("arm_cost plugin: out=FILE, and both or neither of l1= and l2=\n", stderr);
        return 1;
    }
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_translation);
    qemu_plugin_register_atexit_cb(id, on_exit_of_guest, NULL);
    return 0;
}
