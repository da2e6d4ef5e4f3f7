/* What the shim's sources share. README.md: who owns what, the locks and their order. */
#pragma once
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>

#include "pjrt_abi.h"

#pragma GCC visibility push(hidden)

/* Every slot of the table is a function of the same name, without the prefix. */
#define DECLARE_SLOT(name) PJRT_##name name;
PJRT_FUNCTIONS(DECLARE_SLOT)
#undef DECLARE_SLOT

#define COUNT_OF(array) (sizeof(array) / sizeof((array)[0]))
#define HAS_FIELD(args, field) \
  ((args)->struct_size >= offsetof(__typeof__(*(args)), field) + sizeof((args)->field))
/* Zeroes what the caller will read, for as long as the caller says its struct is. */
#define ZERO_FROM(args, field)                                                       \
  do {                                                                               \
    size_t at_ = offsetof(__typeof__(*(args)), field);                               \
    if ((args)->struct_size > at_) memset((char*)(args) + at_, 0, (args)->struct_size - at_); \
  } while (0)

/* ---- process.c: the locks, shutdown, fork, interrupts ---- */
typedef enum { OPEN = 0, FINALIZING = 1, FORKED = 2 } Closed;
extern atomic_int process_closed;
#define IS_CLOSED() __builtin_expect(atomic_load_explicit(&process_closed, memory_order_relaxed) != OPEN, 0)
#define REFUSE_IF_CLOSED() do { if (IS_CLOSED()) return error_closed(); } while (0)

extern pthread_mutex_t state_mutex;
void state_lock(void);    /* short, never while waiting for the GIL or calling out */
void state_unlock(void);
void state_wait(void);    /* for state_changed(); the GIL must be dropped */
void state_changed(void); /* with the state lock held */
int state_wait_until(const struct timespec* deadline);

bool caller_has_gil(void); /* true when it cannot be told */
void lock_with_gil(void); /* the one lock; drops the GIL while it blocks */
void unlock_with_gil(void);
void drop_value(PyObject* value); /* GIL held; waits for nobody: what the lock guards is dropped later */
void drop_later_values(void);     /* GIL held */

/* ---- errors.c ---- */
struct PJRT_Error {
  atomic_int references;
  PJRT_Error_Code code;
  size_t size;
  char message[];
};
PJRT_Error* error_new(PJRT_Error_Code code, const char* format, ...) __attribute__((format(printf, 2, 3)));
PJRT_Error* error_from_text(PJRT_Error_Code code, const char* text, size_t size);
PJRT_Error* error_from_python(const char* hook); /* takes the raised exception */
PJRT_Error* error_retain(PJRT_Error* error);
void error_release(PJRT_Error* error);
PJRT_Error* error_closed(void);
#define INVALID(...) error_new(PJRT_Error_Code_INVALID_ARGUMENT, __VA_ARGS__)
#define INTERNAL(...) error_new(PJRT_Error_Code_INTERNAL, __VA_ARGS__)

/* ---- events.c ---- */
typedef struct Waiter {
  struct Waiter* next;
  PJRT_Event_OnReadyCallback callback;
  void* argument;
  PJRT_Error* error; /* set when the event completes */
} Waiter;
struct PJRT_Event {
  atomic_int references;
  atomic_bool ready;
  bool permanent; /* the shared, always ready event */
  PJRT_Error* error;
  Waiter* waiters;
};
extern PJRT_Event event_ready;
extern atomic_long event_count;
PJRT_Event* event_new(void);
PJRT_Event* event_retain(PJRT_Event* event);
void event_release(PJRT_Event* event);
PJRT_Event* event_failed(PJRT_Error* error); /* takes the error */
Waiter* event_complete(PJRT_Event* event, PJRT_Error* error); /* state lock held; borrows the error */
void event_fire(Waiter* waiters); /* no lock, no GIL held */
Waiter* waiters_join(Waiter* first, Waiter* second);

/* ---- cells.c: values, and the executions they come from ---- */
typedef struct Record Record;
typedef struct Batch Batch;
typedef enum { PENDING, LAZY, READY, HOST, FAILED } State;
typedef struct Cell {
  long references;   /* state lock */
  State state;       /* state lock */
  bool queued;       /* with the evaluator */
  PyObject* value;   /* GIL; NULL while PENDING */
  Record* record;    /* while LAZY, and made by an execution */
  struct Cell *sibling, *elder; /* the record's LAZY cells */
  PJRT_Error* error; /* once FAILED */
  PJRT_Event* event; /* once somebody asked */
  Py_buffer* view;   /* GIL; once a pointer was asked for */
  size_t nbytes;
  struct Cell *previous, *next; /* cells with a view */
  struct Cell* link;            /* the queue or the list it is on */
} Cell;

/* These need the state lock. */
State cell_settle(Cell* cell); /* its state, with what its record and its batch know taken in */
void cell_inherit(Cell* cell); /* takes in failures of what it is made from */
Batch* cell_batch(Cell* cell); /* or NULL */
size_t records_join(Batch* batch, Cell*** cells); /* all LAZY cells in no batch yet, with a reference to each; free() the array */
void records_fail(PJRT_Error* error); /* all whose batch is not over */
void cell_fail(Cell* cell, PJRT_Error* error);
void cell_set_ready(Cell* cell);
PyObject* cell_take(Cell* cell); /* GIL held; the value of a cell that only the caller has, who is done with it; or NULL */
Record* record_new(Cell* const* inputs, size_t count);
void record_adopt(Record* record, Cell* cell);
void record_release(Record* record);
void record_fail(Record* record, PJRT_Error* error);
bool cell_unref(Cell* cell); /* true: the caller must cell_free it, without the state lock */
extern atomic_long record_count;

/* These must not hold it. */
Cell* cell_new(State state, PyObject* value, size_t nbytes); /* takes the value */
void cell_free(Cell* cell);
void cell_release(Cell* cell);
PJRT_Error* cell_view(Cell* cell, size_t nbytes, const Py_buffer** view); /* GIL held */
PyObject* cell_value_at(const void* pointer); /* GIL held; new reference or NULL, no exception */

/* ---- evaluation.c ---- */
struct Batch { /* values whose evaluation started together */
  long references; /* state lock */
  uint64_t sequence;
  int64_t cost;      /* of all that was dispatched before it */
  PyObject* started; /* what its first waiter takes and waits for; state lock */
  Batch* next;
};
void batch_unref(Batch* batch);         /* state lock held */
bool batch_is_over(const Batch* batch); /* state lock held */
void evaluation_started(int64_t cost);
void evaluation_to_the_end(PyObject* results);
bool evaluation_must_end(void);
bool evaluates_at_once(void); /* little is under way, and who waits evaluates */
PJRT_Error* evaluate_lazy(bool here); /* GIL held; starts all that is lazy, or ends it, if that is short and the caller may wait */
PJRT_Error* cells_evaluate(Cell* const* cells, size_t count); /* GIL held; one record's; waits */
State cell_state(Cell* cell, PJRT_Error** failure); /* and the error, counted, of one that failed */
PJRT_Error* cell_materialise(Cell* cell); /* GIL held; evaluated, or why not */

/* ---- client.c ---- */
struct PJRT_DeviceDescription {
  int id;
  char *kind, *debug_string, *to_string;
  PJRT_NamedValue* attributes;
  size_t attribute_count;
};
struct PJRT_Memory {
  PJRT_Device* device;
  int id, kind_id;
  char *kind, *debug_string, *to_string;
};
struct PJRT_Device {
  PJRT_Client* client;
  PJRT_DeviceDescription description;
  PJRT_Memory** memories; /* by kind; the first is the default */
};
struct PJRT_TopologyDescription {
  PJRT_Client* client;
};
struct PJRT_Client {
  char *platform_name, *platform_version;
  bool is_on_cpu;
  PJRT_TopologyDescription topology;
  size_t device_count; /* by id, from 0: all of them are MLX's one device */
  PJRT_Device** devices;
  PJRT_DeviceDescription** descriptions;
  size_t memory_count; /* of each device: names for one and the same memory */
  PJRT_Memory** memories;
};
typedef struct {
  int64_t eager_cost, lazy_limit, lazy_bytes;
  int64_t lazy_cost, short_cost; /* of executions together: started at once; waited for under the lock */
  bool view_in_place;
  PyObject *evaluate_now, *start, *synchronize; /* all or none */
  PyObject *scope, *sentinel;                   /* on a GPU */
  bool first_to_the_end;                        /* what a function returns first: never just started */
} Laziness;
extern Laziness laziness;
PJRT_Error* named_values_from_dict(PyObject* dict, PJRT_NamedValue** values, size_t* count, const char* hook);
void named_values_free(PJRT_NamedValue* values, size_t count);

/* ---- layouts.c: PJRT's layouts ---- */
typedef struct Layout {
  struct Layout* next;
  const char* text;
  size_t size, ndim;
  int64_t minor_to_major[];
} Layout;
const Layout* layout_find(const int64_t* minor_to_major, size_t ndim); /* NULL: no permutation, too long, or no memory */
const Layout* layout_row_major(size_t ndim);                           /* so, too */
const Layout* layout_or_null(const Layout* layout);                    /* NULL for row-major, as buffers and types have it */
PJRT_Error* layout_read(const PJRT_Buffer_MemoryLayout* given, size_t ndim, const Layout** layout);
typedef struct {
  PJRT_Extension_Base base;
  void* functions[7];
} LayoutsExtension;
extern const LayoutsExtension layouts_extension;

/* ---- buffers.c ---- */
struct PJRT_Buffer {
  PJRT_Memory* memory;
  Cell* cell;    /* state lock; NULL once deleted and without external references */
  long external; /* state lock */
  atomic_bool deleted, was_read; /* was_read: reading it again is no transfer */
  bool destroyed;
  uint64_t seen; /* the execution that last took it, and as which argument */
  size_t seen_index;
  const Layout* layout; /* NULL: row-major */
  PJRT_Buffer_Type type;
  size_t nbytes;
  size_t ndim;
  int64_t dims[];
};
extern atomic_long buffer_count;
extern atomic_llong buffer_bytes;
PJRT_Buffer* buffer_new(PJRT_Memory* memory, Cell* cell, PJRT_Buffer_Type type, size_t nbytes, size_t ndim,
                        const int64_t* dims); /* takes the reference to the cell */
Cell* buffer_delete(PJRT_Buffer* buffer); /* state lock held; the cell to release, or NULL */
bool nbytes_of(PJRT_Buffer_Type type, const int64_t* dims, size_t ndim, size_t* nbytes);
const char* type_name(PJRT_Buffer_Type type);
size_t describe_type(char* text, size_t size, PJRT_Buffer_Type type, const int64_t* dims, size_t ndim);

/* ---- executables.c ---- */
typedef struct {
  PJRT_Buffer_Type type;
  size_t ndim, nbytes;
  const int64_t* dims;
} Type;
typedef struct {
  size_t count;
  Type* items;
  int64_t* dims; /* of all items, end to end */
} Types;
struct PJRT_Executable {
  atomic_long references;
  PJRT_Client* client;
  PyObject* object;
  char *name, *fingerprint, *options;
  size_t name_size, fingerprint_size, options_size;
  int64_t code_size, cost;
  bool effects, direct, waits, prompt;
  size_t replicas, partitions;
  size_t shards;               /* replicas * partitions: parameters and outputs are those of one after the other */
  PJRT_Device** devices;       /* of each shard; shard = replica * partitions + partition */
  PJRT_LogicalDeviceIds* logical;
  char* assignment;
  size_t assignment_size;
  Types parameters, outputs;
  State* output_states; /* what each output is when its program has run: LAZY, READY or HOST */
  bool* donated; /* by parameter; NULL when none is */
  PJRT_Buffer_Type* output_types;
  size_t* output_ranks;
  size_t* output_memories; /* which of their device's */
  const char **parameter_kinds, **output_kinds;
  size_t *parameter_kind_sizes, *output_kind_sizes;
  const Layout **parameter_layouts, **output_layouts; /* of one device's */
  bool laid_out; /* an output is not row-major */
  PJRT_NamedValue* costs; /* once asked for; state lock */
  size_t cost_count;
  PyObject *program, *format; /* between the two calls of OptimizedProgram; GIL */
  /* Guarded by the lock: */
  PyObject* callable;
  PyObject* leading;
  Py_ssize_t leading_count;
  long runs;
  long next_look; /* the run before which `prepare` is asked again; 0: never */
};
struct PJRT_LoadedExecutable {
  PJRT_Executable* executable;
  atomic_bool deleted;
};
extern atomic_long executable_count;
void executable_release(PJRT_Executable* executable);
PJRT_Executable* executable_retain(PJRT_Executable* executable);

/* ---- execute.c ---- */
typedef struct Job {
  struct Job* next;
  PJRT_Executable* executable;
  PJRT_Event* done; /* or NULL */
  size_t input_count;
  bool* donated; /* by input, or NULL */
  Cell** outputs;
  Cell* inputs[];
} Job;
void job_run(Job* job);                       /* GIL held; frees it */
void job_cancel(Job* job, PJRT_Error* error); /* no GIL needed; frees it, borrows the error */
extern atomic_llong execute_count;

/* ---- threads.c ---- */
extern _Thread_local bool on_executor, on_own_thread;
extern atomic_long pending_jobs;
PJRT_Error* threads_start_executor(void);
void executor_submit(Job* job);        /* takes the job */
bool executor_help(void);              /* on the executor, GIL held: runs the next job, false if none */
void evaluator_arm(Cell* cell);        /* state lock held */
PJRT_Error* threads_start_evaluator(void);
void threads_stop(void);
bool threads_drain(int milliseconds);

/* ---- profiler.c ---- */
typedef struct {
  PJRT_Extension_Base base;
  const void* profiler_api;
  int64_t traceme_context_id;
} ProfilerExtension;
extern const ProfilerExtension profiler_extension;
typedef enum { PROFILE_PROGRAMS, PROFILE_HOST } ProfileLine;
size_t write_varint(char* to, uint64_t value); /* protobuf's, at most 10 bytes; how many */
int64_t profile_now(void); /* nanoseconds; 0 while nobody traces */
void profile_event(ProfileLine line, const char* name, int64_t start); /* it ends now; nothing if start is 0 */

/* ---- bridge.c: the Python half ---- */
#define HOOKS(X)                                                                                        \
  X(plugin_attributes) X(client_create) X(client_destroy) X(compile) X(load) X(serialize)               \
  X(optimized_program) X(prepare) X(execute) X(evaluate) X(schedule) X(from_host) X(adopt) X(host_view) \
  X(memory_stats) X(cost_analysis) X(describe_error)
typedef enum {
#define HOOK_ID(name) HOOK_##name,
  HOOKS(HOOK_ID)
#undef HOOK_ID
  HOOK_COUNT
} Hook;
extern PyObject* hooks[HOOK_COUNT];
PyObject* hook_call(Hook hook, PyObject* arguments); /* takes the tuple, which may be NULL with an exception */

#pragma GCC visibility pop
