// Copyright 2026 llm2clip authors
// SPDX-License-Identifier: Apache-2.0

// Counts the calls of a run that change files below a folder, and lets one of them fail or kill the run.
//
// Loaded by LD_PRELOAD.  Calls that bypass the C library are not seen: safetensors renames in this way, after its last
// write.  The environment decides, when a process makes its first such call:
//   FAULTS_FOLDER  absolute path of the folder
//   FAULTS_LOG     file that receives a line per call, separated by tabs: number, name, path, path before a rename, inode
//   FAULTS_COUNT   file of 16 bytes with the number of calls so far, of all processes of the run
//   FAULTS_AT      number of the call that goes wrong
//   FAULTS_KIND    kill (before the call), torn (after half of a write), or the number of an error, which all later
//                  calls that need room have, too, if it is ENOSPC or EDQUOT
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static size_t length;
static int log_file = -1, error_number, torn;
static long at = -1;
static struct { atomic_long calls; atomic_long full; } *shared;
static __thread int inside;

static void prepare(void) {
    const char *wanted = getenv("FAULTS_FOLDER");
    if (length || !wanted) return;
    int file = syscall(SYS_openat, AT_FDCWD, getenv("FAULTS_COUNT"), O_RDWR);
    shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    syscall(SYS_close, file);
    log_file = syscall(SYS_openat, AT_FDCWD, getenv("FAULTS_LOG"), O_WRONLY | O_APPEND | O_CREAT, 0600);
    log_file = syscall(SYS_fcntl, log_file, F_DUPFD_CLOEXEC, 700);
    if (getenv("FAULTS_AT")) at = atol(getenv("FAULTS_AT"));
    const char *kind = getenv("FAULTS_KIND");
    torn = kind && !strcmp(kind, "torn");
    error_number = kind ? atoi(kind) : 0;
    snprintf(folder, sizeof folder, "%s", wanted);
    length = strlen(folder);
}

// Path of a file that a call names, relative to an open folder or to the current one.
static void full_path(char *out, int base, const char *path) {
    char link[64];
    if (path && path[0] == '/') { snprintf(out, PATH_MAX, "%s", path); return; }
    if (base == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
    else snprintf(link, sizeof link, "/proc/self/fd/%d", base);
    ssize_t n = syscall(SYS_readlinkat, AT_FDCWD, link, out, PATH_MAX - 1);
    out[n > 0 ? n : 0] = 0;
    if (path) { strncat(out, "/", PATH_MAX - strlen(out) - 1); strncat(out, path, PATH_MAX - strlen(out) - 1); }
}

// Count a call.  Returns the error it has to have, 0 for none, or -1 for a write of which half is done.
static int fault2(const char *name, int base, const char *path, int needs_room, int old_base, const char *old) {
    char name_of_file[PATH_MAX], old_name[PATH_MAX] = "", line[2 * PATH_MAX + 64];
    prepare();
    if (!length || inside) return 0;
    full_path(name_of_file, base, path);
    // The folder itself, or a path below it.
    if (strncmp(name_of_file, folder, length) || (name_of_file[length] && name_of_file[length] != '/')) return 0;
    long number = atomic_fetch_add(&shared->calls, 1);
    if (old) full_path(old_name, old_base, old);
    struct stat file = {0};
    if (!path) fstat(base, &file);
    int n = snprintf(line, sizeof line, "%ld\t%s\t%s\t%s\t%ld\n", number, name, name_of_file, old_name,
                     (long)file.st_ino);
    syscall(SYS_write, log_file, line, n);
    if (number == at && !error_number && !torn) syscall(SYS_kill, 0, SIGKILL);
    if (number == at && torn) return -1;
    int fills = error_number == ENOSPC || error_number == EDQUOT;
    if (number == at && fills) atomic_store(&shared->full, 1);
    if (fills) return needs_room && atomic_load(&shared->full) ? error_number : 0;
    return number == at ? error_number : 0;
}

static int fault(const char *name, int base, const char *path, int needs_room) {
    return fault2(name, base, path, needs_room, AT_FDCWD, NULL);
}

#define NEXT(name) static __typeof__(name) *next; if (!next) next = dlsym(RTLD_NEXT, #name)
#define FAIL(value) do { if (wrong > 0) { errno = wrong; return value; } } while (0)

#define TWO_PATHS(name, room) \
    int name(const char *from, const char *to) { \
        NEXT(name); int wrong = fault2(#name, AT_FDCWD, to, room, AT_FDCWD, from); FAIL(-1); return next(from, to); }
TWO_PATHS(rename, 0)
TWO_PATHS(link, 1)
TWO_PATHS(symlink, 1)
#define TWO_PATHS_AT(name) \
    int name(int base, const char *from, int to_base, const char *to REST) { \
        NEXT(name); int wrong = fault2(#name, to_base, to, ROOM, base, from); FAIL(-1); \
        return next(base, from, to_base, to PASS); }
#define REST
#define PASS
#define ROOM 0
TWO_PATHS_AT(renameat)
#undef REST
#undef PASS
#define REST , unsigned int flags
#define PASS , flags
TWO_PATHS_AT(renameat2)
#undef REST
#undef ROOM
#define REST , int flags
#define ROOM 1
TWO_PATHS_AT(linkat)
int symlinkat(const char *from, int base, const char *to) {
    NEXT(symlinkat); int wrong = fault("symlinkat", base, to, 1); FAIL(-1); return next(from, base, to); }
int unlink(const char *path) {
    NEXT(unlink); int wrong = fault("unlink", AT_FDCWD, path, 0); FAIL(-1); return next(path); }
int rmdir(const char *path) {
    NEXT(rmdir); int wrong = fault("rmdir", AT_FDCWD, path, 0); FAIL(-1); return next(path); }
int remove(const char *path) {
    NEXT(remove); int wrong = fault("remove", AT_FDCWD, path, 0); FAIL(-1); return next(path); }
int unlinkat(int base, const char *path, int flags) {
    NEXT(unlinkat); int wrong = fault("unlinkat", base, path, 0); FAIL(-1); return next(base, path, flags); }
int mkdir(const char *path, mode_t mode) {
    NEXT(mkdir); int wrong = fault("mkdir", AT_FDCWD, path, 1); FAIL(-1); return next(path, mode); }
int mkdirat(int base, const char *path, mode_t mode) {
    NEXT(mkdirat); int wrong = fault("mkdirat", base, path, 1); FAIL(-1); return next(base, path, mode); }
int fsync(int file) { NEXT(fsync); int wrong = fault("fsync", file, NULL, 1); FAIL(-1); return next(file); }
int fdatasync(int file) { NEXT(fdatasync); int wrong = fault("fsync", file, NULL, 1); FAIL(-1); return next(file); }
int ftruncate(int file, off_t size) {
    NEXT(ftruncate); int wrong = fault("write", file, NULL, 1); FAIL(-1); return next(file, size); }
int ftruncate64(int file, off64_t size) {
    NEXT(ftruncate64); int wrong = fault("write", file, NULL, 1); FAIL(-1); return next(file, size); }

#define WRITES(flags) ((flags) & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC))
#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list rest; va_start(rest, flags); mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); NEXT(name); \
        int wrong = WRITES(flags) ? fault("open", AT_FDCWD, path, (flags & O_CREAT) != 0) : 0; FAIL(-1); \
        return next(path, flags, mode); }
OPEN(open)
OPEN(open64)
#define OPEN_AT(name) \
    int name(int base, const char *path, int flags, ...) { \
        va_list rest; va_start(rest, flags); mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0; \
        va_end(rest); NEXT(name); \
        int wrong = WRITES(flags) ? fault("open", base, path, (flags & O_CREAT) != 0) : 0; FAIL(-1); \
        return next(base, path, flags, mode); }
OPEN_AT(openat)
OPEN_AT(openat64)
#define FOPEN(name) \
    FILE *name(const char *path, const char *mode) { \
        NEXT(name); int wrong = strpbrk(mode, "wa+") ? fault("open", AT_FDCWD, path, 1) : 0; FAIL(NULL); \
        inside++; FILE *file = next(path, mode); inside--; return file; }
FOPEN(fopen)
FOPEN(fopen64)

// A kill after half of a write.
#define TEAR(half) do { if (wrong < 0) { half; syscall(SYS_kill, 0, SIGKILL); } } while (0)
ssize_t write(int file, const void *data, size_t size) {
    NEXT(write); int wrong = fault("write", file, NULL, 1); FAIL(-1); TEAR(next(file, data, size / 2));
    return next(file, data, size); }
#define PWRITE(name, offset_type) \
    ssize_t name(int file, const void *data, size_t size, offset_type offset) { \
        NEXT(name); int wrong = fault("write", file, NULL, 1); FAIL(-1); TEAR(next(file, data, size / 2, offset)); \
        return next(file, data, size, offset); }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)
ssize_t writev(int file, const struct iovec *parts, int count) {
    NEXT(writev); int wrong = fault("write", file, NULL, 1); FAIL(-1); TEAR(next(file, parts, count / 2));
    return next(file, parts, count); }
ssize_t copy_file_range(int in, off64_t *from, int out, off64_t *to, size_t size, unsigned flags) {
    NEXT(copy_file_range); int wrong = fault("write", out, NULL, 1); FAIL(-1);
    TEAR(next(in, from, out, to, size / 2, flags)); return next(in, from, out, to, size, flags); }
#define SENDFILE(name, offset_type) \
    ssize_t name(int out, int in, offset_type *from, size_t size); \
    ssize_t name(int out, int in, offset_type *from, size_t size) { \
        NEXT(name); int wrong = fault("write", out, NULL, 1); FAIL(-1); TEAR(next(out, in, from, size / 2)); \
        return next(out, in, from, size); }
SENDFILE(sendfile, off_t)
SENDFILE(sendfile64, off64_t)
