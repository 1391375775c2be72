/* A file layer that fails when it is told to: preloaded in front of the system's calls.

   fault_arm(call, number, error, half, below): the call of that name and number, counted from now
   on paths below a folder, fails with that error; half: of a write, half of the bytes are written
   and reported first (a short write), and the next one fails. fault_hits(): how often one failed. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static char armed[16], folder[4096];
static int number, error_number, half, seen, hits;

void fault_arm(const char *call, int n, int error, int short_write, const char *below) {
    snprintf(armed, sizeof armed, "%s", call);
    snprintf(folder, sizeof folder, "%s", below);
    number = n, error_number = error, half = short_write, seen = 0, hits = 0;
}

int fault_hits(void) { return hits; }

static int fails(const char *call, const char *path) {
    if (strcmp(call, armed) || strncmp(path, folder, strlen(folder))) return 0;
    seen++;
    if (seen != number) return 0;
    hits++;
    errno = error_number;
    return 1;
}

static const char *path_of(int fd) {
    static char path[4096];
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t size = readlink(link, path, sizeof path - 1);
    path[size < 0 ? 0 : size] = 0;
    return path;
}

#define REAL(name) \
    static __typeof__(&name) real; \
    if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(write);
    if (fd > 2 && *armed && fails("write", path_of(fd))) {
        if (!half || size < 2) return -1;
        number++; /* the rest of it fails */
        return real(fd, data, size / 2);
    }
    return real(fd, data, size);
}

int fsync(int fd) {
    REAL(fsync);
    return *armed && fails("fsync", path_of(fd)) ? -1 : real(fd);
}

int rename(const char *from, const char *to) {
    REAL(rename);
    return *armed && fails("rename", to) ? -1 : real(from, to);
}

int mkdir(const char *path, mode_t mode) {
    REAL(mkdir);
    return *armed && fails("mkdir", path) ? -1 : real(path, mode);
}

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); \
        return *armed && flags & O_CREAT && fails("open", path) ? -1 : real(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)
