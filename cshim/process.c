/* The locks, and the process' own events: shutdown, fork, interrupts. */
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>

#include "bridge.h"
#include "shim.h"

atomic_int process_closed = OPEN;

/* ---- the state lock: C bookkeeping only ---- */
pthread_mutex_t state_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t state_condition = PTHREAD_COND_INITIALIZER;

void state_lock(void) { pthread_mutex_lock(&state_mutex); }
void state_unlock(void) { pthread_mutex_unlock(&state_mutex); }
void state_wait(void) { pthread_cond_wait(&state_condition, &state_mutex); }
void state_changed(void) { pthread_cond_broadcast(&state_condition); }
int state_wait_until(const struct timespec* deadline) {
  return pthread_cond_timedwait(&state_condition, &state_mutex, deadline);
}

/* ---- the one lock, around everything that evaluates or reads arrays ---- */
static pthread_mutex_t lock_mutex = PTHREAD_MUTEX_INITIALIZER;
static _Thread_local int lock_depth;

static bool lock_try(void) {
  if (lock_depth == 0 && pthread_mutex_trylock(&lock_mutex) != 0) return false;
  lock_depth++;
  return true;
}

static void lock_leave(void) {
  if (lock_depth > 0 && --lock_depth == 0) pthread_mutex_unlock(&lock_mutex);
}

bool caller_has_gil(void) {
  static int (*check)(void); /* not in the limited API, but in every interpreter so far */
  static atomic_bool known;
  if (!atomic_load(&known)) {
    *(void**)&check = dlsym(RTLD_DEFAULT, "PyGILState_Check");
    atomic_store(&known, true);
  }
  return !check || check();
}

void lock_with_gil(void) {
  if (lock_try()) return;
  PyThreadState* thread = PyEval_SaveThread();
  pthread_mutex_lock(&lock_mutex);
  lock_depth = 1;
  PyEval_RestoreThread(thread);
}

/* Values that could not be dropped at once, because dropping one walks a graph that another thread may be evaluating. */
static PyObject** later;
static size_t later_capacity;
static atomic_size_t later_count;

void drop_later_values(void) {
  while (atomic_load(&later_count) > 0 && lock_try()) {
    state_lock();
    PyObject** values = later;
    size_t count = later_count;
    later = NULL;
    later_capacity = 0;
    later_count = 0;
    state_unlock();
    for (size_t i = 0; i < count; i++) Py_DecRef(values[i]);
    free(values);
    lock_leave();
  }
}

void unlock_with_gil(void) {
  lock_leave();
  if (atomic_load(&later_count) > 0) drop_later_values();
}

void drop_value(PyObject* value) {
  if (!value) return;
  if (lock_try()) {
    Py_DecRef(value);
    unlock_with_gil();
    return;
  }
  state_lock();
  if (later_count == later_capacity) {
    size_t capacity = later_capacity ? 2 * later_capacity : 64;
    PyObject** grown = realloc(later, capacity * sizeof *grown);
    if (grown) later = grown, later_capacity = capacity;
  }
  if (later_count < later_capacity) later[later_count++] = value; /* else it leaks: memory is out */
  state_unlock();
  drop_later_values(); /* the holder may have left before it could see this one */
}

void shim_lock(void) {
  if (atomic_load(&process_closed) == FORKED) return;
  if (lock_depth == 0) pthread_mutex_lock(&lock_mutex);
  lock_depth++;
}

static void drop_later_without_gil(void) {
  if (IS_CLOSED() || lock_depth > 0 || atomic_load(&later_count) == 0) return;
  PyGILState_STATE gil = PyGILState_Ensure();
  drop_later_values();
  PyGILState_Release(gil);
}

void shim_unlock(void) {
  if (atomic_load(&process_closed) == FORKED) return;
  lock_leave();
  drop_later_without_gil();
}

int shim_release_all(void) {
  int depth = lock_depth;
  if (depth == 0 || atomic_load(&process_closed) == FORKED) return 0;
  lock_depth = 0;
  pthread_mutex_unlock(&lock_mutex);
  drop_later_without_gil();
  return depth;
}

void shim_reacquire(int depth) {
  if (depth <= 0 || atomic_load(&process_closed) == FORKED) return;
  if (lock_depth == 0) pthread_mutex_lock(&lock_mutex);
  lock_depth += depth;
}

/* ---- shutdown and fork ---- */
void shim_finalize(void) {
  int open = OPEN;
  if (!atomic_compare_exchange_strong(&process_closed, &open, FINALIZING)) return;
  threads_stop();
}

void shim_forked(void) { atomic_store(&process_closed, FORKED); }

int shim_stopping(void) { return atomic_load(&process_closed) != OPEN; }

int shim_drain(int milliseconds) { return IS_CLOSED() || threads_drain(milliseconds); }

/* ---- interrupts: count SIGINT, then let whoever was there before have it ---- */
static atomic_ulong interrupt_count;
static int watchers;
static struct sigaction previous_action;

static void on_interrupt(int number, siginfo_t* info, void* context) {
  int saved = errno;
  atomic_fetch_add(&interrupt_count, 1);
  if (previous_action.sa_flags & SA_SIGINFO) {
    previous_action.sa_sigaction(number, info, context);
  } else if (previous_action.sa_handler == SIG_DFL) {
    sigaction(SIGINT, &previous_action, NULL); /* nobody catches it: die as asked */
    raise(SIGINT);
  } else if (previous_action.sa_handler != SIG_IGN) {
    previous_action.sa_handler(number);
  }
  errno = saved;
}

unsigned long shim_interrupts(void) { return atomic_load(&interrupt_count); }

void shim_watch_interrupts(int on) {
  if (atomic_load(&process_closed) == FORKED) return;
  state_lock();
  struct sigaction current;
  if (on && watchers++ == 0) {
    sigaction(SIGINT, NULL, &current);
    bool ours = (current.sa_flags & SA_SIGINFO) && current.sa_sigaction == on_interrupt;
    if (!ours) {
      struct sigaction action = {.sa_flags = SA_SIGINFO | (current.sa_flags & (SA_RESTART | SA_ONSTACK))};
      action.sa_sigaction = on_interrupt;
      sigemptyset(&action.sa_mask);
      previous_action = current;
      sigaction(SIGINT, &action, NULL);
    }
  } else if (!on && watchers > 0 && --watchers == 0) {
    sigaction(SIGINT, NULL, &current);
    if ((current.sa_flags & SA_SIGINFO) && current.sa_sigaction == on_interrupt)
      sigaction(SIGINT, &previous_action, NULL);
  }
  state_unlock();
}
