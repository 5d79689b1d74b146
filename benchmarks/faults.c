/* Makes the n-th file operation below one folder fail, once or from then on, or kills the process
 * before or after it. Loaded with LD_PRELOAD, so it also meets the operations of libraries; armed by
 * faults_arm(), called through ctypes in the process that is to suffer. Every operation is logged. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum kind { NONE, ERROR, ERROR_AFTER, ERROR_FROM_NOW_ON, SHORT, SHORT_THEN_FULL, EXIT_BEFORE, EXIT_AFTER };

static char prefix[4096];
static int armed, kind, code, log_fd = -1;
static long target, count;
static char paths[4096][512];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void faults_arm(const char *folder, const char *log, long n, int what, int error) {
    snprintf(prefix, sizeof prefix, "%s", folder);
    log_fd = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    target = n, kind = what, code = error, count = 0, armed = 1;
}

static int ours(const char *path) {
    size_t length = strlen(prefix);
    return armed && path && !strncmp(path, prefix, length) && (path[length] == '/' || !path[length]);
}
static int ours_fd(int fd) { return armed && fd >= 0 && fd < 4096 && paths[fd][0]; }

/* What to do about this operation: NONE or a kind. */
static int meet(const char *name, const char *one, const char *two) {
    char line[1200];
    pthread_mutex_lock(&lock);
    long n = ++count;
    int length = snprintf(line, sizeof line, "%ld\t%s\t%s\t%s\n", n, name, one, two ? two : "");
    syscall(SYS_write, log_fd, line, length);
    pthread_mutex_unlock(&lock);
    int hit = n == target;
    int later = n > target && target > 0;
    if (hit && kind == EXIT_BEFORE) syscall(SYS_exit_group, 77);
    if (hit) return kind;
    if (later && kind == ERROR_FROM_NOW_ON) return ERROR;
    if (later && kind == SHORT_THEN_FULL && !strcmp(name, "write")) return ERROR;
    return NONE;
}

/* Runs `call` under the fault `met`; an operation that is not a write knows no short form. */
#define SUFFER(met, result, call)                                                                 \
    do {                                                                                          \
        int what = met;                                                                           \
        if (what == ERROR || what == ERROR_FROM_NOW_ON) { errno = code; return -1; }              \
        result = call;                                                                            \
        if (what == EXIT_AFTER) syscall(SYS_exit_group, 77);                                      \
        if (what == ERROR_AFTER) { errno = code; return -1; }                                     \
    } while (0)

static int open_any(int dir, const char *path, int flags, mode_t mode) {
    if (!ours(path)) return syscall(SYS_openat, dir, path, flags, mode);
    int result;
    SUFFER(meet(flags & O_CREAT ? "create" : "open", path, NULL), result, syscall(SYS_openat, dir, path, flags, mode));
    if (result >= 0 && result < 4096) snprintf(paths[result], sizeof paths[0], "%s", path);
    return result;
}

#define MODE(flags, mode)                                                                         \
    mode_t mode = 0;                                                                              \
    if (flags & (O_CREAT | __O_TMPFILE)) { va_list list; va_start(list, flags); mode = va_arg(list, mode_t); va_end(list); }

int open(const char *path, int flags, ...) { MODE(flags, mode) return open_any(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags, mode) return open_any(AT_FDCWD, path, flags, mode); }
int openat(int dir, const char *path, int flags, ...) { MODE(flags, mode) return open_any(dir, path, flags, mode); }
int openat64(int dir, const char *path, int flags, ...) { MODE(flags, mode) return open_any(dir, path, flags, mode); }

ssize_t write(int fd, const void *data, size_t size) {
    if (!ours_fd(fd)) return syscall(SYS_write, fd, data, size);
    ssize_t result;
    int what_happens = meet("write", paths[fd], NULL);
    if (what_happens == SHORT || what_happens == SHORT_THEN_FULL)
        return syscall(SYS_write, fd, data, size > 1 ? size / 2 : size);
    if (what_happens == EXIT_AFTER) { /* in the middle: nastier than at the end */
        syscall(SYS_write, fd, data, size / 2);
        syscall(SYS_exit_group, 77);
    }
    SUFFER(what_happens, result, syscall(SYS_write, fd, data, size));
    return result;
}

ssize_t read(int fd, void *data, size_t size) {
    if (!ours_fd(fd)) return syscall(SYS_read, fd, data, size);
    ssize_t result;
    SUFFER(meet("read", paths[fd], NULL), result, syscall(SYS_read, fd, data, size));
    return result;
}

int fsync(int fd) {
    if (!ours_fd(fd)) return syscall(SYS_fsync, fd);
    int result;
    SUFFER(meet("fsync", paths[fd], NULL), result, syscall(SYS_fsync, fd));
    return result;
}

int close(int fd) {
    if (!ours_fd(fd)) return syscall(SYS_close, fd);
    char path[512];
    strcpy(path, paths[fd]);
    paths[fd][0] = 0;
    int what = meet("close", path, NULL);
    int result = syscall(SYS_close, fd); /* Linux closes whatever it reports */
    if (what == EXIT_AFTER) syscall(SYS_exit_group, 77);
    if (what == ERROR || what == ERROR_FROM_NOW_ON || what == ERROR_AFTER) { errno = code; return -1; }
    return result;
}

int mkdir(const char *path, mode_t mode) {
    if (!ours(path)) return syscall(SYS_mkdirat, AT_FDCWD, path, mode);
    int result;
    SUFFER(meet("mkdir", path, NULL), result, syscall(SYS_mkdirat, AT_FDCWD, path, mode));
    return result;
}

int rename(const char *from, const char *to) {
    if (!ours(to)) return syscall(SYS_renameat, AT_FDCWD, from, AT_FDCWD, to);
    int result;
    SUFFER(meet("rename", from, to), result, syscall(SYS_renameat, AT_FDCWD, from, AT_FDCWD, to));
    return result;
}

int link(const char *from, const char *to) {
    if (!ours(to)) return syscall(SYS_linkat, AT_FDCWD, from, AT_FDCWD, to, 0);
    int result;
    SUFFER(meet("link", from, to), result, syscall(SYS_linkat, AT_FDCWD, from, AT_FDCWD, to, 0));
    return result;
}

int unlink(const char *path) {
    if (!ours(path)) return syscall(SYS_unlinkat, AT_FDCWD, path, 0);
    int result;
    SUFFER(meet("unlink", path, NULL), result, syscall(SYS_unlinkat, AT_FDCWD, path, 0));
    return result;
}
