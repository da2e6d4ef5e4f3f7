/* Layouts: the order in which an array's dimensions lie in memory, fastest first. Values are MLX's, with strides of its own: a layout is what
 * JAX was told of a buffer, and the order in which its bytes are given out. There is one object for each order, for ever. */
#include <stdio.h>

#include "shim.h"

enum { MOST_DIMENSIONS = 64 };

static pthread_mutex_t layouts_mutex = PTHREAD_MUTEX_INITIALIZER;
static Layout* layouts; /* under the mutex; what is on the list stays */

static bool is_permutation(const int64_t* order, size_t ndim) {
  uint64_t seen = 0;
  for (size_t i = 0; i < ndim; i++) {
    if (order[i] < 0 || (size_t)order[i] >= ndim || (seen >> order[i] & 1)) return false;
    seen |= UINT64_C(1) << order[i];
  }
  return true;
}

/* As XLA writes a layout: {1,0}. */
static Layout* layout_new(const int64_t* order, size_t ndim) {
  Layout* layout = malloc(sizeof *layout + ndim * sizeof *order);
  char* text = malloc(3 * ndim + 3);
  if (!layout || !text) {
    free(layout);
    free(text);
    return NULL;
  }
  int at = sprintf(text, "{");
  for (size_t i = 0; i < ndim; i++) at += sprintf(text + at, i ? ",%d" : "%d", (int)order[i]);
  sprintf(text + at, "}");
  layout->text = text;
  layout->size = (size_t)at + 1;
  layout->ndim = ndim;
  if (ndim) memcpy(layout->minor_to_major, order, ndim * sizeof *order);
  return layout;
}

const Layout* layout_find(const int64_t* order, size_t ndim) {
  if (ndim > MOST_DIMENSIONS || !is_permutation(order, ndim)) return NULL;
  pthread_mutex_lock(&layouts_mutex);
  Layout* layout = layouts;
  while (layout && (layout->ndim != ndim || (ndim && memcmp(layout->minor_to_major, order, ndim * sizeof *order) != 0)))
    layout = layout->next;
  if (!layout && (layout = layout_new(order, ndim))) {
    layout->next = layouts;
    layouts = layout;
  }
  pthread_mutex_unlock(&layouts_mutex);
  return layout;
}

const Layout* layout_row_major(size_t ndim) {
  int64_t order[MOST_DIMENSIONS];
  for (size_t i = 0; i < ndim && i < COUNT_OF(order); i++) order[i] = (int64_t)(ndim - 1 - i);
  return layout_find(order, ndim);
}

const Layout* layout_or_null(const Layout* layout) {
  return layout == layout_row_major(layout->ndim) ? NULL : layout;
}

PJRT_Error* layout_read(const PJRT_Buffer_MemoryLayout* given, size_t ndim, const Layout** layout) {
  if (given->type != PJRT_Buffer_MemoryLayout_Type_Tiled) return INVALID("a layout given as strides is not supported");
  if (given->tiled.num_tiles > 0) return INVALID("a tiled layout is not supported");
  if (given->tiled.minor_to_major_size != ndim)
    return INVALID("a layout of %zu dimensions for %zu", given->tiled.minor_to_major_size, ndim);
  *layout = layout_find(given->tiled.minor_to_major, ndim);
  return *layout ? NULL : INVALID("a layout that is not a permutation of the dimensions");
}

/* ---- the extension: xla/pjrt/c/pjrt_c_api_layouts_extension.h; a layout is ours for ever, so nothing is ever freed ---- */
typedef struct {
  size_t struct_size;
  PJRT_Extension_Base* extension_start;
  const Layout* layout;
} DestroyArgs;
typedef struct {
  size_t struct_size;
  PJRT_Extension_Base* extension_start;
  const Layout* layout;
  const char* bytes;
  size_t bytes_size;
  void* serialized;
  void (*deleter)(void* serialized);
} SerializeArgs;
typedef struct {
  size_t struct_size;
  PJRT_Extension_Base* extension_start;
  void* of; /* a client or a topology */
  PJRT_Buffer_Type type;
  const int64_t* dims;
  size_t ndim;
  const Layout* layout;
} DefaultArgs;
typedef struct {
  size_t struct_size;
  PJRT_Extension_Base* extension_start;
  const PJRT_Buffer* buffer;
  const Layout* layout;
} BufferArgs;
typedef struct {
  size_t struct_size;
  PJRT_Extension_Base* extension_start;
  const PJRT_Executable* executable;
  size_t count;
  const Layout* const* layouts;
} ExecutableArgs;

static PJRT_Error* found(const Layout* layout, size_t ndim) {
  return layout ? NULL : error_new(PJRT_Error_Code_UNIMPLEMENTED, "the layout of %zu dimensions", ndim);
}

static PJRT_Error* destroy(DestroyArgs* args) {
  (void)args;
  return NULL;
}

static void keep(void* serialized) { (void)serialized; }

static PJRT_Error* serialize(SerializeArgs* args) {
  args->bytes = args->layout->text;
  args->bytes_size = args->layout->size;
  args->serialized = NULL;
  args->deleter = keep;
  return NULL;
}

static PJRT_Error* default_layout(DefaultArgs* args) {
  args->layout = layout_row_major(args->ndim);
  return found(args->layout, args->ndim);
}

static PJRT_Error* buffer_layout(BufferArgs* args) {
  args->layout = args->buffer->layout ? args->buffer->layout : layout_row_major(args->buffer->ndim);
  return found(args->layout, args->buffer->ndim);
}

static PJRT_Error* output_layouts(ExecutableArgs* args) {
  args->count = args->executable->outputs.count / args->executable->shards;
  args->layouts = args->executable->output_layouts;
  return NULL;
}

static PJRT_Error* parameter_layouts(ExecutableArgs* args) {
  args->count = args->executable->parameters.count / args->executable->shards;
  args->layouts = args->executable->parameter_layouts;
  return NULL;
}

const LayoutsExtension layouts_extension = {
    .base = {.struct_size = sizeof layouts_extension, .type = PJRT_Extension_Type_Layouts},
    .functions = {destroy, serialize, default_layout, buffer_layout, default_layout, output_layouts, parameter_layouts},
};
