/* PJRT_Error: a code and a message, counted, so that one failure can be told to many. */
#include <stdarg.h>
#include <stdio.h>

#include "shim.h"

static PJRT_Error out_of_memory = {1, PJRT_Error_Code_RESOURCE_EXHAUSTED, 0, {}};

PJRT_Error* error_from_text(PJRT_Error_Code code, const char* text, size_t size) {
  PJRT_Error* error = malloc(sizeof *error + size + 1);
  if (!error) return &out_of_memory;
  atomic_init(&error->references, 1);
  error->code = code;
  error->size = size;
  memcpy(error->message, text, size);
  error->message[size] = 0;
  return error;
}

PJRT_Error* error_new(PJRT_Error_Code code, const char* format, ...) {
  char text[1024];
  va_list arguments;
  va_start(arguments, format);
  int size = vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  if (size < 0) size = 0;
  if ((size_t)size >= sizeof text) size = sizeof text - 1;
  return error_from_text(code, text, (size_t)size);
}

PJRT_Error* error_retain(PJRT_Error* error) {
  if (error && error != &out_of_memory) atomic_fetch_add(&error->references, 1);
  return error;
}

void error_release(PJRT_Error* error) {
  if (!error || error == &out_of_memory) return;
  if (atomic_fetch_sub(&error->references, 1) == 1) free(error);
}

PJRT_Error* error_closed(void) {
  return error_new(PJRT_Error_Code_FAILED_PRECONDITION, "%s",
                   atomic_load(&process_closed) == FORKED
                       ? "jax_mps cannot be used in a forked process; start it with the spawn method instead"
                       : "jax_mps cannot be used any more: the interpreter is shutting down");
}

/* The last resort: the type's name and whatever str() makes of it. */
static PJRT_Error* describe_plainly(const char* hook, PyObject* exception) {
  PyObject* name = PyObject_GetAttrString((PyObject*)Py_TYPE(exception), "__name__");
  PyObject* text = PyObject_Str(exception);
  const char* name_utf8 = name ? PyUnicode_AsUTF8AndSize(name, NULL) : NULL;
  const char* text_utf8 = text ? PyUnicode_AsUTF8AndSize(text, NULL) : NULL;
  PyErr_Clear();
  PJRT_Error* error = INTERNAL("%s: %s: %s", hook, name_utf8 ? name_utf8 : "exception",
                               text_utf8 ? text_utf8 : "(it cannot be printed)");
  Py_XDECREF(name);
  Py_XDECREF(text);
  return error;
}

PJRT_Error* error_from_python(const char* hook) {
  PyObject *type, *exception, *traceback;
  PyErr_Fetch(&type, &exception, &traceback);
  if (!type) return INTERNAL("hook %s failed without an exception", hook);
  PyErr_NormalizeException(&type, &exception, &traceback);
  if (traceback && exception) PyException_SetTraceback(exception, traceback);

  PJRT_Error* error = NULL;
  PyObject* described = exception && hooks[HOOK_describe_error] && !IS_CLOSED()
                            ? hook_call(HOOK_describe_error, PyTuple_Pack(1, exception))
                            : NULL;
  if (described && PyTuple_Check(described) && PyTuple_Size(described) == 2) {
    long code = PyLong_AsLong(PyTuple_GetItem(described, 0));
    Py_ssize_t size = 0;
    const char* text =
        PyErr_Occurred() ? NULL : PyUnicode_AsUTF8AndSize(PyTuple_GetItem(described, 1), &size);
    bool known = code > PJRT_Error_Code_OK && code <= PJRT_Error_Code_UNAUTHENTICATED;
    if (text) error = error_from_text(known ? (PJRT_Error_Code)code : PJRT_Error_Code_INTERNAL, text, (size_t)size);
  }
  PyErr_Clear();
  if (!error)
    error = exception ? describe_plainly(hook, exception) : INTERNAL("hook %s failed; its exception cannot be made", hook);
  /* An interrupt that ended a hook is the user's: it shall be raised again as soon as JAX returns to Python. On our own threads the
   * main one has it already. */
  if (type && !on_own_thread && PyErr_GivenExceptionMatches(type, PyExc_KeyboardInterrupt)) PyErr_SetInterrupt();
  Py_XDECREF(described);
  Py_XDECREF(type);
  Py_XDECREF(exception);
  Py_XDECREF(traceback);
  return error;
}

void Error_Destroy(PJRT_Error_Destroy_Args* args) { error_release(args->error); }

void Error_Message(PJRT_Error_Message_Args* args) {
  bool out = args->error == &out_of_memory;
  args->message = out ? "out of memory" : args->error->message;
  args->message_size = out ? strlen(args->message) : args->error->size;
}

PJRT_Error* Error_GetCode(PJRT_Error_GetCode_Args* args) {
  args->code = args->error->code;
  return NULL;
}

PJRT_Error* Error_ForEachPayload(PJRT_Error_ForEachPayload_Args* args) {
  (void)args; /* our errors carry none */
  return NULL;
}
