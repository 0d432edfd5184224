/* What the files of this runtime share; users include pivot.h alone. */
#ifndef PIVOT_INTERNAL_H
#define PIVOT_INTERNAL_H

#include <setjmp.h>

#include "pivot.h"

/* DLPack's, as kernels take them. */
typedef struct {
    uint8_t code, bits;
    uint16_t lanes;
} Type;
typedef struct {
    void *data;
    struct {
        int32_t type, number;
    } device;
    int32_t ndim;
    Type type;
    const int64_t *shape;
    const int64_t *strides;
    uint64_t byte_offset;
} Tensor;

/* TVM's value of any type, and the numbers of types that matter here. */
typedef struct {
    int32_t type, zero;
    union {
        int64_t integer;
        void *pointer;
    } is;
} Value;
enum { INTEGER = 1, ELEMENT_TYPE = 5, TENSOR_POINTER = 7, TEXT = 65, SHAPE = 69, TENSOR = 70 };

typedef int (*Kernel)(void *self, const Value *arguments, int32_t count, Value *result);
typedef struct {
    Kernel kernel;
    const char *name;
    Value *arguments;
    int32_t count;
} Call;

/* What a register or a constant holds. */
typedef struct Thing {
    enum { NOTHING, IS_TENSOR, IS_MEMORY, IS_SHAPE, IS_TYPE, IS_NUMBER, IS_TUPLE } sort;
    Tensor *tensor;
    char *memory;
    int64_t *shape;
    struct Thing *parts; /* of a tuple */
    int64_t count;       /* bytes of memory, sizes of a shape, parts of a tuple, or a number */
    Type type;
} Thing;

/* One function of TVM's virtual machine; its first registers are its parameters. */
typedef struct {
    uint64_t first, last; /* of its instructions; `last` 0: there is none */
    uint64_t parameters, registers;
    uint64_t weights; /* parameters whose names begin with "w", as those of `bind` do */
} Function;

typedef struct pivot_pool pivot_pool;

struct pivot_network {
    void *library;
    pivot_pool *pool;
    struct Memory *memory; /* all there is to free */
    char **functions;
    Thing *constants, *registers;
    int64_t *places, *words; /* where instructions begin, and what they are made of */
    uint64_t function_count, constant_count, register_count, place_count, word_count;
    Function main, bind; /* `bind` gives `main` its last arguments */
    Thing *bound;
    Call *calls;
    int call_count, bound_count, inputs, outputs;
    pivot_tensor *input, *output;
    jmp_buf failed;
};

void pivot_fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
#define FAIL(net, ...) (pivot_fail(__VA_ARGS__), longjmp((net)->failed, 1))

/* Memory for whole vectors; NULL if there is none. */
void *pivot_allocate(size_t bytes);

/* What follows jumps to `failed` where it fails. Memory of zeros that lasts as long as the network: */
void *pivot_keep(pivot_network *net, uint64_t bytes);
void pivot_free_all(pivot_network *net);
/* A tensor; `data` NULL: with memory of its own. */
Tensor *pivot_new_tensor(pivot_network *net, int64_t ndim, const int64_t *shape, Type type, void *data);

/* Read the library's tables into the network. */
void pivot_read_tables(pivot_network *net);
/* Fill the first parameters of `bind` from the file of weights beside the library. */
void pivot_read_weights(pivot_network *net, const char *library);
/* Give a loaded library what its kernels call. */
void pivot_connect(pivot_network *net);

/* `count` threads with the caller; 0: one for each core. NULL if they cannot be had. */
pivot_pool *pivot_pool_start(int count);
void pivot_pool_end(pivot_pool *pool);
/* The pool that kernels called from this thread use. */
void pivot_pool_use(pivot_pool *pool);

#endif
