/* The cold path between Python and the shim: installing the hooks, the capsule, counts, and what tests read. */
#include "bridge.h"

#include "shim.h"

PyObject* hooks[HOOK_COUNT];
static const char* const hook_names[] = {
#define HOOK_NAME(name) #name,
    HOOKS(HOOK_NAME)
#undef HOOK_NAME
};

extern const PJRT_Api* GetPjrtApi(void);

PyObject* hook_call(Hook hook, PyObject* arguments) {
  if (!arguments) return NULL;
  PyObject* callable = hooks[hook];
  if (!callable) {
    Py_DECREF(arguments);
    PyErr_Format(PyExc_RuntimeError, "hook %s is not installed", hook_names[hook]);
    return NULL;
  }
  Py_INCREF(callable); /* it may be replaced while it runs */
  PyObject* result = PyObject_CallObject(callable, arguments);
  Py_DECREF(callable);
  Py_DECREF(arguments);
  return result;
}

int shim_install(uintptr_t address) {
  PyGILState_STATE gil = PyGILState_Ensure();
  PyObject* dict = (PyObject*)address;
  bool complete = PyDict_Check(dict);
  for (size_t i = 0; i < HOOK_COUNT && complete; i++) {
    PyObject* hook = PyDict_GetItemString(dict, hook_names[i]);
    complete = hook && PyCallable_Check(hook);
  }
  for (size_t i = 0; i < HOOK_COUNT && complete; i++) {
    PyObject* old = hooks[i];
    hooks[i] = PyDict_GetItemString(dict, hook_names[i]);
    Py_INCREF(hooks[i]);
    Py_XDECREF(old);
  }
  PyGILState_Release(gil);
  return complete ? 0 : -1;
}

int shim_append_capsule(uintptr_t list) {
  PyGILState_STATE gil = PyGILState_Ensure();
  PyObject* capsule = PyCapsule_New((void*)GetPjrtApi(), "pjrt_c_api", NULL);
  int failed = !capsule || !PyList_Check((PyObject*)list) || PyList_Append((PyObject*)list, capsule) != 0;
  Py_XDECREF(capsule);
  PyErr_Clear();
  PyGILState_Release(gil);
  return failed ? -1 : 0;
}

uintptr_t shim_api(void) { return (uintptr_t)GetPjrtApi(); }

int shim_layout(const char* name, int64_t* value) {
  static const struct {
    const char* name;
    int64_t value;
  } rows[] = {
#include "layout.inc"
  };
  for (size_t i = 0; i < COUNT_OF(rows); i++) {
    if (strcmp(rows[i].name, name) != 0) continue;
    *value = rows[i].value;
    return 1;
  }
  return 0;
}

int shim_value_at(uintptr_t pointer, uintptr_t list) {
  if (IS_CLOSED()) return 0;
  PyGILState_STATE gil = PyGILState_Ensure();
  PyObject* value = cell_value_at((const void*)pointer);
  int found = value && PyList_Append((PyObject*)list, value) == 0;
  Py_XDECREF(value);
  PyErr_Clear();
  PyGILState_Release(gil);
  return found;
}

void shim_counts(int64_t counts[8]) {
  counts[0] = atomic_load(&buffer_count);
  counts[1] = atomic_load(&executable_count);
  counts[2] = atomic_load(&record_count);
  counts[3] = atomic_load(&pending_jobs);
  counts[4] = atomic_load(&event_count);
  counts[5] = atomic_load(&buffer_bytes);
  counts[6] = atomic_load(&execute_count);
  counts[7] = 0;
}

int shim_evaluates_at_once(void) { return evaluates_at_once(); }
int shim_evaluation_must_end(void) { return evaluation_must_end(); }
