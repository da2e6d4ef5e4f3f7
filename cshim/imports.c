/* Another library's import table (libmlx's): finding its cells and writing them; and function files read from memory through it.
   ELF with 64-bit addresses only; elsewhere nothing is found and nothing is changed. */
#define _GNU_SOURCE
#include "bridge.h"

#include "shim.h"

#if defined(__linux__) && (defined(__x86_64__) || defined(__aarch64__))
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <link.h>
#include <stdarg.h>
#include <sys/mman.h>
#include <unistd.h>

#if defined(__x86_64__)
#define IS_CELL(type) ((type) == R_X86_64_GLOB_DAT || (type) == R_X86_64_JUMP_SLOT)
#else
#define IS_CELL(type) ((type) == R_AARCH64_GLOB_DAT || (type) == R_AARCH64_JUMP_SLOT)
#endif

typedef struct {
  const char* library;
  ElfW(Addr) base;
  const ElfW(Dyn) * dynamic;
  uintptr_t relro, relro_end; /* what the loader made read-only */
} Image;

static uintptr_t page_of(uintptr_t address) { return address & -(uintptr_t)sysconf(_SC_PAGESIZE); }

static int is_image(struct dl_phdr_info* info, size_t size, void* data) {
  (void)size;
  Image* image = data;
  const char* slash = info->dlpi_name ? strrchr(info->dlpi_name, '/') : NULL;
  if (!info->dlpi_name || strcmp(slash ? slash + 1 : info->dlpi_name, image->library) != 0) return 0;
  image->base = info->dlpi_addr;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const ElfW(Phdr)* header = &info->dlpi_phdr[i];
    if (header->p_type == PT_DYNAMIC) image->dynamic = (const void*)(image->base + header->p_vaddr);
    if (header->p_type == PT_GNU_RELRO) {
      image->relro = page_of(image->base + header->p_vaddr);
      image->relro_end = page_of(image->base + header->p_vaddr + header->p_memsz);
    }
  }
  return 1;
}

/* glibc has made addresses in the dynamic section absolute; other loaders leave them relative. */
static ElfW(Addr) dynamic_value(const Image* image, ElfW(Sxword) tag, bool is_address) {
  for (const ElfW(Dyn)* entry = image->dynamic; entry->d_tag != DT_NULL; entry++)
    if (entry->d_tag == tag) return is_address && entry->d_un.d_ptr < image->base ? image->base + entry->d_un.d_ptr : entry->d_un.d_ptr;
  return 0;
}

int shim_imports(const char* library, const char* const* names, int count, shim_cell* cells, int most) {
  Image image = {.library = library};
  if (!dl_iterate_phdr(is_image, &image) || !image.dynamic) return -1;
  const ElfW(Sym)* symbols = (const void*)dynamic_value(&image, DT_SYMTAB, true);
  const char* strings = (const void*)dynamic_value(&image, DT_STRTAB, true);
  const struct {
    ElfW(Sxword) table, size;
  } tables[] = {{DT_JMPREL, DT_PLTRELSZ}, {DT_RELA, DT_RELASZ}};
  int found = 0;
  for (size_t t = 0; t < COUNT_OF(tables); t++) {
    const ElfW(Rela)* entry = (const void*)dynamic_value(&image, tables[t].table, true);
    if (!entry) continue;
    const ElfW(Rela)* end = entry + dynamic_value(&image, tables[t].size, false) / sizeof *entry;
    for (; entry < end; entry++) {
      if (!IS_CELL(ELF64_R_TYPE(entry->r_info))) continue;
      const char* symbol = strings + symbols[ELF64_R_SYM(entry->r_info)].st_name;
      for (int i = 0; i < count; i++) {
        if (strcmp(symbol, names[i]) != 0) continue;
        uintptr_t address = image.base + entry->r_offset;
        bool read_only = address >= image.relro && address < image.relro_end;
        if (found < most) cells[found] = (shim_cell){address, i, read_only};
        found++;
        break;
      }
    }
  }
  return found <= most ? found : -1;
}

int shim_write_cell(const shim_cell* cell, uintptr_t value) {
  void* page = (void*)page_of(cell->address);
  size_t size = (size_t)sysconf(_SC_PAGESIZE);
  if (cell->read_only && mprotect(page, size, PROT_READ | PROT_WRITE) != 0) return errno;
  __atomic_store_n((uintptr_t*)cell->address, value, __ATOMIC_RELEASE); /* other threads see the old or the new */
  if (cell->read_only && mprotect(page, size, PROT_READ) != 0) return errno;
  return 0;
}

int shim_file_of(uintptr_t address, char* path, int size) {
  Dl_info place;
  if (!dladdr((void*)address, &place) || !place.dli_fname || strlen(place.dli_fname) >= (size_t)size) return -1;
  strcpy(path, place.dli_fname);
  return 0;
}

/* ---- a file read from memory ----
   MLX reads a function file field by field, twenty reads for each primitive. While a thread is served, the file that libmlx opens there is
   read from these bytes, which are the file's own; positioned reads (pread, for constants, later and on any thread) go to the file. */
static _Thread_local struct {
  const char* data;
  size_t size, at;
  int handle;
} served = {.handle = -1};

static int served_open(const char* path, int flags, ...) {
  mode_t mode = 0;
  if (flags & (O_CREAT | __O_TMPFILE)) {
    va_list rest;
    va_start(rest, flags);
    mode = va_arg(rest, mode_t);
    va_end(rest);
  }
  int handle = open(path, flags, mode);
  if (served.data && served.handle < 0) served.handle = handle;
  return handle;
}

static bool is_served(int handle) { return served.data && handle >= 0 && handle == served.handle; }

static ssize_t served_read(int handle, void* to, size_t wanted) {
  if (!is_served(handle)) return read(handle, to, wanted);
  size_t left = served.size - served.at;
  if (wanted > left) wanted = left;
  memcpy(to, served.data + served.at, wanted);
  served.at += wanted;
  return (ssize_t)wanted;
}

static off_t served_lseek(int handle, off_t offset, int whence) {
  if (!is_served(handle)) return lseek(handle, offset, whence);
  off_t from = whence == SEEK_SET ? 0 : (off_t)(whence == SEEK_CUR ? served.at : served.size);
  if (from + offset < 0 || (size_t)(from + offset) > served.size) {
    errno = EINVAL;
    return -1;
  }
  served.at = (size_t)(from + offset);
  return from + offset;
}

int shim_serve_reads(const char* library) {
  static const char* const names[] = {"open", "read", "lseek"};
  const uintptr_t ours[] = {(uintptr_t)served_open, (uintptr_t)served_read, (uintptr_t)served_lseek};
  shim_cell cells[16];
  int count = shim_imports(library, names, COUNT_OF(names), cells, COUNT_OF(cells));
  unsigned seen = 0;
  for (int i = 0; i < count; i++) seen |= 1u << cells[i].name;
  if (seen != 7) return -1; /* all of them, or none */
  for (int i = 0; i < count; i++)
    if (shim_write_cell(&cells[i], ours[cells[i].name]) != 0) return -1;
  return 0;
}

void shim_serve(const char* data, size_t size) {
  if (is_served(served.handle)) lseek(served.handle, (off_t)served.at, SEEK_SET); /* where it would be */
  served.data = data;
  served.size = size;
  served.at = 0;
  served.handle = -1;
}

#else
int shim_imports(const char* library, const char* const* names, int count, shim_cell* cells, int most) {
  (void)library, (void)names, (void)count, (void)cells, (void)most;
  return -1;
}
int shim_write_cell(const shim_cell* cell, uintptr_t value) { return (void)cell, (void)value, -1; }
int shim_file_of(uintptr_t address, char* path, int size) { return (void)address, (void)path, (void)size, -1; }
int shim_serve_reads(const char* library) { return (void)library, -1; }
void shim_serve(const char* data, size_t size) { (void)data, (void)size; }
#endif
