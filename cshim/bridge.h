/* The calls of jax_mps._shim, as the cffi recipe also declares them. cffi drops the GIL around each. */
#pragma once
#include <stdint.h>

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
int shim_drain(int milliseconds);
unsigned long shim_interrupts(void);
void shim_watch_interrupts(int on);
#pragma GCC visibility pop
