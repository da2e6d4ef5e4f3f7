/* Cell: one value on its way from PENDING to READY. Record: one lazy execution, and the executions it took its inputs from,
 * so that a failed evaluation can be told to everyone whose value it would have made. */
#include "shim.h"

struct Record {
  long references;
  PJRT_Error* error;
  size_t made, live, done; /* cells: ever, still LAZY, evaluated */
  Cell* cells;             /* those still LAZY */
  bool joined;             /* its values were in a batch, or not wanted then */
  Batch* batch;            /* or NULL */
  uint64_t mark;
  Record *older, *newer; /* all records, in the order they were made */
  Record* link;          /* the worklist it is on */
  size_t count;
  Record* parents[];
};

static Record *oldest, *newest;
static size_t since_sweep;
static uint64_t walk;
static bool any_failed;
atomic_long record_count;

static Record* push_if_dead(Record* record, Record* work) {
  if (--record->references > 0) return work;
  record->link = work;
  return record;
}

static void free_dead(Record* work) {
  while (work) {
    Record* record = work;
    work = record->link;
    for (size_t i = 0; i < record->count; i++) work = push_if_dead(record->parents[i], work);
    *(record->older ? &record->older->newer : &oldest) = record->newer;
    *(record->newer ? &record->newer->older : &newest) = record->older;
    error_release(record->error);
    if (record->batch) batch_unref(record->batch);
    free(record);
    atomic_fetch_sub(&record_count, 1);
  }
}

void record_release(Record* record) { free_dead(push_if_dead(record, NULL)); }

static void drop_parents(Record* record) {
  Record* work = NULL;
  for (size_t i = 0; i < record->count; i++) work = push_if_dead(record->parents[i], work);
  record->count = 0;
  free_dead(work);
}

/* Records of which no value is wanted any more only link their children to their parents. When they have no parents either, they link
 * to nothing. Parents are older than children, so one pass from the oldest finds them all. */
static void sweep(void) {
  for (Record *record = oldest, *next; record; record = next) {
    size_t kept = 0;
    Record* work = NULL;
    for (size_t i = 0; i < record->count; i++) {
      Record* parent = record->parents[i];
      if (parent->live == 0 && parent->count == 0 && !parent->error) work = push_if_dead(parent, work);
      else record->parents[kept++] = parent;
    }
    record->count = kept;
    if (record->error) drop_parents(record); /* they were told */
    free_dead(work); /* all of them older than this one */
    next = record->newer;
  }
  since_sweep = 0;
}

Record* record_new(Cell* const* inputs, size_t count) {
  /* Seldom enough that a record is looked at a few times in its life, however many there are. */
  if (++since_sweep >= 1024 && since_sweep >= (size_t)atomic_load(&record_count) / 2) sweep();
  size_t parents = 0;
  for (size_t i = 0; i < count; i++) parents += inputs[i]->record != NULL;
  Record* record = calloc(1, sizeof *record + parents * sizeof *record->parents);
  if (!record) return NULL;
  record->references = 1;
  record->older = newest;
  *(newest ? &newest->newer : &oldest) = record;
  newest = record;
  atomic_fetch_add(&record_count, 1);
  walk++;
  for (size_t i = 0; i < count; i++) {
    Record* parent = inputs[i]->record;
    PJRT_Error* error = parent ? parent->error : inputs[i]->error;
    if (error && !record->error) record->error = error_retain(error);
    if (!parent || parent->mark == walk) continue;
    parent->mark = walk;
    parent->references++;
    record->parents[record->count++] = parent;
  }
  return record;
}

void record_adopt(Record* record, Cell* cell) {
  if (!record) return;
  record->references++;
  record->made++;
  record->live++;
  cell->record = record;
  cell->sibling = record->cells;
  cell->elder = NULL;
  if (record->cells) record->cells->elder = cell;
  record->cells = cell;
}

void record_fail(Record* record, PJRT_Error* error) {
  any_failed = true;
  Record* work = NULL;
  if (!record->error) record->link = NULL, record->error = error_retain(error), work = record;
  while (work) {
    Record* next = work;
    work = next->link;
    for (size_t i = 0; i < next->count; i++) {
      Record* parent = next->parents[i];
      if (parent->error) continue; /* and so has everything above it */
      parent->error = error_retain(error);
      parent->link = work;
      work = parent;
    }
  }
}

/* MLX may hand out garbage for what failed before: a value is not evaluated when one that it is made from has failed. */
static void inherit_failure(Record* record) {
  if (!any_failed || record->error) return;
  Record* work = record;
  record->link = NULL;
  record->mark = ++walk;
  while (work) {
    Record* next = work;
    work = next->link;
    for (size_t i = 0; i < next->count; i++) {
      Record* parent = next->parents[i];
      if (parent->error) {
        record->error = error_retain(parent->error);
        return;
      }
      if (parent->mark == walk) continue;
      parent->mark = walk;
      parent->link = work;
      work = parent;
    }
  }
}

void cell_inherit(Cell* cell) {
  if (cell->state == LAZY && cell->record) inherit_failure(cell->record);
}

static void leave_record(Cell* cell, bool done) {
  Record* record = cell->record;
  if (!record) return;
  cell->record = NULL;
  *(cell->elder ? &cell->elder->sibling : &record->cells) = cell->sibling;
  if (cell->sibling) cell->sibling->elder = cell->elder;
  record->live--;
  record->done += done;
  if (record->done == record->made) drop_parents(record);
  record_release(record);
}

void cell_fail(Cell* cell, PJRT_Error* error) {
  if (cell->state == FAILED) return;
  cell->state = FAILED;
  cell->error = error_retain(error);
  leave_record(cell, false);
}

void cell_set_ready(Cell* cell) {
  if (cell->state != LAZY) return;
  cell->state = READY;
  leave_record(cell, true);
}

PyObject* cell_take(Cell* cell) {
  if (cell->references > 1 || cell->view) return NULL;
  PyObject* value = cell->value;
  cell->value = NULL;
  leave_record(cell, false); /* nobody may evaluate what is not there */
  return value;
}

State cell_settle(Cell* cell) {
  Record* record = cell->state == LAZY ? cell->record : NULL;
  if (record && record->error) cell_fail(cell, record->error);
  else if (record && record->batch && batch_is_over(record->batch)) cell_set_ready(cell);
  return cell->state;
}

/* ---- batches ---- */
Batch* cell_batch(Cell* cell) { return cell->record ? cell->record->batch : NULL; }

size_t records_join(Batch* batch, Cell*** out) {
  size_t capacity = 0, count = 0;
  Record* first = NULL;
  for (Record* record = newest; record && !record->joined; record = record->older) {
    inherit_failure(record);
    capacity += record->live;
    first = record;
  }
  Cell** cells = malloc((capacity + 1) * sizeof *cells);
  for (Record* record = cells ? first : NULL; record; record = record->newer) {
    record->joined = true;
    if (record->error || record->live == 0) continue;
    record->batch = batch;
    batch->references++;
    for (Cell* cell = record->cells; cell; cell = cell->sibling) {
      cell->references++;
      cells[count++] = cell;
    }
  }
  *out = cells;
  return count;
}

void records_fail(PJRT_Error* error) {
  for (Record* record = oldest; record; record = record->newer)
    if (record->batch && !batch_is_over(record->batch)) record_fail(record, error);
}

Cell* cell_new(State state, PyObject* value, size_t nbytes) {
  Cell* cell = calloc(1, sizeof *cell);
  if (!cell) {
    Py_XDECREF(value);
    return NULL;
  }
  cell->references = 1;
  cell->state = state;
  cell->value = value;
  cell->nbytes = nbytes;
  return cell;
}

/* ---- the end of a cell ---- */
static Cell viewed = {.previous = &viewed, .next = &viewed};

bool cell_unref(Cell* cell) {
  if (--cell->references > 0) return false;
  if (cell->next) {
    cell->previous->next = cell->next;
    cell->next->previous = cell->previous;
  }
  /* The record is left here, under the lock; the state says how to drop the value. */
  leave_record(cell, false);
  return true;
}

void cell_free(Cell* cell) {
  if ((cell->value || cell->view) && !IS_CLOSED()) {
    PyGILState_STATE gil = PyGILState_Ensure();
    if (cell->view) {
      PyBuffer_Release(cell->view);
      free(cell->view);
    }
    if (cell->state == LAZY || cell->state == FAILED) drop_value(cell->value);
    else Py_XDECREF(cell->value);
    PyGILState_Release(gil);
  }
  event_release(cell->event);
  error_release(cell->error);
  free(cell);
}

void cell_release(Cell* cell) {
  if (!cell) return;
  state_lock();
  bool last = cell_unref(cell);
  state_unlock();
  if (last) cell_free(cell);
}

/* ---- views of the data ---- */
static char nothing[64]; /* where empty arrays live */

/* The exporter's buffer, which must be what cshim's contract says. */
static PJRT_Error* take_view(PyObject* exporter, size_t nbytes, Py_buffer* view) {
  lock_with_gil();
  int failed = PyObject_GetBuffer(exporter, view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT);
  unlock_with_gil();
  if (failed) {
    PJRT_Error* cause = error_from_python("host_view");
    PJRT_Error* error = INTERNAL("hook host_view returned no contiguous buffer: %s", cause->message);
    error_release(cause);
    return error;
  }
  if ((size_t)view->len == nbytes && PyBuffer_IsContiguous(view, 'C')) return NULL;
  PJRT_Error* error = INTERNAL("hook host_view returned a buffer of %zd bytes, expected %zu contiguous ones", view->len, nbytes);
  PyBuffer_Release(view);
  return error;
}

static void set_view(Cell* cell, Py_buffer* view) {
  if (!view->buf || view->len == 0) view->buf = nothing;
  cell->view = view;
  state_lock();
  cell->previous = &viewed;
  cell->next = viewed.next;
  viewed.next->previous = cell;
  viewed.next = cell;
  state_unlock();
}

/* The value's own buffer, if that is dense already. */
static bool view_in_place(Cell* cell, size_t nbytes) {
  Py_buffer* view = calloc(1, sizeof *view);
  if (!view) return false;
  lock_with_gil();
  bool given = PyObject_GetBuffer(cell->value, view, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT) == 0;
  unlock_with_gil();
  if (!given) PyErr_Clear();
  if (given && !cell->view && (size_t)view->len == nbytes && PyBuffer_IsContiguous(view, 'C')) {
    set_view(cell, view);
    return true;
  }
  if (given) PyBuffer_Release(view);
  free(view);
  return cell->view != NULL; /* another thread was first, while the GIL was away */
}

PJRT_Error* cell_view(Cell* cell, size_t nbytes, const Py_buffer** out) {
  PJRT_Error* error = cell_materialise(cell);
  if (error) return error;
  if (cell->view || (laziness.view_in_place && view_in_place(cell, nbytes))) {
    *out = cell->view;
    return NULL;
  }
  PyObject* pair = hook_call(HOOK_host_view, PyTuple_Pack(1, cell->value));
  if (!pair) return error_from_python("host_view");
  if (!PyTuple_Check(pair) || PyTuple_Size(pair) != 2) {
    Py_DECREF(pair);
    return INTERNAL("hook host_view did not return (value, exporter)");
  }
  Py_buffer* view = calloc(1, sizeof *view);
  error = view ? take_view(PyTuple_GetItem(pair, 1), nbytes, view) : INTERNAL("no memory for a view");
  if (error) {
    free(view);
    Py_DECREF(pair);
    return error;
  }
  if (cell->view) { /* another thread was first, while the GIL was away */
    PyBuffer_Release(view);
    free(view);
  } else {
    PyObject* old = cell->value;
    cell->value = PyTuple_GetItem(pair, 0);
    Py_INCREF(cell->value);
    set_view(cell, view);
    Py_DECREF(old);
  }
  Py_DECREF(pair);
  *out = cell->view;
  return NULL;
}

PyObject* cell_value_at(const void* pointer) {
  PyObject* value = NULL;
  state_lock();
  for (Cell* cell = viewed.next; cell != &viewed && !value; cell = cell->next)
    if (cell->view->buf == pointer && pointer != nothing) value = cell->value;
  if (value) Py_INCREF(value);
  state_unlock();
  return value;
}
