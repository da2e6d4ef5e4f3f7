/* The client, its devices and their memories, the topology, and the plugin's attributes: tables built from Python's dicts. */
#include <stdio.h>

#include "shim.h"

Laziness laziness = {.eager_cost = INT64_MAX, .lazy_limit = 64, .lazy_bytes = INT64_MAX, .lazy_cost = INT64_MAX};

/* ---- named values ---- */
static char* copy_text(const char* text, size_t size) {
  char* copy = malloc(size + 1);
  if (!copy) return NULL;
  memcpy(copy, text, size);
  copy[size] = 0;
  return copy;
}

static bool fill_list(PyObject* sequence, PJRT_NamedValue* value) {
  PyObject* tuple = PySequence_Tuple(sequence);
  if (!tuple) return false;
  size_t count = (size_t)PyTuple_Size(tuple);
  int64_t* items = malloc((count + 1) * sizeof *items);
  for (size_t i = 0; i < count && items; i++) items[i] = PyLong_AsLongLong(PyTuple_GetItem(tuple, (Py_ssize_t)i));
  Py_DECREF(tuple);
  value->type = PJRT_NamedValue_kInt64List;
  value->int64_array_value = items;
  value->value_size = count;
  return items && !PyErr_Occurred();
}

static bool fill_value(PyObject* object, PJRT_NamedValue* value) {
  value->value_size = 1;
  if (PyBool_Check(object)) {
    value->type = PJRT_NamedValue_kBool;
    value->bool_value = object == Py_True;
  } else if (PyLong_Check(object)) {
    value->type = PJRT_NamedValue_kInt64;
    value->int64_value = PyLong_AsLongLong(object);
  } else if (PyFloat_Check(object)) {
    value->type = PJRT_NamedValue_kFloat;
    value->float_value = (float)PyFloat_AsDouble(object);
  } else if (PyUnicode_Check(object)) {
    Py_ssize_t size;
    const char* text = PyUnicode_AsUTF8AndSize(object, &size);
    value->type = PJRT_NamedValue_kString;
    value->string_value = text ? copy_text(text, (size_t)size) : NULL;
    value->value_size = text ? (size_t)size : 0;
  } else {
    return fill_list(object, value);
  }
  return !PyErr_Occurred();
}

void named_values_free(PJRT_NamedValue* values, size_t count) {
  for (size_t i = 0; i < count; i++) {
    free((char*)values[i].name);
    if (values[i].type == PJRT_NamedValue_kString) free((char*)values[i].string_value);
    if (values[i].type == PJRT_NamedValue_kInt64List) free((int64_t*)values[i].int64_array_value);
  }
  free(values);
}

PJRT_Error* named_values_from_dict(PyObject* dict, PJRT_NamedValue** out, size_t* out_count, const char* hook) {
  if (!PyDict_Check(dict)) return INTERNAL("hook %s did not return a dict", hook);
  size_t size = (size_t)PyDict_Size(dict), count = 0;
  PJRT_NamedValue* values = calloc(size + 1, sizeof *values);
  if (!values) return error_new(PJRT_Error_Code_RESOURCE_EXHAUSTED, "no memory for attributes");
  PyObject *key, *object;
  Py_ssize_t at = 0;
  bool ok = true;
  while (ok && count < size && PyDict_Next(dict, &at, &key, &object)) {
    PJRT_NamedValue* value = &values[count++];
    Py_ssize_t length = 0;
    const char* name = PyUnicode_Check(key) ? PyUnicode_AsUTF8AndSize(key, &length) : NULL;
    value->struct_size = PJRT_SIZE_UP_TO(PJRT_NamedValue, value_size);
    value->name = name ? copy_text(name, (size_t)length) : NULL;
    value->name_size = (size_t)length;
    ok = value->name && fill_value(object, value);
  }
  if (!ok) {
    PyErr_Clear();
    named_values_free(values, count);
    return INTERNAL("hook %s returned a dict with something else than str: int, str, bool, float, or ints", hook);
  }
  *out = values;
  *out_count = count;
  return NULL;
}

static PyObject* value_to_python(const PJRT_NamedValue* value) {
  switch (value->type) {
    case PJRT_NamedValue_kString:
      return PyUnicode_DecodeUTF8(value->string_value, (Py_ssize_t)value->value_size, "replace");
    case PJRT_NamedValue_kInt64:
      return PyLong_FromLongLong(value->int64_value);
    case PJRT_NamedValue_kFloat:
      return PyFloat_FromDouble((double)value->float_value);
    case PJRT_NamedValue_kBool:
      return PyBool_FromLong(value->bool_value);
    case PJRT_NamedValue_kInt64List: {
      PyObject* tuple = PyTuple_New((Py_ssize_t)value->value_size);
      for (size_t i = 0; i < value->value_size && tuple; i++)
        PyTuple_SetItem(tuple, (Py_ssize_t)i, PyLong_FromLongLong(value->int64_array_value[i]));
      return tuple;
    }
  }
  Py_RETURN_NONE;
}

static PyObject* dict_from_values(const PJRT_NamedValue* values, size_t count) {
  PyObject* dict = PyDict_New();
  for (size_t i = 0; i < count && dict; i++) {
    PyObject* key = PyUnicode_DecodeUTF8(values[i].name, (Py_ssize_t)values[i].name_size, "replace");
    PyObject* value = value_to_python(&values[i]);
    if (!key || !value || PyDict_SetItem(dict, key, value) != 0) Py_CLEAR(dict);
    Py_XDECREF(key);
    Py_XDECREF(value);
  }
  return dict;
}

/* ---- the plugin ---- */
PJRT_Error* Plugin_Initialize(PJRT_Plugin_Initialize_Args* args) {
  (void)args;
  return NULL;
}

PJRT_Error* Plugin_Attributes(PJRT_Plugin_Attributes_Args* args) {
  static PJRT_NamedValue* attributes; /* asked once, kept for the process; under the GIL */
  static size_t count;
  REFUSE_IF_CLOSED();
  PJRT_Error* error = NULL;
  PyGILState_STATE gil = PyGILState_Ensure();
  if (!attributes) {
    PyObject* dict = hook_call(HOOK_plugin_attributes, PyTuple_New(0));
    error = dict ? named_values_from_dict(dict, &attributes, &count, "plugin_attributes")
                 : error_from_python("plugin_attributes");
    Py_XDECREF(dict);
  }
  args->attributes = attributes;
  args->num_attributes = count;
  PyGILState_Release(gil);
  return error;
}

/* ---- the client ---- */
static bool text_at(PyObject* dict, const char* key, char** text) {
  PyObject* value = PyDict_GetItemString(dict, key);
  Py_ssize_t size;
  const char* utf8 = value && PyUnicode_Check(value) ? PyUnicode_AsUTF8AndSize(value, &size) : NULL;
  *text = utf8 ? copy_text(utf8, (size_t)size) : NULL;
  return *text != NULL;
}

static bool int_at(PyObject* dict, const char* key, int64_t* out) {
  PyObject* value = PyDict_GetItemString(dict, key);
  *out = value && PyLong_Check(value) ? PyLong_AsLongLong(value) : -1;
  return value && PyLong_Check(value) && !PyErr_Occurred();
}

static const char* fill_device(PyObject* dict, PyObject* string, PJRT_Device* device) {
  PJRT_DeviceDescription* description = &device->description;
  Py_ssize_t size;
  const char* text = PyUnicode_Check(string) ? PyUnicode_AsUTF8AndSize(string, &size) : NULL;
  if (!text || !(description->to_string = copy_text(text, (size_t)size))) return "device_strings";
  description->debug_string = description->to_string;
  if (!text_at(dict, "device_kind", &description->kind)) return "device_kind";
  return NULL;
}

static const char* fill_memory(PyObject* kind, PJRT_Memory* memory) {
  Py_ssize_t size;
  const char* text = PyUnicode_Check(kind) ? PyUnicode_AsUTF8AndSize(kind, &size) : NULL;
  if (!text || !(memory->kind = copy_text(text, (size_t)size))) return "memory_kinds";
  memory->to_string = memory->debug_string = memory->kind;
  return NULL;
}

/* One device for each of device_strings, with a memory of each of memory_kinds. */
static const char* fill_devices(PyObject* dict, PJRT_Client* client) {
  PyObject* strings = PyDict_GetItemString(dict, "device_strings");
  if (!strings || !PyTuple_Check(strings) || PyTuple_Size(strings) < 1) return "device_strings";
  PyObject* kinds = PyDict_GetItemString(dict, "memory_kinds");
  if (!kinds || !PyTuple_Check(kinds) || PyTuple_Size(kinds) < 1) return "memory_kinds";
  size_t count = client->device_count = (size_t)PyTuple_Size(strings);
  size_t each = client->memory_count = (size_t)PyTuple_Size(kinds);
  PJRT_Device* devices = calloc(count, sizeof *devices);
  client->devices = calloc(count, sizeof *client->devices);
  client->descriptions = calloc(count, sizeof *client->descriptions);
  client->memories = calloc(count * each, sizeof *client->memories);
  PJRT_Memory* memories = calloc(count * each, sizeof *memories);
  if (!memories || !devices || !client->devices || !client->descriptions || !client->memories) return "memory for devices";
  for (size_t i = 0; i < count; i++) {
    PJRT_Device* device = client->devices[i] = &devices[i];
    client->descriptions[i] = &device->description;
    device->client = client;
    device->description.id = (int)i;
    const char* wrong = fill_device(dict, PyTuple_GetItem(strings, (Py_ssize_t)i), device);
    device->memories = client->memories + i * each;
    for (size_t kind = 0; kind < each && !wrong; kind++) {
      PJRT_Memory* memory = device->memories[kind] = &memories[i * each + kind];
      memory->device = device;
      memory->id = (int)(i * each + kind);
      memory->kind_id = (int)kind;
      wrong = fill_memory(PyTuple_GetItem(kinds, (Py_ssize_t)kind), memory);
    }
    if (wrong) return wrong;
  }
  return NULL;
}

static const char* fill_client(PyObject* dict, PJRT_Client* client) {
  if (!text_at(dict, "platform_name", &client->platform_name)) return "platform_name";
  if (!text_at(dict, "platform_version", &client->platform_version)) return "platform_version";
  const char* wrong = fill_devices(dict, client);
  if (wrong) return wrong;
  PyObject* on_cpu = PyDict_GetItemString(dict, "is_on_cpu");
  if (!on_cpu || !PyBool_Check(on_cpu)) return "is_on_cpu";
  client->is_on_cpu = on_cpu == Py_True;
  Laziness wanted;
  if (!int_at(dict, "eager_cost", &wanted.eager_cost)) return "eager_cost";
  if (!int_at(dict, "lazy_limit", &wanted.lazy_limit)) return "lazy_limit";
  if (!int_at(dict, "lazy_bytes", &wanted.lazy_bytes)) return "lazy_bytes";
  if (!int_at(dict, "lazy_cost", &wanted.lazy_cost)) return "lazy_cost";
  if (!int_at(dict, "short_cost", &wanted.short_cost)) return "short_cost";
  wanted.view_in_place = client->is_on_cpu;
  static const char* const names[] = {"evaluate_now", "start", "synchronize", "scope", "sentinel"};
  PyObject** const means[] = {&wanted.evaluate_now, &wanted.start, &wanted.synchronize, &wanted.scope, &wanted.sentinel};
  for (size_t i = 0; i < COUNT_OF(means); i++) {
    *means[i] = PyDict_GetItemString(dict, names[i]);
    Py_XINCREF(*means[i]); /* kept with the client */
  }
  if (!wanted.evaluate_now != !wanted.start) return "start";
  if (!wanted.evaluate_now != !wanted.synchronize) return "synchronize";
  if (!wanted.scope != !wanted.sentinel) return "sentinel";
  wanted.first_to_the_end = PyDict_GetItemString(dict, "first_to_the_end") == Py_True;
  laziness = wanted;
  return NULL;
}

/* Clients are kept for the process: a buffer of a client that JAX has cleared still names its device. */
static PJRT_Error* client_new(PyObject* dict, PJRT_Client** out) {
  if (!PyDict_Check(dict)) return INTERNAL("hook client_create did not return a dict");
  PJRT_Client* client = calloc(1, sizeof *client);
  if (!client) return error_new(PJRT_Error_Code_RESOURCE_EXHAUSTED, "no memory for a client");
  client->topology.client = client;
  const char* wrong = fill_client(dict, client);
  if (wrong) {
    PyErr_Clear();
    return INTERNAL("hook client_create: %s is missing or of the wrong type", wrong);
  }
  PyObject* attributes = PyDict_GetItemString(dict, "attributes");
  PJRT_DeviceDescription* description = client->descriptions[0];
  PJRT_Error* error = attributes ? named_values_from_dict(attributes, &description->attributes,
                                                          &description->attribute_count, "client_create (attributes)")
                                 : INTERNAL("hook client_create: attributes is missing");
  for (size_t i = 0; i < description->attribute_count; i++) { /* jaxlib 0.10-0.12 aborts on a device's bool */
    PJRT_NamedValue* value = &description->attributes[i];
    if (value->type != PJRT_NamedValue_kBool) continue;
    value->type = PJRT_NamedValue_kInt64;
    value->int64_value = value->bool_value;
  }
  for (size_t i = 1; i < client->device_count; i++) {
    client->descriptions[i]->attributes = description->attributes;
    client->descriptions[i]->attribute_count = description->attribute_count;
  }
  if (!error) *out = client;
  return error;
}

PJRT_Error* Client_Create(PJRT_Client_Create_Args* args) {
  REFUSE_IF_CLOSED();
  PyGILState_STATE gil = PyGILState_Ensure();
  PyObject* options = dict_from_values(args->create_options, args->num_options);
  PyObject* dict = options ? hook_call(HOOK_client_create, Py_BuildValue("(N)", options)) : NULL;
  PJRT_Error* error = dict ? client_new(dict, &args->client) : error_from_python("client_create");
  Py_XDECREF(dict);
  PyGILState_Release(gil);
  return error;
}

PJRT_Error* Client_Destroy(PJRT_Client_Destroy_Args* args) {
  (void)args;
  if (IS_CLOSED()) return NULL;
  PyGILState_STATE gil = PyGILState_Ensure();
  PyObject* done = hook_call(HOOK_client_destroy, PyTuple_New(0));
  if (!done) PyErr_Clear(); /* jaxlib aborts on an error from here, and at exit Python may be half gone */
  Py_XDECREF(done);
  PyGILState_Release(gil);
  return NULL;
}

#define TEXT(args, field, text) ((args)->field = (text), (args)->field##_size = strlen(text), (PJRT_Error*)NULL)

PJRT_Error* Client_PlatformName(PJRT_Client_PlatformName_Args* args) {
  return TEXT(args, platform_name, args->client->platform_name);
}

PJRT_Error* Client_PlatformVersion(PJRT_Client_PlatformVersion_Args* args) {
  return TEXT(args, platform_version, args->client->platform_version);
}

PJRT_Error* Client_ProcessIndex(PJRT_Client_ProcessIndex_Args* args) {
  args->process_index = 0;
  return NULL;
}

PJRT_Error* Client_Devices(PJRT_Client_Devices_Args* args) {
  args->devices = args->client->devices;
  args->num_devices = args->client->device_count;
  return NULL;
}

PJRT_Error* Client_AddressableDevices(PJRT_Client_AddressableDevices_Args* args) {
  args->addressable_devices = args->client->devices;
  args->num_addressable_devices = args->client->device_count;
  return NULL;
}

PJRT_Error* Client_AddressableMemories(PJRT_Client_AddressableMemories_Args* args) {
  args->addressable_memories = args->client->memories;
  args->num_addressable_memories = args->client->device_count * args->client->memory_count;
  return NULL;
}

static PJRT_Error* look_up(PJRT_Client* client, int id, PJRT_Device** device) {
  if (id < 0 || (size_t)id >= client->device_count)
    return INVALID("there is no device %d, only 0 to %zu", id, client->device_count - 1);
  *device = client->devices[id];
  return NULL;
}

PJRT_Error* Client_LookupDevice(PJRT_Client_LookupDevice_Args* args) {
  return look_up(args->client, args->id, &args->device);
}

PJRT_Error* Client_LookupAddressableDevice(PJRT_Client_LookupAddressableDevice_Args* args) {
  return look_up(args->client, args->local_hardware_id, &args->addressable_device);
}

PJRT_Error* Client_DefaultDeviceAssignment(PJRT_Client_DefaultDeviceAssignment_Args* args) {
  int64_t count = (int64_t)args->num_replicas * args->num_partitions;
  if (args->num_replicas < 1 || args->num_partitions < 1 || count > (int64_t)args->client->device_count ||
      (int64_t)args->default_assignment_size < count)
    return INVALID("%d replicas of %d partitions do not fit %zu device%s", args->num_replicas, args->num_partitions,
                   args->client->device_count, args->client->device_count == 1 ? "" : "s");
  for (int id = 0; id < count; id++) args->default_assignment[id] = id;
  return NULL;
}

PJRT_Error* Client_TopologyDescription(PJRT_Client_TopologyDescription_Args* args) {
  args->topology = &args->client->topology;
  return NULL;
}

/* ---- the device ---- */
PJRT_Error* Device_GetDescription(PJRT_Device_GetDescription_Args* args) {
  args->device_description = &args->device->description;
  return NULL;
}

PJRT_Error* Device_IsAddressable(PJRT_Device_IsAddressable_Args* args) {
  args->is_addressable = true;
  return NULL;
}

PJRT_Error* Device_LocalHardwareId(PJRT_Device_LocalHardwareId_Args* args) {
  args->local_hardware_id = args->device->description.id;
  return NULL;
}

PJRT_Error* Device_AddressableMemories(PJRT_Device_AddressableMemories_Args* args) {
  args->memories = args->device->memories;
  args->num_memories = args->device->client->memory_count;
  return NULL;
}

PJRT_Error* Device_DefaultMemory(PJRT_Device_DefaultMemory_Args* args) {
  args->memory = args->device->memories[0];
  return NULL;
}

static void keep_attributes(PJRT_Device_Attributes* attributes) { (void)attributes; }

PJRT_Error* Device_GetAttributes(PJRT_Device_GetAttributes_Args* args) {
  args->attributes = args->device->description.attributes;
  args->num_attributes = args->device->description.attribute_count;
  args->device_attributes = NULL;
  args->attributes_deleter = keep_attributes;
  return NULL;
}

static bool number_at(PyObject* dict, const char* key, int64_t* out) {
  PyObject* value = PyDict_GetItemString(dict, key);
  if (!value || !PyLong_Check(value)) return false;
  *out = PyLong_AsLongLong(value);
  if (!PyErr_Occurred()) return true;
  PyErr_Clear();
  return false;
}

PJRT_Error* Device_MemoryStats(PJRT_Device_MemoryStats_Args* args) {
  REFUSE_IF_CLOSED();
  ZERO_FROM(args, bytes_in_use); /* jaxlib does not, and reads every flag */
  PyGILState_STATE gil = PyGILState_Ensure();
  PyObject* dict = hook_call(HOOK_memory_stats, PyTuple_New(0));
  PJRT_Error* error = !dict                 ? error_from_python("memory_stats")
                      : !PyDict_Check(dict) ? INTERNAL("hook memory_stats did not return a dict")
                                            : NULL;
  if (!error) {
    int64_t value;
    if (HAS_FIELD(args, bytes_in_use) && number_at(dict, "bytes_in_use", &value)) args->bytes_in_use = value;
#define STAT(field)                                                                                     \
  if (HAS_FIELD(args, field##_is_set) && (args->field##_is_set = number_at(dict, #field, &value))) \
    args->field = value;
    STAT(peak_bytes_in_use)
    STAT(num_allocs)
    STAT(largest_alloc_size)
    STAT(bytes_limit)
    STAT(bytes_reserved)
    STAT(peak_bytes_reserved)
    STAT(bytes_reservable_limit)
    STAT(largest_free_block_bytes)
    STAT(pool_bytes)
    STAT(peak_pool_bytes)
#undef STAT
  }
  Py_XDECREF(dict);
  PyGILState_Release(gil);
  return error;
}

PJRT_Error* DeviceDescription_Id(PJRT_DeviceDescription_Id_Args* args) {
  args->id = args->device_description->id;
  return NULL;
}

PJRT_Error* DeviceDescription_ProcessIndex(PJRT_DeviceDescription_ProcessIndex_Args* args) {
  args->process_index = 0;
  return NULL;
}

PJRT_Error* DeviceDescription_Attributes(PJRT_DeviceDescription_Attributes_Args* args) {
  args->attributes = args->device_description->attributes;
  args->num_attributes = args->device_description->attribute_count;
  return NULL;
}

PJRT_Error* DeviceDescription_Kind(PJRT_DeviceDescription_Kind_Args* args) {
  return TEXT(args, device_kind, args->device_description->kind);
}

PJRT_Error* DeviceDescription_DebugString(PJRT_DeviceDescription_DebugString_Args* args) {
  return TEXT(args, debug_string, args->device_description->debug_string);
}

PJRT_Error* DeviceDescription_ToString(PJRT_DeviceDescription_ToString_Args* args) {
  return TEXT(args, to_string, args->device_description->to_string);
}

/* ---- the memory ---- */
PJRT_Error* Memory_Id(PJRT_Memory_Id_Args* args) {
  args->id = args->memory->id;
  return NULL;
}

PJRT_Error* Memory_Kind(PJRT_Memory_Kind_Args* args) { return TEXT(args, kind, args->memory->kind); }

PJRT_Error* Memory_Kind_Id(PJRT_Memory_Kind_Id_Args* args) {
  args->kind_id = args->memory->kind_id;
  return NULL;
}

PJRT_Error* Memory_DebugString(PJRT_Memory_DebugString_Args* args) {
  return TEXT(args, debug_string, args->memory->debug_string);
}

PJRT_Error* Memory_ToString(PJRT_Memory_ToString_Args* args) { return TEXT(args, to_string, args->memory->to_string); }

PJRT_Error* Memory_AddressableByDevices(PJRT_Memory_AddressableByDevices_Args* args) {
  args->devices = &args->memory->device;
  args->num_devices = 1;
  return NULL;
}

/* ---- the topology: the client's, and never anything else ---- */
struct PJRT_SerializedTopology {
  size_t size;
  char text[];
};

static void free_topology_text(PJRT_SerializedTopology* serialized) { free(serialized); }

static PJRT_SerializedTopology* topology_text(const PJRT_TopologyDescription* topology) {
  const PJRT_Client* client = topology->client;
  static const char format[] = "%s\n%s\n%s\n%zu devices";
  const char* kind = client->descriptions[0]->kind;
  int size = snprintf(NULL, 0, format, client->platform_name, client->platform_version, kind, client->device_count);
  PJRT_SerializedTopology* serialized = malloc(sizeof *serialized + (size_t)size + 1);
  if (!serialized) return NULL;
  serialized->size = (size_t)size;
  snprintf(serialized->text, (size_t)size + 1, format, client->platform_name, client->platform_version, kind,
           client->device_count);
  return serialized;
}

PJRT_Error* TopologyDescription_Destroy(PJRT_TopologyDescription_Destroy_Args* args) {
  (void)args; /* part of its client */
  return NULL;
}

PJRT_Error* TopologyDescription_PlatformName(PJRT_TopologyDescription_PlatformName_Args* args) {
  return TEXT(args, platform_name, args->topology->client->platform_name);
}

PJRT_Error* TopologyDescription_PlatformVersion(PJRT_TopologyDescription_PlatformVersion_Args* args) {
  return TEXT(args, platform_version, args->topology->client->platform_version);
}

PJRT_Error* TopologyDescription_GetDeviceDescriptions(PJRT_TopologyDescription_GetDeviceDescriptions_Args* args) {
  args->descriptions = args->topology->client->descriptions;
  args->num_descriptions = args->topology->client->device_count;
  return NULL;
}

PJRT_Error* TopologyDescription_Attributes(PJRT_TopologyDescription_Attributes_Args* args) {
  args->attributes = NULL;
  args->num_attributes = 0;
  return NULL;
}

PJRT_Error* TopologyDescription_Serialize(PJRT_TopologyDescription_Serialize_Args* args) {
  PJRT_SerializedTopology* serialized = topology_text(args->topology);
  if (!serialized) return error_new(PJRT_Error_Code_RESOURCE_EXHAUSTED, "no memory for a topology");
  args->serialized_bytes = serialized->text;
  args->serialized_bytes_size = serialized->size;
  args->serialized_topology = serialized;
  args->serialized_topology_deleter = free_topology_text;
  return NULL;
}

PJRT_Error* TopologyDescription_Fingerprint(PJRT_TopologyDescription_Fingerprint_Args* args) {
  PJRT_SerializedTopology* serialized = topology_text(args->topology);
  if (!serialized) return error_new(PJRT_Error_Code_RESOURCE_EXHAUSTED, "no memory for a topology");
  uint64_t hash = UINT64_C(14695981039346656037); /* FNV-1a */
  for (size_t i = 0; i < serialized->size; i++)
    hash = (hash ^ (unsigned char)serialized->text[i]) * UINT64_C(1099511628211);
  args->fingerprint = hash;
  free(serialized);
  return NULL;
}
