/* Runs an exported network on arrays in .npy files.
 *
 *   run lib.so [options] input0.npy input1.npy ...
 *
 * writes output0.npy, output1.npy, ... Options:
 *   --out PREFIX   write PREFIX0.npy, ... instead
 *   --repeat N     run N times more, and print the shortest and the median time
 *   --threads N    threads to use; default: one for each core
 *   --raw          files hold nothing but numbers, and are called .bin */
#define _POSIX_C_SOURCE 200809L
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "pivot.h"

enum { HEADER = 4096 };

typedef struct {
    const char *module, *prefix;
    int repeat, threads, raw, inputs;
    char **files;
} Options;

static void stop(const char *format, ...) __attribute__((noreturn, format(printf, 1, 2)));

static void stop(const char *format, ...)
{
    va_list more;
    va_start(more, format);
    vfprintf(stderr, format, more);
    va_end(more);
    fputc('\n', stderr);
    exit(1);
}

/* A tensor's type and shape as the header of a .npy file says them: "'<f4'", "(1, 3,)". */
static void describe(const pivot_tensor *tensor, char *type, char *shape)
{
    char order = tensor->item_bytes == 1 ? '|' : '<';
    sprintf(type, "'%c%c%d'", order, tensor->kind, tensor->item_bytes);
    char *at = shape + sprintf(shape, "(");
    for (int i = 0; i < tensor->ndim; i++)
        at += sprintf(at, "%lld%s", (long long)tensor->shape[i], i + 1 < tensor->ndim ? ", " : "");
    sprintf(at, tensor->ndim == 1 ? ",)" : ")");
}

/* What follows a key in a header, or "". */
static const char *field(const char *header, const char *key)
{
    const char *at = strstr(header, key);
    if (at == NULL) return "";
    at += strlen(key);
    return at + strspn(at, " ");
}

/* Read what stands before the numbers, which must be of the tensor's type and shape. */
static void read_header(FILE *file, const char *path, const pivot_tensor *tensor)
{
    unsigned char start[10];
    static char header[HEADER], type[32], shape[HEADER];
    if (fread(start, 1, sizeof start, file) != sizeof start || memcmp(start, "\x93NUMPY\x01", 7))
        stop("%s is no .npy file", path);
    size_t length = start[8] | (size_t)start[9] << 8;
    if (length >= sizeof header) stop("%s has too long a header", path);
    if (fread(header, 1, length, file) != length) stop("%s is too short", path);
    header[length] = '\0';
    if (strncmp(field(header, "'fortran_order':"), "False", 5)) stop("%s is in Fortran order", path);
    describe(tensor, type, shape);
    const char *found = field(header, "'shape':");
    if (strncmp(field(header, "'descr':"), type, strlen(type)) ||
        strncmp(found, shape, strlen(shape)))
        stop("%s holds %.*s of type %.5s, the network takes %s of %s", path,
             (int)strcspn(found, ")") + 1, found, field(header, "'descr':"), shape, type);
}

static void load(const char *path, const pivot_tensor *tensor, int raw)
{
    FILE *file = fopen(path, "rb");
    if (file == NULL) stop("%s cannot be read", path);
    if (!raw) read_header(file, path, tensor);
    size_t bytes = pivot_bytes(tensor);
    if (fread(tensor->data, 1, bytes, file) != bytes) stop("%s is too short", path);
    if (fgetc(file) != EOF) stop("%s is too long", path);
    fclose(file);
}

static void save(const Options *options, int number, const pivot_tensor *tensor)
{
    static char path[HEADER], type[32], shape[HEADER], header[2 * HEADER];
    snprintf(path, sizeof path, "%s%d.%s", options->prefix, number, options->raw ? "bin" : "npy");
    FILE *file = fopen(path, "wb");
    if (file == NULL) stop("%s cannot be written", path);
    if (!options->raw) {
        describe(tensor, type, shape);
        int used = snprintf(header, sizeof header,
                            "{'descr': %s, 'fortran_order': False, 'shape': %s, }", type, shape);
        int length = (10 + used + 1 + 63) / 64 * 64 - 10;
        unsigned char start[10] = {0x93, 'N', 'U', 'M', 'P', 'Y', 1, 0};
        start[8] = (unsigned char)(length & 255), start[9] = (unsigned char)(length >> 8);
        fwrite(start, 1, sizeof start, file);
        fprintf(file, "%-*s\n", length - 1, header);
    }
    fwrite(tensor->data, 1, pivot_bytes(tensor), file);
    if (ferror(file) || fclose(file)) stop("%s cannot be written", path);
}

static int by_size(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void measure(pivot_network *net, int repeat)
{
    double *times = malloc((size_t)repeat * sizeof *times);
    if (times == NULL) stop("there is no memory");
    for (int i = 0; i < repeat; i++) {
        struct timespec began, ended;
        clock_gettime(CLOCK_MONOTONIC, &began);
        if (pivot_run(net)) stop("%s", pivot_error());
        clock_gettime(CLOCK_MONOTONIC, &ended);
        times[i] = 1e3 * (double)(ended.tv_sec - began.tv_sec) +
                   1e-6 * (double)(ended.tv_nsec - began.tv_nsec);
    }
    qsort(times, (size_t)repeat, sizeof *times, by_size);
    printf("shortest %.3f ms, median %.3f ms of %d\n", times[0], times[repeat / 2], repeat);
    free(times);
}

static int whole(const char *option, const char *text)
{
    char *end;
    long number = strtol(text, &end, 10);
    if (*end || end == text || number < 0 || number > 1000000) stop("%s %s: no such number", option, text);
    return (int)number;
}

static Options parse(int argc, char **argv)
{
    Options found = {.prefix = "output", .files = argv};
    for (int i = 1; i < argc; i++) {
        const char *word = argv[i];
        int takes_value = !strcmp(word, "--out") || !strcmp(word, "--repeat") || !strcmp(word, "--threads");
        if (takes_value && ++i == argc) stop("%s of what?", word);
        if (!strcmp(word, "--out")) found.prefix = argv[i];
        else if (!strcmp(word, "--repeat")) found.repeat = whole(word, argv[i]);
        else if (!strcmp(word, "--threads")) found.threads = whole(word, argv[i]);
        else if (!strcmp(word, "--raw")) found.raw = 1;
        else if (!strncmp(word, "--", 2)) stop("unknown option %s", word);
        else if (found.module == NULL) found.module = word;
        else found.files[found.inputs++] = argv[i];
    }
    if (found.module == NULL)
        stop("usage: run lib.so [--out PREFIX] [--repeat N] [--threads N] [--raw] input0.npy ...");
    return found;
}

/* The system's loader would look for a bare name in its own folders. */
static pivot_network *opened(const Options *options)
{
    static char path[HEADER];
    const char *here = strchr(options->module, '/') ? "" : "./";
    if (snprintf(path, sizeof path, "%s%s", here, options->module) >= HEADER) stop("too long a name");
    pivot_network *net = pivot_open(path, options->threads);
    if (net == NULL) stop("%s", pivot_error());
    return net;
}

int main(int argc, char **argv)
{
    Options options = parse(argc, argv);
    pivot_network *net = opened(&options);
    if (options.inputs != pivot_inputs(net))
        stop("the network takes %d inputs, not %d", pivot_inputs(net), options.inputs);
    for (int i = 0; i < options.inputs; i++) load(options.files[i], pivot_input(net, i), options.raw);
    if (pivot_run(net)) stop("%s", pivot_error());
    for (int i = 0; i < pivot_outputs(net); i++) save(&options, i, pivot_output(net, i));
    if (options.repeat) measure(net, options.repeat);
    pivot_close(net);
    return 0;
}
