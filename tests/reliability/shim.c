/* Make system calls below a folder fail or take long. Loaded into a process with LD_PRELOAD.

   shim_arm starts it: calls `first` to `first + count - 1` of one kind of operation, on paths that begin with
   `prefix`, take `microseconds` longer and then, unless `error` is 0, fail with that errno. Calls of all kinds
   on such paths are counted. Until shim_arm is called, the shim does nothing. */

#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

/* In the same order as OPERATIONS in trials.py. */
enum { OPEN_READ, OPEN_WRITE, READ, WRITE, FSYNC, RENAME, CLOSE, MKDIR, STAT, LIST, OPERATIONS };

static char prefix[4096];
static int failing, error_number;
static long first_call, last_call, delay;
static atomic_int armed;
static atomic_long calls[OPERATIONS];

void shim_arm(const char *path, int operation, int error, long first, long count, long microseconds) {
    snprintf(prefix, sizeof prefix, "%s", path);
    failing = operation, error_number = error, delay = microseconds;
    first_call = first, last_call = first + count - 1;
    atomic_store(&armed, 1);
}

void shim_disarm(void) { atomic_store(&armed, 0); }

long shim_calls(int operation) { return atomic_load(&calls[operation]); }

/* Count a call on a path. Returns whether it must fail; errno is then set. */
static int fails_absolute(int operation, const char *path) {
    if (strncmp(path, prefix, strlen(prefix)) != 0) return 0;
    long number = atomic_fetch_add(&calls[operation], 1) + 1;
    if (operation != failing || number < first_call || number > last_call) return 0;
    if (delay) usleep(delay);
    if (!error_number) return 0;
    errno = error_number;
    return 1;
}

static int fails_descriptor(int operation, int descriptor) {
    if (!atomic_load(&armed)) return 0;
    char link[64], path[4096];
    int saved = errno;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    errno = saved;
    if (length < 0) return 0;
    path[length] = 0;
    return fails_absolute(operation, path);
}

static int fails(int operation, int folder, const char *path) {
    if (!atomic_load(&armed) || !path) return 0;
    if (path[0] == '/') return fails_absolute(operation, path);
    char link[64], base[2048], absolute[4096];
    int saved = errno;
    ssize_t length = -1;
    if (folder == AT_FDCWD) {
        length = getcwd(base, sizeof base) ? (ssize_t)strlen(base) : -1;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        length = readlink(link, base, sizeof base - 1);
    }
    errno = saved;
    if (length < 0) return 0;
    base[length] = 0;
    snprintf(absolute, sizeof absolute, "%s/%.2000s", base, path);
    return fails_absolute(operation, absolute);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int opening(int flags) {
    return flags & (O_WRONLY | O_RDWR | O_CREAT) ? OPEN_WRITE : OPEN_READ;
}

#define OPENER(name)                                              \
    int name(const char *path, int flags, ...) {                  \
        va_list rest;                                             \
        va_start(rest, flags);                                    \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                             \
        if (fails(opening(flags), AT_FDCWD, path)) return -1;     \
        return REAL(name)(path, flags, mode);                     \
    }
OPENER(open)
OPENER(open64)

#define OPENER_AT(name)                                           \
    int name(int folder, const char *path, int flags, ...) {      \
        va_list rest;                                             \
        va_start(rest, flags);                                    \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest);                                             \
        if (fails(opening(flags), folder, path)) return -1;       \
        return REAL(name)(folder, path, flags, mode);             \
    }
OPENER_AT(openat)
OPENER_AT(openat64)

#define STREAM_OPENER(name)                                                          \
    FILE *name(const char *path, const char *mode) {                                 \
        int operation = strpbrk(mode, "wa+") ? OPEN_WRITE : OPEN_READ;               \
        return fails(operation, AT_FDCWD, path) ? NULL : REAL(name)(path, mode);     \
    }
STREAM_OPENER(fopen)
STREAM_OPENER(fopen64)

ssize_t read(int file, void *data, size_t size) {
    return fails_descriptor(READ, file) ? -1 : REAL(read)(file, data, size);
}
ssize_t pread(int file, void *data, size_t size, off_t offset) {
    return fails_descriptor(READ, file) ? -1 : REAL(pread)(file, data, size, offset);
}
ssize_t pread64(int file, void *data, size_t size, off64_t offset) {
    return fails_descriptor(READ, file) ? -1 : REAL(pread64)(file, data, size, offset);
}
size_t fread(void *data, size_t size, size_t count, FILE *file) {
    return fails_descriptor(READ, fileno(file)) ? 0 : REAL(fread)(data, size, count, file);
}
ssize_t write(int file, const void *data, size_t size) {
    return fails_descriptor(WRITE, file) ? -1 : REAL(write)(file, data, size);
}
ssize_t pwrite(int file, const void *data, size_t size, off_t offset) {
    return fails_descriptor(WRITE, file) ? -1 : REAL(pwrite)(file, data, size, offset);
}
ssize_t pwrite64(int file, const void *data, size_t size, off64_t offset) {
    return fails_descriptor(WRITE, file) ? -1 : REAL(pwrite64)(file, data, size, offset);
}
ssize_t writev(int file, const struct iovec *parts, int count) {
    return fails_descriptor(WRITE, file) ? -1 : REAL(writev)(file, parts, count);
}
size_t fwrite(const void *data, size_t size, size_t count, FILE *file) {
    return fails_descriptor(WRITE, fileno(file)) ? 0 : REAL(fwrite)(data, size, count, file);
}
int fsync(int file) { return fails_descriptor(FSYNC, file) ? -1 : REAL(fsync)(file); }
int fdatasync(int file) { return fails_descriptor(FSYNC, file) ? -1 : REAL(fdatasync)(file); }
int close(int file) {
    /* As on Linux, the descriptor is released even if close reports an error. */
    int failed = fails_descriptor(CLOSE, file), error = errno;
    int result = REAL(close)(file);
    if (!failed) return result;
    errno = error;
    return -1;
}
int rename(const char *old, const char *new) {
    return fails(RENAME, AT_FDCWD, new) ? -1 : REAL(rename)(old, new);
}
int renameat(int old_folder, const char *old, int new_folder, const char *new) {
    return fails(RENAME, new_folder, new) ? -1 : REAL(renameat)(old_folder, old, new_folder, new);
}
int mkdir(const char *path, mode_t mode) {
    return fails(MKDIR, AT_FDCWD, path) ? -1 : REAL(mkdir)(path, mode);
}
int stat(const char *path, struct stat *status) {
    return fails(STAT, AT_FDCWD, path) ? -1 : REAL(stat)(path, status);
}
int stat64(const char *path, struct stat64 *status) {
    return fails(STAT, AT_FDCWD, path) ? -1 : REAL(stat64)(path, status);
}
int lstat(const char *path, struct stat *status) {
    return fails(STAT, AT_FDCWD, path) ? -1 : REAL(lstat)(path, status);
}
int lstat64(const char *path, struct stat64 *status) {
    return fails(STAT, AT_FDCWD, path) ? -1 : REAL(lstat64)(path, status);
}
DIR *opendir(const char *path) {
    return fails(LIST, AT_FDCWD, path) ? NULL : REAL(opendir)(path);
}
