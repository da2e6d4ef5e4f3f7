/* Evaluation. Where the client gives the means, all that is lazy is evaluated together, as a batch, when somebody waits for any of it or
 * when much is waiting; elsewhere the hook is asked for one execution's values at a time. */
#include "shim.h"

/* ---- how much there is to do, in the cost of executions ---- */
static atomic_llong dispatched, finished_cost; /* ever; of batches that are over, everything dispatched before them counted in */

void evaluation_started(int64_t cost) { atomic_fetch_add_explicit(&dispatched, cost, memory_order_relaxed); }

static bool is_short(void) { return atomic_load(&dispatched) - atomic_load(&finished_cost) < laziness.short_cost; }

bool evaluates_at_once(void) { return laziness.evaluate_now && !laziness.sentinel && is_short(); }

/* ---- batches: one stream runs them in order ---- */
static uint64_t last_batch, finished_batch; /* state lock */
static Batch* dead_batches;                 /* whose `started` is to be dropped; state lock */

static Batch* batch_new(void) {
  Batch* batch = calloc(1, sizeof *batch);
  if (!batch) return NULL;
  batch->references = 1;
  batch->cost = atomic_load(&dispatched);
  state_lock();
  batch->sequence = ++last_batch;
  state_unlock();
  return batch;
}

void batch_unref(Batch* batch) {
  if (--batch->references > 0) return;
  if (!batch->started) {
    free(batch);
    return;
  }
  batch->next = dead_batches;
  dead_batches = batch;
}

static void batch_release(Batch* batch) {
  state_lock();
  batch_unref(batch);
  state_unlock();
}

bool batch_is_over(const Batch* batch) { return batch->sequence <= finished_batch; }

/* State lock held; an error is everyone's that was under way: MLX does not say whose it was. */
static void batch_end(Batch* batch, PJRT_Error* error) {
  if (error) records_fail(error);
  if (batch->sequence > finished_batch) {
    finished_batch = batch->sequence;
    atomic_store(&finished_cost, batch->cost);
  }
  state_changed();
}

/* GIL and lock held. */
static void drop_dead_batches(void) {
  state_lock();
  Batch* dead = dead_batches;
  dead_batches = NULL;
  state_unlock();
  for (Batch* next; dead; dead = next) {
    next = dead->next;
    Py_DECREF(dead->started);
    free(dead);
  }
}

/* callable(values) where the client's streams are the thread's defaults. */
static PyObject* call_in_scope(PyObject* callable, PyObject* values) {
  if (!laziness.scope) return PyObject_CallFunctionObjArgs(callable, values, NULL);
  PyObject* scope = PyObject_CallObject(laziness.scope, NULL);
  PyObject* entered = scope ? PyObject_CallMethod(scope, "__enter__", NULL) : NULL;
  PyObject* result = entered ? PyObject_CallFunctionObjArgs(callable, values, NULL) : NULL;
  PyObject *type, *value, *trace;
  PyErr_Fetch(&type, &value, &trace);
  PyObject* left = entered ? PyObject_CallMethod(scope, "__exit__", "OOO", Py_None, Py_None, Py_None) : NULL;
  if (!left) PyErr_Clear();
  PyErr_Restore(type, value, trace);
  Py_XDECREF(left);
  Py_XDECREF(entered);
  Py_XDECREF(scope);
  return result;
}

/* Starts evaluation; what to wait for, None being the stream. On a GPU that is an array of our own, evaluated with the values and so ready
 * when they are: the values, others may use meanwhile. It depends on none of them: what held them, too, would keep the next execution from
 * writing into a donated one. Locked. */
static PyObject* start(PyObject* values) {
  PyObject* sentinel = Py_None;
  if (laziness.sentinel) {
    PyObject* on_nothing = PyList_New(0);
    sentinel = on_nothing ? call_in_scope(laziness.sentinel, on_nothing) : NULL;
    Py_XDECREF(on_nothing);
    if (!sentinel) return NULL;
    if (PyList_Append(values, sentinel) != 0) {
      Py_DECREF(sentinel);
      return NULL;
    }
  } else {
    Py_INCREF(sentinel);
  }
  PyObject* done = call_in_scope(laziness.start, values);
  if (!done) {
    Py_DECREF(sentinel);
    return NULL;
  }
  Py_DECREF(done);
  return sentinel;
}

static PyObject* list_of(Cell* const* cells, size_t count) {
  PyObject* values = PyList_New((Py_ssize_t)count);
  for (size_t i = 0; i < count && values; i++) {
    Py_INCREF(cells[i]->value);
    PyList_SetItem(values, (Py_ssize_t)i, cells[i]->value);
  }
  return values;
}

/* What executables returned first, if that must be evaluated to the end; the next batch takes it along, whether or not it is still wanted. On
 * CUDA, an imported function reads its constants on a CPU stream the first time. Where that was only started, MLX's next evaluation may have the
 * GPU wait for it, which can last for ever (0.32.4). GIL and lock. */
static PyObject* first_results;

void evaluation_to_the_end(PyObject* results) {
  if (!laziness.first_to_the_end) return;
  if (!first_results) first_results = PyList_New(0);
  if (!first_results || PyList_Append(first_results, results) != 0) PyErr_Clear(); /* no memory: it will not be the first complaint */
}

bool evaluation_must_end(void) { return first_results != NULL; }

static bool add_first_results(PyObject* values) {
  PyObject* first = first_results;
  first_results = NULL;
  bool added = true;
  for (Py_ssize_t i = 0; i < PyList_Size(first) && added; i++) {
    Py_ssize_t end = PyList_Size(values);
    added = PyList_SetSlice(values, end, end, PyList_GetItem(first, i)) == 0;
  }
  Py_DECREF(first);
  return added;
}

/* Evaluates the cells (*over) or starts to. What cannot take long is waited for under the lock, which saves a trip to MLX's thread; no
 * Python code runs, so that Ctrl-C cannot end it half way. Locked. */
static PJRT_Error* run(Batch* batch, Cell* const* cells, size_t count, bool here, bool* over) {
  bool first = first_results != NULL;
  *over = first || (here && is_short());
  PyObject* values = list_of(cells, count);
  if (values && first && !add_first_results(values)) Py_CLEAR(values);
  PyObject* done = NULL;
  if (values && *over) {
    done = call_in_scope(laziness.evaluate_now, values);
    Py_XDECREF(done);
  } else if (values) {
    done = start(values);
    state_lock();
    batch->started = done;
    state_changed(); /* somebody may be waiting for it already */
    state_unlock();
  }
  Py_XDECREF(values);
  return done ? NULL : error_from_python("evaluate");
}

PJRT_Error* evaluate_lazy(bool here) {
  lock_with_gil();
  drop_dead_batches();
  Batch* batch = batch_new();
  if (!batch) {
    unlock_with_gil();
    return error_new(PJRT_Error_Code_RESOURCE_EXHAUSTED, "no memory to evaluate");
  }
  Cell** cells = NULL;
  state_lock();
  size_t count = records_join(batch, &cells);
  state_unlock();
  bool over = false;
  PJRT_Error* error = count ? run(batch, cells, count, here, &over) : NULL;
  unlock_with_gil();
  size_t last = 0;
  state_lock();
  if (over || error) batch_end(batch, error);
  for (size_t i = 0; i < count; i++) {
    if (over || error) cell_settle(cells[i]);
    if (cell_unref(cells[i])) cells[last++] = cells[i];
  }
  batch_unref(batch);
  state_unlock();
  for (size_t i = 0; i < last; i++) cell_free(cells[i]);
  free(cells);
  return error;
}

/* Until the batch is over, or started: to be asked again. GIL held. */
static void batch_wait(Batch* batch) {
  state_lock();
  PyObject* started = batch->started;
  batch->started = NULL;
  state_unlock();
  if (!started) { /* another thread is starting it, or waiting for it */
    PyThreadState* thread = PyEval_SaveThread();
    state_lock();
    while (!batch->started && !batch_is_over(batch)) state_wait();
    state_unlock();
    PyEval_RestoreThread(thread);
    return;
  }
  PyObject* done = PyObject_CallFunctionObjArgs(laziness.synchronize, started == Py_None ? NULL : started, NULL);
  PJRT_Error* error = done ? NULL : error_from_python("evaluate");
  Py_XDECREF(done);
  drop_value(started);
  state_lock();
  batch_end(batch, error);
  state_unlock();
  error_release(error);
}

/* ---- one cell ---- */
/* The state of a cell that the means are there for: LAZY still only where no record says how to go on. */
static State await_batch(Cell* cell) {
  for (bool first = true;; first = false) {
    state_lock();
    State state = cell_settle(cell);
    Batch* batch = state == LAZY ? cell_batch(cell) : NULL;
    if (batch) batch->references++;
    bool alone = !batch && (!cell->record || !first);
    state_unlock();
    if (state != LAZY || alone) return state;
    if (batch) {
      batch_wait(batch);
      batch_release(batch);
    } else {
      error_release(evaluate_lazy(true)); /* its records have it, too */
    }
  }
}

/* A value that no execution of ours made, or that memory was too short for. */
static PyObject* evaluate_alone(PyObject* values) {
  lock_with_gil();
  PyObject* done = call_in_scope(laziness.evaluate_now, values);
  unlock_with_gil();
  return done;
}

/* By the hook: one execution's cells, since after a failure MLX cannot be asked again whose fault it was. */
static PJRT_Error* evaluate_apart(Cell* const* cells, size_t count) {
  PyObject* values = PyList_New(0);
  state_lock();
  for (size_t i = 0; i < count; i++) cell_inherit(cells[i]);
  state_unlock();
  bool built = values != NULL;
  for (size_t i = 0; i < count && built; i++) {
    state_lock();
    bool lazy = cell_settle(cells[i]) == LAZY;
    state_unlock();
    if (lazy) built = PyList_Append(values, cells[i]->value) == 0;
  }
  PJRT_Error* error = NULL;
  if (!built) {
    error = error_from_python("evaluate");
  } else if (PyList_Size(values) > 0) {
    PyObject* result = laziness.evaluate_now ? evaluate_alone(values) : hook_call(HOOK_evaluate, PyTuple_Pack(1, values));
    if (!result) error = error_from_python("evaluate");
    Py_XDECREF(result);
  }
  if (values) drop_value(values);
  state_lock();
  for (size_t i = 0; i < count; i++) {
    Cell* cell = cells[i];
    if (cell_settle(cell) != LAZY) continue;
    if (!error) {
      cell_set_ready(cell);
    } else {
      if (cell->record) record_fail(cell->record, error);
      cell_fail(cell, error);
    }
  }
  state_unlock();
  return error;
}

PJRT_Error* cells_evaluate(Cell* const* cells, size_t count) {
  if (!laziness.evaluate_now) return evaluate_apart(cells, count);
  PJRT_Error* first = NULL;
  for (size_t i = 0; i < count; i++) {
    State state = await_batch(cells[i]);
    PJRT_Error* error = state == LAZY ? evaluate_apart(&cells[i], 1) : state == FAILED ? error_retain(cells[i]->error) : NULL;
    if (!first) first = error;
    else error_release(error);
  }
  return first;
}

State cell_state(Cell* cell, PJRT_Error** failure) {
  state_lock();
  State state = cell_settle(cell);
  *failure = state == FAILED ? error_retain(cell->error) : NULL;
  state_unlock();
  return state;
}

PJRT_Error* cell_materialise(Cell* cell) {
  for (;;) {
    PJRT_Error* error;
    State state = cell_state(cell, &error);
    if (state == FAILED) return error;
    if (state == READY || state == HOST) return NULL;
    if (state == LAZY) {
      error = cells_evaluate(&cell, 1);
      if (error) return error;
      continue; /* it may have failed with another of its record */
    }
    if (on_executor) {
      if (executor_help()) continue;
      return error_new(PJRT_Error_Code_FAILED_PRECONDITION,
                       "a callback waits for the result of the computation that called it");
    }
    REFUSE_IF_CLOSED();
    PyThreadState* thread = PyEval_SaveThread();
    state_lock();
    while (cell->state == PENDING) state_wait();
    state_unlock();
    PyEval_RestoreThread(thread);
  }
}
