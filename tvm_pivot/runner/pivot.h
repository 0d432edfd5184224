/* Runs a network that tvm_pivot compiled, with nothing but C and POSIX threads.
 *
 *     pivot_network *net = pivot_open("./lib.so", 4);
 *     memcpy(pivot_input(net, 0)->data, image, pivot_bytes(pivot_input(net, 0)));
 *     if (net == NULL || pivot_run(net)) puts(pivot_error());
 *     float *scores = pivot_output(net, 0)->data;
 *
 * A network serves one caller at a time; several networks may run side by side. */
#ifndef PIVOT_H
#define PIVOT_H

#include <stddef.h>
#include <stdint.h>

typedef struct pivot_network pivot_network;

/* An array in row-major order. Its memory belongs to the network. */
typedef struct {
    void *data;
    int32_t ndim;
    const int64_t *shape;
    char kind; /* NumPy's letter: f, i, u or b */
    int32_t item_bytes;
} pivot_tensor;

/* Load a library that tvm_pivot exported, and `weights.bin` from beside it; `threads` counts the
 * caller, 0 means one for each core. NULL if that fails: see `pivot_error`. */
pivot_network *pivot_open(const char *library, int threads);

/* Compute the outputs from what is in the inputs. 0 if it went well. */
int pivot_run(pivot_network *net);

void pivot_close(pivot_network *net);

/* How many there are, and each of them: write to inputs, read outputs after `pivot_run`. */
int pivot_inputs(const pivot_network *net);
int pivot_outputs(const pivot_network *net);
const pivot_tensor *pivot_input(const pivot_network *net, int number);
const pivot_tensor *pivot_output(const pivot_network *net, int number);

size_t pivot_bytes(const pivot_tensor *tensor);

/* What went wrong last on this thread. */
const char *pivot_error(void);

#endif
