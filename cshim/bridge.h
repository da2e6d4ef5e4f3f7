/* The calls of jax_mps._shim, as the cffi recipe also declares them. cffi drops the GIL around each. */
#pragma once
#include <stddef.h>
#include <stdint.h>

/* A pointer that a library calls a function of the given name (an index) through. */
typedef struct {
  uintptr_t address;
  int name;
  int read_only;
} shim_cell;

#pragma GCC visibility push(hidden)
int shim_install(uintptr_t hooks);
int shim_append_capsule(uintptr_t list);
uintptr_t shim_api(void);
int shim_layout(const char* name, int64_t* value);
int shim_value_at(uintptr_t pointer, uintptr_t list);
void shim_counts(int64_t counts[8]);
void shim_lock(void);
void shim_unlock(void);
int shim_release_all(void);
void shim_reacquire(int depth);
void shim_finalize(void);
void shim_forked(void);
int shim_stopping(void);
int shim_evaluates_at_once(void);
int shim_evaluation_must_end(void);
int shim_drain(int milliseconds);
unsigned long shim_interrupts(void);
uintptr_t shim_look_call(void); /* XLA's custom call `jax_mps_look` (calls.c) */
int64_t shim_profile_now(void); /* 0 while nobody traces */
void shim_profile_event(const char* name, int64_t start); /* a host segment that ended now */
void shim_watch_interrupts(int on);
void shim_guard_reads(int everywhere, int guard); /* on every thread, or on this one: 1 or 0; -1 here: as everywhere */
int shim_imports(const char* library, const char* const* names, int count, shim_cell* cells, int most); /* cells found, -1 for no such library */
int shim_write_cell(const shim_cell* cell, uintptr_t value); /* 0 or an error number */
int shim_file_of(uintptr_t address, char* path, int size);
int shim_serve_reads(const char* library); /* once; 0 if that library's reads can be served */
void shim_serve(const char* data, size_t size); /* from now on, on this thread; NULL ends it */
#pragma GCC visibility pop
