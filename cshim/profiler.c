/* PJRT's profiler extension: while jax.profiler traces, a plane with what ran and when. Each program is evaluated before the next
 * starts, so that an event's length is the program's own. */
#include <stdio.h>
#include <time.h>

#include "bridge.h"
#include "shim.h"

typedef struct {
  char* name;
  int line;
  int64_t start, nanoseconds;
} Event;

static atomic_bool running;
static pthread_mutex_t events_mutex = PTHREAD_MUTEX_INITIALIZER;
static Event* events; /* under the mutex, as are the others */
static size_t event_total, event_room;

int64_t profile_now(void) {
  if (!atomic_load_explicit(&running, memory_order_relaxed)) return 0;
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now); /* as jaxlib's own planes */
  return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

void profile_event(ProfileLine line, const char* name, int64_t start) {
  int64_t end = start ? profile_now() : 0;
  if (!end) return;
  char* copy = strdup(name);
  pthread_mutex_lock(&events_mutex);
  if (event_total == event_room) {
    size_t room = event_room ? 2 * event_room : 1024;
    Event* more = realloc(events, room * sizeof *more);
    if (more) {
      events = more;
      event_room = room;
    }
  }
  if (copy && event_total < event_room)
    events[event_total++] = (Event){.name = copy, .line = line, .start = start, .nanoseconds = end - start};
  else free(copy);
  pthread_mutex_unlock(&events_mutex);
}

int64_t shim_profile_now(void) { return profile_now(); }
void shim_profile_event(const char* name, int64_t start) { profile_event(PROFILE_HOST, name, start); }

/* ---- tensorflow.profiler.XSpace, in protobuf's wire format ---- */
size_t write_varint(char* to, uint64_t value) {
  size_t size = 0;
  do {
    char low = (char)(value & 0x7f);
    value >>= 7;
    to[size++] = (char)(value ? low | 0x80 : low);
  } while (value);
  return size;
}

typedef struct {
  char* data;
  size_t size, room;
  bool failed;
} Text;

static void put_bytes(Text* text, const void* bytes, size_t size) {
  if (text->size + size > text->room) {
    size_t room = 2 * (text->size + size) + 64;
    char* more = realloc(text->data, room);
    text->failed = text->failed || !more;
    if (!more) return;
    text->data = more;
    text->room = room;
  }
  if (size) memcpy(text->data + text->size, bytes, size);
  text->size += size;
}

static void put_varint(Text* text, uint64_t value) {
  char out[10];
  put_bytes(text, out, write_varint(out, value));
}

static void put_int(Text* text, int field, int64_t value) {
  put_varint(text, (uint64_t)field << 3);
  put_varint(text, (uint64_t)value);
}

static void put_field(Text* text, int field, const void* bytes, size_t size) {
  put_varint(text, (uint64_t)field << 3 | 2);
  put_varint(text, size);
  put_bytes(text, bytes, size);
}

/* A message as a field; it is emptied for the next. */
static void put_message(Text* text, int field, Text* message) {
  put_field(text, field, message->data, message->size);
  text->failed = text->failed || message->failed;
  message->size = 0;
}

/* XPlane {name = 2, lines = 3, event_metadata = 4}, XLine {id = 1, name = 2, timestamp_ns = 3, events = 4},
 * XEvent {metadata_id = 1, offset_ps = 2, duration_ps = 3}, XEventMetadata {id = 1, name = 2}; each event has its own metadata. */
static void write_space(Text* space) {
  static const char plane_name[] = "/device:GPU:0 MLX";
  static const char* const line_names[] = {[PROFILE_PROGRAMS] = "programs", [PROFILE_HOST] = "host segments"};
  Text plane = {0}, line = {0}, inner = {0}, entry = {0};
  put_field(&plane, 2, plane_name, sizeof plane_name - 1);
  int64_t first = INT64_MAX;
  for (size_t i = 0; i < event_total; i++)
    if (events[i].start < first) first = events[i].start;
  for (int number = 0; number < (int)COUNT_OF(line_names) && event_total; number++) {
    put_int(&line, 1, number + 1);
    put_field(&line, 2, line_names[number], strlen(line_names[number]));
    put_int(&line, 3, first);
    for (size_t i = 0; i < event_total; i++) {
      if (events[i].line != number) continue;
      put_int(&inner, 1, (int64_t)i + 1);
      put_int(&inner, 2, (events[i].start - first) * 1000);
      put_int(&inner, 3, events[i].nanoseconds * 1000);
      put_message(&line, 4, &inner);
    }
    put_message(&plane, 3, &line);
  }
  for (size_t i = 0; i < event_total; i++) {
    put_int(&inner, 1, (int64_t)i + 1);
    put_field(&inner, 2, events[i].name, strlen(events[i].name));
    put_int(&entry, 1, (int64_t)i + 1);
    put_message(&entry, 2, &inner);
    put_message(&plane, 4, &entry);
  }
  put_message(space, 1, &plane);
  free(plane.data);
  free(line.data);
  free(inner.data);
  free(entry.data);
}

/* ---- the extension: xla/backends/profiler/plugin/profiler_c_api.h ---- */
typedef struct PLUGIN_Profiler_Error PLUGIN_Profiler_Error; /* a text; there is one error */
typedef struct {
  Text space;
} Profiler;
typedef struct {
  size_t struct_size;
  void* priv;
  PLUGIN_Profiler_Error* error;
  const char* message;
  size_t message_size;
} ErrorMessageArgs;
typedef struct {
  size_t struct_size;
  void* priv;
  PLUGIN_Profiler_Error* error;
  int code;
} ErrorCodeArgs;
typedef struct {
  size_t struct_size;
  const char* options;
  size_t options_size;
  Profiler* profiler;
} CreateArgs;
typedef struct {
  size_t struct_size;
  Profiler* profiler;
} ProfilerArgs;
typedef struct {
  size_t struct_size;
  Profiler* profiler;
  uint8_t* buffer;
  size_t size;
} CollectArgs;

static char no_memory[] = "no memory for a profile";

static PLUGIN_Profiler_Error* failed(void) { return (PLUGIN_Profiler_Error*)no_memory; }
static void error_destroy(void* args) { (void)args; }

static void error_message(ErrorMessageArgs* args) {
  args->message = no_memory;
  args->message_size = sizeof no_memory - 1;
}

static PLUGIN_Profiler_Error* error_code(ErrorCodeArgs* args) {
  args->code = PJRT_Error_Code_RESOURCE_EXHAUSTED;
  return NULL;
}

static PLUGIN_Profiler_Error* create(CreateArgs* args) {
  args->profiler = calloc(1, sizeof *args->profiler);
  return args->profiler ? NULL : failed();
}

static PLUGIN_Profiler_Error* destroy(ProfilerArgs* args) {
  if (args->profiler) free(args->profiler->space.data);
  free(args->profiler);
  return NULL;
}

static void forget_events(void) { /* the mutex held */
  for (size_t i = 0; i < event_total; i++) free(events[i].name);
  event_total = 0;
}

static PLUGIN_Profiler_Error* start(ProfilerArgs* args) {
  (void)args;
  pthread_mutex_lock(&events_mutex);
  forget_events();
  pthread_mutex_unlock(&events_mutex);
  atomic_store(&running, true);
  return NULL;
}

static PLUGIN_Profiler_Error* stop(ProfilerArgs* args) {
  (void)args;
  atomic_store(&running, false);
  return NULL;
}

/* Called once; jaxlib reads the buffer at once, and it stays ours (the header's comment speaks of two calls). */
static PLUGIN_Profiler_Error* collect_data(CollectArgs* args) {
  Text* space = &args->profiler->space;
  space->size = 0;
  pthread_mutex_lock(&events_mutex);
  write_space(space);
  forget_events();
  pthread_mutex_unlock(&events_mutex);
  if (space->failed) return failed();
  args->buffer = (uint8_t*)space->data;
  args->size = space->size;
  return NULL;
}

static const struct {
  size_t struct_size;
  void* priv;
  void* functions[8];
} profiler_api = {
    .struct_size = sizeof profiler_api,
    .functions = {error_destroy, error_message, error_code, create, destroy, start, stop, collect_data},
};

const ProfilerExtension profiler_extension = {
    .base = {.struct_size = sizeof profiler_extension,
             .type = PJRT_Extension_Type_Profiler,
             .next = (PJRT_Extension_Base*)&layouts_extension.base},
    .profiler_api = &profiler_api,
};
