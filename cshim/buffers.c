/* PJRT_Buffer: JAX's handle on a cell, with the static shape that answers for it. */
#include <dlfcn.h>
#include <stdio.h>
#include <sys/mman.h>

#include "bridge.h"
#include "shim.h"

atomic_long buffer_count;
atomic_llong buffer_bytes;

/* By PJRT_Buffer_Type; sub-byte types travel one element a byte. */
static const struct {
  const char* name;
  unsigned char size;
} types[] = {
    {"invalid", 0}, {"bool", 1},   {"int8", 1},       {"int16", 2},        {"int32", 4},
    {"int64", 8},   {"uint8", 1},  {"uint16", 2},     {"uint32", 4},       {"uint64", 8},
    {"float16", 2}, {"float32", 4}, {"float64", 8},   {"bfloat16", 2},     {"complex64", 8},
    {"complex128", 16}, {"float8_e5m2", 1}, {"float8_e4m3fn", 1}, {"float8_e4m3b11fnuz", 1}, {"float8_e5m2fnuz", 1},
    {"float8_e4m3fnuz", 1}, {"int4", 1}, {"uint4", 1}, {"token", 1},       {"int2", 1},
    {"uint2", 1},   {"float8_e4m3", 1}, {"float8_e3m4", 1}, {"float8_e8m0fnu", 1}, {"float4_e2m1fn", 1},
    {"int1", 1},    {"uint1", 1},
};

static size_t size_of(PJRT_Buffer_Type type) { return (size_t)type < COUNT_OF(types) ? types[type].size : 0; }

const char* type_name(PJRT_Buffer_Type type) {
  return (size_t)type < COUNT_OF(types) ? types[type].name : "unknown";
}

size_t describe_type(char* text, size_t size, PJRT_Buffer_Type type, const int64_t* dims, size_t ndim) {
  int at = snprintf(text, size, "%s[", type_name(type));
  for (size_t i = 0; i < ndim && (size_t)at < size; i++)
    at += snprintf(text + at, size - (size_t)at, i ? ",%lld" : "%lld", (long long)dims[i]);
  if ((size_t)at < size) at += snprintf(text + at, size - (size_t)at, "]");
  return (size_t)at;
}

bool nbytes_of(PJRT_Buffer_Type type, const int64_t* dims, size_t ndim, size_t* nbytes) {
  size_t size = size_of(type);
  bool empty = false, known = size > 0;
  for (size_t i = 0; i < ndim; i++) {
    known = known && dims[i] >= 0;
    empty = empty || dims[i] == 0;
  }
  for (size_t i = 0; i < ndim && known && !empty; i++) known = !__builtin_mul_overflow(size, (size_t)dims[i], &size);
  *nbytes = empty ? 0 : size;
  return known && size <= PTRDIFF_MAX;
}

PJRT_Buffer* buffer_new(PJRT_Memory* memory, Cell* cell, PJRT_Buffer_Type type, size_t nbytes, size_t ndim,
                        const int64_t* dims) {
  PJRT_Buffer* buffer = cell ? calloc(1, sizeof *buffer + ndim * sizeof *dims) : NULL;
  if (!buffer) {
    cell_release(cell);
    return NULL;
  }
  buffer->memory = memory;
  buffer->cell = cell;
  buffer->type = type;
  buffer->nbytes = nbytes;
  buffer->ndim = ndim;
  if (ndim) memcpy(buffer->dims, dims, ndim * sizeof *dims);
  atomic_fetch_add_explicit(&buffer_count, 1, memory_order_relaxed);
  atomic_fetch_add_explicit(&buffer_bytes, (long long)nbytes, memory_order_relaxed);
  return buffer;
}

static void free_handle(PJRT_Buffer* buffer) { free(buffer); }

/* Gives the cell up unless a pointer into it is out. */
static Cell* detach(PJRT_Buffer* buffer) {
  if (buffer->external > 0) return NULL;
  Cell* cell = buffer->cell;
  buffer->cell = NULL;
  return cell;
}

Cell* buffer_delete(PJRT_Buffer* buffer) {
  if (atomic_exchange(&buffer->deleted, true)) return NULL;
  atomic_fetch_sub_explicit(&buffer_count, 1, memory_order_relaxed);
  atomic_fetch_sub_explicit(&buffer_bytes, (long long)buffer->nbytes, memory_order_relaxed);
  return detach(buffer);
}

static PJRT_Error* error_deleted(const PJRT_Buffer* buffer) {
  char text[256];
  describe_type(text, sizeof text, buffer->type, buffer->dims, buffer->ndim);
  return INVALID("the array (%s) has been deleted or donated", text);
}

/* A reference to its cell, for as long as the caller works on it. */
static PJRT_Error* take_cell(PJRT_Buffer* buffer, bool even_deleted, Cell** cell) {
  REFUSE_IF_CLOSED();
  state_lock();
  *cell = even_deleted || !atomic_load(&buffer->deleted) ? buffer->cell : NULL;
  if (*cell) (*cell)->references++;
  state_unlock();
  return *cell ? NULL : error_deleted(buffer);
}

PJRT_Error* Buffer_Destroy(PJRT_Buffer_Destroy_Args* args) {
  PJRT_Buffer* buffer = args->buffer;
  if (!buffer || IS_CLOSED()) return NULL; /* leaked on purpose: the process ends, or is a fork */
  state_lock();
  Cell* cell = buffer_delete(buffer);
  buffer->destroyed = true;
  bool gone = buffer->external == 0;
  bool last = cell && cell_unref(cell);
  state_unlock();
  if (last) cell_free(cell);
  if (gone) free_handle(buffer);
  return NULL;
}

PJRT_Error* Buffer_Delete(PJRT_Buffer_Delete_Args* args) {
  if (IS_CLOSED()) { /* no error: jaxlib would abort */
    atomic_store(&args->buffer->deleted, true);
    return NULL;
  }
  state_lock();
  Cell* cell = buffer_delete(args->buffer);
  bool last = cell && cell_unref(cell);
  state_unlock();
  if (last) cell_free(cell);
  return NULL;
}

PJRT_Error* Buffer_IsDeleted(PJRT_Buffer_IsDeleted_Args* args) {
  args->is_deleted = atomic_load(&args->buffer->deleted);
  return NULL;
}

PJRT_Error* Buffer_IncreaseExternalReferenceCount(PJRT_Buffer_IncreaseExternalReferenceCount_Args* args) {
  PJRT_Buffer* buffer = args->buffer;
  REFUSE_IF_CLOSED();
  state_lock();
  bool alive = buffer->cell != NULL;
  if (alive) buffer->external++;
  state_unlock();
  return alive ? NULL : error_deleted(buffer);
}

PJRT_Error* Buffer_DecreaseExternalReferenceCount(PJRT_Buffer_DecreaseExternalReferenceCount_Args* args) {
  PJRT_Buffer* buffer = args->buffer;
  if (IS_CLOSED()) return NULL;
  state_lock();
  if (buffer->external <= 0) {
    state_unlock();
    return INVALID("the array has no external references");
  }
  buffer->external--;
  Cell* cell = atomic_load(&buffer->deleted) ? detach(buffer) : NULL;
  bool gone = buffer->destroyed && buffer->external == 0;
  bool last = cell && cell_unref(cell);
  state_unlock();
  if (last) cell_free(cell);
  if (gone) free_handle(buffer);
  return NULL;
}

/* ---- what the handle itself knows ---- */
PJRT_Error* Buffer_ElementType(PJRT_Buffer_ElementType_Args* args) {
  args->type = args->buffer->type;
  return NULL;
}

PJRT_Error* Buffer_Dimensions(PJRT_Buffer_Dimensions_Args* args) {
  args->dims = args->buffer->dims;
  args->num_dims = args->buffer->ndim;
  return NULL;
}

PJRT_Error* Buffer_UnpaddedDimensions(PJRT_Buffer_UnpaddedDimensions_Args* args) {
  args->unpadded_dims = args->buffer->dims;
  args->num_dims = args->buffer->ndim;
  return NULL;
}

PJRT_Error* Buffer_DynamicDimensionIndices(PJRT_Buffer_DynamicDimensionIndices_Args* args) {
  args->dynamic_dim_indices = NULL;
  args->num_dynamic_dims = 0;
  return NULL;
}

PJRT_Error* Buffer_GetMemoryLayout(PJRT_Buffer_GetMemoryLayout_Args* args) {
  size_t ndim = args->buffer->ndim;
  const Layout* layout = args->buffer->layout ? args->buffer->layout : layout_row_major(ndim);
  if (!layout) return error_new(PJRT_Error_Code_UNIMPLEMENTED, "the layout of %zu dimensions", ndim);
  memset(&args->layout, 0, sizeof args->layout);
  args->layout.struct_size = PJRT_SIZE_UP_TO(PJRT_Buffer_MemoryLayout, type);
  args->layout.type = PJRT_Buffer_MemoryLayout_Type_Tiled;
  args->layout.tiled.struct_size = PJRT_SIZE_UP_TO(PJRT_Buffer_MemoryLayout_Tiled, num_tiles);
  args->layout.tiled.minor_to_major = layout->minor_to_major;
  args->layout.tiled.minor_to_major_size = ndim;
  return NULL;
}

PJRT_Error* Buffer_OnDeviceSizeInBytes(PJRT_Buffer_OnDeviceSizeInBytes_Args* args) {
  args->on_device_size_in_bytes = args->buffer->nbytes;
  return NULL;
}

PJRT_Error* Buffer_Device(PJRT_Buffer_Device_Args* args) {
  args->device = args->buffer->memory->device;
  return NULL;
}

PJRT_Error* Buffer_Memory(PJRT_Buffer_Memory_Args* args) {
  args->memory = args->buffer->memory;
  return NULL;
}

/* jaxlib asks its transfer guard for nothing that is on the CPU, where reading takes no transfer. Who set a guard wants to be told of an
 * array's first reading, as on a device whose arrays JAX keeps a copy of. */
static atomic_int guard_everywhere;
static _Thread_local int guard_here = -1;

void shim_guard_reads(int everywhere, int guard) {
  if (everywhere) atomic_store(&guard_everywhere, guard);
  else guard_here = guard;
}

static bool is_guarded(const PJRT_Buffer* buffer) {
  int guard = guard_here >= 0 ? guard_here : atomic_load_explicit(&guard_everywhere, memory_order_relaxed);
  return guard && !atomic_load_explicit(&buffer->was_read, memory_order_relaxed);
}

PJRT_Error* Buffer_IsOnCpu(PJRT_Buffer_IsOnCpu_Args* args) {
  /* the memory that a pointer would show is row-major: what JAX takes for something else is copied out */
  args->is_on_cpu = args->buffer->memory->device->client->is_on_cpu && !args->buffer->layout && !is_guarded(args->buffer);
  if (args->is_on_cpu) atomic_store_explicit(&args->buffer->was_read, true, memory_order_relaxed); /* or will be at once */
  return NULL;
}

/* ---- readiness ---- */
/* On the executor, a callback waits for a job behind its own: nobody else would run it. */
static void help_until_filled(Cell* cell) {
  PyGILState_STATE gil = PyGILState_Ensure();
  for (;;) {
    state_lock();
    bool pending = cell->state == PENDING;
    state_unlock();
    if (!pending || !executor_help()) break;
  }
  PyGILState_Release(gil);
}

/* `is_ready` keeps the GIL and must not block. Whoever comes without it is about to wait: evaluating here saves two changes of thread. */
static void evaluate_for_waiter(Cell* cell) {
  if (!laziness.evaluate_now) return;
  state_lock();
  bool lazy = cell_settle(cell) == LAZY && !cell->queued;
  state_unlock();
  if (!lazy || (on_own_thread && !on_executor) || caller_has_gil()) return;
  PyGILState_STATE gil = PyGILState_Ensure();
  error_release(cells_evaluate(&cell, 1)); /* the cell has it too */
  PyGILState_Release(gil);
}

static PJRT_Event* arm(Cell* cell, PJRT_Error** failure) {
  PJRT_Event* event = NULL;
  state_lock();
  State state = cell_settle(cell);
  if (state == READY || state == HOST) {
    event = &event_ready;
  } else if (state == FAILED) {
    *failure = error_retain(cell->error);
  } else if (cell->event || (cell->event = event_new())) {
    if (state == LAZY) evaluator_arm(cell);
    event = event_retain(cell->event);
  }
  state_unlock();
  return event;
}

/* JAX waits for its tokens at exit, after this plugin's own end: what is there needs nobody any more. */
static bool is_there_at_exit(PJRT_Buffer* buffer) {
  if (atomic_load(&process_closed) != FINALIZING) return false;
  state_lock();
  bool there = buffer->cell && !atomic_load(&buffer->deleted) && (buffer->cell->state == READY || buffer->cell->state == HOST);
  state_unlock();
  return there;
}

/* jaxlib aborts when this returns an error, so the event has it. */
PJRT_Error* Buffer_ReadyEvent(PJRT_Buffer_ReadyEvent_Args* args) {
  if (is_there_at_exit(args->buffer)) {
    args->event = &event_ready;
    return NULL;
  }
  Cell* cell = NULL;
  PJRT_Event* event = NULL;
  PJRT_Error* error = take_cell(args->buffer, false, &cell);
  if (!error) error = threads_start_evaluator();
  if (!error) {
    if (on_executor) help_until_filled(cell);
    evaluate_for_waiter(cell);
    event = arm(cell, &error);
  }
  cell_release(cell);
  if (!event && !error) error = error_new(PJRT_Error_Code_RESOURCE_EXHAUSTED, "no memory for an event");
  args->event = event ? event : event_failed(error);
  return NULL;
}

/* ---- from the host ---- */
static bool is_row_major(const int64_t* strides, const int64_t* dims, size_t ndim, size_t item) {
  int64_t expected = (int64_t)item;
  for (size_t i = ndim; i-- > 0;) {
    if (dims[i] != 1 && strides[i] != expected) return false;
    expected *= dims[i];
  }
  return true;
}

/* Copies between two strided layouts of the same shape; not called for empty arrays. */
static void copy_strided(char* to, const int64_t* to_strides, const char* from, const int64_t* from_strides,
                         const int64_t* dims, size_t ndim, size_t item) {
  if (ndim == 0) {
    memcpy(to, from, item);
    return;
  }
  if (ndim > 1) {
    for (int64_t i = 0; i < dims[0]; i++)
      copy_strided(to + i * to_strides[0], to_strides + 1, from + i * from_strides[0], from_strides + 1, dims + 1,
                   ndim - 1, item);
    return;
  }
  int64_t n = dims[0], a = to_strides[0], b = from_strides[0];
  if (a == (int64_t)item && b == (int64_t)item) {
    memcpy(to, from, (size_t)n * item);
    return;
  }
#define COPY_ITEMS(size) \
  case size:             \
    for (int64_t i = 0; i < n; i++) memcpy(to + i * a, from + i * b, size); \
    return
  switch (item) {
    COPY_ITEMS(1);
    COPY_ITEMS(2);
    COPY_ITEMS(4);
    COPY_ITEMS(8);
    COPY_ITEMS(16);
  }
#undef COPY_ITEMS
}

static void row_major(int64_t* strides, const int64_t* dims, size_t ndim, size_t item) {
  int64_t stride = (int64_t)item;
  for (size_t i = ndim; i-- > 0;) {
    strides[i] = stride;
    stride *= dims[i];
  }
}

static PyObject* tuple_of(const int64_t* values, size_t count) {
  PyObject* tuple = PyTuple_New((Py_ssize_t)count);
  for (size_t i = 0; i < count && tuple; i++) {
    PyObject* value = PyLong_FromLongLong(values[i]);
    if (!value || PyTuple_SetItem(tuple, (Py_ssize_t)i, value) != 0) Py_CLEAR(tuple);
  }
  return tuple;
}

/* The pair (value, state) of a hook, as a cell; state: 0 may be lazy, 1 on the host, 2 evaluated. */
static PJRT_Error* cell_from_pair(PyObject* pair, const char* hook, size_t nbytes, Cell** cell) {
  if (!PyTuple_Check(pair) || PyTuple_Size(pair) != 2) return INTERNAL("hook %s did not return (value, state)", hook);
  static const State states[] = {LAZY, HOST, READY};
  long state = PyLong_AsLong(PyTuple_GetItem(pair, 1));
  if (state == -1 && PyErr_Occurred()) return error_from_python(hook);
  if (state < 0 || state > 2) return INTERNAL("hook %s returned %ld as a state", hook, state);
  PyObject* value = PyTuple_GetItem(pair, 0);
  Py_INCREF(value);
  *cell = cell_new(states[state], value, nbytes);
  return *cell ? NULL : error_new(PJRT_Error_Code_RESOURCE_EXHAUSTED, "no memory for a buffer");
}

/* The caller's memory, lent to a hook for one call. It counts who still looks at it: a numpy array on a memoryview does not keep the
 * memoryview from being released, and would be left on memory that is not ours. */
typedef struct {
  PyObject_HEAD
  void* data;
  Py_ssize_t size, views;
} Loan;

static int loan_get(PyObject* self, Py_buffer* view, int flags) {
  Loan* loan = (Loan*)self;
  if (PyBuffer_FillInfo(view, self, loan->data, loan->size, 1, flags) != 0) return -1;
  loan->views++;
  return 0;
}

static void loan_return(PyObject* self, Py_buffer* view) {
  (void)view;
  ((Loan*)self)->views--;
}

static void loan_free(PyObject* self) {
  PyTypeObject* type = Py_TYPE(self);
  PyObject_Free(self);
  Py_DECREF(type);
}

static Loan* loan_new(void* data, size_t size) {
  static PyTypeObject* type; /* GIL */
  if (!type) {
    PyType_Slot slots[] = {
        {Py_bf_getbuffer, loan_get}, {Py_bf_releasebuffer, loan_return}, {Py_tp_dealloc, loan_free}, {0, NULL}};
    PyType_Spec spec = {"jax_mps._shim.Loan", sizeof(Loan), 0,
                        Py_TPFLAGS_DEFAULT | Py_TPFLAGS_DISALLOW_INSTANTIATION, slots};
    type = (PyTypeObject*)PyType_FromSpec(&spec);
    if (!type) return NULL;
  }
  Loan* loan = PyObject_New(Loan, type);
  if (!loan) return NULL;
  loan->data = data;
  loan->size = (Py_ssize_t)size;
  loan->views = 0;
  return loan;
}

/* from_host's pair for dense bytes. */
static PJRT_Error* ask_from_host(PJRT_Client_BufferFromHostBuffer_Args* args, void* data, size_t nbytes, Cell** cell) {
  Loan* loan = loan_new(data, nbytes);
  PyObject* view = loan ? PyMemoryView_FromObject((PyObject*)loan) : NULL;
  PyObject* dims = view ? tuple_of(args->dims, args->num_dims) : NULL;
  PyObject* pair = dims ? hook_call(HOOK_from_host, Py_BuildValue("(OiN)", view, (int)args->type, dims)) : NULL;
  PJRT_Error* error = pair ? cell_from_pair(pair, "from_host", nbytes, cell) : error_from_python("from_host");
  Py_XDECREF(pair);
  PyObject* released = view ? PyObject_CallMethod(view, "release", NULL) : NULL;
  if (!released) PyErr_Clear();
  Py_XDECREF(released);
  Py_XDECREF(view);
  if (loan && loan->views > 0 && !error) error = INTERNAL("hook from_host kept a view of the caller's memory");
  Py_XDECREF((PyObject*)loan);
  if (error && *cell) {
    cell_release(*cell);
    *cell = NULL;
  }
  return error;
}

/* GIL held. */
static PJRT_Error* read_host(PJRT_Client_BufferFromHostBuffer_Args* args, size_t nbytes, Cell** cell) {
  static char nothing[16];
  size_t ndim = args->num_dims, item = size_of(args->type);
  bool strided = args->num_byte_strides > 0 && nbytes > 0 && !is_row_major(args->byte_strides, args->dims, ndim, item);
  bool constant = strided;
  for (size_t i = 0; i < ndim && constant; i++) constant = args->byte_strides[i] == 0;
  if (constant) {
    PyObject* adopted = hook_call(HOOK_adopt, Py_BuildValue("(N)", PyLong_FromVoidPtr((void*)args->data)));
    if (!adopted) return error_from_python("adopt");
    PJRT_Error* error = adopted == Py_None ? NULL : cell_from_pair(adopted, "adopt", nbytes, cell);
    Py_DECREF(adopted);
    if (error || *cell) return error;
  }

  if (!strided) return ask_from_host(args, nbytes ? (void*)args->data : nothing, nbytes, cell);
  int64_t* strides = malloc(ndim * sizeof *strides);
  char* dense = malloc(nbytes);
  PJRT_Error* error = NULL;
  if (strides && dense) {
    PyThreadState* thread = PyEval_SaveThread();
    row_major(strides, args->dims, ndim, item);
    copy_strided(dense, strides, args->data, args->byte_strides, args->dims, ndim, item);
    PyEval_RestoreThread(thread);
    error = ask_from_host(args, dense, nbytes, cell);
  } else {
    error = error_new(PJRT_Error_Code_RESOURCE_EXHAUSTED, "no memory to copy %zu bytes from the host", nbytes);
  }
  free(strides);
  free(dense);
  return error;
}

PJRT_Error* Client_BufferFromHostBuffer(PJRT_Client_BufferFromHostBuffer_Args* args) {
  REFUSE_IF_CLOSED();
  size_t nbytes;
  if (!nbytes_of(args->type, args->dims, args->num_dims, &nbytes)) {
    char text[256];
    describe_type(text, sizeof text, args->type, args->dims, args->num_dims);
    return INVALID("an array of type %s cannot be put on the device", text);
  }
  if (args->num_byte_strides > 0 && args->num_byte_strides != args->num_dims)
    return INVALID("%zu strides for %zu dimensions", args->num_byte_strides, args->num_dims);
  const Layout* layout = NULL;
  PJRT_Error* error = args->device_layout ? layout_read(args->device_layout, args->num_dims, &layout) : NULL;
  if (error) return error;
  Cell* cell = NULL;
  PyGILState_STATE gil = PyGILState_Ensure();
  error = read_host(args, nbytes, &cell);
  PyGILState_Release(gil);
  if (error) return error;
  PJRT_Device* device = args->device ? args->device : args->client->devices[0];
  args->buffer = buffer_new(args->memory ? args->memory : device->memories[0], cell, args->type, nbytes, args->num_dims, args->dims);
  args->done_with_host_buffer = &event_ready; /* the host's bytes are not looked at again */
  if (!args->buffer) return error_new(PJRT_Error_Code_RESOURCE_EXHAUSTED, "no memory for a buffer");
  args->buffer->layout = layout ? layout_or_null(layout) : NULL;
  return NULL;
}

PJRT_Error* Client_CreateErrorBuffer(PJRT_Client_CreateErrorBuffer_Args* args) {
  REFUSE_IF_CLOSED();
  size_t nbytes;
  if (!nbytes_of(args->shape_element_type, args->shape_dims, args->shape_num_dims, &nbytes))
    return INVALID("an error buffer needs a shape");
  PJRT_Error* error = error_from_text(args->error_code, args->error_message, args->error_message_size);
  Cell* cell = cell_new(PENDING, NULL, nbytes);
  if (cell) {
    state_lock();
    cell_fail(cell, error);
    state_unlock();
  }
  error_release(error);
  PJRT_Memory* memory = args->memory ? args->memory : args->client->devices[0]->memories[0];
  args->buffer = buffer_new(memory, cell, args->shape_element_type, nbytes, args->shape_num_dims, args->shape_dims);
  return args->buffer ? NULL : error_new(PJRT_Error_Code_RESOURCE_EXHAUSTED, "no memory for a buffer");
}

/* ---- to the host ---- */
static void lay_out(int64_t* strides, const Layout* layout, const int64_t* dims, size_t item) {
  int64_t stride = (int64_t)item;
  for (size_t i = 0; i < layout->ndim; i++) {
    strides[layout->minor_to_major[i]] = stride;
    stride *= dims[layout->minor_to_major[i]];
  }
}

/* Of the layout that the caller asks for, which may be the buffer's own. */
static PJRT_Error* host_strides(const PJRT_Buffer_MemoryLayout* layout, const PJRT_Buffer* buffer, int64_t* strides) {
  size_t ndim = buffer->ndim, item = size_of(buffer->type);
  if (!layout) {
    lay_out(strides, buffer->layout, buffer->dims, item);
    return NULL;
  }
  if (layout->type == PJRT_Buffer_MemoryLayout_Type_Strides) {
    if (layout->strides.num_byte_strides != ndim)
      return INVALID("a host layout with %zu strides for %zu dimensions", layout->strides.num_byte_strides, ndim);
    if (ndim) memcpy(strides, layout->strides.byte_strides, ndim * sizeof *strides);
    return NULL;
  }
  const Layout* order;
  PJRT_Error* error = layout_read(layout, ndim, &order);
  if (!error) lay_out(strides, order, buffer->dims, item);
  return error;
}

/* Most of a long copy is page faults of fresh host memory: they go side by side. */
typedef struct {
  char* to;
  const char* from; /* NULL: no copy yet, only the faults */
  size_t size;
} Piece;

static void* copy_piece(void* piece) {
  Piece* p = piece;
  if (p->from) memcpy(p->to, p->from, p->size);
  for (size_t at = 0; !p->from && at < p->size; at += 4096) *(volatile char*)(p->to + at) = 0;
  return NULL;
}

static void in_pieces(char* to, const char* from, size_t size) {
  pthread_t threads[3];
  Piece pieces[COUNT_OF(threads) + 1];
  size_t started = 0, share = size < (size_t)16 << 20 ? 0 : (size / (COUNT_OF(threads) + 1)) & ~(size_t)4095;
  for (size_t at = 0; share && started < COUNT_OF(threads); started++, at += share) {
    pieces[started] = (Piece){to + at, from ? from + at : NULL, share};
    if (pthread_create(&threads[started], NULL, copy_piece, &pieces[started]) != 0) break;
  }
  size_t done = started * share;
  pieces[started] = (Piece){to + done, from ? from + done : NULL, size - done};
  copy_piece(&pieces[started]);
  for (size_t i = 0; i < started; i++) pthread_join(threads[i], NULL);
}

typedef int (*DeviceCopy)(void* to, unsigned long long from, size_t size);

/* CUDA's own copy, where libcuda is there. Managed memory that the processor reads moves to the host page by page, and back when a kernel
 * gets it next. */
static DeviceCopy device_copy(void) {
  static DeviceCopy copy;
  static atomic_bool known;
  if (!atomic_load(&known)) {
    void* library = laziness.view_in_place ? NULL : dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    if (library) *(void**)&copy = dlsym(library, "cuMemcpyDtoH_v2");
    atomic_store(&known, true);
  }
  return copy;
}

/* on_device: MLX's memory. It fails on a thread that has never worked for MLX, and so without a CUDA context. */
static void copy_long(char* to, const char* from, size_t size, bool on_device) {
  DeviceCopy copy = on_device ? device_copy() : NULL;
#ifdef MADV_HUGEPAGE
  uintptr_t first = ((uintptr_t)to + 4095) & ~(uintptr_t)4095, end = ((uintptr_t)to + size) & ~(uintptr_t)4095;
  if (size >= (size_t)4 << 20) madvise((void*)first, end - first, MADV_HUGEPAGE); /* fewer faults; advice, whatever comes of it */
#endif
  if (copy && size >= (size_t)16 << 20) in_pieces(to, NULL, size);
  if (!copy || copy(to, (uintptr_t)from, size) != 0) in_pieces(to, from, size);
}

/* GIL held, and dropped for long copies. The cell, and with it the view, is the caller's. */
static void copy_out(char* to, const int64_t* strides, const char* from, const PJRT_Buffer* buffer, int64_t* scratch,
                     bool on_device) {
  size_t item = size_of(buffer->type);
  if (buffer->nbytes == 0) return;
  PyThreadState* thread = buffer->nbytes >= 1 << 20 ? PyEval_SaveThread() : NULL;
  if (!strides || is_row_major(strides, buffer->dims, buffer->ndim, item)) {
    copy_long(to, from, buffer->nbytes, on_device);
  } else {
    row_major(scratch, buffer->dims, buffer->ndim, item);
    copy_strided(to, strides, from, scratch, buffer->dims, buffer->ndim, item);
  }
  if (thread) PyEval_RestoreThread(thread);
}

PJRT_Error* Buffer_ToHostBuffer(PJRT_Buffer_ToHostBuffer_Args* args) {
  PJRT_Buffer* buffer = args->src;
  if (!args->dst) {
    args->dst_size = buffer->nbytes;
    args->event = NULL;
    return NULL;
  }
  if (args->dst_size < buffer->nbytes)
    return INVALID("%zu bytes do not hold an array of %zu", args->dst_size, buffer->nbytes);
  int64_t small[16];
  int64_t* strides = args->host_layout || buffer->layout ? small : NULL;
  if (strides && buffer->ndim > COUNT_OF(small) / 2) strides = malloc(2 * buffer->ndim * sizeof *strides);
  int64_t* scratch = strides ? strides + buffer->ndim : NULL;
  PJRT_Error* error = strides ? host_strides(args->host_layout, buffer, strides) : NULL;
  Cell* cell = NULL;
  if (!error) error = take_cell(buffer, false, &cell);
  if (!error) {
    const Py_buffer* view;
    PyGILState_STATE gil = PyGILState_Ensure();
    error = cell_view(cell, buffer->nbytes, &view);
    if (!error) copy_out(args->dst, strides, view->buf, buffer, scratch, cell->state == READY);
    PyGILState_Release(gil);
    cell_release(cell);
  }
  if (strides && strides != small) free(strides);
  if (!error) args->event = &event_ready;
  return error;
}

static PJRT_Error* error_laid_out(const PJRT_Buffer* buffer) {
  return error_new(PJRT_Error_Code_UNIMPLEMENTED, "the memory of an array with the layout %s: it is row-major here", buffer->layout->text);
}

static PJRT_Error* copy_raw(PJRT_Buffer* buffer, Cell* cell, void* to, int64_t offset, int64_t size) {
  if (offset < 0 || size < 0 || (uint64_t)offset + (uint64_t)size > buffer->nbytes)
    return INVALID("bytes %lld to %lld of an array of %zu", (long long)offset, (long long)(offset + size), buffer->nbytes);
  const Py_buffer* view;
  PyGILState_STATE gil = PyGILState_Ensure();
  PJRT_Error* error = cell_view(cell, buffer->nbytes, &view);
  if (!error && size) memcpy(to, (const char*)view->buf + offset, (size_t)size);
  PyGILState_Release(gil);
  return error;
}

PJRT_Error* Buffer_CopyRawToHost(PJRT_Buffer_CopyRawToHost_Args* args) {
  Cell* cell;
  PJRT_Error* error = args->buffer->layout ? error_laid_out(args->buffer) : take_cell(args->buffer, false, &cell);
  if (error) return error;
  error = copy_raw(args->buffer, cell, args->dst, args->offset, args->transfer_size);
  cell_release(cell);
  if (!error) args->event = &event_ready;
  return error;
}

/* ---- pointers ---- */
static PJRT_Error* pointer_of(PJRT_Buffer* buffer, void** pointer) {
  Cell* cell;
  PJRT_Error* error = buffer->layout ? error_laid_out(buffer) : take_cell(buffer, true, &cell);
  if (error) return error;
  const Py_buffer* view;
  PyGILState_STATE gil = PyGILState_Ensure();
  error = cell_view(cell, buffer->nbytes, &view);
  if (!error) *pointer = view->buf;
  PyGILState_Release(gil);
  cell_release(cell);
  return error;
}

PJRT_Error* Buffer_UnsafePointer(PJRT_Buffer_UnsafePointer_Args* args) {
  void* pointer = NULL;
  PJRT_Error* error = pointer_of(args->buffer, &pointer);
  args->buffer_pointer = (uintptr_t)pointer;
  return error;
}

PJRT_Error* Buffer_OpaqueDeviceMemoryDataPointer(PJRT_Buffer_OpaqueDeviceMemoryDataPointer_Args* args) {
  args->device_memory_ptr = NULL;
  return pointer_of(args->buffer, &args->device_memory_ptr);
}

/* ---- copies: values never change, so a copy is another handle on the same cell ---- */
static PJRT_Error* share(PJRT_Buffer* buffer, PJRT_Memory* memory, PJRT_Buffer** copy) {
  Cell* cell;
  PJRT_Error* error = take_cell(buffer, false, &cell);
  if (error) return error;
  *copy = buffer_new(memory, cell, buffer->type, buffer->nbytes, buffer->ndim, buffer->dims);
  if (!*copy) return error_new(PJRT_Error_Code_RESOURCE_EXHAUSTED, "no memory for a buffer");
  (*copy)->layout = buffer->layout;
  return NULL;
}

PJRT_Error* Buffer_CopyToDevice(PJRT_Buffer_CopyToDevice_Args* args) {
  return share(args->buffer, args->dst_device->memories[0], &args->dst_buffer);
}

PJRT_Error* Buffer_CopyToMemory(PJRT_Buffer_CopyToMemory_Args* args) {
  return share(args->buffer, args->dst_memory, &args->dst_buffer);
}
