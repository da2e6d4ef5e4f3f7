/* The executor runs jobs in program order; the evaluator evaluates what somebody waits for. Both start when first needed. */
#include <signal.h>
#include <time.h>
#include <unistd.h>

#include "shim.h"

_Thread_local bool on_executor, on_own_thread;
atomic_long pending_jobs;

/* All under the state lock. */
static Job *first_job, *last_job;
static Cell *first_cell, *last_cell;
static pthread_cond_t executor_wake = PTHREAD_COND_INITIALIZER, evaluator_wake = PTHREAD_COND_INITIALIZER;
static bool executor_alive, evaluator_alive, evaluator_busy, stopping;

static Job* pop_job(void) {
  Job* job = first_job;
  if (job) first_job = job->next;
  if (!first_job) last_job = NULL;
  return job;
}

static Cell* take_cells(void) {
  Cell* cells = first_cell;
  first_cell = last_cell = NULL;
  for (Cell* cell = cells; cell; cell = cell->link) cell->queued = false;
  return cells;
}

static void job_over(void) {
  state_lock();
  atomic_fetch_sub(&pending_jobs, 1);
  state_changed();
  state_unlock();
}

/* A thread of ours never ends: its thread-local destructors (MLX's compiled functions hold Python objects) would want the GIL of an
 * interpreter that is going away, which kills the process. */
static _Noreturn void park(void) {
  for (;;) pause();
}

/* ---- the executor ---- */
static void* executor_main(void* unused) {
  (void)unused;
  on_executor = on_own_thread = true;
  PyGILState_Ensure(); /* one thread state for its whole life; the interpreter clears it */
  PyThreadState* thread = PyEval_SaveThread();
  state_lock();
  while (!stopping) {
    Job* job = pop_job();
    if (!job) {
      pthread_cond_wait(&executor_wake, &state_mutex);
      continue;
    }
    state_unlock();
    PyEval_RestoreThread(thread);
    job_run(job);
    thread = PyEval_SaveThread();
    job_over();
    state_lock();
  }
  executor_alive = false;
  state_changed();
  state_unlock();
  park();
}

bool executor_help(void) {
  state_lock();
  Job* job = stopping ? NULL : pop_job();
  state_unlock();
  if (!job) return false;
  job_run(job);
  job_over();
  return true;
}

void executor_submit(Job* job) {
  state_lock();
  *(last_job ? &last_job->next : &first_job) = job;
  last_job = job;
  atomic_fetch_add(&pending_jobs, 1);
  pthread_cond_signal(&executor_wake);
  state_unlock();
}

/* ---- the evaluator ---- */
void evaluator_arm(Cell* cell) {
  if (cell->queued) return;
  cell->queued = true;
  cell->references++;
  cell->link = NULL;
  *(last_cell ? &last_cell->link : &first_cell) = cell;
  last_cell = cell;
  pthread_cond_signal(&evaluator_wake);
}

/* The leading cells of one execution; after a failure MLX cannot be asked again whose fault it was, so others are kept apart. */
static size_t take_group(Cell** cells, Cell** group, size_t most) {
  size_t count = 0;
  state_lock();
  Record* record = (*cells)->record;
  do {
    group[count++] = *cells;
    *cells = (*cells)->link;
  } while (*cells && count < most && record && (*cells)->record == record);
  state_unlock();
  return count;
}

static PyThreadState* evaluate_all(Cell* cells, PyThreadState* thread) {
  while (cells) {
    Cell* group[64];
    size_t count = take_group(&cells, group, COUNT_OF(group));
    Waiter* waiters = NULL;
    PyEval_RestoreThread(thread);
    error_release(cells_evaluate(group, count));
    state_lock();
    for (size_t i = 0; i < count; i++)
      if (group[i]->event) waiters = waiters_join(event_complete(group[i]->event, group[i]->error), waiters);
    state_unlock();
    thread = PyEval_SaveThread();
    event_fire(waiters);
    for (size_t i = 0; i < count; i++) cell_release(group[i]);
  }
  return thread;
}

static void* evaluator_main(void* unused) {
  (void)unused;
  on_own_thread = true;
  PyGILState_Ensure();
  PyThreadState* thread = PyEval_SaveThread();
  state_lock();
  while (!stopping) {
    if (!first_cell) {
      pthread_cond_wait(&evaluator_wake, &state_mutex);
      continue;
    }
    Cell* cells = take_cells();
    evaluator_busy = true;
    state_unlock();
    thread = evaluate_all(cells, thread);
    state_lock();
    evaluator_busy = false;
    state_changed();
  }
  evaluator_alive = false;
  state_changed();
  state_unlock();
  park();
}

/* ---- starting and stopping ---- */
static PJRT_Error* start(bool* alive, void* (*body)(void*), size_t stack) {
  if (__atomic_load_n(alive, __ATOMIC_ACQUIRE)) return NULL;
  PJRT_Error* error = NULL;
  state_lock();
  if (!*alive && !stopping) {
    sigset_t all, before; /* signals are for the main thread */
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int failed;
    do {
      pthread_attr_t attributes;
      pthread_attr_init(&attributes);
      pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
      pthread_attr_setstacksize(&attributes, stack);
      pthread_t thread;
      failed = pthread_create(&thread, &attributes, body, NULL);
      pthread_attr_destroy(&attributes);
      stack /= 2; /* address space may be limited */
    } while (failed && stack >= 8u << 20);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    if (failed) error = error_new(PJRT_Error_Code_RESOURCE_EXHAUSTED, "no thread could be started (%d)", failed);
    __atomic_store_n(alive, !failed, __ATOMIC_RELEASE);
  }
  state_unlock();
  return error;
}

/* MLX's export and compile recurse, once per operation; so does what a Loop's body may call. */
PJRT_Error* threads_start_executor(void) { return start(&executor_alive, executor_main, (size_t)512 << 20); }
PJRT_Error* threads_start_evaluator(void) { return start(&evaluator_alive, evaluator_main, (size_t)64 << 20); }

static struct timespec in(int milliseconds) {
  struct timespec at;
  clock_gettime(CLOCK_REALTIME, &at);
  at.tv_sec += milliseconds / 1000;
  at.tv_nsec += (long)(milliseconds % 1000) * 1000000;
  if (at.tv_nsec >= 1000000000) at.tv_sec++, at.tv_nsec -= 1000000000;
  return at;
}

bool threads_drain(int milliseconds) {
  struct timespec deadline = in(milliseconds);
  bool idle, late = false;
  state_lock();
  while (!(idle = atomic_load(&pending_jobs) == 0 && !first_cell && !evaluator_busy) && !late)
    late = state_wait_until(&deadline) != 0;
  state_unlock();
  return idle;
}

void threads_stop(void) {
  struct timespec deadline = in(2000);
  state_lock();
  stopping = true;
  pthread_cond_broadcast(&executor_wake);
  pthread_cond_broadcast(&evaluator_wake);
  while ((executor_alive || evaluator_alive) && state_wait_until(&deadline) == 0) continue;
  Job* jobs = first_job;
  first_job = last_job = NULL;
  Cell* cells = take_cells();
  state_unlock();

  bool anyone = jobs || cells;
  PJRT_Error* error = error_new(PJRT_Error_Code_CANCELLED, "the interpreter is shutting down");
  for (Job* next; jobs; jobs = next) {
    next = jobs->next;
    job_cancel(jobs, error);
    atomic_fetch_sub(&pending_jobs, 1);
  }
  for (Cell* next; cells; cells = next) {
    next = cells->link;
    state_lock();
    Waiter* waiters = cells->event ? event_complete(cells->event, error) : NULL;
    state_unlock();
    event_fire(waiters);
    cell_release(cells);
  }
  error_release(error);
  /* Threads that wake up now want the GIL: later it would kill them, inside jaxlib, which aborts. */
  if (anyone) nanosleep(&(struct timespec){.tv_nsec = 20000000}, NULL);
}
