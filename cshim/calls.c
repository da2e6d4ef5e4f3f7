/* What XLA's own code on the processor calls: one custom call by the typed API (xla/ffi, 0.x), which ends a run. */
#include "bridge.h"
#include "shim.h"

/* The parts of the API that the call reads, under its own names. */
typedef struct Extension {
  size_t struct_size;
  int type;
  struct Extension* next;
} Extension;

typedef struct {
  size_t struct_size;
  Extension* extension_start;
  int major_version, minor_version;
} ApiVersion;

typedef struct {
  size_t struct_size;
  ApiVersion api_version;
} Metadata;

typedef struct {
  Extension base;
  Metadata* metadata;
} MetadataExtension;

typedef struct {
  size_t struct_size;
  Extension* extension_start;
  const char* message;
  int errc;
} ErrorArguments;

typedef struct {
  size_t struct_size;
  Extension* extension_start;
  ApiVersion api_version;
  const void* internal_api;
  void* (*error_create)(ErrorArguments*);
} Api;

typedef struct {
  size_t struct_size;
  Extension* extension_start;
  int dtype;
  void* data;
} Buffer;

typedef struct {
  size_t struct_size;
  Extension* extension_start;
  int64_t size;
  int* types;
  Buffer** values;
} Values;

typedef struct {
  size_t struct_size;
  Extension* extension_start;
  const Api* api;
  void* context;
  int stage;
  Values arguments;
} CallFrame;

enum { EXTENSION_METADATA = 1, CANCELLED = 1 };

/* (s64[] interrupts counted when the run began) -> (): fails if there were more since, or the process is ending. */
static void* look(CallFrame* frame) {
  Extension* extension = frame->extension_start;
  if (extension && extension->type == EXTENSION_METADATA) {
    ApiVersion* version = &((MetadataExtension*)extension)->metadata->api_version;
    version->major_version = 0;
    version->minor_version = frame->api ? frame->api->api_version.minor_version : 1; /* all so far agree in what is read here */
    return NULL;
  }
  int64_t seen = *(const int64_t*)frame->arguments.values[0]->data;
  if (!shim_stopping() && (int64_t)shim_interrupts() == seen) return NULL;
  ErrorArguments error = {.struct_size = sizeof error, .message = "a loop was interrupted", .errc = CANCELLED};
  return frame->api->error_create(&error);
}

uintptr_t shim_look_call(void) { return (uintptr_t)look; }
