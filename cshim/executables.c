/* PJRT_Executable: what Python compiled, with its metadata read once into C. */
#include "shim.h"

atomic_long executable_count;

/* ---- reading the Python object ---- */
static char* copy_bytes(const char* bytes, size_t size) {
  char* copy = malloc(size + 1);
  if (!copy) return NULL;
  if (size) memcpy(copy, bytes, size);
  copy[size] = 0;
  return copy;
}

static bool read_text(PyObject* object, const char* attribute, char** text, size_t* size) {
  PyObject* value = PyObject_GetAttrString(object, attribute);
  if (!value) return false;
  Py_ssize_t length = 0;
  char* bytes = NULL;
  if (PyBytes_Check(value)) {
    if (PyBytes_AsStringAndSize(value, &bytes, &length) != 0) bytes = NULL;
  } else {
    bytes = (char*)PyUnicode_AsUTF8AndSize(value, &length);
  }
  if (bytes && !(*text = copy_bytes(bytes, (size_t)length))) PyErr_NoMemory();
  *size = (size_t)length;
  Py_DECREF(value);
  return *text != NULL;
}

static bool read_int(PyObject* object, const char* attribute, int64_t* out) {
  PyObject* value = PyObject_GetAttrString(object, attribute);
  if (!value) return false;
  *out = PyLong_AsLongLong(value);
  Py_DECREF(value);
  return !PyErr_Occurred();
}

static bool read_bool(PyObject* object, const char* attribute, bool* out) {
  PyObject* value = PyObject_GetAttrString(object, attribute);
  int truth = value ? PyObject_IsTrue(value) : -1;
  Py_XDECREF(value);
  *out = truth > 0;
  return truth >= 0;
}

/* The attribute as a tuple; any sequence will do. */
static PyObject* read_tuple(PyObject* object, const char* attribute) {
  PyObject* value = PyObject_GetAttrString(object, attribute);
  PyObject* tuple = value ? PySequence_Tuple(value) : NULL;
  Py_XDECREF(value);
  return tuple;
}

static bool bad(const char* what) {
  PyErr_Format(PyExc_TypeError, "an executable's %s", what);
  return false;
}

/* rows: ((dtype, dims), ...) with every dims already a tuple. */
static bool fill_types(PyObject* rows, Types* types) {
  size_t rank = 0;
  for (size_t i = 0; i < types->count; i++)
    rank += (size_t)PyTuple_Size(PyTuple_GetItem(PyTuple_GetItem(rows, (Py_ssize_t)i), 1));
  types->items = calloc(types->count + 1, sizeof *types->items);
  types->dims = calloc(rank + 1, sizeof *types->dims);
  if (!types->items || !types->dims) return PyErr_NoMemory() != NULL;
  int64_t* dims = types->dims;
  for (size_t i = 0; i < types->count; i++) {
    PyObject* row = PyTuple_GetItem(rows, (Py_ssize_t)i);
    PyObject* shape = PyTuple_GetItem(row, 1);
    Type* type = &types->items[i];
    type->type = (PJRT_Buffer_Type)PyLong_AsLong(PyTuple_GetItem(row, 0));
    type->ndim = (size_t)PyTuple_Size(shape);
    type->dims = dims;
    for (size_t j = 0; j < type->ndim; j++) *dims++ = PyLong_AsLongLong(PyTuple_GetItem(shape, (Py_ssize_t)j));
    if (PyErr_Occurred()) return false;
    if (!nbytes_of(type->type, type->dims, type->ndim, &type->nbytes)) return bad("types hold an unknown dtype or shape");
  }
  return true;
}

static bool read_types(PyObject* object, const char* attribute, Types* types) {
  PyObject* rows = read_tuple(object, attribute);
  if (!rows) return false;
  bool ok = true;
  types->count = (size_t)PyTuple_Size(rows);
  for (size_t i = 0; i < types->count && ok; i++) {
    PyObject* row = PyTuple_GetItem(rows, (Py_ssize_t)i);
    ok = (PyTuple_Check(row) && PyTuple_Size(row) == 2 && PyTuple_Check(PyTuple_GetItem(row, 1))) ||
         bad("types are not (dtype, dims) pairs of an int and a tuple");
  }
  ok = ok && fill_types(rows, types);
  Py_DECREF(rows);
  return ok;
}

static bool read_states(PyObject* object, PJRT_Executable* executable) {
  static const State states[] = {LAZY, HOST, READY};
  size_t count = executable->outputs.count;
  PyObject* numbers = read_tuple(object, "output_states");
  if (!numbers) return false;
  bool ok = (size_t)PyTuple_Size(numbers) == count || bad("output_states has not one entry for each output");
  executable->output_states = calloc(count + 1, sizeof *executable->output_states);
  for (size_t i = 0; i < count && ok; i++) {
    long number = PyLong_AsLong(PyTuple_GetItem(numbers, (Py_ssize_t)i));
    ok = !PyErr_Occurred() && ((number >= 0 && number < (long)COUNT_OF(states)) || bad("output_states holds an unknown state"));
    if (ok) executable->output_states[i] = states[number];
  }
  Py_DECREF(numbers);
  return ok;
}

static bool read_donated(PyObject* object, PJRT_Executable* executable) {
  size_t count = executable->parameters.count;
  PyObject* indices = read_tuple(object, "donated");
  if (!indices) return false;
  bool ok = true;
  Py_ssize_t size = PyTuple_Size(indices);
  if (size > 0) executable->donated = calloc(count + 1, sizeof(bool));
  for (Py_ssize_t i = 0; i < size && ok; i++) {
    long index = PyLong_AsLong(PyTuple_GetItem(indices, i));
    ok = !PyErr_Occurred();
    if (ok) ok = (index >= 0 && (size_t)index < count) || bad("donated names a parameter that is not there");
    if (ok) executable->donated[index] = true;
  }
  Py_DECREF(indices);
  return ok;
}

/* DeviceAssignmentProto {replica_count = 1, computation_count = 2, repeated computation_devices = 3 {replica_device_ids = 1}} */
static bool write_assignment(PJRT_Executable* executable) {
  size_t replicas = executable->replicas, partitions = executable->partitions;
  char* to = executable->assignment = malloc(32 + partitions * (32 + replicas * 10));
  char* ids = malloc(replicas * 10);
  if (!to || !ids) {
    free(ids);
    return PyErr_NoMemory() != NULL;
  }
  *to++ = 0x08;
  to += write_varint(to, replicas);
  *to++ = 0x10;
  to += write_varint(to, partitions);
  for (size_t partition = 0; partition < partitions; partition++) {
    size_t size = 0;
    for (size_t replica = 0; replica < replicas; replica++)
      size += write_varint(ids + size, (uint64_t)executable->devices[replica * partitions + partition]->description.id);
    char length[10];
    *to++ = 0x1a;
    to += write_varint(to, 1 + write_varint(length, size) + size);
    *to++ = 0x0a;
    to += write_varint(to, size);
    memcpy(to, ids, size);
    to += size;
  }
  executable->assignment_size = (size_t)(to - executable->assignment);
  free(ids);
  return true;
}

/* `devices`: a tuple of ids for each replica, one for each partition. */
static bool read_devices(PyObject* object, PJRT_Executable* executable) {
  PyObject* rows = read_tuple(object, "devices");
  if (!rows) return false;
  PJRT_Client* client = executable->client;
  bool ok = PyTuple_Size(rows) > 0 && PyTuple_Check(PyTuple_GetItem(rows, 0));
  executable->replicas = ok ? (size_t)PyTuple_Size(rows) : 0;
  executable->partitions = ok ? (size_t)PyTuple_Size(PyTuple_GetItem(rows, 0)) : 0;
  size_t shards = executable->shards = executable->replicas * executable->partitions;
  executable->devices = calloc(shards + 1, sizeof *executable->devices);
  executable->logical = calloc(shards + 1, sizeof *executable->logical);
  ok = ok && shards > 0 && executable->devices && executable->logical;
  for (size_t i = 0; i < shards && ok; i++) {
    size_t replica = i / executable->partitions, partition = i % executable->partitions;
    PyObject* row = PyTuple_GetItem(rows, (Py_ssize_t)replica);
    ok = PyTuple_Check(row) && (size_t)PyTuple_Size(row) == executable->partitions;
    long id = ok ? PyLong_AsLong(PyTuple_GetItem(row, (Py_ssize_t)partition)) : -1;
    ok = ok && id >= 0 && (size_t)id < client->device_count;
    if (ok) executable->devices[i] = client->devices[id];
    executable->logical[i] = (PJRT_LogicalDeviceIds){.replica = (int)replica, .partition = (int)partition};
  }
  Py_DECREF(rows);
  if (!ok && !PyErr_Occurred()) return bad("devices are not tuples of the client's device ids, all of a length");
  return ok && write_assignment(executable);
}

static bool fill_outputs(PJRT_Executable* executable) {
  if (executable->outputs.count % executable->shards || executable->parameters.count % executable->shards)
    return bad("parameters and outputs are not the same number for each device");
  size_t outputs = executable->outputs.count;
  executable->output_types = calloc(outputs + 1, sizeof *executable->output_types);
  executable->output_ranks = calloc(outputs + 1, sizeof *executable->output_ranks);
  if (!executable->output_types || !executable->output_ranks) return PyErr_NoMemory() != NULL;
  for (size_t i = 0; i < outputs; i++) {
    executable->output_types[i] = executable->outputs.items[i].type;
    executable->output_ranks[i] = executable->outputs.items[i].ndim;
  }
  return true;
}

/* An attribute with an index into the client's kinds of memory for each value of a device; none for an empty one. */
static bool read_kinds(PyObject* object, const char* attribute, const PJRT_Client* client, size_t count, size_t** indices,
                       const char*** kinds, size_t** sizes) {
  PyObject* given = read_tuple(object, attribute);
  if (!given) return false;
  *indices = calloc(count + 1, sizeof **indices);
  *kinds = calloc(count + 1, sizeof **kinds);
  *sizes = calloc(count + 1, sizeof **sizes);
  bool ok = *indices && *kinds && *sizes && (PyTuple_Size(given) == 0 || (size_t)PyTuple_Size(given) == count);
  for (size_t i = 0; i < count && ok; i++) {
    long index = PyTuple_Size(given) ? PyLong_AsLong(PyTuple_GetItem(given, (Py_ssize_t)i)) : 0;
    ok = index >= 0 && (size_t)index < client->memory_count;
    if (!ok) break;
    (*indices)[i] = (size_t)index;
    (*kinds)[i] = client->memories[index]->kind;
    (*sizes)[i] = strlen((*kinds)[i]);
  }
  Py_DECREF(given);
  return ok || PyErr_Occurred() || bad("memories are not one kind of memory for each value");
}

static bool read_memories(PyObject* object, PJRT_Executable* executable) {
  const PJRT_Client* client = executable->client;
  size_t inputs = executable->parameters.count / executable->shards, outputs = executable->outputs.count / executable->shards;
  size_t* unused = NULL;
  bool ok = read_kinds(object, "parameter_memories", client, inputs, &unused, &executable->parameter_kinds,
                       &executable->parameter_kind_sizes) &&
            read_kinds(object, "output_memories", client, outputs, &executable->output_memories, &executable->output_kinds,
                       &executable->output_kind_sizes);
  free(unused);
  return ok && !PyErr_Occurred();
}

/* An attribute with the order of its dimensions, fastest first, for each value of a device; none for row-major ones. */
static bool read_layouts(PyObject* object, const char* attribute, const Types* types, size_t count, const Layout*** layouts, bool* any) {
  PyObject* given = read_tuple(object, attribute);
  if (!given) return false;
  *layouts = calloc(count + 1, sizeof **layouts);
  bool all = PyTuple_Size(given) == 0, ok = *layouts && (all || (size_t)PyTuple_Size(given) == count);
  for (size_t i = 0; i < count && ok; i++) {
    size_t ndim = types->items[i].ndim;
    PyObject* order = all ? Py_None : PyTuple_GetItem(given, (Py_ssize_t)i);
    int64_t dims[64];
    ok = order == Py_None || (PyTuple_Check(order) && (size_t)PyTuple_Size(order) == ndim && ndim <= COUNT_OF(dims));
    for (size_t j = 0; j < ndim && ok && order != Py_None; j++) dims[j] = PyLong_AsLongLong(PyTuple_GetItem(order, (Py_ssize_t)j));
    if (ok && !PyErr_Occurred()) (*layouts)[i] = order == Py_None ? layout_row_major(ndim) : layout_find(dims, ndim);
    ok = (*layouts)[i] != NULL;
    *any = *any || (ok && layout_or_null((*layouts)[i]));
  }
  Py_DECREF(given);
  return ok || PyErr_Occurred() || bad("layouts are not an order of its dimensions, or None, for each value");
}

static bool read_all_layouts(PyObject* object, PJRT_Executable* executable) {
  size_t inputs = executable->parameters.count / executable->shards, outputs = executable->outputs.count / executable->shards;
  bool unused = false;
  return read_layouts(object, "parameter_layouts", &executable->parameters, inputs, &executable->parameter_layouts, &unused) &&
         read_layouts(object, "output_layouts", &executable->outputs, outputs, &executable->output_layouts, &executable->laid_out) &&
         !PyErr_Occurred();
}

static void free_types(Types* types) {
  free(types->items);
  free(types->dims);
}

static void executable_free(PJRT_Executable* executable) {
  if (!IS_CLOSED()) {
    PyGILState_STATE gil = PyGILState_Ensure();
    Py_CLEAR(executable->program);
    Py_CLEAR(executable->format);
    drop_value(executable->callable);
    drop_value(executable->leading);
    drop_value(executable->object);
    PyGILState_Release(gil);
  }
  free_types(&executable->parameters);
  free_types(&executable->outputs);
  named_values_free(executable->costs, executable->cost_count);
  free(executable->name);
  free(executable->fingerprint);
  free(executable->options);
  free(executable->output_states);
  free(executable->donated);
  free(executable->devices);
  free(executable->logical);
  free(executable->assignment);
  free(executable->output_types);
  free(executable->output_ranks);
  free(executable->output_memories);
  free(executable->output_kinds);
  free(executable->output_kind_sizes);
  free(executable->output_layouts);
  free(executable->parameter_layouts);
  free(executable->parameter_kinds);
  free(executable->parameter_kind_sizes);
  free(executable);
  atomic_fetch_sub(&executable_count, 1);
}

void executable_release(PJRT_Executable* executable) {
  if (executable && atomic_fetch_sub(&executable->references, 1) == 1) executable_free(executable);
}

PJRT_Executable* executable_retain(PJRT_Executable* executable) {
  atomic_fetch_add(&executable->references, 1);
  return executable;
}

/* Takes the object. GIL held. */
static PJRT_Error* executable_new(PJRT_Client* client, PyObject* object, const char* hook, const char* options,
                                  size_t options_size, PJRT_Executable** out) {
  PJRT_Executable* executable = calloc(1, sizeof *executable);
  if (!executable) {
    Py_DECREF(object);
    return error_new(PJRT_Error_Code_RESOURCE_EXHAUSTED, "no memory for an executable");
  }
  atomic_fetch_add(&executable_count, 1);
  atomic_init(&executable->references, 1);
  executable->client = client;
  executable->object = object;
  executable->options = copy_bytes(options, options_size);
  executable->options_size = options_size;
  bool ok = read_text(object, "name", &executable->name, &executable->name_size) &&
            read_text(object, "fingerprint", &executable->fingerprint, &executable->fingerprint_size) &&
            read_int(object, "code_size", &executable->code_size) && read_int(object, "cost", &executable->cost) &&
            read_bool(object, "effects", &executable->effects) && read_bool(object, "direct", &executable->direct) &&
            read_bool(object, "waits", &executable->waits) && read_bool(object, "prompt", &executable->prompt) &&
            read_devices(object, executable) && read_types(object, "parameter_types", &executable->parameters) &&
            read_types(object, "output_types", &executable->outputs) && read_states(object, executable) &&
            read_donated(object, executable) && fill_outputs(executable) && read_memories(object, executable) &&
            read_all_layouts(object, executable);
  if (!ok) {
    PJRT_Error* cause = error_from_python(hook);
    executable_release(executable);
    PJRT_Error* error = INTERNAL("hook %s did not return an executable: %s", hook, cause->message);
    error_release(cause);
    return error;
  }
  *out = executable;
  return NULL;
}

/* ---- compiling and loading ---- */
static PJRT_Error* load_new(PJRT_Executable* executable, PJRT_LoadedExecutable** out) {
  PJRT_LoadedExecutable* loaded = calloc(1, sizeof *loaded);
  if (!loaded) {
    executable_release(executable);
    return error_new(PJRT_Error_Code_RESOURCE_EXHAUSTED, "no memory for an executable");
  }
  loaded->executable = executable;
  *out = loaded;
  return NULL;
}

static PJRT_Error* compile(PJRT_Client* client, const PJRT_Program* program, const char* options, size_t options_size,
                           PJRT_Executable** executable) {
  PyGILState_STATE gil = PyGILState_Ensure();
  PyObject* object = hook_call(
      HOOK_compile, Py_BuildValue("(y#s#y#)", program->code, (Py_ssize_t)program->code_size, program->format,
                                  (Py_ssize_t)program->format_size, options ? options : "", (Py_ssize_t)options_size));
  PJRT_Error* error = object ? executable_new(client, object, "compile", options, options_size, executable)
                             : error_from_python("compile");
  PyGILState_Release(gil);
  return error;
}

PJRT_Error* Client_Compile(PJRT_Client_Compile_Args* args) {
  REFUSE_IF_CLOSED();
  PJRT_Executable* executable;
  PJRT_Error* error =
      compile(args->client, args->program, args->compile_options, args->compile_options_size, &executable);
  return error ? error : load_new(executable, &args->executable);
}

PJRT_Error* Compile(PJRT_Compile_Args* args) {
  REFUSE_IF_CLOSED();
  PJRT_Client* client = args->client ? args->client : args->topology->client;
  return compile(client, args->program, args->compile_options, args->compile_options_size, &args->executable);
}

PJRT_Error* Client_Load(PJRT_Client_Load_Args* args) {
  REFUSE_IF_CLOSED();
  return load_new(executable_retain(args->executable), &args->loaded_executable);
}

PJRT_Error* Executable_DeserializeAndLoad(PJRT_Executable_DeserializeAndLoad_Args* args) {
  REFUSE_IF_CLOSED();
  bool overridden = HAS_FIELD(args, overridden_serialized_compile_options_size) &&
                    args->overridden_serialized_compile_options;
  const char* options = overridden ? args->overridden_serialized_compile_options : "";
  size_t options_size = overridden ? args->overridden_serialized_compile_options_size : 0;
  PJRT_Executable* executable = NULL;
  PyGILState_STATE gil = PyGILState_Ensure();
  PyObject* object =
      hook_call(HOOK_load, Py_BuildValue("(y#y#)", args->serialized_executable,
                                         (Py_ssize_t)args->serialized_executable_size, options, (Py_ssize_t)options_size));
  PJRT_Error* error = object ? executable_new(args->client, object, "load", options, options_size, &executable)
                             : error_from_python("load");
  PyGILState_Release(gil);
  return error ? error : load_new(executable, &args->loaded_executable);
}

struct PJRT_SerializedExecutable {
  size_t size;
  char bytes[];
};

static void free_serialized(PJRT_SerializedExecutable* serialized) { free(serialized); }

PJRT_Error* Executable_Serialize(PJRT_Executable_Serialize_Args* args) {
  REFUSE_IF_CLOSED();
  PJRT_Error* error = NULL;
  PyGILState_STATE gil = PyGILState_Ensure();
  PyObject* bytes = hook_call(HOOK_serialize, PyTuple_Pack(1, args->executable->object));
  if (!bytes) {
    error = error_from_python("serialize");
  } else if (!PyBytes_Check(bytes)) {
    error = INTERNAL("hook serialize did not return bytes");
  } else {
    size_t size = (size_t)PyBytes_Size(bytes);
    PJRT_SerializedExecutable* serialized = malloc(sizeof *serialized + size);
    if (serialized) {
      serialized->size = size;
      memcpy(serialized->bytes, PyBytes_AsString(bytes), size);
      args->serialized_bytes = serialized->bytes;
      args->serialized_bytes_size = size;
      args->serialized_executable = serialized;
      args->serialized_executable_deleter = free_serialized;
    } else {
      error = error_new(PJRT_Error_Code_RESOURCE_EXHAUSTED, "no memory to serialise an executable");
    }
  }
  Py_XDECREF(bytes);
  PyGILState_Release(gil);
  return error;
}

/* ---- asked of Python ---- */
PJRT_Error* Executable_OptimizedProgram(PJRT_Executable_OptimizedProgram_Args* args) {
  REFUSE_IF_CLOSED();
  PJRT_Executable* executable = args->executable;
  /* jaxlib asks three times a compile, for shardings only; `as_text` asks with the GIL */
  if (executable->shards == 1 && !caller_has_gil())
    return error_new(PJRT_Error_Code_UNIMPLEMENTED, "the optimized program of %s", executable->name);
  PJRT_Program* program = args->program;
  PJRT_Error* error = NULL;
  PyGILState_STATE gil = PyGILState_Ensure();
  if (!executable->program) {
    PyObject* pair = hook_call(HOOK_optimized_program, PyTuple_Pack(1, executable->object));
    PyObject *format, *bytes;
    if (!pair) {
      error = error_from_python("optimized_program");
    } else if (pair == Py_None) {
      error = error_new(PJRT_Error_Code_UNIMPLEMENTED, "the optimized program of %s", executable->name);
    } else if (!PyTuple_Check(pair) || PyTuple_Size(pair) != 2 || !PyBytes_Check(format = PyTuple_GetItem(pair, 0)) ||
               !PyBytes_Check(bytes = PyTuple_GetItem(pair, 1))) {
      error = INTERNAL("hook optimized_program did not return two bytes or None");
    } else if (!executable->program) {
      Py_INCREF(format);
      Py_INCREF(bytes);
      Py_XDECREF(executable->format);
      executable->format = format; /* stays: the caller looks at its text */
      executable->program = bytes;
    }
    Py_XDECREF(pair);
  }
  if (!error) {
    size_t size = (size_t)PyBytes_Size(executable->program);
    program->format = PyBytes_AsString(executable->format);
    program->format_size = (size_t)PyBytes_Size(executable->format);
    if (program->code && program->code_size < size) {
      error = INVALID("%zu bytes do not hold a program of %zu", program->code_size, size);
    } else if (program->code) {
      memcpy(program->code, PyBytes_AsString(executable->program), size);
      Py_CLEAR(executable->program); /* asked for twice: for its size, then for itself */
    }
    program->code_size = size;
  }
  PyGILState_Release(gil);
  return error;
}

PJRT_Error* Executable_GetCostAnalysis(PJRT_Executable_GetCostAnalysis_Args* args) {
  REFUSE_IF_CLOSED();
  PJRT_Executable* executable = args->executable;
  PJRT_Error* error = NULL;
  if (!executable->costs) {
    PJRT_NamedValue* values = NULL;
    size_t count = 0;
    PyGILState_STATE gil = PyGILState_Ensure();
    PyObject* dict = hook_call(HOOK_cost_analysis, PyTuple_Pack(1, executable->object));
    error = dict ? named_values_from_dict(dict, &values, &count, "cost_analysis") : error_from_python("cost_analysis");
    Py_XDECREF(dict);
    PyGILState_Release(gil);
    if (error) return error;
    state_lock();
    bool first = !executable->costs;
    if (first) {
      executable->costs = values;
      executable->cost_count = count;
    }
    state_unlock();
    if (!first) named_values_free(values, count);
  }
  args->properties = executable->costs;
  args->num_properties = executable->cost_count;
  return NULL;
}

/* ---- metadata ---- */
PJRT_Error* Executable_Destroy(PJRT_Executable_Destroy_Args* args) {
  executable_release(args->executable);
  return NULL;
}

PJRT_Error* Executable_Name(PJRT_Executable_Name_Args* args) {
  args->executable_name = args->executable->name;
  args->executable_name_size = args->executable->name_size;
  return NULL;
}

PJRT_Error* Executable_NumReplicas(PJRT_Executable_NumReplicas_Args* args) {
  args->num_replicas = args->executable->replicas;
  return NULL;
}

PJRT_Error* Executable_NumPartitions(PJRT_Executable_NumPartitions_Args* args) {
  args->num_partitions = args->executable->partitions;
  return NULL;
}

PJRT_Error* Executable_NumOutputs(PJRT_Executable_NumOutputs_Args* args) {
  args->num_outputs = args->executable->outputs.count / args->executable->shards;
  return NULL;
}

PJRT_Error* Executable_SizeOfGeneratedCodeInBytes(PJRT_Executable_SizeOfGeneratedCodeInBytes_Args* args) {
  args->size_in_bytes = args->executable->code_size;
  return NULL;
}

PJRT_Error* Executable_Fingerprint(PJRT_Executable_Fingerprint_Args* args) {
  args->executable_fingerprint = args->executable->fingerprint;
  args->executable_fingerprint_size = args->executable->fingerprint_size;
  return NULL;
}

PJRT_Error* LoadedExecutable_Fingerprint(PJRT_LoadedExecutable_Fingerprint_Args* args) {
  args->executable_fingerprint = args->executable->executable->fingerprint;
  args->executable_fingerprint_size = args->executable->executable->fingerprint_size;
  return NULL;
}

PJRT_Error* Executable_OutputElementTypes(PJRT_Executable_OutputElementTypes_Args* args) {
  args->output_types = args->executable->output_types;
  args->num_output_types = args->executable->outputs.count / args->executable->shards;
  return NULL;
}

PJRT_Error* Executable_OutputDimensions(PJRT_Executable_OutputDimensions_Args* args) {
  args->num_outputs = args->executable->outputs.count / args->executable->shards;
  args->dims = args->executable->outputs.dims;
  args->dim_sizes = args->executable->output_ranks;
  return NULL;
}

PJRT_Error* Executable_OutputMemoryKinds(PJRT_Executable_OutputMemoryKinds_Args* args) {
  args->num_outputs = args->executable->outputs.count / args->executable->shards;
  args->memory_kinds = args->executable->output_kinds;
  args->memory_kind_sizes = args->executable->output_kind_sizes;
  return NULL;
}

PJRT_Error* Executable_ParameterMemoryKinds(PJRT_Executable_ParameterMemoryKinds_Args* args) {
  args->num_parameters = args->executable->parameters.count / args->executable->shards;
  args->memory_kinds = args->executable->parameter_kinds;
  args->memory_kind_sizes = args->executable->parameter_kind_sizes;
  return NULL;
}

static void keep_options(PJRT_SerializedCompileOptions* options) { (void)options; /* the executable's */ }

PJRT_Error* Executable_GetCompileOptions(PJRT_Executable_GetCompileOptions_Args* args) {
  args->serialized_bytes = args->executable->options;
  args->serialized_bytes_size = args->executable->options_size;
  args->serialized_compile_options = NULL;
  args->serialized_compile_options_deleter = keep_options;
  return NULL;
}

PJRT_Error* Executable_GetCompiledMemoryStats(PJRT_Executable_GetCompiledMemoryStats_Args* args) {
  PJRT_Executable* executable = args->executable;
  int64_t arguments = 0, outputs = 0, aliases = 0;
  for (size_t i = 0; i < executable->parameters.count / executable->shards; i++) {
    arguments += (int64_t)executable->parameters.items[i].nbytes;
    if (executable->donated && executable->donated[i]) aliases += (int64_t)executable->parameters.items[i].nbytes;
  }
  for (size_t i = 0; i < executable->outputs.count / executable->shards; i++)
    outputs += (int64_t)executable->outputs.items[i].nbytes;
  if (aliases > outputs) aliases = outputs;
  ZERO_FROM(args, generated_code_size_in_bytes);
#define SET(field, value) \
  if (HAS_FIELD(args, field)) args->field = value
  SET(generated_code_size_in_bytes, executable->code_size);
  SET(argument_size_in_bytes, arguments);
  SET(output_size_in_bytes, outputs);
  SET(alias_size_in_bytes, aliases);
  SET(peak_memory_in_bytes, arguments + outputs - aliases);
  SET(total_size_in_bytes, arguments + outputs - aliases);
#undef SET
  return NULL;
}

/* ---- loaded executables ---- */
PJRT_Error* LoadedExecutable_Destroy(PJRT_LoadedExecutable_Destroy_Args* args) {
  if (!args->executable) return NULL;
  executable_release(args->executable->executable);
  free(args->executable);
  return NULL;
}

PJRT_Error* LoadedExecutable_GetExecutable(PJRT_LoadedExecutable_GetExecutable_Args* args) {
  args->executable = executable_retain(args->loaded_executable->executable);
  return NULL;
}

PJRT_Error* LoadedExecutable_Delete(PJRT_LoadedExecutable_Delete_Args* args) {
  atomic_store(&args->executable->deleted, true);
  return NULL;
}

PJRT_Error* LoadedExecutable_IsDeleted(PJRT_LoadedExecutable_IsDeleted_Args* args) {
  args->is_deleted = atomic_load(&args->executable->deleted);
  return NULL;
}

PJRT_Error* LoadedExecutable_AddressableDevices(PJRT_LoadedExecutable_AddressableDevices_Args* args) {
  args->addressable_devices = args->executable->executable->devices;
  args->num_addressable_devices = args->executable->executable->shards;
  return NULL;
}

PJRT_Error* LoadedExecutable_AddressableDeviceLogicalIds(PJRT_LoadedExecutable_AddressableDeviceLogicalIds_Args* args) {
  args->addressable_device_logical_ids = args->executable->executable->logical;
  args->num_addressable_device_logical_ids = args->executable->executable->shards;
  return NULL;
}

static void keep_assignment(PJRT_DeviceAssignmentSerialized* assignment) { (void)assignment; }

PJRT_Error* LoadedExecutable_GetDeviceAssignment(PJRT_LoadedExecutable_GetDeviceAssignment_Args* args) {
  args->serialized_bytes = args->executable->executable->assignment;
  args->serialized_bytes_size = args->executable->executable->assignment_size;
  args->serialized_device_assignment = NULL;
  args->serialized_device_assignment_deleter = keep_assignment;
  return NULL;
}

PJRT_Error* ExecuteContext_Create(PJRT_ExecuteContext_Create_Args* args) {
  args->context = malloc(1); /* a name for a run; nothing is kept under it */
  return args->context ? NULL : error_new(PJRT_Error_Code_RESOURCE_EXHAUSTED, "no memory for a context");
}

PJRT_Error* ExecuteContext_Destroy(PJRT_ExecuteContext_Destroy_Args* args) {
  free(args->context);
  return NULL;
}
