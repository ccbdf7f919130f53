/* Preload library that delays each opening of a file below a folder, as on a busy shared file system.
 *
 * SLOW_OPEN_FOLDER: absolute path. Only files that are opened by an absolute path below it are delayed.
 * SLOW_OPEN_MICROSECONDS: the delay. The thread sleeps, so it uses no CPU.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <time.h>

static const char *folder;
static struct timespec latency;

__attribute__((constructor)) static void read_settings(void) {
    const char *microseconds = getenv("SLOW_OPEN_MICROSECONDS");
    long value = microseconds ? atol(microseconds) : 0;
    latency.tv_sec = value / 1000000;
    latency.tv_nsec = value % 1000000 * 1000;
    folder = getenv("SLOW_OPEN_FOLDER");
}

static void wait_if_below(const char *path) {
    size_t length = folder ? strlen(folder) : 0;
    if (length && strncmp(path, folder, length) == 0 && path[length] == '/')
        nanosleep(&latency, NULL);
}

/* The mode is an argument only where a file may be made. */
#define READ_MODE(flags, mode)                        \
    mode_t mode = 0;                                  \
    if ((flags) & (O_CREAT | O_TMPFILE)) {            \
        va_list arguments;                            \
        va_start(arguments, flags);                   \
        mode = va_arg(arguments, mode_t);             \
        va_end(arguments);                            \
    }

#define SLOW_OPEN(name)                                                             \
    int name(const char *path, int flags, ...) {                                    \
        int (*original)(const char *, int, ...) = dlsym(RTLD_NEXT, #name);          \
        READ_MODE(flags, mode)                                                      \
        wait_if_below(path);                                                        \
        return original(path, flags, mode);                                         \
    }

#define SLOW_OPENAT(name)                                                           \
    int name(int directory, const char *path, int flags, ...) {                     \
        int (*original)(int, const char *, int, ...) = dlsym(RTLD_NEXT, #name);     \
        READ_MODE(flags, mode)                                                      \
        wait_if_below(path);                                                        \
        return original(directory, path, flags, mode);                              \
    }

#define SLOW_FOPEN(name)                                                            \
    FILE *name(const char *path, const char *how) {                                 \
        FILE *(*original)(const char *, const char *) = dlsym(RTLD_NEXT, #name);    \
        wait_if_below(path);                                                        \
        return original(path, how);                                                 \
    }

SLOW_OPEN(open)
SLOW_OPEN(open64)
SLOW_OPENAT(openat)
SLOW_OPENAT(openat64)
SLOW_FOPEN(fopen)
SLOW_FOPEN(fopen64)
