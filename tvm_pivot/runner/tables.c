/* Reads what TVM's virtual machine would execute: tables of functions, constants, instructions,
 * which are one block of data in the library, in the format of TVM 0.27; and the weights. */
#define _POSIX_C_SOURCE 200809L
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

static const uint64_t MAGIC = 0xD225DE2F4214151Eu;
enum { BYTECODE = 1, MOST_REGISTERS = 1 << 24, MOST_DIMENSIONS = 32 };

typedef struct Memory {
    struct Memory *next;
    void *data;
} Memory;

void *pivot_keep(pivot_network *net, uint64_t bytes)
{
    Memory *memory = malloc(sizeof *memory);
    void *data = memory && bytes < SIZE_MAX ? pivot_allocate((size_t)bytes) : NULL;
    if (data == NULL) {
        free(memory);
        FAIL(net, "there is no memory for %llu bytes", (unsigned long long)bytes);
    }
    *memory = (Memory){net->memory, data};
    net->memory = memory;
    return memset(data, 0, (size_t)bytes);
}

void pivot_free_all(pivot_network *net)
{
    while (net->memory != NULL) {
        Memory *memory = net->memory;
        net->memory = memory->next;
        free(memory->data);
        free(memory);
    }
}

Tensor *pivot_new_tensor(pivot_network *net, int64_t ndim, const int64_t *shape, Type type, void *data)
{
    Tensor *tensor = pivot_keep(net, sizeof *tensor);
    int64_t *strides = pivot_keep(net, (uint64_t)ndim * 8), step = 1;
    for (int64_t i = ndim; i-- > 0; step *= shape[i]) strides[i] = step;
    *tensor = (Tensor){data, {1, 0}, (int32_t)ndim, type, shape, strides, 0};
    if (data == NULL) tensor->data = pivot_keep(net, (uint64_t)step * ((type.bits + 7u) / 8u));
    return tensor;
}

typedef struct {
    pivot_network *net;
    const char *at;
    uint64_t left;
} Reader;

static const char *skip(Reader *from, uint64_t bytes)
{
    if (bytes > from->left) FAIL(from->net, "it is damaged");
    const char *data = from->at;
    from->at += bytes;
    from->left -= bytes;
    return data;
}

static int64_t get(Reader *from, size_t bytes)
{
    int64_t value = 0; /* every machine that this is for is little-endian */
    memcpy(&value, skip(from, bytes), bytes);
    return value;
}

/* How many items follow, of so many bytes at least. */
static uint64_t get_count(Reader *from, uint64_t item_bytes)
{
    uint64_t count = (uint64_t)get(from, 8);
    if (count > from->left / item_bytes) FAIL(from->net, "it is damaged");
    return count;
}

static char *get_text(Reader *from)
{
    uint64_t count = get_count(from, 1);
    char *text = pivot_keep(from->net, count + 1);
    memcpy(text, skip(from, count), (size_t)count);
    return text;
}

static int64_t *get_numbers(Reader *from, uint64_t count)
{
    const char *data = skip(from, 8 * count);
    return memcpy(pivot_keep(from->net, 8 * count), data, (size_t)(8 * count));
}

static Type get_type(Reader *from)
{
    Type type;
    memcpy(&type, skip(from, sizeof type), sizeof type);
    return type;
}

static Thing get_tensor(Reader *from)
{
    skip(from, 8 + 8 + 8); /* its own magic number, nothing, the device */
    int64_t ndim = get(from, 4);
    Type type = get_type(from);
    if (ndim > MOST_DIMENSIONS) FAIL(from->net, "it is damaged");
    int64_t *shape = get_numbers(from, (uint64_t)ndim);
    uint64_t bytes = get_count(from, 1);
    /* A copy: kernels load whole vectors, from where vectors begin. */
    void *data = memcpy(pivot_keep(from->net, bytes), skip(from, bytes), (size_t)bytes);
    Tensor *tensor = pivot_new_tensor(from->net, ndim, shape, type, data);
    return (Thing){.sort = IS_TENSOR, .tensor = tensor};
}

static Thing get_constant(Reader *from)
{
    int type = (int)get(from, 4);
    uint64_t count;
    switch (type) {
    case TENSOR:
        return get_tensor(from);
    case SHAPE:
        count = get_count(from, 8);
        return (Thing){.sort = IS_SHAPE, .count = (int64_t)count, .shape = get_numbers(from, count)};
    case ELEMENT_TYPE:
        return (Thing){.sort = IS_TYPE, .type = get_type(from)};
    case INTEGER:
        return (Thing){.sort = IS_NUMBER, .count = get(from, 8)};
    case TEXT:
        get_text(from);
        return (Thing){.sort = NOTHING};
    default:
        FAIL(from->net, "it has a constant of type %d: it needs TVM's runtime", type);
    }
}

static Function get_function(Reader *from)
{
    Function found = {0};
    found.first = (uint64_t)get(from, 8);
    found.last = (uint64_t)get(from, 8);
    found.parameters = (uint64_t)get(from, 8);
    found.registers = (uint64_t)get(from, 8);
    for (uint64_t left = get_count(from, 8); left; left--) found.weights += *get_text(from) == 'w';
    return found;
}

static void get_functions(Reader *from)
{
    pivot_network *net = from->net;
    net->function_count = get_count(from, 8);
    net->functions = pivot_keep(net, net->function_count * sizeof *net->functions);
    for (uint64_t i = 0; i < net->function_count; i++) {
        int kind = (int)get(from, 4);
        char *name = net->functions[i] = get_text(from);
        Function found = get_function(from);
        if (kind != BYTECODE) continue; /* the rest of it means nothing */
        if (found.parameters > found.registers || found.registers > MOST_REGISTERS)
            FAIL(net, "it is damaged");
        if (!strcmp(name, "main")) net->main = found;
        if (!strcmp(name, "bind")) net->bind = found;
    }
}

static void get_executable(Reader *from)
{
    pivot_network *net = from->net;
    if ((uint64_t)get(from, 8) != MAGIC) FAIL(net, "it was compiled by another TVM than 0.27");
    get_text(from); /* a version, which has not changed for years */
    get_functions(from);
    for (uint64_t left = get_count(from, 16); left; left--) { /* scopes of memory: GPUs have more */
        get(from, 8);
        get_text(from);
    }
    net->constant_count = get_count(from, 4);
    net->constants = pivot_keep(net, net->constant_count * sizeof *net->constants);
    for (uint64_t i = 0; i < net->constant_count; i++) net->constants[i] = get_constant(from);
    net->place_count = get_count(from, 8);
    net->places = get_numbers(from, net->place_count);
    net->word_count = get_count(from, 8);
    net->words = get_numbers(from, net->word_count);
}

void pivot_read_tables(pivot_network *net)
{
    const char *block = dlsym(net->library, "__tvm_ffi__library_bin");
    if (block == NULL) FAIL(net, "it has no network");
    uint64_t bytes;
    memcpy(&bytes, block, sizeof bytes);
    Reader from = {net, block + sizeof bytes, bytes};
    uint64_t modules = get_count(&from, 8);
    skip(&from, 8 * modules); /* the tree that the modules form */
    skip(&from, 8 * get_count(&from, 8));
    for (; modules > 1; modules--) {
        const char *kind = get_text(&from);
        if (!strcmp(kind, "_lib")) continue; /* stands for the library's own code */
        if (strcmp(kind, "relax.VMExecutable")) FAIL(net, "it needs TVM's runtime for %s", kind);
        uint64_t size = get_count(&from, 1);
        Reader inside = {net, skip(&from, size), size};
        get_executable(&inside);
    }
    if (net->words == NULL) FAIL(net, "it has no network");
}

/* One behind the other, each from the next multiple of 64 bytes on. */
static int fill_weights(const pivot_network *net, FILE *file)
{
    long end = 0;
    for (uint64_t i = 0; i < net->bind.weights; i++) {
        const Tensor *tensor = net->registers[i].tensor;
        size_t bytes = (tensor->type.bits + 7u) / 8u;
        for (int32_t d = 0; d < tensor->ndim; d++) bytes *= (size_t)tensor->shape[d];
        if (fseek(file, end, SEEK_SET) || fread(tensor->data, 1, bytes, file) != bytes) return -1;
        end += (long)((bytes + 63) / 64 * 64);
    }
    return fseek(file, 0, SEEK_END) || ftell(file) != end ? -1 : 0;
}

void pivot_read_weights(pivot_network *net, const char *library)
{
    const char *name = "weights.bin", *slash = strrchr(library, '/');
    size_t folder = slash ? (size_t)(slash - library) + 1 : 0;
    char *path = pivot_keep(net, folder + strlen(name) + 1);
    memcpy(path, library, folder);
    strcpy(path + folder, name);
    for (uint64_t i = 0; i < net->bind.weights; i++)
        if (i >= net->register_count || net->registers[i].sort != IS_TENSOR)
            FAIL(net, "it is damaged");
    FILE *file = fopen(path, "rb");
    if (file == NULL) FAIL(net, "%s cannot be read", path);
    int wrong = fill_weights(net, file);
    fclose(file);
    if (wrong) FAIL(net, "%s is not of this network", path);
}
