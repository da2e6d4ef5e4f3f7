/* Execute: straight-line and prompt programs on the caller's thread, everything else as a job for the executor. */
#include "shim.h"

atomic_llong execute_count;
static int64_t lazy_count, lazy_bytes, lazy_cost; /* executions, and what they would make and cost, since the last schedule; GIL */

/* ---- running a direct executable: GIL held ---- */
static PJRT_Error* prepare(PJRT_Executable* executable) { /* locked */
  PyObject* made = hook_call(HOOK_prepare, Py_BuildValue("(Ol)", executable->object, executable->runs));
  if (!made) return error_from_python("prepare");
  PyObject *callable, *leading;
  long look = 0;
  bool ok = PyTuple_Check(made) && PyTuple_Size(made) == 3;
  if (ok) {
    callable = PyTuple_GetItem(made, 0);
    leading = PyTuple_GetItem(made, 1);
    look = PyLong_AsLong(PyTuple_GetItem(made, 2));
    ok = PyCallable_Check(callable) && PyTuple_Check(leading) && look >= 0;
  }
  PJRT_Error* error = NULL;
  if (!ok) {
    PyErr_Clear();
    error = INTERNAL("hook prepare did not return (callable, tuple, int) for %s", executable->name);
  } else {
    PyObject *old_callable = executable->callable, *old_leading = executable->leading;
    Py_INCREF(callable);
    Py_INCREF(leading);
    executable->callable = callable;
    executable->leading = leading;
    executable->leading_count = PyTuple_Size(leading);
    executable->next_look = look;
    Py_XDECREF(old_callable);
    Py_XDECREF(old_leading);
  }
  Py_DECREF(made);
  return error;
}

static PyObject* call(PJRT_Executable* executable, Cell* const* inputs, size_t count) {
  Py_ssize_t leading = executable->leading_count;
  PyObject* arguments = PyTuple_New(leading + (Py_ssize_t)count);
  if (!arguments) return NULL;
  for (Py_ssize_t i = 0; i < leading; i++) {
    PyObject* value = PyTuple_GetItem(executable->leading, i);
    Py_INCREF(value);
    PyTuple_SetItem(arguments, i, value);
  }
  for (size_t i = 0; i < count; i++) {
    PyObject* value = inputs[i]->value;
    Py_INCREF(value);
    PyTuple_SetItem(arguments, leading + (Py_ssize_t)i, value);
  }
  PyObject* callable = executable->callable;
  Py_INCREF(callable);
  PyObject* result = PyObject_CallObject(callable, arguments);
  Py_DECREF(callable);
  Py_DECREF(arguments);
  return result;
}

static PyObject* result_at(PyObject* results, size_t i) {
  return PyList_Check(results) ? PyList_GetItem(results, (Py_ssize_t)i) : PyTuple_GetItem(results, (Py_ssize_t)i);
}

static PJRT_Error* check_results(PyObject* results, size_t expected, const char* hook, const char* name) {
  bool list = PyList_Check(results);
  if (!list && !PyTuple_Check(results))
    return INTERNAL("hook %s: %s did not return a list or tuple of %zu values", hook, name, expected);
  size_t count = (size_t)(list ? PyList_Size(results) : PyTuple_Size(results));
  if (count != expected) return INTERNAL("hook %s: %s returned %zu values, expected %zu", hook, name, count, expected);
  for (size_t i = 0; i < count; i++)
    if (result_at(results, i) == Py_None) return INTERNAL("hook %s: %s returned None as value %zu", hook, name, i);
  return NULL;
}

/* By the hook. What fails is told to the results. */
static PJRT_Error* ask_to_schedule(PJRT_Executable* executable, Cell* const* outputs) {
  PyObject* values = PyList_New(0);
  for (size_t i = 0; i < executable->outputs.count && values; i++)
    if (executable->output_states[i] == LAZY && PyList_Append(values, outputs[i]->value) != 0) Py_CLEAR(values);
  if (!values) return error_from_python("schedule");
  lock_with_gil();
  PyObject* done = PyList_Size(values) ? hook_call(HOOK_schedule, PyTuple_Pack(1, values)) : Py_NewRef(Py_None);
  unlock_with_gil();
  drop_value(values);
  PJRT_Error* error = done ? NULL : error_from_python("schedule");
  Py_XDECREF(done);
  if (!error) return NULL;
  state_lock();
  for (size_t i = 0; i < executable->outputs.count; i++)
    if (outputs[i]->record) record_fail(outputs[i]->record, error);
  state_unlock();
  return error;
}

/* After its results are in their cells, and its donated inputs are let go (MLX writes into memory that only the graph holds): starts
 * evaluation when much is waiting. GIL held. */
static void schedule(PJRT_Executable* executable, Cell* const* outputs) {
  size_t bytes = 0, count = executable->outputs.count;
  for (size_t i = 0; i < count; i++)
    if (executable->output_states[i] == LAZY) bytes += executable->outputs.items[i].nbytes;
  lazy_bytes += (int64_t)bytes;
  lazy_cost += executable->cost;
  lazy_count++;
  evaluation_started(executable->cost);
  bool few = lazy_count < laziness.lazy_limit && lazy_bytes <= laziness.lazy_bytes && lazy_cost <= laziness.lazy_cost;
  if (executable->cost < laziness.eager_cost && few) return;
  lazy_count = lazy_bytes = lazy_cost = 0;
  /* On CPU, two threads that pass each other tiny ops cost more than one that does them all. */
  bool here = !laziness.sentinel && executable->cost < laziness.eager_cost;
  PJRT_Error* error = laziness.evaluate_now ? evaluate_lazy(here) : ask_to_schedule(executable, outputs);
  error_release(error); /* the records have it */
}

/* The results of a direct executable. */
static PJRT_Error* run_direct(PJRT_Executable* executable, Cell* const* inputs, size_t count, PyObject** results) {
  *results = NULL;
  bool looks = !executable->callable || (executable->next_look && executable->runs >= executable->next_look);
  if (looks && executable->runs > 0 && laziness.evaluate_now)
    error_release(evaluate_lazy(false)); /* a function is compiled with constants that the runs before made real */
  lock_with_gil();
  PJRT_Error* error = NULL;
  if (looks) error = prepare(executable);
  if (!error) {
    *results = call(executable, inputs, count);
    error = *results ? check_results(*results, executable->outputs.count, "prepare (its callable)", executable->name)
                     : error_from_python(executable->name);
    if (!error && executable->runs == 0) evaluation_to_the_end(*results);
  }
  if (!error) executable->runs++;
  else Py_CLEAR(*results);
  unlock_with_gil();
  return error;
}

/* Puts results into cells. State lock held; nothing here runs Python. */
static Waiter* fill(PJRT_Executable* executable, Cell* const* inputs, size_t count, PyObject* results, Cell* const* outputs) {
  Waiter* waiters = NULL;
  Record* record = NULL;
  for (size_t i = 0; i < executable->outputs.count; i++) {
    Cell* cell = outputs[i];
    cell->value = result_at(results, i);
    Py_INCREF(cell->value);
    cell->state = executable->output_states[i];
    if (cell->state != LAZY) {
      if (cell->event) waiters = waiters_join(event_complete(cell->event, NULL), waiters);
      continue;
    }
    if (!record) record = record_new(inputs, count);
    record_adopt(record, cell);
  }
  if (record) record_release(record);
  for (size_t i = 0; i < executable->outputs.count; i++) {
    Cell* cell = outputs[i];
    if (!cell->event || cell->state != LAZY) continue;
    evaluator_arm(cell); /* it also tells of failures */
  }
  return waiters;
}

/* ---- the arguments ---- */
static PJRT_Error* wrong_argument(PJRT_Executable* executable, size_t index, const PJRT_Buffer* buffer) {
  char expected[256], got[256];
  const Type* type = &executable->parameters.items[index];
  describe_type(expected, sizeof expected, type->type, type->dims, type->ndim);
  if (!buffer) return INVALID("argument %zu of %s is missing, expected %s", index, executable->name, expected);
  describe_type(got, sizeof got, buffer->type, buffer->dims, buffer->ndim);
  if (atomic_load(&buffer->deleted))
    return INVALID("argument %zu of %s (%s) has been deleted or donated", index, executable->name, got);
  return INVALID("argument %zu of %s: expected %s, got %s", index, executable->name, expected, got);
}

static bool fits(const Type* type, const PJRT_Buffer* buffer) {
  if (type->type == PJRT_Buffer_Type_TOKEN)
    return buffer->type == PJRT_Buffer_Type_TOKEN || buffer->type == PJRT_Buffer_Type_PRED;
  return type->type == buffer->type && type->ndim == buffer->ndim &&
         (type->ndim == 0 || memcmp(type->dims, buffer->dims, type->ndim * sizeof *type->dims) == 0);
}

/* Takes a reference on every argument's cell, and says in what states they are. State lock held. */
static PJRT_Error* take_arguments(PJRT_Executable* executable, PJRT_Buffer* const* buffers, size_t count,
                                  const bool* donated, Cell** cells, unsigned* states) {
  static uint64_t executions;
  uint64_t execution = ++executions;
  size_t taken = 0;
  PJRT_Error* error = NULL;
  for (; taken < count && !error; taken++) {
    PJRT_Buffer* buffer = buffers[taken];
    if (!buffer || atomic_load_explicit(&buffer->deleted, memory_order_relaxed) ||
        !fits(&executable->parameters.items[taken], buffer)) {
      error = wrong_argument(executable, taken, buffer);
      break;
    }
    if (donated) {
      if (buffer->seen == execution && (donated[taken] || donated[buffer->seen_index])) {
        error = INVALID("arguments %zu and %zu of %s are one array, which cannot be donated and used again",
                        buffer->seen_index, taken, executable->name);
        break;
      }
      buffer->seen = execution;
      buffer->seen_index = taken;
    }
    cells[taken] = buffer->cell;
    buffer->cell->references++;
    *states |= 1u << cell_settle(buffer->cell);
  }
  if (error) /* every handle still has its own reference */
    for (size_t i = 0; i < taken; i++) cells[i]->references--;
  return error;
}

/* Lets go of the arguments, and deletes what was donated. */
static void leave_arguments(PJRT_Buffer* const* buffers, Cell** cells, size_t count, const bool* donated) {
  size_t last = 0; /* the cells to free are moved to the front */
  state_lock();
  for (size_t i = 0; i < count; i++) {
    Cell* given = donated && donated[i] ? buffer_delete(buffers[i]) : NULL;
    if (given) given->references--; /* ours is still there */
    Cell* cell = cells[i];
    if (cell_unref(cell)) cells[last++] = cell;
  }
  state_unlock();
  for (size_t i = 0; i < last; i++) cell_free(cells[i]);
}

static PJRT_Error* first_failure(Cell* const* cells, size_t count) {
  for (size_t i = 0; i < count; i++)
    if (cells[i]->state == FAILED) return error_retain(cells[i]->error);
  return NULL;
}

/* ---- jobs ---- */
static void job_free(Job* job) {
  executable_release(job->executable);
  event_release(job->done);
  free(job->donated);
  free(job->outputs);
  free(job);
}

/* Tells everyone how it ended, and lets go. The GIL may or may not be held. */
static void job_finish(Job* job, PJRT_Error* error, Waiter* waiters, bool with_gil) {
  size_t outputs = job->executable->outputs.count, last = 0;
  state_lock();
  for (size_t i = 0; i < outputs; i++) {
    Cell* cell = job->outputs[i];
    if (error && cell->state == PENDING) {
      cell_fail(cell, error);
      if (cell->event) waiters = waiters_join(event_complete(cell->event, error), waiters);
    }
  }
  if (job->done) waiters = waiters_join(event_complete(job->done, error), waiters);
  state_changed();
  for (size_t i = 0; i < job->input_count; i++)
    if (job->inputs[i] && cell_unref(job->inputs[i])) job->inputs[last++] = job->inputs[i];
  size_t inputs = last;
  last = 0;
  for (size_t i = 0; i < outputs; i++)
    if (cell_unref(job->outputs[i])) job->outputs[last++] = job->outputs[i];
  state_unlock();
  for (size_t i = 0; i < inputs; i++) cell_free(job->inputs[i]);
  for (size_t i = 0; i < last; i++) cell_free(job->outputs[i]);
  job_free(job);
  if (waiters) {
    PyThreadState* thread = with_gil ? PyEval_SaveThread() : NULL;
    event_fire(waiters);
    if (thread) PyEval_RestoreThread(thread);
  }
}

void job_cancel(Job* job, PJRT_Error* error) { job_finish(job, error, NULL, false); }

/* The arguments of a job that is not direct, as a list that has the only reference to what was donated. */
static PyObject* argument_list(Job* job) {
  PyObject* list = PyList_New((Py_ssize_t)job->input_count);
  for (size_t i = 0; i < job->input_count && list; i++) {
    Cell* cell = job->inputs[i];
    state_lock();
    PyObject* value = job->donated && job->donated[i] ? cell_take(cell) : NULL;
    state_unlock();
    if (!value) value = cell->value, Py_INCREF(value);
    PyList_SetItem(list, (Py_ssize_t)i, value);
  }
  return list;
}

/* Before evaluation starts: MLX writes into memory that only the graph holds. */
static void drop_donated(Job* job) {
  for (size_t i = 0; i < job->input_count && job->donated; i++) {
    state_lock();
    PyObject* value = job->donated[i] ? cell_take(job->inputs[i]) : NULL;
    state_unlock();
    if (value) drop_value(value);
  }
}

static PJRT_Error* wait_for_inputs(Job* job) {
  for (size_t i = 0; i < job->input_count; i++) {
    Cell* cell = job->inputs[i];
    for (;;) {
      PJRT_Error* error;
      State state = cell_state(cell, &error);
      if (state == FAILED) return error;
      if (state != PENDING) break;
      if (!executor_help()) /* a job inside a job, waiting for the outer one */
        return error_new(PJRT_Error_Code_FAILED_PRECONDITION,
                         "a callback uses the result of the computation that called it");
    }
  }
  return NULL;
}

/* While a profile is taken, a program is evaluated before the next one starts. GIL held. */
static void profile(PJRT_Executable* executable, Cell* const* outputs, int64_t started) {
  for (size_t i = 0; i < executable->outputs.count; i++) error_release(cell_materialise(outputs[i])); /* the cell has it */
  profile_event(PROFILE_PROGRAMS, executable->name, started);
}

void job_run(Job* job) {
  PJRT_Executable* executable = job->executable;
  int64_t started = profile_now();
  PyObject* results = NULL;
  PJRT_Error* error = wait_for_inputs(job);
  if (!error && executable->direct) {
    error = run_direct(executable, job->inputs, job->input_count, &results);
  } else if (!error) {
    PyObject* list = argument_list(job);
    evaluation_started(2 * laziness.short_cost); /* a loop may be in it */
    results = list ? hook_call(HOOK_execute, Py_BuildValue("(ON)", executable->object, list)) : NULL;
    error = results ? check_results(results, executable->outputs.count, "execute", executable->name)
                    : error_from_python(executable->name);
  }
  Waiter* waiters = NULL;
  if (!error) {
    state_lock();
    waiters = fill(executable, job->inputs, job->input_count, results, job->outputs);
    state_unlock();
  }
  if (results) drop_value(results);
  if (!error && executable->direct) {
    drop_donated(job);
    schedule(executable, job->outputs);
  }
  if (!error && started) profile(executable, job->outputs, started);
  job_finish(job, error, waiters, true);
  error_release(error);
}

/* ---- prompt programs: over before a job could start ---- */
static PJRT_Error* evaluate_inputs(Cell* const* inputs, size_t count) {
  PJRT_Error* error = NULL;
  PyGILState_STATE gil = PyGILState_Ensure();
  for (size_t i = 0; i < count && !error; i++) error = cell_materialise(inputs[i]);
  PyGILState_Release(gil);
  return error;
}

/* GIL held. */
static PJRT_Error* run_prompt(PJRT_Executable* executable, Cell* const* inputs, size_t count, PyObject** results) {
  PyObject* list = PyList_New((Py_ssize_t)count);
  for (size_t i = 0; i < count && list; i++) {
    PyObject* value = inputs[i]->value;
    Py_INCREF(value);
    PyList_SetItem(list, (Py_ssize_t)i, value);
  }
  *results = list ? hook_call(HOOK_execute, Py_BuildValue("(ON)", executable->object, list)) : NULL;
  PJRT_Error* error = *results ? check_results(*results, executable->outputs.count, "execute", executable->name)
                               : error_from_python(executable->name);
  if (error) Py_CLEAR(*results);
  return error;
}

/* ---- the entry ---- */
static PJRT_Error* no_memory(void) {
  return error_new(PJRT_Error_Code_RESOURCE_EXHAUSTED, "no memory to execute a program");
}

/* New handles for cells, whose references it takes; all of them, or none. `only`, if not NULL, is the device of a program for any one. */
static PJRT_Error* wrap_outputs(PJRT_Executable* executable, Cell** cells, PJRT_Device* only, PJRT_Buffer** const* lists) {
  size_t count = executable->outputs.count, each = count / executable->shards;
#define OUT(i) lists[(i) / each][(i) % each]
  for (size_t i = 0; i < count; i++) {
    const Type* type = &executable->outputs.items[i];
    PJRT_Device* device = only ? only : executable->devices[i / each];
    PJRT_Memory* memory = device->memories[executable->output_memories[i % each]];
    OUT(i) = buffer_new(memory, cells[i], type->type, type->nbytes, type->ndim, type->dims);
    if (OUT(i) && executable->laid_out) OUT(i)->layout = layout_or_null(executable->output_layouts[i % each]);
    if (OUT(i)) continue;
    for (size_t j = i + 1; j < count; j++) cell_release(cells[j]);
    for (size_t j = 0; j < i; j++) {
      PJRT_Buffer_Destroy_Args destroy = {.struct_size = sizeof destroy, .buffer = OUT(j)};
      Buffer_Destroy(&destroy);
      OUT(j) = NULL;
    }
    return no_memory();
  }
#undef OUT
  return NULL;
}

static bool new_cells(PJRT_Executable* executable, Cell** cells) {
  for (size_t i = 0; i < executable->outputs.count; i++) {
    cells[i] = cell_new(PENDING, NULL, executable->outputs.items[i].nbytes);
    if (cells[i]) continue;
    while (i-- > 0) cell_release(cells[i]);
    return false;
  }
  return true;
}

/* A job with its own references to its cells. */
static PJRT_Error* job_new(PJRT_Executable* executable, Cell* const* inputs, size_t count, const bool* donated,
                           Cell* const* outputs, Job** out) {
  size_t output_count = executable->outputs.count;
  Job* job = calloc(1, sizeof *job + count * sizeof *job->inputs);
  if (!job) return no_memory();
  job->executable = executable_retain(executable);
  job->outputs = malloc((output_count + 1) * sizeof *job->outputs);
  job->donated = donated ? malloc(count * sizeof *donated) : NULL;
  bool told = executable->effects || executable->waits; /* of its end */
  job->done = told ? event_new() : NULL;
  PJRT_Error* error = threads_start_executor();
  if (!error && (!job->outputs || (donated && !job->donated) || (told && !job->done)))
    error = no_memory();
  if (error) {
    job_free(job);
    return error;
  }
  job->input_count = count;
  if (donated) memcpy(job->donated, donated, count * sizeof *donated);
  if (count) memcpy(job->inputs, inputs, count * sizeof *inputs);
  memcpy(job->outputs, outputs, output_count * sizeof *outputs);
  state_lock();
  for (size_t i = 0; i < count; i++) inputs[i]->references++;
  for (size_t i = 0; i < output_count; i++) outputs[i]->references++;
  state_unlock();
  *out = job;
  return NULL;
}

static void job_start(Job* job) {
  if (!on_executor) {
    executor_submit(job);
    return;
  }
  PyGILState_STATE gil = PyGILState_Ensure(); /* a callback: nobody else would run it, and its caller is waiting */
  job_run(job);
  PyGILState_Release(gil);
}

static PJRT_Error* await(PJRT_Event* event) {
  PJRT_Event_Await_Args args = {.struct_size = sizeof args, .event = event};
  return Event_Await(&args);
}

static PJRT_Error* execute(PJRT_Executable* executable, PJRT_Buffer* const* buffers, Cell** inputs, size_t count,
                           const bool* donated, Cell** outputs, PJRT_Event** done) {
  unsigned states = 0;
  state_lock();
  PJRT_Error* error = take_arguments(executable, buffers, count, donated, inputs, &states);
  PJRT_Error* failed = !error && states & 1u << FAILED ? first_failure(inputs, count) : NULL;
  state_unlock();
  if (error) return error;
  if (!new_cells(executable, outputs)) error = no_memory();
  if (error) {
    error_release(failed);
    leave_arguments(buffers, inputs, count, NULL);
    return error;
  }

  bool prompt = executable->prompt && !(states & 1u << PENDING) && (!(states & 1u << LAZY) || evaluates_at_once());
  if (prompt && !failed && states & 1u << LAZY) failed = evaluate_inputs(inputs, count);
  if (failed) {
    state_lock();
    for (size_t i = 0; i < executable->outputs.count; i++) cell_fail(outputs[i], failed);
    state_unlock();
    if (executable->effects) *done = event_failed(error_retain(failed));
    error_release(failed);
    leave_arguments(buffers, inputs, count, donated);
  } else if (!prompt && (!executable->direct || states & 1u << PENDING)) {
    Job* job = NULL;
    error = job_new(executable, inputs, count, donated, outputs, &job);
    if (!error) *done = event_retain(job->done);
    leave_arguments(buffers, inputs, count, error ? NULL : donated);
    if (!error) job_start(job); /* after the caller let go, so that donated values have one owner */
    if (!error && executable->waits) {
      error = await(*done);
      if (error) {
        event_release(*done);
        *done = NULL;
      }
    }
  } else {
    PyObject* results;
    int64_t started = profile_now();
    PyGILState_STATE gil = PyGILState_Ensure();
    error = (prompt ? run_prompt : run_direct)(executable, inputs, count, &results);
    if (!error) {
      state_lock();
      Waiter* none = fill(executable, inputs, count, results, outputs);
      state_unlock();
      (void)none; /* nobody knows these cells yet */
    }
    leave_arguments(buffers, inputs, count, error ? NULL : donated);
    Py_XDECREF(results);
    if (!error) schedule(executable, outputs);
    if (!error && started) profile(executable, outputs, started);
    PyGILState_Release(gil);
  }
  if (error)
    for (size_t i = 0; i < executable->outputs.count; i++) cell_release(outputs[i]);
  return error;
}

PJRT_Error* LoadedExecutable_Execute(PJRT_LoadedExecutable_Execute_Args* args) {
  REFUSE_IF_CLOSED();
  PJRT_Executable* executable = args->executable->executable;
  size_t shards = executable->shards, count = args->num_args * shards, outputs = executable->outputs.count;
  if (atomic_load_explicit(&args->executable->deleted, memory_order_relaxed))
    return INVALID("the executable %s has been deleted", executable->name);
  if (args->num_devices != shards)
    return INVALID("%s runs on %zu device%s, not on %zu", executable->name, shards, shards == 1 ? "" : "s",
                   args->num_devices);
  if (count != executable->parameters.count)
    return INVALID("%s takes %zu arguments, got %zu", executable->name,
                   executable->parameters.count / shards, args->num_args);
  atomic_fetch_add_explicit(&execute_count, 1, memory_order_relaxed);

  Cell* few[32];
  Cell** cells = count + outputs <= COUNT_OF(few) ? few : malloc((count + outputs) * sizeof *cells);
  const bool* donated = executable->donated;
  bool* fewer = NULL;
  const PJRT_ExecuteOptions* options = args->options;
  if (donated && options && options->num_non_donatable_input_indices > 0) {
    donated = fewer = malloc(count * sizeof *fewer);
    if (fewer) memcpy(fewer, executable->donated, count * sizeof *fewer);
    for (size_t i = 0; i < options->num_non_donatable_input_indices && fewer; i++) {
      int64_t index = options->non_donatable_input_indices[i];
      if (index < 0 || (size_t)index >= args->num_args) continue;
      for (size_t shard = 0; shard < shards; shard++) fewer[shard * args->num_args + (size_t)index] = false;
    }
  }
  PJRT_Buffer** joined = NULL; /* the arguments of all devices, one after the other */
  if (shards > 1 && (joined = malloc((count + 1) * sizeof *joined)))
    for (size_t i = 0; i < count; i++) joined[i] = args->argument_lists[i / args->num_args][i % args->num_args];
  PJRT_Buffer* const* buffers = shards > 1 ? joined : count ? args->argument_lists[0] : NULL;
  PJRT_Event* done = NULL;
  PJRT_Error* error = !cells || (executable->donated && !donated) || (shards > 1 && !joined)
                          ? no_memory()
                          : execute(executable, buffers, cells, count, donated, cells + count, &done);
  if (!error) {
    error = wrap_outputs(executable, cells + count, shards == 1 ? args->execute_device : NULL, args->output_lists);
    for (size_t shard = 0; shard < shards && args->device_complete_events && !error; shard++)
      args->device_complete_events[shard] = done ? event_retain(done) : &event_ready;
    event_release(done);
  }
  free(joined);
  if (cells != few) free(cells);
  free(fewer);
  return error;
}
