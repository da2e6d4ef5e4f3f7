/* PJRT_Event: completed once, by its maker; told at once to whoever waits. */
#include "shim.h"

PJRT_Event event_ready = {.references = 1, .ready = true, .permanent = true};
atomic_long event_count;

PJRT_Event* event_new(void) {
  PJRT_Event* event = calloc(1, sizeof *event);
  if (!event) return NULL;
  atomic_init(&event->references, 1);
  atomic_fetch_add(&event_count, 1);
  return event;
}

PJRT_Event* event_retain(PJRT_Event* event) {
  if (event && !event->permanent) atomic_fetch_add(&event->references, 1);
  return event;
}

void event_release(PJRT_Event* event) {
  if (!event || event->permanent || atomic_fetch_sub(&event->references, 1) != 1) return;
  for (Waiter *waiter = event->waiters, *next; waiter; waiter = next) {
    next = waiter->next; /* a promise that nobody can keep any more */
    free(waiter);
  }
  error_release(event->error);
  free(event);
  atomic_fetch_sub(&event_count, 1);
}

PJRT_Event* event_failed(PJRT_Error* error) {
  PJRT_Event* event = event_new();
  if (!event) return &event_ready;
  event->error = error;
  atomic_store(&event->ready, true);
  return event;
}

Waiter* event_complete(PJRT_Event* event, PJRT_Error* error) {
  if (!event || event->ready) return NULL;
  event->error = error_retain(error);
  atomic_store(&event->ready, true);
  Waiter* waiters = event->waiters;
  event->waiters = NULL;
  for (Waiter* waiter = waiters; waiter; waiter = waiter->next) waiter->error = error_retain(error);
  state_changed();
  return waiters;
}

void event_fire(Waiter* waiters) {
  while (waiters) {
    Waiter* next = waiters->next;
    waiters->callback(waiters->error, waiters->argument);
    free(waiters);
    waiters = next;
  }
}

Waiter* waiters_join(Waiter* first, Waiter* second) {
  if (!first) return second;
  Waiter* last = first;
  while (last->next) last = last->next;
  last->next = second;
  return first;
}

PJRT_Error* Event_Destroy(PJRT_Event_Destroy_Args* args) {
  event_release(args->event);
  return NULL;
}

PJRT_Error* Event_IsReady(PJRT_Event_IsReady_Args* args) {
  args->is_ready = atomic_load(&args->event->ready);
  return NULL;
}

PJRT_Error* Event_Error(PJRT_Event_Error_Args* args) {
  if (!atomic_load(&args->event->ready)) return error_new(PJRT_Error_Code_FAILED_PRECONDITION, "the event is not ready");
  return error_retain(args->event->error);
}

PJRT_Error* Event_Await(PJRT_Event_Await_Args* args) {
  PJRT_Event* event = args->event;
  if (!atomic_load(&event->ready)) {
    REFUSE_IF_CLOSED();
    PyGILState_STATE gil = PyGILState_Ensure(); /* so that it can be dropped, whoever has it */
    while (on_executor && !atomic_load(&event->ready) && executor_help()) continue;
    PyThreadState* thread = PyEval_SaveThread();
    state_lock();
    while (!event->ready) state_wait();
    state_unlock();
    PyEval_RestoreThread(thread);
    PyGILState_Release(gil);
  }
  return error_retain(event->error);
}

PJRT_Error* Event_OnReady(PJRT_Event_OnReady_Args* args) {
  PJRT_Event* event = args->event;
  if (!atomic_load(&event->ready)) {
    REFUSE_IF_CLOSED();
    Waiter* waiter = calloc(1, sizeof *waiter);
    if (!waiter) return error_new(PJRT_Error_Code_RESOURCE_EXHAUSTED, "no memory for an event's callback");
    waiter->callback = args->callback;
    waiter->argument = args->user_arg;
    state_lock();
    bool late = event->ready;
    if (!late) {
      waiter->next = event->waiters;
      event->waiters = waiter;
    }
    state_unlock();
    if (!late) return NULL;
    free(waiter);
  }
  args->callback(error_retain(event->error), args->user_arg);
  return NULL;
}

PJRT_Error* Event_Create(PJRT_Event_Create_Args* args) {
  args->event = event_new();
  return args->event ? NULL : error_new(PJRT_Error_Code_RESOURCE_EXHAUSTED, "no memory for an event");
}

PJRT_Error* Event_Set(PJRT_Event_Set_Args* args) {
  REFUSE_IF_CLOSED();
  if (atomic_load(&args->event->ready)) return INVALID("the event was set before");
  PJRT_Error* error = args->error_code == PJRT_Error_Code_OK
                          ? NULL
                          : error_from_text(args->error_code, args->error_message, args->error_message_size);
  state_lock();
  Waiter* waiters = event_complete(args->event, error);
  state_unlock();
  error_release(error);
  event_fire(waiters);
  return NULL;
}
