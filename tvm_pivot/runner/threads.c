/* What compiled kernels ask of a runtime: threads, memory for a moment, and where errors go. */
#define _POSIX_C_SOURCE 200809L
#include <dlfcn.h>
#include <pthread.h>
#include <sched.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "internal.h"

enum { ALIGNMENT = 64, MOST_THREADS = 64, BLOCKS = 16 };
/* A worker that found nothing to do so often sleeps; waking it costs more than a small kernel. */
enum { SPINS = 20000 };

static _Thread_local char message[512];

void pivot_fail(const char *format, ...)
{
    va_list more;
    va_start(more, format);
    vsnprintf(message, sizeof message, format, more);
    va_end(more);
}

const char *pivot_error(void)
{
    return message;
}

void *pivot_allocate(size_t bytes)
{
    void *data = NULL;
    return posix_memalign(&data, ALIGNMENT, bytes ? bytes : 1) ? NULL : data;
}

/* TVM's: what a task is told of its group, and a task. */
typedef struct {
    void *sync_handle;
    int32_t num_task;
} Group;
typedef int (*Task)(int id, Group *group, void *data);

typedef struct {
    pivot_pool *pool;
    int number;
    pthread_t thread;
} Worker;

struct pivot_pool {
    int threads, started;
    Worker workers[MOST_THREADS];
    pthread_mutex_t mutex;
    pthread_cond_t wake;
    atomic_uint round;   /* of the work at hand; workers wait for the next one */
    atomic_int left;     /* workers that have not done their part */
    atomic_int failed;
    int ending;
    Task task;
    Group group;
    void *data;
};

static _Thread_local pivot_pool *current;

void pivot_pool_use(pivot_pool *pool)
{
    current = pool;
}

/* The part of thread `number`: every threads-th task. */
static void do_part(pivot_pool *pool, int number)
{
    for (int id = number; id < pool->group.num_task; id += pool->threads)
        if (pool->task(id, &pool->group, pool->data)) atomic_store(&pool->failed, 1);
}

static unsigned next_round(pivot_pool *pool, unsigned done)
{
    for (int i = 0; i < SPINS; i++)
        if (atomic_load_explicit(&pool->round, memory_order_acquire) != done) return done + 1;
    pthread_mutex_lock(&pool->mutex);
    while (atomic_load(&pool->round) == done) pthread_cond_wait(&pool->wake, &pool->mutex);
    pthread_mutex_unlock(&pool->mutex);
    return done + 1;
}

static void *work(void *argument)
{
    Worker *self = argument;
    pivot_pool *pool = self->pool;
    for (unsigned round = 0;;) {
        round = next_round(pool, round);
        if (pool->ending) return NULL;
        do_part(pool, self->number);
        atomic_fetch_sub_explicit(&pool->left, 1, memory_order_release);
    }
}

static void start_round(pivot_pool *pool)
{
    atomic_store(&pool->left, pool->started);
    pthread_mutex_lock(&pool->mutex);
    atomic_fetch_add(&pool->round, 1);
    pthread_cond_broadcast(&pool->wake);
    pthread_mutex_unlock(&pool->mutex);
}

pivot_pool *pivot_pool_start(int count)
{
    long cores = sysconf(_SC_NPROCESSORS_ONLN);
    if (count < 1) count = cores < 1 ? 1 : cores < MOST_THREADS ? (int)cores : MOST_THREADS;
    pivot_pool *pool = count > MOST_THREADS ? NULL : calloc(1, sizeof *pool);
    if (pool == NULL) {
        pivot_fail("%d threads cannot be had", count);
        return NULL;
    }
    pthread_mutex_init(&pool->mutex, NULL);
    pthread_cond_init(&pool->wake, NULL);
    pool->threads = count;
    for (int i = 1; i < count; i++) {
        Worker *worker = &pool->workers[i - 1];
        worker->pool = pool;
        worker->number = i;
        if (pthread_create(&worker->thread, NULL, work, worker)) {
            pivot_fail("thread %d of %d cannot be started", i + 1, count);
            pivot_pool_end(pool);
            return NULL;
        }
        pool->started = i;
    }
    return pool;
}

void pivot_pool_end(pivot_pool *pool)
{
    if (pool == NULL) return;
    pool->ending = 1;
    start_round(pool);
    for (int i = 0; i < pool->started; i++) pthread_join(pool->workers[i].thread, NULL);
    pthread_mutex_destroy(&pool->mutex);
    pthread_cond_destroy(&pool->wake);
    free(pool);
}

static int launch(Task task, void *data, int tasks)
{
    pivot_pool *pool = current;
    pool->task = task;
    pool->data = data;
    pool->group.num_task = tasks ? tasks : pool->threads;
    atomic_store(&pool->failed, 0);
    start_round(pool);
    do_part(pool, 0);
    for (int i = 0; atomic_load_explicit(&pool->left, memory_order_acquire); i++)
        if (i >= SPINS) sched_yield();
    return atomic_load(&pool->failed) ? -1 : 0;
}

/* Memory that kernels take for a moment is kept for the next one: fresh pages are slow. */
static _Thread_local struct {
    void *data;
    size_t bytes;
    int taken;
} blocks[BLOCKS];

static void *take(int device, int number, uint64_t bytes, int code, int bits)
{
    (void)device, (void)number, (void)code, (void)bits;
    int best = -1;
    for (int i = 0; i < BLOCKS; i++)
        if (!blocks[i].taken && (best < 0 || blocks[i].bytes > blocks[best].bytes)) best = i;
    if (best < 0) return NULL;
    if (blocks[best].bytes < bytes) {
        free(blocks[best].data);
        blocks[best].data = pivot_allocate((size_t)bytes);
        blocks[best].bytes = blocks[best].data ? (size_t)bytes : 0;
    }
    blocks[best].taken = blocks[best].data != NULL;
    return blocks[best].data;
}

static int give_back(int device, int number, void *data)
{
    (void)device, (void)number;
    for (int i = 0; i < BLOCKS; i++)
        if (blocks[i].data == data) blocks[i].taken = 0;
    return 0;
}

/* Kernels call these before they return an error. */
static void raise_error(const char *kind, const char *what)
{
    pivot_fail("%s: %s", kind, what);
}

void TVMFFIErrorSetRaisedFromCStrParts(const char *kind, const char **parts, int32_t count)
{
    size_t used = (size_t)snprintf(message, sizeof message, "%s: ", kind);
    for (int32_t i = 0; i < count && used < sizeof message; i++)
        if (parts[i] != NULL)
            used += (size_t)snprintf(message + used, sizeof message - used, "%s", parts[i]);
}

/* A library has a pointer for each function of a runtime that its kernels call. */
void pivot_connect(pivot_network *net)
{
    static const struct {
        const char *name;
        void *function; /* NULL: not here */
    } KNOWN[] = {
        {"__TVMBackendParallelLaunch", (void *)launch},
        {"__TVMBackendAllocWorkspace", (void *)take},
        {"__TVMBackendFreeWorkspace", (void *)give_back},
        {"__TVMFFIErrorSetRaisedFromCStr", (void *)raise_error},
        {"__TVMBackendParallelBarrier", NULL},
        {"__TVMFFIEnvModLookupFromImports", NULL},
        {"__TVMFFIFunctionCall", NULL},
        {"__TVMFFIHandleInitOnce", NULL},
    };
    for (size_t i = 0; i < sizeof KNOWN / sizeof *KNOWN; i++) {
        void **place = dlsym(net->library, KNOWN[i].name);
        if (place != NULL && KNOWN[i].function == NULL)
            FAIL(net, "its kernels call %s: it needs TVM's runtime", KNOWN[i].name + 2);
        if (place != NULL) *place = KNOWN[i].function;
    }
}
