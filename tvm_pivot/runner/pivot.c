/* Loads a compiled network and runs it; see pivot.h.
 *
 * The instructions in the library have no branches and know every shape, so `pivot_open` goes
 * through them once: it lays out memory and prepares the arguments of every kernel. A run calls the
 * kernels, one after the other. */
#define _POSIX_C_SOURCE 200809L
#include "pivot.h"

#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "internal.h"

enum { CALL = 1, RETURN = 2 };
enum { IN_REGISTER = 0, IMMEDIATE = 1, CONSTANT = 2 };
/* Numbers of registers from here on stand for nothing, or for the machine. */
static const int64_t SPECIAL = (int64_t)1 << 54;

/* One call instruction. */
typedef struct {
    pivot_network *net;
    int64_t result;
    const char *function;
    const int64_t *arguments;
    int64_t count;
} Step;

static Thing *register_of(pivot_network *net, int64_t number)
{
    if (number < 0 || (uint64_t)number >= net->register_count) FAIL(net, "it is damaged");
    return &net->registers[number];
}

static Thing argument(const Step *step, int64_t which)
{
    if (which >= step->count) FAIL(step->net, "%s lacks arguments", step->function);
    int64_t word = step->arguments[which], sort = word >> 56 & 0xFF;
    int64_t value = (int64_t)((uint64_t)word << 8) >> 8; /* the sign is that of 56 bits */
    if (sort == IMMEDIATE) return (Thing){.sort = IS_NUMBER, .count = value};
    if (sort == IN_REGISTER && value >= SPECIAL) return (Thing){.sort = NOTHING};
    if (sort == IN_REGISTER) return *register_of(step->net, value);
    if (sort != CONSTANT || value < 0 || (uint64_t)value >= step->net->constant_count)
        FAIL(step->net, "%s has an argument that needs TVM's runtime", step->function);
    return step->net->constants[value];
}

static Thing argument_of(const Step *step, int64_t which, int sort)
{
    Thing found = argument(step, which);
    if ((int)found.sort != sort) FAIL(step->net, "%s has unknown arguments", step->function);
    return found;
}

static uint64_t bytes_of(const Step *step, Thing shape, Type type)
{
    uint64_t bytes = (type.bits + 7u) / 8u;
    for (int64_t i = 0; i < shape.count; i++) {
        uint64_t size = (uint64_t)shape.shape[i];
        if (size && bytes > ((uint64_t)1 << 48) / size) FAIL(step->net, "it is damaged");
        bytes *= size;
    }
    return bytes;
}

static pivot_tensor seen_from_outside(pivot_network *net, Thing thing)
{
    if (thing.sort != IS_TENSOR) FAIL(net, "an output is no tensor");
    static const char kinds[] = {'i', 'u', 'f', 0, 0, 0, 'b'}; /* of DLPack's codes */
    const Tensor *t = thing.tensor;
    char kind = t->type.code < sizeof kinds ? kinds[t->type.code] : 0;
    if (!kind || t->type.bits % 8) FAIL(net, "it has numbers of an unknown type");
    return (pivot_tensor){t->data, t->ndim, t->shape, kind, t->type.bits / 8};
}

static Thing nothing(const Step *step)
{
    (void)step;
    return (Thing){.sort = NOTHING};
}

/* (tensor, rank, type, ...): what type an input has. */
static Thing check_type(const Step *step)
{
    Thing type = argument(step, 2);
    if (type.sort == IS_TYPE) register_of(step->net, step->arguments[0])->type = type.type;
    return nothing(step);
}

/* (tensor, memory, rank, code, size, code, size, ...): the shape of an input. */
static Thing check_shape(const Step *step)
{
    pivot_network *net = step->net;
    Thing *input = register_of(net, step->arguments[0]);
    int64_t rank = argument_of(step, 2, IS_NUMBER).count;
    if (input->sort != NOTHING || !input->type.bits) FAIL(net, "a shape is checked late");
    if (rank < 0 || rank > step->count) FAIL(net, "it is damaged");
    int64_t *shape = pivot_keep(net, (uint64_t)rank * 8);
    for (int64_t i = 0; i < rank; i++) {
        if (argument_of(step, 3 + 2 * i, IS_NUMBER).count) FAIL(net, "a size is not known");
        shape[i] = argument_of(step, 4 + 2 * i, IS_NUMBER).count;
    }
    input->tensor = pivot_new_tensor(net, rank, shape, input->type, NULL);
    input->sort = IS_TENSOR;
    if (input < net->registers + net->inputs)
        net->input[input - net->registers] = seen_from_outside(net, *input);
    return nothing(step);
}

/* (machine, shape, device, type, scope) */
static Thing get_memory(const Step *step)
{
    Thing shape = argument_of(step, 1, IS_SHAPE), type = argument_of(step, 3, IS_TYPE);
    uint64_t bytes = bytes_of(step, shape, type.type);
    char *memory = pivot_keep(step->net, bytes);
    return (Thing){.sort = IS_MEMORY, .memory = memory, .count = (int64_t)bytes};
}

/* (memory, offset, shape, type) */
static Thing make_tensor(const Step *step)
{
    Thing memory = argument_of(step, 0, IS_MEMORY), shape = argument_of(step, 2, IS_SHAPE);
    int64_t offset = argument_of(step, 1, IS_NUMBER).count;
    Type type = argument_of(step, 3, IS_TYPE).type;
    int64_t room = memory.count - offset;
    if (offset < 0 || room < 0 || bytes_of(step, shape, type) > (uint64_t)room)
        FAIL(step->net, "a tensor does not fit its memory");
    char *data = memory.memory + offset;
    Tensor *tensor = pivot_new_tensor(step->net, shape.count, shape.shape, type, data);
    return (Thing){.sort = IS_TENSOR, .tensor = tensor};
}

/* (tensor of bytes, shape, type, offset) */
static Thing view(const Step *step)
{
    Tensor *bytes = argument_of(step, 0, IS_TENSOR).tensor;
    Thing shape = argument_of(step, 1, IS_SHAPE), type = argument_of(step, 2, IS_TYPE);
    if (bytes->ndim != 1 || bytes->type.bits != 8 || argument_of(step, 3, IS_NUMBER).count ||
        bytes_of(step, shape, type.type) > (uint64_t)bytes->shape[0])
        FAIL(step->net, "a tensor does not fit its memory");
    Tensor *tensor =
        pivot_new_tensor(step->net, shape.count, shape.shape, type.type, bytes->data);
    return (Thing){.sort = IS_TENSOR, .tensor = tensor};
}

/* (main, ...): what `main` takes last */
static Thing bind(const Step *step)
{
    pivot_network *net = step->net;
    net->bound_count = step->count > 0 ? (int)step->count - 1 : 0;
    net->bound = pivot_keep(net, (uint64_t)net->bound_count * sizeof *net->bound);
    for (int i = 0; i < net->bound_count; i++) net->bound[i] = argument_of(step, i + 1, IS_TENSOR);
    return nothing(step);
}

/* (tensor, shape) */
static Thing reshape(const Step *step)
{
    Tensor *of = argument_of(step, 0, IS_TENSOR).tensor;
    Thing shape = argument_of(step, 1, IS_SHAPE);
    Tensor *tensor = pivot_new_tensor(step->net, shape.count, shape.shape, of->type, of->data);
    return (Thing){.sort = IS_TENSOR, .tensor = tensor};
}

/* (anything): another name for it */
static Thing same(const Step *step)
{
    return argument(step, 0);
}

static Thing make_tuple(const Step *step)
{
    Thing *parts = pivot_keep(step->net, (uint64_t)step->count * sizeof *parts);
    for (int64_t i = 0; i < step->count; i++) parts[i] = argument_of(step, i, IS_TENSOR);
    return (Thing){.sort = IS_TUPLE, .parts = parts, .count = step->count};
}

static const struct {
    const char *name;
    Thing (*plan)(const Step *step);
} BUILT_IN[] = {
    {"vm.builtin.check_tensor_info", check_type},
    {"vm.builtin.match_shape", check_shape},
    {"vm.builtin.alloc_storage", get_memory},
    {"vm.builtin.alloc_tensor", make_tensor},
    {"runtime.TVMTensorCreateView", view},
    {"vm.builtin.make_closure", bind},
    {"vm.builtin.reshape", reshape},
    {"vm.builtin.copy", same},
    {"vm.builtin.make_tuple", make_tuple},
    {"vm.builtin.null_value", nothing},
};

/* A kernel: it is called in every run, with the same arguments. */
static Thing plan_kernel(const Step *step)
{
    pivot_network *net = step->net;
    char symbol[512];
    snprintf(symbol, sizeof symbol, "__tvm_ffi_%s", step->function);
    void *found = dlsym(net->library, symbol);
    if (found == NULL) FAIL(net, "it needs TVM's runtime for %s", step->function);
    Call *call = &net->calls[net->call_count++];
    *call = (Call){.name = step->function, .count = (int32_t)step->count};
    memcpy(&call->kernel, &found, sizeof found); /* C has no cast from data to code */
    call->arguments = pivot_keep(net, (uint64_t)step->count * sizeof *call->arguments);
    for (int64_t i = 0; i < step->count; i++) {
        Thing given = argument(step, i);
        Value *value = &call->arguments[i];
        if (given.sort == IS_TENSOR)
            value->type = TENSOR_POINTER, value->is.pointer = given.tensor;
        else if (given.sort == IS_NUMBER)
            value->type = INTEGER, value->is.integer = given.count;
        else
            FAIL(net, "%s has an argument that needs TVM's runtime", step->function);
    }
    return nothing(step);
}

static void plan_call(pivot_network *net, const int64_t *words, uint64_t count)
{
    if (count < 4 || words[3] < 0 || (uint64_t)words[3] > count - 4) FAIL(net, "it is damaged");
    if (words[2] < 0 || (uint64_t)words[2] >= net->function_count) FAIL(net, "it is damaged");
    Step step = {net, words[1], net->functions[words[2]], words + 4, words[3]};
    Thing (*plan)(const Step *) = plan_kernel;
    for (size_t i = 0; i < sizeof BUILT_IN / sizeof *BUILT_IN; i++)
        if (!strcmp(step.function, BUILT_IN[i].name)) plan = BUILT_IN[i].plan;
    Thing result = plan(&step);
    if (step.result < SPECIAL) *register_of(net, step.result) = result;
}

static void plan_outputs(pivot_network *net, Thing result)
{
    Thing *parts = result.sort == IS_TUPLE ? result.parts : &result;
    net->outputs = result.sort == IS_TUPLE ? (int)result.count : 1;
    net->output = pivot_keep(net, (uint64_t)net->outputs * sizeof *net->output);
    for (int i = 0; i < net->outputs; i++) net->output[i] = seen_from_outside(net, parts[i]);
    for (int i = 0; i < net->inputs; i++)
        if (net->input[i].data == NULL) FAIL(net, "the shape of an input is not known");
}

/* Go through a function whose parameters are in the registers, and give what it returns. */
static Thing plan_function(pivot_network *net, const Function *function)
{
    for (uint64_t i = function->first; i < function->last && i < net->place_count; i++) {
        uint64_t at = (uint64_t)net->places[i];
        if (at + 2 > net->word_count) break;
        const int64_t *words = net->words + at;
        if (words[0] == RETURN)
            return words[1] < SPECIAL ? *register_of(net, words[1]) : (Thing){.sort = NOTHING};
        if (words[0] != CALL) FAIL(net, "it has branches, which need TVM's runtime");
        plan_call(net, words, net->word_count - at);
    }
    FAIL(net, "it is damaged");
}

static void new_registers(pivot_network *net, const Function *function)
{
    net->register_count = function->registers;
    net->registers = pivot_keep(net, function->registers * sizeof *net->registers);
}

static void plan(pivot_network *net, const char *library)
{
    net->calls = pivot_keep(net, net->place_count * sizeof *net->calls);
    if (net->bind.last) {
        new_registers(net, &net->bind);
        plan_function(net, &net->bind);
        pivot_read_weights(net, library);
    }
    new_registers(net, &net->main);
    net->inputs = (int)net->main.parameters - net->bound_count;
    if (net->inputs < 0) FAIL(net, "it is damaged");
    net->input = pivot_keep(net, (uint64_t)net->inputs * sizeof *net->input);
    for (int i = 0; i < net->bound_count; i++) net->registers[net->inputs + i] = net->bound[i];
    plan_outputs(net, plan_function(net, &net->main));
}

/* 0 if the loaded library can be used. */
static int prepare(pivot_network *net, const char *library)
{
    if (setjmp(net->failed)) {
        char why[400];
        snprintf(why, sizeof why, "%s", pivot_error());
        pivot_fail("%s cannot be used: %s", library, why);
        return -1;
    }
    pivot_read_tables(net);
    plan(net, library);
    pivot_connect(net);
    return 0;
}

pivot_network *pivot_open(const char *library, int threads)
{
    pivot_network *net = calloc(1, sizeof *net);
    if (net == NULL) {
        pivot_fail("there is no memory");
        return NULL;
    }
    net->library = dlopen(library, RTLD_NOW | RTLD_LOCAL);
    if (net->library == NULL) pivot_fail("%s", dlerror());
    else if (!prepare(net, library) && (net->pool = pivot_pool_start(threads))) return net;
    pivot_close(net);
    return NULL;
}

int pivot_run(pivot_network *net)
{
    pivot_fail("%s", "");
    pivot_pool_use(net->pool);
    for (int i = 0; i < net->call_count; i++) {
        const Call *call = &net->calls[i];
        Value result = {0};
        if (!call->kernel(NULL, call->arguments, call->count, &result)) continue;
        if (!*pivot_error()) pivot_fail("%s failed on another thread", call->name);
        return -1;
    }
    return 0;
}

void pivot_close(pivot_network *net)
{
    if (net == NULL) return;
    pivot_pool_end(net->pool);
    pivot_free_all(net);
    if (net->library != NULL) dlclose(net->library);
    free(net);
}

int pivot_inputs(const pivot_network *net)
{
    return net->inputs;
}

int pivot_outputs(const pivot_network *net)
{
    return net->outputs;
}

const pivot_tensor *pivot_input(const pivot_network *net, int number)
{
    return &net->input[number];
}

const pivot_tensor *pivot_output(const pivot_network *net, int number)
{
    return &net->output[number];
}

size_t pivot_bytes(const pivot_tensor *tensor)
{
    size_t bytes = (size_t)tensor->item_bytes;
    for (int i = 0; i < tensor->ndim; i++) bytes *= (size_t)tensor->shape[i];
    return bytes;
}
